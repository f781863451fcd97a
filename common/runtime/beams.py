"""Beam search, with the rules of the transformers library (`GenerationMixin._beam_search`, 5.x).

With n beams, every token does this:

    [1] candidates    the 2n likeliest of all beams' continuations, by the sum of log-probabilities
    [2] finish        those of the first n that end (by the end of sequence, or all of them at the
                      last token), with the score sum / (new tokens) ^ length penalty; the n best
                      that have ever finished are kept
    [3] go on         with the n best that do not end
    [4] stop          once n have finished and no beam can beat the worst of them: its sum so far,
                      as if it ended now (`early_stopping = never`: at the last token, where the
                      penalty favours length), or at once (`yes`)

2n candidates: each beam can end with one, and n go on. One that ends behind the first n is lost.

Sums are float64 here and float32 in the library, so the two may part at a near-tie: the closest
call says how near any was, in log-probability, or in score where finished ones are compared.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.runtime.job import Generation


class Beam(NamedTuple):
    """A sequence with its sum of log-probabilities, or with its score once it has finished."""

    score: float
    text: list[int]
    """The prompt and the new tokens."""


class Beams:
    """One search."""

    def __init__(self, wish: Generation) -> None:
        self._wish, self._count = wish, wish.num_beams or 1
        # One row until the beams part: the library has n equal ones and lets the first alone count.
        self._running = [Beam(0.0, list(wish.prompt))]
        self._finished: list[Beam] = []
        """At most n, the best first."""
        self._length = 0
        self.closest_call = math.inf

    @property
    def texts(self) -> list[list[int]]:
        """The beams that go on, the best first, prompt included."""
        return [beam.text for beam in self._running]

    def choose(self, logits: NDArray[np.float64]) -> tuple[int, ...]:
        """Add a token to every beam; return the rows of `logits` (b, V) that they go on from."""
        wish, n = self._wish, self._count
        self._length += 1
        at_end = self._length == wish.tokens
        # One more than is looked at: what comes next says how close it was.
        candidates = self._candidates(logits, 2 * n + 1)
        ends = [at_end or token == wish.eos for _, _, token in candidates]
        before, self._running = self._running, []
        rows: list[int] = []
        finished: list[Beam] = []
        # [2] and [3] in one walk, the likeliest first: n = 2 has 4 candidates, of which 2 go on.
        for rank, (total, row, token) in enumerate(candidates[: 2 * n]):
            text = [*before[row].text, token]
            if not ends[rank] and len(rows) < n:
                self._running.append(Beam(total, text))
                rows.append(row)
            elif ends[rank] and rank < n:
                finished.append(Beam(total / self._scale(self._length), text))
        ranked = sorted(self._finished + finished, key=lambda beam: -beam.score)
        self._finished = ranked[:n]
        totals = [total for total, _, _ in candidates]
        if not at_end:
            self._note_candidates(totals, ends)
            self._note([beam.score for beam in ranked[n - 1 : n + 1]])
        elif wish.samples == n:
            self._note(totals[n - 1 : n + 1])
        if at_end or self._stops():
            self._note([beam.score for beam in ranked[: wish.samples + 1]])
            return ()
        return tuple(rows)

    def found(self) -> list[list[int]]:
        """Return the new tokens of the best, the end of sequence included."""
        best = self._finished[: self._wish.samples]
        return [beam.text[len(self._wish.prompt) :] for beam in best]

    def scores(self) -> list[float]:
        """Return the scores of `found`."""
        return [beam.score for beam in self._finished[: self._wish.samples]]

    def _candidates(self, logits: NDArray[np.float64], count: int) -> list[tuple[float, int, int]]:
        """The likeliest (sum, row, token), the best first; of equals the lower row and token."""
        shifted = logits - logits.max(-1, keepdims=True)
        chances = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))  # (b, V)
        totals = (chances + np.array([[beam.score] for beam in self._running])).ravel()
        count = min(count, len(totals))
        # The count-th largest without sorting V x n numbers; what equals it is sorted with the
        # rest, so that ties go to the lower row and token.
        least = np.partition(totals, len(totals) - count)[len(totals) - count]
        places = np.flatnonzero(totals >= least)  # of beam x V + token
        places = places[np.argsort(-totals[places], kind="stable")][:count]
        vocab_size = logits.shape[1]
        return [(float(totals[p]), int(p // vocab_size), int(p % vocab_size)) for p in places]

    def _scale(self, length: int) -> float:
        return float(length**self._wish.length_penalty)

    def _stops(self) -> bool:
        wish = self._wish
        if len(self._finished) < self._count:
            return False
        if wish.early_stopping == "yes":
            return True
        at_best = wish.early_stopping == "never" and wish.length_penalty > 0
        length = wish.tokens if at_best else self._length
        hoped, worst = self._running[0].score / self._scale(length), self._finished[-1].score
        self._note([max(hoped, worst), min(hoped, worst)])
        return hoped <= worst

    def _note_candidates(self, totals: list[float], ends: list[bool]) -> None:
        """Note what a little more or less would have changed: who goes on, and who finishes."""
        n = self._count
        going = [total for total, end in zip(totals, ends, strict=True) if not end]
        self._note(going[n - 1 : n + 1])
        for rank, end in enumerate(ends[: 2 * n]):
            # In front of the first that is too late to finish, or behind the last that is not.
            other = n if rank < n else n - 1
            if end and other < len(totals):
                self._note(sorted((totals[rank], totals[other]), reverse=True))

    def _note(self, falling: list[float]) -> None:
        """Note the distances between neighbours."""
        gaps = -np.diff(falling)
        self.closest_call = min(self.closest_call, float(gaps.min(initial=math.inf)))
