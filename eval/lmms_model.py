"""A LlavaModel with lmms-eval's interface. Only its registry imports this module: it needs torch."""

from dataclasses import replace
from typing import Any

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

from llava_jax.errors import LlavaError

IMAGE = "<image>"
MAX_NEW_TOKENS = 1024  # where a task names no limit, as lmms-eval's own LLaVA


class LlavaJax(lmms):
    """Answers lmms-eval's requests.

    pretrained: checkpoint folder or hub id. conv_template: in place of the model's own. mesh:
    "DATA,FSDP,TENSOR". until: "task" honours a task's stop strings, "model" only the template's, as
    lmms-eval's own LLaVA does. device and max_batch_size are taken from the harness and ignored.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        conv_template: str | None = None,
        mesh: str | None = None,
        until: str = "task",
        device: Any = None,
        max_batch_size: Any = None,
    ):
        super().__init__()
        from llava_jax.eval.run.model import load_model

        if until not in ("task", "model"):
            raise LlavaError(f"until={until}: expected task or model")
        self.model = load_model(pretrained, mesh=mesh, template=conv_template)
        self.template = self.model.config.template
        self.batch_size, self.until = int(batch_size), until

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests; each args is (context, gen_kwargs, doc_to_visual,
        doc_id, task, split)."""
        asked = []
        for context, kwargs, *where in (r.args for r in requests):
            asked.append(self._request([*self._content(context, self._visuals(*where))], kwargs))
        return self._answer(asked, [r.args[1] for r in requests])

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """Rounds as the task's doc_to_text supplies them; each sees the task's own context only, as
        lmms-eval's adapters do."""
        return [self._rounds(*r.args) for r in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(mean negative log-likelihood, greedy) of each continuation with its end token: the loss
        that lmms-eval's LLaVA returns and its perplexity tasks rank by. args is (context,
        doc_to_target, doc_to_visual, doc_id, task, split)."""
        from llava_jax.eval.likelihood import Likelihood

        scorer, found = Likelihood(self.model, self.template), []
        for context, target, *where in (r.args for r in requests):
            to_visual, doc_id, task, split = where
            answer = target if isinstance(target, str) else target(self._doc(task, split, doc_id))
            content = list(self._content(context, self._visuals(to_visual, doc_id, task, split)))
            score = scorer(content, answer)
            found.append((score.mean_loss, score.greedy))
        return found

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _visuals(self, to_visual, doc_id: int, task: str, split: str) -> list[Any]:
        visuals = to_visual(self._doc(task, split, doc_id)) or []
        for v in visuals:
            if not hasattr(v, "convert"):
                raise LlavaError(f"{task} {doc_id}: a {type(v).__name__} is not an image")
        return visuals

    @staticmethod
    def _content(context: str, visuals: list[Any]):
        """The user's turn: images where the context says <image>, else all before it."""
        if not visuals or IMAGE not in context:
            for v in visuals:
                yield {"type": "image", "image": v}
            yield {"type": "text", "text": context}
            return
        pieces = context.split(IMAGE)
        if len(pieces) - 1 != len(visuals):
            raise LlavaError(f"{len(pieces) - 1} {IMAGE} in the context for {len(visuals)} images")
        for n, piece in enumerate(pieces):
            if n:
                yield {"type": "image", "image": visuals[n - 1]}
            if piece.strip():
                yield {"type": "text", "text": piece}

    def _request(self, content: list[dict[str, Any]], kwargs: dict[str, Any]):
        from llava_jax.model import Request

        if kwargs.get("num_beams") not in (None, 1):
            raise LlavaError(f"num_beams {kwargs['num_beams']}: only 1, as in the paper")
        drawn = kwargs.get("do_sample", True)
        until = kwargs.get("until") or []
        until = [until] if isinstance(until, str) else until
        return Request(
            [{"role": "user", "content": content}],
            max_new_tokens=int(kwargs.get("max_new_tokens") or MAX_NEW_TOKENS),
            temperature=float(kwargs.get("temperature") or 0.0) if drawn else 0.0,
            top_p=float(kwargs.get("top_p") or 1.0),
            stop=tuple(u for u in until if u) if self.until == "task" else (),
            template=self.template,
        )

    def _answer(self, requests: list[Any], kwargs: list[dict[str, Any]]) -> list[str]:
        """Answers, a group for each way of fitting images into the square."""
        answers: dict[int, str] = {}
        ways = [k.get("image_aspect_ratio") for k in kwargs]
        own = self.model.config
        for way in dict.fromkeys(ways):
            rows = [i for i, w in enumerate(ways) if w == way]
            if way is not None:
                self.model.config = replace(own, image_aspect_ratio=way)
            asked, size = [requests[i] for i in rows], self.batch_size
            try:
                replies = self.model.generate_batch(asked, batch_size=size, progress=True)
            finally:
                self.model.config = own
            answers |= {i: reply.text for i, reply in zip(rows, replies)}
        return [answers[i] for i in range(len(requests))]

    def _rounds(self, context, kwargs, to_visual, to_text, doc_id, task, split) -> list[str]:
        doc, said, last = self._doc(task, split, doc_id), [], None
        visuals = to_visual(doc) or []
        while True:
            if said:
                known = {"round_idx": len(said), "previous_round_info": last}
                visuals, context, over, said, last = to_text(doc, previous_output=said, **known)
                if over:
                    return said
            request = self._request([*self._content(context, visuals or [])], kwargs)
            said = [*said, *self._answer([request], [kwargs])]
