"""What the tests of the three frameworks share: small pipelines, and what each of them is held
against.

Imports no framework. `Make` is the fixture of that name in each framework's folder: it builds an
engine, gives it weights that are nowhere 0 or 1, and closes it when the test ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.harness import zoo
from common.harness.launch import _outcome
from common.oracle.limits import compare
from common.report.zoo import GOOD
from common.runtime.decode import Extension
from common.runtime.inference import Writing
from common.runtime.job import Generation, Job, JobFile
from common.runtime.oracle_worker import OracleEngine
from common.runtime.outcome import Outcome
from common.runtime.training import starting_weights
from common.runtime.worker import Switch, run_jobs
from common.spec import dropout_masks
from common.spec.data import Batch, load_corpus
from common.spec.memory import Memory
from common.spec.parameters import Check, TensorKey, unit_names
from common.spec.run import LLAMA, PRESETS, RunConfig, TrainSpec, TransformerSpec
from tests import searches

Arrays = dict[str, Any]
Make = Callable[..., Any]

ELSEWHERE: tuple[Any, ...] = (
    (1, "gpipe", {}),
    (2, "zb-h1", {"partition": (1,)}),
    (2, "zb-v", {"chunks": 2}),
)
"""Stages, schedule and the rest of runs that give the bits of two stages with 1f1b."""
ACTIVATION_BYTES = 2 * 16 * 32 * 4
"""What one micro-batch hands from unit to unit in float32: 2 sequences, 16 positions, 32 features.
"""


def small(
    framework: str,
    stages: int = 1,
    schedule: str = "1f1b",
    dtype: str = "float32",
    train: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    **model: Any,
) -> RunConfig:
    """A run of the preset `tiny` with clipping and one thread per stage."""
    tiny = PRESETS["tiny"]
    parts = {
        "model": TransformerSpec(**tiny["model"] | model),
        "train": TrainSpec(
            **tiny["train"] | {"clip_norm": 0.5, "dtype": dtype} | dict(train or {})
        ),
    }
    cut = {"stages": stages, "schedule": schedule, "threads": stages, "device": "cpu"}
    return RunConfig.model_validate({"framework": framework} | cut | parts | dict(run or {}))


def maker(framework: str, build_engine: Callable[[RunConfig], Any]) -> Iterator[Make]:
    """The body of a fixture `make(stages, schedule, ...)`, whose arguments are those of `small`, or
    the whole `config`.
    """
    with ExitStack() as engines:

        def make(*arguments: Any, **options: Any) -> Any:
            config = options.get("config") or small(framework, *arguments, **options)
            engine = build_engine(config)
            engines.callback(engine.close)
            engine.reset(starting_weights(Job(config=config, out="", noise=0.1)))
            return engine

        yield make


def batch(engine: Any, step: int = 0) -> Batch:
    return load_corpus(engine.config).training_batch(engine.config, step)


def train(engine: Any, steps: Iterable[int]) -> Arrays:
    """Every loss and norm, the last gradients, the weights and the moments."""
    corpus, seen, gradients = load_corpus(engine.config), {}, {}
    for step in steps:
        seen[f"loss {step}"] = np.array(
            engine.forward_backward(corpus.training_batch(engine.config, step))
        )
        gradients = {f"gradient {name}": value.copy() for name, value in engine.gradients().items()}
        seen[f"norm {step}"] = np.array(engine.apply_gradients(step))
    weights = {f"weight {name}": value for name, value in engine.weights().items()}
    return seen | gradients | weights | engine.optimizer_state()


def different(a: Arrays, b: Arrays) -> list[str]:
    """The names under which the two do not hold the same bits."""
    return [
        key
        for key in a.keys() | b.keys()
        if key not in a or key not in b or not np.array_equal(a[key], b[key])
    ]


def oracle_of(engine: Any) -> OracleEngine:
    """The oracle with the engine's weights."""
    oracle = OracleEngine(engine.config)
    oracle.reset(engine.weights())
    return oracle


