#!/bin/bash
# Frontier (OLCF): eight processes a node, one for each half of an MI250X. Ulysses inside a node, the
# ring between nodes:
#
#   sbatch -A PROJECT -N 2 examples/slurm/frontier.sh examples/train_lm.py --ulysses 8 --ring 2 \
#     --heads 8 --kv-heads 8 --seq-len 65536
#
# Modules and variables as OLCF's page on PyTorch has them (July 2026). Install on a login node, with
# these modules: pip install torch==2.10.0 --index-url https://download.pytorch.org/whl/rocm7.1, then
# USP_BUILD=hip PYTORCH_ROCM_ARCH=gfx90a pip install --no-build-isolation . and look at usp info.
# Nobody has run this script on Frontier yet.
#SBATCH --job-name=usp
#SBATCH --nodes=2
#SBATCH --time=00:30:00
#SBATCH --network=disable_rdzv_get
set -euo pipefail

module load PrgEnv-gnu/8.7.0 cpe/26.03 miniforge3/23.11.0-0 rocm/7.1.1 craype-accel-amd-gfx90a \
  rccl-net-plugin # without this one RCCL takes TCP: NCCL_DEBUG=INFO must name OFI
source activate "${USP_ENVIRONMENT:?the conda environment that usp is installed in}"
export LD_LIBRARY_PATH=${CRAY_LD_LIBRARY_PATH:-}:${LD_LIBRARY_PATH:-}

name=$(basename "${1:?usage: sbatch frontier.sh PROGRAM.py [its options]}" .py)
folder=${USP_RUNS:-runs}/$name
mkdir -p "$folder"

MASTER_ADDR=$(hostname -i | cut -d ' ' -f 1)
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) OMP_NUM_THREADS=7
export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3
export NCCL_CROSS_NIC=1 NCCL_NET_GDR_LEVEL=PHB HSA_FORCE_FINE_GRAIN_PCIE=1
export FI_MR_CACHE_MONITOR=kdreg2 # memhooks deadlocks
export FI_CXI_RDZV_PROTO=alt_read FI_CXI_RDZV_EAGER_SIZE=0 FI_CXI_RDZV_THRESHOLD=0
export FI_CXI_RDZV_GET_MIN=0 FI_CXI_DEFAULT_TX_SIZE=2048 FI_CXI_DEFAULT_CQ_SIZE=131072
export FI_CXI_DISABLE_HOST_REGISTER=1 FI_CXI_RX_MATCH_MODE=hybrid
export MIOPEN_USER_DB_PATH=/tmp/miopen-$SLURM_JOB_ID MIOPEN_CUSTOM_CACHE_DIR=/tmp/miopen-$SLURM_JOB_ID

# Each process sees one device, which is number 0.
# shellcheck disable=SC2016
srun -N "$SLURM_JOB_NUM_NODES" -n $((8 * SLURM_JOB_NUM_NODES)) -c 7 --gpus-per-task=1 \
  --gpu-bind=closest \
  bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=0 exec python "$@"' \
  task "$@" --save "$folder" --save-every 100 --resume "$folder" --plot "$folder/loss.png"
