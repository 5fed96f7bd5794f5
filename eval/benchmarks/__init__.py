"""One file per benchmark; `llava_jax.eval.task.TASKS` lists them."""
