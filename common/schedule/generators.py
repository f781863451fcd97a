"""Every named schedule, generated for p devices and m micro-batches.

Drawings are those of `triptych draw`: time to the right, with F = B = W = 1 and BW = 2; `·` is
idle. Every schedule keeps the order of the micro-batches within an operation and chunk, so that
weight gradients add up in the same order, and to the same bits, whatever the schedule.

A new schedule is a function here (or beside it, as in `zero_bubble`) and an entry in `GENERATORS`;
what must hold for it is checked by `common.schedule.validate`, not here.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.io.bounded import read_text
from common.io.edges import printable
from common.schedule.action import MAX_PLACES, Schedule, ScheduleError
from common.schedule.controllable import v_half, v_min
from common.schedule.dualpipe import dualpipev
from common.schedule.interleaved import (
    interleaved,
    interleaved_overlap,
    interleaved_zb,
    one_f_one_b,
    rows,
)
from common.schedule.pytorch_csv import read_schedule
from common.schedule.simulate import Costs
from common.schedule.zero_bubble import zb_h1, zb_h2, zb_v


def naive(p: int, m: int) -> Schedule:
    """Run one micro-batch at a time through the whole pipeline: all devices but one are idle.

    With m = 1 this is plain model parallelism. Bubble fraction (p-1)/p; one activation in flight.

        device 0 F0 ·  ·  ·  BW0── F1 ·  ·  ·  BW1──
        device 1 ·  F0 BW0── ·  ·  ·  F1 BW1──
    """
    # F0 BW0 F1 BW1 ... on every device: nothing overlaps, because F1 waits for BW0 in every list.
    return Schedule("naive", rows(p, [range(m)], 1, lambda d: 0), m)


def gpipe(p: int, m: int) -> Schedule:
    """Run all forwards, then all backwards (Huang et al. 2019): bubble (p-1)/(m+p-1), m in flight.

    The drain runs in the fill's order, so that weight gradients add up as in every schedule.

        device 0 F0 F1 F2 F3 ·  ·  ·  BW0── BW1── BW2── BW3──
        device 1 ·  F0 F1 F2 F3 BW0── BW1── BW2── BW3──
    """
    return Schedule("gpipe", rows(p, [range(m)], 1, lambda d: m), m)


SEARCH = "search"
ACTIONS_TO_TRY = 500_000  # of a search at the start of a run: at most a second or so


@functools.cache  # a run asks for its schedule more than once
def _searched(p: int, m: int, v: int) -> Schedule:
    """The search's schedule for F = B = W and twice 1F1B's memory; for other costs `triptych
    simulate` writes a file."""
    # Imported late: a search starts from the other schedules of this file.
    from common.schedule.search import limits, search

    return search(p, m, Costs.uniform(p), limits(p, m, [2.0]), [v], actions_to_try=ACTIONS_TO_TRY)


@dataclass(frozen=True)
class Generator:
    """How to make a named schedule, and its chunks per device (None: as many as one likes)."""

    make: Callable[[int, int, int], Schedule]
    """(p, m, v) -> schedule"""
    chunks: int | None = 1
    usual_chunks: int = 2
    """Of those that can have any number."""
    for_costs: Callable[[int, int, Costs], Schedule] | None = None
    """(p, m, costs) -> the same schedule, made to suit the costs."""


GENERATORS: dict[str, Generator] = {
    "naive": Generator(lambda p, m, v: naive(p, m)),
    "gpipe": Generator(lambda p, m, v: gpipe(p, m)),
    "1f1b": Generator(lambda p, m, v: one_f_one_b(p, m)),
    "interleaved": Generator(interleaved, chunks=None),
    "interleaved-overlap": Generator(interleaved_overlap, chunks=None),
    "interleaved-zb": Generator(interleaved_zb, chunks=None),
    "zb-h1": Generator(lambda p, m, v: zb_h1(p, m)),
    "zb-h2": Generator(lambda p, m, v: zb_h2(p, m)),
    "zb-v": Generator(lambda p, m, v: zb_v(p, m), chunks=2, for_costs=zb_v),
    "v-half": Generator(lambda p, m, v: v_half(p, m), chunks=2),
    "v-min": Generator(lambda p, m, v: v_min(p, m), chunks=2),
    "dualpipev": Generator(lambda p, m, v: dualpipev(p, m), chunks=2),
    SEARCH: Generator(_searched, chunks=None, usual_chunks=1),
}


def named_schedules(p: int, m: int, v: int, costs: Costs) -> Iterator[Schedule]:
    """Yield all schedules that exist for this size, but for the searched one."""
    for name, generator in GENERATORS.items():
        if name != SEARCH and generator.chunks in (None, v):
            with contextlib.suppress(ScheduleError):  # some need more micro-batches
                for_costs = generator.for_costs
                yield for_costs(p, m, costs) if for_costs else generator.make(p, m, v)


def make_schedule(name: str, p: int, m: int, chunks: int = 1) -> Schedule:
    """Return the named schedule, or the one in `file:PATH`. Raises ScheduleError."""
    # Sizes first: a generator may assume them, and a huge one would fill the memory.
    if min(p, m, chunks) < 1:
        raise ScheduleError(
            f"{p} stages, {m} micro-batches, {chunks} chunks; expected at least 1 of each"
        )
    if p * m * chunks > MAX_PLACES:
        raise ScheduleError(
            f"{p} stages x {m} micro-batches x {chunks} chunks; expected a product of at most "
            f"{MAX_PLACES}"
        )
    if name.startswith("file:"):
        return _from_file(Path(name.removeprefix("file:")), p, m, chunks)
    if name not in GENERATORS:
        guess = difflib.get_close_matches(name, GENERATORS, 1)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        known = ", ".join(GENERATORS)
        raise ScheduleError(
            f"schedule {name!r} is unknown; expected one of {known} or file:PATH{hint}"
        )
    # Some patterns are made of just two chunks: another number has no meaning there.
    generator = GENERATORS[name]
    if generator.chunks not in (None, chunks):
        has = "1 chunk" if generator.chunks == 1 else f"{generator.chunks} chunks"
        raise ScheduleError(f"schedule {name} has {has} per device, not {chunks}")
    return generator.make(p, m, chunks)


def default_chunks(name: str) -> int:
    """Return a schedule's chunks per device (by name or `file:PATH`) if the user gives none."""
    if name.startswith("file:"):
        # `make_schedule` will say what is wrong with the file.
        with contextlib.suppress(ScheduleError):
            return _read(Path(name.removeprefix("file:"))).num_chunks
    known = GENERATORS.get(name)
    return (known.chunks or known.usual_chunks) if known else 1


