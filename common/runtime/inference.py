"""Evaluating and generating in a worker process, through the pipeline, forward only.

Which token comes next is decided here and not in a framework: from logits as NumPy arrays, by
float64 arithmetic and a random number that is a function of (seed, sample, position) alone. So the
frameworks give the same tokens as long as their logits are close enough, which `closest_call`
measures: the smallest distance that any choice had to the next one, in logits (greedy, and the last
of the top k) or in probability (sampled). A tie goes to the lower token.

Logits of two frameworks differ by some 1e-15 (float64) or 1e-6 (float32) of their size. A closest
call well above that means that no framework can have chosen otherwise; below it, the texts may part
at that token.
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
from common.runtime.engine import Engine
from common.runtime.job import Generation, Job
from common.spec.data import Corpus

SHORTEST = 16
"""Contexts are filled up to this length, twice this, and so on, so that few shapes are traced or
compiled.
"""


class Evaluated(BaseModel):
    """The loss over the held-out text, in `evaluation.json`."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    loss: float
    """Mean per token."""
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
    closest_call: float
    tokens_per_second: float
    """Of all samples together, without the first call at each length, which may trace."""


def load_weights(engine: Engine, job: Job) -> None:
    """Load the weights of the job's checkpoint into the engine. Raises CheckpointError."""
    if job.resume is None:
        raise ValueError(f"a job that is to {job.kind} needs a checkpoint")
    engine.reset(checkpoint.load(Path(job.resume), with_moments=False).weights)


def evaluate(engine: Engine, job: Job, corpus: Corpus) -> Evaluated:
    """Return the loss over the held-out text, or its first `job.batches` mini-batches."""
    train, length = job.config.train, job.config.model.context_length
    losses, counts, seconds = [], [], []
    for batch in islice(corpus.held_out_batches(train.batch_size, length), job.batches):
        began = time.perf_counter()
        losses.append(engine.evaluate(batch) * batch.num_tokens)
        seconds.append(time.perf_counter() - began)
        counts.append(batch.num_tokens)
    found = Evaluated(
        loss=math.fsum(losses) / sum(counts),
        tokens=sum(counts),
        batches=len(counts),
        tokens_per_second=_rate(counts, seconds, [0]),
    )
    _write(engine, job, "evaluation.json", found)
    return found


def generate(engine: Engine, job: Job) -> Generated:
    """Generate `generation.tokens` new tokens for every sample.

    A context beyond the model's length loses its beginning.
    """
    wish, model, m = job.generation, job.config.model, job.config.train.micro_batches
    if wish is None:
        raise ValueError("a job that is to generate needs to know what")
    # Every micro-batch needs at least one row; those beyond the samples are not looked at.
    rows = max(wish.samples, m)
    texts = [list(wish.prompt) for _ in range(rows)]
    closest, seconds, first_of_length, lengths = math.inf, [], [], set()
    for position in range(wish.tokens):
        # Beyond the model's length the window slides: positions count anew in every context.
        contexts = np.array([text[-model.context_length :] for text in texts])  # (B, s)
        began = time.perf_counter()
        logits = next_logits(engine, contexts, model.context_length)
        seconds.append(time.perf_counter() - began)
        length = padded_length(contexts.shape[1], model.context_length)
        first_of_length += [position] if length not in lengths else []
        lengths.add(length)
        for sample in range(wish.samples):
            token, call = pick(logits[sample], wish, sample, position)
            texts[sample].append(token)
            closest = min(closest, call)
        for row in range(wish.samples, rows):
            texts[row].append(0)
    found = Generated(
        tokens=tuple(tuple(text[len(wish.prompt) :]) for text in texts[: wish.samples]),
        closest_call=closest,
        tokens_per_second=_rate([wish.samples] * len(seconds), seconds, first_of_length),
    )
    _write(engine, job, "generation.json", found)
    return found


def padded_length(length: int, context_length: int) -> int:
    """Return the next power of two from SHORTEST on, at most the context length."""
    return min(context_length, max(SHORTEST, 1 << (length - 1).bit_length()))


def next_logits(
    engine: Engine, contexts: NDArray[np.int64], context_length: int
) -> NDArray[np.float64]:
    """Return logits (B, V) after the last token of each context (B, s).

    Contexts are padded at the end, which no position before can see.
    """
    last = contexts.shape[1] - 1
    # Zeros at the end: the causal mask hides them from `last`, and their own logits are unused.
    inputs = np.pad(contexts, ((0, 0), (0, padded_length(last + 1, context_length) - last - 1)))
    return np.asarray(engine.predict(inputs)[:, last], np.float64)


def pick(
    logits: NDArray[np.float64], wish: Generation, sample: int, position: int
) -> tuple[int, float]:
    """Return the next token, and how close another one was."""
    if wish.temperature is None:
        best = int(np.argmax(logits))  # the first of equals
        return best, float(logits[best] - np.delete(logits, best).max())
    scaled = logits / wish.temperature
    call = math.inf
    kept = np.ones(len(scaled), bool)
    # The k-th and the next: closer than the frameworks' logits are, they could change places.
    if wish.top_k is not None and wish.top_k < len(scaled):
        order = np.sort(scaled)[::-1]
        kept = scaled >= order[wish.top_k - 1]
        call = float(order[wish.top_k - 1] - order[wish.top_k]) * wish.temperature
    weights = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
    # The edges are in the order of the tokens, not of the weights: two frameworks whose near-ties
    # come out the other way round still cut [0, 1) at the same places. With weights 0.5, 0.3, 0.2
    # the edges are 0.5, 0.8, 1.0, and a draw of 0.79 takes token 1, with a call of 0.01.
    edges = np.cumsum(weights) / weights.sum()
    draw = uniform(wish.seed, sample, position)
    token = int(np.searchsorted(edges, draw, side="right"))
    token = min(token, int(np.flatnonzero(kept)[-1]))  # the last edge may be rounded below 1
    below = edges[token - 1] if token else 0.0
    return token, min(call, float(min(draw - below, edges[token] - draw)))


def uniform(seed: int, sample: int, position: int) -> float:
    """Return a number in [0, 1) that depends on nothing else (Philox: Salmon et al. 2011)."""
    philox = np.random.Philox(
        key=np.array([seed, sample], np.uint64), counter=np.array([0, 0, 0, position], np.uint64)
    )
    return float(np.random.Generator(philox).random())


def _rate(counts: list[int], seconds: list[float], warming_up: list[int]) -> float:
    """Per second, without the calls that may trace, if there are others."""
    timed = [n for n in range(len(counts)) if n not in warming_up] or list(range(len(counts)))
    return sum(counts[n] for n in timed) / sum(seconds[n] for n in timed)


def _write(engine: Engine, job: Job, name: str, found: BaseModel) -> None:
    if 0 in engine.devices:
        write_file(Path(job.out) / name, found.model_dump_json())
