"""When gradients are added up over replicas: chunk by chunk, while the pipeline still drains.

A chunk's gradient is whole after its last W or BW, and until the device's own list ends there is
often more to do: on device 0 of zb-v, chunk 1's last W comes well before chunk 0's.

    overlap   F0 F1 BW0 [BW1 of chunk 1] BW1 ...          a chunk's reduction starts behind the
                                        └─ reduce chunk 1    action that completes it
    flush     F0 F1 BW0  BW1 of chunk 1  BW1 ... ─ reduce all  and all at the end of the list
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.schedule.action import Action, Op


class Reduction:
    """Calls `start(chunk)` once for every chunk, as soon as its gradient is whole.

    `before` goes ahead of every action, as `run_stage` calls it: by then the action before has sent
    its result, which must not wait behind the reduction. `finish` goes behind the last.
    """

    def __init__(self, actions: Sequence[Action], start: Callable[[int], None], overlap: bool):
        last = {a.chunk: n for n, a in enumerate(actions) if a.op in (Op.W, Op.BW)}
        # [(place of the chunk's last weight gradient, chunk)], earliest first
        self._due = sorted((n, chunk) for chunk, n in last.items())
        self._start, self._overlap, self._done = start, overlap, 0

    def before(self) -> None:
        if self._overlap:
            while self._due and self._due[0][0] < self._done:
                self._start(self._due.pop(0)[1])
        self._done += 1

    def finish(self) -> None:
        while self._due:
            self._start(self._due.pop(0)[1])