def _from_file(path: Path, p: int, m: int, chunks: int) -> Schedule:
    # A file has its own sizes; they must be those of the run.
    schedule = _read(path)
    for what, has, asked in (
        ("stages", schedule.num_devices, p),
        ("micro-batches", schedule.num_micro_batches, m),
        ("chunks", schedule.num_chunks, chunks),
    ):
        if has != asked:
            raise ScheduleError(
                f"schedule {path} has {what} = {has}, the run has {asked}; expected --{what} {has}"
            )
    return schedule


kept: dict[str, str] = {}
"""Texts of schedules by path, which count instead of the files (`keep_schedule`)."""


def keep_schedule(name: str) -> None:
    """Read the schedule of `file:PATH` now, for this process and its workers."""
    if name.startswith("file:"):
        path = Path(name.removeprefix("file:"))
        kept.pop(str(path), None)
        # `make_schedule` will say what is wrong with the file.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            kept[str(path)] = read_text(path)


def _read(path: Path) -> Schedule:
    try:
        text = kept[str(path)] if str(path) in kept else read_text(path)
        return read_schedule(text, printable(path.stem))
    except (OSError, UnicodeDecodeError, ScheduleError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ScheduleError(
            f"schedule {path}: {why}; expected a readable schedule, as text or CSV"
        ) from None
