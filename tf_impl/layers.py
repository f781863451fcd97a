"""The model as Keras layers.

Letters in shapes: B samples of a micro-batch, S positions, D width, H heads, E = D / H, F
feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from common.spec.dropout_masks import site_number
from common.spec.run import TransformerSpec
from tf_impl.cache import Cache
from tf_impl.device_shards import Shards, rows_of, side_by_side
from tf_impl.dropout import DropoutContext, dropout, native_dropout
from tf_impl.precision import Linear, RMSNorm, at_least_float32, product, softmax


@tf.custom_gradient
def gelu(x: tf.Tensor) -> Any:
    """Return the exact GELU (Hendrycks and Gimpel 2016): 0.5 x (1 + erf(x / sqrt 2)) = x Phi(x).

    `tf.nn.gelu` divides by a constant with 12 digits, `keras.ops.gelu` is by default the tanh form.

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
    """GELU's tanh form, GPT-2's: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    wide = at_least_float32(x)
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return tf.cast(0.5 * wide * (1.0 + tf.math.tanh(inner)), x.dtype)


def activation(name: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return what stands between a feed-forward's two layers (`TransformerSpec.activation`)."""
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

    def __init__(
        self, spec: TransformerSpec, name: str, dtype: str, shard: tuple[int, int] | None = None
    ) -> None:
        """`shard`: (which, of how many) this is; `spec` then has its own sizes."""
        super().__init__(name=name.replace(".", "_"), dtype=dtype)
        self.spec = spec
        self.unit_name = name
        self.shard = shard
        self.site = name if shard is None else f"{name}, shard {shard[0]}"
        """Where keys and values are in a `Cache`."""
        self.cut: Shards | None = None
        """What stands for the unit's own weights, where these are cut."""

    of_shard: Mapping[str, Any] = {}
    """What else is different in the `spec` of a shard of the vocabulary, which is of this class."""

    def split(self, strategies: Sequence[tf.distribute.Strategy], vocab: bool) -> None:
        """Make, ahead of `build`, the shards on the devices of `strategies`, which cannot be
        entered within the stage's own; `vocab`: also where the vocabulary is cut.
        """
        if vocab:
            parts, tokens, t = [], np.arange(self.spec.vocab_size), len(strategies)
            for k, own in enumerate(np.array_split(tokens, t)):
                spec = self.spec.model_copy(update={"vocab_size": len(own), **self.of_shard})
                parts.append(type(self)(spec, self.unit_name, self.dtype, (k, t)))
                parts[k].first_token = int(own[0])
            self.cut = Shards(parts, strategies, self.spec.d_model)

    def get_config(self) -> dict[str, Any]:
        """Return what `model.save` writes of it. Differs: Keras alone saves how a model is made."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "name": self.unit_name,
            "dtype": self.dtype_policy.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Unit:
        return cls(TransformerSpec.model_validate(config["spec"]), config["name"], config["dtype"])

    def linear(self, units: int, name: str, bias: bool = True) -> Linear:
        # kernel (in, out), as canonical
        return Linear(units, use_bias=bias and self.spec.biases, name=name, dtype=self.dtype)

    def dropout(self, x: tf.Tensor, place: int, context: DropoutContext | None) -> tf.Tensor:
        """Dropout at one of the unit's places (`common.spec.dropout_masks.site_number`)."""
        chosen = dropout if self.spec.dropout_masks == "shared" else native_dropout
        site = site_number(self.unit_name, place)
        return chosen(x, self.spec.dropout, site, context, self.shard or (0, 1))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)


class Embedding(Unit):
    """Token plus learned position, where positions are not rotary."""

    of_shard = MappingProxyType({"position": "rotary", "dropout": 0.0})

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        d = self.spec.d_model
        if self.cut is None:
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
        if self.shard is not None:
            return rows_of(self.token, tokens, self.first_token)
        x = tf.gather(self.token, tokens) if self.cut is None else self.cut(tokens)  # (B, S, D)
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
    """Repeat keys' or values' heads for their query groups: (B, K, S, E) to (B, H, S, E)."""
    return tf.repeat(x, group, 1)


