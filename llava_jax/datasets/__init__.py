"""Training sets: built from their owners' files, checked, counted and shown. Imports no jax."""
