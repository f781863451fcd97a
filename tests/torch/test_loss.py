"""The loss where logits lie far apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.extreme import EXTREME_LOGITS, check_loss
from torch_impl.layers import summed_loss


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EXTREME_LOGITS)
def test_the_loss_of_extreme_logits_is_right(name: str, dtype: str) -> None:
    def loss(
        logits: NDArray[np.floating], targets: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.floating]]:
        x = torch.tensor(logits, requires_grad=True)
        found = summed_loss(x, torch.tensor(targets), 3)
        found.backward()
        return found.item(), x.grad.numpy()

    check_loss(loss, name, dtype)
