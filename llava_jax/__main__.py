"""`python -m llava_jax` is `llava-jax`."""

from llava_jax.cli import main

if __name__ == "__main__":  # data-loading workers are spawned and import this file again
    raise SystemExit(main())
