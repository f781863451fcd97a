"""A GPT-2 of the transformers library (Radford et al. 2019) from a local safetensors file, in canonical names.

    wte.weight (V, D), wpe.weight (S, D), h.N.ln_1, h.N.attn.c_attn (D, 3 D), h.N.attn.c_proj, h.N.ln_2,
    h.N.mlp.c_fc (D, F), h.N.mlp.c_proj (F, D), ln_f; with or without "transformer." before them

Its linear layers ("Conv1D") are (in, out), as the canonical ones. Query, key and value are one matrix there. The key's bias
is dropped: it adds the same number to all scores of a query, and softmax cancels it. GPT-2's GELU is the tanh form.
What the weights do not say, such as the number of heads, is read from config.json beside the file, if there is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from safetensors import safe_open

from common import snapshot
from common.exchange.child import ExchangeError, check_names, checked
from common.snapshot import Arrays
from common.snapshot.manifest import clip, one_line
from common.spec import TransformerSpec
from common.weights import parameter_shapes

BUFFER = re.compile(r"h\.[0-9]+\.attn\.(bias|masked_bias)")
"""The causal mask, which older files carry as a tensor."""
ACTIVATIONS: Mapping[str, Literal["gelu", "gelu_tanh", "relu"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
MAX_CONFIG_BYTES = 2**20
D_HEAD = 64
"""Of every published GPT-2; only where no config.json and no option says otherwise."""


class _Config(BaseModel):
    """What a config.json says besides the shapes; the rest of it changes no number here."""

    n_head: int | None = Field(None, ge=1)
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"] = "gelu_new"
    layer_norm_epsilon: float = Field(1e-5, ge=0)
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False


def read_gpt2(path: Path, num_heads: int | None = None) -> tuple[TransformerSpec, Arrays]:
    """The model and its weights. Raises ExchangeError, SnapshotError and pydantic.ValidationError."""
    with snapshot.opened(path) as file:
        header = snapshot.read_header(file, path)
    names = {name.removeprefix("transformer."): name for name in header}
    shapes = {short: header[name].shape for short, name in names.items()}
    for name in names.values():
        if header[name].dtype not in ("float32", "float64", "F16", "BF16") and not BUFFER.fullmatch(name):
            raise ExchangeError(f"{path}: {name[:80]} has dtype {header[name].dtype}; right would be float32")
    spec = _spec(path, shapes, num_heads)
    wanted = foreign_shapes(spec)
    tensors = {name for name in shapes if not BUFFER.fullmatch(name)}
    if spec.tied_head:
        tensors.discard("lm_head.weight")
    check_names(tensors, set(wanted))
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ExchangeError(f"{path}: {name} has shape {list(shapes[name])}; right would be {list(shape)}")
    with safe_open(path, "numpy") as found:

        def tensor(name: str) -> NDArray[Any]:
            entry = header[names[name]]
            return _bfloat16(path, entry) if entry.dtype == "BF16" else found.get_tensor(names[name])

        arrays = {name: tensor(name) for name in wanted}
        if spec.tied_head and "lm_head.weight" in names:
            head = tensor("lm_head.weight")
            if not np.array_equal(head, arrays["wte.weight"]):
                arrays, spec = arrays | {"lm_head.weight": head}, spec.model_copy(update={"tied_head": False})
    return spec, checked(_canonical(arrays, spec), spec)


def _bfloat16(path: Path, entry: snapshot.HeaderEntry) -> NDArray[np.float32]:
    """A tensor of a type that NumPy lacks: the upper half of a float32."""
    bits = np.fromfile(path, "<u2", math.prod(entry.shape), offset=entry.first_byte)
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)


def _spec(path: Path, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None) -> TransformerSpec:
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if len(shapes.get(name, ())) != 2:
            raise ExchangeError(f"{path}: {name} is missing; right would be a GPT-2 of the transformers library")
    config = _config(path.with_name("config.json"))
    vocab_size, d_model = shapes["wte.weight"]
    heads = num_heads or config.n_head or d_model / D_HEAD
    if heads != int(heads):
        raise ExchangeError(f"{path}: how many heads? right would be with --num-heads, or a config.json beside it")
    return TransformerSpec(
        vocab_size=vocab_size,
        context_length=shapes["wpe.weight"][0],
        num_layers=sum(bool(re.fullmatch(r"h\.[0-9]+\.ln_1\.weight", name)) for name in shapes),
        d_model=d_model,
        num_heads=int(heads),
        d_ff=shapes["h.0.mlp.c_fc.weight"][1],
        norm="pre",
        activation=ACTIVATIONS[config.activation_function],
        tied_head=True,
        norm_epsilon=config.layer_norm_epsilon,
    )


def _config(path: Path) -> _Config:
    """The config.json, or what it is without one. Raises ExchangeError."""
    if not path.exists():
        return _Config()
    with snapshot.opened(path) as file:
        text = file.read(MAX_CONFIG_BYTES)
    try:
        return _Config.model_validate_json(text)
    except ValidationError as error:
        given = clip(repr(error.errors()[0]["input"]))
        raise ExchangeError(f"{path}: {one_line(error)}, not {given}") from None


def foreign_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """What a file of this model holds, by the library's names; a tied head is not in it."""
    d, f = spec.d_model, spec.d_ff
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (spec.vocab_size, d), "wpe.weight": (spec.context_length, d)}
    for i in range(spec.num_layers):
        parts = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, f), "mlp.c_proj": (f, d)}
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
        found["head.output.weight"] = arrays["lm_head.weight"].T
    for i in range(spec.num_layers):
        for part in ("weight", "bias"):
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
