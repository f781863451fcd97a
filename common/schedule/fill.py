"""Where to run W: nobody waits for it, so it fills the gaps that the costs leave.

The order of F and B is given. A device that is about to wait for its next F or B first runs the
oldest W of its backlog if

    [1] memory is full: W makes room
    [2] the wait is long enough for the whole of W: that delays nothing
    [3] the device cannot afford to wait: W delays what comes next, by less than the wait

[3] is a matter of balance. A device may wait as long as that does not make it the last to end, if
it is not idle again; or as long as it still ends by a target. An early target fills gaps with more
delay than need be, a late one leaves gaps that add up. `fill` tries several.

Example: W = 1, two devices with as much to do, and device 0 is about to wait 0.5 for B7. If device
1 has been idle for 0.5 longer so far, device 0 waits. If not, it runs a W and starts B7 0.5 late.
"""

from __future__ import annotations

from collections import deque

from common.schedule.shop import ROUNDING, Rows, Shop

TARGETS = 20
"""So many by bisection, then as many evenly spaced."""


def fill(shop: Shop, rows: Rows, targets: int = TARGETS) -> Rows | None:
    """Return `rows` with every W where it suits the costs; None if none fits in memory."""
    best: tuple[float, Rows] | None = None

    def attempt(target: float) -> float:
        nonlocal best
        if (found := fill_by(shop, rows, target)) is None:
            return float("inf")
        value = shop.value(found, shop.play(found))
        if best is None or value < best[0]:
            best = value, found
        return value

    # No order ends before the busiest device could; without any target nothing is ever put off.
    earliest, latest = max(shop.never_idle), attempt(float("inf"))
    if best is None or latest <= earliest + ROUNDING:
        return None if best is None else best[1]
    latest = min(latest, attempt(earliest))
    # Bisection: a target that was kept could be earlier still, one that was missed is too early.
    for _ in range(targets):
        target = (earliest + latest) / 2
        if attempt(target) <= target + ROUNDING:
            latest = target
        else:
            earliest = target
        latest = min(latest, best[0])
    # A later target does not always end later, so what bisection has passed over is looked at too.
    earliest, latest = max(shop.never_idle), best[0]
    for n in range(1, targets):
        attempt(earliest + (latest - earliest) * n / targets)
    return best[1]


def fill_by(shop: Shop, rows: Rows, target: float) -> Rows | None:
    """Return the same for one target of [3]. The loop is that of `Shop.play`."""
    filled: Rows = [[] for _ in range(shop.p)]
    first_weight = 2 * shop.stages * shop.m
    orders = [[a for a in row if a < first_weight] for row in rows]
    backlog = [deque[int]() for _ in range(shop.p)]
    held, clock, reached = [0.0] * shop.p, [0.0] * shop.p, [0] * shop.p
    ends_by = list(shop.never_idle)  # each device's share of the value if it is not idle again
    end = [-1.0] * shop.num_actions
    waiting: dict[int, int] = {}  # action: the device whose next action waits for it

    def run(d: int, a: int) -> None:
        clock[d] = end[a] = clock[d] + shop.duration[a]
        held[d] += shop.holds[a]
        filled[d].append(a)

    # A device runs until it needs an action that has not run; that one makes it runnable again.
    runnable = list(range(shop.p))
    while runnable:
        d = runnable.pop()
        while reached[d] < len(orders[d]):
            a = orders[d][reached[d]]
            sender = shop.before[a]
            if sender >= 0 and end[sender] < 0:
                waiting[sender] = d
                break
            ready = end[sender] + shop.delay[a] if sender >= 0 else 0.0
            while backlog[d]:
                wait = ready - clock[d]
                if (
                    held[d] + shop.holds[a] <= shop.memory_limit[d]  # [1]
                    and wait < shop.duration[backlog[d][0]] - ROUNDING  # [2]
                    and ends_by[d] + wait <= max(target, *ends_by) + ROUNDING  # [3]
                ):
                    break
                run(d, backlog[d].popleft())
            if held[d] + shop.holds[a] > shop.memory_limit[d]:
                return None  # every W is done, and there is still no room for this F
            if filled[d]:  # before its first forward no device counts as idle
                ends_by[d] += max(ready - clock[d], 0.0)
            clock[d] = max(ready, clock[d])
            run(d, a)
            if (weight := shop.weight[a]) >= 0:
                backlog[d].append(weight)
            if a in waiting:
                runnable.append(waiting.pop(a))
            reached[d] += 1
        if reached[d] == len(orders[d]):
            while backlog[d]:
                run(d, backlog[d].popleft())
    return filled
