#!/usr/bin/env bash
# Trains on NVIDIA GPUs of a Slurm cluster: one process a card; jax.distributed reads Slurm's
# variables.
#
#   launch/slurm.sh --name=jf --nodes=8 --config=configs/pretrain.py --workdir=/shared/runs/pretrain \
#       [--cards=8] [--partition=P] [--account=A] [--hours=24] [--python=PATH] [--dry-run] [-- ...]
#
# --cards    of a node; default 8
# --python   of an environment with janusflow_jax[cuda] that every node sees; default .venv/bin/python
# --hours    after which Slurm ends the job. 120 s before, it sends SIGTERM: the run saves, ends, and
#            the same command goes on; a job that was preempted is queued again by Slurm

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
read_options "name nodes cards partition account hours python config workdir" "$@"
need name nodes config workdir
CARDS="${CARDS:-8}"

job=(sbatch --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$CARDS" --gpus-per-node="$CARDS"
  --exclusive --time="$((${HOURS:-24} * 60))" --signal=TERM@120 --requeue --open-mode=append
  --output="$NAME-%j.log")
[ -z "${PARTITION:-}" ] || job+=(--partition="$PARTITION")
[ -z "${ACCOUNT:-}" ] || job+=(--account="$ACCOUNT")
command="$(train_command)"
command="${PYTHON:-.venv/bin/python}${command#python}"
# JAX takes three quarters of a card's memory unless told otherwise.
job+=(--wrap="XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 srun --kill-on-bad-exit=1 $command")
run "${job[@]}"
