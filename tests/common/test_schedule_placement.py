"""A placement as data: any virtual stages on any device, and costs for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from common.schedule.action import ScheduleError, format_schedule, parse_schedule
from common.schedule.generators import make_schedule
from common.schedule.simulate import Costs, per_stage, per_virtual_stage, simulate
from common.schedule.validate import validate
from common.spec.partition import plan_partition
from common.spec.rules import why_impossible
from common.spec.run import RunConfig, TrainSpec, TransformerSpec

UNEQUAL = """# schedule: unequal micro_batches=2
placement: 0 1 4 | 2 3
0: F0 F0.1 F1 F1.1 F0.2 F1.2 BW0.2 BW0.1 BW0 BW1.2 BW1.1 BW1
1: F0 F0.1 F1 F1.1 BW0.1 BW0 BW1.1 BW1
"""
# Down, down again, and back up: no name has that.
OWN = """# schedule: own micro_batches=1
placement: 0 2 5 | 1 3 4
0: F0 F0.1 F0.2 BW0.2 BW0.1 BW0
1: F0 F0.1 F0.2 BW0.2 BW0.1 BW0
"""


@pytest.mark.parametrize("text", [UNEQUAL, OWN])
def test_the_text_reads_back(text: str) -> None:
    schedule = parse_schedule(text)
    assert format_schedule(schedule) == text
    assert validate(schedule) == []


def test_chunks_may_be_unequally_many() -> None:
    schedule = parse_schedule(UNEQUAL)
    assert (schedule.num_virtual_stages, schedule.num_chunks) == (5, 3)
    assert schedule.location == ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2))
    simulation = simulate(schedule)  # a third of device 0's 3, a half of device 1's 3
    assert simulation.busy.tolist() == pytest.approx([6, 6])
    assert simulation.peak_in_flight_per_stage == [2, 2]
    assert simulation.peak_chunks_in_flight_per_stage == [6, 4]
    broken = parse_schedule(UNEQUAL.replace("F0.1 F1 F1.1 BW0.1", "F0.2 F1 F1.1 BW0.1"))
    messages = [str(each) for each in validate(broken)]
    assert any("[unknown-action] device 1, action 1 (F0.2)" in each for each in messages)
    assert any("and chunks 0 to 1" in each for each in messages)


@pytest.mark.parametrize(
    ("layers", "partition", "sizes", "why"),
    [
        (8, "even", [2, 2, 2, 2, 2], None),  # 1, 2, 2, 2 and 1 blocks, the embedding and the head
        (8, (1, 3, 5, 9), [1, 2, 2, 4, 1], None),
        (3, "balanced", [1, 1, 1, 1, 1], None),
        (2, "even", [], "stages x chunks = 5 is more than the 4 units"),
        (8, (1, 3, 5, 7, 9), [], "needs 4 increasing boundaries between 1 and 9"),
    ],
)
def test_a_model_is_cut_into_as_many_parts_as_there_are_chunks(
    tmp_path: Path,
    layers: int,
    partition: Literal["even", "balanced"] | tuple[int, ...],
    sizes: list[int],
    why: str | None,
) -> None:
    (tmp_path / "unequal.txt").write_text(UNEQUAL)
    config = RunConfig(
        model=TransformerSpec(num_layers=layers),
        train=TrainSpec(micro_batches=2),
        stages=2,
        chunks=3,
        schedule=f"file:{tmp_path / 'unequal.txt'}",
        partition=partition,
    )
    if why is not None:
        assert why in str(why_impossible(config))
        return
    assert why_impossible(config) is None
    assert [len(part) for part in plan_partition(config).parts] == sizes


def test_a_placement_with_a_name_is_that() -> None:
    for name, placement in (
        *(("interleaved", "0 2 | 1 3"), ("interleaved", "loop")),
        *(("zb-v", "0 3 | 1 2"), ("zb-v", "vee")),
    ):
        schedule = make_schedule(name, 2, 3, 2)
        header, *rows = format_schedule(schedule).splitlines()
        text = "\n".join([header.partition(" chunks")[0], *rows, f"placement: {placement}"])
        assert parse_schedule(text) == schedule


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("0 1 | 1 2", "every virtual stage once"),
        ("0 1 | 3 4", "every virtual stage once"),
        ("0 1 |", "at least one on each device"),
        ("0 1", "placement of 1 devices"),
        ("0 x | 1 2", "expected loop, vee or the virtual stages"),
        ("-1 0 | 1 2", "every virtual stage once"),
        ("0 1 | 2 3\nplacement: 0 1 | 2 3", "line 2: a second placement"),
        ("0 1 | 2 3\n# schedule: x chunks=3", "the schedule has 2 devices and 3 chunks"),
    ],
)
def test_a_placement_that_is_none_is_refused(placement: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(f"placement: {placement}\n0: F0 BW0\n1: F0 BW0\n")


def test_costs_of_every_virtual_stage() -> None:
    """The head of a V lies on device 0, whose last chunk then takes longer."""
    schedule = make_schedule("zb-v", 2, 4, 2)
    assert per_stage([1, 2, 3, 4], 2, "--forward", 4) == (1, 2, 3, 4)
    with pytest.raises(ScheduleError, match="3 numbers for 2 stages; expected 1, 2 or 4"):
        per_stage([1, 2, 3], 2, "--forward", 4)
    assert per_virtual_stage((2.0, 4.0), schedule) == (1, 2, 2, 1)
    assert per_virtual_stage((2.0, 4.0), schedule, shared=False) == (2, 4, 4, 2)
    ones, zeros = (1.0,) * 4, (0.0,) * 4
    even = simulate(schedule, Costs(ones, ones, ones, zeros))
    assert even.makespan == simulate(schedule, Costs.uniform(2, 2.0, 2.0, 2.0)).makespan
    head = Costs((1.0, 1.0, 1.0, 2.0), ones, ones, zeros, activation_bytes=(10, 10, 10, 30))
    simulation = simulate(schedule, head)
    assert simulation.busy.tolist() == [4 * 7, 4 * 6]
    peaks = simulation.peak_chunks_in_flight_per_stage
    assert simulation.peak_bytes_per_stage is not None
    assert simulation.peak_bytes_per_stage[1] == 10 * peaks[1] < simulation.peak_bytes_per_stage[0]
