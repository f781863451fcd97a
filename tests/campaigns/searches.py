"""`python -m tests.campaigns.searches`: random greedy and beam searches, by transformers
and by every framework, which have to find the same sequences.

Small Llamas with random weights (`tests.searches`), a few new tokens, every combination of beams,
length penalty, early stopping and end of sequence. The library adds float32 log-probabilities, so a
search whose closest call is nearer than `tests.searches.NEAR` may come out otherwise: such ones are
counted by themselves. Each framework runs all searches twice, on one stage and on two.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from common import checkpoint
from common.harness.launch import IMPLEMENTATIONS, run_jobs_in_worker
from common.runtime.inference import Generated
from common.runtime.job import Job
from common.spec.run import FRAMEWORKS
from tests import searches

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", metavar="N", type=int, default=500)
    parser.add_argument("--models", metavar="N", type=int, default=10)
    parser.add_argument("--first", metavar="N", type=int, default=10_000, help="the first's number")
    parser.add_argument("--stages", metavar="N,..", default="1,2")
    parser.add_argument("--frameworks", metavar="NAME,..", default=",".join(FRAMEWORKS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        numbers = [str(n) for n in (arguments.count, arguments.models, arguments.first)]
        command = [sys.executable, "-m", "tests.references.search_reference", str(folder / "found")]
        subprocess.run([*command, *numbers], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        text = (folder / "found").read_text(encoding="utf-8")
        recorded = searches.Recorded.model_validate_json(text)
        print(f"{len(recorded.searches)} searches; transformers {recorded.version}\n", flush=True)
        print("| framework | stages | the same | near-ties that differ | differ |")
        print("| --- | ---: | ---: | ---: | ---: |", flush=True)
        wrong = 0
        for framework in arguments.frameworks.split(","):
            for stages in map(int, arguments.stages.split(",")):
                found = compared(recorded.searches, framework, stages, folder)
                wrong += found["differs"]
                row = (framework, stages, found["same"], found["near"], found["differs"])
                print(f"| {' | '.join(map(str, row))} |", flush=True)
    return 1 if wrong else 0


def compared(
    wanted: list[searches.Search], framework: str, stages: int, folder: Path
) -> Counter[str]:
    """Return how many of the searches are the library's: "same", "near", "differs"."""
    here = folder / f"{framework}-{stages}"
    saved = {model: here / f"model-{model}" for model in {search.model for search in wanted}}
    here.mkdir()
    for model, path in saved.items():
        weights = searches.weights(model)
        checkpoint.write_weights(path, searches.spec(model), weights, "a campaign")
    jobs = [
        Job(
            config=searches.config(search.model, framework, stages),
            out=str(here / str(number)),
            kind="generate",
            resume=str(saved[search.model]),
            generation=search.wish,
        )
        for number, search in enumerate(wanted)
    ]
    outcomes = run_jobs_in_worker(IMPLEMENTATIONS[framework].module, jobs, here)
    counts: Counter[str] = Counter()
    for search, job, outcome in zip(wanted, jobs, outcomes, strict=True):
        if outcome.status != "ok":
            raise SystemExit(f"{framework}: {outcome.reason}")
        text = (Path(job.out) / "generation.json").read_text(encoding="utf-8")
        found = Generated.model_validate_json(text)
        why = searches.difference(search, found)
        is_near = found.closest_call < searches.NEAR
        counts["same" if why is None else "near" if is_near else "differs"] += 1
        if why is not None:
            print(f"{framework}, closest call {found.closest_call:.1e}: {why}", file=sys.stderr)
    return counts


if __name__ == "__main__":
    sys.exit(main())
