"""Fine-tuning of the released LLaVA-1.5-7B on data of your own: projector and language model.

    llava-jax train --config configs/finetune_task_7b.py --workdir runs/task_7b \\
        --config.data.path=mine.json --config.data.image_folder=images

A twentieth of the images is held out; the loss on it is printed at the end and written to
heldout.json. The original's own folder is another start:
--config.model.init=liuhaotian/llava-v1.5-7b --config.model.allow_pickle=true

Source: scripts/v1_5/finetune_task.sh of haotian-liu/LLaVA (batch 128, lr 2e-5, one epoch), which
starts from the 13B and holds nothing out.
"""

from llava_jax.configs import finetune_7b


def get_config():
    c = finetune_7b.get_config()
    c.name = "finetune_task_7b"
    c.model.init = "llava-hf/llava-1.5-7b-hf"
    c.data.holdout = 0.05
    return c
