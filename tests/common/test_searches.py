"""Greedy and beam search, and what top k and top p leave, beside the transformers library."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.runtime.beams import Beams
from common.runtime.inference import Generated, Writing
from common.runtime.job import Generation
from common.runtime.oracle_worker import OracleEngine
from common.runtime.sampling import kept_tokens
from tests import searches

ROOT = Path(__file__).parents[2]


def found(search: searches.Search) -> Generated:
    """By the oracle, which has no cache."""
    engine = OracleEngine(searches.config(search.model))
    engine.reset(searches.weights(search.model))
    writing = Writing(search.wish, engine.config.model.context_length, 1)
    engine.decode(writing.feed)
    return writing.found()


def check(recorded: searches.Recorded) -> None:
    for search in recorded.searches:
        mine = found(search)
        if mine.closest_call > searches.NEAR:
            assert searches.difference(search, mine) is None
    for each in recorded.filters:
        wish = Generation(prompt=(), tokens=1, **each.model_dump(include={"top_k", "top_p"}))
        kept, _ = kept_tokens(np.array(each.logits) / each.temperature, wish)
        assert tuple(np.flatnonzero(kept).tolist()) == each.tokens, each


def test_recorded_searches_come_out_the_same() -> None:
    recorded = searches.recorded()
    check(recorded)
    # Of all kinds: greedy ones, ends of sequence, beams that end before the last token.
    lengths = {len(tokens) for search in recorded.searches for tokens in search.tokens}
    assert len(lengths) > 8 and {search.wish.num_beams for search in recorded.searches} >= {None, 6}
    early = [search for search in recorded.searches if len(search.tokens[0]) < search.wish.tokens]
    assert len({search.wish.early_stopping for search in early}) == 3


@pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")),
    reason="the transformers library is not installed",
)
def test_new_searches_come_out_the_same(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "found.json"), "60", "5", "100"]
    command = [sys.executable, "-m", "tests.references.search_reference", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    check(searches.Recorded.model_validate_json((tmp_path / "found.json").read_text()))


def test_a_search_says_how_close_its_closest_call_was() -> None:
    def search(gap: float, **changes: object) -> Beams:
        beams = Beams(Generation(prompt=(0,), tokens=1, num_beams=2, eos=3, **changes))
        assert beams.choose(np.array([[4.0, 3.0, 3.0 - gap, 0.0]])) == ()
        return beams

    assert search(0.25, samples=2).closest_call == pytest.approx(0.25)
    assert search(0.0, samples=2).closest_call == 0
    # Of the best alone, which is first by 1: what comes behind the second changes nothing.
    assert search(0.0, samples=1).closest_call == pytest.approx(1.0)
