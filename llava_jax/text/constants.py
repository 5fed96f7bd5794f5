"""Marker ids and tags of the original (llava/constants.py of haotian-liu/LLaVA)."""

IMAGE_TOKEN = -200
"""Stands for one whole image in a list of token ids, before its features are spliced in."""

IGNORE = -100
"""Label of a position that is not trained."""

IMAGE_TAG = "<image>"
"""How training data and text prompts write an image slot."""

IM_START, IM_END = "<im_start>", "<im_end>"
"""Tokens around every image slot in models trained with `use_im_start_end`."""
