#!/bin/bash
# One process for each GPU, on any cluster with Slurm:
#
#   sbatch examples/slurm/plain.sh examples/train_lm.py --ulysses 4 --ring 2 --seq-len 65536
#
# Change nodes and GPUs below. Submitted again, or requeued, it goes on from its last checkpoint, on
# as many processes as it then has.
#SBATCH --job-name=usp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
#SBATCH --requeue
set -euo pipefail

name=$(basename "${1:?usage: sbatch plain.sh PROGRAM.py [its options]}" .py)
folder=${USP_RUNS:-runs}/$name
mkdir -p "$folder"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# All GPUs of a node are visible to each process, which takes that of its local rank.
# shellcheck disable=SC2016
srun bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec python "$@"' \
  task "$@" --save "$folder" --save-every 100 --resume "$folder" --plot "$folder/loss.png"
