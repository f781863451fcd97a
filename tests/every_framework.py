"""What is tested alike in every framework: `test_shared.py` in each framework's folder imports it.

Imports no framework. The fixtures are the folder's own: `framework` is its name, `make` builds its
engines, `loss` and `logits` are what its layers compute.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common import checkpoint
from common.checkpoint.foreign.converter import main
from common.checkpoint.foreign.errors import ExchangeError
from common.harness.launch import IMPLEMENTATIONS
from common.harness.zoo import PROCESS_WIDE, run_zoo
from common.oracle.limits import LIMITS, difference
from common.report.zoo import GOOD
from common.runtime.kernels import kernels
from common.runtime.oracle_worker import OracleEngine
from common.spec.data import IGNORED, load_corpus
from common.spec.habits import DRIFTS, by_name
from common.spec.parameters import TensorKey, random_arrays
from common.spec.rules import has_cuda
from common.spec.run import FRAMEWORKS, RunConfig, TrainSpec, TransformerSpec, preset
from tests.campaigns.batch_norm import run_config
from tests.campaigns.batch_norm_model import Kind, gradient_differences, oracle_difference, train
from tests.engines import (
    Make,
    check_held_bytes,
    check_short_batch,
    check_units_alone,
    habits_here,
)

Array = NDArray[np.floating]
Loss = Callable[[Array, NDArray[np.int64]], tuple[float, Array]]
Logits = Callable[[TransformerSpec, Path, Any], Any]

every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def of(framework: str, module: str) -> Any:
    """A module of the framework's implementation."""
    return import_module(f"{IMPLEMENTATIONS[framework].module}.{module}")


def test_no_other_framework_is_in_this_process(framework: str) -> None:
    """Two frameworks in one process crash it."""
    assert {name for name in FRAMEWORKS if name in sys.modules} == {framework}


# ------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize(
    ("dtype", "micro_batches"), [("float32", 1), ("float64", 3), ("float32", 8)]
)
def test_ignored_labels_and_missing_sequences_count_for_nothing(
    make: Make, dtype: str, micro_batches: int
) -> None:
    check_short_batch(make, dtype, micro_batches)


@pytest.mark.parametrize(
    ("dtype", "norm", "tied_head"), [("float32", "pre", True), ("float64", "post", False)]
)
def test_units_alone_are_the_oracles_and_leave_the_engine_as_it_was(
    make: Make, dtype: str, norm: str, tied_head: bool
) -> None:
    check_units_alone(make, dtype, norm, tied_head)


def test_every_device_holds_what_was_predicted(make: Make, framework: str) -> None:
    # Paddle has no bfloat16 on the CPU.
    check_held_bytes(make, **({"dtype": "float32"} if framework == "paddle" else {}))


_RANDOM = np.random.default_rng(0)
EXTREME_LOGITS: dict[str, Array] = {
    "a hundred above the target": np.array([0.0, 100.0, 1.0, 1.0]),
    "at the clip": np.array([0.0, 64.0, 0.0, 0.0]),
    "spread over 700": np.linspace(0, 700, 16),
    "ten thousand": _RANDOM.choice([-1e4, 1e4], 16) + _RANDOM.standard_normal(16),
    "target far above": np.array([500.0, 0.0, -300.0, 2.0]),
    "all equal": np.full(8, 3.7),
    "all equal and large": np.full(8, -1e4),
    "denormal": np.linspace(0, 1e-39, 8),
}
"""One row each, whose target is the first: kernels clip, round or overflow there."""


@every_dtype
@pytest.mark.parametrize("name", EXTREME_LOGITS)
def test_the_loss_of_extreme_logits_is_right(loss: Loss, name: str, dtype: str) -> None:
    """`loss` takes (B, S, V) and (B, S) and gives a sum over 3 tokens and its gradient."""
    row = EXTREME_LOGITS[name].astype(dtype)
    logits = np.stack([row, row[::-1], np.zeros_like(row), row])[None]  # (1, 4, V)
    targets = np.array([[0, 1, 2, IGNORED]])
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    one_hot = np.eye(row.size)[np.maximum(targets, 0)]
    counts = (targets != IGNORED)[..., None]
    each = np.log(np.exp(shifted).sum(-1)) - (shifted * one_hot).sum(-1)
    expected = (each * counts[..., 0]).sum() / 3
    gradient = (probabilities - one_hot) * counts / 3
    found, of_logits = loss(logits, targets)
    key = TensorKey(0, "forward", 0, 0, "head", "loss")
    for check, observed, right in (("loss", found, expected), ("gradient", of_logits, gradient)):
        one = difference(key, check, np.asarray(observed), np.asarray(right), LIMITS[check][dtype])  # type: ignore[index]
        assert one.relative <= one.limit, one


