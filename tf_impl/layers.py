"""The model as Keras layers.

Letters in shapes: B samples of a micro-batch, S positions, D width, H heads, E = D / H, F
feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from common.spec.dropout_masks import site_number
from common.spec.run import TransformerSpec
from tf_impl.cache import Cache
from tf_impl.dropout import DropoutContext, dropout, native_dropout
from tf_impl.precision import Linear, RMSNorm, at_least_float32, product, softmax


@tf.custom_gradient
def gelu(x: tf.Tensor) -> Any:
    """Return the exact GELU (Hendrycks and Gimpel 2016): x Phi(x), with Phi(x) = (1 + erf(x / sqrt
    2)) / 2.

    `tf.nn.gelu` divides by a constant with 12 digits, `keras.ops.gelu` is the tanh approximation by
    default.

    Differs: with a gradient of its own, Phi(x) + x phi(x), it holds `x` alone, as the other
    frameworks' kernels do; a tape would hold three tensors of that size.
    """

    def cumulative(x: tf.Tensor) -> tf.Tensor:
        return 0.5 + 0.5 * tf.math.erf(x * math.sqrt(0.5))

    def gradient(dy: tf.Tensor) -> tf.Tensor:
        wide = at_least_float32(x)
        density = tf.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
        return tf.cast(at_least_float32(dy) * (cumulative(wide) + wide * density), x.dtype)

    wide = at_least_float32(x)
    return tf.cast(wide * cumulative(wide), x.dtype), gradient


def gelu_tanh(x: tf.Tensor) -> tf.Tensor:
    """GELU by the tanh approximation, which GPT-2 has: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715
    x^3))).
    """
    wide = at_least_float32(x)
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return tf.cast(0.5 * wide * (1.0 + tf.math.tanh(inner)), x.dtype)


def activation(name: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return what stands between the two linear layers of a feed-forward
    (`TransformerSpec.activation`).
    """
    known: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "relu": tf.nn.relu,
        "swiglu": tf.nn.silu,
    }
    return known[name]


def norm(spec: TransformerSpec, name: str, dtype: str) -> keras.layers.Layer:
    """Return a norm of the model's kind."""
    options: dict[str, Any] = {"epsilon": spec.norm_epsilon, "name": name, "dtype": dtype}
    if spec.norm_kind == "rms":
        return RMSNorm(**options)
    return keras.layers.LayerNormalization(center=spec.biases, **options)


def rotate(x: tf.Tensor, theta: float, start: Any = 0) -> tf.Tensor:
    """Turn feature i and i + E/2 of every head by the position's angle (B, H, S, E); the first
    position is `start`. The angles are rounded once from float64.
    """
    half = x.shape[3] // 2
    positions: Any = np.arange(x.shape[2])[:, None]
    turns = theta ** (-np.arange(half) / half)  # (E/2,)
    wide, library = at_least_float32(x), np
    if isinstance(start, tf.Tensor):  # in a trace for any length
        positions, library = tf.cast(start, tf.float64) + positions, tf.math
    angles = positions * turns  # (S, E/2)
    cos, sin = (tf.cast(table(angles), wide.dtype) for table in (library.cos, library.sin))
    a, b = tf.split(wide, 2, -1)
    return tf.cast(tf.concat([a * cos - b * sin, b * cos + a * sin], -1), x.dtype)


class Unit(keras.layers.Layer):
    """What a partition may not cut: `unit(x, context)`, in the precision of its `dtype`."""

    def __init__(self, spec: TransformerSpec, name: str, dtype: str) -> None:
        super().__init__(name=name.replace(".", "_"), dtype=dtype)
        self.spec = spec
        self.unit_name = name

    def get_config(self) -> dict[str, Any]:
        """Return what `model.save` writes of a plain model. Differs: Keras alone saves how a model
        is made.
        """
        return {
            "spec": self.spec.model_dump(mode="json"),
            "name": self.unit_name,
            "dtype": self.dtype_policy.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Unit:
        return cls(TransformerSpec.model_validate(config["spec"]), config["name"], config["dtype"])

    def linear(self, units: int, name: str, bias: bool = True) -> Linear:
        return Linear(
            units, use_bias=bias and self.spec.biases, name=name, dtype=self.dtype
        )  # kernel (in, out), as canonical

    def dropout(self, x: tf.Tensor, place: int, context: DropoutContext | None) -> tf.Tensor:
        """Dropout at one of the unit's places (`common.spec.dropout_masks.site_number`)."""
        chosen = dropout if self.spec.dropout_masks == "shared" else native_dropout
        return chosen(x, self.spec.dropout, site_number(self.unit_name, place), context)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)