def assert_within(
    observed: Mapping[Any, Any], expected: Mapping[Any, Any], check: Check, dtype: str
) -> None:
    """By the limits of docs/numerics.md; arrays and numbers go by name, or by `TensorKey`."""

    def keys(found: Mapping[Any, Any]) -> dict[TensorKey, Any]:
        named = {
            k if isinstance(k, TensorKey) else TensorKey(0, "", 0, -1, "", k): v
            for k, v in found.items()
        }
        return {key: np.asarray(value) for key, value in named.items()}

    comparison = compare(keys(observed), keys(expected), check, dtype)
    assert comparison.passed, comparison.report()


# ------------------------------------------------------------------------------- against the oracle


def check_short_batch(make: Make, dtype: str, micro_batches: int) -> None:
    """Sequences end early, and from five on the last of the mini-batch are not there: they count
    for nothing.
    """
    run = {"sequence_lengths": "random", "sequences_per_epoch": 5}
    engine = make(
        2, dtype=dtype, dropout=0.1, num_layers=1, train={"micro_batches": micro_batches}, run=run
    )
    whole, oracle = batch(engine), oracle_of(engine)
    losses = {"loss": engine.forward_backward(whole), "held-out loss": engine.evaluate(whole)}
    gradients = engine.gradients()
    for given in (whole, whole.first(5)):
        expected = {"loss": oracle.forward_backward(given), "held-out loss": oracle.evaluate(given)}
        assert_within(losses, expected, "loss", dtype)
        assert_within(gradients, oracle.gradients(), "gradient", dtype)


def check_units_alone(make: Make, dtype: str, norm: str, tied_head: bool) -> None:
    """Every unit, fed with the oracle's tensors, gives the oracle's, and leaves the engine's
    gradients as they were.
    """
    run = {"sequence_lengths": "random"}
    model = {"norm": norm, "tied_head": tied_head, "dropout": 0.1, "num_layers": 1}
    engine = make(2, dtype=dtype, train={"micro_batches": 3}, run=run, **model)
    given, oracle = batch(engine, 1), oracle_of(engine)
    outputs = oracle.oracle.forward(given)[1]
    oracle.forward_backward(given)
    inputs = {
        unit: outputs[before]
        for before, unit in itertools.pairwise(unit_names(engine.config.model))
    }
    engine.forward_backward(given)
    before = engine.gradients()
    mine = engine.probe_units(given, inputs, oracle.oracle.output_gradients)
    theirs = oracle.probe_units(given, inputs, oracle.oracle.output_gradients)
    assert len(mine) == len(theirs)
    checks: tuple[tuple[str, Check], ...] = (
        ("unit_forward", "activation"),
        ("unit_backward", "gradient"),
    )
    for phase, check in checks:
        assert_within(
            mine, {key: value for key, value in theirs.items() if key.phase == phase}, check, dtype
        )
    assert different(before, engine.gradients()) == []


def check_predictions(engine: Any, *shapes: tuple[int, int]) -> None:
    """Logits for batches of other shapes than the training's."""
    oracle, tokens = oracle_of(engine), np.random.default_rng(0).integers(0, 256, (12, 16))
    for rows, columns in shapes:
        given = tokens[:rows, :columns]
        logits = {"logits": engine.predict(given)}
        assert_within(
            logits, {"logits": oracle.predict(given)}, "activation", engine.config.train.dtype
        )


