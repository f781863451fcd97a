"""PyTorch's own promises, checked in a child process; numbers against the oracle are for `tests/parity`."""

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
        [sys.executable, "-m", "tests.children.torch_checks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_split_backward_gives_the_bits_of_the_merged_one_and_runs_no_second_forward(found: Any) -> None:
    split = found["split_backward"]
    assert split["bitwise"]
    assert split["forward_calls"] == {"merged": split["expected_calls"], "split": split["expected_calls"]}


def test_tapped_gradients_are_those_of_plain_autograd(found: Any) -> None:
    assert found["against_plain_autograd"] < 1e-13


def test_b_frees_the_graph_and_w_frees_the_rest(found: Any) -> None:
    after_forward, after_b, waiting, waiting_after_w, in_flight = found["activations"]["counts"]
    assert after_forward > 0
    assert (after_b, waiting, waiting_after_w, in_flight) == (0, 1, 0, 0)


def test_micro_batches_in_flight_are_as_many_as_the_schedule_says(found: Any) -> None:
    assert found["activations"]["peak_in_flight"] == {"gpipe": [4, 4], "1f1b": [2, 1]}


def test_dropout_masks_are_numpys_to_the_bit(found: Any) -> None:
    assert found["dropout_bits"]


def test_tied_copies_stay_equal_and_do_not_depend_on_the_partition(found: Any) -> None:
    assert found["tied_head"] == {"copies_equal": True, "partition_bitwise": True}


def test_ignored_labels_and_missing_sequences_count_for_nothing(found: Any) -> None:
    assert found["ignored_labels"] < 1


def test_going_on_from_exported_state_gives_the_bits_of_a_run_without_interruption(found: Any) -> None:
    assert len(found["resume"]) == 18
    assert all(found["resume"].values()), found["resume"]


def test_units_alone_are_the_oracles_and_leave_the_engine_as_it_was(found: Any) -> None:
    assert found["units_alone"]["worst"] < 1
    assert found["units_alone"]["kept"]


def test_predictions_are_the_oracles(found: Any) -> None:
    assert found["predictions"] < 1


def test_recomputation_gives_the_same_bits(found: Any) -> None:
    assert len(found["recomputation"]["same"]) == 40
    assert all(found["recomputation"]["same"].values()), found["recomputation"]["same"]


def test_recomputation_holds_the_input_of_each_piece_and_nothing_else(found: Any) -> None:
    held, one = found["recomputation"]["held"], found["recomputation"]["activation_bytes"]
    assert held["full"] == {"0": 0, "1": one}  # stage 0 takes tokens; 1f1b has one micro-batch in flight on stage 1
    assert held["every-1"] == {"0": 2 * one, "1": 2 * one}  # stage 0 holds block 0's input for two micro-batches
    assert held["except-last"]["1"] == held["none"]["1"] > 10 * one
    assert held["full"]["0"] < held["except-last"]["0"] < held["none"]["0"]


def test_native_dropout_is_the_same_in_every_run_and_schedule_and_absent_from_evaluation(found: Any) -> None:
    native = found["native_dropout"]
    assert native["same"] and native["sites_differ"] and native["differs_from_shared"]
    assert native["evaluations"] == 1
    assert native["kept"] == pytest.approx(0.7, abs=0.01)


def test_every_habit_fails_the_ladder_where_the_zoo_says_and_its_baseline_passes(found: Any) -> None:
    habits = found["habits"]
    assert habits["status"] == 0
    assert habits["habits"] == [row.name for row in DRIFTS if "torch" in row.frameworks]
    assert set(habits["first"]) == set(habits["habits"]) - {"tf32"}  # which needs CUDA
    assert set(habits["first"].values()) == {"as expected"}, habits["first"]


def test_a_habit_that_pytorch_does_not_have_is_refused(found: Any) -> None:
    unknown, native = found["habits"]["messages"]
    assert unknown.startswith("drift = onednn; right for torch would be one of mean-per-micro-batch, ")
    assert native == "drift = clip-epsilon; executor = native has none, right would be table"


def test_bfloat16_computes_low_and_adds_up_high(found: Any) -> None:
    mixed = found["mixed_precision"]
    assert mixed["loss"] < 1e-3 and mixed["worst_gradient"] < 0.03  # measured: 7e-5 and 0.014; one rounding is 0.004
    assert mixed["float32"] and mixed["computes_in_bfloat16"] and mixed["masters_are_finer"]
    assert all(mixed["same"].values()), mixed["same"]
    assert mixed["message"] == "dtype = bfloat16; right for executor = plain would be float32 or float64"


def test_errors_of_bfloat16_have_no_sign(found: Any) -> None:
    stretched = {name: abs(roundoffs) for name, roundoffs in found["rounding"].items()}
    assert stretched["output"] < 0.2 and stretched["input"] < 0.2, stretched  # 0.44, 0.49 with 1 / 0.9 in bfloat16
    assert statistics.median(stretched.values()) < 0.4, stretched  # measured: 0.12; 4.3 at worst with nn.LayerNorm


def test_a_failing_stage_ends_the_step_with_its_own_error(found: Any) -> None:
    failure = found["failure"]
    assert failure["message"] == "device 3, action F0: ZeroDivisionError: injected"
    assert failure["cause"] == "ZeroDivisionError"
    assert failure["seconds"] < 5
    assert failure["again"]


def test_settings_are_read_back(found: Any) -> None:
    settings = found["settings"]
    assert settings["threads_per_stage"] == {"2": 1, "4": 2}
    assert settings["events_are_schedule"]
    assert settings["peak_devices"] == [0]
    assert settings["peak_over_status"] == pytest.approx(1, abs=0.02)
    if not settings["cuda"]:
        assert "sees no CUDA" in settings["no_cuda_message"]
