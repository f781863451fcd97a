"""The oracle: the model in float64 NumPy, its backward by hand, and both optimizers.

All three implementations are judged against this file, and this file against finite differences
(`tests/common/test_reference.py`). It takes the whole mini-batch at once: the micro-batches of a
pipeline must add up to it.

    [1] embedding      x = token[t] + position
    [2] block, n times x = x + attention(norm(x))       (post-norm: x = norm(x + attention(x)))
                       x = x + feed_forward(norm(x))
    [3] head           logits = norm(x) @ W
    [4] loss           mean over tokens of -log softmax(logits)[target]
    [5] backward       [4] to [1] in reverse, each by the formula at its function
    [6] optimizer      clip all gradients by their global norm, then AdamW or SGD

Every forward returns (output, saved): what its backward needs. Every `<name>_backward` takes the
gradient of the output and returns that of the input first. In formulas dX is the gradient of the
loss with respect to X.

Letters in shapes:
    B  samples (the batch)      H  heads                 F  width of the feed-forward layer
    S  positions (the sequence) E  width of a head, D/H  V  vocabulary
    D  width of the model       I, O  input and output width of a linear layer
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
    """Dropout masks of one step: 0, or 1 / (1 - dropout) where kept. Without a key all is kept."""

    probability: float
    key: int | None
    samples: NDArray[np.int64]

    def at(self, unit: str, place: int, shape: tuple[int, ...]) -> Array | float:
        """Return the mask of `shape` for this place, or 1.0 without dropout."""
        if self.key is None or self.probability == 0:
            return 1.0
        site = dropout_masks.site_number(unit, place)
        keep = dropout_masks.keep_mask(self.key, site, self.samples, shape, self.probability)
        return np.asarray(keep, np.float64) / (1 - self.probability)


# ------------------------------------------------------------------------------------- operations


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> tuple[Array, Any]:
    """Normalise over the last axis, with the biased variance (Ba et al. 2016).

    n = (x - mean(x)) / sqrt(var(x) + epsilon);  y = n * weight + bias
    """
    centred = x - x.mean(-1, keepdims=True)  # (B, S, D)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)  # (B, S, 1)
    normal = centred * inverse  # (B, S, D)
    return normal * weight + bias, (normal, inverse)


def layer_norm_backward(grad: Array, weight: Array, saved: Any) -> tuple[Array, Array, Array]:
    """Return the gradients of x, weight and bias.

    With g = dy * weight:  dx = (g - mean(g) - n mean(g n)) / sqrt(var(x) + epsilon)

    The two means are there because every x moves the mean and the variance of its row. With
    r = 1 / sqrt(var(x) + epsilon), c = x - mean(x) and D values in a row:

        n_i = c_i r          dc_i / dx_j = [i = j] - 1/D
        dr / dx_j = -r^3 c_j / D = -r^2 n_j / D         var's derivative is 2 c_j / D
        dn_i / dx_j = r ([i = j] - 1/D) + c_i dr/dx_j = r ([i = j] - 1/D - n_i n_j / D)

    Summed over i with g_i this is the formula: mean(g) is from 1/D, n mean(g n) from n_i n_j / D.
    """
    normal, inverse = saved
    axes = tuple(range(grad.ndim - 1))  # weight and bias are shared by all samples and positions
    g = grad * weight  # (B, S, D)
    dx = inverse * (g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True))
    return dx, (grad * normal).sum(axes), grad.sum(axes)


def rms_norm(x: Array, weight: Array, epsilon: float) -> tuple[Array, Any]:
    """Divide by the root mean square over the last axis (Zhang and Sennrich 2019).

    n = x / sqrt(mean(x^2) + epsilon);  y = n * weight
    """
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)  # (B, S, 1)
    normal = x * inverse  # (B, S, D)
    return normal * weight, (normal, inverse)


def rms_norm_backward(grad: Array, weight: Array, saved: Any) -> tuple[Array, Array]:
    """Return the gradients of x and weight.

    With g = dy * weight:  dx = (g - n mean(g n)) / sqrt(mean(x^2) + epsilon): LayerNorm's without
    the part that is there because x moves its mean.
    """
    normal, inverse = saved
    g = grad * weight  # (B, S, D)
    dx = inverse * (g - normal * (g * normal).mean(-1, keepdims=True))
    return dx, (grad * normal).sum(tuple(range(grad.ndim - 1)))


def norm(x: Array, w: Mapping[str, Array], name: str, m: TransformerSpec) -> tuple[Array, Any]:
    """Return the norm of this name, of the model's kind; LayerNorm may be without a bias."""
    weight = w[f"{name}.weight"]
    if m.norm_kind == "rms":
        return rms_norm(x, weight, m.norm_epsilon)
    return layer_norm(x, weight, w.get(f"{name}.bias", np.zeros(1)), m.norm_epsilon)


