"""What `tests/test_tf_impl.py` looks at, computed with TensorFlow in a process of its own. Prints one JSON object."""

# ruff: noqa: E402 (the environment is set before TensorFlow is imported)

from __future__ import annotations

import fnmatch
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tf_impl import devices

devices.configure(stages=3, threads=3, device="cpu")

import keras
import numpy as np
import tensorflow as tf

from common.data import load_corpus
from common.drift import DRIFTS
from common.dropout import keep_mask as numpy_keep_mask
from common.parity import TensorKey, compare
from common.probes import read_probe
from common.runtime.job import Job, JobFile
from common.runtime.oracle_worker import OracleEngine
from common.runtime.training import starting_weights
from common.runtime.worker import run_jobs
from common.schedule.action import Action, Op
from common.spec import PRESETS, RunConfig, TrainSpec, TransformerSpec, preset
from common.weights import initial_weights, unit_names
from common.zoo import NOISE, PROCESS_WIDE, config_of, first_failure, place_of
from tf_impl.cut import Scissors, trace_stage
from tf_impl.drift import HABITS, switch
from tf_impl.dropout import DropoutContext, keep_mask, native_dropout
from tf_impl.effects import REPEATED
from tf_impl.engine import build_engine
from tf_impl.gpipe_model import GPipeModel
from tf_impl.layers import build_unit
from tf_impl.precision import products_are_rounded

SAMPLES, FEATURES, CLASSES = 48, 6, 5


def layers() -> list[keras.layers.Layer]:
    """Sizes that differ, and one layer without weights."""
    return [
        keras.layers.Dense(16, activation="relu"),
        keras.layers.Dense(12),
        keras.layers.Activation("tanh"),
        keras.layers.LayerNormalization(),
        keras.layers.Dense(CLASSES),
    ]


def data(batch: int) -> tf.data.Dataset:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((SAMPLES, FEATURES)).astype(np.float32)
    y = generator.integers(0, CLASSES, SAMPLES)
    weight = generator.uniform(0.5, 2.0, SAMPLES).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(batch)


