"""The transformers library's GPT-2 (Radford et al. 2019) from safetensors, in canonical names.

    wte.weight (V, D), wpe.weight (S, D), h.N.ln_1, h.N.attn.c_attn (D, 3 D), h.N.attn.c_proj,
    h.N.ln_2, h.N.mlp.c_fc (D, F), h.N.mlp.c_proj (F, D), ln_f; with or without "transformer.", or a
    wrapper's word, before them

Its linear layers ("Conv1D") are (in, out), as the canonical ones. Query, key and value are one
matrix there. The key's bias is dropped: it adds the same number to all scores of a query, and
softmax cancels it. GPT-2's GELU is the tanh form. What the weights do not say, such as the number
of heads, is read from the model's config.json, or said by the user.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from common.checkpoint import Arrays
from common.checkpoint.foreign.converter import checked
from common.checkpoint.foreign.errors import ExchangeError, note
from common.checkpoint.foreign.pretrained import HEAD, Tensors, read_config, read_weights
from common.checkpoint.foreign.source import Source
from common.spec.parameters import parameter_shapes
from common.spec.rounding import round_to_float32
from common.spec.run import TransformerSpec

BUFFER = re.compile(r"h\.[0-9]+\.attn\.(bias|masked_bias)")
"""The causal mask, which older files store as a tensor."""
ACTIVATIONS: Mapping[str, Literal["gelu", "gelu_tanh", "relu"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
NOT_IN_THE_WEIGHTS: Mapping[str, str] = {
    "num_heads": "n_head",
    "activation": "activation_function",
    "norm_epsilon": "layer_norm_epsilon",
}
"""What the shapes do not show, by its name in config.json."""


IN_THE_WEIGHTS: Mapping[str, str] = {
    "n_layer": "num_layers",
    "n_embd": "d_model",
    "n_inner": "d_ff",
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
}
"""What config.json and the shapes both say: they have to agree, or a part is missing."""


class _Config(BaseModel):
    """What a config.json says that matters here; the rest of it changes no number."""

    model_type: Literal["gpt2"] = "gpt2"
    n_layer: int | None = None
    n_embd: int | None = None
    n_inner: int | None = None
    vocab_size: int | None = None
    n_positions: int | None = None

    n_head: int | None = Field(None, ge=1)
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"] = "gelu_new"
    layer_norm_epsilon: float = Field(1e-5, ge=0)
    tie_word_embeddings: bool = True
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False


def read_gpt2(
    source: Source,
    said: Mapping[str, Any] = MappingProxyType({}),
    tensors_from: Sequence[Path] | None = None,
) -> tuple[TransformerSpec, Arrays]:
    """Return the model and its weights.

    `said` are fields of the specification that the shapes do not show. `tensors_from` has the
    tensors as safetensors where the source's own files have not. Raises ExchangeError,
    CheckpointError and pydantic.ValidationError.
    """
    tensors = Tensors.of(tensors_from or source.files, ("transformer", "model"), BUFFER)
    config = read_config(source, _Config) or _Config()
    spec = _spec(tensors, config, said)
    for field, name in IN_THE_WEIGHTS.items():
        if getattr(config, field) not in (None, getattr(spec, name)):
            said_there = f"config.json says {field} = {getattr(config, field)}"
            raise ExchangeError(
                f"{tensors.path}: {name} = {getattr(spec, name)} by its tensors; {said_there}; "
                "expected the same"
            )
    spec, arrays = read_weights(tensors, spec, foreign_shapes(spec), "wte.weight")
    return spec, checked(_canonical(arrays, spec), spec)


def _spec(tensors: Tensors, config: _Config, said: Mapping[str, Any]) -> TransformerSpec:
    path, shapes = tensors.path, tensors.shapes
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if len(shapes.get(name, ())) != 2:
            raise ExchangeError(
                f"{path}: {name} is missing; expected a GPT-2 of the transformers library"
            )
    given: dict[str, Any] = {
        "num_heads": config.n_head,
        "activation": ACTIVATIONS[config.activation_function],
        "norm_epsilon": config.layer_norm_epsilon,
    }
    # Options are float32 (`common.spec.rounding`), and compared with the same rounding.
    if "norm_epsilon" in said:  # which is rounded
        given["norm_epsilon"] = round_to_float32(config.layer_norm_epsilon)
    for name, field in NOT_IN_THE_WEIGHTS.items():
        if field in config.model_fields_set and given[name] not in (
            None,
            said.get(name, given[name]),
        ):
            raise ExchangeError(
                f"{name} = {said[name]}: config.json has {field} = {given[name]}; expected the same"
            )
    vocab_size, d_model = shapes["wte.weight"]
    fields = given | dict(said)
    if fields["num_heads"] is None:
        raise ExchangeError(
            f"{path}: how many heads? add --num-heads, or a config.json beside it (the published "
            f"GPT-2s have d_model / 64, here {d_model / 64:g})"
        )
    known = {
        *said,
        *(name for name, field in NOT_IN_THE_WEIGHTS.items() if field in config.model_fields_set),
    }
    if unsaid := [name for name in NOT_IN_THE_WEIGHTS if name not in known]:
        note(
            "no config.json says "
            f"{', '.join(f'{name} = {_shown(fields[name])}' for name in unsaid)}; taken as in GPT-2"
        )
    return TransformerSpec.model_validate(
        {
            "vocab_size": vocab_size,
            "context_length": shapes["wpe.weight"][0],
            "num_layers": sum(
                bool(re.fullmatch(r"h\.[0-9]+\.ln_1\.weight", name)) for name in shapes
            ),
            "d_model": d_model,
            "d_ff": shapes["h.0.mlp.c_fc.weight"][1],
            "norm": "pre",
            "tied_head": config.tie_word_embeddings,
        }
        | fields
    )


def _shown(value: Any) -> str:
    # Shorter: float32's 1e-05 has many more digits as float64.
    return f"{value:g}" if isinstance(value, float) else str(value)


def foreign_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Return what a file of this model holds, by the library's names; a tied head is not stored."""
    d, f = spec.d_model, spec.d_ff
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (spec.vocab_size, d),
        "wpe.weight": (spec.context_length, d),
    }
    for i in range(spec.num_layers):
        parts = {
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (d, f),
            "mlp.c_proj": (f, d),
        }
        for name, shape in parts.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (d,), f"h.{i}.{name}.bias": (d,)}
    return shapes | {"ln_f.weight": (d,), "ln_f.bias": (d,)}


