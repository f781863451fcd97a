"""The oracle: the model in float64 NumPy, its backward written out by hand, and both optimizers.

All three implementations are judged against this file, and this file against finite differences
(`tests/test_reference.py`). It takes the whole mini-batch at once: a pipeline's micro-batches must add up to it.

Letters in shapes: B samples, S positions, D width, H heads, E = D / H, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.spec import dropout_masks
from common.spec.data import IGNORED, Batch
from common.spec.parameters import TOKEN_EMBEDDING, TensorKey, parameter_names, unit_names
from common.spec.run import TrainSpec, TransformerSpec

Array = NDArray[np.float64]
Arrays = dict[str, Array]


@dataclass
class Masks:
    """Scaled dropout masks of one step: 0 where dropped, 1 / (1 - dropout) where kept. No dropout without a key."""

    probability: float
    key: int | None
    samples: NDArray[np.int64]

    def at(self, unit: str, place: int, shape: tuple[int, ...]) -> Array | float:
        if self.key is None or self.probability == 0:
            return 1.0
        site = dropout_masks.site_number(unit, place)
        keep = dropout_masks.keep_mask(self.key, site, self.samples, shape, self.probability)
        return np.asarray(keep, np.float64) / (1 - self.probability)


# --------------------------------------------------------------------------------------------------- operations


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> tuple[Array, Any]:
    """Ba et al. 2016, over the last axis, with the biased variance."""
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)  # (..., 1)
    normal = centred * inverse
    return normal * weight + bias, (normal, inverse)


def layer_norm_backward(grad: Array, weight: Array, saved: Any) -> tuple[Array, Array, Array]:
    """Gradients of x, weight and bias."""
    normal, inverse = saved
    axes = tuple(range(grad.ndim - 1))
    g = grad * weight
    dx = inverse * (g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True))
    return dx, (grad * normal).sum(axes), grad.sum(axes)


def _erf(x: Array) -> Array:
    from scipy.special import erf  # imported here: whoever only asks for --help should not wait for SciPy

    return np.asarray(erf(x))


def gelu(x: Array) -> Array:
    """The exact GELU (Hendrycks and Gimpel 2016): x times the normal distribution function."""
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))))


def gelu_backward(grad: Array, x: Array) -> Array:
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return np.asarray(grad * (0.5 * (1 + _erf(x / math.sqrt(2))) + x * density))


def gelu_tanh(x: Array) -> Array:
    """GELU by the tanh approximation (Hendrycks and Gimpel 2016, section 2), which GPT-2 was trained with."""
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def gelu_tanh_backward(grad: Array, x: Array) -> Array:
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return np.asarray(grad * 0.5 * (1 + t + x * (1 - t * t) * inner))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def relu_backward(grad: Array, x: Array) -> Array:
    return grad * (x > 0)


ACTIVATIONS = {
    "gelu": (gelu, gelu_backward),
    "gelu_tanh": (gelu_tanh, gelu_tanh_backward),
    "relu": (relu, relu_backward),
}


def softmax(x: Array) -> Array:
    e: Array = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Gradients of x (..., I), weight (I, O) and bias (O,) of `x @ weight + bias`."""
    flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return grad @ weight.T, flat_x.T @ flat_grad, flat_grad.sum(0)


# --------------------------------------------------------------------------------------------------- units