def compiled(model: keras.Model) -> keras.Model:
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.9)
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.1, global_clipnorm=0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def as_keras_user(schedule: str) -> dict[str, Any]:
    """The pipeline against `keras.Sequential` with the same layers and the same start."""
    plain = compiled(keras.Sequential([keras.Input((FEATURES,)), *layers()]))
    model = compiled(GPipeModel(layers(), num_stages=3, num_micro_batches=4, schedule=schedule))
    model.build((None, FEATURES))
    model.set_weights(plain.get_weights())
    seen: list[int] = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))
    options: dict[str, Any] = {
        "epochs": 3,
        "verbose": 0,
        "validation_data": data(20),
    }  # 20 does not divide 48, nor 4 20
    history = model.fit(data(16), callbacks=[callback], **options).history
    expected = plain.fit(data(16), **options).history
    scores = model.evaluate(data(20), verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.weights.h5")
        model.save_weights(path)
        other = GPipeModel(layers(), num_stages=2, num_micro_batches=1)
        other.build((None, FEATURES))
        other.load_weights(path)
    prediction, again = model.predict(data(20), verbose=0), other.predict(data(20), verbose=0)
    return {
        "history": {
            name: max(abs(a - b) for a, b in zip(history[name], expected[name], strict=True)) for name in expected
        },
        "falls": history["loss"][-1] < history["loss"][0],
        "epochs": seen,
        "weights": max(
            float(np.abs(a - b).max()) for a, b in zip(model.get_weights(), plain.get_weights(), strict=True)
        ),
        "evaluate": max(abs(a - b) for a, b in zip(scores, plain.evaluate(data(20), verbose=0), strict=True)),
        "predict": float(np.abs(prediction - plain.predict(data(20), verbose=0)).max()),
        "reloaded": bool(np.array_equal(prediction, again)),
        "devices": [chunk.variables[0].value.device[-5:] for chunk in model.chunks],
    }


def config(**changes: Any) -> RunConfig:
    base = preset("tiny").model_dump()
    base["model"] |= {"dropout": 0.1, "tied_head": True}
    return RunConfig(**(base | {"framework": "tensorflow", "device": "cpu"} | changes))


def cut_in_two() -> dict[str, Any]:
    """Merged and split backward of the same step, and which operations the two halves repeat."""
    gradients = []
    for split in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "table.txt"
            backward = "B{0} W{0}" if split else "BW{0}"
            line = " ".join(f"F{i} {backward.format(i)}" for i in range(4))
            table.write_text(f"# schedule: one micro_batches=4\n0: {line}\n1: {line}\n")
            engine = build_engine(config(stages=2, schedule=f"file:{table}"))
        run = engine.config
        engine.reset(initial_weights(run.model, 0, "float32"))
        tokens = np.random.default_rng(0).integers(0, 256, (8, 16))
        engine.model.forward_backward(tokens, np.roll(tokens, -1, 1), step=3)
        gradients.append(engine.gradients())
    merged, split_up = gradients
    return {
        "equal": all(np.array_equal(merged[name], split_up[name]) for name in merged),
        "nonzero": all(np.any(value) for value in merged.values()),
        "repeated": sorted(repeated_operations()),
    }


def repeated_operations() -> set[str]:
    """Operations that depend on data and are in more than one of F, B and W."""
    dense = [keras.layers.Dense(8, activation="gelu"), keras.layers.LayerNormalization(), keras.layers.Dense(3)]
    for layer, width in zip(dense, (5, 8, 8), strict=True):
        layer.build((None, width))
    variables = [variable.value for layer in dense for variable in layer.trainable_variables]
    sums = [tf.Variable(tf.zeros_like(variable)) for variable in variables]

    def rest(h: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        return dense[2](dense[1](h)), {}

    trace, _ = trace_stage(dense[0], [rest], variables, sums, [tf.TensorSpec((4, 5))], False)
    scissors = Scissors(trace)
    parts = []
    dy, f, b = trace.output_gradient, scissors.forward, scissors.backward_input
    w = scissors.backward_weight
    saved = scissors.crossing(b - {dy[0].op}, f, [])
    for_weight = [*scissors.crossing(w, f, trace.weight_gradients), *scissors.crossing(w, b, trace.weight_gradients)]
    handed_on = scissors.crossing(w, b, trace.weight_gradients)
    for arguments, results in (
        (trace.inputs, [trace.output, *saved]),
        ([*dy, *saved], handed_on),
        (for_weight, trace.weight_gradients),
    ):
        graph = scissors.function(arguments, results).graph
        parts.append({op.name for op in graph.get_operations() if op.type != "Placeholder"})
    dependent = {op.name for op in scissors.dependent if op.type not in REPEATED}
    return {name for i, part in enumerate(parts) for other in parts[i + 1 :] for name in part & other & dependent}


def dropout_bits() -> bool:
    samples, shape = np.array([5, 0, 7]), (3, 4, 33)
    context = DropoutContext(tf.constant(0x9ABCDEF0, tf.int64), tf.constant(samples))
    observed = keep_mask(context, 6, tf.TensorShape(shape), 0.1).numpy()
    return bool(np.array_equal(observed, numpy_keep_mask(0x9ABCDEF0, 6, samples, shape, 0.1)))


def seed_elsewhere() -> dict[str, Any]:
    """A Keras Dropout on the second device: its seed lies on the first one. Also whether the engine's stages are alone."""
    model = GPipeModel(
        [keras.layers.Dense(8), keras.layers.Dropout(0.5), keras.layers.Dense(CLASSES)], 2, 2, partition=[1]
    )
    x, y = np.ones((4, FEATURES), np.float32), np.zeros(4, np.int64)
    losses = [compiled(model).forward_backward(x, y) for _ in range(2)]
    engine = build_engine(config(stages=2))
    tokens = np.zeros((8, 16), np.int64)
    engine.model.forward_backward(tokens, tokens)
    return {
        "losses_differ": losses[0] != losses[1],
        "own_device": [[chunk.only_own_device for chunk in m.chunks] for m in (model, engine.model)],
    }


def configuration(
    stages: int,
    schedule: str = "1f1b",
    dtype: str = "float32",
    train: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    **model: Any,
) -> RunConfig:
    """A small run with one thread per stage."""
    return RunConfig(
        framework="tensorflow",
        stages=stages,
        schedule=schedule,
        device="cpu",
        model=TransformerSpec(**PRESETS["tiny"]["model"] | model),
        train=TrainSpec(**PRESETS["tiny"]["train"] | (train or {}), dtype=dtype),
        **run or {},
    )


def make(*arguments: Any, **options: Any) -> Any:
    """A small engine with its weights, and a function from a step to its mini-batch."""
    one = configuration(*arguments, **options)
    engine = build_engine(one)
    engine.reset(starting_weights(Job(config=one, out="", noise=0.1)))
    corpus = load_corpus(one)
    return engine, lambda step: corpus.training_batch(one, step)


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


def train(engine: Any, batches: Any, steps: int, first: int = 0) -> list[Any]:
    """Losses, then the last gradients and weights."""
    losses = []
    for step in range(first, steps):
        losses.append(engine.forward_backward(batches(step)))
        gradients = engine.gradients()
        engine.apply_gradients(step)
    return [np.array(losses), *gradients.values(), *engine.weights().values()]


def same_bits(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def ignored_labels() -> float:
    """The worst error over its limit; from five sequences on the last of the mini-batch are not there."""
    found = []
    for m in (1, 4, 8):
        for dtype in ("float32", "float64"):
            run = {"sequence_lengths": "random", "sequences_per_epoch": 5}
            engine, batches = make(2, dtype=dtype, dropout=0.1, train={"micro_batches": m}, run=run)
            batch, oracle = batches(0), oracle_of(engine)
            loss = {"loss": np.array(engine.forward_backward(batch))}
            evaluated = {"loss": np.array(engine.evaluate(batch))}
            for one in (batch, batch.first(5)):  # the missing sequences count for nothing
                expected = {"loss": np.array(oracle.forward_backward(one))}
                found.append(worst(loss, expected, "loss", dtype))
                found.append(worst(engine.gradients(), oracle.gradients(), "gradient", dtype))
                found.append(worst(evaluated, {"loss": np.array(oracle.evaluate(one))}, "loss", dtype))
            engine.close()
    run = {"sequence_lengths": "random", "executor": "plain"}
    engine, batches = make(1, run=run)
    expected = {"loss": np.array(oracle_of(engine).forward_backward(batches(0)))}
    return max(*found, worst({"loss": np.array(engine.forward_backward(batches(0)))}, expected, "loss", "float32"))


RESUMED: tuple[Any, ...] = ((1, "gpipe", {}), (2, "zb-h1", {"partition": (1,)}), (2, "zb-v", {"chunks": 2}))
"""Stages, schedule and the rest of runs that go on where another one was interrupted."""


def resume() -> dict[str, bool]:
    """Whether 3 steps, then 3 more in a new engine with another cut and schedule, give the bits of 6 steps."""
    found = {}
    for optimizer, momentum in (("adamw", 0.0), ("sgd", 0.9)):
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
                found[f"{optimizer} {momentum} {dtype} {schedule}"] = same_bits(expected, again)
                other.close()
    return found


def no_weight_decay() -> float:
    """The worst error over its limit after three steps of AdamW with weight decay 0."""
    engine, batches = make(1, "gpipe", dtype="float64", train={"weight_decay": 0.0})
    oracle = oracle_of(engine)
    train(engine, batches, 3)
    for step in range(3):
        oracle.forward_backward(batches(step))
        oracle.apply_gradients(step)
    return worst(engine.weights(), oracle.weights(), "trained_parameter", "float64")


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


def predictions() -> dict[str, Any]:
    """The worst error over its limit, for several shapes, of the table and of `fit`; and traces for shapes seen before."""
    found, traces = [], []
    for stages, schedule, executor in ((2, "zb-h1", "table"), (1, "gpipe", "plain")):
        engine, batches = make(stages, schedule, dtype="float64", dropout=0.1, run={"executor": executor})
        oracle, inputs = oracle_of(engine), batches(0).inputs
        for rows, columns in ((4, 16), (8, 3), (4, 16)):
            tokens = inputs[:rows, :columns]
            logits = ({"logits": one.predict(tokens)} for one in (engine, oracle))
            found.append(worst(*logits, "activation", "float64"))
        if executor == "table":
            traces = [chunk.evaluate.experimental_get_tracing_count() for chunk in engine.model.chunks]
        engine.close()
    return {"worst": max(found), "traces": traces}


RECOMPUTED: tuple[Any, ...] = (
    (1, "gpipe", {}),
    (2, "1f1b", {"partition": (1,)}),  # the embedding alone on a stage
    (3, "zb-h1", {}),
    (2, "interleaved", {"chunks": 2}),
    (2, "zb-v", {"chunks": 2}),
)


def recomputation() -> dict[str, Any]:
    """Whether every kind gives the bits of none for every schedule, and what 1f1b then holds."""
    same, held = {}, {}
    # Every engine traces and cuts anew, so not every kind runs with every schedule here; the ladder has more.
    kinds = {"full": RECOMPUTED, "every-1": RECOMPUTED[1:3], "except-last": RECOMPUTED[1:2], "every-2": RECOMPUTED[:1]}
    for masks, chosen in (("shared", kinds), ("native", {"full": RECOMPUTED[2:3]})):
        options = {"dropout": 0.1, "dropout_masks": masks, "tied_head": True}
        engine, batches = make(1, **options)
        expected = train(engine, batches, 2)
        engine.close()
        for kind, cases in chosen.items():
            for stages, schedule, run in cases:
                engine, batches = make(stages, schedule, run=run | {"recompute": kind}, **options)
                same[f"{kind} {schedule} {masks}"] = same_bits(expected, train(engine, batches, 2))
                engine.close()
    for kind in ("none", "full", "except-last", "every-1"):
        engine, batches = make(2, run={"recompute": kind})
        engine.forward_backward(batches(0))
        held[kind] = engine.held_bytes_peak()
        engine.close()
    return {"same": same, "held": held, "activation_bytes": 2 * 16 * 32 * 4}


def native() -> dict[str, Any]:
    """TensorFlow's own dropout: the same bits for every run, cut and schedule; other ones at every site and step."""
    runs, evaluations = [], set()
    for stages, schedule in ((1, "gpipe"), (1, "gpipe"), (2, "zb-h1")):
        engine, batches = make(stages, schedule, dropout=0.5, dropout_masks="native")
        runs.append(train(engine, batches, 2))
        evaluations |= {engine.evaluate(batches(0)), engine.evaluate(batches(0))}
        engine.close()
    ones = tf.ones((8, 100, 100))
    context = DropoutContext(tf.constant(5, tf.int64), tf.range(8, dtype=tf.int64))
    masks = [native_dropout(ones, 0.3, 0, context), native_dropout(ones, 0.3, 1, context)]
    masks.append(native_dropout(ones, 0.3, 0, context._replace(step_key=tf.constant(6, tf.int64))))
    masks.append(native_dropout(ones, 0.3, 0, context._replace(samples=context.samples + 8)))
    arrays = [mask.numpy() for mask in masks]
    shared, batches = make(1, "gpipe", dropout=0.5)
    return {
        "same": all(same_bits(run, runs[0]) for run in runs),
        "evaluations": len(evaluations),
        "kept": float((arrays[0] > 0).mean()),
        "mean": float(arrays[0].mean()),
        "rarely": float((native_dropout(tf.cast(ones, tf.bfloat16), 0.01, 0, context).numpy() == 0).mean()),
        "masks": len({array.tobytes() for array in arrays}),
        "differs_from_shared": shared.forward_backward(batches(0)) != float(runs[0][0][0]),
    }


def habits() -> dict[str, Any]:
    """By habit: where the parity ladder fails first; and the baselines of all of them, which must not."""
    rows = [row for row in DRIFTS if "tensorflow" in row.frameworks and row.run.get("device") != "cuda"]
    rows = [row for row in rows if row.name not in PROCESS_WIDE]
    configs = [config_of(row, "tensorflow", 20, on) for row in rows for on in (False, True)]
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
            baseline, drifted = (config_of(row, "tensorflow", 20, on) for on in (False, True))
            found = first_failure(baseline, runs[drifted])
            as_expected = found and found.check == row.check and fnmatch.fnmatchcase(place_of(found), row.place)
            first[row.name] = "as expected" if as_expected else str(found)
            before = first_failure(baseline, runs[baseline])
            if before is not None:
                first[f"{row.name}, baseline"] = str(before)

    def enter(**changes: Any) -> Callable[[], None]:
        def work() -> None:
            with switch(config(**changes)):
                pass

        return work

    wrong = ({"drift": "coupled-decay"}, {"drift": "tanh-gelu", "executor": "plain", "stages": 1}, {"drift": "onednn"})
    messages = [message(enter(**changes)) for changes in wrong]
    return {"status": status, "first": first, "habits": list(HABITS), "messages": messages}


def mixed_precision() -> dict[str, Any]:
    """bfloat16 against the oracle, against itself under other schedules, and what is float32."""
    options: dict[str, Any] = {"dtype": "bfloat16", "dropout": 0.1, "tied_head": True}
    engine, batches = make(1, "gpipe", **options)
    oracle = oracle_of(engine)
    loss, right = engine.forward_backward(batches(0)), oracle.forward_backward(batches(0))
    expected = oracle.gradients()
    errors = [
        float(np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name]))
        for name, value in engine.gradients().items()
    ]
    first = train(engine, batches, 3)
    weights, state = engine.weights(), engine.optimizer_state()
    arrays = [*weights.values(), *engine.gradients().values(), *state.values()]
    arrays += [*engine.unit_outputs(batches(0)).values(), engine.predict(batches(0).inputs)]
    chunk = engine.model.chunks[0]
    pairs = [(own.numpy(), master.numpy()) for own, master in zip(chunk.variables, chunk.masters, strict=True)]
    further = train(engine, batches, 5, first=3)
    same = {}
    for stages, schedule, run in (*RECOMPUTED, (2, "zb-h1", {"recompute": "full"})):
        other, _ = make(stages, schedule, run=run, **options)
        same[f"{schedule} {run}"] = same_bits(first, train(other, batches, 3))
        other.reset(weights)
        other.load_optimizer_state(state, 3)
        same[f"{schedule} {run} resumed"] = same_bits(further, train(other, batches, 5, first=3))
        other.close()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.weights.h5")
        engine.model.save_weights(path)
        other, _ = make(1, "gpipe", **options)
        other.model.load_weights(path)
    return {
        "loss": abs(loss - right) / right,
        "worst_gradient": max(errors),
        "float32": all(array.dtype == np.float32 for array in arrays),
        "computes_in_bfloat16": all(own.dtype.name == "bfloat16" for own, _ in pairs),
        "copies_are_rounded_masters": all(np.array_equal(own, master.astype(own.dtype)) for own, master in pairs),
        "masters_are_finer": any(not np.array_equal(own.astype(np.float32), master) for own, master in pairs),
        "same": same,
        "reloaded": bool(np.array_equal(engine.predict(batches(0).inputs), other.predict(batches(0).inputs))),
        "message": message(lambda: build_engine(configuration(1, dtype="bfloat16", run={"executor": "plain"}))),
    }


def rounding() -> dict[str, Any]:
    """Whether errors of bfloat16 have a sign: of a block's output and gradients, the part that shrinks or stretches them.

    In roundoffs, by the same block in float64 with the same weights. And the same of TensorFlow's own product.
    """
    generator = np.random.default_rng(0)

    def numbers(*shape: int) -> tf.Tensor:
        return tf.cast(tf.constant(generator.standard_normal(shape)), tf.bfloat16)

    spec = TransformerSpec(context_length=16, d_model=32, num_heads=4, d_ff=64, dropout=0.1)
    x, dy = numbers(64, 16, 32), numbers(64, 16, 32)
    context = DropoutContext(tf.constant(5, tf.int64), tf.range(64, dtype=tf.int64))
    blocks = {dtype: build_unit(spec, "block.0", dtype) for dtype in ("bfloat16", "float64")}
    for block in blocks.values():
        block.build(x.shape)
    pairs = list(zip(*(block.trainable_variables for block in blocks.values()), strict=True))
    for low, high in pairs:
        low.assign(numbers(*low.shape) * (0.2 if len(low.shape) == 2 else 1.0))
        high.assign(tf.cast(low, tf.float64))

    def run(dtype: str) -> list[tf.Tensor]:
        start, variables = tf.cast(x, dtype), [v.value for v in blocks[dtype].trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(start)
            y = blocks[dtype](start, context=context)
        return [y, *tape.gradient(y, [start, *variables], tf.cast(dy, dtype))]

    names = ["output", "input", *(low.path for low, _ in pairs)]
    ours = {name: stretch(*each) for name, *each in zip(names, run("bfloat16"), run("float64"), strict=True)}
    a, b = numbers(64, 32), numbers(32, 48)
    own = stretch(tf.matmul(a, b), tf.matmul(tf.cast(a, tf.float64), tf.cast(b, tf.float64)))
    return {"ours": ours, "own": own, "own_is_rounded": products_are_rounded()}


def stretch(low: tf.Tensor, high: tf.Tensor) -> float:
    """The factor 1 + s by which `low` is `high` at best, as s in roundoffs of bfloat16."""
    found, right = (tf.cast(t, tf.float64).numpy() for t in (low, high))
    return float(((found - right) * right).sum() / (right**2).sum() * 2**8)


def message(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors() -> dict[str, str]:
    x, y = np.zeros((10, FEATURES), np.float32), np.zeros(10, np.int64)
    model = GPipeModel(layers(), 2, 4)
    built = layers()
    built[1].build((None, 16))
    found = {
        "compile": message(lambda: model.forward_backward(x, y)),
        "divide": message(lambda: compiled(model).forward_backward(x[:3], y[:3])),
        "stages": message(lambda: GPipeModel(layers(), 6, 4)),
        "devices": message(lambda: GPipeModel(layers(), 4, 4)),
        "built": message(lambda: GPipeModel(built, 2, 4)),
        "partition": message(lambda: GPipeModel(layers(), 3, 4, partition=[3, 3])),
        "cuda": message(lambda: devices.stage_devices(1, "cuda")),
        "native": message(lambda: build_engine(config(executor="native"))),
        "spec": message(lambda: GPipeModel(TransformerSpec(num_layers=1), 4, 4)),
    }
    failing = compiled(GPipeModel(layers(), 3, 2, schedule="1f1b"))

    def fail(device: int, action: Action | None) -> None:
        if action == Action(Op.BW, 1):
            raise MemoryError("no memory left")

    failing.on_action = fail
    found["stage"] = message(lambda: failing.forward_backward(x, y))
    failing.on_action = lambda device, action: None
    found["after"] = message(lambda: failing.forward_backward(x, y))
    return found


def main() -> None:
    checks: dict[str, Callable[[], Any]] = {
        "gpipe": lambda: as_keras_user("gpipe"),
        "1f1b": lambda: as_keras_user("1f1b"),
        "cut": cut_in_two,
        "dropout": dropout_bits,
        "seed": seed_elsewhere,
        "errors": errors,
        "ignored_labels": ignored_labels,
        "resume": resume,
        "no_weight_decay": no_weight_decay,
        "units_alone": units_alone,
        "predictions": predictions,
        "recomputation": recomputation,
        "native": native,
        "habits": habits,
        "mixed_precision": mixed_precision,
        "rounding": rounding,
        "environment": devices.environment,
    }
    chosen = sys.argv[1:] or list(checks)
    print(json.dumps({name: checks[name]() for name in chosen}))


if __name__ == "__main__":
    main()
