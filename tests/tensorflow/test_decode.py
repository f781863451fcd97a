"""Generation with a cache on every stage, beside the oracle, which has none, and transformers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import Make, check_decoding, check_searches


@pytest.mark.parametrize(
    ("kind", "stages", "schedule", "run"),
    [
        ("greedy", 2, "gpipe", {}),
        ("sampled", 1, "1f1b", {}),
        ("sampled", 2, "zb-v", {"chunks": 2}),
        ("beams", 1, "1f1b", {}),
        ("beams", 2, "interleaved", {"chunks": 2}),
    ],
)
def test_tokens_are_the_oracles_and_logits_those_of_the_whole_context(
    make: Make, kind: str, stages: int, schedule: str, run: dict[str, Any]
) -> None:
    check_decoding(make, kind, stages, schedule, **run)


def test_searches_find_what_the_transformers_library_found(make: Make) -> None:
    check_searches(make, "tensorflow", 2)