def norm_backward(
    grad: Array, w: Mapping[str, Array], name: str, m: TransformerSpec, saved: Any, grads: Arrays
) -> Array:
    """Return the gradient of x; add those of the parameters to `grads`."""
    if m.norm_kind == "rms":
        dx, grads[f"{name}.weight"] = rms_norm_backward(grad, w[f"{name}.weight"], saved)
        return dx
    dx, grads[f"{name}.weight"], bias = layer_norm_backward(grad, w[f"{name}.weight"], saved)
    if f"{name}.bias" in w:
        grads[f"{name}.bias"] = bias
    return dx


def _erf(x: Array) -> Array:
    # SciPy is a dependency for this alone: with math.erf, value by value, a step of the preset
    # `small` takes 3.7 s instead of 2.5. Imported only now: `--help` should not wait for it. A
    # worker that dumps has an oracle too, and may run in an environment that has no SciPy.
    try:
        from scipy.special import erf
    except ModuleNotFoundError:
        return np.asarray(np.vectorize(math.erf, otypes=[x.dtype])(x))
    return np.asarray(erf(x))


def gelu(x: Array) -> Array:
    """Compute the exact GELU (Hendrycks and Gimpel 2016): x Phi(x), Phi the normal distribution."""
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))))


def gelu_backward(grad: Array, x: Array) -> Array:
    """dx = dy (Phi(x) + x phi(x)), with the density phi = Phi'.

    The product rule for x Phi(x). At 0 the slope is Phi(0) = 1/2, at large x it is 1.
    """
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return np.asarray(grad * (0.5 * (1 + _erf(x / math.sqrt(2))) + x * density))


def gelu_tanh(x: Array) -> Array:
    """Compute GELU by the tanh approximation, with which GPT-2 was trained.

    y = x / 2 (1 + tanh(u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)

    (Hendrycks and Gimpel 2016, section 2.)
    """
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def gelu_tanh_backward(grad: Array, x: Array) -> Array:
    """dx = dy / 2 (1 + t + x (1 - t^2) u'), with t = tanh(u), since tanh' = 1 - tanh^2."""
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)  # u'
    return np.asarray(grad * 0.5 * (1 + t + x * (1 - t * t) * inner))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def relu_backward(grad: Array, x: Array) -> Array:
    return grad * (x > 0)  # at 0 the derivative counts as 0, as in all three frameworks


def silu(x: Array) -> Array:
    """Compute x sigmoid(x) (Elfwing et al. 2018)."""
    return np.asarray(x / (1 + np.exp(-x)))


def silu_backward(grad: Array, x: Array) -> Array:
    """dx = dy (s + x s (1 - s)), with s = sigmoid(x), since s' = s (1 - s)."""
    s = 1 / (1 + np.exp(-x))
    return np.asarray(grad * (s + x * s * (1 - s)))


ACTIVATIONS = {
    "gelu": (gelu, gelu_backward),
    "gelu_tanh": (gelu_tanh, gelu_tanh_backward),
    "relu": (relu, relu_backward),
    "swiglu": (silu, silu_backward),  # of the gate
}


