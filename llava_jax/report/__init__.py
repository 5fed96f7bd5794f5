"""What a run left behind, for a person: `llava-jax report`."""
