#!/usr/bin/env bash
# Several nodes under Slurm, one process a node, all GPUs of each node:
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --mem=0 --time=2-0 --requeue \
#     launch/slurm.sh --config=configs/gmm_vit_s.py --workdir=/shared/runs/gmm
#
# Cores decode images: ask for all of a node. At the end of the time, or when the job is preempted,
# the run saves and ends (SIGTERM, 120 seconds before); started again, by --requeue too, it goes on.
# Submit from the clone, which every node must see at the same path, with protojax installed in its
# .venv or in the environment that is active: pip install -e ".[cuda]". The workdir, too, must lie
# on a filesystem that all nodes share. The addresses of the processes come from Slurm.
#SBATCH --job-name=protojax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the clone}"
source launch/venv.sh

[ $# -gt 0 ] || die "give --config=configs/NAME.py --workdir=FOLDER"
python=$(active_python)
export JAX_PLATFORMS=cuda,cpu
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/protojax/xla}

# Under Slurm JAX gives each process the one GPU of its local rank; with one process a node it has
# to be told to take them all.
# srun does not take --cpus-per-task from sbatch.
exec srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
  --kill-on-bad-exit=1 bash -c '
  last=$((${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L | wc -l)} - 1))
  export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 "$last")
  exec "$0" -m protojax.main "$@"' "$python" "$@"
