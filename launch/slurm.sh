#!/usr/bin/env bash
# Trains on NVIDIA GPUs of a Slurm cluster, with one process per GPU. jax.distributed reads Slurm's
# environment variables.
#
#   launch/slurm.sh --name=jf --nodes=8 --config=configs/pretrain.py --workdir=/shared/runs/pretrain \
#       [--gpus=8] [--partition=P] [--account=A] [--hours=24] [--python=PATH] [--dry-run] [-- ...]
#
# --gpus     per node; default 8
# --python   of an environment with janusflow_jax[cuda] that every node sees; default .venv/bin/python
# --hours    time limit, a whole number; default 24. Slurm sends SIGTERM 120 s before: the run saves and
#            exits, and the same command resumes it. Slurm requeues a preempted job

set -euo pipefail
SCRIPT="$(realpath "$0")"
cd "$(dirname "$SCRIPT")/.."
source launch/common.sh
read_options "name nodes gpus cards partition account hours python config workdir" "$@"
require name nodes config workdir
whole hours
GPUS="${GPUS:-${CARDS:-8}}" # --cards is the old name

job=(sbatch --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS"
  --exclusive --time="$((${HOURS:-24} * 60))" --signal=TERM@120 --requeue --open-mode=append
  --output="$NAME-%j.log")
[ -z "${PARTITION:-}" ] || job+=(--partition="$PARTITION")
[ -z "${ACCOUNT:-}" ] || job+=(--account="$ACCOUNT")
command="$(train_command)"
command="${PYTHON:-.venv/bin/python}${command#python}"
# JAX preallocates only 75 % of a GPU's memory by default.
job+=(--wrap="XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 srun --kill-on-bad-exit=1 $command")
run "${job[@]}"
