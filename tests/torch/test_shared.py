"""PyTorch in the tests of every framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.spec.run import TransformerSpec
from tests.every_framework import *  # noqa: F403
from tests.every_framework import Array, Logits, Loss
from torch_impl import convert
from torch_impl.layers import summed_loss


@pytest.fixture
def framework() -> str:
    return "torch"


@pytest.fixture
def loss() -> Loss:
    def of_logits(logits: Array, targets: Any) -> tuple[float, Array]:
        x = torch.tensor(logits, requires_grad=True)
        found = summed_loss(x, torch.tensor(targets), 3)
        found.backward()
        return found.item(), x.grad.numpy()

    return of_logits


@pytest.fixture
def logits() -> Logits:
    def of_file(spec: TransformerSpec, file: Path, tokens: Any) -> Any:
        model = convert.plain_model(spec).double()
        model.load_state_dict(torch.load(file, weights_only=True))
        with torch.no_grad():
            return model(torch.from_numpy(tokens)).numpy()

    return of_file
