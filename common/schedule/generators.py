"""Every named schedule, generated for p devices and m micro-batches.

Drawings use unit costs F = 1, BW = 2, time to the right; digits are forwards, letters' places in `docs/schedules.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.schedule.action import Action, Op, Schedule, ScheduleError, parse_schedule


def naive(p: int, m: int) -> Schedule:
    """One micro-batch at a time through the whole pipeline: all devices but one are idle.

    With m = 1 this is plain model parallelism, bubble fraction (p-1)/p.
    """
    row = tuple(Action(op, i) for i in range(m) for op in (Op.F, Op.BW))
    return Schedule("naive", (row,) * p, m)


def gpipe(p: int, m: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019). Bubble fraction (p-1)/(m+p-1); m activations in flight.

    The drain runs in the order of the fill, so that weight gradients add up as in every other schedule.
    """
    row = tuple(Action(Op.F, i) for i in range(m)) + tuple(Action(Op.BW, i) for i in range(m))
    return Schedule("gpipe", (row,) * p, m)


def one_f_one_b(p: int, m: int) -> Schedule:
    """Warm-up forwards, then one forward and one backward in turn (Narayanan et al. 2019, PipeDream-Flush).

    GPipe's bubble, but only min(p - i, m) activations in flight on device i.
    """
    devices = []
    for device in range(p):
        warmup = min(p - 1 - device, m)
        row = [Action(Op.F, i) for i in range(warmup)]
        for i in range(m - warmup):
            row += [Action(Op.F, warmup + i), Action(Op.BW, i)]
        row += [Action(Op.BW, i) for i in range(m - warmup, m)]
        devices.append(tuple(row))
    return Schedule("1f1b", tuple(devices), m)


GENERATORS: dict[str, Callable[[int, int], Schedule]] = {"naive": naive, "gpipe": gpipe, "1f1b": one_f_one_b}


def make_schedule(name: str, p: int, m: int, chunks: int = 1) -> Schedule:
    """The named schedule, or the one in `file:PATH`. Raises ScheduleError."""
    if name.startswith("file:"):
        path = Path(name.removeprefix("file:"))
        try:
            schedule = parse_schedule(path.read_text(), path.stem)
        except (OSError, UnicodeDecodeError) as error:
            raise ScheduleError(f"schedule {path}: {error}; right would be a readable schedule in text form") from None
        asked = (p, m, chunks)
        has = (schedule.num_devices, schedule.num_micro_batches, schedule.num_chunks)
        if asked != has:
            raise ScheduleError(f"schedule {path} has (stages, micro-batches, chunks) = {has}; the run has {asked}")
        return schedule
    if name not in GENERATORS:
        raise ScheduleError(f"schedule {name!r} is unknown; right would be one of {', '.join(GENERATORS)} or file:PATH")
    if chunks != 1:
        raise ScheduleError(f"schedule {name} has one chunk per device, not {chunks}")
    return GENERATORS[name](p, m)
