"""A value that no order can beat.

On every device d each of these must fit in:

    [1] work    its first F cannot start before a micro-batch gets there. Then come all of its F, B
                and W, and the part of the wait for its first B that Fs cannot fill: memory has room
                for so many only
    [2] last B  the same with its F and B alone; after the last B there is the rest of a
                micro-batch's way
    [3] last F  before it come the other Fs, and as many B and W as make room for it; after it there
                is the rest of a micro-batch's way

A way is that of a micro-batch that is alone in the pipeline.

Example: the plain makespan of 2 stages and 3 micro-batches, F = B = W = 1, with room for 2
activations, of which B keeps half for W. Device 0 can start its first B at 3, after F, F and B; two
Fs fill 2 of that, so it is idle for 1:

    [1] 1 + 3 (F + B + W) = 10
    [2] 1 + 3 (F + B) + W = 8
    [3] 1 + 2 F + B + W = 5, which is when the last F can start; 5 + F + F + B + B + W = 10

zb-h1 ends at 10, so no order is better.
"""

from __future__ import annotations

import math

from common.schedule.shop import ROUNDING, Shop


def lower_bound(shop: Shop) -> float:
    """Return a value, in the unit of the costs, that no order of this shop can beat."""
    m, stages = shop.m, shop.stages
    # One micro-batch alone in the pipeline waits for no device: its times are the least there are.
    alone = Shop(
        shop.p, 1, shop.v, shop.shape.placement, shop.costs, [1.0] * shop.p, shop.objective
    )
    # The way of one micro-batch: down, up, and the Ws. With m = 1 an action is its stream.
    way = [*range(stages), *reversed(range(stages, 2 * stages)), *range(2 * stages, 3 * stages)]
    start = [0.0] * len(way)
    for a in way:
        if (b := alone.before[a]) >= 0:
            start[a] = start[b] + alone.duration[b] + alone.delay[a]
    left = alone.time_left([-1] * len(way), way)
    bounds = [0.0]
    for d in range(shop.p):
        forward, backward, weight = (
            [a for a in range(n * stages, (n + 1) * stages) if alone.device[a] == d]
            for n in range(3)
        )
        one_of = [[alone.duration[a] for a in each] for each in (forward, backward, weight)]
        first = min(start[a] for a in forward)
        # Fs that fit in memory without any B, the longest ones.
        # With room for 2 activations, two Fs fill 2 of the wait for the first B; the rest is idle.
        room = min(math.floor(shop.memory_limit[d]), m * shop.v)
        filled = sum(sorted(one_of[0] * m)[-room:])
        idle = max(0.0, min(start[a] for a in backward) - first - filled)
        work = [m * sum(each) for each in one_of]
        bounds += [
            first + idle + sum(work) + shop.after_last[d],  # [1]
            first + idle + work[0] + work[1] + min(left[a] - alone.duration[a] for a in backward),
            _last_forward(shop, d, one_of, first, idle) + min(left[a] for a in forward),  # [3]
        ]
    return max(bounds)


def _last_forward(
    shop: Shop, d: int, one_of: list[list[float]], first: float, idle: float
) -> float:
    """Return when the last F of device d can start at the earliest."""
    kept, count = shop.costs.kept_by_backward_input, shop.m * shop.v
    others = shop.m * sum(one_of[0]) - max(one_of[0])
    earliest = float("inf")
    # Of all chunks `done` have had their B. The others are held whole, and of these what B keeps.
    for done in range(count):
        over = count - done + kept * done - shop.memory_limit[d]
        if over <= kept * done:
            weights = math.ceil(over / kept - ROUNDING) if over > 0 else 0
            room = done * min(one_of[1]) + weights * min(one_of[2])
            earliest = min(earliest, first + others + room + (idle if done else 0.0))
    return earliest
