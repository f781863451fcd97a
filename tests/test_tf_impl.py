"""TensorFlow's own promises, checked in a child process; numbers against the oracle are for `tests/parity`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.drift import DRIFTS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found() -> Any:
    """What the child saw."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.children.tf_checks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    if "No module named 'tensorflow'" in done.stderr:
        pytest.skip("TensorFlow is not installed")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_keras_user_gets_what_plain_keras_gives(found: Any, schedule: str) -> None:
    seen = found[schedule]
    assert set(seen["history"]) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert max(seen["history"].values()) < 2e-6
    assert seen["weights"] < 2e-6
    assert seen["evaluate"] < 2e-6
    assert seen["predict"] < 1e-5
    assert seen["falls"]
    assert seen["epochs"] == [0, 1, 2]


def test_saved_weights_fit_another_partition(found: Any) -> None:
    assert found["1f1b"]["reloaded"]


def test_every_stage_has_its_weights_on_its_own_device(found: Any) -> None:
    assert found["gpipe"]["devices"] == ["CPU:0", "CPU:1", "CPU:2"]


def test_the_split_backward_has_the_bits_of_the_merged_one(found: Any) -> None:
    assert found["cut"]["equal"]
    assert found["cut"]["nonzero"]


def test_no_operation_on_data_runs_twice(found: Any) -> None:
    assert found["cut"]["repeated"] == []


def test_dropout_masks_have_numpys_bits(found: Any) -> None:
    assert found["dropout"] is True


def test_a_seed_on_another_device_neither_hangs_nor_stands_still(found: Any) -> None:
    assert found["seed"] == {"losses_differ": True, "own_device": [[True, False], [True, True]]}


def test_ignored_labels_and_missing_sequences_count_for_nothing(found: Any) -> None:
    assert found["ignored_labels"] < 1


def test_going_on_from_exported_state_gives_the_bits_of_a_run_without_interruption(found: Any) -> None:
    assert len(found["resume"]) == 12
    assert all(found["resume"].values()), found["resume"]


def test_weight_decay_may_be_zero(found: Any) -> None:
    assert found["no_weight_decay"] < 1


def test_units_alone_are_the_oracles_and_leave_the_engine_as_it_was(found: Any) -> None:
    assert found["units_alone"]["worst"] < 1
    assert found["units_alone"]["kept"]


def test_predictions_are_the_oracles_and_shapes_are_traced_once(found: Any) -> None:
    assert found["predictions"]["worst"] < 1
    assert found["predictions"]["traces"] == [2, 2]


def test_recomputation_changes_no_bit_and_holds_the_inputs_alone(found: Any) -> None:
    seen = found["recomputation"]
    assert len(seen["same"]) == 10
    assert all(seen["same"].values()), seen["same"]
    held, activation = seen["held"], seen["activation_bytes"]
    assert held["full"] == {"0": 0, "1": activation}  # the first stage's input is the mini-batch itself
    assert held["every-1"] == {"0": 2 * activation, "1": 2 * activation}
    assert held["except-last"]["1"] == held["none"]["1"] > 10 * activation
    assert held["except-last"]["0"] == held["none"]["0"] / 2  # one of the two in flight


def test_native_dropout_is_seeded_by_step_site_and_micro_batch(found: Any) -> None:
    seen = found["native"]
    assert seen["same"]
    assert seen["evaluations"] == 1
    assert abs(seen["kept"] - 0.7) < 0.01
    assert abs(seen["mean"] - 1) < 0.02
    assert abs(seen["rarely"] - 0.01) < 0.002  # TensorFlow's own op drops 0.016 in bfloat16
    assert seen["masks"] == 4
    assert seen["differs_from_shared"]


def test_every_habit_is_caught_where_it_is_known_for_and_leaves_nothing_behind(found: Any) -> None:
    seen = found["habits"]
    assert seen["status"] == 0
    assert set(seen["first"].values()) == {"as expected"}, seen["first"]
    assert set(seen["habits"]) == {row.name for row in DRIFTS if "tensorflow" in row.frameworks}
    unknown, plain, onednn = seen["messages"]
    assert "drift = coupled-decay; right for tensorflow would be one of tanh-gelu" in unknown
    assert "right would be table" in plain
    assert "configure(onednn=True)" in onednn


def test_bfloat16_has_float32_masters_and_the_bits_of_every_schedule(found: Any) -> None:
    seen = found["mixed_precision"]
    assert seen["loss"] < 2**-8
    assert seen["worst_gradient"] < 0.05
    assert seen["float32"]
    assert seen["computes_in_bfloat16"]
    assert seen["copies_are_rounded_masters"]
    assert seen["masters_are_finer"]
    assert len(seen["same"]) == 12
    assert all(seen["same"].values()), seen["same"]
    assert seen["reloaded"]
    assert "right for executor = plain would be float32 or float64" in seen["message"]


def test_errors_of_bfloat16_have_no_sign(found: Any) -> None:
    seen = found["rounding"]
    stretched = {name: abs(roundoffs) for name, roundoffs in seen["ours"].items()}
    # 1.7, 3.3 and a median of 3.2 with the operations that tf_impl.precision stands in for
    assert stretched["output"] < 0.2 and stretched["input"] < 0.2, stretched
    assert statistics.median(stretched.values()) < 0.4, stretched
    assert seen["own_is_rounded"] == (abs(seen["own"]) < 0.2), seen  # TensorFlow's own product, -0.7 without oneDNN


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("compile", "RuntimeError", "compile(optimizer, loss)"),
        ("divide", "ValueError", "3 samples cannot be cut into 4"),
        ("stages", "ValueError", "6 virtual stages for 5 layers"),
        ("devices", "ValueError", "tf_impl.devices.configure(stages=4)"),
        ("built", "ValueError", "already has weights"),
        ("partition", "ValueError", "2 increasing boundaries"),
        ("cuda", "ValueError", "sees no GPU"),
        ("native", "ValueError", "TensorFlow has no pipeline of its own"),
        ("spec", "ValueError", "4 virtual stages for 3 layers"),
        ("stage", "StageFailure", "no memory left"),
    ],
)
def test_errors_say_what_is_wrong(found: Any, case: str, kind: str, text: str) -> None:
    if case == "cuda" and found["environment"]["device_kind"] == "cuda":
        pytest.skip("there is a GPU")
    assert found["errors"][case].startswith(kind)
    assert text in found["errors"][case]


def test_a_model_runs_again_after_a_failed_step(found: Any) -> None:
    assert found["errors"]["after"] == "no error"


def test_the_environment_is_the_parity_one(found: Any) -> None:
    seen = found["environment"]
    assert (seen["onednn"], seen["tf32"], seen["graph_rewrites"]) == (False, False, False)
    assert seen["threads_per_stage"] == 1
