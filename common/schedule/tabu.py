"""Improve an order step by step: tabu search, as for job shops (Nowicki and Smutnicki 1996).

    [1] Find a critical path: a chain of actions without a gap that ends last. Only a change on it
        can make the value smaller.
    [2] On it lie blocks of actions in a row on one device. A move swaps two neighbours of a block,
        or takes one action to its beginning or its end.
    [3] Of every move that keeps the order within the streams and the memory limit, guess the value:
        the longest path through what was moved, by the times before and behind it.
    [4] Make the best move, even one that makes things worse: that is the way out of a dead end. To
        put the same actions back is forbidden for some steps (tabu), unless it gives the best value
        so far.
    [5] After many steps without a better order go back to the best one and shake it.

Example: 2 stages, 2 micro-batches, F = B = W = 1. The critical path is marked by `*`; on device 1
it has the block F0 B0 W0 F1 B1:

    device 0  F0*  F1   ·    B0   W0   ·    B1*  W1*
    device 1  ·    F0*  B0*  W0*  F1*  B1*  W1

To take W0 to the end of the block lets B1 begin a step earlier on both devices, so that all ends at
7 instead of 8:

    device 0  F0   F1   ·    B0   W0   B1   W1
    device 1  ·    F0   B0   F1   B1   W0   W1
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from common.schedule.shop import ROUNDING, Rows, Shop

PATIENCE = 400  # steps without a better order before [5]


@dataclass(frozen=True, slots=True)
class _Move:
    """On device `d` the actions `first` to `last` become `order`; `moved` has changed sides."""

    d: int
    first: int
    order: list[int]
    moved: int
    later: bool  # whether `moved` goes to the end, not to the beginning

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield (a, b) for every two that change sides: a was before b."""
        for other in self.order:
            if other != self.moved:
                yield (self.moved, other) if self.later else (other, self.moved)


