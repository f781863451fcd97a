"""Paddle in the tests of every framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paddle
import pytest

from common.spec.run import TransformerSpec
from paddle_impl import convert
from paddle_impl.layers import summed_loss
from tests.every_framework import *  # noqa: F403
from tests.every_framework import Array, Logits, Loss


@pytest.fixture
def framework() -> str:
    return "paddle"


@pytest.fixture
def loss() -> Loss:
    def of_logits(logits: Array, targets: Any) -> tuple[float, Array]:
        x = paddle.to_tensor(logits, stop_gradient=False)
        found = summed_loss(x, paddle.to_tensor(targets), 3)
        found.backward()
        return found.item(), x.grad.numpy()

    return of_logits


@pytest.fixture
def logits() -> Logits:
    def of_file(spec: TransformerSpec, file: Path, tokens: Any) -> Any:
        model = convert.plain_model(spec)
        model.set_state_dict(paddle.load(str(file)))
        model.eval()
        with paddle.no_grad():
            return model(paddle.to_tensor(tokens)).numpy()

    return of_file
