"""Statistics with known answers, and the split of a step's time and its simulation from events that
are made up.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from common.report.statistics import Summary, speed_ratio, summarize
from common.report.sweep import curves, ideal_efficiency
from common.report.tables import Row
from common.report.timeline import draw_timelines
from common.report.timing import executed, measure, simulated
from common.runtime.job import EventRecord
from common.schedule.action import Schedule
from common.schedule.generators import make_schedule
from common.schedule.simulate import Costs, simulate

# ---------------------------------------------------------------------------------------- intervals


def test_percentiles_of_known_numbers() -> None:
    summary = summarize([float(i) for i in range(1, 12)])
    assert summary is not None
    assert (summary.p10, summary.median, summary.p90) == (2.0, 6.0, 10.0)
    assert summarize([]) is None


def test_a_ratio_without_noise_is_exact() -> None:
    ratio = speed_ratio({0: [2.0] * 6, 1: [2.0] * 6}, {0: [3.0] * 6, 1: [3.0] * 6})
    assert ratio is not None and ratio.verdict == "faster"
    assert (ratio.value, ratio.low, ratio.high) == (1.5, 1.5, 1.5)
    assert speed_ratio({}, {0: [1.0]}) is None and speed_ratio({0: []}, {0: [1.0]}) is None


def test_pairing_by_repeat_cancels_a_drift_that_both_share() -> None:
    drift = {0: 1.0, 1: 2.0, 2: 4.0}
    row = {repeat: [1.00 * slow] * 8 for repeat, slow in drift.items()}
    baseline = {repeat: [1.10 * slow] * 8 for repeat, slow in drift.items()}
    paired, unpaired = speed_ratio(row, baseline), speed_ratio(row, baseline, same_session=False)
    assert paired is not None and paired.verdict == "faster"
    assert (paired.low, paired.high) == pytest.approx((1.1, 1.1))
    assert unpaired is not None and unpaired.verdict == "no difference shown"


@pytest.mark.parametrize("samples", [{0: [2.0]}, {0: [2.0] * 99}, {0: [2.0] * 6, 1: [2.0] * 5}])
def test_few_samples_give_a_ratio_without_an_interval_or_a_verdict(
    samples: dict[int, list[float]],
) -> None:
    many = {0: [3.0] * 6, 1: [3.0] * 6}
    for ratio in (speed_ratio(samples, many), speed_ratio(many, samples)):
        assert ratio is not None and ratio.verdict == "too few samples"
        assert (ratio.low, ratio.high) == (None, None)
        assert ratio.text().endswith(" [unknown]")


def test_few_steps_have_no_percentiles() -> None:
    assert summarize([1.0] * 9) == Summary(1.0, None, None)


@pytest.mark.parametrize("truth", [1.0, 1.2])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(truth: float) -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(40):
        row, baseline = (
            {repeat: generator.lognormal(math.log(scale), 0.1, 30).tolist() for repeat in range(5)}
            for scale in (1.0, truth)
        )
        ratio = speed_ratio(row, baseline)
        assert ratio is not None
        assert ratio.low is not None and ratio.high is not None
        covered += ratio.low <= truth <= ratio.high
    assert covered >= 34  # 95 % of 40 are 38; fewer than 34 have a chance of 0.3 %


# ------------------------------------------------------------------------------------------- timing


def played(
    schedule: Schedule, costs: Costs, scale: float = 1.0, begin: float = 100.0
) -> dict[int, list[EventRecord]]:
    """The events of a step that goes exactly as the simulator says; a stage is ready when its last
    action ended.
    """
    simulation = simulate(schedule, costs)
    events: dict[int, list[EventRecord]] = {}
    for device, actions in enumerate(schedule.devices):
        ready = 0.0
        events[device] = []
        rows = range(*simulation.table.bounds[device : device + 2])
        for action, row in zip(actions, rows, strict=True):
            start, end = float(simulation.start[row]), float(simulation.end[row])
            times = (begin + scale * time for time in (ready, start, end))
            events[device].append(event(str(action), *times))
            ready = end
    return events


def event(action: str, ready: float, start: float, end: float) -> EventRecord:
    return EventRecord(action=action, ready_seconds=ready, start_seconds=start, end_seconds=end)


@pytest.mark.parametrize(
    ("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2)]
)
def test_a_step_that_goes_as_simulated_is_simulated_exactly(name: str, chunks: int) -> None:
    schedule = make_schedule(name, 3, 6, chunks)
    costs = Costs((1.0, 2.0, 1.5), (1.0, 1.0, 2.0), (0.5, 1.0, 0.5), (0.25, 0.25, 0.25))
    makespan = simulate(schedule, costs).makespan
    steps = [played(schedule, costs, scale) for scale in (9.0, 1.0, 1.0, 1.0)]
    timing = measure(steps, [100.0, *[makespan + 2] * 3], schedule, untimed_steps=1)
    assert timing is not None
    assert timing.measured_pipeline_seconds == pytest.approx(makespan)
    assert timing.simulated_pipeline_seconds == pytest.approx(makespan)
    assert timing.simulated_step_seconds == pytest.approx(makespan + 2)
    assert timing.measured_bubble_fraction == pytest.approx(
        simulate(schedule, costs).bubble_fraction
    )
    assert timing.simulated_bubble_fraction == pytest.approx(timing.measured_bubble_fraction)
    assert timing.hop_seconds == pytest.approx(0.25)
    assert timing.replayed_pipeline_seconds == pytest.approx(makespan)
    cost = {(each.virtual_stage, each.op): each.seconds for each in timing.costs}
    assert cost[schedule.virtual_stage(1, 0), "F"] == pytest.approx(2.0 / chunks)
    for stage in timing.stages.values():
        assert stage.total == pytest.approx(makespan + 2)
        assert (stage.rest, stage.host) == pytest.approx((2.0, 0.0))
        assert stage.schedule_wait > 0
    assert timing.stages[1].compute == pytest.approx(6 * 4.0)


def test_the_parts_of_a_step_by_hand() -> None:
    """gpipe, p=2, m=1. The message takes 0.5 to stage 1, which is late but in time; stage 0 waits 3
    for stage 1 and 0.25 for its message.
    """

    schedule = make_schedule("gpipe", 2, 1)
    events = {
        0: [event("F0", 10.0, 10.0, 11.0), event("BW0", 11.5, 14.75, 16.0)],
        1: [event("F0", 10.25, 11.5, 12.5), event("BW0", 12.5, 12.5, 14.5)],
    }
    timing = measure([events], [7.0], schedule, untimed_steps=0)
    assert timing is not None
    first, second = timing.stages[0], timing.stages[1]
    waits = (first.schedule_wait, first.communication_wait, first.host)
    assert (first.compute, *waits, first.rest) == (2.25, 3.0, 0.25, 0.5, 1.0)
    waits = (second.schedule_wait, second.communication_wait, second.host)
    assert (second.compute, *waits) == (3.0, 1.0 + 1.5, 0.5, 0.0)
    assert timing.hop_seconds == pytest.approx(0.375)  # the mean of 0.5 and 0.25
    assert timing.measured_bubble_fraction == pytest.approx(1 - 5.25 / 12)


def test_a_message_that_is_there_is_received_for_a_while() -> None:
    schedule = make_schedule("gpipe", 2, 2)
    rows = {
        0: [("F0", 0, 0, 1), ("F1", 1, 1, 2), ("BW0", 2, 7, 8), ("BW1", 8, 8.5, 9.5)],
        1: [("F0", 0, 1.25, 3), ("F1", 3, 3.25, 4), ("BW0", 4, 4, 6), ("BW1", 6, 6, 7.5)],
    }
    events = {device: [event(*row) for row in own] for device, own in rows.items()}
    timing = measure([events], [10.0], schedule, untimed_steps=0)
    assert timing is not None
    assert timing.receive_seconds == pytest.approx(0.375)  # the mean of F1's 0.25 and BW1's 0.5
    assert timing.hop_seconds == pytest.approx(0.625)  # of F0's 0.25 and BW0's 1


def test_what_is_no_record_of_the_schedule_has_no_timing() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    events = played(schedule, Costs.uniform(2))
    assert measure([events], [1.0], schedule, untimed_steps=1) is None
    assert measure([{0: events[0]}], [1.0], schedule, untimed_steps=0) is None
    assert measure([{0: events[0][:2], 1: events[1]}], [1.0], schedule, untimed_steps=0) is None


def test_a_timeline_has_both_charts_and_an_arrow_per_message(tmp_path: Path) -> None:
    schedule = make_schedule("1f1b", 2, 3)
    events = played(schedule, Costs.uniform(2, communication=0.5))
    timing = measure([events], [20.0], schedule, untimed_steps=0)
    assert timing is not None
    charts = {"measured": executed(schedule, events), "simulated": simulated(schedule, timing)}
    assert charts["measured"].start == pytest.approx(charts["simulated"].start)
    draw_timelines(charts, tmp_path)
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    actions = [event for event in trace if event["ph"] == "X"]
    pids = {action["pid"] for action in actions}
    counts = [sum(a["pid"] == pid for a in actions) for pid in pids]
    assert counts == [schedule.num_actions] * 2
    arrows = {event["id"]: event for event in trace if event["ph"] == "s"}
    ends = {event["id"]: event for event in trace if event["ph"] == "f"}
    charts, directions, micro_batches = 2, 2, 3
    assert arrows.keys() == ends.keys() and len(arrows) == charts * directions * micro_batches
    for key, arrow in arrows.items():
        assert arrow["ts"] < ends[key]["ts"] and arrow["tid"] != ends[key]["tid"]
        for event in (arrow, ends[key]):  # a viewer drops an arrow that touches no action
            around = [a for a in actions if (a["pid"], a["tid"]) == (event["pid"], event["tid"])]
            assert any(a["ts"] < event["ts"] < a["ts"] + a["dur"] for a in around)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "timeline.svg").read_bytes()


# ------------------------------------------------------------------------------------------- sweeps


def row(**fields: object) -> Row:
    known = dict.fromkeys(Row.__dataclass_fields__)
    known |= {"framework": "torch", "schedule": "1f1b", "stages": 2, "chunks": 1, "batch_size": 16}
    known |= {"executor": "table", "track": "matched", "dtype": "float32", "recompute": "none"}
    known |= {"dropout": "none", "sequence_lengths": "full", "drift": "", "source": ""}
    known |= {"device": "cpu", "gpus": 0, "python": "", "replicas": 1, "compress": "none"}
    known |= {"status": "ok", "parity": "pass", "repeats": 2, "timed_steps": 6}
    known |= {"step_ms_median": 10.0, "step_ms_p10": 8.0, "step_ms_p90": 20.0}
    return Row(**(known | fields))  # type: ignore[arg-type]


def test_a_sweep_names_its_knee() -> None:
    throughput = {1: 100.0, 2: 130.0, 4: 150.0, 8: 155.0, 16: 140.0}
    rows = [row(micro_batches=m, tokens_per_second=t) for m, t in reversed(throughput.items())]
    # One point is no curve.
    rows += [row(micro_batches=4, framework="paddle", tokens_per_second=9.0)]
    rows += [row(micro_batches=32, tokens_per_second=999.0, parity="FAIL")]
    (curve,) = curves(rows, "micro_batches")
    assert curve.x == (1, 2, 4, 8, 16) and curve.name == "torch 1f1b p=2"
    assert curve.knee == 4  # 4 to 8 gains 3 %
    assert curve.ideal == pytest.approx([100 * 2 * m / (m + 1) for m in curve.x])
    assert (curve.low[0], curve.high[0]) == pytest.approx((50.0, 125.0))
    assert "knee at micro-batches = 4" in curve.sentence
    once = row(micro_batches=1, tokens_per_second=100.0, repeats=1)
    (curve,) = curves([*rows[1:4], once], "micro_batches")
    assert curve.knee is None
    assert "too few samples to name a knee over micro-batches" in curve.sentence


def test_a_sweep_over_stages_may_have_no_knee() -> None:
    throughput = {1: 100.0, 2: 170.0, 4: 290.0}
    rows = [row(stages=p, micro_batches=8, tokens_per_second=t) for p, t in throughput.items()]
    (curve,) = curves(rows, "stages")
    assert curve.knee is None and "no knee up to stages = 4" in curve.sentence
    assert curve.ideal == pytest.approx([100.0, 100 * 2 * 8 / 9, 100 * 4 * 8 / 11])
    assert ideal_efficiency("micro_batches", 4, 4, 16) == pytest.approx(4 / 7)


def test_unequal_micro_batches_fill_the_pipeline_as_slowly_as_the_largest() -> None:
    """10 sequences as 3, 3, 2, 2 over 4 stages: the last one starts after 3 x 3 and computes 10."""
    assert ideal_efficiency("micro_batches", 4, 4, 10) == pytest.approx(10 / 19)
