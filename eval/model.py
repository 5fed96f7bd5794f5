"""A LlavaModel as the evaluation asks it: requests in, stripped texts out."""

from typing import Any

from llava_jax.eval.predict import Request


class Asked:
    """Answers `predict.Request`s with a `llava_jax.LlavaModel`, greedily, a batch at once.

    first_host: whether this process writes what is answered.
    """

    def __init__(self, model: Any, first_host: bool = True):
        self.model, self.first_host = model, first_host

    def generate(self, requests: list[Request]) -> list[str]:
        """The answers in order. The user's turn is the images, each in a line, then the prompt:
        "<image>\\n" and the question, as LLaVA's evaluation has it."""
        from llava_jax.model import Request as ModelRequest

        asked = [ModelRequest(messages(r), max_new_tokens=r.max_new_tokens) for r in requests]
        replies = self.model.generate_batch(asked, batch_size=len(asked), progress=False)
        return [reply.text.strip() for reply in replies]


def messages(request: Request) -> list[dict[str, Any]]:
    """A request as one user message."""
    content: list[dict[str, Any]] = [{"type": "image", "image": i} for i in request.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": request.prompt}]}]


def load_model(path: str) -> Asked:
    """Loads a checkpoint folder or hub id on all devices of this process, or of all hosts."""
    import jax

    from llava_jax.model import load

    return Asked(load(path), first_host=jax.process_index() == 0)
