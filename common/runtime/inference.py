"""Evaluating and generating in a worker process, through the pipeline, forward only.

Which token comes next is decided by `runtime.sampling` and `runtime.beams`; what goes round in the
pipeline by `runtime.decode`. Here the two meet.

Logits of two frameworks differ by some 1e-15 (float64) or 1e-6 (float32) of their size. A closest
call well above that: no framework can have chosen otherwise; below it, texts may part there.
"""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from common import checkpoint
from common.io.edges import write_file
from common.runtime.beams import Beams
from common.runtime.decode import Extension
from common.runtime.engine import Engine
from common.runtime.job import Generation, Job
from common.runtime.sampling import Samples
from common.spec.data import Corpus


class Evaluated(BaseModel):
    """The loss over the held-out text, in `evaluation.json`."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    loss: float
    """Mean per token; of an encoder per masked token."""
    tokens: int
    batches: int
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Generated(BaseModel):
    """The new tokens of every sample, in `generation.json`."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    tokens: tuple[tuple[int, ...], ...]
    """Of beam search the best ones, the best first."""
    closest_call: float
    tokens_per_second: float
    """Of all samples, or beams, together; without the calls that may trace."""
    scores: tuple[float, ...] | None = None
    """Of beam search: the sum of log-probabilities / (new tokens) ^ length penalty."""


def load_weights(engine: Engine, job: Job) -> None:
    """Load the weights of the job's checkpoint into the engine. Raises CheckpointError."""
    if job.resume is None:
        raise ValueError(f"a job that is to {job.kind} needs a checkpoint")
    engine.reset(checkpoint.load(Path(job.resume), with_moments=False).weights)


def evaluate(engine: Engine, job: Job, corpus: Corpus) -> Evaluated:
    """Return the loss over the held-out text, or its first `job.batches` mini-batches.

    An encoder's tokens are masked by a seed of their own: the same ones whatever was trained how.
    """
    train, model = job.config.train, job.config.model
    losses, counts, seconds, read = [], [], [], []
    batches = corpus.held_out_batches(train.batch_size, model.context_length)
    for number, plain in enumerate(islice(batches, job.batches)):
        batch = corpus.masked(plain, model, (0, 5), number * train.batch_size)
        if not batch.num_tokens:  # the rest of the text fills no sequence of an encoder
            continue
        began = time.perf_counter()
        losses.append(engine.evaluate(batch) * batch.num_tokens)
        seconds.append(time.perf_counter() - began)
        counts.append(batch.num_tokens)
        read.append(plain.num_tokens)
    found = Evaluated(
        loss=math.fsum(losses) / sum(counts),
        tokens=sum(counts),
        batches=len(counts),
        tokens_per_second=_rate(read, seconds, [0]),
    )
    _write(engine, job, "evaluation.json", found)
    return found


def generate(engine: Engine, job: Job) -> Generated:
    """Generate `generation.tokens` new tokens for every sample, or fewer where one ends sooner.

    Where stages are processes, only that of the embedding knows what was found.
    """
    if job.generation is None:
        raise ValueError("a job that is to generate needs to know what")
    model, m = job.config.model, job.config.train.micro_batches
    writing = Writing(job.generation, model.context_length, m)
    engine.decode(writing.feed)
    found = writing.found()
    _write(engine, job, "generation.json", found)
    return found


class Writing:
    """What is generated, as the groups that go round in a pipeline (`runtime.decode.Feed`)."""

    def __init__(self, wish: Generation, context_length: int, num_groups: int) -> None:
        self._context_length = context_length
        # Groups differ by at most one sample; one search is one group, since its beams are weighed
        # against each other at every token.
        pieces = np.array_split(range(wish.samples), num_groups)
        self._groups: list[Samples | Beams] = (
            [Samples(wish, piece.tolist()) for piece in pieces if len(piece)]
            if wish.num_beams is None
            else [Beams(wish)]
        )
        self._counts: list[int] = []
        self._seconds: list[float] = []
        self._warming_up: list[int] = []
        self._seen: set[tuple[int, int]] = set()
        """(group, new positions) of the calls so far; the first of each may trace."""
        self._last: dict[int, Extension] = {}
        self._began = time.perf_counter()

    def feed(self, group: int, logits: NDArray[np.float64] | None) -> Extension | None:
        """Return what `group` goes on with after `logits` (b, V). Raises FloatingPointError."""
        if group >= len(self._groups):
            return None
        rows = None
        if logits is not None:
            if not np.isfinite(logits).all():
                raise FloatingPointError("logits that are not finite; expected a model that works")
            rows = self._groups[group].choose(np.asarray(logits, np.float64))
            self._note(group, logits)
            if not rows:
                return None
        texts = self._groups[group].texts
        if rows is not None and len(texts[0]) <= self._context_length:
            found = Extension(np.array([text[-1:] for text in texts]), rows)
        else:
            # Beyond the model's length the window slides: positions count anew in every context, so
            # no key and no value of the last one is of use.
            found = Extension(np.array([text[-self._context_length :] for text in texts]), None)
        self._last[group] = found
        return found

    def found(self) -> Generated:
        """Return what the groups have; nothing where they were never fed."""
        groups, began = self._groups, bool(self._seconds)
        scores = [score for each in groups if isinstance(each, Beams) for score in each.scores()]
        return Generated(
            tokens=tuple(tuple(tokens) for each in groups for tokens in each.found()),
            closest_call=min(each.closest_call for each in groups),
            tokens_per_second=_rate(self._counts, self._seconds, self._warming_up) if began else 0,
            scores=tuple(scores) or None,
        )

    def _note(self, group: int, logits: NDArray[np.float64]) -> None:
        """Note that so many tokens were chosen since the last call."""
        now = time.perf_counter()
        kind = group, self._last[group].tokens.shape[1]
        self._warming_up += [] if kind in self._seen else [len(self._seconds)]
        self._seen.add(kind)
        self._counts.append(len(logits))
        self._seconds.append(now - self._began)
        self._began = now


def _rate(counts: list[int], seconds: list[float], warming_up: list[int]) -> float:
    """Per second, without the calls that may trace, if there are others."""
    timed = [n for n in range(len(counts)) if n not in warming_up] or list(range(len(counts)))
    return sum(counts[n] for n in timed) / sum(seconds[n] for n in timed)


def _write(engine: Engine, job: Job, name: str, found: BaseModel) -> None:
    if 0 in engine.devices:
        write_file(Path(job.out) / name, found.model_dump_json())
