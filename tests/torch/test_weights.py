"""Every parameter has a canonical name, also one that a new kind of layer brings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.spec.run import TransformerSpec
from torch_impl.layers import build_unit
from torch_impl.weights import named_parameters

HEAD = build_unit(TransformerSpec(), "head")


def test_another_norm_of_the_head_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEAD._modules, "norm", nn.RMSNorm(TransformerSpec().d_model))
    names = [item.name for item in named_parameters(["head"], [HEAD], tied_head=False)]
    assert names == ["head.norm.weight", "head.output.weight"]


def test_a_parameter_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEAD._parameters, "gain", nn.Parameter(torch.ones(1)))
    with pytest.raises(
        ValueError,
        match=r"^gain of head has no canonical name; expected one in torch_impl/weights\.py$",
    ):
        named_parameters(["head"], [HEAD], tied_head=False)
