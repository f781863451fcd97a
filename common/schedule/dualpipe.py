"""DualPipeV: a forward and a backward at the same time, on every device, in a V (DeepSeek-AI 2024,
"DeepSeek-V3 Technical Report", section 3.2.1, without the second copy of the model)."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace

from common.schedule.action import Action, Op, Schedule, ScheduleError

F0, F1 = Action(Op.F, 0, 0), Action(Op.F, 0, 1)
B0, B1 = Action(Op.B, 0, 0), Action(Op.B, 0, 1)
BW0, BW1 = Action(Op.BW, 0, 0), Action(Op.BW, 0, 1)
WITH_BW0, WITH_BW1 = replace(BW0, overlaps=True), replace(BW1, overlaps=True)
W = Action(Op.W, 0)


def dualpipev(p: int, m: int) -> Schedule:
    """Run a forward of one chunk at the same time as a backward of the other, for m >= 2p.

    Each of the two computes while the other one's messages are on their way. Every device holds at
    most 2p + 1 chunks, p + 1/2 activations.

        device 0 F0── F1── F2── F0.1 B0.1 W0.1 F1.1 (F3&BW1.1)──── ·    (F2.1&BW0)──── BW2.1──── · ...
        device 1 ·    F0── F0.1 F1── F1.1 F2── BW0.1──── (F2.1&BW0)──── (F3&BW1.1)──── (F3.1&BW1)──── ...
    """  # noqa: E501
    if m < 2 * p:
        raise ScheduleError(
            f"schedule dualpipev: {m} micro-batches on {p} stages; expected at least {2 * p}"
        )
    return Schedule("dualpipev", tuple(_row(p, m, d) for d in range(p)), m, 2, "vee")


def _row(p: int, m: int, d: int) -> tuple[Action, ...]:
    # `plan` has the eight steps of the authors' program, one after another. On device 0 of 2 with 4
    # micro-batches (.1 is chunk 1):
    #     nF0      nF0F1      nB1W1F1           nF0B1F1B0                 nB1F1B0
    #     F0 F1    F2 F0.1    B0.1 W0.1 F1.1    (F3&BW1.1) (F2.1&BW0)     BW2.1 (F3.1&BW1)
    #     nB1B0       nWB0     nW
    #     BW3.1 B2    W2 B3    W3
    # Devices further down the V: each needs a forward of its own before the first one comes back
    # up.
    below = p - 1 - d
    pairs = (m - 2 * p + d + 1) * [F0, WITH_BW1, F1, WITH_BW0]
    if below == 0:
        pairs[1] = BW1  # nobody waits for this forward yet
    last = (d + 1) * [BW1, BW0]
    # Split from the middle on, for those who wait for B; the Ws follow at the end.
    last[d + 1 :] = [B1 if each is BW1 else B0 for each in last[d + 1 :]]
    plan = [
        *(2 * below * [F0] + (d + 1) * [F0, F1] + below * [B1, W, F1]),
        *(pairs + below * [BW1, F1, WITH_BW0] + last),
        *(below * [W, B0] + (d + 1) * [W]),
    ]
    # Every operation takes the micro-batches in turn, W the oldest B that waits for it.
    # By (forward?, chunk): how many micro-batches have had it.
    done: Counter[tuple[bool, int]] = Counter()
    late: deque[Action] = deque()
    row = []
    for action in plan:
        if action is W:
            row.append(replace(late.popleft(), op=Op.W))
            continue
        kind = action.op is Op.F, action.chunk
        row.append(replace(action, micro_batch=done[kind]))
        done[kind] += 1
        if action.op is Op.B:
            late.append(row[-1])
    return tuple(row)
