"""TensorFlow's habits through its own command line; most of them share a process in
`tests/tensorflow/test_habits.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.harness.launch import IMPLEMENTATIONS, why_missing
from common.harness.zoo import config_of, has_cuda, run_zoo
from common.runtime.job import Job, JobFile
from common.spec.habits import by_name

ROOT = Path(__file__).parents[2]
STEPS = 10

pytestmark = pytest.mark.skipif(
    bool(why_missing(IMPLEMENTATIONS["tensorflow"])), reason="no TensorFlow"
)


def test_a_habit_of_the_whole_process_gets_one_of_its_own(tmp_path: Path) -> None:
    """oneDNN changes bits, on some machines by more than the limits; TF32 needs a GPU."""
    names = ["tanh-gelu", "onednn", "tf32"]
    runners = [("tensorflow", None)]
    rows = run_zoo(tmp_path, runners, names, [STEPS], seeds=1, timeout_seconds=float("inf"))[0]
    verdicts = {row.name: row.verdict for row in rows}
    assert list(verdicts) == names
    assert verdicts["tanh-gelu"] == "as expected"
    assert verdicts["onednn"] in ("within the limits", "as expected")
    assert verdicts["tf32"] == ("as expected" if has_cuda() else "needs CUDA")


ON_CPU = config_of(by_name("onednn"), "tensorflow", STEPS, on=False)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"drift": "onednn"}, "drift = onednn is for a whole process; expected a file of jobs"),
        ({"device": "auto"}, "the jobs of one file share device; expected one file for each"),
        ({"track": "best"}, "the jobs of one file share track; expected one file for each"),
    ],
    ids=["onednn", "device", "track"],
)
def test_what_belongs_to_the_process_is_the_same_for_all_its_jobs(
    other: dict[str, str], said: str, tmp_path: Path
) -> None:
    configs = [ON_CPU, ON_CPU.model_copy(update=other)]
    file = tmp_path / "jobs.json"
    JobFile(jobs=tuple(Job(config=config, out=str(tmp_path)) for config in configs)).write(file)
    line = [sys.executable, "-m", "tf_impl", str(file)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tf_impl: {said}")
    assert done.stderr.count("\n") == 1
