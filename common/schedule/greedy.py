"""A first order for any costs and memory limit: what can start first is started first.

[1] The next action of a stream can start once its input is there and the device is free.
[2] F needs room, and must leave room for the forwards that the oldest micro-batch still has to
    do on this device. So the oldest gets through and frees what it holds; without this rule
    devices could wait for room for ever.
[3] Of these a device takes the one that starts first. To F and W a handicap is added, for a B,
    which the devices before need, is worth a short wait. Of two alike it takes the later
    virtual stage.
[4] The earliest of all devices' choices is carried out. Then this device chooses again, and so
    does the one that gets its message.
"""

from __future__ import annotations

import heapq

from common.schedule.shop import ROUNDING, Rows, Shop


def greedy(shop: Shop, handicaps: tuple[float, float], in_flight: int) -> Rows | None:
    """Return an order; None if none was found.

    `handicaps` are those of F and W, as shares of what these take. At most `in_flight` (p - d)
    micro-batches are between their first F and their last B on device d.
    """
    p, m, v, stages = shop.p, shop.m, shop.v, shop.stages
    # A stream is one operation of one virtual stage, which takes the micro-batches in turn: stream
    # code * stages + k has the actions from stream * m on. Of equally good ones `choose` takes the
    # first in this list: B before F and W, later stages before earlier ones. [3]
    streams: list[list[int]] = [[] for _ in range(p)]
    for code in (1, 0, 2):
        for k in reversed(range(stages)):
            streams[shop.shape.location[k][0]].append(code * stages + k)
    handicap = (handicaps[0], 0.0, handicaps[1])
    done = [0] * (3 * stages)  # actions of each stream
    end = [-1.0] * shop.num_actions
    free, held = [0.0] * p, [0.0] * p
    # What the memory rule counts: a micro-batch that has entered must be able to come out again.
    forwards = [[0] * m for _ in range(p)]  # of each micro-batch on each device
    oldest = [0] * p  # the first micro-batch with a forward to come
    rows: Rows = [[] for _ in range(p)]

    def has_room(d: int, i: int) -> bool:  # [2]
        first = streams[d][v - 1]  # the B of the device's first virtual stage
        if not forwards[d][i] and i - done[first] >= in_flight * (p - d):
            return False
        # Say v = 2, with room for 2 chunks, and micro-batch 0 has been through one of them. An F of
        # micro-batch 1 would take the other place for good: micro-batch 0 could never come to its
        # second F here, so no B would ever free anything.
        reserved = v - forwards[d][oldest[d]] if i > oldest[d] else 0
        return held[d] + 1 + reserved <= shop.memory_limit[d]

    events: list[tuple[float, int, int]] = []  # (start, device, action), by start
    chosen = [-1] * p

    def choose(d: int) -> None:
        best = float("inf")
        for stream in streams[d]:
            i, code = done[stream], stream // stages
            if i == m:
                continue
            a = stream * m + i
            sender = shop.before[a]
            if (sender >= 0 and end[sender] < 0) or (code == 0 and not has_room(d, i)):
                continue
            start = max(free[d], end[sender] + shop.delay[a] if sender >= 0 else 0.0)  # [1]
            key = start + handicap[code] * shop.duration[a]  # [3]
            if key < best - ROUNDING:
                best, chosen[d], event = key, a, (start, d, a)
        if best < float("inf"):
            heapq.heappush(events, event)

    choose(0)  # the others have no input yet
    while events:
        start, d, a = heapq.heappop(events)  # [4]
        if a != chosen[d] or end[a] >= 0 or start < free[d]:
            continue  # the device has chosen anew since; a heap cannot take the old entry back
        stream, i = divmod(a, m)
        free[d] = end[a] = start + shop.duration[a]
        held[d] += shop.holds[a]
        done[stream] += 1
        rows[d].append(a)
        if stream < stages:
            forwards[d][i] += 1
            while oldest[d] < m and forwards[d][oldest[d]] == v:
                oldest[d] += 1
        choose(d)
        receiver = shop.next[a]
        if receiver >= 0 and shop.device[receiver] != d:
            choose(shop.device[receiver])
    return rows if all(len(row) == 3 * m * v for row in rows) else None