class Tabu:
    """One search, which can be continued. `rows` and `value` are the best so far."""

    def __init__(self, shop: Shop, rows: Rows, seed: int) -> None:
        # Chance with a seed: the same search gives the same schedule everywhere.
        self.shop, self.chance = shop, random.Random(seed)
        self.rows = rows
        self._start_from(rows)
        self.value = shop.value(self.current, self.times)
        self.steps, self.stuck = 0, 0

    def run(self, steps: int, good_enough: float) -> None:
        """Take so many steps, fewer if the value gets down to `good_enough`."""
        for _ in range(steps):
            if self.value <= good_enough + ROUNDING:
                return
            self.steps += 1
            self._step()
            if self.stuck > PATIENCE:
                self._shake()

    def _start_from(self, rows: Rows) -> None:
        shop = self.shop
        self.current = [list(row) for row in rows]
        self.times = shop.play(rows)
        self.forbidden: dict[tuple[int, int], int] = {}  # (a, b): a before b, until this step
        self.place = [0] * shop.num_actions  # in its row
        self.held = [0.0] * shop.num_actions  # on its device, after it
        self.previous, self.following = [-1] * shop.num_actions, [-1] * shop.num_actions
        for d in range(shop.p):
            self._index(d, 0, len(rows[d]))

    def _index(self, d: int, start: int, stop: int) -> None:
        """Note where the actions of a part of a row are now."""
        row = self.current[d]
        before = row[start - 1] if start else -1
        held = self.held[before] if start else 0.0
        # Each row is a list linked both ways: a critical path goes from neighbour to neighbour.
        for at in range(start, stop):
            a = row[at]
            held += self.shop.holds[a]
            self.place[a], self.held[a], self.previous[a] = at, held, before
            if before >= 0:
                self.following[before] = a
            before = a
        self.following[before] = row[stop] if stop < len(row) else -1
        if stop < len(row):
            self.previous[row[stop]] = before

    def _step(self) -> None:
        left = self.shop.time_left(self.following, self.times.order)
        best: tuple[float, _Move] | None = None
        for move in self._moves(self._critical_path()):
            value = self._guess(move, left)
            # A forbidden move is made all the same where it beats the best order so far.
            if value is None or (
                value >= self.value - ROUNDING
                and any(self.forbidden.get((b, a), -1) >= self.steps for a, b in move.pairs())
            ):
                continue
            value += self.chance.random() * ROUNDING  # of equal ones any
            if best is None or value < best[0]:
                best = value, move
        if best is None:
            # All moves are forbidden or break a rule: a few such steps in a row lead to a shake.
            self.stuck += PATIENCE // 4
        else:
            self._make(best[1])

    def _critical_path(self) -> list[int]:  # [1]
        shop, start, end = self.shop, self.times.start, self.times.end
        value = shop.value(self.current, self.times)
        a = self.chance.choice(
            [
                row[-1]
                for row, after in zip(self.current, shop.after_last, strict=True)
                if end[row[-1]] + after >= value - ROUNDING
            ]
        )
        path = []
        # Backwards: an action starts when its neighbour on the device ends or its message comes. If
        # both do at once there are two critical paths, and chance takes one.
        while a >= 0:
            path.append(a)
            waits_for = []
            if (b := self.previous[a]) >= 0 and end[b] >= start[a] - ROUNDING:
                waits_for.append(b)
            if (b := shop.before[a]) >= 0 and end[b] + shop.delay[a] >= start[a] - ROUNDING:
                waits_for.append(b)
            a = self.chance.choice(waits_for) if waits_for else -1
        path.reverse()
        return path

    def _moves(self, path: list[int]) -> Iterator[_Move]:  # [2]
        start = 0
        for n in range(1, len(path) + 1):
            if n < len(path) and self.previous[path[n]] == path[n - 1]:
                continue
            block = path[start:n]
            start = n
            d, first = self.shop.device[block[0]], self.place[block[0]]
            last = len(block) - 1
            # In a block of n: n - 1 swaps of neighbours; then each action but the last two behind
            # the others, and each but the first two ahead of them. Those two would be swaps again.
            for x in range(last):
                yield _Move(d, first + x, [block[x + 1], block[x]], block[x], True)
            for x in range(last - 1):
                yield _Move(d, first + x, [*block[x + 1 :], block[x]], block[x], True)
            for x in range(2, last + 1):
                yield _Move(d, first, [block[x], *block[:x]], block[x], False)

    def _guess(self, move: _Move, left: list[float]) -> float | None:  # [3]
        """Return the value after the move, or a little less; None if it is not allowed."""
        shop, m = self.shop, self.shop.m
        # Not allowed: another order of the micro-batches of one stream (a // m), and an action
        # ahead of the one that it waits for.
        for a, b in move.pairs():
            if a // m == b // m or shop.before[b] == a:
                return None
        row, end = self.current[move.d], self.times.end
        at = row[move.first - 1] if move.first else -1
        now, held = (end[at], self.held[at]) if at >= 0 else (0.0, 0.0)
        starts: list[float] = []
        ends: dict[int, float] = {}
        for a in move.order:
            held += shop.holds[a]
            if held > shop.memory_limit[move.d]:
                return None
            if (sender := shop.before[a]) >= 0:
                now = max(now, ends.get(sender, end[sender]) + shop.delay[a])
            starts.append(now)
            ends[a] = now = now + shop.duration[a]
        # So far: when each action could start if nothing else moved. Now, backwards from what
        # follows, how much is still to come from each on. The largest sum of the two is the guess.
        # What the move delays elsewhere, and thereby here again, is left out.
        stop = move.first + len(move.order)
        then = left[row[stop]] if stop < len(row) else shop.after_last[move.d]
        value = 0.0
        moved: dict[int, float] = {}
        for a, start in zip(reversed(move.order), reversed(starts), strict=True):
            for b in (shop.next[a], shop.weight[a]):
                if b >= 0:
                    then = max(then, moved.get(b, left[b]) + shop.delay[b])
            moved[a] = then = then + shop.duration[a]
            value = max(value, start + then)
        return value

    def _make(self, move: _Move) -> None:  # [4]
        row, stop = self.current[move.d], move.first + len(move.order)
        old, row[move.first : stop] = row[move.first : stop], move.order
        times = self.shop.play(self.current)
        # What waits for itself in a circle over two devices is never played to its end.
        possible = len(times.order) == self.shop.num_actions
        # About as many steps as a row has actions to swap; longer for what would never end.
        tenure = 8 + len(row) // 6
        until = self.steps + tenure + (self.chance.randrange(tenure) if possible else 3 * tenure)
        if not possible:
            row[move.first : stop] = old
            for a, b in move.pairs():
                self.forbidden[b, a] = until
            return
        for pair in move.pairs():
            self.forbidden[pair] = until
        self.times = times
        self._index(move.d, move.first, stop)
        value = self.shop.value(self.current, times)
        self.stuck += 1
        if value < self.value - ROUNDING:
            self.value, self.rows, self.stuck = value, [list(row) for row in self.current], 0

    def _shake(self) -> None:  # [5]
        self._start_from(self.rows)
        self.stuck = 0
        # Swaps at random; `_guess` is asked for the rules alone, its value does not matter.
        for _ in range(self.chance.randint(3, 12)):
            d = self.chance.randrange(self.shop.p)
            x = self.chance.randrange(len(self.rows[d]) - 1)
            a, b = self.current[d][x : x + 2]
            move = _Move(d, x, [b, a], a, True)
            if self._guess(move, [0.0] * self.shop.num_actions) is not None:
                self._make(move)
