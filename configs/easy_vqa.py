"""Both stages of a tiny LLaVA on easy-VQA: 4,000 small pictures, 38,575 questions.

    llava-jax train --config configs/easy_vqa.py --config.data_folder=data/easy_vqa

The folder holds instruct.json, captions.json and images/. A tenth of the images is kept aside, and
the questions on them are asked and scored at the end.
"""

from llava_jax.configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.name = "easy_vqa"
    c.data_folder = "data/easy_vqa"
    c.tiny.phrases = ()
    c.tiny.vocabulary = 480
    c.tiny.language_width = 64
    c.tiny.language_mlp = 168
    c.tiny.tower_steps = 1600
    c.tiny.language_steps = 240

    c.data.holdout = 0.1
    c.data.augment = "flip_shift4"
    c.stages.stage1.steps = 60
    c.stages.stage2.steps = 960
    c.exact_match = True
    return c
