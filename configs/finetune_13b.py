"""Stage 2 of LLaVA-1.5-13B: as finetune_7b.py, from the 13B's stage 1.

    llava-jax train --config configs/finetune_13b.py --workdir runs/finetune_13b \\
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_folder=data
"""

from llava_jax.configs import finetune_7b


def get_config():
    c = finetune_7b.get_config()
    c.name = "finetune_13b"
    c.model.init = "runs/pretrain_13b/export"
    return c
