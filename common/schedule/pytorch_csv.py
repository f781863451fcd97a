"""The CSV files in which `torch.distributed.pipelining` keeps schedules: read and written.

One line per rank, one cell per action: stage, operation, micro-batch. Its stages are our virtual
stages, in the order of the model; I is B here, and B is BW. Empty cells are idle time.

    0F0,0F1,,0I0,0W0        0: F0 F1 B0 W0
    1F0,1B0,1F1             1: F0 BW0 F1

PyTorch reads such a file with `_load_csv` of `_PipelineScheduleRuntime`. It writes two kinds
(`_dump_csv`): "compute_only", and "compute_comms" with messages (SEND_F, RECV_F, ...) and what is
sharded (UNSHARD, RESHARD, REDUCE_GRAD). The latter follow from the order of the others, so they are
read past.
"""

from __future__ import annotations

import csv
import re
from collections import Counter

from common.io.edges import printable
from common.schedule.action import Action, Op, Placement, Schedule, ScheduleError, require_size

_LETTERS = {Op.F: "F", Op.B: "I", Op.W: "W", Op.BW: "B"}
_OPS = {letter: op for op, letter in _LETTERS.items()}
# Digits are bounded as in our own text form.
_STEP = re.compile(r"(?P<stage>[0-9]{1,4})(?P<op>[FIWB])(?P<micro_batch>[0-9]{1,9})")
_IMPLIED = re.compile(r"[0-9]{1,4}((SEND|RECV)_[FB][0-9]{1,9}|UNSHARD|RESHARD|REDUCE_GRAD)")
_FIRST_CELL = re.compile(r"[\s\"(]*[0-9]+[A-Z]")

_Cell = tuple[int, Op, int]
"""(stage, operation, micro-batch)"""


def is_csv(text: str) -> bool:
    """Return whether the text is meant as such a file: our own lines have no comma, or a colon."""
    lines = (line.split("#", 1)[0] for line in text.splitlines())
    return any(":" not in x and ("," in x or _FIRST_CELL.match(x)) for x in lines)


def parse_csv(text: str, name: str = "file") -> Schedule:
    """Read such a file; stages belong to the rank in whose line they stand.

    A B whose W stands in the file too is the backward for the input alone, as PyTorch wrote it
    before it had the letter I. Raises ScheduleError with line and column (cells count from 1).
    """
    rows: list[list[_Cell]] = []
    home: dict[int, int] = {}  # the line of every stage
    reader = csv.reader(text.splitlines())
    try:
        for words in reader:
            if not words:
                continue
            rows.append([])
            for column, word in enumerate(words, start=1):
                where = f"line {reader.line_num}, column {column}"
                for cell in _read_cell(word.strip(), where):
                    line = home.setdefault(cell[0], reader.line_num)
                    if line != reader.line_num:
                        raise ScheduleError(
                            f"{where}: stage {cell[0]} stands in line {line} too; expected every "
                            "stage in the line of one rank"
                        )
                    rows[-1].append(cell)
            if not rows[-1]:
                raise ScheduleError(f"line {reader.line_num}: no action; expected a rank's actions")
    except csv.Error as error:
        raise ScheduleError(f"line {reader.line_num}: {error}; expected cells as 0F0,1I2") from None
    return _build(rows, name)


def _read_cell(word: str, where: str) -> list[_Cell]:
    if not word or _IMPLIED.fullmatch(word):
        return []
    match = _STEP.fullmatch(word)
    if match is None:
        raise ScheduleError(
            f"{where}: {printable(word)!r} is not an action; expected stage, F, I, W or B, and "
            "micro-batch, as in 0F0 or 3I12"
        )
    return [(int(match["stage"]), _OPS[match["op"]], int(match["micro_batch"]))]


def _build(rows: list[list[_Cell]], name: str) -> Schedule:
    held = [sorted({stage for stage, _, _ in row}) for row in rows]
    location = {k: (rank, chunk) for rank, own in enumerate(held) for chunk, k in enumerate(own)}
    done = {cell for row in rows for cell in row}
    if not done:
        raise ScheduleError("no action in it; expected one line per rank, such as: 0F0,0F1,0B0,0B1")
    if missing := set(range(max(location))) - set(location):
        raise ScheduleError(
            f"stage {min(missing)} stands in no line; expected stages 0 to {max(location)}"
        )

    def action(cell: _Cell) -> Action:
        stage, op, micro_batch = cell
        if op is Op.BW and (stage, Op.W, micro_batch) in done:
            op = op if (stage, Op.B, micro_batch) in done else Op.B
        return Action(op, micro_batch, location[stage][1])

    # One cell out of range must not make every other line incomplete: a stage's forwards count.
    forwards = Counter(stage for stage, op, _ in done if op is Op.F)
    num_micro_batches, num_chunks = max(forwards.values(), default=1), max(map(len, held))
    require_size(len(rows), num_micro_batches, num_chunks)
    devices = tuple(tuple(action(cell) for cell in row) for row in rows)
    placements: tuple[Placement, ...] = ("loop", "vee")
    for placement in placements:
        schedule = Schedule(name, devices, num_micro_batches, num_chunks, placement)
        if schedule.location == tuple(location[k] for k in sorted(location)):
            return schedule
    raise ScheduleError(
        f"stages {held} by rank; expected rank d to hold stages d, d + {len(rows)}, ... (a loop) "
        "or to go down the ranks and up again (a vee)"
    )


def format_csv(schedule: Schedule) -> str:
    """Return the schedule as such a file ("compute_only")."""
    return "".join(
        ",".join(
            f"{schedule.virtual_stage(device, a.chunk)}{_LETTERS[a.op]}{a.micro_batch}" for a in row
        )
        + "\n"
        for device, row in enumerate(schedule.devices)
    )
