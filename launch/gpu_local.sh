#!/usr/bin/env bash
# All GPUs of this machine, one process:
#
#   bash launch/gpu_local.sh --config=gmm_vit_s --workdir=runs/gmm
#
# Relative paths are those of the clone, wherever it is called from.
# Install first: pip install -e ".[cuda]" (in .venv, or in the environment that is active).
# CUDA_VISIBLE_DEVICES chooses GPUs. JAX takes three quarters of their memory at its start; give
# XLA_PYTHON_CLIENT_MEM_FRACTION=.5 where something else needs the rest. Compiled programs are kept
# in JAX_COMPILATION_CACHE_DIR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

[ $# -gt 0 ] || die "give --config=NAME --workdir=FOLDER"
nvidia-smi -L >/dev/null 2>&1 || die "no NVIDIA GPU is visible here (nvidia-smi -L fails)"
python=$(active_python)
"$python" -c "
import importlib.util, sys
sys.exit(not any(importlib.util.find_spec(f'jax_cuda{v}_plugin') for v in (12, 13)))" ||
  die "$python has no JAX for CUDA: $python -m pip install -e '.[cuda]'"

# A GPU that cannot be used is then an error, not a run on the CPU.
export JAX_PLATFORMS=cuda,cpu
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/protojax/xla}
exec "$python" -m protojax.main "$@"
