"""Generation with a cache on every stage, beside the oracle, which has none, and transformers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import DECODING, Make, check_decoding, check_searches


@pytest.mark.parametrize(
    ("stages", "schedule", "run"),
    [(1, "1f1b", {}), (2, "gpipe", {}), (2, "zb-v", {"chunks": 2})],
)
@pytest.mark.parametrize("kind", DECODING)
def test_tokens_are_the_oracles_and_logits_those_of_the_whole_context(
    make: Make, kind: str, stages: int, schedule: str, run: dict[str, Any]
) -> None:
    check_decoding(make, kind, stages, schedule, **run)


@pytest.mark.parametrize("stages", [1, 2])
def test_searches_find_what_the_transformers_library_found(make: Make, stages: int) -> None:
    check_searches(make, "paddle", stages)
