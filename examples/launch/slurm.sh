#!/usr/bin/env bash
# Four hosts of 8 GPUs under SLURM:  sbatch examples/launch/slurm.sh
# --requeue and the last lines: a host that dies, or a SIGTERM before the time limit, ends the step; the
# job is queued again, 10 times at most, and continues from the newest checkpoint.
#SBATCH --job-name=llava
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

srun --kill-on-bad-exit=1 \
    llava-jax train --config finetune_7b --workdir /shared/runs/finetune_7b \
        --config.model.init=/shared/runs/pretrain_7b/export \
        --config.data.path=/shared/data/llava_v1_5_mix665k.json --config.data.image_folder=/shared/data \
    || {
        code=$?
        # A wrong setting (2) or a run that diverged (65) is mended by no restart.
        case $code in 2 | 65) exit $code ;; esac
        # srun gives the highest code of all tasks, so that a 2 may hide behind those it killed.
        [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] || exit $code
        scontrol requeue "$SLURM_JOB_ID"
    }
