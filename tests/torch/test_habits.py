"""PyTorch's habits in the drift zoo are its own."""

from __future__ import annotations

from typing import Any

import pytest

from common.spec.run import RunConfig
from torch_impl.drift import switch


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"drift": "onednn"},
            r"^drift = onednn; expected for torch: one of mean-per-micro-batch, ",
        ),
        (
            {"drift": "clip-epsilon", "executor": "native"},
            r"^drift = clip-epsilon; executor = native has none, expected table$",
        ),
    ],
)
def test_a_habit_that_pytorch_does_not_have_is_refused(run: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), switch(RunConfig(**run)):
        pass