def scaled_products(q: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    """Return q k^T / sqrt(E): (B, H, S, S), in float32 at least.

    Differs: the product is scaled, not the queries: in bfloat16 they would be rounded once more.
    """
    return at_least_float32(product(q, k, transpose_b=True)) / math.sqrt(q.shape[-1])


class Attention(Unit):
    """Self-attention (Vaswani et al. 2017, section 3.2), with an additive mask if causal.

    Where there are fewer heads of keys and values (K), a group of query heads shares each.

    Differs: the last layer is `projection`, not `output`, which is every Keras layer's result.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        spec, width = self.spec, input_shape[-1]
        assert width is not None
        d, kv = spec.d_model, spec.kv_heads * spec.d_head  # D of the shard's heads, K E
        self.query = self.linear(d, "query")
        self.key = self.linear(kv, "key", bias=False)
        self.value = self.linear(kv, "value")
        self.projection = self.linear(width, "output", bias=self.shard is None)
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)
        self.projection.build((*input_shape[:-1], d))

    def call(
        self, x: tf.Tensor, context: DropoutContext | None = None, cache: Cache | None = None
    ) -> tf.Tensor:
        s, spec = x.shape[1], self.spec
        start = 0 if cache is None else cache.length

        def split(y: tf.Tensor) -> tf.Tensor:
            heads = y.shape[2] // spec.d_head
            return tf.transpose(tf.reshape(y, (-1, s, heads, spec.d_head)), (0, 2, 1, 3))

        # (B, H, S, E), of keys and values (B, K, S, E)
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if spec.position == "rotary":
            q, k = rotate(q, spec.rope_theta, start), rotate(k, spec.rope_theta, start)
        if cache is not None:
            k, v = cache.extend(self.site, k, v)  # (B, K, start + S, E)
        if spec.kv_heads < spec.num_heads:
            group = spec.num_heads // spec.kv_heads
            k, v = share_heads(k, group), share_heads(v, group)  # (B, H, S, E)
        scores = scaled_products(q, k)  # (B, H, S, S), with a cache S, start + S
        if spec.causal and s > 1:  # a single new position sees all that is there
            mask = causal_mask(s, scores.dtype)  # (S, S)
            scores = scores + (mask if cache is None else tf.pad(mask, ((0, 0), (start, 0))))
        weights = self.dropout(softmax(scores, q.dtype), 0, context)
        mixed = tf.transpose(product(weights, v), (0, 2, 1, 3))  # (B, S, H, E)
        return self.projection(tf.reshape(mixed, (-1, s, spec.d_model)))  # (B, S, D)


class FeedForward(Unit):
    """Two linear layers with an activation between them; SwiGLU (Shazeer 2020) has a third, whose
    activation the first one's output is multiplied with.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.up = self.linear(self.spec.d_ff, "up")
        self.down = self.linear(self.spec.d_model, "down", bias=self.shard is None)
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

    attention: Any = None
    feed_forward: Any = None

    def split(self, strategies: Sequence[tf.distribute.Strategy], vocab: bool) -> None:
        spec, t = self.spec, len(strategies)
        heads = {"num_heads": spec.num_heads, "num_kv_heads": spec.kv_heads}

        def shards(kind: type[Unit], **sizes: int) -> Shards:
            own = spec.model_copy(update={name: size // t for name, size in sizes.items()})
            parts = [kind(own, self.unit_name, self.dtype, (k, t)) for k in range(t)]
            return Shards(parts, strategies, spec.d_model, spec.biases)

        self.attention = shards(Attention, d_model=spec.d_model, **heads)
        self.feed_forward = shards(FeedForward, d_ff=spec.d_ff)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm_1, self.norm_2 = (
            norm(self.spec, name, self.dtype) for name in ("norm_1", "norm_2")
        )
        if self.attention is None:
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
    """The last norm (pre-norm only) and the logits. A tied head has a copy of the token embedding.

    Differs: the loss is not in here but the `loss` that the Keras model is compiled with.
    """

    of_shard = MappingProxyType({"norm": "post"})

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm = norm(self.spec, "norm", self.dtype) if self.spec.norm == "pre" else None
        if self.norm is not None:
            self.norm.build(input_shape)
        if self.cut is not None:
            return
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
        if self.cut is not None:
            return side_by_side(self.cut.each(x), self.cut.devices)
        if not self.spec.tied_head:
            return self.projection(x)  # (B, S, V), with a cache (B, V)
        logits = product(tf.reshape(x, (-1, x.shape[-1])), self.token, transpose_b=True)  # (B S, V)
        return tf.reshape(logits, (-1, *x.shape[1:-1], self.spec.vocab_size))  # as above

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.spec.vocab_size)


def build_unit(spec: TransformerSpec, name: str, dtype: str) -> Unit:
    """Return the unit of this name (`common.spec.parameters.unit_names`), without weights yet."""
    if name == "embedding":
        return Embedding(spec, name, dtype)
    return Head(spec, name, dtype) if name == "head" else Block(spec, name, dtype)
