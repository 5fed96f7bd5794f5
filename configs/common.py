"""Every setting of a training run, with its default. The other files change a few of them.

llava-jax train --config configs/finetune_7b.py --config.lr=1e-5 --workdir runs/finetune \\
    --config.data.path=llava_v1_5_mix665k.json --config.data.image_folder=data
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config() -> Any:
    """All fields, locked: a name that is not here cannot be set. None stands for "not set"."""
    c: Any = ConfigDict()
    c.name = "train"
    c.seed = 42

    # The model to start from: a folder or hub id of any format `llava-jax convert` reads.
    c.model = ConfigDict()
    c.model.init = ""
    c.model.base = ""  # language model under a LoRA, delta or projector-only checkpoint
    c.model.vision_tower = ""  # CLIP folder or hub id, for checkpoints without their own
    c.model.allow_pickle = False  # torch .bin files hold pickles: allow them knowingly
    c.model.make = ""  # "package.module:function" that makes model.init first (tiny models)

    # What is trained: projector, language, embed, vision, lora.
    c.trainable = ("projector", "language")
    c.lora_rank = 0
    c.lora_alpha = 256.0
    c.lora_dropout = 0.05

    c.data = ConfigDict()
    # LLaVA JSON or JSON lines; several files: a tuple, or commas between them. docs/data.md
    c.data.path = FieldReference("", field_type=object)
    c.data.image_folder = FieldReference("", field_type=object)  # one for all files, or one each
    c.data.weights = ()  # how often an epoch shows each file's records; empty: once
    c.data.version = "v1"  # prompt and label masks: plain, v1, llama_2, mpt, ...
    c.data.turns = "conversation"  # or "independent": questions of one image trained separately
    c.data.turns_per_sample = 0  # independent turns drawn anew in each epoch; 0 takes all
    c.data.image_aspect_ratio = ""  # pad or square; empty: as the model says
    c.data.max_length = 2048  # tokens, image features counted
    c.data.shuffle = True
    c.data.group_by_modality = False
    c.data.groups = 1  # the original's world size, for its exact grouping by length
    c.data.pack = False  # several samples in one row
    c.data.row_multiple = 0
    c.data.length_buckets = (128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
    c.data.image_buckets = (0, 1, 2, 4, 8, 16, 32, 64)
    c.data.target_buckets = ()
    c.data.holdout = 0.0  # fraction of the images kept aside
    c.data.holdout_seed = 0
    c.data.holdout_side = "train"  # or "held": use the part kept aside instead
    c.data.bad_samples = "skip"  # or "error"
    c.data.bad_limit = 0.1
    c.data.compat = False  # the original's exact labels, whole-sample masking and all
    c.data.cache_images = False
    c.data.cache_mb = 2048
    c.data.max_bytes = 32 * 2**20  # an image file beyond one of these five is refused
    c.data.max_pixels = 50_000_000
    c.data.max_side = 8192
    c.data.max_decode_bytes = 280 * 2**20
    c.data.max_decode_work = 500e6
    c.data.augment = ""  # "shift4", "flip_shift4": for small made data sets
    c.data.threads = 4
    c.data.prefetch = 8

    # Optimisation. Global batch = batch_size, split into grad_accum micro-batches.
    c.batch_size = 128
    c.grad_accum = 1
    c.epochs = 1.0
    c.steps = 0  # 0: from epochs
    c.optimizer = "adamw"
    c.lr = 2e-5
    c.projector_lr = placeholder(float)  # None: as lr
    c.vision_lr = placeholder(float)
    c.warmup_ratio = 0.03
    c.lr_end_ratio = 0.0
    c.weight_decay = 0.0
    c.b1, c.b2, c.eps = 0.9, 0.999, 1e-8
    c.muon_adam_lr_ratio = 0.15
    c.clip_norm = 1.0
    c.loss_average = "global"  # or "micro", as the original weighs accumulated micro-batches
    c.loss_groups = 1  # row groups averaged alike: the original's number of devices

    # How it runs.
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    c.dtype = "bfloat16"
    c.remat = "full"
    c.unroll_layers = False
    c.attention = ""
    c.save_every = 500
    c.save_minutes = 30.0  # also save when so long has passed since the last time; 0: never
    c.keep_checkpoints = 2
    c.exact_match = False  # at the end, answers on the images kept aside, scored

    # Several runs after each other: {name: {field: value}}; each starts from the one before.
    c.stages = ConfigDict()
    return lock(c)


def lock(c: Any) -> Any:
    """Closes `c` to new names; a file with settings of its own unlocks it, adds them and calls this.

    Entries of `stages` stay open: llava_jax.train.config_file checks their names against `c`.
    """
    c.lock()
    c.stages.unlock()
    return c
