"""The CSV files in which `torch.distributed.pipelining` keeps schedules: read and written.

One line per rank, one cell per action: stage, operation, micro-batch. Its stages are our virtual
stages, in the order of the model; I is B here, and B is BW. Empty cells are idle time.

    0F0,0F1,,0I0,0W0,(0F2;0B1)OVERLAP_F_B        0: F0 F1 B0 W0 (F2&BW1)
    1F0,1B0,1F1,1B1,1F2                          1: F0 BW0 F1 BW1 F2

PyTorch reads such a file with `_load_csv` of `_PipelineScheduleRuntime`. It writes two kinds
(`_dump_csv`): "compute_only", and "compute_comms" with messages (SEND_F, RECV_F, ...) and what is
sharded (UNSHARD, RESHARD, REDUCE_GRAD). The latter follow from the others' order: they are skipped.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from typing import NamedTuple

from common.io.edges import printable
from common.schedule.action import (
    Action,
    Op,
    Schedule,
    ScheduleError,
    canonical,
    parse_schedule,
    require_size,
)

_LETTERS = {Op.F: "F", Op.B: "I", Op.W: "W", Op.BW: "B"}
_OPS = {letter: op for op, letter in _LETTERS.items()}
# Digits are bounded as in our own text form.
_STEP = re.compile(r"(?P<stage>[0-9]{1,4})(?P<op>[FIWB])(?P<micro_batch>[0-9]{1,9})")
_IMPLIED = re.compile(r"[0-9]{1,4}((SEND|RECV)_[FB][0-9]{1,9}|UNSHARD|RESHARD|REDUCE_GRAD)")
_PAIR = re.compile(r"\(([^;]+);([^;]+)\)OVERLAP_F_B")
_FIRST_CELL = re.compile(r"[\s\"(]*[0-9]+[A-Z]")


class _Step(NamedTuple):
    stage: int
    op: Op
    micro_batch: int
    overlaps: bool = False


def is_csv(text: str) -> bool:
    """Return whether the text is meant as such a file: our own lines have no comma, or a colon."""
    lines = (line.split("#", 1)[0] for line in text.splitlines())
    return any(":" not in x and ("," in x or _FIRST_CELL.match(x)) for x in lines)


def read_schedule(text: str, name: str = "file") -> Schedule:
    """Read a schedule in either form, this one or our own text. Raises ScheduleError."""
    return parse_csv(text, name) if is_csv(text) else parse_schedule(text, name)


def parse_csv(text: str, name: str = "file") -> Schedule:
    """Read such a file; stages belong to the rank in whose line they stand.

    A B whose W stands in the file too is the backward for the input alone, as PyTorch wrote it
    before it had the letter I. Raises ScheduleError with line and column (cells count from 1).
    """
    rows: list[list[_Step]] = []
    home: dict[int, int] = {}  # the line of every stage
    reader = csv.reader(text.splitlines())
    try:
        for words in reader:
            if not words:
                continue
            row: list[_Step] = []
            for column, word in enumerate(words, start=1):
                try:
                    steps = _read_cell(word.strip())
                    for stage in {step.stage for step in steps}:
                        if home.setdefault(stage, reader.line_num) != reader.line_num:
                            raise ScheduleError(
                                f"stage {stage} stands in line {home[stage]} too; expected every "
                                "stage in the line of one rank"
                            )
                except ScheduleError as error:
                    where = f"line {reader.line_num}, column {column}"
                    raise ScheduleError(f"{where}: {error}") from None
                row += steps
            if not row:
                raise ScheduleError(f"line {reader.line_num}: no action; expected a rank's actions")
            rows.append(row)
    except csv.Error as error:
        raise ScheduleError(f"line {reader.line_num}: {error}; expected cells as 0F0,1I2") from None
    return _build(rows, name)


def _read_cell(word: str) -> list[_Step]:
    if not word or _IMPLIED.fullmatch(word):
        return []
    if pair := _PAIR.fullmatch(word):
        first, second = map(_read_step, pair.groups())
        if (first.op, second.op) != (Op.F, Op.BW):
            raise ScheduleError(
                f"{word}; expected a forward and a whole backward, as in (0F1;3B0)OVERLAP_F_B"
            )
        return [first, second._replace(overlaps=True)]
    return [_read_step(word)]


def _read_step(word: str) -> _Step:
    match = _STEP.fullmatch(word.strip())
    if match is None:
        raise ScheduleError(
            f"{printable(word)!r} is not an action; expected stage, F, I, W or B, and micro-batch, "
            "as in 0F0 or 3I12"
        )
    return _Step(int(match["stage"]), _OPS[match["op"]], int(match["micro_batch"]))


def _build(rows: list[list[_Step]], name: str) -> Schedule:
    # A rank's chunks are the stages in its line, in the order of the model.
    held = tuple(tuple(sorted({step.stage for step in row})) for row in rows)
    chunk = {stage: c for own in held for c, stage in enumerate(own)}
    if missing := set(range(max(chunk, default=0))) - set(chunk):
        raise ScheduleError(
            f"stage {min(missing)} stands in no line; expected stages 0 to {max(chunk)}"
        )
    done = {step[:3] for row in rows for step in row}

    def action(step: _Step) -> Action:
        stage, op, i, overlaps = step
        # Before PyTorch had the letter I, "1B0" beside a "1W0" was the backward for the input.
        has_halves = [(stage, half, i) in done for half in (Op.B, Op.W)]
        older = op is Op.BW and not overlaps and has_halves == [False, True]
        return Action(Op.B if older else op, i, chunk[stage], overlaps)

    # One cell out of range must not make every other line incomplete: a stage's forwards count.
    forwards = Counter(stage for stage, op, _ in done if op is Op.F)
    num_micro_batches, num_chunks = max(forwards.values(), default=1), max(map(len, held))
    require_size(len(rows), num_micro_batches, num_chunks)
    devices = tuple(tuple(map(action, row)) for row in rows)
    return Schedule(name, devices, num_micro_batches, num_chunks, canonical(held))


def format_csv(schedule: Schedule) -> str:
    """Return the schedule as such a file ("compute_only")."""
    lines = []
    for device, row in enumerate(schedule.devices):
        cells: list[str] = []
        for action in row:
            stage = schedule.virtual_stage(device, action.chunk)
            cell = f"{stage}{_LETTERS[action.op]}{action.micro_batch}"
            cells.append(f"({cells.pop()};{cell})OVERLAP_F_B" if action.overlaps else cell)
        lines.append(",".join(cells) + "\n")
    return "".join(lines)