class Embedding(Unit):
    """Token plus learned position, where positions are not rotary."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        d = self.spec.d_model
        self.token = self.add_weight(
            shape=(self.spec.vocab_size, d), initializer="random_normal", name="token"
        )
        self.position = None
        if self.spec.position == "learned":
            self.position = self.add_weight(
                shape=(self.spec.context_length, d), initializer="random_normal", name="position"
            )

    def call(
        self, tokens: tf.Tensor, context: DropoutContext | None = None, cache: Cache | None = None
    ) -> tf.Tensor:
        x = tf.gather(self.token, tokens)  # (B, S, D)
        if self.position is not None:
            size = tokens.shape[1], self.spec.d_model
            x = x + (
                self.position[: tokens.shape[1]]
                if cache is None
                else tf.slice(self.position, (cache.length, 0), size)
            )
        return self.dropout(x, 0, context)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape, self.spec.d_model)


def causal_mask(size: int, dtype: tf.DType) -> tf.Tensor:
    """(size, size), added to the scores: no token attends to a later one."""
    return tf.constant(np.triu(np.full((size, size), -np.inf), 1), dtype)


def share_heads(x: tf.Tensor, group: int) -> tf.Tensor:
    """Repeat every head of keys or values for its group of query heads: (B, K, S, E) to (B, H, S,
    E).
    """
    return tf.repeat(x, group, 1)


def scaled_products(q: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    """Return q k^T / sqrt(E): (B, H, S, S), in float32 at least.

    Differs: the product is scaled and not the queries, which in bfloat16 would be rounded once
    more.
    """
    return at_least_float32(product(q, k, transpose_b=True)) / math.sqrt(q.shape[-1])


class Attention(Unit):
    """Self-attention (Vaswani et al. 2017, section 3.2), with an additive mask if causal.

    Where there are fewer heads of keys and values (K), a group of query heads shares each.

    Differs: the last layer is `projection` and not `output`, a name that every Keras layer has for
    its result.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        d, kv = self.spec.d_model, self.spec.kv_heads * self.spec.d_head  # D, K E
        self.query, self.key, self.value, self.projection = (
            self.linear(d, "query"),
            self.linear(kv, "key", bias=False),
            self.linear(kv, "value"),
            self.linear(d, "output"),
        )
        for layer in (self.query, self.key, self.value, self.projection):
            layer.build(input_shape)

    def call(
        self, x: tf.Tensor, context: DropoutContext | None = None, cache: Cache | None = None
    ) -> tf.Tensor:
        s, d, spec = x.shape[1], x.shape[2], self.spec
        start = 0 if cache is None else cache.length

        def split(y: tf.Tensor) -> tf.Tensor:
            heads = y.shape[2] // spec.d_head
            return tf.transpose(tf.reshape(y, (-1, s, heads, spec.d_head)), (0, 2, 1, 3))

        # (B, H, S, E), of keys and values (B, K, S, E)
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if spec.position == "rotary":
            q, k = rotate(q, spec.rope_theta, start), rotate(k, spec.rope_theta, start)
        if cache is not None:
            k, v = cache.extend(self.unit_name, k, v)  # (B, K, start + S, E)
        if spec.kv_heads < spec.num_heads:
            group = spec.num_heads // spec.kv_heads
            k, v = share_heads(k, group), share_heads(v, group)  # (B, H, S, E)
        scores = scaled_products(q, k)  # (B, H, S, S), with a cache S, start + S
        if spec.causal and s > 1:  # a single new position sees all that is there
            mask = causal_mask(s, scores.dtype)  # (S, S)
            scores = scores + (mask if cache is None else tf.pad(mask, ((0, 0), (start, 0))))
        weights = self.dropout(softmax(scores, q.dtype), 0, context)
        mixed = tf.reshape(tf.transpose(product(weights, v), (0, 2, 1, 3)), (-1, s, d))  # (B, S, D)
        return self.projection(mixed)


