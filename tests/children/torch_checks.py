"""What only PyTorch's own process can see: graphs, forward calls, copies of a tied weight. Prints JSON."""

from __future__ import annotations

import copy
import fnmatch
import itertools
import json
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import dropout as reference
from common.data import load_corpus
from common.drift import DRIFTS
from common.parity import TensorKey, compare
from common.probes import read_probe
from common.runtime.executor import StageFailure
from common.runtime.job import Job, JobFile
from common.runtime.oracle_worker import OracleEngine
from common.runtime.training import starting_weights
from common.runtime.worker import run_jobs
from common.spec import PRESETS, RunConfig, TrainSpec, TransformerSpec
from common.weights import unit_names
from common.zoo import NOISE, config_of, first_failure, place_of
from torch_impl import devices
from torch_impl.drift import HABITS, switch
from torch_impl.dropout import DropoutContext, ElementHashes, keep_mask, native_mask
from torch_impl.engine import TorchEngine, build_engine
from torch_impl.layers import build_unit
from torch_impl.stage import Mode

SPLIT = "0: F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3\n1: F0 B0 F1 B1 W0 F2 B2 W1 F3 W2 B3 W3\n"


def configuration(
    stages: int,
    schedule: str = "1f1b",
    dtype: str = "float32",
    threads: int | None = None,
    train: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    **model: Any,
) -> RunConfig:
    """A small run with one thread per stage."""
    return RunConfig(
        stages=stages,
        schedule=schedule,
        threads=threads or stages,
        device="cpu",
        model=TransformerSpec(**PRESETS["tiny"]["model"] | model),
        train=TrainSpec(**PRESETS["tiny"]["train"] | (train or {}), dtype=dtype),
        **run or {},
    )


def make(*arguments: Any, **options: Any) -> Any:
    """A small engine with its weights, and a function from a step to its mini-batch."""
    config = configuration(*arguments, **options)
    engine = build_engine(config)
    engine.reset(starting_weights(Job(config=config, out="", noise=0.1)))
    corpus = load_corpus(config)
    return engine, lambda step: corpus.training_batch(config, step)


def oracle_of(engine: Any) -> OracleEngine:
    """The oracle with the engine's weights."""
    oracle = OracleEngine(engine.config)
    oracle.reset(engine.weights())
    return oracle


def worst(observed: Any, expected: Any, check: Any, dtype: str) -> float:
    """The largest error over its limit; arrays go by name, or by `TensorKey`."""

    def keys(arrays: Any) -> Any:
        return {k if isinstance(k, TensorKey) else TensorKey(0, "", 0, -1, "", k): v for k, v in arrays.items()}

    return max(compare(keys(observed), keys(expected), check, dtype).margins().values())


def train(engine: TorchEngine, batches: Any, steps: int, first: int = 0) -> list[Any]:
    """Losses, then the last gradients and weights."""
    losses = []
    for step in range(first, steps):
        losses.append(engine.forward_backward(batches(step)))
        gradients = engine.gradients()
        engine.apply_gradients(step)
    return [np.array(losses), *gradients.values(), *engine.weights().values()]


def split_backward() -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as table:
        table.write(SPLIT)
        table.flush()
        found, calls = {}, {}
        for name, stages, schedule in (("merged", 1, "gpipe"), ("split", 2, f"file:{table.name}")):
            engine, batches = make(stages, schedule, dropout=0.1)
            calls[name] = 0

            def count(*_: Any, name: str = name) -> None:
                calls[name] += 1

            for stage in engine.stages:
                for chunk in stage.chunks:
                    for unit in chunk.units:
                        unit.register_forward_hook(count)
            found[name] = train(engine, batches, 3)
            engine.close()
    equal = all(np.array_equal(a, b) for a, b in zip(found["merged"], found["split"], strict=True))
    return {"bitwise": equal, "forward_calls": calls, "expected_calls": 3 * 4 * 4}


