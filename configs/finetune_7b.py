"""Stage 2 of LLaVA-1.5-7B: projector and language model learn on the 665K instruction mixture.

    llava-jax train --config configs/finetune_7b.py --workdir runs/finetune_7b \\
        --config.model.init=runs/pretrain_7b/export \\
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_folder=data

Source: scripts/v1_5/finetune.sh of haotian-liu/LLaVA (batch 128, lr 2e-5, one epoch, pad,
group_by_modality_length). What does not stand here is the default, which follows that script.
"""

from llava_jax.configs import common


def get_config():
    c = common.get_config()
    c.name = "finetune_7b"
    c.model.init = "runs/pretrain_7b/export"
    c.data.image_aspect_ratio = "pad"
    c.data.group_by_modality = True
    c.clip_norm = 0.0  # the original's DeepSpeed files leave clipping off
    return c
