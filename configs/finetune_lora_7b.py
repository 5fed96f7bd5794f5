"""LoRA fine-tuning of LLaVA-1.5-7B: adapters on the language model, and the whole projector.

    llava-jax train --config configs/finetune_lora_7b.py --workdir runs/lora_7b \\
        --config.model.init=runs/pretrain_7b/export \\
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_folder=data

Source: scripts/v1_5/finetune_lora.sh of haotian-liu/LLaVA (rank 128, alpha 256, lr 2e-4,
projector 2e-5).
"""

from llava_jax.configs import finetune_7b


def get_config():
    c = finetune_7b.get_config()
    c.name = "finetune_lora_7b"
    c.trainable = ("projector", "lora")
    c.lora_rank = 128
    c.lr = 2e-4
    c.projector_lr = 2e-5
    return c