def test_micro_batches_change_batch_norm_and_not_layer_norm(framework: str) -> None:
    """What docs/batch-norm.md says, at one mini-batch."""
    ops = import_module(f"tests.{framework}.plain").Ops()
    config = run_config(steps=2)
    corpus = load_corpus(config)
    batch = corpus.training_batch(config, 0)
    assert oracle_difference(ops, config, batch) < 1e-12
    assert max(gradient_differences(ops, config, "layer norm", (3, 8), batch)) < 1e-12
    kinds: tuple[Kind, Kind] = ("batch norm", "deferred batch norm")
    plain, deferred = (gradient_differences(ops, config, kind, (2, 8), batch) for kind in kinds)
    assert 0.01 < plain[0] < plain[1] < 1 and plain == deferred
    plain_run, deferred_run = (train(ops, config, kind, 8, corpus) for kind in kinds)
    assert plain_run[0] == deferred_run[0]  # the training curve
    assert plain_run[1] != deferred_run[1]  # the held-out loss: other running statistics


# ------------------------------------------------------------------------------------ drift, doctor


def test_every_habit_fails_the_ladder_where_the_zoo_says_and_its_baseline_passes(
    framework: str, tmp_path: Path
) -> None:
    """Habits that are a setting of the whole process are in tests/common/test_tf_zoo.py."""
    names = [drift.name for drift in DRIFTS if framework in drift.frameworks]
    drift = of(framework, "drift")
    assert set(drift.HABITS) == set(names)
    here = [name for name in names if name not in PROCESS_WIDE]
    if framework == "paddle":  # its stages are processes, so these runs are in a worker
        rows = run_zoo(tmp_path, [("paddle", None)], here, [10], seeds=1, timeout_seconds=np.inf)[0]
        found = {row.name: row.verdict if row.verdict in GOOD else str(row) for row in rows}
    else:
        build_engine = of(framework, "engine").build_engine
        found = habits_here(framework, here, tmp_path, build_engine, drift.switch)
    expected = {
        name: "within the limits" if by_name(name).may_pass else "as expected" for name in here
    }
    if "tf32" in here and not has_cuda():
        expected["tf32"] = "needs CUDA"
    assert found == expected


def check_kernels(prepare: Callable[..., Any], framework: str, dtype: str) -> Mapping[str, Any]:
    """Every kernel of `prepare(config)` runs, under its name and in its order. Returns what the
    framework says of itself.
    """
    tiny = preset("tiny")
    one = tiny.model_copy(update={"train": tiny.train.model_copy(update={"dtype": dtype})})
    operations, environment = prepare(one)
    assert list(operations) == [kernel.name for kernel in kernels(one)]
    for operation in operations.values():
        operation()
    assert environment["framework"] == framework
    return dict(environment)


@every_dtype
def test_every_kernel_of_the_doctor_runs_under_its_name(
    framework: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if framework == "tensorflow":  # has begun, with the settings of the folder
        monkeypatch.setattr(of(framework, "devices"), "configure", lambda *settings: None)
    check_kernels(of(framework, "roofline").prepare, framework, dtype)


# ----------------------------------------------------------------- the framework's own weight file

FILES = {"torch": "model.pt", "tensorflow": "model.weights.h5", "paddle": "model.pdparams"}
MODEL = TransformerSpec(
    context_length=6, num_layers=2, d_model=12, num_heads=2, d_ff=20, dropout=0.1
)
TOLERANCE = 1e-12


class Hostile:
    """What makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(("tied", "norm"), [(True, "pre"), (False, "post")])
def test_the_file_works_in_a_plain_model_comes_back_and_is_refused_where_it_is_wrong(
    framework: str, logits: Logits, tied: bool, norm: str, tmp_path: Path
) -> None:
    """`logits(spec, file, tokens)` are those of the framework's plain model."""
    spec = MODEL.model_copy(update={"tied_head": tied, "norm": norm})
    convert, name = of(framework, "convert"), FILES[framework]
    file, both = tmp_path / name, (convert.write_weights, convert.read_weights)
    weights = random_arrays(spec, 1, "float64", 0.5)
    saved = checkpoint.load(checkpoint.write_weights(tmp_path / "saved", spec, weights, "a test"))
    assert main(["export", str(tmp_path / "saved"), str(file)], *both) == 0
    training = TrainSpec(batch_size=4, micro_batches=2, dtype="float64")
    oracle = OracleEngine(RunConfig(model=spec, train=training))
    oracle.reset(saved.weights)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 6))
    expected = oracle.predict(tokens)
    error = np.linalg.norm(logits(spec, file, tokens) - expected)
    assert error < TOLERANCE * np.linalg.norm(expected)

    assert main(["import", str(file), str(tmp_path / "back"), spec.model_dump_json()], *both) == 0
    for key, value in checkpoint.load(tmp_path / "back").weights.items():
        np.testing.assert_array_equal(value, saved.weights[key], key)

    wrong = [{"num_layers": spec.num_layers + 1}, {"d_ff": spec.d_ff + 1}]
    for changes in wrong if tied else [*wrong, {"tied_head": True}]:
        other = spec.model_copy(update=changes).model_dump_json()
        assert main(["import", str(file), str(tmp_path / "wrong"), other], *both) == 2, changes
    hostile = tmp_path / f"hostile-{name}"
    pickled = pickle.dumps({"x": Hostile(tmp_path / "harmed")})
    for content in (pickled, b"", b"junk" * 100, file.read_bytes()[:500]):
        hostile.write_bytes(content)
        with pytest.raises(ExchangeError, match=r"\w"):
            convert.read_weights(spec, hostile)
    assert not (tmp_path / "harmed").exists() and not (tmp_path / "wrong").exists()
