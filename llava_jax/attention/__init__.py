"""Attention: who sees whom, the kernels that compute it, and which of them a device gets."""

from llava_jax.attention.call import attention, settled
from llava_jax.attention.choice import PLAIN, Choice, Need, choose
from llava_jax.attention.plain import Causal

__all__ = ["PLAIN", "Causal", "Choice", "Need", "attention", "choose", "settled"]
