#!/usr/bin/env bash
# Several nodes under Slurm, one process a node, all GPUs of each node:
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --mem=0 --time=2-0 \
#     launch/slurm.sh --config=configs/gmm_vit_s.py --workdir=/shared/runs/gmm
#
# Cores decode images: ask for all of a node. Submit from the clone, which every node must see at
# the same path, with protojax installed in its .venv or in the environment that is active:
# pip install -e ".[cuda]". The workdir, too, must lie on a filesystem that all nodes share. The
# addresses of the processes come from Slurm. --ntasks-per-node=8 makes it one process a GPU.
#
# The job queues itself again until the run is done. What the run ends with decides:
#
#   0          done
#   143        it was told to stop and has saved: at the end of the time (120 seconds before), when
#              preempted, by `scancel --signal=TERM JOB`: again
#   75, 137    a process was lost: again; not if a job restarted 5 times ends so within 10 minutes
#   the rest   given up: 2 is a mistake to mend, 1 a fault
#
# `scancel JOB` is for good: the run saves, as far as Slurm's KillWait goes, and does not come back.
#SBATCH --job-name=protojax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the clone}"
source launch/venv.sh

[ $# -gt 0 ] || die "give --config=NAME --workdir=FOLDER"
python=$(active_python)
restarts=${SLURM_RESTART_COUNT:-0}
[ "$restarts" = 0 ] || set -- "$@" --config.overwrite=False
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
# In the clone, which all nodes see, as a home may not be: JAX writes on the first process alone, and
# where that one finds its programs and the others do not, they wait for it to compile.
if [ -z "${JAX_COMPILATION_CACHE_DIR+said}" ]; then
  mkdir -pm 700 .jax_cache
  export JAX_COMPILATION_CACHE_DIR=$PWD/.jax_cache
fi

# Slurm signals the steps of a job that is preempted, this script alone at the end of the time, and
# both when the job is cancelled.
cancelled= interrupted=
trap 'interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # its steps, not this script
trap 'interrupted=yes cancelled=yes' TERM

# Under Slurm JAX gives each process the one GPU of its local rank; with one process a node it has
# to be told to take them all. srun does not take --cpus-per-task from sbatch. It must not kill the
# others as soon as one has saved and ended with 143; they end by themselves where one is lost.
tasks=${SLURM_NTASKS_PER_NODE:-1}
srun --ntasks-per-node="$tasks" ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
  --kill-on-bad-exit=0 --wait=300 bash -c '
  if [ "$1" = 1 ]; then
    last=$((${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L | wc -l)} - 1))
    export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 "$last")
  fi
  shift
  exec "$0" -m protojax.main "$@"' "$python" "$tasks" "$@" &
step=$!
until interrupted= status=0; wait "$step" || status=$?; [ -z "$interrupted" ]; do :; done

again=
case $status in
  143) again=yes ;;
  75 | 137) [ "$restarts" -ge 5 ] && [ "$SECONDS" -lt 600 ] || again=yes ;;
esac
if [ -n "$again" ] && [ -z "$cancelled" ]; then
  echo "slurm.sh: status $status, queued again"
  scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: not queued again: submit the same command" >&2
fi
exit "$status"
