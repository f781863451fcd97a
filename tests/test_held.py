"""What each framework's stages hold in flight, against the simulator: counts exactly, bytes in proportion."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.schedule.generators import make_schedule
from common.schedule.simulate import simulate
from common.spec import FRAMEWORKS, RunConfig
from tests.parity.ladder import config, run_probes

STAGES, MICRO_BATCHES = 2, 4
# name: (schedule, chunks)
CASES = {"1f1b": ("1f1b", 1), "gpipe": ("gpipe", 1), "zb-h1": ("zb-h1", 1), "interleaved": ("interleaved", 2)}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_held_is_what_the_simulator_says(framework: str, tmp_path: Path) -> None:
    configs: dict[str, RunConfig] = {
        name: config(
            framework, STAGES, MICRO_BATCHES, "float32", "untied", "pre", "gelu", "even", 0.0,
            schedule, steps=2, chunks=chunks, num_layers=2,
        )
        for name, (schedule, chunks) in CASES.items()
    }  # fmt: skip
    runs = run_probes(configs, tmp_path)
    counts, held = {}, {}
    for name, run in runs.items():
        counts[name] = {d: n for part in run.parts for d, n in part.in_flight_peak.items()}
        held[name] = {d: n for part in run.parts for d, n in part.held_activation_peak_bytes.items()}
    for name, (schedule, chunks) in CASES.items():
        simulated = simulate(make_schedule(schedule, STAGES, MICRO_BATCHES, chunks))
        assert counts[name] == dict(enumerate(simulated.peak_chunks_in_flight_per_stage)), name
    for device in range(STAGES):
        one_micro_batch = held["1f1b"][device] / counts["1f1b"][device]
        assert one_micro_batch == held["gpipe"][device] / MICRO_BATCHES
        # What B leaves for W comes on top, and is never more than what F left and the gradients of as much.
        assert 1 <= held["zb-h1"][device] / held["1f1b"][device] <= 3
        # Several chunks hold together what one would, and the activations at the cuts between them twice at most.
        chunks_in_flight = counts["interleaved"][device]
        assert 0.5 <= held["interleaved"][device] / (one_micro_batch * chunks_in_flight / 2) <= 2
