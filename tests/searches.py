"""Random searches: small Llamas, and what is to be generated with them. Imports no framework.

What the transformers library finds is made by `tests.references.search_reference`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.runtime.inference import Generated
from common.runtime.job import Generation
from common.spec.parameters import initial_weights, random_arrays
from common.spec.run import LLAMA, RunConfig, TrainSpec, TransformerSpec

NEAR = 1e-4
"""The library adds float32 log-probabilities: a call closer than this may fall differently there.
"""


class Search(BaseModel):
    """One search, and what the library found."""

    model: int
    """The number of the model, which decides its shape and its weights."""
    wish: Generation
    tokens: tuple[tuple[int, ...], ...] = ()
    """New ones, the best sequence first."""
    scores: tuple[float, ...] = ()
    """None of a greedy search."""


def spec(model: int) -> TransformerSpec:
    """Return the shape of a model: a vocabulary so small that texts end, and beams part often."""
    chance = random.Random(model)
    sizes = {"num_layers": chance.choice((1, 2, 4)), "vocab_size": chance.choice((8, 13, 40))}
    heads = {"num_heads": 4, "num_kv_heads": chance.choice((1, 2, 4)), "d_model": 16, "d_ff": 24}
    context = {"context_length": 48, "tied_head": chance.random() < 0.5}
    return TransformerSpec(**LLAMA, **sizes, **heads, **context)


def weights(model: int) -> dict[str, Any]:
    """Noisy enough for the next token to depend on all that was before it."""
    own = spec(model)
    noise = random_arrays(own, model, "float64", 0.5)
    start = initial_weights(own, model, "float64")
    return {name: value + noise[name] for name, value in start.items()}


def config(model: int, framework: str = "torch", stages: int = 1) -> RunConfig:
    """Return the run that generates with this model."""
    train = TrainSpec(batch_size=1, micro_batches=1, dtype="float64")
    options: dict[str, Any] = {"framework": framework, "stages": stages, "threads": stages}
    options["tokenizer"] = "bpe"  # nothing reads text; bytes would need 256 tokens
    return RunConfig(model=spec(model), train=train, **options)


def random_search(seed: int, models: int) -> Search:
    """Return search number `seed`; one in eight is greedy."""
    chance = random.Random(seed)
    model = seed % models
    vocab_size = spec(model).vocab_size
    prompt = tuple(chance.randrange(vocab_size) for _ in range(chance.randint(1, 8)))
    wish: dict[str, Any] = {"prompt": prompt, "tokens": chance.randint(1, 32)}
    wish["eos"] = chance.choice((None, *range(4)))
    if chance.randrange(8):
        beams = wish["num_beams"] = chance.randint(2, 6)
        wish["samples"] = chance.randint(1, beams)
        wish["length_penalty"] = chance.choice((-1.0, 0.0, 0.5, 1.0, 1.0, 2.0))
        wish["early_stopping"] = chance.choice(("no", "yes", "never"))
    return Search(model=model, wish=Generation(**wish))


def difference(search: Search, found: Generated) -> str | None:
    """Return what differs from the library's result; None where nothing does."""
    if found.tokens != search.tokens:
        return f"{search.wish}: {found.tokens}, the library {search.tokens}"
    pairs = zip(found.scores or (), search.scores, strict=True)
    worst = max((abs(ours / theirs - 1) for ours, theirs in pairs), default=0.0)
    return None if worst < NEAR else f"{search.wish}: scores differ by {worst:.1e} of their size"


class Kept(BaseModel):
    """Random logits, and the tokens that the library's filters leave of them."""

    logits: tuple[float, ...]
    temperature: float
    top_k: int | None
    top_p: float
    tokens: tuple[int, ...] = ()


def random_filter(seed: int) -> Kept:
    """Return filter number `seed`."""
    chance = random.Random(seed)
    return Kept(
        logits=tuple(round(chance.gauss(0, 2), 3) for _ in range(chance.randint(2, 12))),
        temperature=chance.choice((0.5, 1.0, 2.0)),
        top_k=chance.choice((None, 1, 3, 8)),
        top_p=chance.choice((0.05, 0.3, 0.5, 0.9, 0.99)),
    )


class Recorded(BaseModel):
    """What the library gave."""

    version: str
    searches: list[Search]
    filters: list[Kept]


def recorded() -> Recorded:
    """Return what stands in tests/golden/searches.json."""
    path = Path(__file__).parent / "golden" / "searches.json"
    return Recorded.model_validate_json(path.read_text(encoding="utf-8"))