def against_plain_autograd() -> float:
    """The largest relative difference between our gradients and those of one `loss.backward()`."""
    engine, batches = make(1, dtype="float64", dropout=0.1, tied_head=True)
    batch = batches(0)
    engine.forward_backward(batch)
    stage = engine.stages[0]
    ours = [item.parameter.grad.clone() for item in stage.named]
    logits = torch.from_numpy(batch.inputs)
    context = DropoutContext(reference.step_key(0, 0), torch.arange(batch.inputs.shape[0]), 0, ElementHashes())
    for unit in stage.chunks[0].units:
        logits = unit(logits, context)
    targets = torch.from_numpy(batch.targets).flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    theirs: dict[str, torch.Tensor] = {}
    found = torch.autograd.grad(loss, [item.parameter for item in stage.named])
    for item, gradient in zip(stage.named, found, strict=True):  # the uses of a tied weight add up
        theirs[item.name] = theirs.get(item.name, 0) + gradient
    engine.close()
    expected = [theirs[item.name] for item in stage.named]
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, expected, strict=True))


def watch_in_flight(stage: Any) -> list[int]:
    """How many micro-batches the stage holds after each of its forwards."""
    seen: list[int] = []
    original = stage.forward

    def forward(*arguments: Any) -> Any:
        result = original(*arguments)
        seen.append(len(stage.in_flight))
        return result

    stage.forward = forward
    return seen


def activations() -> dict[str, Any]:
    """Tensors that autograd holds for a micro-batch: after its forward, after B, after W."""
    engine, batches = make(2)
    engine.forward_backward(batches(0))  # in its first forward a stage looks at the saved tensors itself
    stage = engine.stages[0]
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()
            alive.add(self)

    stage.begin(batches(0), Mode.TRAIN)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        output = stage.forward(0, 0, None)
    counts = [len(alive)]
    stage.backward_input(0, 0, torch.ones_like(output))
    counts += [len(alive), len(stage.waiting)]
    stage.backward_weight(0, 0)
    counts += [len(stage.waiting), len(stage.in_flight)]

    peaks = {}
    for schedule in ("gpipe", "1f1b"):
        other, _ = make(2, schedule)
        watched = [watch_in_flight(one) for one in other.stages]
        other.forward_backward(batches(0))
        peaks[schedule] = [max(seen) for seen in watched]
        other.close()
    engine.close()
    return {"counts": counts, "peak_in_flight": peaks}


def dropout_bits() -> bool:
    samples = np.array([3, 0, 7, 200_000])
    context = DropoutContext(reference.step_key(5, 11), torch.from_numpy(samples), 3, ElementHashes())
    return all(
        np.array_equal(
            keep_mask(context, site, torch.Size(shape), probability).numpy(),
            reference.keep_mask(context.step_key, site, samples, shape, probability),
        )
        for site in (0, 6, 1021)
        for shape in ((4, 16, 32), (4, 2, 16, 16), (4, 1))
        for probability in (0.1, 0.5, 0.999)
    )


def tied_head() -> dict[str, bool]:
    """Whether both copies stay equal, and equal to those of one stage."""
    results, same = [], []
    for stages in (1, 2):
        engine, batches = make(stages, tied_head=True)
        results.append(train(engine, batches, 3))
        first = engine.stages[0].chunks[0].units[0].token.weight
        last = engine.stages[-1].chunks[-1].units[-1].output.weight
        same.append(first is not last and torch.equal(first, last) and torch.equal(first.grad, last.grad))
        engine.close()
    return {
        "copies_equal": all(same),
        "partition_bitwise": all(np.array_equal(a, b) for a, b in zip(*results, strict=True)),
    }


def ignored_labels() -> float:
    """The worst error over its limit; from five sequences on the last of the mini-batch are not there."""
    found = []
    for m in (1, 4, 8):
        for dtype in ("float32", "float64"):
            run = {"sequence_lengths": "random", "sequences_per_epoch": 5}
            engine, batches = make(2, dtype=dtype, dropout=0.1, train={"micro_batches": m}, run=run)
            batch, oracle = batches(0), oracle_of(engine)
            loss = {"loss": np.array(engine.forward_backward(batch))}
            for one in (batch, batch.first(5)):  # the missing sequences count for nothing
                expected = {"loss": np.array(oracle.forward_backward(one))}
                found.append(worst(loss, expected, "loss", dtype))
                found.append(worst(engine.gradients(), oracle.gradients(), "gradient", dtype))
            engine.close()
    return max(found)


RESUMED: tuple[Any, ...] = ((1, "gpipe", {}), (2, "zb-h1", {"partition": (1,)}), (2, "zb-v", {"chunks": 2}))
"""Stages, schedule and the rest of runs that go on where another one was interrupted."""


