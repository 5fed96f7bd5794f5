#!/usr/bin/env bash
# A Ray cluster that runs already, a worker on each of its GPU hosts:
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 bash examples/launch/ray.sh
# When a worker is lost, Ray starts all of them again; the run continues from the newest checkpoint.
# Every host has llava_jax[cuda12,ray] and /shared.
set -euo pipefail

ray job submit --no-wait -- \
    llava-jax train --config finetune_7b --workdir /shared/runs/finetune_7b \
        --config.model.init=/shared/runs/pretrain_7b/export \
        --config.data.path=/shared/data/llava_v1_5_mix665k.json --config.data.image_folder=/shared/data \
        --launcher ray --max-failures 10
