"""Every parameter has a canonical name, also one that a new kind of layer brings."""

from __future__ import annotations

import keras
import pytest

from common.spec.run import TransformerSpec
from tf_impl import layers
from tf_impl.layers import build_unit
from tf_impl.weights import named_parameters

SHAPE = (None, TransformerSpec().context_length, TransformerSpec().d_model)


def test_another_norm_of_the_head_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        layers, "norm", lambda spec, name, dtype: keras.layers.RMSNormalization(name=name)
    )
    head = build_unit(TransformerSpec(), "head", "float32")
    head.build(SHAPE)
    names = [item.name for item in named_parameters(["head"], [head], tied_head=False)]
    assert names == ["head.norm.weight", "head.output.weight"]


def test_a_parameter_without_a_name_is_refused() -> None:
    head = build_unit(TransformerSpec(), "head", "float32")
    head.gain = head.add_weight(shape=(1,), name="gain")
    head.build(SHAPE)
    with pytest.raises(
        ValueError,
        match=r"gain of head has no canonical name; expected one in tf_impl/weights\.py$",
    ):
        named_parameters(["head"], [head], tied_head=False)
