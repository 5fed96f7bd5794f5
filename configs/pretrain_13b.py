"""Stage 1 of LLaVA-1.5-13B: as pretrain_7b.py, over Vicuna-13B.

    llava-jax train --config configs/pretrain_13b.py --workdir runs/pretrain_13b \\
        --config.data.path=blip_laion_cc_sbu_558k.json --config.data.image_folder=images \\
        --config.model.allow_pickle=true
"""

from llava_jax.configs import pretrain_7b


def get_config():
    c = pretrain_7b.get_config()
    c.name = "pretrain_13b"
    c.model.init = "lmsys/vicuna-13b-v1.5"
    return c
