#!/usr/bin/env bash
# The same two v5e slices by xpk, which writes the JobSet:  CLUSTER=... bash examples/launch/xpk.sh
# The cluster attaches /shared (xpk storage attach) to every workload. By itself xpk starts again after
# signals alone; 69 to 75 are the codes after which the same command goes on.
set -euo pipefail

xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --workload=llava --tpu-type=v5litepod-16 --num-slices=2 --max-restarts=10 \
    --restart-on-exit-codes=69-75 \
    --docker-image="$IMAGE" --command='
    llava-jax train --config finetune_7b --workdir /shared/runs/finetune_7b \
        --config.model.init=/shared/runs/pretrain_7b/export \
        --config.data.path=/shared/data/llava_v1_5_mix665k.json --config.data.image_folder=/shared/data'
