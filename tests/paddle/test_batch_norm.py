"""What micro-batches do to batch norm (docs/batch-norm.md)."""

from __future__ import annotations

from tests.norms import check_norms
from tests.paddle.plain import Ops


def test_micro_batches_change_batch_norm_and_not_layer_norm() -> None:
    check_norms(Ops())