class FeedForward(Unit):
    """Two linear layers with an activation between them; SwiGLU (Shazeer 2020) has a third, whose
    activation the first one's output is multiplied with.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.up, self.down = (
            self.linear(self.spec.d_ff, "up"),
            self.linear(self.spec.d_model, "down"),
        )
        self.gate = (
            self.linear(self.spec.d_ff, "gate") if self.spec.activation == "swiglu" else None
        )
        if self.gate is not None:
            self.gate.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.spec.d_ff))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        active, up = activation(self.spec.activation), self.up(x)  # up (B, S, F)
        hidden = active(up) if self.gate is None else active(self.gate(x)) * up  # (B, S, F)
        return self.down(hidden)  # (B, S, D)


class Block(Unit):
    """A Transformer block, pre-norm `x + f(norm(x))` or post-norm `norm(x + f(x))`."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm_1, self.norm_2 = (
            norm(self.spec, name, self.dtype) for name in ("norm_1", "norm_2")
        )
        self.attention = Attention(self.spec, self.unit_name, self.dtype)
        self.feed_forward = FeedForward(self.spec, self.unit_name, self.dtype)
        for layer in (self.norm_1, self.attention, self.norm_2, self.feed_forward):
            layer.build(input_shape)

    def call(
        self, x: tf.Tensor, context: DropoutContext | None = None, cache: Cache | None = None
    ) -> tf.Tensor:
        def attend(y: tf.Tensor) -> tf.Tensor:
            return self.dropout(self.attention(y, context, cache=cache), 1, context)

        if self.spec.norm == "pre":
            x = x + attend(self.norm_1(x))
            return x + self.dropout(self.feed_forward(self.norm_2(x)), 2, context)
        x = self.norm_1(x + attend(x))
        return self.norm_2(x + self.dropout(self.feed_forward(x), 2, context))


class Head(Unit):
    """The last norm (pre-norm only) and the logits. A tied head holds its own copy of the token
    embedding.

    Differs: the loss is not in here but the `loss` that the Keras model is compiled with.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm = norm(self.spec, "norm", self.dtype) if self.spec.norm == "pre" else None
        if self.norm is not None:
            self.norm.build(input_shape)
        if self.spec.tied_head:
            shape = (self.spec.vocab_size, self.spec.d_model)
            self.token = self.add_weight(shape=shape, initializer="random_normal", name="token")
        else:
            self.projection = self.linear(self.spec.vocab_size, "output", bias=False)
            self.projection.build(input_shape)

    def call(
        self, x: tf.Tensor, context: DropoutContext | None = None, cache: Cache | None = None
    ) -> tf.Tensor:
        if cache is not None:
            x = x[:, -1]  # (B, D): nobody asks for what follows an earlier token
        if self.norm is not None:
            x = self.norm(x)
        if not self.spec.tied_head:
            return self.projection(x)  # (B, S, V), with a cache (B, V)
        logits = product(tf.reshape(x, (-1, x.shape[-1])), self.token, transpose_b=True)  # (B S, V)
        return tf.reshape(logits, (-1, *x.shape[1:-1], self.spec.vocab_size))  # as above

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.spec.vocab_size)


def build_unit(spec: TransformerSpec, name: str, dtype: str) -> Unit:
    """Return the unit of this name (see `common.spec.parameters.unit_names`), without weights yet:
    Keras makes them in `build`.
    """
    if name == "embedding":
        return Embedding(spec, name, dtype)
    return Head(spec, name, dtype) if name == "head" else Block(spec, name, dtype)
