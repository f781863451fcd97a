"""TensorFlow's habits in the drift zoo are its own; one is a setting of the whole process
(tests/common/test_tf_zoo.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import small
from tf_impl.drift import switch


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"drift": "coupled-decay"},
            "drift = coupled-decay; expected for tensorflow: one of tanh-gelu",
        ),
        ({"drift": "tanh-gelu", "executor": "plain"}, "expected table"),
        ({"drift": "onednn"}, r"configure\(onednn=True\)"),
    ],
)
def test_a_habit_that_cannot_be_switched_on_is_refused(run: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), switch(small("tensorflow", 1, run=run)):
        pass
