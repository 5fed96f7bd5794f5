"""Every setting that tests change from its default: where, and what runs on the default instead.

Reviewed by hand. Each row ends with the test that runs on the default (its twin), or with the reason
why none does. `tests/test_defaults.py` compares the rows with what the tests hold.
"""

from typing import NamedTuple

ANYWHERE = "*"


class Row(NamedTuple):
    """A setting, the files under tests/ that change it, and a twin (file::test) or a reason.

    setting and files, with spaces between them, are patterns as in a shell.
    """

    setting: str
    files: str
    why: str


RECIPES = "rehearsal/test_recipes.py::test_stage_2_accounts_for_every_record"
"""finetune_7b by its documented command; the twin of all that it leaves at the default."""

NO_DEFAULT = "has no default that anyone could use: every run names its own"
TINY = "a whole run of a user's size takes hours; the rows that it gives are checked, not trained"
ITSELF = "is what the test is about; the other tests of the file leave it alone"

ROWS = [
    # What every user sets.
    Row("data.path", ANYWHERE, NO_DEFAULT),
    Row("data.image_folder", ANYWHERE, NO_DEFAULT),
    Row("model.init", ANYWHERE, NO_DEFAULT),
    Row("data_folder", ANYWHERE, NO_DEFAULT),
    Row("batch_size", ANYWHERE, TINY),
    Row("steps", ANYWHERE, TINY),
    Row(
        "model.vision_tower",
        "rehearsal/* train/test_model_io.py",
        "a tower of the tests' own: the default is a download",
    ),
    Row(
        "model.allow_pickle", "rehearsal/test_recipes.py", "the documented line of stage 1 sets it"
    ),
    Row("name", "train/test_validate.py", "is the name of a set there, not the setting"),
    Row("model.base", "documents/test_lines.py", "is looked for in a document's line, not set"),
    # Sizes of models and data.
    Row(
        "data.max_length",
        "rehearsal/*",
        "rehearsal/test_full_length.py::test_a_whole_epoch_at_the_real_lengths",
    ),
    Row("data.max_length", "train/* plan/*", "the tiny model has few positions"),
    Row(
        "data.max_length",
        "data/*",
        "data/test_make_loader.py::test_a_conversation_ends_up_in_the_batch",
    ),
    Row(
        "data.length_buckets",
        "data/*",
        "data/test_make_loader.py::test_a_conversation_ends_up_in_the_batch",
    ),
    Row("data.length_buckets", "train/test_config.py", ITSELF),
    # Number formats and memory.
    Row("dtype", "train/run.py train/test_heldout.py rehearsal/field.py", RECIPES),
    Row(
        "dtype",
        "rehearsal/test_layouts.py",
        "rehearsal/test_layouts.py::test_losses_are_equal_in_the_recipes_own_bfloat16",
    ),
    Row("dtype", "rehearsal/test_interrupted.py rehearsal/test_mistakes.py", ITSELF),
    Row("remat", "rehearsal/field.py", RECIPES),
    Row("mesh.data", "train/* rehearsal/test_layouts.py", RECIPES),
    Row("mesh.fsdp", "train/* rehearsal/test_layouts.py", RECIPES),
    Row("mesh.tensor", "train/* rehearsal/test_layouts.py", RECIPES),
    Row("mesh.slices", "train/test_processes.py", RECIPES),
    Row("mesh.tensor", "configs/test_configs.py", ITSELF),
    Row("grad_accum", "rehearsal/* train/*", RECIPES),
    # Optimisation.
    Row(
        "lr",
        "rehearsal/* train/run.py train/test_step.py",
        "a tiny model learns nothing at the 7B's rate in a few steps",
    ),
    Row(
        "lr",
        "test_cli.py configs/test_variants.py train/*",
        ITSELF,
    ),
    Row("lr", "parity/test_golden_training.py", "as in the original's run that is compared with"),
    Row(
        "projector_lr",
        "parity/test_golden_training.py",
        "as in the original's run that is compared with",
    ),
    Row(
        "warmup_ratio",
        "parity/test_golden_training.py",
        "as in the original's run that is compared with",
    ),
    Row(
        "weight_decay",
        "parity/test_golden_training.py",
        "as in the original's run that is compared with",
    ),
    Row(
        "clip_norm",
        "parity/test_golden_training.py",
        "as in the original's run that is compared with",
    ),
    Row(
        "projector_lr",
        "configs/test_configs.py train/test_step.py train/test_select.py",
        RECIPES,
    ),
    Row("warmup_ratio", "train/*", RECIPES),
    Row("lr_end_ratio", "train/*", RECIPES),
    Row("weight_decay", "train/test_step.py train/test_select.py train/test_optim.py", RECIPES),
    Row("param_groups", "train/*", ITSELF),
    Row("ema_decay", "train/test_loop.py", ITSELF),
    Row("z_loss", "train/test_loop.py", ITSELF),
    Row("max_skipped", "train/test_loop.py", ITSELF),
    Row("quantize", "train/*", ITSELF),
    Row("attention", "train/test_compiled.py", ITSELF),
    Row("lora_dora", "train/*", ITSELF),
    Row("optimizer", "train/test_loop.py train/test_optim.py", ITSELF),
    Row("loss_average", "train/*", ITSELF),
    Row("loss_groups", "rehearsal/test_mistakes.py train/test_checks.py", ITSELF),
    Row("trainable", "rehearsal/test_field.py train/*", RECIPES),
    Row(
        "lora_rank",
        "rehearsal/test_mistakes.py train/*",
        "rehearsal/test_recipes.py::test_every_recipe_runs_on_the_mixture",
    ),
    Row(
        "lora_alpha",
        "train/*",
        "rehearsal/test_recipes.py::test_every_recipe_runs_on_the_mixture",
    ),
    Row(
        "lora_dropout",
        "train/*",
        "rehearsal/test_recipes.py::test_every_recipe_runs_on_the_mixture",
    ),
    Row("seed", "data/* train/test_loop.py", RECIPES),
    Row(
        "seed",
        "train/test_heldout.py",
        "the held-out part of a seed; another seed has another part",
    ),
    Row("save_every", "train/* rehearsal/test_interrupted.py", RECIPES),
    Row("exact_match", "rehearsal/test_small_job.py train/*", RECIPES),
    # Data.
    Row("data.augment", "data/test_loader.py", ITSELF),
    Row(
        "data.bad_limit",
        "data/* datasets/test_build.py rehearsal/test_field.py",
        "rehearsal/test_mistakes.py::test_too_many_bad_records_are_found_before_the_first_step",
    ),
    Row("data.bad_samples", "data/* rehearsal/test_mistakes.py", RECIPES),
    Row("data.cache_images", "data/test_loader.py", ITSELF),
    Row("data.compat", "data/test_make_loader.py", ITSELF),
    Row("data.group_by_modality", "data/*", "data/test_loader.py::test_every_sample_once_an_epoch"),
    Row("data.holdout", "data/* train/*", RECIPES),
    Row(
        "data.holdout",
        "rehearsal/test_small_job.py",
        "rehearsal/test_recipes.py::test_every_recipe_runs_on_the_mixture",
    ),
    Row("data.holdout_side", "data/* train/test_heldout.py", RECIPES),
    Row("data.image_aspect_ratio", "data/test_make_loader.py train/test_checks.py", ITSELF),
    Row("data.image_aspect_ratio", "train/test_model_io.py", RECIPES),
    Row("data.pack", "data/* rehearsal/* train/*", RECIPES),
    Row(
        "data.pack_rows",
        "rehearsal/test_layouts.py train/test_steps.py",
        "data/test_packing.py::test_a_plan_goes_to_any_number_of_devices_with_empty_rows_where_they_do_not_divide_it",
    ),
    Row("data.pack_length", "data/test_cut.py", ITSELF),
    Row(
        "name",
        "train/test_profiling.py",
        "events of a trace have names, too; no run is named there",
    ),
    Row("data.prefetch", "data/test_epoch.py", RECIPES),
    Row("data.shuffle", "data/* train/test_data.py", RECIPES),
    Row("data.image_buckets", "data/*", RECIPES),
    Row("data.threads", "data/* train/test_loop.py", RECIPES),
    Row(
        "data.turns", "data/*", "data/test_make_loader.py::test_a_conversation_ends_up_in_the_batch"
    ),
    Row("data.turns_per_sample", "data/test_make_loader.py", ITSELF),
    Row(
        "data.version",
        "data/* rehearsal/test_mistakes.py train/test_model_io.py",
        "data/test_make_loader.py::test_a_conversation_ends_up_in_the_batch",
    ),
    Row("model.projector", "train/test_model_io.py", ITSELF),
    Row("data.max_pixels", "data/test_pixels.py", ITSELF),
    Row("data.max_side", "data/test_pixels.py", ITSELF),
    Row("data.weights", "data/* configs/test_configs.py", RECIPES),
    # Validation, which is off unless it is asked for.
    Row("data.eval", "train/test_validate.py", ITSELF),
    Row("eval_every", "train/test_validate.py", ITSELF),
    Row("eval_samples", "train/test_validate.py", ITSELF),
    Row("early_stop", "train/test_validate.py", ITSELF),
    Row("best_by", "train/test_validate.py", ITSELF),
]
