"""Continuous batching: many requests over the slots of one cache, each step of static shape.

The engine has no thread of its own. Whoever waits for an answer calls `step`, which does one piece of
work for all requests: reads a chunk of prompts, or gives every living slot its next tokens. An answer
depends on its own request alone, whatever its neighbours, its slot, or what the caches held.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llava_jax.batch import check_prompt
from llava_jax.errors import LlavaError, PromptError, WeightError
from llava_jax.generate.generator import NOTHING, STEPS, Generator
from llava_jax.generate.job import Job
from llava_jax.generate.lookup import guessed_of
from llava_jax.generate.pictures import Pictures
from llava_jax.generate.sampling import Controls
from llava_jax.generate.state import Chunk, Given, Limits

SECONDS_PER_PIECE = 0.05
"""What an answer that is watched aims at, by more or fewer tokens per step."""

_ROWS_ON_CPU, _ROWS = 16, 2  # prompts that are read together, at most
_FILLING = 1024  # positions of a chunk that need no second prompt to keep a device busy


class Engine:
    """Slots over a Generator. Any thread may call its methods; one works at a time.

    slots: requests answered at once. capacity: positions of each, prompt and answer.
    rows: prompts read in one call. fair: decode a few tokens between two chunks of prompts, so that a
    long prompt does not stop the answers; without, prompts are read first, which takes less work.
    waiting: most requests that may wait for a slot; None: any number.

    `counts`: what happened so far, by name.
    """

    def __init__(
        self,
        generator: Generator,
        slots: int = 1,
        *,
        capacity: int | None = None,
        rows: int | None = None,
        fair: bool = False,
        waiting: int | None = None,
        keep_logits: bool = False,
    ):
        g, many = generator, generator.row_multiple
        self.generator, self.fair, self.waiting, self.keep_logits = g, fair, waiting, keep_logits
        self.slots = -(-slots // many) * many
        context = g.config.language.max_positions
        self.context = min(capacity or context, context)
        self.capacity = -(-self.context // g.chunk) * g.chunk
        # Rows that nobody fills cost as much as others: prompts of a server come one by one.
        elsewhere = 1 if g.chunk >= _FILLING else _ROWS
        most = max(many, (1 if fair else _ROWS_ON_CPU) if g.on_cpu else elsewhere)
        self.rows = rows or min(self.slots, most)
        self.lock = threading.RLock()
        self.counts: Counter[str] = Counter()
        self._order = itertools.count()
        self._queue: list[tuple[int, int, Job]] = []
        self._words = -(-g.config.language.vocab_size // 32)
        self._free_limits = g.put(self._limits([], self.slots))
        self._free_reading = g.put(self._limits([], self.rows))
        self._fresh()

    def _fresh(self) -> None:
        """An empty state: at the start, and after a step that was broken off."""
        self.state: Any = None  # the old one's memory is free before the new one takes any
        self.jobs: list[Job | None] = [None] * self.slots
        self.reading: deque[Job] = deque()
        self.held: list[list[bytes]] = [[] for _ in range(self.slots)]  # prefixes a slot has
        self.used = [0] * self.slots  # when a slot was last given away
        self.pictures = Pictures(self.generator, self.rows, self.counts)
        self._pace = 2
        self._version = self.generator.version
        places = self.pictures.room
        self.state = self.generator.new_state(self.slots, self.capacity, places)

    # Asking --------------------------------------------------------------------------------------

    def submit(self, job: Job) -> Job:
        """Puts a request in line.

        Raises PromptError for one that is malformed or leaves no room for an answer, ConfigError for an
        adapter that is not here, and Full where too many wait.
        """
        g = self.generator
        check_prompt(job.prompt, g.config)
        g.adapters.index(job.adapter)  # its check
        job.prepare(g.config, g.reuse, g.adapters.sight(job.adapter))
        if job.length >= self.context:
            raise PromptError(
                f"the prompt takes {job.length} positions; there are {self.context}, the answer included",
                fix="shorten the conversation or show fewer images",
            )
        room = min(self.context, g.config.language.max_positions - job.ahead) - job.length
        job.budget = min(int(job.settings.max_new_tokens), room)
        with self.lock:
            if self.waiting is not None and self.queued >= self.waiting:
                raise Full(f"{self.queued} requests wait already", fix="try again later")
            heapq.heappush(self._queue, (job.priority, next(self._order), job))
        return job

    def cancel(self, job: Job) -> None:
        """Ends a request here; its slot is free at once."""
        with self.lock:
            if not job.done:
                self._finish(job, "cancelled")

    def run(self, jobs: Iterable[Job]) -> None:
        """Works until these are done. Raises what one could not be answered for; the others end with it."""
        jobs = list(jobs)
        try:
            for job in jobs:
                while not job.done:
                    self.step()
                if job.error is not None:
                    raise job.error
        except BaseException:  # nobody waits for them any more
            for job in jobs:
                self.cancel(job)
            raise

    @property
    def queued(self) -> int:
        """How many requests wait for a slot."""
        return sum(not job.done for _, _, job in self._queue)

    @property
    def busy(self) -> int:
        """How many slots have a request."""
        return sum(job is not None for job in self.jobs)

    # Working -------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Does the next piece of work; False where there is none."""
        with self.lock:
            # A step was broken off, or the model has other parameters: what is held is of no use.
            if self.state is None or self._version != self.generator.version:
                self._abandon(None)
            try:
                self._admit()
                if self.reading:
                    self._read()
                    if self.fair and self._living():
                        # A step costs the same however few take part in it.
                        self._decode(max(1, 4 * self._living() // self.slots))
                elif self._living():
                    self._decode(self._steps())
                else:
                    return False
            except Exception as error:
                self._abandon(error)
                raise
            except BaseException:  # Ctrl-C: a request may be in no line just now
                self.state = None
                raise
        return True

    def _abandon(self, error: Exception | None) -> None:
        """Ends what is being answered, after a failure of the device, and starts anew."""
        jobs = [job for job in self.jobs if job is not None]
        self._fresh()
        for job in jobs:
            if error is not None:
                job.error = error
            self._finish(job, "error" if error else "cancelled")

    def _living(self) -> int:
        """How many are being answered, their prompts read."""
        return sum(job is not None and bool(job.ids) for job in self.jobs)

    def _steps(self) -> int:
        """Tokens of the next call: few where someone watches, as many as fit otherwise."""
        jobs = [job for job in self.jobs if job is not None and job.ids]
        if any(job.constraint for job in jobs):
            return 1
        return self._pace if any(job.live for job in jobs) else STEPS

    # Slots ---------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free slots to those who wait."""
        while self._queue and self._queue[0][2].done:  # cancelled while it waited
            heapq.heappop(self._queue)
        free = [i for i, job in enumerate(self.jobs) if job is None]
        wanted = 1 if self.fair else min(self.rows, self.queued)
        while self._queue and free and len(free) >= wanted:
            job = heapq.heappop(self._queue)[2]
            if job.done:
                continue
            slot, source, count = self._choose_slot(job, free)
            free.remove(slot)
            wanted = 1
            job.slot, self.jobs[slot] = slot, job
            self.used[slot] = next(self._order)
            self.reading.append(job)
            self._take_over(job, source, count)
            s = job.settings
            if job.bias or s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty:
                self._mark(job)

    def _choose_slot(self, job: Job, free: Sequence[int]) -> tuple[int, int, int]:
        """(a free slot for a job, the slot that holds most of its prompt, how many prefixes that is)."""

        def known(slot: int) -> int:
            # Their keys hold what comes before them: they are equal up to somewhere.
            return sum(a == b for a, b in zip(job.prefixes, self.held[slot]))

        count, source = 0, -1
        if job.prefixes:
            # Of equals a free one, which need not be copied.
            count, _, source = max((known(i), i in free, i) for i in range(self.slots))
        if count and source in free:
            return source, source, count
        # The one whose prefixes were not asked for the longest.
        return min(free, key=lambda i: (bool(self.held[i]), self.used[i])), source, count

    def _take_over(self, job: Job, source: int, count: int) -> None:
        """Lets a job's slot begin with the first prefixes of another."""
        self.held[job.slot] = job.prefixes[:count]
        if count and source != job.slot:
            self._call("copy", np.int32(source), np.int32(job.slot))
            self.counts["slots_copied"] += 1
        job.read = job.reused = count * self.generator.reuse
        self.counts["prompt_tokens_reused"] += job.reused

    def _mark(self, job: Job) -> None:
        vocab = self.generator.config.language.vocab_size
        bias, asked = np.zeros(vocab, np.float32), np.zeros(vocab, bool)
        for token, value in (job.bias or {}).items():
            bias[token] = value
        asked[job.tokens[job.rows < 0]] = True
        self._call("mark", np.int32(job.slot), bias, asked)

    # Reading -------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Reads the next chunk of the first prompt, and of those whose chunk has its shape."""
        g = self.generator

        def shape(job: Job) -> int:
            return min(-(-(job.length - job.read) // g.step) * g.step, g.chunk)

        length = shape(self.reading[0])
        group = [job for job in self.reading if shape(job) == length][: self.rows]
        taken = set(map(id, group))
        self.reading = deque(job for job in self.reading if id(job) not in taken)
        places = self.pictures.see(group, self._call)
        # What has no job repeats the first: it writes the same into the same slot.
        rows = [*range(len(group)), *[0] * (self.rows - len(group))]
        chunk = Chunk.of(group, places, length)
        through = self.generator.adapters.index
        each = [
            Controls.of(j.settings, j.budget, j.bias, j.tops_wanted, through(j.adapter))
            for j in group
        ]
        controls = Controls(*(np.stack(column)[rows] for column in zip(*each)))
        arrays = Chunk(*(np.asarray(x)[rows] for x in chunk))
        logits = self._call("read", arrays, controls)
        self.counts["prompt_tokens"] += int(chunk.length.sum())
        for job, many in zip(group, chunk.length):
            job.read += int(many)
            self.held[job.slot] = job.prefixes[: job.read // g.reuse]
        last = [i for i, job in enumerate(group) if chunk.last[i]]
        self.reading.extend(job for i, job in enumerate(group) if not chunk.last[i])
        if not last:
            logits.block_until_ready()  # nobody gets in between chunks that wait on the device
            return
        limits = [group[i].constraint if chunk.last[i] else None for i in rows]
        limited = g.put(self._limits(limits, self.rows)) if any(limits) else self._free_reading
        values = logits, arrays, controls, limited
        given = self._call("begin", *values, keep_logits=self.keep_logits)
        self._take([(i, group[i]) for i in last], given)

    # Decoding ------------------------------------------------------------------------------------

    def _decode(self, most: int) -> None:
        live = np.array([job is not None and bool(job.ids) for job in self.jobs])
        jobs = [(i, job) for i, job in enumerate(self.jobs) if job is not None and live[i]]
        constraints = [job.constraint if job and job.ids else None for job in self.jobs]
        queued = self.queued
        enough = min(queued, 1 if self.fair else self.rows) if queued else self.slots + 1
        before = time.monotonic()
        if count := 0 if self.keep_logits else guessed_of([job for _, job in jobs]):
            given = self._look_up(jobs, live, most, enough, count)
        else:
            given = self._step_all(constraints, live, most, enough)
        self._take(jobs, given)
        quick = time.monotonic() - before < SECONDS_PER_PIECE
        self._pace = min(2 * self._pace, 16) if quick else max(self._pace // 2, 1)

    def _look_up(
        self, jobs: Sequence[tuple[int, Job]], live: np.ndarray, most: int, enough: int, count: int
    ) -> Given:
        """Tokens of greedy answers, `count` at a time guessed from what they and their prompts say."""
        history = np.full((self.slots, self.capacity), -1, np.int32)
        for i, job in jobs:
            said = np.where(job.rows < 0, job.tokens, -1), job.ids
            history[i, : job.length + len(job.ids)] = np.concatenate(said)
        limits = np.int32(most), np.int32(enough)
        given = self._call("lookup", live, history, *limits, count=count)
        self.counts["lookup_passes"] += int(given.passes)
        return given

    def _step_all(
        self, constraints: Sequence[Any], live: np.ndarray, most: int, enough: int
    ) -> Given:
        """The next tokens of every living slot."""
        return self._call(
            "decode",
            live,
            self.generator.put(self._limits(constraints, self.slots))
            if any(constraints)
            else self._free_limits,
            np.int32(1 if any(constraints) else most),
            np.int32(enough),
            keep_logits=self.keep_logits,
            # A server's slots are of all lengths, or free. For 8 of 65 to 636 positions on a CPU, attention
            # in 8 layers takes 11 ms and not 17; where all have 200, 9.5 and not 6.5.
            apart=self.fair and self.generator.on_cpu and self.generator.mesh is None,
        )

    def _limits(self, constraints: Sequence[Any], rows: int) -> Limits:
        """Which tokens may come next in each row."""
        on = np.zeros(rows, bool)
        allowed = np.zeros((rows, self._words), np.uint32)
        for i, constraint in enumerate(constraints):
            if constraint is not None:
                on[i], allowed[i] = True, constraint.allowed()
        return Limits(on, allowed)

    def _call(self, name: str, *args: Any, eyes: str = "", **how: Any) -> Any:
        """Runs a program on the state, whose buffers it takes -> what it gives besides; a Given is on the host.

        Where Ctrl-C or an error cuts it off, no other program may go on from them: the state is then None.
        eyes: the adapter's that see, if any.
        """
        g = self.generator
        state, self.state = self.state, None
        weights = () if name in ("copy", "mark", "begin") else (g.eyes.get(eyes, g.leaves),)
        program = getattr(g, name)
        with g.scope():
            out = program(*weights, state, *g.put(args), **how)
        if name in ("copy", "mark", "see"):
            self.state = out
            return None
        state, given = out
        if isinstance(given, Given):
            given = Given(*(None if x is None else np.asarray(x) for x in given))
        self.state = state
        return given

    # Answers -------------------------------------------------------------------------------------

    def _take(self, rows: Iterable[tuple[int, Job]], given: Any) -> None:
        """Adds the tokens of one call to the jobs, each with its row in it."""
        count = int(given.count)
        for row, job in rows:
            new = given.tokens[row, :count]
            new = new[new >= 0]
            many = len(new)
            logprobs = given.logprobs[row, :many]
            if not np.isfinite(logprobs).all():
                # argmax would take the first token of the vocabulary, which shows nothing.
                job.error = WeightError(
                    "the model's logits are not finite (NaN or infinity)",
                    fix="llava-jax inspect MODEL --values names the weights that are not",
                )
                self._finish(job, "error")
                # NaN is NaN even where a later request, which sees none of it, gives it a weight of 0.
                self._call("copy", NOTHING, np.int32(job.slot))
                self.held[job.slot] = []
                continue
            job.ids += new.tolist()
            job.logprobs += logprobs.tolist()
            if job.tops_wanted:
                ids = given.top_ids[row, :many, : job.tops_wanted].tolist()
                values = given.top_logprobs[row, :many, : job.tops_wanted].tolist()
                job.tops += [list(zip(*pair)) for pair in zip(ids, values)]
            if given.logits is not None:
                job.logits += list(given.logits[row, :many])
            self.counts["tokens"] += many
            try:
                self._after(job, new.tolist())
            except LlavaError as error:  # of its constraint; the others go on
                job.error = error
                self._finish(job, "error")

    def _after(self, job: Job, new: list[int]) -> None:
        """Text of the new ids, and whether the answer has ended."""
        stops = {*self.generator.eos_ids, *job.stop_ids}
        keep, text = len(job.ids), job.text
        at = next((i for i, token in enumerate(new) if token in stops), None)
        stopped = at is not None
        if at is not None:
            keep -= len(new) - at - 1
        if job.constraint and not stopped:  # it gets one token a call
            job.constraint.take(new[0])
        if text is not None:
            piece = text.push(job.ids[text.count : keep])
            if text.stopped:
                keep, stopped = min(keep, text.count), True
            if piece:
                job.pieces.append(piece)
        if stopped:
            for values in (job.ids, job.logprobs, job.tops, job.logits):
                del values[keep:]
        if stopped or len(job.ids) >= job.budget:
            self._finish(job, "stop" if stopped else "length")
        elif job.on_news:
            job.on_news(job)

    def _finish(self, job: Job, reason: str) -> None:
        job.reason = reason
        if job.text is not None and (piece := job.text.finish()):
            job.pieces.append(piece)
        if job.slot >= 0 and self.jobs[job.slot] is job:
            self.jobs[job.slot] = None
        if job in self.reading:
            self.reading.remove(job)
        self.counts[f"ended_{reason}"] += 1
        if job.on_news:
            job.on_news(job)


class Full(LlavaError):
    """More requests wait than may."""