def _canonical(arrays: Mapping[str, NDArray[Any]], spec: TransformerSpec) -> Arrays:
    found = {
        "embedding.token.weight": arrays["wte.weight"],
        "embedding.position.weight": arrays["wpe.weight"],
        "head.norm.weight": arrays["ln_f.weight"],
        "head.norm.bias": arrays["ln_f.bias"],
    }
    if not spec.tied_head:
        found["head.output.weight"] = arrays[HEAD].T
    for i in range(spec.num_layers):
        for part in ("weight", "bias"):
            # c_attn (D, 3 D) has the three side by side; so has its bias, (3 D,).
            query, key, value = np.split(arrays[f"h.{i}.attn.c_attn.{part}"], 3, axis=-1)
            block = {
                f"norm_1.{part}": arrays[f"h.{i}.ln_1.{part}"],
                f"attention.query.{part}": query,
                f"attention.key.{part}": key,
                f"attention.value.{part}": value,
                f"attention.output.{part}": arrays[f"h.{i}.attn.c_proj.{part}"],
                f"norm_2.{part}": arrays[f"h.{i}.ln_2.{part}"],
                f"feed_forward.up.{part}": arrays[f"h.{i}.mlp.c_fc.{part}"],
                f"feed_forward.down.{part}": arrays[f"h.{i}.mlp.c_proj.{part}"],
            }
            found |= {f"block.{i}.{name}": array for name, array in block.items()}
    return {name: found[name] for name in parameter_shapes(spec)}  # without the keys' biases
