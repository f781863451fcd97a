"""Weights to and from PyTorch's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.spec.run import TransformerSpec
from tests.converting import check_file, every_model
from torch_impl import convert


def logits(spec: TransformerSpec, file: Path, tokens: Any) -> Any:
    model = convert.plain_model(spec).double()
    model.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).numpy()


@every_model
def test_the_file_works_in_a_plain_model_and_comes_back(
    spec: TransformerSpec, tmp_path: Path
) -> None:
    check_file(convert, "model.pt", spec, tmp_path, logits)
