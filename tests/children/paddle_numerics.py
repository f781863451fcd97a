"""Paddle's numerics beyond the ladder: ignored labels, resumed training, units alone, predictions, recomputation.

Prints JSON. All runs are in forked ranks, which keep their process groups for all checks of one length.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.data import Batch, load_corpus
from common.parity import LIMITS, compare, difference
from common.reference import Oracle
from common.runtime.oracle_worker import OracleEngine
from common.runtime.ranks import _free_endpoints
from common.spec import PRESETS, RunConfig, TrainSpec, TransformerSpec
from common.weights import random_arrays
from paddle_impl import devices

Arrays = dict[str, Any]
STEPS = 6


def config(stages: int, train: Any = None, model: Any = None, **run: Any) -> RunConfig:
    """A small run, with one thread per stage."""
    return RunConfig(
        framework="paddle",
        stages=stages,
        threads=stages,
        device="cpu",
        model=TransformerSpec(**PRESETS["tiny"]["model"] | (model or {})),
        train=TrainSpec(**PRESETS["tiny"]["train"] | {"clip_norm": 0.5} | (train or {})),
        **run,
    )


def starting_weights(one: RunConfig) -> Arrays:
    return random_arrays(one.model, 3, one.train.master_dtype, 0.1)


def engine_of(one: RunConfig) -> Any:
    from paddle_impl.engine import build_engine

    engine = build_engine(one)
    engine.reset(starting_weights(one))
    return engine


def on_ranks(stages: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on every rank of a pipeline of this length. Raises RuntimeError where it fails."""
    fork = multiprocessing.get_context("fork")
    endpoints, ends = _free_endpoints(stages), [fork.Pipe(duplex=False) for _ in range(stages)]

    def life(rank: int) -> None:
        try:
            devices.join_pipeline(rank, endpoints, "cpu")
            ends[rank][1].send((True, work()))
        except Exception:
            ends[rank][1].send((False, traceback.format_exc()))

    processes = [fork.Process(target=life, args=(rank,), daemon=True) for rank in range(stages)]
    for process in processes:
        process.start()
    found = []
    for receiver, _ in ends:
        if not receiver.poll(240):
            raise RuntimeError(f"no answer from one of {stages} ranks")
        ok, result = receiver.recv()
        if not ok:
            raise RuntimeError(result)
        found.append(result)
    for process in processes:
        process.join()
    return found


def merged(found: Sequence[Arrays]) -> Arrays:
    return {key: value for one in found for key, value in one.items()}


def trained(engine: Any, steps: range) -> Arrays:
    """Losses, norms, the last gradients, weights and moments."""
    one = engine.config
    corpus, seen = load_corpus(one), {}
    for step in steps:
        seen[f"loss {step}"] = np.array(engine.forward_backward(corpus.training_batch(one, step)))
        if step == steps[-1]:
            seen |= {f"gradient {name}": value for name, value in engine.gradients().items()}
        seen[f"norm {step}"] = np.array(engine.apply_gradients(step))
    seen |= {f"weight {name}": value for name, value in engine.weights().items()}
    return seen | engine.optimizer_state()


def run(one: RunConfig, steps: int = 3) -> Arrays:
    engine = engine_of(one)
    seen = trained(engine, range(steps))
    engine.close()
    return seen


def different(a: Arrays, b: Arrays) -> list[str]:
    """The tensors of `a` of which `b` has other bits."""
    return [key for key in a if not np.array_equal(a[key], b[key])]


def worst(pairs: Sequence[tuple[Any, Any]], check: Any, dtype: str) -> float:
    """The worst observed error over its limit."""
    limit = LIMITS[check][dtype]
    return max(difference(None, check, a, b, limit).relative / limit for a, b in pairs)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- ignored labels


def short_batches() -> dict[str, float]:
    """Sequences that end early and a last mini-batch of 5: against the oracle, also fed with those 5 alone."""

    def work() -> dict[str, float]:
        found = {}
        for dtype in ("float32", "float64"):
            for m in (1, 2, 4, 8):
                train = {"dtype": dtype, "batch_size": 8, "micro_batches": m}
                one = config(1, train, {"dropout": 0.1}, sequence_lengths="random", sequences_per_epoch=5)
                batch = load_corpus(one).training_batch(one, 0)
                engine = engine_of(one)
                loss, gradients = engine.forward_backward(batch), engine.gradients()
                for name, given in (("whole", batch), ("short", batch.first(5))):
                    oracle = Oracle(one.model, one.train, starting_weights(one))
                    pairs = [(gradients[key], value) for key, value in _gradients_of(oracle, given).items()]
                    found[f"{dtype} m={m} {name} gradient"] = worst(pairs, "gradient", dtype)
                    found[f"{dtype} m={m} {name} loss"] = worst([(loss, oracle.forward(given)[0])], "loss", dtype)
                engine.close()
        return found

    return on_ranks(1, work)[0]


