"""Both stages of a tiny LLaVA on the quickstart's own pictures, on a laptop's processor.

    llava-jax quickstart

makes the data, runs this file and scores the result. With the data in place (it is left in
runs/quickstart/data), the training alone is

    llava-jax train --config configs/quickstart.py --workdir runs/quickstart

The recipe is the 7B's: stage 1 trains the projector on captions, stage 2 all but the tower's unused
end on conversations. What differs: the tower learns too, since the pictures are all it ever sees;
the optimizer is Muon, since AdamW needs far more steps; and the questions of one picture are
independent samples that share its prefix, but for the third of the records that says
`"turns": "conversation"`, from which the model learns to answer follow-up questions.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from llava_jax.configs import common

PLACES = ("top left", "top right", "bottom left", "bottom right")


def tiny() -> ConfigDict:
    """How the starting model is made: values for some ten thousand pictures of 64 x 64 pixels."""
    t = ConfigDict()
    t.vocabulary = 620
    t.phrases = (  # beside the prompts, what becomes a single token
        *("What", "Which", "Where", "Describe the image concisely.", "Describe the image as JSON."),
        *(
            ' [{"color": "',
            '[{"color": "',
            '", "shape": "',
            '", "place": "',
            '"}, {"color": "',
            '"}]',
        ),
        *PLACES,
        *(f" {place}" for place in PLACES),
    )
    t.image_size, t.patch_size = 64, 16
    t.tower_width, t.tower_layers = 96, 3
    t.feature_layer = -1
    t.language_width, t.language_layers, t.language_mlp = 96, 2, 256
    t.tower_batch, t.tower_lr, t.tower_steps = 64, 0.02, 700
    # Small batches: at an equal number of samples, twice the steps learn more.
    t.language_batch, t.language_lr, t.language_steps = 32, 0.02, 500
    t.caption_rows = 2  # rows of a language batch that hold captions, several in each
    t.language_records = 4000
    return t


def get_config():
    c = common.get_config()
    c.name = "quickstart"
    folder = FieldReference("runs/quickstart/data")
    c.model.make = "llava_jax.quickstart.pretrain:make"
    c.unlock()
    c.data_folder = folder
    c.tiny = tiny()
    common.lock(c)

    c.data.path = folder + "/instruct.json"
    c.data.image_folder = folder
    # Few: compiling the step for one more shape takes as long as fifty steps. 112 holds six
    # questions, 192 the conversations of nine.
    c.data.length_buckets = (40, 64, 112, 192, 256)
    c.data.target_buckets = (64, 192)
    c.data.max_length = 1024
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

    c.stages.stage1 = ConfigDict(
        dict(
            trainable=("projector",),
            steps=80,
            lr=0.02,
            data=dict(path=folder + "/captions.json", version="plain"),
        )
    )
    c.stages.stage2 = ConfigDict(
        dict(
            trainable=("projector", "language", "vision"),
            batch_size=32,
            steps=1050,
            lr=0.01,  # at 0.02 the language model loses part of what it was pre-trained to look up
            data=dict(turns="independent", turns_per_sample=6),
        )
    )
    return c
