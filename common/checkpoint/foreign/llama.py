"""A Llama of the transformers library (Touvron et al. 2023), from and to canonical names.

    model.embed_tokens (V, D), model.layers.N.self_attn.{q,k,v,o}_proj (out, in), .mlp.gate_proj,
    up_proj (F, D) and down_proj (D, F), .input_layernorm, .post_attention_layernorm, model.norm,
    lm_head (V, D); each has a "weight" alone

Its linear weights are (out, in), the canonical ones (in, out): they are transposed. Its rotary
embedding turns the same pairs of features as ours, one of each half of a head. Everything that the
shapes do not show is in config.json, which has to be there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, Field
from safetensors.numpy import save_file

from common.checkpoint import Arrays
from common.checkpoint.foreign.converter import checked
from common.checkpoint.foreign.errors import ExchangeError
from common.checkpoint.foreign.pretrained import HEAD, Tensors, read_config, read_weights
from common.checkpoint.foreign.source import Source
from common.spec.parameters import TOKEN_EMBEDDING, parameter_shapes
from common.spec.run import TransformerSpec

BUFFER = re.compile(r"layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")
"""The turns of the rotary embedding, which older files store."""
EMBEDDING = "embed_tokens.weight"
BLOCK: Mapping[str, str] = {
    "norm_1": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "norm_2": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
FIXED: Mapping[str, Any] = {
    "norm": "pre",
    "norm_kind": "rms",
    "position": "rotary",
    "activation": "swiglu",
    "biases": False,
    "causal": True,
}
"""What makes a model a Llama."""
FIELDS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tied_head",
}
"""The specification's fields by their names in config.json."""


class _Rotary(BaseModel):
    rope_type: Literal["default"] = Field(
        "default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: float | None = None


class _Config(BaseModel):
    """What a config.json says that matters here, with the library's defaults."""

    model_type: Literal["llama"] = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    rope_theta: float = 10_000.0
    rope_scaling: _Rotary | None = None  # before transformers 5
    rope_parameters: _Rotary | None = None


def read_llama(
    source: Source,
    said: Mapping[str, Any] = MappingProxyType({}),
    tensors_from: Sequence[Path] | None = None,
) -> tuple[TransformerSpec, Arrays]:
    """Return the model and its weights.

    `said` are fields of the specification that change no weight. `tensors_from` has the tensors as
    safetensors where the source's own files have not. Raises ExchangeError, CheckpointError and
    pydantic.ValidationError.
    """
    config = read_config(source, _Config)
    if config is None:
        raise ExchangeError(f"{source.files[0]}: no config.json beside it; expected a Llama's")
    tensors = Tensors.of(tensors_from or source.files, ("model",), BUFFER)
    spec = _spec(config, said)
    spec, arrays = read_weights(tensors, spec, foreign_shapes(spec), EMBEDDING)
    return spec, checked(canonical(arrays, spec), spec)


def _spec(config: _Config, said: Mapping[str, Any]) -> TransformerSpec:
    longest = config.max_position_embeddings
    if said.get("context_length", longest) > longest:
        what = f"config.json has max_position_embeddings = {longest}; expected at most that"
        raise ExchangeError(f"context_length = {said['context_length']}: {what}")
    heads, width = config.num_attention_heads, config.hidden_size
    if config.head_dim not in (None, width // heads):
        what = f"expected hidden_size / num_attention_heads = {width // heads}"
        raise ExchangeError(f"config.json has head_dim = {config.head_dim}; {what}")
    # Before transformers 5 theta stands by itself, since then within rope_parameters.
    fields = {ours: getattr(config, theirs) for theirs, ours in FIELDS.items()}
    rotary = config.rope_scaling or config.rope_parameters
    if rotary is not None and rotary.rope_theta is not None:
        fields["rope_theta"] = rotary.rope_theta
    return TransformerSpec.model_validate({**FIXED, **fields, **said})


def write_llama(spec: TransformerSpec, weights: Mapping[str, NDArray[Any]], folder: Path) -> None:
    """Write a folder for `from_pretrained`. Raises ExchangeError for a model that is no Llama."""
    for name, value in FIXED.items():
        if getattr(spec, name) != value:
            raise ExchangeError(
                f"{name} = {getattr(spec, name)}: not a Llama's; expected {name} = {value}"
            )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **{theirs: getattr(spec, ours) for theirs, ours in FIELDS.items()},
        "bos_token_id": None,  # the library's defaults would end a text at token 2
        "eos_token_id": None,
    }
    # A norm has one axis: its transpose is itself.
    tensors = {
        short if short == HEAD else f"model.{short}": np.ascontiguousarray(
            weights[name] if name == TOKEN_EMBEDDING else weights[name].T
        )
        for name, short in _names(spec).items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def canonical(arrays: Mapping[str, NDArray[Any]], spec: TransformerSpec) -> Arrays:
    """Return the library's weights, or their gradients, by canonical name and as (in, out)."""
    return {
        name: arrays[short] if name == TOKEN_EMBEDDING else arrays[short].T
        for name, short in _names(spec).items()
    }


def foreign_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Return what a file of this model holds, by the library's names, without a head."""
    shapes = parameter_shapes(spec)
    return {
        short: shapes[name] if name == TOKEN_EMBEDDING else shapes[name][::-1]
        for name, short in _names(spec).items()
        if short != HEAD
    }


def _names(spec: TransformerSpec) -> dict[str, str]:
    """Map canonical names to the library's, without "model." before them."""
    names = {
        TOKEN_EMBEDDING: EMBEDDING,
        "head.norm.weight": "norm.weight",
        "head.output.weight": HEAD,
    }
    for i in range(spec.num_layers):
        for ours, theirs in BLOCK.items():
            names[f"block.{i}.{ours}.weight"] = f"layers.{i}.{theirs}.weight"
    return {name: names[name] for name in parameter_shapes(spec)}