def _gradients_of(oracle: Oracle, batch: Batch) -> Arrays:
    oracle.forward_backward(batch)
    return oracle.gradients


# ------------------------------------------------------------------------------------------------- resumed training

RESUMED = {
    "adamw float32 tied": {"train": {}, "model": {"tied_head": True, "dropout": 0.1}},
    "adamw float64": {"train": {"dtype": "float64"}},
    "momentum float64 tied": {
        "train": {"optimizer": "sgd", "momentum": 0.9, "dtype": "float64"},
        "model": {"tied_head": True},
    },
    "momentum float32": {"train": {"optimizer": "sgd", "momentum": 0.9}},
    "sgd float32": {"train": {"optimizer": "sgd"}},
}
ELSEWHERE: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {"schedule": "gpipe"}),
    (2, {"schedule": "1f1b"}),
    (2, {"schedule": "zb-h1", "partition": (1,)}),
)


def resumed() -> dict[str, list[str]]:
    """Six steps at once against three, then three from arrays in a new engine, elsewhere: tensors that differ."""
    half = STEPS // 2

    def one_stage() -> Any:
        found = {}
        for name, options in RESUMED.items():
            whole = run(config(1, **options), STEPS)
            engine = engine_of(config(1, **options))
            trained(engine, range(half))
            found[name] = whole, engine.weights(), engine.optimizer_state()
            engine.close()
        return found

    before = on_ranks(1, one_stage)[0]

    def rest(stages: int) -> Callable[[], dict[str, Arrays]]:
        def work() -> dict[str, Arrays]:
            found = {}
            for p, place in ELSEWHERE:
                for name, options in RESUMED.items() if p == stages else ():
                    engine = engine_of(config(p, **options, **place))
                    engine.reset(before[name][1])
                    engine.load_optimizer_state(before[name][2], half)
                    found[f"{name}, then p={p} {place}"] = trained(engine, range(half, STEPS))
                    engine.close()
            return found

        return work

    after: dict[str, Arrays] = {}
    for stages in (1, 2):
        ranks = on_ranks(stages, rest(stages))
        after |= {name: merged([rank[name] for rank in ranks]) for name in ranks[0]}
    return {name: different(seen, before[name.split(",")[0]][0]) for name, seen in after.items()}


# ------------------------------------------------------------------------------------------------- units alone


def units_alone_and_predictions() -> dict[str, Any]:
    """Two stages, all units by themselves and all logits, against the oracle; errors over their limits."""
    cases = {
        f"{dtype} {head} {norm}": config(
            2, {"dtype": dtype}, {"tied_head": head == "tied", "norm": norm, "dropout": 0.1}, sequence_lengths="random"
        )
        for dtype, head, norm in (("float32", "tied", "pre"), ("float64", "untied", "post"))
    }
    prompts = {
        "batch": np.random.default_rng(0).integers(0, 256, (8, 16)),
        "one row each": np.random.default_rng(1).integers(0, 256, (4, 16)),
        "short": np.random.default_rng(2).integers(0, 256, (12, 5)),
    }
    given = {}
    for name, one in cases.items():
        oracle = Oracle(one.model, one.train, starting_weights(one))
        batch = load_corpus(one).training_batch(one, 0)
        outputs = oracle.forward(batch)[1]
        oracle.forward_backward(batch)
        units = list(outputs)
        inputs = {unit: outputs[before] for before, unit in itertools.pairwise(units)}
        given[name] = batch, inputs, oracle.output_gradients

    def work() -> dict[str, Any]:
        found = {}
        for name, one in cases.items():
            engine = engine_of(one)
            engine.forward_backward(given[name][0])
            before = engine.gradients()
            probed = engine.probe_units(*given[name])
            kept = different(before, engine.gradients())
            engine.apply_gradients(0)
            engine.reset(starting_weights(one))
            logits = {prompt: engine.predict(tokens) for prompt, tokens in prompts.items()}
            engine.close()
            engine = engine_of(one.model_copy(update={"executor": "native"}))
            same = different(logits, {prompt: engine.predict(tokens) for prompt, tokens in prompts.items()})
            engine.close()
            found[name] = probed, kept, logits, same
        return found

    ranks, errors = on_ranks(2, work), {}
    disturbed, logits_differ = [], []
    for name, one in cases.items():
        oracle, dtype = OracleEngine(one), one.train.dtype
        oracle.reset(starting_weights(one))
        want, probed = oracle.probe_units(*given[name]), merged([rank[name][0] for rank in ranks])
        for phase, check in (("unit_forward", "activation"), ("unit_backward", "gradient")):
            expected = {key: value for key, value in want.items() if key.phase == phase}
            errors[f"{name} {phase}"] = compare(probed, expected, check, dtype).margins()[check]  # type: ignore[arg-type]
        for prompt, tokens in prompts.items():
            pairs = [(rank[name][2][prompt], oracle.predict(tokens)) for rank in ranks]
            errors[f"{name} {prompt}"] = worst(pairs, "activation", dtype)
        disturbed += [tensor for rank in ranks for tensor in rank[name][1]]
        logits_differ += [tensor for rank in ranks for tensor in rank[name][3]]
    return {"errors": errors, "disturbed": disturbed, "logits_differ": logits_differ}


