"""The Transformer as its Keras users would write it, for the baseline.

Differs: PyTorch's and Paddle's baselines call the units one after another.
"""

from __future__ import annotations

import keras
import tensorflow as tf

from common.spec.parameters import unit_names
from common.spec.run import RunConfig, TransformerSpec
from tf_impl.dropout import DropoutContext
from tf_impl.layers import Embedding, Head, build_unit, norm

_Inputs = tuple[tf.Tensor, ...]
"""Tokens (B, S); with dropout also the step's key (B,) and the sample indices (B,)."""


class TiedHead(Head):
    """A head tied as its users tie it: one variable, used twice."""

    def __init__(self, spec: TransformerSpec, dtype: str, embedding: Embedding) -> None:
        super().__init__(spec, "head", dtype)
        self.embedding = embedding

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm = norm(self.spec, "norm", self.dtype) if self.spec.norm == "pre" else None
        if self.norm is not None:
            self.norm.build(input_shape)

    @property
    def token(self) -> keras.Variable:
        return self.embedding.token


class LanguageModel(keras.Model):
    """The Transformer as an ordinary Keras model."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        spec = config.model
        units = [build_unit(spec, name, config.train.dtype) for name in unit_names(spec)]
        if spec.tied_head:
            units[-1] = TiedHead(spec, config.train.dtype, units[0])
        self.units = units
        # Built at once, so that weights can be loaded before the first batch.
        shape: tuple[int | None, ...] = (None, spec.context_length)
        for unit in self.units:
            unit.build(shape)
            shape = unit.compute_output_shape(shape)
        self.built = True

    def call(self, inputs: _Inputs, training: bool = False) -> tf.Tensor:
        return self.outputs_of_units(inputs, training)[-1]

    def outputs_of_units(self, inputs: _Inputs, training: bool) -> list[tf.Tensor]:
        tokens, *dropout = inputs
        context = DropoutContext(dropout[0][0], dropout[1]) if dropout and training else None
        outputs = [tokens]  # (B, S), then (B, S, D) of every unit, (B, S, V) of the head
        for unit in self.units:
            outputs.append(unit(outputs[-1], context=context))
        return outputs[1:]
