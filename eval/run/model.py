"""The model that is evaluated, and what its hosts agree on."""

import logging
from typing import TYPE_CHECKING, Any

from llava_jax.errors import LlavaError

if TYPE_CHECKING:
    from llava_jax.model import LlavaModel

logger = logging.getLogger(__name__)


def load_model(path: str, *, mesh: str | None = None, **how: Any) -> "LlavaModel":
    """Loads a checkpoint folder, a hub id, or "tiny".

    Args:
      mesh: "DATA,FSDP,TENSOR" sizes, of which one may be -1 for what is left; by default the model
        is split over all devices there are, and not at all on one.
      how: template and settings.loading_options, as in llava_jax.load.
    """
    import jax

    from llava_jax.model import load
    from llava_jax.sharding import make_mesh

    if mesh is None:
        chosen = make_mesh() if jax.device_count() > 1 else None
    else:
        chosen = make_mesh(*parse_mesh(mesh))
    model = load(path, mesh=chosen, **how)
    if model.config.template != "vicuna_v1":
        logger.warning("template %s; the paper's is vicuna_v1", model.config.template)
    return model


def parse_mesh(text: str) -> tuple[int, int, int]:
    """ "8,1,1" as three sizes; raises LlavaError."""
    try:
        data, fsdp, tensor = (int(x) for x in text.split(","))
    except ValueError:
        raise LlavaError(f"--mesh {text}: expected DATA,FSDP,TENSOR such as 1,-1,1") from None
    if any(size < 1 and size != -1 for size in (data, fsdp, tensor)):
        raise LlavaError(f"--mesh {text}: sizes are at least 1, or -1 for all that remain")
    return data, fsdp, tensor


def alone() -> bool:
    """Whether no other host runs the same program."""
    import jax

    return jax.process_count() == 1


def agree(answered: list[bool]) -> list[bool]:
    """What the first host gives, on every host: all must ask the same batches."""
    if alone() or not answered:
        return answered
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return np.asarray(broadcast_one_to_all(np.asarray(answered))).tolist()
