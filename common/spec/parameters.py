"""Canonical parameter names, shapes and initial values: the one vocabulary of all tensors.

Weights, gradients, moments, checkpoints and dumps all use these names. Linear weights are (in,
out): `y = x @ weight + bias`. Every implementation maps the names to its own parameters one by one;
none of them guesses a transpose from a shape.

Letters in shapes: D width of the model, F of the feed-forward layer, V vocabulary, S context.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.spec.run import TransformerSpec

Check = Literal[
    "activation", "loss", "gradient", "optimizer_step", "trained_parameter", "loss_curve"
]


class TensorKey(NamedTuple):
    """Where in a run a tensor belongs. Micro-batch -1 is the whole mini-batch."""

    step: int
    phase: str
    stage: int
    micro_batch: int
    unit: str
    tensor: str

    def __str__(self) -> str:
        micro_batch = "all" if self.micro_batch < 0 else str(self.micro_batch)
        return (
            f"step={self.step}/phase={self.phase}/stage={self.stage}/micro_batch={micro_batch}"
            f"/unit={self.unit}/tensor={self.tensor}"
        )

    @classmethod
    def parse(cls, text: str) -> TensorKey:
        """Read the text form, `step=0/phase=forward/...`. Raises ValueError."""
        try:
            fields = dict(part.split("=", 1) for part in text.split("/"))
            i = -1 if fields["micro_batch"] == "all" else int(fields["micro_batch"])
            step, stage = int(fields["step"]), int(fields["stage"])
            return cls(step, fields["phase"], stage, i, fields["unit"], fields["tensor"])
        except (KeyError, ValueError):
            raise ValueError(f"{text!r} is not a tensor key") from None


TOKEN_EMBEDDING = "embedding.token.weight"


def unit_names(model: TransformerSpec) -> list[str]:
    """Return the units in forward order: embedding, block.0 .. block.(n-1), head."""
    return ["embedding", *(f"block.{i}" for i in range(model.num_layers)), "head"]


def unit_of(name: str) -> str:
    """Return the unit that parameter `name` belongs to; a tied head's weight is the embedding's."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "block" else parts[0]


def parameter_shapes(model: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Return canonical names and shapes, in the order of the forward pass."""
    d, f = model.d_model, model.d_ff  # D, F
    kv = model.kv_heads * model.d_head  # D, or less where heads share keys and values
    shapes: dict[str, tuple[int, ...]] = {TOKEN_EMBEDDING: (model.vocab_size, d)}  # (V, D)
    if model.position == "learned":
        shapes["embedding.position.weight"] = (model.context_length, d)  # (S, D)
    for i in range(model.num_layers):
        block: dict[str, tuple[int, ...]] = {
            "norm_1.weight": (d,),
            "norm_1.bias": (d,),
            "attention.query.weight": (d, d),
            "attention.query.bias": (d,),
            "attention.key.weight": (d, kv),  # no bias: softmax cancels it (`TransformerSpec`)
            "attention.value.weight": (d, kv),
            "attention.value.bias": (kv,),
            "attention.output.weight": (d, d),
            "attention.output.bias": (d,),
            "norm_2.weight": (d,),
            "norm_2.bias": (d,),
            "feed_forward.gate.weight": (d, f),  # (D, F)
            "feed_forward.gate.bias": (f,),
            "feed_forward.up.weight": (d, f),  # (D, F)
            "feed_forward.up.bias": (f,),
            "feed_forward.down.weight": (f, d),  # (F, D)
            "feed_forward.down.bias": (d,),
        }
        shapes |= {f"block.{i}.{name}": shape for name, shape in block.items()}
    # With post-norm the last block ends in a norm of its own, and the head needs none.
    if model.norm == "pre":
        shapes |= {"head.norm.weight": (d,), "head.norm.bias": (d,)}
    if not model.tied_head:
        shapes["head.output.weight"] = (d, model.vocab_size)  # (D, V)
    return {name: shape for name, shape in shapes.items() if _has(model, name)}


def _has(model: TransformerSpec, name: str) -> bool:
    """Return whether a model of this kind has the parameter."""
    if ".gate." in name and model.activation != "swiglu":
        return False
    is_rms = model.norm_kind == "rms" and "norm" in name
    return not name.endswith(".bias") or (model.biases and not is_rms)


def parameter_names(model: TransformerSpec, units: Sequence[str]) -> list[str]:
    """Return the canonical names of the parameters that `units` use, in canonical order.

    A tied head uses the token embedding, so a part with the head alone lists it too, last.
    """
    names = [name for name in parameter_shapes(model) if unit_of(name) in units]
    if model.tied_head and "head" in units and TOKEN_EMBEDDING not in names:
        names.append(TOKEN_EMBEDDING)
    return names


def _normal(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Return standard normal values that depend on `name`, `shape` and `seed` only.

    Each name has a random stream of its own, so a stage can make its weights without the others'.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)


def initial_weights(model: TransformerSpec, seed: int, dtype: str) -> dict[str, NDArray[Any]]:
    """Return initial values by canonical name, the same for every partition and framework.

    As in GPT-2 (Radford et al. 2019): normal with standard deviation 0.02, the two projections into
    the residual stream divided by sqrt(2 x num_layers); norms 1, biases 0. Values are exact in
    float32, so that float64 runs start from the same model.
    """
    weights = {}
    for name, shape in parameter_shapes(model).items():
        # "bias" first: a norm's bias is 0, too.
        if name.endswith("bias"):
            value = np.zeros(shape)
        elif "norm" in name:
            value = np.ones(shape)
        else:
            # 2 x num_layers of these outputs are summed; so the sum does not grow with depth.
            residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            value = _normal(name, shape, seed) * (
                0.02 / math.sqrt(2 * model.num_layers) if residual else 0.02
            )
        weights[name] = value.astype(np.float32).astype(dtype)
    return weights


def random_arrays(
    model: TransformerSpec, seed: int, dtype: str, scale: float
) -> dict[str, NDArray[Any]]:
    """Return a random array per parameter: noise for weights, or gradients to test an optimizer."""
    return {
        name: (scale * _normal(f"random/{name}", shape, seed)).astype(np.float32).astype(dtype)
        for name, shape in parameter_shapes(model).items()
    }


def first_factor(name: str, is_copy: bool, columns: int, rank: int, seed: int) -> NDArray[Any]:
    """Return PowerSGD's Q before the first step, (columns, rank): float32, equal on all replicas.

    `is_copy` says that `name` is a tied head's copy of that parameter, a tensor of its own.
    """
    what = "powersgd-copy" if is_copy else "powersgd"
    return _normal(f"{what}/{name}", (columns, rank), seed).astype(np.float32)
