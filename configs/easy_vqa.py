"""Both stages of a tiny LLaVA on easy-VQA: 4,000 small pictures, 38,575 questions.

    llava-jax train --config configs/easy_vqa.py --config.data_folder=data/easy_vqa

The folder holds instruct.json, captions.json and images/. A tenth of the images is held out, and the
questions on them are asked and scored at the end.

It starts from the quickstart's models, which never saw easy-VQA's light backgrounds, rectangles and
half of its colours. So both stages train the whole model, and the captions of stage 1 are what its
tower learns the new shapes from.
"""

from llava_jax.configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.name = "easy_vqa"
    c.data_folder = "data/easy_vqa"

    c.data.holdout = 0.1
    c.data.augment = "flip_shift4"
    c.data.length_buckets = (40, 168)
    c.data.image_buckets = (1,)
    c.data.target_buckets = (24, 48)
    c.data.max_length = 168
    everything = ("projector", "language", "vision")
    c.stages.stage1.update(trainable=everything, steps=1200, lr=0.01)
    # Few questions of many pictures: what is hard here is to see the shape. Two samples fill a row.
    c.stages.stage2.update(trainable=everything, steps=1200, batch_size=64)
    c.stages.stage2.data.update(turns_per_sample=3, pack_length=192, row_multiple=0)
    c.exact_match = True
    return c
