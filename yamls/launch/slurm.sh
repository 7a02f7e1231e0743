#!/usr/bin/env bash
# Train on 8 nodes with 8 GPUs each under SLURM, from the folder that all nodes see the checkout in:
#
#   sbatch yamls/launch/slurm.sh yamls/joint_fsdp.yaml [key.sub=value ...]
#
# Only the checkout must be shared. Data and checkpoints are on the object store, whose credentials come from the
# environment of `sbatch`. The job returns to the queue, and resumes from the newest checkpoint, if its time is up, if
# it is preempted, if a node fails, and up to 10 times if a process does. A mistake in the yaml (status 2) or
# divergence (65) ends it.
#SBATCH --job-name=joint
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=joint-%j.log
set -euo pipefail

PATH="$PWD/.venv/bin:$PATH"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts[0]:?no host}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # apart for jobs that share a node
export PATH MASTER_ADDR MASTER_PORT NODES="$SLURM_NNODES" GPUS="$SLURM_GPUS_ON_NODE"
export TMPDIR="${SLURM_TMPDIR:-/tmp}" # on each node's own disk: what is uploaded waits here

status=0
# shellcheck disable=SC2016 # SLURM_NODEID is another one on each node
srun --kill-on-bad-exit=1 \
  bash -c 'NODE_RANK=$SLURM_NODEID exec yamls/launch/node.sh recipe/train.py "$@"' bash "$@" || status=$?

case $status in
  0 | 2 | 65) ;;
  75) scontrol requeue "$SLURM_JOB_ID" ;;
  *) if [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then scontrol requeue "$SLURM_JOB_ID"; fi ;;
esac
exit "$status"