def softmax(x: Array) -> Array:
    """Compute exp(x) / sum(exp(x)) over the last axis."""
    e: Array = np.exp(x - x.max(-1, keepdims=True))  # the largest is exp(0): nothing overflows
    return np.asarray(e / e.sum(-1, keepdims=True))


def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return the gradients of x (..., I), weight (I, O) and bias (O,) of y = x @ weight + bias.

    dx = dy weight^T;  dweight = x^T dy and dbias = dy, each summed over all samples and positions

    From y_o = sum_i x_i weight_io: x_i reaches every y_o with the factor weight_io, and weight_io
    reaches y_o alone, with the factor x_i. The weight is the same at all samples and positions, so
    what each of them asks of it adds up: one product of (I, B S) with (B S, O).
    """
    flat_x = x.reshape(-1, x.shape[-1])  # (B S, I)
    flat_grad = grad.reshape(-1, grad.shape[-1])  # (B S, O)
    return grad @ weight.T, flat_x.T @ flat_grad, flat_grad.sum(0)


def linear(x: Array, w: Mapping[str, Array], name: str) -> Array:
    """Compute x @ weight + bias; a layer may be without a bias."""
    y: Array = np.matmul(x, w[f"{name}.weight"])
    if f"{name}.bias" in w:
        y += w[f"{name}.bias"]
    return y


def linear_backward_by_name(
    grad: Array, x: Array, w: Mapping[str, Array], name: str, grads: Arrays
) -> Array:
    """Return the gradient of x; add those of the parameters to `grads`."""
    dx, grads[f"{name}.weight"], bias = linear_backward(grad, x, w[f"{name}.weight"])
    if f"{name}.bias" in w:
        grads[f"{name}.bias"] = bias
    return dx


def rotate(x: Array, theta: float, sign: int = 1) -> Array:
    """Turn every pair of features by its position (Su et al. 2021, section 3.2.2): (B, H, S, E).

    Feature i of the first half and feature i of the second are the coordinates of a point, which at
    position s turns by the angle s theta^(-2i/E). The product of a query and a key then depends on
    the distance of their positions alone. Turning back (`sign` = -1) is its backward: a rotation's
    transpose is its inverse.

    E = 4, theta = 10,000, position 3: features 0 and 2 turn by 3, features 1 and 3 by 0.03.
    """
    half = x.shape[-1] // 2
    turns = theta ** (-np.arange(half) / half)  # (E/2,)
    angles = sign * np.arange(x.shape[-2])[:, None] * turns  # (S, E/2)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


# ------------------------------------------------------------------------------ parts of a block


def attention(
    x: Array, w: Mapping[str, Array], unit: str, m: TransformerSpec, masks: Masks
) -> tuple[Array, Any]:
    """Compute self-attention with dropout on its weights (Vaswani et al. 2017, section 3.2).

    P = softmax(q k^T / sqrt(E) + causal);  y = (P * mask) v, heads joined;  out = y @ W + b

    With fewer heads of keys and values (Ainslie et al. 2023) each is used by a group of query heads
    in a row: 4 query heads over 2 of them use 0, 0, 1, 1.
    """
    b, s, d = x.shape

    def split(y: Array) -> Array:  # (B, S, heads E) to (B, heads, S, E)
        return y.reshape(b, s, -1, m.d_head).transpose(0, 2, 1, 3)

    name = f"{unit}.attention"
    q, k, v = (split(linear(x, w, f"{name}.{part}")) for part in ("query", "key", "value"))
    if m.position == "rotary":
        q, k = rotate(q, m.rope_theta), rotate(k, m.rope_theta)
    group = m.num_heads // m.kv_heads
    k, v = k.repeat(group, 1), v.repeat(group, 1)  # (B, H, S, E)
    # Position i sees 0 to i. Minus infinity becomes a weight of exactly 0. An encoder sees all.
    causal = np.triu(np.full((s, s), -np.inf), 1) if m.causal else 0.0  # (S, S)
    weights = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(m.d_head) + causal)  # (B, H, S, S)
    mask = masks.at(unit, 0, weights.shape)  # (B, H, S, S), or 1.0
    mixed = ((weights * mask) @ v).transpose(0, 2, 1, 3).reshape(b, s, d)  # (B, S, D)
    return linear(mixed, w, f"{name}.output"), (x, q, k, v, weights, mask, mixed)


def attention_backward(
    grad: Array, w: Mapping[str, Array], unit: str, m: TransformerSpec, saved: Any, grads: Arrays
) -> Array:
    """Return the gradient of x (B, S, D); add those of the parameters to `grads`.

    With P the softmax's output, M the mask and dP = (dy v^T) * M:

        dscores = P * (dP - sum_j(dP P)) / sqrt(E)       softmax: every score moves its whole row
        dq = dscores k;  dk = dscores^T q;  dv = (P * M)^T dy

    and x feeds q, k and v, so dx is the sum of three. The softmax's line: from
    P_i = exp(s_i) / sum_j exp(s_j) follows dP_i / ds_j = P_i ([i = j] - P_j), so

        ds_j = sum_i dP_i P_i ([i = j] - P_j) = P_j (dP_j - sum_i dP_i P_i)

    Two positions with P = (1/2, 1/2) and dP = (1, 0): ds = (1/4, -1/4). A row of ds adds up to 0,
    since a number that is added to all scores of a row changes nothing.
    """
    x, q, k, v, weights, mask, mixed = saved
    b, s, _ = x.shape
    name = f"{unit}.attention"
    d_mixed = linear_backward_by_name(grad, mixed, w, f"{name}.output", grads)
    d_heads = d_mixed.reshape(b, s, m.num_heads, m.d_head).transpose(0, 2, 1, 3)  # (B, H, S, E)
    d_weights = (d_heads @ v.swapaxes(-1, -2)) * mask  # (B, H, S, S)
    # Where the causal mask was added, `weights` is 0, and so is the gradient: no mask is needed.
    row_sums = (d_weights * weights).sum(-1, keepdims=True)  # (B, H, S, 1)
    d_scores = weights * (d_weights - row_sums) / math.sqrt(m.d_head)  # (B, H, S, S)

    def of_groups(y: Array) -> Array:  # a head that a group shares gets the sum of the group
        grouped = y.reshape(b, m.kv_heads, -1, s, m.d_head)
        return np.asarray(grouped.sum(2))  # (B, K, S, E)

    per_head = {
        "query": d_scores @ k,  # (B, H, S, E)
        "key": of_groups(d_scores.swapaxes(-1, -2) @ q),  # (B, K, S, E)
        "value": of_groups((weights * mask).swapaxes(-1, -2) @ d_heads),  # (B, K, S, E)
    }
    dx: Array = np.zeros_like(x)
    for part, d_part in per_head.items():
        if m.position == "rotary" and part != "value":
            d_part = rotate(d_part, m.rope_theta, -1)
        joined = d_part.transpose(0, 2, 1, 3).reshape(b, s, -1)  # (B, S, D), of keys (B, S, K E)
        dx += linear_backward_by_name(joined, x, w, f"{name}.{part}", grads)
    return dx


def feed_forward(x: Array, w: Mapping[str, Array], unit: str, activation: str) -> tuple[Array, Any]:
    """Compute out = activation(x @ up + b) @ down + b (Vaswani et al. 2017, section 3.3).

    SwiGLU (Shazeer 2020): out = (silu(x @ gate + b) * (x @ up + b)) @ down + b.
    """
    name = f"{unit}.feed_forward"
    gated = activation == "swiglu"
    hidden = linear(x, w, f"{name}.gate" if gated else f"{name}.up")  # (B, S, F)
    up = linear(x, w, f"{name}.up") if gated else 1.0  # (B, S, F)
    active = ACTIVATIONS[activation][0](hidden)  # (B, S, F)
    return linear(active * up, w, f"{name}.down"), (x, hidden, active, up)


def feed_forward_backward(
    grad: Array, w: Mapping[str, Array], unit: str, activation: str, saved: Any, grads: Arrays
) -> Array:
    """Return the gradient of x (B, S, D); add those of the parameters to `grads`."""
    x, hidden, active, up = saved
    name = f"{unit}.feed_forward"
    d_product = linear_backward_by_name(grad, active * up, w, f"{name}.down", grads)  # (B, S, F)
    d_hidden = ACTIVATIONS[activation][1](d_product * up, hidden)  # (B, S, F)
    if activation != "swiglu":
        return linear_backward_by_name(d_hidden, x, w, f"{name}.up", grads)
    # The product rule: each factor's gradient is the product's times the other factor.
    dx = linear_backward_by_name(d_hidden, x, w, f"{name}.gate", grads)
    return dx + linear_backward_by_name(d_product * active, x, w, f"{name}.up", grads)


# ------------------------------------------------------------------------------------------ model


PIECE_BYTES = 2**32
"""What the forward may save for the backward of one piece, unless one sequence alone takes more."""


def saved_bytes(model: TransformerSpec, sequences: int) -> int:
    """Estimate what the forward of so many sequences saves for the backward."""
    # Per token and block: the attention's weights and mask (H x S each), the feed-forward layer's
    # hidden and active values (F each), and about 12 tensors of the model's width.
    per_block = 2 * model.num_heads * model.context_length + 2 * model.d_ff + 12 * model.d_model
    per_token = model.num_layers * per_block + 4 * model.vocab_size
    return 8 * sequences * model.context_length * per_token


def pieces_of(model: TransformerSpec, sequences: int, piece_bytes: int = PIECE_BYTES) -> int:
    """Return in how many pieces a mini-batch goes through the model."""
    return min(sequences, -(-saved_bytes(model, sequences) // piece_bytes))


@dataclass
class Oracle:
    """The model with its optimizer state, all by canonical name (`common.spec.parameters`)."""

    model: TransformerSpec
    train: TrainSpec
    weights: Arrays
    gradients: Arrays = field(default_factory=dict)
    first_moment: Arrays = field(default_factory=dict)
    second_moment: Arrays = field(default_factory=dict)
    output_gradients: Arrays = field(default_factory=dict)
    """By unit: the gradient of its output, from the last piece of `forward_backward`."""
    piece_bytes: int = PIECE_BYTES
    """What the forward may save; a larger mini-batch goes through in pieces."""

    def __post_init__(self) -> None:
        self.weights = {name: np.array(value, np.float64) for name, value in self.weights.items()}
        self.first_moment = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self.second_moment = {name: np.zeros_like(value) for name, value in self.weights.items()}

    def forward(
        self, batch: Batch, training: bool = True, first_sample: int = 0
    ) -> tuple[float, dict[str, Array], Any]:
        """Return the mean loss per token, every unit's output, and what the backward needs.

        Outputs are (B, S, D), of the head (B, S, V). `training=False`: without dropout.
        `first_sample` is the index of the first sequence in the mini-batch.
        """
        masks = self._masks(batch, training, first_sample)
        outputs: dict[str, Array] = {}
        saved: dict[str, Any] = {}

        x, saved["embedding"] = self._embedding(batch.inputs, masks)  # [1] (B, S, D)
        outputs["embedding"] = x
        for unit in unit_names(self.model)[1:-1]:
            x, saved[unit] = self._block(unit, x, masks)  # [2] (B, S, D)
            outputs[unit] = x
        logits, saved["head"] = self._head(x)  # [3] (B, S, V)
        outputs["head"] = logits
        # [4] -log softmax(z)[t] = log(sum(exp(z))) - z[t]; the same shift of all z changes nothing.
        shifted = logits - logits.max(-1, keepdims=True)  # (B, S, V)
        totals = np.exp(shifted).sum(-1, keepdims=True)  # (B, S, 1)
        saved["loss"] = np.exp(shifted) / totals  # (B, S, V), the softmax
        counts = batch.targets != IGNORED  # (B, S)
        # IGNORED is negative and no index: those positions pick token 0, and are not summed.
        targets = np.maximum(batch.targets, 0)[..., None]  # (B, S, 1)
        picked = np.take_along_axis(shifted, targets, -1)  # (B, S, 1)
        return float((np.log(totals) - picked)[counts].sum() / batch.num_tokens), outputs, saved

    def _masks(self, batch: Batch, training: bool, first_sample: int = 0) -> Masks:
        key = dropout_masks.step_key(self.train.seed, batch.step) if training else None
        return Masks(self.model.dropout, key, first_sample + np.arange(batch.inputs.shape[0]))

    def _embedding(self, tokens: NDArray[np.int64], masks: Masks) -> tuple[Array, Any]:
        """x = (token[t] + position) * mask; rotary positions are the blocks' [1]"""
        x = self.weights[TOKEN_EMBEDDING][tokens]  # (B, S, D)
        if self.model.position == "learned":
            x = x + self.weights["embedding.position.weight"][: tokens.shape[1]]  # (S, D)
        mask = masks.at("embedding", 0, x.shape)
        return x * mask, (tokens, mask)

    def _embedding_backward(self, grad: Array, saved: Any, grads: Arrays) -> None:
        """Scatter the gradient back to the rows that were looked up."""
        tokens, mask = saved
        grad = grad * mask  # (B, S, D)
        # `+=` with an index array would count a token that occurs twice only once. A tied head has
        # left its share in the same array already.
        np.add.at(grads[TOKEN_EMBEDDING], tokens, grad)
        if self.model.position == "learned":
            grads["embedding.position.weight"][: grad.shape[1]] = grad.sum(0)

    def _head(self, x: Array) -> tuple[Array, Any]:
        """logits = norm(x) @ W; no norm with post-norm, W the embedding's transpose if tied [3]"""
        m, w = self.model, self.weights
        normal, norm_saved = x, None
        if m.norm == "pre":
            normal, norm_saved = norm(x, w, "head.norm", m)
        projection = w[TOKEN_EMBEDDING].T if m.tied_head else w["head.output.weight"]  # (D, V)
        return normal @ projection, (normal, norm_saved, projection)  # (B, S, V)

    def _head_backward(self, grad: Array, saved: Any, grads: Arrays) -> Array:
        """dx = norm_backward(dlogits W^T); dW = norm(x)^T dlogits"""
        normal, norm_saved, projection = saved
        grad, d_projection, _ = linear_backward(grad, normal, projection)
        if self.model.tied_head:  # one weight in two places: its gradient is the sum of both
            grads[TOKEN_EMBEDDING] += d_projection.T
        else:
            grads["head.output.weight"] = d_projection
        if self.model.norm == "pre":
            grad = norm_backward(grad, self.weights, "head.norm", self.model, norm_saved, grads)
        return grad

    def _block(self, unit: str, x: Array, masks: Masks) -> tuple[Array, Any]:
        """Two sublayers around the residual stream x, each x + f(norm(x)) or norm(x + f(x)) [2]

        Pre-norm: Radford et al. 2019; post-norm: Vaswani et al. 2017, section 3.1.
        """
        m, w = self.model, self.weights
        norms: list[Any] = [None, None]
        # Sublayer 1: attention.
        y, norms[0] = norm(x, w, f"{unit}.norm_1", m) if m.norm == "pre" else (x, None)  # (B, S, D)
        out, attention_saved = attention(y, w, unit, m, masks)
        attention_mask = masks.at(unit, 1, out.shape)
        x = x + out * attention_mask
        if m.norm == "post":
            x, norms[0] = norm(x, w, f"{unit}.norm_1", m)
        # Sublayer 2: feed-forward.
        y, norms[1] = norm(x, w, f"{unit}.norm_2", m) if m.norm == "pre" else (x, None)  # (B, S, D)
        out, feed_forward_saved = feed_forward(y, w, unit, m.activation)
        feed_forward_mask = masks.at(unit, 2, out.shape)
        x = x + out * feed_forward_mask
        if m.norm == "post":
            x, norms[1] = norm(x, w, f"{unit}.norm_2", m)
        return x, (norms, attention_saved, attention_mask, feed_forward_saved, feed_forward_mask)

    def _block_backward(self, unit: str, grad: Array, saved: Any, grads: Arrays) -> Array:
        """Of y = x + f(norm(x)): dx = dy + norm_backward(f_backward(dy)). Last sublayer first."""
        m, w = self.model, self.weights
        norms, attention_saved, attention_mask, feed_forward_saved, feed_forward_mask = saved

        def of_norm(g: Array, which: int) -> Array:
            return norm_backward(g, w, f"{unit}.norm_{which}", m, norms[which - 1], grads)

        # Sublayer 2: feed-forward.
        if m.norm == "post":
            grad = of_norm(grad, 2)
        inner = feed_forward_backward(
            grad * feed_forward_mask, w, unit, m.activation, feed_forward_saved, grads
        )
        grad = grad + (of_norm(inner, 2) if m.norm == "pre" else inner)
        # Sublayer 1: attention.
        if m.norm == "post":
            grad = of_norm(grad, 1)
        inner = attention_backward(grad * attention_mask, w, unit, m, attention_saved, grads)
        return grad + (of_norm(inner, 1) if m.norm == "pre" else inner)

    def _pieces(self, batch: Batch) -> list[tuple[Batch, int, float]]:
        """Cut a mini-batch so that what is saved of a piece fits; add its first sequence's index
        and its share of the tokens.

        A piece without any target that counts is left out: its loss and gradients are 0.
        """
        count = pieces_of(self.model, len(batch.inputs), self.piece_bytes)
        if count == 1:
            return [(batch, 0, 1.0)]
        cut = batch.micro_batches(count)
        parts = [(Batch(batch.step, one.inputs, one.targets), int(one.samples[0])) for one in cut]
        return [
            (part, first, part.num_tokens / batch.num_tokens)
            for part, first in parts
            if part.num_tokens
        ]

    def evaluate(self, batch: Batch) -> float:
        """Return the mean loss per token, without dropout."""
        return sum(
            share * self.forward(part, training=False)[0] for part, _, share in self._pieces(batch)
        )

    def forward_backward(self, batch: Batch, first_sample: int = 0) -> float:
        """Return the mean loss per token; `gradients` then holds every gradient by name.

        `first_sample` is the number of the batch's first row, where it is a part of one.

        Mean losses of pieces, and their gradients, add up by the pieces' shares of the tokens.
        """
        loss, sums = 0.0, None
        for part, first, share in self._pieces(batch):
            loss += share * self._forward_backward(part, first_sample + first)
            if share != 1:
                for gradient in self.gradients.values():
                    gradient *= share
            if sums is None:
                sums = self.gradients
            else:
                for name, gradient in self.gradients.items():
                    sums[name] += gradient
        self.gradients = sums or {}
        return loss

    def _forward_backward(self, batch: Batch, first_sample: int) -> float:
        """Return the mean loss per token of a piece; `gradients` are those of that loss.

        dlogits = (softmax(logits) - onehot(target)) / number of tokens, 0 where the target is
        IGNORED

        Of the loss log(sum_j exp(z_j)) - z_t the first part's derivative by z_i is softmax(z)_i,
        the second's -1 at the target. With probabilities 0.7, 0.2, 0.1 and target 1 that is
        0.7, -0.8, 0.1: the target's logit goes up, the others down, in sum nothing.
        """
        loss, _, saved = self.forward(batch, first_sample=first_sample)
        grads = self._no_gradients()
        grad = saved["loss"]  # (B, S, V), turned into dlogits in place
        targets = np.maximum(batch.targets, 0)[..., None]  # (B, S, 1)
        np.put_along_axis(grad, targets, np.take_along_axis(grad, targets, -1) - 1, -1)
        grad *= (batch.targets != IGNORED)[..., None] / batch.num_tokens
        self.output_gradients = {}
        for unit in reversed(unit_names(self.model)):  # [5]
            self.output_gradients[unit] = grad
            grad = self._unit_backward(unit, grad, saved[unit], grads)
        self.gradients = grads
        return loss

    def probe_unit(
        self, batch: Batch, unit: str, x: Array | None, grad: Array
    ) -> tuple[Array, Array | None, Arrays]:
        """Run one unit alone: return its output, and the gradients of its input and parameters.

        `x` is its input and `grad` its output's gradient, both of the whole mini-batch: (B, S, D),
        for the head's output (B, S, V). The embedding takes the batch's tokens instead of `x`, and
        has no input gradient (None).
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
        """Return the gradient of the unit's input; empty for the embedding, which has none."""
        if unit == "head":
            return self._head_backward(grad, saved, grads)
        if unit == "embedding":
            self._embedding_backward(grad, saved, grads)
            return np.zeros(0)
        return self._block_backward(unit, grad, saved, grads)

    def apply_gradients(self, step: int) -> float:
        """Clip by the global norm, do one optimizer step (from 0), return the norm before. [6]"""
        t = self.train
        norm = global_norm([float((g**2).sum()) for g in self.gradients.values()])
        scale = clip_scale(norm, t.clip_norm)
        rate = t.learning_rate_at(step)
        for name, w in self.weights.items():
            g = self.gradients[name] * scale
            decay = t.weight_decay if t.decays(name) else 0.0
            m, v = self.first_moment[name], self.second_moment[name]
            if t.optimizer == "adamw":  # Loshchilov and Hutter 2019, algorithm 2
                m[:] = t.beta1 * m + (1 - t.beta1) * g
                v[:] = t.beta2 * v + (1 - t.beta2) * g * g
                # The moments start at 0 and would be too small at first: after step 0, m is
                # (1 - beta1) g, and divided by 1 - beta1 it is g again.
                m_hat, v_hat = m / (1 - t.beta1 ** (step + 1)), v / (1 - t.beta2 ** (step + 1))
                w[:] = w * (1 - rate * decay) - rate * m_hat / (np.sqrt(v_hat) + t.epsilon)
            else:  # momentum without dampening, decay added to the gradient: torch.optim.SGD
                m[:] = t.momentum * m + g + decay * w
                w -= rate * m
        return norm

    def train_step(self, batch: Batch) -> float:
        loss = self.forward_backward(batch)
        self.apply_gradients(batch.step)
        return loss

    def unit_outputs(self, batch: Batch, micro_batches: int) -> dict[TensorKey, Array]:
        """Return every unit's output per micro-batch, in the order of computation, as stage 0's."""
        _, outputs, _ = self.forward(batch)
        return {
            TensorKey(batch.step, "forward", 0, i, unit, "output"): piece
            for unit in unit_names(self.model)
            for i, piece in enumerate(np.array_split(outputs[unit], micro_batches))
        }


def global_norm(squared_norms: Iterable[float]) -> float:
    """Return the norm over all tensors, given each tensor's sum of squares.

    `math.fsum` rounds once, so the result does not depend on the order in which stages report:
    every partition clips by the same bits.
    """
    return math.sqrt(math.fsum(squared_norms))


def clip_scale(norm: float, clip_norm: float | None) -> float:
    """Return the factor for all gradients: min(1, clip_norm / norm), without an epsilon.

    (Pascanu et al. 2013, algorithm 1.) 1 where the norm is NaN, so that the gradients that made it
    so can still be found.
    """
    return clip_norm / norm if clip_norm is not None and norm > clip_norm else 1.0
