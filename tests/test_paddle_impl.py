"""Paddle's own promises, checked in a child process; numbers against the oracle are for `tests/parity`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.drift import DRIFTS
from common.zoo import run_zoo

ROOT = Path(__file__).parent.parent


def child(module: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.children.{module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> Any:
    """What the child saw."""
    return child("paddle_checks")


@pytest.fixture(scope="module")
def numerics() -> Any:
    """What the child of `paddle_numerics` saw."""
    return child("paddle_numerics")


def test_split_backward_gives_the_bits_of_the_merged_one_and_runs_no_second_forward(found: Any) -> None:
    split = found["split_backward"]
    assert split["bitwise"] == [True] * 4
    assert split["forward_calls"] == split["expected_calls"]


def test_dropout_masks_are_numpys_to_the_bit(found: Any) -> None:
    assert found["dropout_bits"]


def test_fleets_own_schedule_is_our_1f1b(found: Any) -> None:
    assert found["fleet_order"] == []


def test_fleets_own_pipeline_and_our_executor_give_the_same_bits(found: Any) -> None:
    native = found["native_against_table"]
    assert min(native["tensors"]) > 0
    assert (native["numbers_bitwise"], native["gradients_bitwise"]) == (True, True)
    assert native["events_are_schedule"]


def test_a_killed_rank_ends_the_run_in_seconds_and_says_so(found: Any) -> None:
    killed = found["killed_rank"]
    assert killed["ranks"] == 2
    assert killed["status"] == 1
    assert killed["seconds"] < 10
    assert killed["left"] == []
    assert killed["log"] == "paddle_impl: stage 1 was ended by SIGKILL"
    assert killed["told"]["failed-1.txt"] == "stage 1 was ended by SIGKILL"
    assert "stage 1 has ended" in killed["told"]["failed-0.txt"]


def test_no_rank_outlives_the_process_that_started_it(found: Any) -> None:
    assert found["killed_parent"] == {"ranks": 2, "left": []}


def test_a_job_that_fails_on_one_rank_ends_on_all_and_the_next_one_runs(found: Any) -> None:
    failed = found["failed_job"]
    assert failed["status"] == 1
    assert failed["seconds"] < 30
    assert "failed-1.txt" in failed["failed"]
    assert failed["reason"] == "IsADirectoryError"
    assert failed["second"] == ["part-0.json", "part-1.json"]


def test_short_batches_have_the_oracles_gradients_whatever_the_micro_batches(numerics: Any) -> None:
    assert max(numerics["short_batches"].values()) <= 1


def test_training_resumed_elsewhere_gives_the_bits_of_training_at_once(numerics: Any) -> None:
    assert not any(numerics["resumed"].values())
    assert len(numerics["resumed"]) == 15


def test_units_alone_and_predictions_are_the_oracles_and_disturb_nothing(numerics: Any) -> None:
    seen = numerics["units_alone_and_predictions"]
    assert max(seen["errors"].values()) <= 1
    assert (seen["disturbed"], seen["logits_differ"]) == ([], [])


def test_recomputation_changes_no_bit_and_holds_inputs_alone(numerics: Any) -> None:
    seen = numerics["recomputation"]
    assert {name: tensors for name, tensors in seen["different"].items() if tensors} == {}
    held = {name: sizes["peak"] for name, sizes in seen["held"].items()}
    x = 2 * 16 * 32 * 4  # a micro-batch's activation between two units, float32
    anchor = 4  # of the embedding's piece, whose tokens are the mini-batch's
    assert (held["0 gpipe full"], held["1 gpipe full"]) == (4 * anchor, 4 * x)
    assert (held["0 1f1b full"], held["1 1f1b full"]) == (2 * anchor, x)
    assert (held["0 1f1b every-1"], held["1 1f1b every-1"]) == (2 * (2 * x + anchor), 3 * x)
    one_chunk = seen["held"]["1 1f1b except-last"]
    assert one_chunk["peak"] == one_chunk["forward"][0] == held["1 1f1b none"] > 30 * x


def test_every_habit_fails_first_where_it_is_known_for(tmp_path: Path) -> None:
    names = [drift.name for drift in DRIFTS if "paddle" in drift.frameworks]
    rows = run_zoo(tmp_path, ["paddle"], names, [10], seeds=1, timeout_seconds=280)[0]
    assert {row.name: row.verdict for row in rows} == dict.fromkeys(names, "as expected")


def test_native_dropout_follows_the_seed_whatever_the_schedule(numerics: Any) -> None:
    seen = numerics["native_dropout"]
    assert not any(seen["different"].values())
    assert seen["shared_and_native_differ"]


def test_what_cannot_be_is_refused_in_one_line(numerics: Any) -> None:
    said = numerics["refused"]
    assert said["bfloat16"].startswith("dtype = bfloat16: Paddle ")
    assert said["bfloat16"].endswith("; right would be float32 or float64")
    assert said["native recompute"] == "recompute = full; right for executor = native would be none"
    assert said["plain recompute"] == "recompute = full; right for executor = plain would be none"
    assert said["drift"].startswith("drift = tf32; right for paddle would be one of mean-over-all-labels, ")
    assert not any("\n" in line for line in said.values())
