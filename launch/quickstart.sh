#!/usr/bin/env bash
# From a fresh clone to a first result: makes an environment, installs protojax, trains on the
# handwritten digits inside scikit-learn and ends with the verdict on collapse, the k-NN accuracy
# and where the picture lies. Needs Python 3.11 or later and the package index; no GPU, no data.
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
exec "$venv/bin/python" -m protojax.main --config=configs/quickstart.py --workdir="$workdir" "$@"
