"""Stage 1 of LLaVA-1.5-7B: the projector alone learns on 558K captions.

    llava-jax train --config configs/pretrain_7b.py --workdir runs/pretrain_7b \\
        --config.data.path=blip_laion_cc_sbu_558k.json --config.data.image_folder=images \\
        --config.model.allow_pickle=true

Vicuna and CLIP are published as .bin files, which are pickles; hence allow_pickle.

Source: scripts/v1_5/pretrain.sh of haotian-liu/LLaVA (batch 256, lr 1e-3, one epoch). The original
leaves image_aspect_ratio unset in this stage: images are cropped, not padded.
"""

from llava_jax.configs import common


def get_config():
    c = common.get_config()
    c.name = "pretrain_7b"
    c.model.init = "lmsys/vicuna-7b-v1.5"
    c.model.vision_tower = "openai/clip-vit-large-patch14-336"
    c.trainable = ("projector",)
    c.data.version = "plain"
    c.data.image_aspect_ratio = "square"
    c.batch_size = 256
    c.lr = 1e-3
    c.clip_norm = 0.0  # the original's DeepSpeed files leave clipping off
    # On 8 A100-40 this takes 29 GiB of each, "dots" 56: llava-jax plan, docs/scale.md.
    c.remat = "minimal"
    return c
