#!/usr/bin/env bash
# From a fresh clone to a first result: makes an environment, installs protojax and trains the same
# net twice, side by side, on the handwritten digits inside scikit-learn: with prototypes that are
# learned jointly with it, and with decoupled ones. Ends with a table and a picture of both beside
# what there is without training. Needs Python 3.11 or later and the package index; no GPU, no data.
#
#   bash launch/quickstart.sh [WORKDIR] [--config.key=value ...]     (default runs/quickstart)
#
# A second run goes on where the first one stopped, or reports again; it installs nothing anew.
#
#   PROTOJAX_VENV     where the environment goes (default .venv)
#   PROTOJAX_PYTHON   the interpreter, found by itself if not given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

workdir=runs/quickstart
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  workdir=$1
  shift
fi
venv=${PROTOJAX_VENV:-.venv}
python=${PROTOJAX_PYTHON:-$(require_python 3.11 3.12 3.13)}

# The versions that the whole test suite runs with, not those of the day.
make_venv "$venv" "$python" -c launch/floors.txt -e .

export JAX_PLATFORMS=cpu
# Threads that XLA takes for each of the two: half the cores.
NPROC=$("$venv/bin/python" -c "import os; print(max(1, (os.cpu_count() or 1) // 2))")
export NPROC

# labelled NAME: copies lines as they come, each behind the name of its run.
labelled() {
  trap '' HUP INT TERM
  while IFS= read -r line; do printf '%-9s | %s\n' "$1" "$line"; done
}

pids=()
# Runs save a checkpoint when they are told to stop.
trap 'trap "" HUP INT TERM; kill -TERM "${pids[@]}" 2>/dev/null; wait "${pids[@]}" || true; exit 130' HUP INT TERM
for name in joint decoupled; do
  mode=${name#decoupled}
  "$venv/bin/python" -m protojax.main --config="configs/quickstart.py${mode:+:$mode}" \
    --workdir="$workdir/$name" "$@" > >(labelled "$name") 2>&1 &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  wait "$pid" || failed=yes
done
[ -z "${failed:-}" ] || die "a run did not end, see above; the same command goes on from its last checkpoint"

exec "$venv/bin/python" -m protojax.report --workdir="$workdir/joint" --workdir="$workdir/decoupled" \
  --out="$workdir/comparison.html"