# ------------------------------------------------------------------------------------------------- recomputation

SCHEDULES: tuple[tuple[str, int], ...] = (("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved", 2), ("zb-v", 2))
"""Each with its chunks."""


def recomputation() -> dict[str, Any]:
    """Two stages: tensors of which recomputation changes bits, and what is held with it and without."""
    model = {"num_layers": 4, "dropout": 0.1, "tied_head": True}

    def work() -> dict[str, Any]:
        found: dict[str, Any] = {"different": {}, "held": {}}
        for schedule, chunks in SCHEDULES:
            seen = {}
            for recompute in ("none", "full", "except-last", "every-1", "every-2"):
                one = config(2, {}, model, schedule=schedule, chunks=chunks, recompute=recompute)
                engine = engine_of(one)
                seen[recompute] = trained(engine, range(2))
                (rank, held), *_ = engine.held_bytes_peak().items()
                sizes, last = engine.stage.held, one.train.micro_batches - 1
                found["different"][f"{rank} {schedule} {recompute}"] = different(seen["none"], seen[recompute])
                found["held"][f"{rank} {schedule} {recompute}"] = {
                    "peak": held,
                    "forward": sizes.bytes_of(last),
                    "recomputed": sizes.bytes_of(0),
                    "waiting": sizes.waiting_bytes_of(0),
                }
                engine.close()
        return found

    ranks = on_ranks(2, work)
    return {key: merged([rank[key] for rank in ranks]) for key in ranks[0]}


# ------------------------------------------------------------------------------------------------- native dropout


def native_dropout() -> dict[str, Any]:
    """Two stages with Paddle's own masks: tensors that a rerun, a schedule or recomputation changes."""
    native = {"dropout": 0.1, "dropout_masks": "native"}
    runs: dict[str, Any] = {
        "again": {},
        "gpipe, another cut": {"schedule": "gpipe", "partition": (1,)},
        "zb-h1, recomputed": {"schedule": "zb-h1", "recompute": "full"},
        "recomputed in pieces": {"recompute": "every-1"},
        "fleet's loop": {"executor": "native"},
    }

    def work() -> dict[str, Arrays]:
        seen = {name: run(config(2, {}, native, **options)) for name, options in {"first": {}, **runs}.items()}
        return seen | {"shared": run(config(2, {}, native | {"dropout_masks": "shared"}))}

    ranks = on_ranks(2, work)
    seen = {name: merged([rank[name] for rank in ranks]) for name in ranks[0]}
    return {
        "different": {name: different(seen["first"], seen[name]) for name in runs},
        "shared_and_native_differ": bool(different(seen["first"], seen["shared"])),
    }


# ------------------------------------------------------------------------------------------------- refused


def refused() -> dict[str, str]:
    """What the engine says to what it cannot do."""
    wrong: dict[str, dict[str, Any]] = {
        "bfloat16": {"train": {"dtype": "bfloat16"}},
        "native recompute": {"executor": "native", "recompute": "full"},
        "plain recompute": {"executor": "plain", "recompute": "full"},
        "drift": {"drift": "tf32"},
    }

    def work() -> dict[str, str]:
        from paddle_impl.drift import switch

        said = {}
        for name, options in wrong.items():
            one = config(1, **options)
            try:
                with switch(one):
                    engine_of(one)
            except ValueError as error:
                said[name] = str(error)
        return said

    return on_ranks(1, work)[0]


CHECKS = (short_batches, resumed, units_alone_and_predictions, recomputation, native_dropout, refused)

if __name__ == "__main__":
    devices.configure(1, 1, "cpu")
    import paddle_impl.engine  # noqa: F401  the ranks inherit it

    chosen = [check for check in CHECKS if not sys.argv[1:] or check.__name__ in sys.argv[1:]]
    print(json.dumps({check.__name__: check() for check in chosen}))
