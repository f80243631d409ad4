#!/bin/bash
# Train on several nodes with torchrun: run this on every node, with the same MASTER_ADDR and another NODE_RANK.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh --config coco_vit.yaml     # on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 launch/torchrun.sh --config coco_vit.yaml     # on node1
#
# NNODES          number of nodes
# NODE_RANK       number of this one, from 0; rank 0 of the run is on node 0
# MASTER_ADDR     name or address of node 0, as the others reach it
# MASTER_PORT     a port there that is free and open to them
# NPROC_PER_NODE  ranks per node: GPUs, or on a CPU a number
# SCRIPT          what to run
#
# Before a script of your own command write `--`, as below: torchrun takes its `--run` for a part of its own --run-path.
set -euo pipefail
gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
exec torchrun --nnodes "${NNODES:?number of nodes}" --node-rank "${NODE_RANK:?number of this node, from 0}" \
    --master-addr "${MASTER_ADDR:?address of node 0}" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}" -- "${SCRIPT:-launch/train.py}" "$@"
