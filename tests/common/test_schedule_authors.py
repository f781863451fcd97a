"""Our schedules are those that their authors' own programs make, action by action."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.schedule.action import Schedule, parse_schedule
from common.schedule.generators import make_schedule
from common.schedule.interleaved import interleaved

GOLDEN = Path(__file__).parents[1] / "golden" / "authors"


def tables() -> Iterator[tuple[str, Schedule, dict[str, str]]]:
    """Every table, with its file and the options in its header."""
    for path in sorted(GOLDEN.glob("*.txt")):
        for text in path.read_text().split("# schedule:")[1:]:
            words = text.splitlines()[0].split()[1:]
            yield path.stem, parse_schedule("# schedule:" + text), dict(w.split("=") for w in words)


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        pytest.param(table, options, id=f"{source}-{table.name}-{n}")
        for n, (source, table, options) in enumerate(tables())
    ],
)
def test_ours_are_theirs(theirs: Schedule, options: dict[str, str]) -> None:
    size = theirs.num_devices, theirs.num_micro_batches, theirs.num_chunks
    if theirs.name == "interleaved":
        group_size = int(options["group_size"]) if "group_size" in options else None
        ours = interleaved(*size, group_size, short="warm_up" in options)
    else:
        ours = make_schedule(theirs.name, *size)
    assert ours == theirs


def test_every_source_has_its_tables() -> None:
    count = {path.stem: 0 for path in GOLDEN.glob("*.txt")}
    for source, _, _ in tables():
        count[source] += 1
    assert count == {"deepseek": 2, "megatron": 7, "paddle": 3, "sail": 10, "torch": 12}
