"""The numbers our results stand beside: LLaVA docs/MODEL_ZOO.md, and what is known of their noise."""

ROWS: tuple[str, ...] = ("7B", "13B", "7B LoRA", "13B LoRA")

# Row -> how many parameters its model has, tower and projector included: from, to.
SIZES = (("7B", 6.5e9, 8e9), ("13B", 12.5e9, 14.5e9))

# task -> the score of each row, in the unit of the task's headline.
PAPER: dict[str, tuple[float, float, float, float]] = {
    "vqav2": (78.5, 80.0, 79.1, 80.0),
    "gqa": (62.0, 63.3, 63.0, 63.3),
    "vizwiz": (50.0, 53.6, 47.8, 58.9),
    "scienceqa": (66.8, 71.6, 68.4, 71.2),
    "textvqa": (58.2, 61.3, 58.2, 60.2),
    "pope": (85.9, 85.9, 86.4, 86.7),
    "mme": (1510.7, 1531.3, 1476.9, 1541.7),
    "mmbench": (64.3, 67.7, 66.1, 68.5),
    "mmbench_cn": (58.3, 63.6, 58.9, 61.5),
    "seed": (58.6, 61.6, 60.1, 61.3),
    "llava_wild": (65.4, 72.5, 67.9, 69.5),
    "mmvet": (31.1, 36.1, 30.2, 38.3),
}

# Questions of the split the paper scores (VQAv2 test-dev, VizWiz test: truth is not public).
PAPER_SIZE = {
    "vqav2": 107_394, "gqa": 12_578, "vizwiz": 8_000, "scienceqa": 4_241, "textvqa": 5_000,
    "pope": 8_910, "mme": 2_374, "mmbench": 1_164, "mmbench_cn": 1_164, "seed": 19_242,
    "llava_wild": 60, "mmvet": 218,
}  # fmt: skip

# Splits whose truth only a server has: a local score is of another split.
OTHER_SPLIT = {"vqav2": "test-dev", "vizwiz": "test"}

# What training runs of the same recipe differ by, beyond the sampling of questions (MME: +-20 by
# the author, LLaVA issue 680; ScienceQA 67.9 to 70.8 reported against 66.8).
KNOWN_NOISE = {"mme": 20.0, "scienceqa": 3.0}