def ask(engine: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(engine, *arguments)`, where stages are processes in each of them."""
    return getattr(engine, "on_all", partial(_here, engine))(work, *arguments)


def _here(engine: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    return work(engine, *arguments)


def decoded(engine: Any, wish: Generation) -> Arrays:
    """What `engine` generates; and, for every choice, the contexts and the logits behind them."""
    model, m = engine.config.model, engine.config.train.micro_batches
    writing, found = Writing(wish, model.context_length, m), dict[str, Any]()
    contexts: dict[int, Any] = {}

    def feed(group: int, logits: Any) -> Extension | None:
        if logits is not None:
            place = sum(key.startswith(f"logits {group} ") for key in found)
            found[f"logits {group} {place}"] = logits
            found[f"contexts {group} {place}"] = contexts[group]
        extension = writing.feed(group, logits)
        if extension is not None and extension.rows is None:
            contexts[group] = extension.tokens
        elif extension is not None:
            before = contexts[group][list(extension.rows)]
            contexts[group] = np.concatenate([before, extension.tokens], 1)  # (b, s)
        return extension

    engine.decode(feed)
    said = writing.found().model_copy(update={"tokens_per_second": 0.0})  # each process has its own
    return found | {"found": said} if 0 in engine.devices else {}


DECODING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "sampled": (
        {**LLAMA, "num_kv_heads": 1},
        {"temperature": 1.2, "top_k": 99, "top_p": 0.95, "samples": 5, "eos": 98},
    ),
    "beams": ({"norm": "post", "tied_head": True}, {"num_beams": 3, "samples": 2, "eos": 98}),
}
"""By kind of generation, a model and what is to be generated: 20 tokens, 8 of them where the
window slides.
"""


def check_decoding(make: Make, kind: str, stages: int, schedule: str, **run: Any) -> None:
    """The tokens are the oracle's, which has no cache; the logits those of the whole context."""
    model, changes = DECODING[kind]
    train = {"batch_size": 4, "micro_batches": 2}
    engine = make(stages, schedule, dtype="float64", dropout=0.1, train=train, run=run, **model)
    wish = Generation(prompt=(5, 98, 7, 250), tokens=20, **changes)
    mine, right = ask(engine, decoded, wish), decoded(oracle_of(engine), wish)
    assert mine.keys() == right.keys() and len(mine) > 20
    assert mine["found"].tokens == right["found"].tokens
    assert mine["found"].closest_call == pytest.approx(right["found"].closest_call, rel=1e-6)
    tolerance = {"rtol": 0, "atol": 1e-12 * np.abs(right["logits 0 0"]).max()}
    for key in (key for key in mine if key.startswith("logits")):
        np.testing.assert_allclose(mine[key], right[key], **tolerance)
    for place in (5, 15):  # within the context length, and where the window has slid
        contexts, logits = mine[f"contexts 0 {place}"], mine[f"logits 0 {place}"]
        whole = engine.predict(np.repeat(contexts, 2, 0))[::2, -1]
        np.testing.assert_allclose(logits, whole, **tolerance)


def check_searches(make: Make, framework: str, stages: int) -> None:
    """Recorded searches of the transformers library, with some of its models."""
    recorded = searches.recorded().searches
    for model in (0, 1):
        engine = make(config=searches.config(model, framework, stages))
        engine.reset(searches.weights(model))
        for search in [each for each in recorded if each.model == model][:4]:
            found = ask(engine, decoded, search.wish)["found"]
            assert searches.difference(search, found) is None


def bfloat16_errors(engine: Any) -> tuple[float, float]:
    """The relative errors of the loss and of the worst gradient, after one `forward_backward`."""
    given, oracle = batch(engine), oracle_of(engine)
    loss, right = engine.forward_backward(given), oracle.forward_backward(given)
    expected = oracle.gradients()
    errors = [
        np.linalg.norm(v - expected[k]) / np.linalg.norm(expected[k])
        for k, v in engine.gradients().items()
    ]
    return abs(loss - right) / right, float(max(errors))


def check_all_float32(engine: Any) -> None:
    """What an engine that computes in bfloat16 gives: its float32 masters, and results that NumPy
    can hold.
    """
    arrays = [
        *engine.weights().values(),
        *engine.gradients().values(),
        *engine.optimizer_state().values(),
    ]
    arrays += [*engine.unit_outputs(batch(engine)).values(), engine.predict(batch(engine).inputs)]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def stretch(low: Any, high: Any) -> float:
    """The factor 1 + s by which `low` is `high` at best, as |s| in roundoffs of bfloat16: errors
    with a sign show.
    """
    low, high = (np.asarray(array, np.float64) for array in (low, high))
    return abs(float(((low - high) * high).sum() / (high**2).sum() * 2**8))


# --------------------------------------------------------------------------------------- bit by bit


def check_same_bits(
    make: Make, runs: Sequence[tuple[int, str, dict[str, Any]]], steps: int, **options: Any
) -> None:
    """Runs of (stages, schedule, further fields) train, and are evaluated, to the bits of the
    first.
    """

    def trained(stages: int, schedule: str, run: dict[str, Any]) -> Arrays:
        engine = make(stages, schedule, run=run, **options)
        return train(engine, range(steps)) | {
            "held-out loss": np.array(engine.evaluate(batch(engine)))
        }

    first, *others = (trained(*run) for run in runs)
    for run, other in zip(runs[1:], others, strict=True):
        assert different(first, other) == [], run


def check_resumes(
    make: Make, elsewhere: Sequence[tuple[int, str, dict[str, Any]]], **options: Any
) -> None:
    """Three steps, and three more that go on from these, give the same bits in engines with other
    cuts and schedules.
    """
    engine = make(2, **options)
    first = train(engine, range(3))
    weights, state = engine.weights(), engine.optimizer_state()
    then = train(engine, range(3, 6))
    for stages, schedule, run in elsewhere:
        other = make(stages, schedule, run=run, **options)
        assert different(first, train(other, range(3))) == [], (stages, schedule, run)
        other.reset(weights)
        other.load_optimizer_state(state, 3)
        assert different(then, train(other, range(3, 6))) == [], (stages, schedule, run)


def held_bytes(
    make: Make, recompute: str, schedule: str = "1f1b", **options: Any
) -> dict[int, int]:
    """The most bytes of activations that each of two stages holds in one step."""
    engine = make(2, schedule, run={"recompute": recompute}, **options)
    engine.forward_backward(batch(engine))
    return dict(engine.held_bytes_peak())


ONE_BLOCK: dict[str, Any] = {"num_layers": 1}
MEMORY_GRID: tuple[tuple[int, str, dict[str, Any], dict[str, Any]], ...] = (
    (
        2,
        "zb-h1",
        {},
        ONE_BLOCK
        | {"activation": "gelu_tanh", "dropout": 0.1, "biases": False, "dtype": "bfloat16"},
    ),
    (
        2,
        "interleaved",
        {"chunks": 2, "track": "best"},
        {"num_layers": 4, "num_kv_heads": 1} | LLAMA,
    ),
    (2, "1f1b", {"track": "best"}, ONE_BLOCK | {"causal": False, "position": "rotary"}),
)
"""Stages, schedule, the rest of the run, and the model: runs whose held bytes are predicted, beside
all those of tests/parity.
"""


def check_held_bytes(make: Make, **instead: Any) -> None:
    """Every device holds what `common.spec.memory` predicts, with `instead` in every model.

    7 sequences in 3 micro-batches: one of them is larger.
    """
    for stages, schedule, run, model in MEMORY_GRID:
        train = {"batch_size": 7, "micro_batches": 3}
        engine = make(stages, schedule, train=train, run=run, **model | instead)
        engine.forward_backward(batch(engine))
        held = engine.held_bytes_peak()
        predicted = Memory.of_run(engine.config)
        for device, each in enumerate(predicted):
            assert each.activations_bytes == held[device], (schedule, device)


# ------------------------------------------------------------------------------- dropout and habits

SAMPLES, STEP_KEY = np.array([3, 0, 7, 200_000]), dropout_masks.step_key(5, 11)

every_mask = pytest.mark.parametrize(
    ("site", "shape", "probability"),
    itertools.product((0, 6, 1021), ((4, 16, 32), (4, 2, 16, 16), (4, 1)), (0.1, 0.5, 0.999)),
)
"""Masks for the samples `SAMPLES` at the step of `STEP_KEY`."""


def numpy_mask(site: int, shape: tuple[int, ...], probability: float) -> Any:
    return dropout_masks.keep_mask(STEP_KEY, site, SAMPLES, shape, probability)


def habits_here(
    framework: str,
    names: Sequence[str],
    folder: Path,
    build_engine: Callable[[RunConfig], Any],
    switch: Switch,
) -> dict[str, str]:
    """The zoo's verdict on each habit, with the runs in this process and not in a worker, and one
    block instead of two.
    """

    def run_here(module: str, jobs: Sequence[Job], home: Path, *_: Any) -> list[Outcome]:
        for job in jobs:
            Path(job.out).mkdir(parents=True)
        run_jobs(JobFile(jobs=tuple(jobs)), build_engine, switch=switch)
        return [_outcome(job, home, "no result", 0.0) for job in jobs]

    base = zoo.base_config(20)
    one_block = base.model_copy(update={"model": base.model.model_copy(update={"num_layers": 1})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "run_jobs_in_worker", run_here)
        patch.setattr(zoo, "base_config", lambda steps: one_block)
        rows = zoo.run_zoo(folder, [(framework, None)], names, [20], 1, timeout_seconds=np.inf)[0]
    return {row.name: row.verdict if row.verdict in GOOD else str(row) for row in rows}
