"""The parameters that users of Paddle have: a state dict, one in a checkpoint, one of a wrapped
model, bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from common.checkpoint.foreign.converter import checked
from common.spec.parameters import random_arrays
from common.spec.run import TransformerSpec
from paddle_impl.convert import _TIED, plain_model, read_weights

MODEL = TransformerSpec(
    context_length=6, num_layers=2, d_model=12, num_heads=2, d_ff=20, tied_head=True
)
WEIGHTS = random_arrays(MODEL, 1, "float32", 0.5)


def test_every_form_of_a_state_dict_is_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paddle.set_default_dtype("float32")
    model = plain_model(MODEL)
    state = model.state_dict()
    model.set_state_dict(
        {name: WEIGHTS.get(name, WEIGHTS["embedding.token.weight"]) for name in state}
    )
    state = model.state_dict()
    optimizer = paddle.optimizer.AdamW(parameters=model.parameters())
    model(paddle.zeros([1, 6], "int64")).sum().backward()
    optimizer.step()
    model.set_state_dict(
        {name: WEIGHTS.get(name, WEIGHTS["embedding.token.weight"]) for name in state}
    )
    forms: dict[str, tuple[Any, str]] = {
        "plain": (state, ""),
        "parallel": (
            {f"_layers.{name}": value for name, value in state.items()},
            "'_layers' (paddle.DataParallel)",
        ),
        "loop": (
            {"epoch": 1, "model": state, "opt": optimizer.state_dict()},
            "'model'; not read: epoch, opt",
        ),
        "tied": ({name: value for name, value in state.items() if name != _TIED}, ""),
    }
    for name, (content, message) in forms.items():
        paddle.save(content, str(tmp_path / f"{name}.pdparams"))
        for key, value in checked(
            read_weights(MODEL, tmp_path / f"{name}.pdparams"), MODEL
        ).items():
            np.testing.assert_array_equal(value, WEIGHTS[key], err_msg=name)
        assert message in capsys.readouterr().out
    low = {name: value.astype("bfloat16") for name, value in state.items()}
    paddle.save(low, str(tmp_path / "low.pdparams"))
    found = checked(read_weights(MODEL, tmp_path / "low.pdparams"), MODEL)
    for key, value in found.items():
        np.testing.assert_array_equal(value, low[key].astype("float32").numpy(), err_msg=key)
    assert "note: bfloat16 becomes float32" in capsys.readouterr().out
