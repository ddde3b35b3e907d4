# Functions for the scripts beside this file, which source it: find a Python that really runs, and
# make a virtual environment once.

die() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}

# find_python VERSION...: prints the first interpreter of the first version there is, or fails.
# A name on PATH proves nothing (pyenv leaves commands there that only print an error) and Debian
# packages venv apart from Python, so each candidate must run and hold ensurepip.
find_python() {
  local version candidate
  for version in "$@"; do
    for candidate in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python python3; do
      candidate=$(command -v "$candidate") || continue
      if "$candidate" -c "
import sys
assert sys.version.startswith('$version.')
import ctypes, ensurepip, ssl" >/dev/null 2>&1; then
        echo "$candidate"
        return 0
      fi
    done
  done
  return 1
}

# require_python VERSION...: find_python, or one line that says how to mend it.
require_python() {
  if [ -n "${PROTOJAX_PYTHON:-}" ]; then
    echo "$PROTOJAX_PYTHON"
    return
  fi
  find_python "$@" || die "no usable Python of version $* was found: install one, on Debian or \
Ubuntu with its venv package (apt install python3.12-venv), or name one: PROTOJAX_PYTHON=/path/to/python"
}

# fetch_python VERSION: downloads one with uv into the user's own folder, where the machine's is too
# old, as Ubuntu 22.04's, and prints it.
fetch_python() {
  local uv=$HOME/.local/bin/uv
  [ -x "$uv" ] || python3 -m pip install -qq --user uv >&2 ||
    curl -LsSf https://astral.sh/uv/install.sh | sh >&2
  "$uv" python install --quiet "$1" >&2 && "$uv" python find "$1"
}

# install_packages PYTHON PIP_ARGUMENT...: into the environment of PYTHON. With uv, which takes seconds where
# pip takes a minute; with pip where uv cannot be had or fails, as behind an index that only pip knows.
install_packages() {
  local python=$1 uv
  shift
  uv=$(dirname "$python")/uv
  if [ -x "$uv" ] || "$python" -m pip install -qq --disable-pip-version-check uv 2>/dev/null; then
    UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}} \
      "$uv" pip install --quiet --python "$python" "$@" 2>/dev/null && return
  fi
  "$python" -m pip install -qq --disable-pip-version-check "$@"
}

# wanted PYTHON PIP_ARGUMENT...: what an environment holds, in a line.
wanted() {
  local python=$1
  shift
  echo "$("$python" -V) $* $(cat pyproject.toml launch/floors.txt | cksum)"
}

# make_venv FOLDER PYTHON PIP_ARGUMENT...: makes FOLDER and installs into it from the clone, only
# when this Python or the packages asked for are not those of the last time.
make_venv() {
  local folder=$1 python=$2 wanted
  shift 2
  wanted=$(wanted "$python" "$@")
  if [ "$(cat "$folder/installed" 2>/dev/null)" = "$wanted" ] && "$folder/bin/python" -c ""; then
    return 0
  fi
  if [ -e "$folder" ] && [ ! -e "$folder/pyvenv.cfg" ]; then
    die "$folder is there and is no virtual environment: move it away"
  fi
  echo "Installing into $folder ($("$python" -V), up to a minute)"
  "$python" -m venv --clear "$folder" &&
    install_packages "$folder/bin/python" "$@" &&
    echo "$wanted" >"$folder/installed"
}

# active_python: the interpreter of the active environment, else of .venv, else of PATH.
active_python() {
  local candidate
  for candidate in "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python" .venv/bin/python; do
    if [ -x "$candidate" ]; then
      echo "$candidate"
      return 0
    fi
  done
  command -v python3 || die "no Python is active: make one, python3 -m venv .venv"
}
