"""LoRA on data of your own, from the released LLaVA-1.5-7B: the way to start with one device.

    llava-jax train --config configs/finetune_task_lora_7b.py --workdir runs/task_lora_7b \\
        --config.data.path=mine.json --config.data.image_folder=images

A twentieth of the images is held out; the loss on it is printed at the end and written to
heldout.json. Where 128 samples do not fit into memory at once, --config.grad_accum=16 takes them
8 at a time, with the same result.

Source: scripts/v1_5/finetune_task_lora.sh of haotian-liu/LLaVA (rank 128, alpha 256, batch 128,
lr 2e-4, projector 2e-5, one epoch), which starts from the 13B and holds nothing out.
"""

from llava_jax.configs import finetune_lora_7b


def get_config():
    c = finetune_lora_7b.get_config()
    c.name = "finetune_task_lora_7b"
    c.model.init = "llava-hf/llava-1.5-7b-hf"
    c.data.holdout = 0.05
    return c
