"""Forward, B and W of a stage, and what Paddle's pipeline cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paddle_impl.drift import switch
from paddle_impl.engine import build_engine
from tests.engines import Make, different, small, train

SPLIT = "0: F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3\n"


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_split_backward_gives_the_bits_of_the_merged_one_and_runs_no_second_forward(
    make: Make, dtype: str, tied_head: bool, tmp_path: Path
) -> None:
    (tmp_path / "split.txt").write_text(SPLIT)
    found = []
    for schedule in ("1f1b", f"file:{tmp_path / 'split.txt'}"):
        engine, calls = make(1, schedule, dtype=dtype, tied_head=tied_head, dropout=0.1), []
        for name, unit in engine.stage.chunks[0]:
            unit.register_forward_post_hook(lambda *_, name=name, calls=calls: calls.append(name))
        found.append(train(engine, range(3)))
        assert sorted(calls) == sorted(
            name for name, _ in engine.stage.chunks[0] for _ in range(3 * 4)
        )
    assert different(*found) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"^dtype = bfloat16: Paddle .*; expected float32 or float64$"),
        (
            {"run": {"executor": "native", "recompute": "full"}},
            r"^recompute = full; executor = native takes none$",
        ),
        (
            {"run": {"executor": "plain", "recompute": "full"}},
            r"^recompute = full; executor = plain takes none$",
        ),
        (
            {"run": {"drift": "tf32"}},
            r"^drift = tf32; expected for paddle: one of mean-over-all-labels, [^\n]*$",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    config = small("paddle", **options)
    with pytest.raises(ValueError, match=message), switch(config):
        build_engine(config)