def resume() -> dict[str, bool]:
    """Whether 3 steps, then 3 more in a new engine with another cut and schedule, give the bits of 6 steps."""
    found = {}
    for optimizer, momentum in (("adamw", 0.0), ("sgd", 0.9), ("sgd", 0.0)):
        for dtype in ("float32", "float64"):
            options = {"dtype": dtype, "tied_head": True, "dropout": 0.1, "train": {"optimizer": optimizer}}
            options["train"]["momentum"] = momentum
            engine, batches = make(2, **options)
            train(engine, batches, 3)
            weights, state = engine.weights(), engine.optimizer_state()
            expected = [*train(engine, batches, 6, first=3), *engine.optimizer_state().values()]
            engine.close()
            for stages, schedule, run in RESUMED:
                other, _ = make(stages, schedule, run=run, **options)
                other.reset(weights)
                other.load_optimizer_state(state, 3)
                again = [*train(other, batches, 6, first=3), *other.optimizer_state().values()]
                same = all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))
                found[f"{optimizer} {momentum} {dtype} {schedule}"] = same
                other.close()
    return found


def units_alone() -> dict[str, Any]:
    """The worst error over its limit of every unit fed with the oracle's tensors, and what it left behind."""
    found, kept = [], []
    for dtype in ("float32", "float64"):
        for norm, tied in (("pre", True), ("post", False)):
            options = {"norm": norm, "tied_head": tied, "dropout": 0.1}
            engine, batches = make(2, dtype=dtype, run={"sequence_lengths": "random"}, **options)
            batch, oracle = batches(1), oracle_of(engine)
            outputs = oracle.oracle.forward(batch)[1]
            oracle.forward_backward(batch)
            units = unit_names(engine.config.model)
            inputs = {unit: outputs[before] for before, unit in itertools.pairwise(units)}
            engine.forward_backward(batch)
            before = engine.gradients()
            mine = engine.probe_units(batch, inputs, oracle.oracle.output_gradients)
            theirs = oracle.probe_units(batch, inputs, oracle.oracle.output_gradients)
            for phase, check in (("unit_forward", "activation"), ("unit_backward", "gradient")):
                chosen = ({k: v for k, v in side.items() if k.phase == phase} for side in (mine, theirs))
                found.append(worst(*chosen, check, dtype))
            kept.append(len(mine) == len(theirs))
            kept += [np.array_equal(value, before[name]) for name, value in engine.gradients().items()]
            engine.close()
    return {"worst": max(found), "kept": all(kept)}


def predictions() -> float:
    """The worst error over its limit, for several shapes, of the table and of the plain loop."""
    found = []
    for stages, schedule, executor in ((2, "zb-h1", "table"), (1, "gpipe", "plain")):
        engine, batches = make(stages, schedule, dtype="float64", dropout=0.1, run={"executor": executor})
        oracle, inputs = oracle_of(engine), batches(0).inputs
        for rows, columns in ((4, 16), (8, 3)):
            tokens = inputs[:rows, :columns]
            logits = ({"logits": one.predict(tokens)} for one in (engine, oracle))
            found.append(worst(*logits, "activation", "float64"))
        engine.close()
    return max(found)


RECOMPUTED: tuple[Any, ...] = (
    (1, "gpipe", {}),
    (2, "1f1b", {"partition": (1,)}),  # the embedding alone on a stage
    (4, "zb-h1", {}),
    (2, "interleaved", {"chunks": 2}),
    (2, "zb-v", {"chunks": 2}),
)


def recomputation() -> dict[str, Any]:
    """Whether every kind gives the bits of none for every schedule, and what 1f1b then holds."""
    same, held = {}, {}
    for dropout in (0.0, 0.1):
        engine, batches = make(1, dropout=dropout, tied_head=True)
        expected = train(engine, batches, 2)
        engine.close()
        for kind in ("full", "except-last", "every-1", "every-2"):
            for stages, schedule, run in RECOMPUTED:
                run = run | {"recompute": kind}
                engine, batches = make(stages, schedule, dropout=dropout, tied_head=True, run=run)
                found = train(engine, batches, 2)
                equal = all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
                same[f"{kind} {schedule} {dropout}"] = equal
                engine.close()
    for kind in ("none", "full", "except-last", "every-1"):
        engine, batches = make(2, run={"recompute": kind})
        engine.forward_backward(batches(0))
        held[kind] = engine.held_bytes_peak()
        engine.close()
    return {"same": same, "held": held, "activation_bytes": 2 * 16 * 32 * 4}