def attention(x: Array, w: Mapping[str, Array], unit: str, heads: int, masks: Masks) -> tuple[Array, Any]:
    """Causal self-attention (Vaswani et al. 2017, section 3.2) with dropout on its weights."""
    b, s, d = x.shape

    def split(y: Array) -> Array:
        return y.reshape(b, s, heads, d // heads).transpose(0, 2, 1, 3)

    name = f"{unit}.attention"
    q = split(x @ w[f"{name}.query.weight"] + w[f"{name}.query.bias"])  # (B, H, S, E)
    k = split(x @ w[f"{name}.key.weight"])  # (B, H, S, E)
    v = split(x @ w[f"{name}.value.weight"] + w[f"{name}.value.bias"])  # (B, H, S, E)
    causal = np.triu(np.full((s, s), -np.inf), 1)  # (S, S), added
    weights = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(d // heads) + causal)  # (B, H, S, S)
    mask = masks.at(unit, 0, weights.shape)
    mixed = ((weights * mask) @ v).transpose(0, 2, 1, 3).reshape(b, s, d)  # (B, S, D)
    out = mixed @ w[f"{name}.output.weight"] + w[f"{name}.output.bias"]  # (B, S, D)
    return out, (x, q, k, v, weights, mask, mixed)


def attention_backward(grad: Array, w: Mapping[str, Array], unit: str, heads: int, saved: Any, grads: Arrays) -> Array:
    x, q, k, v, weights, mask, mixed = saved
    b, s, d = x.shape
    name = f"{unit}.attention"
    d_mixed, grads[f"{name}.output.weight"], grads[f"{name}.output.bias"] = linear_backward(
        grad, mixed, w[f"{name}.output.weight"]
    )
    d_heads = d_mixed.reshape(b, s, heads, d // heads).transpose(0, 2, 1, 3)  # (B, H, S, E)
    d_weights = (d_heads @ v.swapaxes(-1, -2)) * mask  # (B, H, S, S)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / math.sqrt(d // heads)
    per_head = {
        "query": d_scores @ k,
        "key": d_scores.swapaxes(-1, -2) @ q,
        "value": (weights * mask).swapaxes(-1, -2) @ d_heads,
    }
    dx: Array = np.zeros_like(x)
    for part, d_part in per_head.items():
        joined = d_part.transpose(0, 2, 1, 3).reshape(b, s, d)  # (B, S, D)
        more, grads[f"{name}.{part}.weight"], d_bias = linear_backward(joined, x, w[f"{name}.{part}.weight"])
        dx += more
        if part != "key":
            grads[f"{name}.{part}.bias"] = d_bias
    return dx


def feed_forward(x: Array, w: Mapping[str, Array], unit: str, activation: str) -> tuple[Array, Any]:
    name = f"{unit}.feed_forward"
    hidden = x @ w[f"{name}.up.weight"] + w[f"{name}.up.bias"]  # (B, S, F)
    active = ACTIVATIONS[activation][0](hidden)  # (B, S, F)
    return active @ w[f"{name}.down.weight"] + w[f"{name}.down.bias"], (x, hidden, active)


def feed_forward_backward(
    grad: Array, w: Mapping[str, Array], unit: str, activation: str, saved: Any, grads: Arrays
) -> Array:
    x, hidden, active = saved
    name = f"{unit}.feed_forward"
    d_active, grads[f"{name}.down.weight"], grads[f"{name}.down.bias"] = linear_backward(
        grad, active, w[f"{name}.down.weight"]
    )
    d_hidden = ACTIVATIONS[activation][1](d_active, hidden)
    dx, grads[f"{name}.up.weight"], grads[f"{name}.up.bias"] = linear_backward(d_hidden, x, w[f"{name}.up.weight"])
    return dx


# --------------------------------------------------------------------------------------------------- model


@dataclass
class Oracle:
    """The model with its optimizer state. `weights` are float64, by canonical name."""

    model: TransformerSpec
    train: TrainSpec
    weights: Arrays
    gradients: Arrays = field(default_factory=dict)
    first_moment: Arrays = field(default_factory=dict)
    second_moment: Arrays = field(default_factory=dict)
    output_gradients: Arrays = field(default_factory=dict)
    """By unit: the loss' gradient with respect to its output, from the last `forward_backward`."""

    def __post_init__(self) -> None:
        self.weights = {name: np.array(value, np.float64) for name, value in self.weights.items()}
        self.first_moment = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self.second_moment = {name: np.zeros_like(value) for name, value in self.weights.items()}

    def forward(self, batch: Batch, training: bool = True) -> tuple[float, dict[str, Array], Any]:
        """Mean loss per token, the output of every unit, and what the backward needs."""
        masks = self._masks(batch, training)
        outputs: dict[str, Array] = {}
        saved: dict[str, Any] = {}

        x, saved["embedding"] = self._embedding(batch.inputs, masks)
        outputs["embedding"] = x
        for unit in unit_names(self.model)[1:-1]:
            x, saved[unit] = self._block(unit, x, masks)
            outputs[unit] = x
        logits, saved["head"] = self._head(x)
        outputs["head"] = logits
        shifted = logits - logits.max(-1, keepdims=True)  # (B, S, V)
        totals = np.exp(shifted).sum(-1, keepdims=True)  # (B, S, 1)
        saved["loss"] = np.exp(shifted) / totals  # (B, S, V)
        counts = batch.targets != IGNORED  # (B, S)
        picked = np.take_along_axis(shifted, np.maximum(batch.targets, 0)[..., None], -1)  # (B, S, 1)
        return float((np.log(totals) - picked)[counts].sum() / batch.num_tokens), outputs, saved

    def _masks(self, batch: Batch, training: bool) -> Masks:
        key = dropout_masks.step_key(self.train.seed, batch.step) if training else None
        return Masks(self.model.dropout, key, np.arange(batch.inputs.shape[0]))

    def _embedding(self, tokens: NDArray[np.int64], masks: Masks) -> tuple[Array, Any]:
        position = self.weights["embedding.position.weight"][: tokens.shape[1]]
        x = self.weights[TOKEN_EMBEDDING][tokens] + position  # (B, S, D)
        mask = masks.at("embedding", 0, x.shape)
        return x * mask, (tokens, mask)

    def _embedding_backward(self, grad: Array, saved: Any, grads: Arrays) -> None:
        tokens, mask = saved
        grad = grad * mask
        np.add.at(grads[TOKEN_EMBEDDING], tokens, grad)
        grads["embedding.position.weight"][: grad.shape[1]] = grad.sum(0)

    def _head(self, x: Array) -> tuple[Array, Any]:
        m, w = self.model, self.weights
        normal, norm_saved = x, None
        if m.norm == "pre":
            normal, norm_saved = layer_norm(x, w["head.norm.weight"], w["head.norm.bias"], m.norm_epsilon)
        projection = w[TOKEN_EMBEDDING].T if m.tied_head else w["head.output.weight"]  # (D, V)
        return normal @ projection, (normal, norm_saved, projection)  # (B, S, V)

    def _head_backward(self, grad: Array, saved: Any, grads: Arrays) -> Array:
        normal, norm_saved, projection = saved
        grad, d_projection, _ = linear_backward(grad, normal, projection)
        if self.model.tied_head:
            grads[TOKEN_EMBEDDING] += d_projection.T
        else:
            grads["head.output.weight"] = d_projection
        if self.model.norm == "pre":
            grad, grads["head.norm.weight"], grads["head.norm.bias"] = layer_norm_backward(
                grad, self.weights["head.norm.weight"], norm_saved
            )
        return grad

    def _block(self, unit: str, x: Array, masks: Masks) -> tuple[Array, Any]:
        m, w = self.model, self.weights

        def norm(y: Array, which: int) -> tuple[Array, Any]:
            name = f"{unit}.norm_{which}"
            return layer_norm(y, w[f"{name}.weight"], w[f"{name}.bias"], m.norm_epsilon)

        norms: list[Any] = [None, None]
        y, norms[0] = norm(x, 1) if m.norm == "pre" else (x, None)
        out, attention_saved = attention(y, w, unit, m.num_heads, masks)
        attention_mask = masks.at(unit, 1, out.shape)
        x = x + out * attention_mask
        if m.norm == "post":
            x, norms[0] = norm(x, 1)
        y, norms[1] = norm(x, 2) if m.norm == "pre" else (x, None)
        out, feed_forward_saved = feed_forward(y, w, unit, m.activation)
        feed_forward_mask = masks.at(unit, 2, out.shape)
        x = x + out * feed_forward_mask
        if m.norm == "post":
            x, norms[1] = norm(x, 2)
        return x, (norms, attention_saved, attention_mask, feed_forward_saved, feed_forward_mask)

    def _block_backward(self, unit: str, grad: Array, saved: Any, grads: Arrays) -> Array:
        m, w = self.model, self.weights
        norms, attention_saved, attention_mask, feed_forward_saved, feed_forward_mask = saved

        def norm_backward(g: Array, which: int) -> Array:
            name = f"{unit}.norm_{which}"
            dx, grads[f"{name}.weight"], grads[f"{name}.bias"] = layer_norm_backward(
                g, w[f"{name}.weight"], norms[which - 1]
            )
            return dx

        if m.norm == "post":
            grad = norm_backward(grad, 2)
        inner = feed_forward_backward(grad * feed_forward_mask, w, unit, m.activation, feed_forward_saved, grads)
        grad = grad + (norm_backward(inner, 2) if m.norm == "pre" else inner)
        if m.norm == "post":
            grad = norm_backward(grad, 1)
        inner = attention_backward(grad * attention_mask, w, unit, m.num_heads, attention_saved, grads)
        return grad + (norm_backward(inner, 1) if m.norm == "pre" else inner)

    def forward_backward(self, batch: Batch) -> float:
        """Mean loss per token; `gradients` then holds every gradient by name."""
        loss, _, saved = self.forward(batch)
        grads = self._no_gradients()
        grad = saved["loss"]  # (B, S, V)
        targets = np.maximum(batch.targets, 0)[..., None]  # (B, S, 1)
        np.put_along_axis(grad, targets, np.take_along_axis(grad, targets, -1) - 1, -1)
        grad *= (batch.targets != IGNORED)[..., None] / batch.num_tokens
        self.output_gradients = {}
        for unit in reversed(unit_names(self.model)):
            self.output_gradients[unit] = grad
            grad = self._unit_backward(unit, grad, saved[unit], grads)
        self.gradients = grads
        return loss

    def probe_unit(self, batch: Batch, unit: str, x: Array | None, grad: Array) -> tuple[Array, Array | None, Arrays]:
        """One unit alone: from its input and its output's gradient to its output, its input's gradient and its parameters'.

        All of the whole mini-batch, (B, S, D) or, of the head's output, (B, S, V); the embedding takes the batch's tokens.
        """
        masks = self._masks(batch, training=True)
        if unit == "embedding":
            output, saved = self._embedding(batch.inputs, masks)
        elif unit == "head":
            output, saved = self._head(np.asarray(x, np.float64))
        else:
            output, saved = self._block(unit, np.asarray(x, np.float64), masks)
        grads = self._no_gradients()
        dx = self._unit_backward(unit, np.asarray(grad, np.float64), saved, grads)
        own = parameter_names(self.model, [unit])
        return output, None if unit == "embedding" else dx, {name: grads[name] for name in own}

    def _no_gradients(self) -> Arrays:
        return {name: np.zeros_like(value) for name, value in self.weights.items()}

    def _unit_backward(self, unit: str, grad: Array, saved: Any, grads: Arrays) -> Array:
        """The gradient of the unit's input; that of the embedding's tokens is empty."""
        if unit == "head":
            return self._head_backward(grad, saved, grads)
        if unit == "embedding":
            self._embedding_backward(grad, saved, grads)
            return np.zeros(0)
        return self._block_backward(unit, grad, saved, grads)

    def apply_gradients(self, step: int) -> float:
        """Clips by the global norm, then one step of the optimizer. Returns the norm before clipping."""
        t = self.train
        norm = global_norm([float((g**2).sum()) for g in self.gradients.values()])
        scale = clip_scale(norm, t.clip_norm)
        rate = t.learning_rate_at(step)
        for name, w in self.weights.items():
            g = self.gradients[name] * scale
            decay = t.weight_decay if t.decays(name) else 0.0
            m, v = self.first_moment[name], self.second_moment[name]
            if t.optimizer == "adamw":  # Loshchilov and Hutter 2019, with torch's place for epsilon
                m[:] = t.beta1 * m + (1 - t.beta1) * g
                v[:] = t.beta2 * v + (1 - t.beta2) * g * g
                m_hat, v_hat = m / (1 - t.beta1 ** (step + 1)), v / (1 - t.beta2 ** (step + 1))
                w[:] = w * (1 - rate * decay) - rate * m_hat / (np.sqrt(v_hat) + t.epsilon)
            else:
                m[:] = t.momentum * m + g + decay * w
                w -= rate * m
        return norm

    def train_step(self, batch: Batch) -> float:
        loss = self.forward_backward(batch)
        self.apply_gradients(batch.step)
        return loss

    def unit_outputs(self, batch: Batch, micro_batches: int) -> dict[TensorKey, Array]:
        """What every unit gives for every micro-batch, in the order of computation (stage unknown: 0)."""
        _, outputs, _ = self.forward(batch)
        return {
            TensorKey(batch.step, "forward", 0, i, unit, "output"): piece
            for unit in unit_names(self.model)
            for i, piece in enumerate(np.array_split(outputs[unit], micro_batches))
        }


def global_norm(squared_norms: list[float]) -> float:
    """The norm over all tensors from each tensor's sum of squares.

    `math.fsum` rounds once, so the result does not depend on the order in which stages report: every partition clips
    by the same bits.
    """
    return math.sqrt(math.fsum(squared_norms))


def clip_scale(norm: float, clip_norm: float | None) -> float:
    """What gradients are multiplied by (Pascanu et al. 2013): min(1, clip_norm / norm), without an epsilon.

    1 where the norm is NaN, so that the gradients that made it so can still be found.
    """
    return clip_norm / norm if clip_norm is not None and norm > clip_norm else 1.0
