"""Canonical parameter names, shapes and initial values.

Linear weights are (in, out): `y = x @ weight + bias`. Every implementation maps these names to its own parameters one by
one; none of them guesses a transpose from a shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.spec.run import TransformerSpec

Check = Literal["activation", "loss", "gradient", "optimizer_step", "trained_parameter", "loss_curve"]


class TensorKey(NamedTuple):
    """Where in a run a tensor lives. Micro-batch -1: the whole mini-batch."""

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
        """Reads the text form. Raises ValueError."""
        try:
            fields = dict(part.split("=", 1) for part in text.split("/"))
            micro_batch = -1 if fields["micro_batch"] == "all" else int(fields["micro_batch"])
            return cls(
                int(fields["step"]),
                fields["phase"],
                int(fields["stage"]),
                micro_batch,
                fields["unit"],
                fields["tensor"],
            )
        except (KeyError, ValueError):
            raise ValueError(f"{text!r} is not a tensor key") from None


TOKEN_EMBEDDING = "embedding.token.weight"


def unit_names(model: TransformerSpec) -> list[str]:
    """The units in the order of the forward pass: embedding, block.0 .. block.(n-1), head."""
    return ["embedding", *(f"block.{i}" for i in range(model.num_layers)), "head"]


def unit_of(name: str) -> str:
    """The unit that the parameter `name` belongs to; a tied head's weight belongs to the embedding."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "block" else parts[0]


def parameter_shapes(model: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape, in the order of the forward pass."""
    d, f = model.d_model, model.d_ff
    shapes: dict[str, tuple[int, ...]] = {
        TOKEN_EMBEDDING: (model.vocab_size, d),
        "embedding.position.weight": (model.context_length, d),
    }
    for i in range(model.num_layers):
        block = {
            "norm_1.weight": (d,),
            "norm_1.bias": (d,),
            "attention.query.weight": (d, d),
            "attention.query.bias": (d,),
            "attention.key.weight": (d, d),
            "attention.value.weight": (d, d),
            "attention.value.bias": (d,),
            "attention.output.weight": (d, d),
            "attention.output.bias": (d,),
            "norm_2.weight": (d,),
            "norm_2.bias": (d,),
            "feed_forward.up.weight": (d, f),
            "feed_forward.up.bias": (f,),
            "feed_forward.down.weight": (f, d),
            "feed_forward.down.bias": (d,),
        }
        shapes |= {f"block.{i}.{name}": shape for name, shape in block.items()}
    if model.norm == "pre":
        shapes |= {"head.norm.weight": (d,), "head.norm.bias": (d,)}
    if not model.tied_head:
        shapes["head.output.weight"] = (d, model.vocab_size)
    return shapes


def parameter_names(model: TransformerSpec, units: Sequence[str]) -> list[str]:
    """The canonical names of the parameters that `units` use, in canonical order.

    A tied head uses the token embedding, so a part with the head alone lists it too.
    """
    names = [name for name in parameter_shapes(model) if unit_of(name) in units]
    if model.tied_head and "head" in units and TOKEN_EMBEDDING not in names:
        names.append(TOKEN_EMBEDDING)
    return names


def _normal(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Standard normal values that depend on `name`, `shape` and `seed` only."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)


def initial_weights(model: TransformerSpec, seed: int, dtype: str) -> dict[str, NDArray[Any]]:
    """Initial values by canonical name, whatever the partition and the framework.

    As GPT-2: normal with standard deviation 0.02, the two projections into the residual stream divided by
    sqrt(2 x num_layers); norms 1, biases 0. Values are exact in float32, so float64 runs start from the same model.
    """
    weights = {}
    for name, shape in parameter_shapes(model).items():
        if name.endswith("bias"):
            value = np.zeros(shape)
        elif "norm" in name:
            value = np.ones(shape)
        else:
            residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            value = _normal(name, shape, seed) * (0.02 / math.sqrt(2 * model.num_layers) if residual else 0.02)
        weights[name] = value.astype(np.float32).astype(dtype)
    return weights


def random_arrays(model: TransformerSpec, seed: int, dtype: str, scale: float) -> dict[str, NDArray[Any]]:
    """One random array per parameter: noise to add to weights, or gradients to test an optimizer with."""
    return {
        name: (scale * _normal(f"random/{name}", shape, seed)).astype(np.float32).astype(dtype)
        for name, shape in parameter_shapes(model).items()
    }
