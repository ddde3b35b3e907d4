#!/usr/bin/env bash
# Makes a virtual environment and runs what has to pass:
#
#   bash launch/test.sh                  lint, types, the test suite; .ci/run is this
#   bash launch/test.sh --all            also a smoke on a newer Python, comparisons with PyTorch,
#                                                    runs that are killed, what installs anew
#   bash launch/test.sh tests/evals/knn_test.py -k ties    the arguments go to pytest, which works on all
#                                                    cores; -n 0 keeps to one process
#
# On Python 3.11 the environment holds exactly the floors of pyproject.toml, the oldest versions
# that are supported. With --all a second environment on Python 3.12 or later holds the newest of
# everything; there the modules are imported, the mixture is tested and 20 steps are trained. Where
# 3.11 is missing the suite itself runs on the newer Python with the newest packages.
#
# The last line of the output is pytest's. The status is not 0 when any part failed.
#
#   PROTOJAX_TEST_VENV   where the environment goes (default .venv-test; the second: *-newest)
#   PROTOJAX_PYTHON      the interpreter of the suite, found by itself if not given
#   PROTOJAX_DATA_DIR    prepared data sets (default ../shared/data); tests that need one it lacks
#                        are skipped, and so are those that compare with PyTorch where it has no build
#                        for CPUs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
unset PYTHONPATH PYTHONHOME
export JAX_PLATFORMS=cpu MPLBACKEND=Agg

venv=${PROTOJAX_TEST_VENV:-$PWD/.venv-test}
python=${PROTOJAX_PYTHON:-$(require_python 3.11 3.12 3.13)}

all=
if [ "${1:-}" = --all ]; then
  all=yes
  export PROTOJAX_TEST_ALL=1
  shift
fi

# Compiled programs are kept, so that a second run of the suite takes a fraction of the time, in
# another checkout too.
cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/protojax-tests
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache/xla}
# The small ones too: a run makes two hundred. So are the types that mypy has found.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export MYPY_CACHE_DIR=${MYPY_CACHE_DIR:-$cache/mypy}

smoke() {
  local python=$1 folder=$venv-newest status=0 run
  make_venv "$folder" "$python" -e ".[test]" || return
  "$folder/bin/python" -c "
import importlib, pkgutil, jax, flax, protojax
for module in pkgutil.walk_packages(protojax.__path__, 'protojax.'):
  importlib.import_module(module.name)
print(f'jax {jax.__version__}, flax {flax.__version__}: every module imports')" || return
  "$folder/bin/python" -m pytest --quiet tests/prototypes/mixture_test.py || return
  run=$(mktemp -d)
  "$folder/bin/python" -m protojax.main --config=configs/quickstart.py:debug --workdir="$run" \
    --config.num_steps=20 || status=$?
  rm -rf "$run"
  return "$status"
}

# PyTorch and transformers, whose networks ours are compared with: only where a build of PyTorch for
# CPUs is at hand, because the package index's for Linux brings several GB of CUDA. Constrained, so
# that the versions under test stay what they are.
add_peers() {
  local constraint=() peers
  [ ! -e "$venv/peers" ] || return 0
  [ -z "${PROTOJAX_AT_FLOORS:-}" ] || constraint=(-c launch/floors.txt)
  mapfile -t peers < <("$venv/bin/python" -c "
import sys, tomllib
project = tomllib.load(open('pyproject.toml', 'rb'))['project']
for package in project['optional-dependencies']['peers']:
  print(package + '+cpu' * (package.startswith('torch==') and sys.platform == 'linux'))")
  if install_packages "$venv/bin/python" "${constraint[@]}" "${peers[@]}"; then
    touch "$venv/peers"
  else
    echo "Comparisons with PyTorch left out: no build of it for CPUs can be had here"
  fi 2>/dev/null
}

# The compiler for TPUs, which plans for slices that nobody has here.
add_libtpu() {
  [ ! -e "$venv/libtpu" ] || return 0
  local package
  package=$("$venv/bin/python" -c "
import tomllib
print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['plan'])")
  if install_packages "$venv/bin/python" "$package"; then
    touch "$venv/libtpu"
  else
    echo "Plans for TPUs left out: no libtpu for this machine can be had here"
  fi 2>/dev/null
}

# A Slurm, in which a job is stopped and goes on: Debian's packages, which only root may install.
add_slurm() {
  [ ! -x /usr/sbin/slurmd ] || return 0
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get install -y munge slurm-wlm >/dev/null 2>&1 && return
  fi
  echo "Jobs of Slurm left out: apt-get install munge slurm-wlm"
}

failed=
if "$python" -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))"; then
  make_venv "$venv" "$python" -c launch/floors.txt -e ".[test]"
  export PROTOJAX_AT_FLOORS=1
  if [ -z "$all" ]; then
    echo "Smoke on a newer Python left out: bash launch/test.sh --all runs it"
  elif newer=$(find_python 3.12 3.13); then
    echo "Smoke on $("$newer" -V) ($newer), newest packages"
    smoke "$newer" || failed+=" smoke"
  else
    echo "Smoke on a newer Python left out: no Python 3.12 or 3.13 that runs was found here"
  fi
else
  echo "No Python 3.11 chosen: the suite runs on $("$python" -V) with the newest packages"
  make_venv "$venv" "$python" -e ".[test]"
fi
[ -z "$all" ] || add_peers
[ -z "$all" ] || add_libtpu
[ -z "$all" ] || add_slurm

"$venv/bin/python" -m ruff check . || failed+=" ruff"
"$venv/bin/python" -m ruff format --check . || failed+=" format"
"$venv/bin/python" -m mypy || failed+=" mypy"
"$venv/bin/python" -m pytest -n auto --dist loadgroup --durations=10 "$@" || failed+=" pytest"
[ -z "$failed" ] || die "failed:$failed (see above)"
