"""One forward, one backward in turn: 1F1B, and what it becomes with several chunks per device.

Micro-batches go through the chunks in groups: one group through chunk 0, the same through chunk 1,
and so on; backwards from the last chunk to chunk 0. All schedules here are one loop over these two
orders (`rows`). They differ in how many forwards a device runs before its first backward, and in
what a backward is:

                          warm-up of device d, groups of g    a backward is
    1f1b                  p-1-d                               BW
    interleaved           (v-1) g + 2 (p-1-d)                 BW
    interleaved, short    (v-1) g + p-1-d                     BW
    interleaved-overlap   (v-1) g + 2 (p-1-d) + 1             BW, together with a forward
    interleaved-zb        (v-1) g + p-1-d                     B, and W after d further ones
    zb-h2                 2 (p-1-d)                           B, and W after 2d further ones
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from common.schedule.action import Action, Op, Schedule, ScheduleError
from common.schedule.validate import validate


def one_f_one_b(p: int, m: int) -> Schedule:
    """Run warm-up forwards, then a forward and a backward in turn (PipeDream-Flush).

    Narayanan et al. 2019.

    GPipe's bubble, but only min(p - i, m) activations in flight on device i.

        device 0 F0 F1 ·  ·  BW0── F2 BW1── F3 BW2── ·  BW3──
        device 1 ·  F0 BW0── F1 BW1── F2 BW2── F3 BW3──
    """
    # Warm-up: a forward for each of the p - 1 - d devices below: F0 passes them before BW0 is back.
    return Schedule("1f1b", rows(p, [range(m)], 1, lambda d: p - 1 - d), m)


def interleaved(
    p: int, m: int, v: int, group_size: int | None = None, short: bool = False
) -> Schedule:
    """Run 1F1B with v chunks per device (Narayanan et al. 2021): its bubble time divided by v.

    Megatron-LM's groups have p micro-batches or `group_size`
    (`microbatch-group-size-per-vp-stage`), and its m is a multiple of p. Here m is cut into m // p
    groups that differ by one at most, which is Megatron's schedule where it exists, and keeps the
    bubble of (p-1)(F+B+W)/v for every m from p upwards; for m < p there is one group. The warm-up
    of device i is 2(p-i-1) + (v-1)(largest group) chunks, so 2(p-i-1) + (v-1)p + 1 chunks are in
    flight where p divides m.

    `short` leaves p-i-1 of these out (Paddle's balanced schedule, which has one group). That costs
    nothing where messages take no time, and holds up to p - 1 chunks less; else every hop down and
    up between two neighbours is waited for.

        device 0 F0── F1── F0.1 F1.1 F2── ·    BW0.1──── F3── BW1.1──── F2.1 BW0────── F3.1 BW1────── · ...
        device 1 ·    F0── F1── F0.1 BW0.1──── F1.1 BW1.1──── F2── BW0────── F3── BW1────── F2.1 BW2.1──── F3.1 ...
    """  # noqa: E501
    if group_size is not None and not 1 <= group_size <= m:
        raise ScheduleError(f"groups of {group_size} micro-batches; expected 1 to {m}")
    # 6 micro-batches over 2 devices: groups of 2, so 0 1 through chunk 0, 0 1 through chunk 1, then
    # 2 3, and so on. Larger groups hold more activations.
    groups = _groups(p, m, group_size)
    # Warm-up: a whole group through all chunks but the last; and 2 for each device below, which the
    # first micro-batch of the last chunk passes on its way down and again on its way back.
    hops = 1 if short else 2
    first_chunks = (v - 1) * len(groups[0])
    found = rows(p, groups, v, lambda d: first_chunks + hops * (p - 1 - d))
    schedule = Schedule("interleaved", found, m, v)
    if group_size is not None and validate(schedule):
        raise ScheduleError(
            f"groups of {group_size} of {m} micro-batches on {p} stages would wait for one "
            f"another; expected a size, and a rest if there is one, of at least {p}"
        )
    return schedule


def interleaved_overlap(p: int, m: int, v: int) -> Schedule:
    """Run every forward of the steady state at the same time as the backward after it.

    Megatron-LM's `overlap_moe_expert_parallel_comm`: while one of the two waits for the experts of
    other devices, the other computes. One more forward in the warm-up makes the two independent.
    Of the mv forwards on a device, mv - p(v-1) - 1 become pairs in the longest chain: with a time X
    of a pair between those of its longer half and of both, and p a divisor of m, the makespan is
    (p-1)T/v + (p(v-1)+1)T/v + (mv-p(v-1)-1)X/v, where T = F + B + W.

        device 0 F0── F1── F0.1 F1.1 F2── ·    ·    (F3&BW0.1)──── (F2.1&BW1.1)── (F3.1&BW0)──── BW1────── ...
        device 1 ·    F0── F1── F0.1 (F1.1&BW0.1)── (F2&BW1.1)──── (F3&BW0)────── (F2.1&BW1)──── ...
    """  # noqa: E501
    groups = _groups(p, m)
    most = (v - 1) * len(groups[0]) + 1
    found = rows(p, groups, v, lambda d: most + 2 * (p - 1 - d), overlap=True)
    return Schedule("interleaved-overlap", found, m, v)


def interleaved_zb(p: int, m: int, v: int) -> Schedule:
    """Split the backward of the interleaved schedule, and put W off as ZB-H1 does.

    PyTorch's `ScheduleInterleavedZeroBubble`; with one chunk it is ZB-H1 (Qi et al. 2024). Where p
    divides m: bubble time (p-1)(F+B-W)/v, and at most p activations in flight, 1F1B's peak.

        device 0 F0── F1── F0.1 F1.1 ·    B0.1 W0.1 F2── B1.1 W1.1 F3── B0── W0── F2.1 B1── W1── F3.1 B2.1 ...
        device 1 ·    F0── F1── F0.1 B0.1 F1.1 B1.1 W0.1 F2── B0── W1.1 F3── B1── W0── F2.1 B2.1 W1── F3.1 ...
    """  # noqa: E501
    groups = _groups(p, m)
    first_chunks = (v - 1) * len(groups[0])
    found = rows(p, groups, v, lambda d: first_chunks + p - 1 - d, delay=lambda d: d)
    return Schedule("interleaved-zb", found, m, v)


def rows(
    p: int,
    groups: Sequence[range],
    v: int,
    warmup: Callable[[int], int],
    delay: Callable[[int], int] | None = None,
    overlap: bool = False,
) -> tuple[tuple[Action, ...], ...]:
    """Return `warmup(d)` forwards, then a forward and a backward in turn, then what is left.

    With a `delay` a backward is B, and the W of the one `delay(d)` backwards before follows it.
    With `overlap` every forward and the backward after it run at the same time.
    """
    # Two orders are all that a device needs; when it changes from one to the other is its warm-up.
    forwards = [Action(Op.F, i, c) for group in groups for c in range(v) for i in group]
    order = [(i, c) for group in groups for c in reversed(range(v)) for i in group]
    backwards = [Action(Op.BW if delay is None else Op.B, i, c) for i, c in order]
    weights = [Action(Op.W, i, c) for i, c in order]
    together = [replace(each, overlaps=True) for each in backwards] if overlap else backwards

    # Device 0 of 2 with 3 micro-batches. The columns of `turns`, from left to right, are the row
    # after its warm-up:
    #     1f1b, warm-up F0:                     zb, warm-up F0 and a delay of 1:
    #     forwards    F1   F2   ·                forwards    F1   F2   ·    ·
    #     backwards   BW0  BW1  BW2              backwards   B0   B1   B2   ·
    #                                            late        ·    W0   W1   W2
    def row(d: int) -> tuple[Action, ...]:
        first = min(warmup(d), len(forwards))
        pairs = len(forwards) - first
        late = [] if delay is None else [*[None] * delay(d), *weights]
        turns = itertools.zip_longest(
            forwards[first:], [*together[:pairs], *backwards[pairs:]], late
        )
        return (*forwards[:first], *filter(None, itertools.chain.from_iterable(turns)))

    return tuple(row(d) for d in range(p))


def _groups(p: int, m: int, size: int | None = None) -> list[range]:
    """Cut 0 to m - 1 into runs of `size` and a rest, or into m // p runs, the longer ones first."""
    if size is not None:
        return [range(a, min(a + size, m)) for a in range(0, m, size)]
    count = max(1, m // p)
    # 7 micro-batches over 3 devices: 2 groups, of 4 and 3.
    size, longer = divmod(m, count)
    starts = [g * size + min(g, longer) for g in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]
