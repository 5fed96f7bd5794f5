"""Both stages of a tiny LLaVA on the quickstart's own pictures, on a laptop's processor.

    llava-jax quickstart

makes the data, runs this file and scores the result. With the data in place (it is left in
runs/quickstart/data), the training alone is

    llava-jax train --config configs/quickstart.py --workdir runs/quickstart

The recipe is the 7B's: stage 1 trains the projector on captions, between a CLIP and a language model
that stay as they are; stage 2 trains projector and language model on conversations. Both starting
models come with the package, made by examples/tiny. What differs from the 7B: the optimizer is Muon,
since AdamW needs far more steps; and the questions of one picture are independent samples that share
its prefix, except in records that say `"turns": "conversation"`, from which the model learns to
answer follow-up questions.
"""

from llava_jax.configs import common


def get_config():
    c = common.get_config()
    c.name = "quickstart"
    c.unlock()
    c.data_folder = "runs/quickstart/data"
    common.lock(c)

    # When the settings are read, {data_folder} becomes the value that it has then.
    c.data.path = "{data_folder}/instruct.json"
    c.data.image_folder = "{data_folder}"
    # One shape per stage: compiling the step once more takes as long as a hundred steps.
    c.data.length_buckets = (40, 208)
    c.data.image_buckets = (1, 2)
    c.data.target_buckets = (24, 72)
    c.data.max_length = 208
    c.data.cache_images = True
    c.data.threads = 2

    c.optimizer = "muon"
    c.batch_size = 64
    c.weight_decay = 0.05
    c.warmup_ratio = 0.05
    c.lr_end_ratio = 0.01
    c.b2 = 0.98
    c.dtype = "float32"
    c.remat = "none"
    c.unroll_layers = True
    c.mesh.data, c.mesh.fsdp = -1, 1  # small enough for a whole copy on every device
    c.save_every = 200

    c.stages.stage1 = dict(
        model=dict(init="tiny-vicuna", vision_tower="tiny-clip"),
        trainable=("projector",),
        steps=80,
        lr=0.02,
        data=dict(path="{data_folder}/captions.json", version="plain"),
    )
    c.stages.stage2 = dict(
        trainable=("projector", "language"),
        batch_size=32,
        steps=680,
        lr=0.01,  # at 0.02 the language model loses part of what it was pre-trained to look up
        data=dict(turns="independent", turns_per_sample=6, pack="exact", row_multiple=18),
    )
    return c