def native_dropout() -> dict[str, Any]:
    """PyTorch's own masks: a rerun, another schedule, and a recomputation draw the same; evaluation draws none."""
    runs, losses = [], []
    for stages, schedule, kind in (
        (1, "gpipe", "none"),
        (2, "1f1b", "none"),
        (2, "zb-h1", "full"),
        (2, "gpipe", "every-1"),
    ):
        engine, batches = make(stages, schedule, dropout=0.5, dropout_masks="native", run={"recompute": kind})
        runs.append(train(engine, batches, 2))
        losses.append([engine.evaluate(batches(0)), engine.evaluate(batches(0))])
        engine.close()
    generator = torch.Generator()
    context = DropoutContext(reference.step_key(0, 0), torch.arange(8), 0, ElementHashes(), generator)
    kept = native_mask(context, 0, torch.Size((8, 100, 100)), 0.3)
    other = native_mask(context, 1, torch.Size((8, 100, 100)), 0.3)
    shared, batches = make(1, "gpipe", dropout=0.5)
    differs = shared.forward_backward(batches(0)) != float(runs[0][0][0])
    shared.close()
    return {
        "same": all(np.array_equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True)),
        "evaluations": len({loss for pair in losses for loss in pair}),
        "kept": kept.mean().item(),
        "sites_differ": not torch.equal(kept, other),
        "differs_from_shared": differs,
    }


def habits() -> dict[str, Any]:
    """By habit: where the parity ladder fails first; and the baselines of all of them, which must not."""
    rows = [row for row in DRIFTS if "torch" in row.frameworks and row.run.get("device") != "cuda"]
    configs = [config_of(row, "torch", 20, on) for row in rows for on in (False, True)]
    first = {}
    with tempfile.TemporaryDirectory() as home:
        jobs = [
            Job(config=c, out=f"{home}/{i}", kind="probe", noise=NOISE) for i, c in enumerate(dict.fromkeys(configs))
        ]
        for job in jobs:
            Path(job.out).mkdir()
        status = run_jobs(JobFile(jobs=tuple(jobs)), build_engine, switch=switch)
        runs = {job.config: read_probe(Path(job.out), same_copies=job.config.drift is None) for job in jobs}
        for row in rows:
            baseline, drifted = (config_of(row, "torch", 20, on) for on in (False, True))
            found = first_failure(baseline, runs[drifted])
            as_expected = found and found.check == row.check and fnmatch.fnmatchcase(place_of(found), row.place)
            first[row.name] = "as expected" if as_expected else str(found)
            before = first_failure(baseline, runs[baseline])
            if before is not None:
                first[f"{row.name}, baseline"] = str(before)
    messages = []
    for changes in ({"drift": "onednn"}, {"drift": "clip-epsilon", "executor": "native"}):
        try:
            with switch(RunConfig(**changes)):
                pass
        except ValueError as error:
            messages.append(str(error))
    return {"status": status, "first": first, "habits": list(HABITS), "messages": messages}


def mixed_precision() -> dict[str, Any]:
    """bfloat16 against the oracle, against itself under other schedules, and what is float32."""
    options = {"dtype": "bfloat16", "dropout": 0.1, "tied_head": True}
    engine, batches = make(1, "gpipe", **options)
    oracle = oracle_of(engine)
    loss, right = engine.forward_backward(batches(0)), oracle.forward_backward(batches(0))
    expected = oracle.gradients()
    errors = [
        float(np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name]))
        for name, value in engine.gradients().items()
    ]
    first = train(engine, batches, 3)
    state = engine.optimizer_state()
    arrays = [*engine.weights().values(), *engine.gradients().values(), *state.values()]
    arrays += [*engine.unit_outputs(batches(0)).values(), engine.predict(batches(0).inputs)]
    masters = engine.stages[0].named
    engine.close()
    same = {}
    for stages, schedule, run in (*RECOMPUTED, (2, "zb-h1", {"recompute": "full"})):
        other, _ = make(stages, schedule, run=run, **options)
        again = train(other, batches, 3)
        same[f"{schedule} {run}"] = all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        layer = other.stages[0].chunks[0].units[0].token
        computes = layer.weight.dtype is torch.bfloat16 and layer.weight.grad.dtype is torch.float32
        other.close()
    message = ""
    try:
        build_engine(configuration(1, dtype="bfloat16", run={"executor": "plain"}))
    except ValueError as error:
        message = str(error)
    return {
        "loss": abs(loss - right) / right,
        "worst_gradient": max(errors),
        "float32": all(array.dtype == np.float32 for array in arrays),
        "computes_in_bfloat16": computes,
        "masters_are_finer": any(
            not torch.equal(item.parameter, item.parameter.bfloat16().float()) for item in masters
        ),
        "same": same,
        "message": message,
    }


