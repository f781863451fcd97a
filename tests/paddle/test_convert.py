"""Weights to and from Paddle's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paddle

from common.spec.run import TransformerSpec
from paddle_impl import convert
from tests.converting import check_file, every_model


def logits(spec: TransformerSpec, file: Path, tokens: Any) -> Any:
    model = convert.plain_model(spec)
    model.set_state_dict(paddle.load(str(file)))
    model.eval()
    with paddle.no_grad():
        return model(paddle.to_tensor(tokens)).numpy()


@every_model
def test_the_file_works_in_a_plain_model_and_comes_back(
    spec: TransformerSpec, tmp_path: Path
) -> None:
    check_file(convert, "model.pdparams", spec, tmp_path, logits)
