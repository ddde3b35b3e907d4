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
# So run it in tmux or behind nohup, and to have a run save and end, send it SIGTERM:
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
where=(--project="$PROJECT" --zone="$ZONE" --worker=all)
tpu=(${run[@]+"${run[@]}"} gcloud compute tpus tpu-vm)

# The first connection makes keys; done alone, the later ones do not race for it.
"${tpu[@]}" ssh "$NAME" "${where[@]}" --command=true

${run[@]+"${run[@]}"} git archive --format=tar.gz --output="$tarball" HEAD
"${tpu[@]}" scp "$tarball" "$NAME:protojax.tar.gz" "${where[@]}"

prepare='rm -rf protojax-launch && mkdir protojax-launch && tar xzf protojax.tar.gz -C protojax-launch
cd protojax-launch && source launch/venv.sh &&
make_venv "$HOME/protojax-venv" "$(require_python 3.12 3.13 3.11)" -e ".[tpu]"'
"${tpu[@]}" ssh "$NAME" "${where[@]}" --command="bash -c $(printf %q "$prepare")"

train="cd protojax-launch && exec ~/protojax-venv/bin/python -m protojax.main$(printf ' %q' "$@")"
"${tpu[@]}" ssh "$NAME" "${where[@]}" \
  --ssh-flag="-o ServerAliveInterval=30" --command="$train"
