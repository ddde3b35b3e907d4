#!/usr/bin/env bash
# One Cloud TPU slice of any size: copies the commit to every host, installs it once, and runs the
# same program on all of them. Run it on your own machine, from the clone, with gcloud set up:
#
#   NAME=my-tpu ZONE=us-east5-a PROJECT=my-project bash launch/tpu_pod.sh \
#     --config=configs/gmm_vit_s.py --workdir=/mnt/shared/gmm
#
# With --dry-run as its first argument it only prints the commands. What runs is the last commit,
# not the files of the working tree. The workdir lies on a file system that all hosts mount at the
# same path (Filestore, or a bucket through gcsfuse), because all hosts write into one checkpoint.
# JAX finds the other hosts and all chips by itself; no XLA flag is needed.
#
# It stays in the foreground and shows the lines of the run. A closed terminal, or Ctrl-C, cuts the
# connection and tells the hosts nothing: they may train on unseen, with WORKDIR/train.log to read.
# So run it in tmux or behind nohup. With
#
#   TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SPOT=yes NAME=... bash launch/tpu_pod.sh ...
#
# it makes the slice where there is none, and makes it again and goes on when it was preempted. The
# run also goes on by itself after a lost process (75, 137) or connection (255), unless five in
# succession end so within 10 minutes; any other status is the script's own. SPOT=yes may be left
# out. To have a run save and end for good (143), send it SIGTERM:
#
#   gcloud compute tpus tpu-vm ssh my-tpu --project=my-project --zone=us-east5-a --worker=all \
#     --command="pkill -TERM -f protojax[.]main"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

run=()
if [ "${1:-}" = --dry-run ]; then
  print() { printf '%q ' "$@" && echo; }
  run=(print)
  shift
fi
: "${NAME:?is the name of the TPU: NAME=my-tpu ZONE=us-east5-a PROJECT=my-project bash $0 ...}"
: "${ZONE:?is the zone of the TPU, such as us-east5-a}"
: "${PROJECT:?is the Google Cloud project of the TPU}"
[ ${#run[@]} != 0 ] || command -v gcloud >/dev/null || die "gcloud is not here: install Google Cloud's CLI"
workdir= before=
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#--workdir=} ;;
    *) [ "$before" != --workdir ] || workdir=$argument ;;
  esac
  before=$argument
done
[[ $workdir == /?* ]] ||
  die "--workdir=$workdir must be an absolute path that all hosts mount: they write one checkpoint"

commit=$(git rev-parse --short HEAD) || die "this is no git clone with a commit to copy"
[ -z "$(git status --porcelain)" ] || echo "Uncommitted changes stay here; $commit runs." >&2
tarball=${TMPDIR:-/tmp}/protojax-$commit.tar.gz
answer=${TMPDIR:-/tmp}/protojax-$NAME-$commit.answer
slice=(--project="$PROJECT" --zone="$ZONE")
where=("${slice[@]}" --worker=all)
tpu=(${run[@]+"${run[@]}"} gcloud compute tpus tpu-vm)

prepare='rm -rf protojax-launch && mkdir protojax-launch && tar xzf protojax.tar.gz -C protojax-launch
cd protojax-launch && source launch/venv.sh &&
python=$(find_python 3.12 3.13 3.11 || fetch_python 3.12) &&
make_venv "$HOME/protojax-venv" "$python" -e ".[tpu]"'
train="cd protojax-launch && exec ~/protojax-venv/bin/python -m protojax.main$(printf ' %q' "$@")"
# What a lost connection may have left running.
clear='pkill -TERM -f protojax[.]main; for i in $(seq 120); do
pgrep -f protojax[.]main >/dev/null || exit 0; sleep 1; done; pkill -KILL -f protojax[.]main'

# state: of the slice; nothing where there is none, and in a dry run. Without an answer, as when this
# machine is off the network, it is asked again for an hour.
state() {
  local said tries=0
  [ ${#run[@]} = 0 ] || return 0
  until said=$("${tpu[@]}" describe "$NAME" "${slice[@]}" --format="value(state)" 2>"$answer"); do
    ! grep -q NOT_FOUND "$answer" || return 0
    ! grep -qE "PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT" "$answer" ||
      die "gcloud says of $NAME: $(tail -n 1 "$answer")"
    tries=$((tries + 1))
    [ "$tries" -lt 120 ] || die "nothing could be learned of $NAME for an hour: $(tail -n 1 "$answer")"
    echo "tpu_pod.sh: nothing learned of $NAME, asked again: $(tail -n 1 "$answer")" >&2
    sleep 30
  done
  echo "$said"
}

# make_slice: returns when the slice is there; a zone without room is asked again and again.
make_slice() {
  local is
  while :; do
    is=$(state) || exit
    case $is in
      READY) return ;;
      "")
        "${tpu[@]}" create "$NAME" "${slice[@]}" --accelerator-type="$TYPE" \
          --version="${VERSION:?is the runtime, such as v2-alpha-tpuv5-lite}" \
          ${SPOT:+--spot} || sleep 60
        ;;
      CREATING | STARTING | RESTARTING | REPAIRING | STOPPING | DELETING) sleep 10 ;;
      *) "${tpu[@]}" delete "$NAME" "${slice[@]}" --quiet || sleep 60 ;;
    esac
    [ ${#run[@]} = 0 ] || break
  done
}

install() {
  # The first connection makes keys; done alone, the later ones do not race for it.
  "${tpu[@]}" ssh "$NAME" "${where[@]}" --command=true || return
  [ -z "$again" ] || "${tpu[@]}" ssh "$NAME" "${where[@]}" --command="$clear" || true
  "${tpu[@]}" scp "$tarball" "$NAME:protojax.tar.gz" "${where[@]}" &&
    "${tpu[@]}" ssh "$NAME" "${where[@]}" --command="bash -c $(printf %q "$prepare")"
}

${run[@]+"${run[@]}"} git archive --format=tar.gz --output="$tarball" HEAD
short=0 again=
while :; do
  [ -z "${TYPE:-}" ] || make_slice
  SECONDS=0 status=0
  install || status=$?
  if [ "$status" = 0 ]; then
    SECONDS=0
    "${tpu[@]}" ssh "$NAME" "${where[@]}" \
      --ssh-flag="-o ServerAliveInterval=30" --command="$train" || status=$?
  fi
  [ "$status" != 0 ] && [ ${#run[@]} = 0 ] || exit "$status"

  # A slice that is preempted stops its programs first and is called so later.
  again=yes
  is=$(state) || exit
  for ((i = 0; i < 12; i++)); do
    case $status-$is in 143-READY | 255-READY) sleep 10 ;; *) break ;; esac
    is=$(state) || exit
  done
  if [ "$is" != READY ]; then
    [ -n "${TYPE:-}" ] || die "the slice is ${is:-gone}, the run ended with $status: TYPE=... and \
VERSION=... let this script make it again and go on"
    echo "tpu_pod.sh: the slice is ${is:-gone}, status $status: made again" >&2
    continue
  fi
  case $status in 75 | 137 | 255) ;; *) exit "$status" ;; esac
  short=$((SECONDS < 600 ? short + 1 : 0))
  [ "$short" -lt 5 ] || exit "$status"
  echo "tpu_pod.sh: status $status, started again" >&2
done
