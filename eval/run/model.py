"""A LlavaModel as the evaluation asks it: requests in, texts out."""

import logging
from typing import TYPE_CHECKING, Any

from llava_jax.errors import LlavaError

if TYPE_CHECKING:
    from llava_jax.model import Request

logger = logging.getLogger(__name__)


class EvalModel:
    """Answers with a `llava_jax.LlavaModel`, greedily, one batch at a time.

    template: in place of the model's own. first_host: whether this process writes the answers.
    """

    def __init__(self, model: Any, template: str | None = None, first_host: bool = True):
        self.model, self.first_host = model, first_host
        self.template: str = template or model.config.template

    def generate(self, requests: "list[Request]") -> list[str]:
        """The answers in order. A user's turn is the images, one per line, and then the prompt:
        "<image>\\n" and the question, as in LLaVA's evaluation."""
        replies = self.model.generate_batch(requests, batch_size=len(requests))
        return [reply.text for reply in replies]

    def agree(self, done: list[bool]) -> list[bool]:
        """What the first host says; with one host, what is given."""
        import jax

        if jax.process_count() == 1 or not done:
            return done
        import numpy as np
        from jax.experimental.multihost_utils import broadcast_one_to_all

        return np.asarray(broadcast_one_to_all(np.asarray(done))).tolist()


def load_model(
    path: str,
    *,
    mesh: str | None = None,
    template: str | None = None,
    base: str | None = None,
    vision_tower: str | None = None,
    allow_pickle: bool = False,
) -> EvalModel:
    """Loads a checkpoint folder, a hub id, or "tiny".

    Args:
      mesh: "DATA,FSDP,TENSOR" sizes, of which one may be -1 for what is left; by default the model
        is split over all devices there are, and not at all on one.
      template: conversation template; by default the model's own.
      base, vision_tower, allow_pickle: as in llava_jax.load.
    """
    import jax

    from llava_jax.model import load
    from llava_jax.sharding import make_mesh

    if mesh is None:
        chosen = make_mesh() if jax.device_count() > 1 else None
    else:
        chosen = make_mesh(*parse_mesh(mesh))
    model = load(
        path,
        mesh=chosen,
        base=base,
        vision_tower=vision_tower,
        allow_pickle=allow_pickle,
        template=template,
    )
    asked = EvalModel(model, template, jax.process_index() == 0)
    if asked.template != "vicuna_v1":
        logger.warning("template %s; the paper's is vicuna_v1", asked.template)
    return asked


def parse_mesh(text: str) -> tuple[int, int, int]:
    """ "8,1,1" as three sizes; raises LlavaError."""
    try:
        data, fsdp, tensor = (int(x) for x in text.split(","))
    except ValueError:
        raise LlavaError(f"--mesh {text}: expected DATA,FSDP,TENSOR such as 1,-1,1") from None
    return data, fsdp, tensor
