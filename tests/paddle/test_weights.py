"""Every parameter has a canonical name, also one that a new kind of layer brings."""

from __future__ import annotations

import pytest
from paddle import nn

from common.spec.run import TransformerSpec
from paddle_impl.dropout import DropoutContext
from paddle_impl.layers import Head, build_unit
from paddle_impl.weights import named_parameters


def head() -> Head:
    return build_unit(TransformerSpec(), "head", DropoutContext())


def test_another_norm_of_the_head_is_named_too() -> None:
    unit = head()
    unit.norm = nn.Sequential()  # a norm that is no LayerNorm, with a weight alone
    unit.norm.weight = unit.norm.create_parameter([TransformerSpec().d_model])
    names = [item.name for item in named_parameters(["head"], [unit], tied_head=False)]
    assert names == ["head.norm.weight", "head.output.weight"]


def test_a_parameter_without_a_name_is_refused() -> None:
    unit = head()
    unit.gain = unit.create_parameter([1])
    with pytest.raises(
        ValueError,
        match=r"^gain of head has no canonical name; expected one in paddle_impl/weights\.py$",
    ):
        named_parameters(["head"], [unit], tied_head=False)