def rounding() -> dict[str, Any]:
    """Whether errors of bfloat16 have a sign: of a block's output and gradients, the part that shrinks or stretches them.

    In roundoffs, by the same block in float64 with the same weights.
    """
    torch.manual_seed(0)
    spec = TransformerSpec(context_length=16, d_model=32, num_heads=4, d_ff=64, dropout=0.1)
    context = DropoutContext(5, torch.arange(64), 0, ElementHashes())
    low = build_unit(spec, "block.0").bfloat16()
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() == 2 else 1.0))
    high = copy.deepcopy(low).double()
    x, dy = (torch.randn(64, 16, 32).bfloat16() for _ in range(2))

    def run(block: torch.nn.Module, dtype: torch.dtype) -> list[Any]:
        start = x.to(dtype).requires_grad_()
        y = block(start, context)
        return [y, *torch.autograd.grad(y, [start, *block.parameters()], dy.to(dtype))]

    names = ["output", "input", *(name for name, _ in low.named_parameters())]
    runs = zip(names, run(low, torch.bfloat16), run(high, torch.float64), strict=True)
    return {name: stretch(found.detach(), right.detach()) for name, found, right in runs}


def stretch(low: torch.Tensor, high: torch.Tensor) -> float:
    """The factor 1 + s by which `low` is `high` at best, as s in roundoffs of bfloat16."""
    return float(((low.double() - high) * high).sum() / (high**2).sum() * 2**8)


def failure() -> dict[str, Any]:
    """The head fails, after its stage's block, while the other stages wait; then the engine is used again."""
    engine, batches = make(4, num_layers=4)
    expected = engine.forward_backward(batches(0))
    head = engine.stages[-1].chunks[-1].units[-1]

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("injected")

    head.forward, original = fail, head.forward
    began = time.perf_counter()
    message, cause = "", ""
    try:
        engine.forward_backward(batches(0))
    except StageFailure as error:
        message, cause = str(error), type(error.__cause__).__name__
    seconds = time.perf_counter() - began
    head.forward = original
    again = engine.forward_backward(batches(0))
    engine.close()
    return {"message": message, "cause": cause, "seconds": seconds, "again": again == expected}


def settings() -> dict[str, Any]:
    message = ""
    if not torch.cuda.is_available():
        try:
            devices.configure(2, None, "cuda")
        except ValueError as error:
            message = str(error)
    found = {}
    for threads in (2, 4):
        engine, batches = make(2, threads=threads)
        found[threads] = engine.environment()["threads_per_stage"]
        engine.close()
    engine, batches = make(2, "gpipe")
    engine.forward_backward(batches(0))
    events = {d: [str(event.action) for event in done] for d, done in engine.events().items()}
    rows = {d: [str(action) for action in row] for d, row in enumerate(engine.schedule.devices)}
    peak = engine.peak_memory_bytes()
    engine.close()
    return {
        "cuda": torch.cuda.is_available(),
        "no_cuda_message": message,
        "threads_per_stage": found,
        "events_are_schedule": events == rows,
        "peak_devices": list(peak),
        "peak_over_status": peak[0] / _resident_bytes(),
    }


def _resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    devices.configure(4, 4, "cpu")
    checks = (
        split_backward,
        against_plain_autograd,
        activations,
        dropout_bits,
        tied_head,
        ignored_labels,
        resume,
        units_alone,
        predictions,
        recomputation,
        native_dropout,
        habits,
        mixed_precision,
        rounding,
        failure,
        settings,
    )
    chosen = sys.argv[1:] or [check.__name__ for check in checks]
    print(json.dumps({check.__name__: check() for check in checks if check.__name__ in chosen}))
