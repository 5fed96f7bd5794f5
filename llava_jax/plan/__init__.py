"""What a run needs and how long it takes on hardware that need not be there: `llava-jax plan`."""
