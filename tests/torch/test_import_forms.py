"""The state dicts that users of PyTorch have: wrapped, nested, halved, tied, sharded, hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint.foreign.converter import checked
from common.checkpoint.foreign.errors import ExchangeError
from common.spec.parameters import random_arrays
from common.spec.run import TransformerSpec
from torch_impl.convert import plain_model, read_weights, write_weights

MODEL = TransformerSpec(
    context_length=6, num_layers=2, d_model=12, num_heads=2, d_ff=20, tied_head=True
)
WEIGHTS = random_arrays(MODEL, 1, "float32", 0.5)
HEAD = "head.output.weight"


@pytest.fixture
def state(tmp_path: Path) -> dict[str, torch.Tensor]:
    write_weights(MODEL, WEIGHTS, tmp_path / "plain.pt")
    return dict(torch.load(tmp_path / "plain.pt", weights_only=True))


def read(path: Path, model: TransformerSpec = MODEL) -> dict[str, Any]:
    return checked(read_weights(model, path), model)


def test_every_form_of_a_state_dict_is_the_same_weights(
    state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untied = {name: value for name, value in state.items() if name != HEAD}
    optimizer = torch.optim.AdamW(plain_model(MODEL).parameters())
    forms: dict[str, tuple[Any, str]] = {
        "distributed": (
            {f"module.{name}": value for name, value in state.items()},
            "'module' (DistributedDataParallel)",
        ),
        "compiled": (
            {f"_orig_mod.{name}": value for name, value in state.items()},
            "'_orig_mod' (torch.compile)",
        ),
        "sharded": (
            {
                f"_fsdp_wrapped_module.{name.replace('.0.', '.0._fsdp_wrapped_module.')}": v
                for name, v in state.items()
            },
            "(FullyShardedDataParallel)",
        ),
        "lightning": (
            {"epoch": 1, "state_dict": {f"model.{name}": value for name, value in state.items()}},
            "'model' was taken off",
        ),
        "loop": (
            {"model": state, "optimizer": optimizer.state_dict(), "step": 3},
            "'model'; not read: optimizer, step",
        ),
        "deep": ({"state": 1, "model": {"module": state}}, "'module'"),
        "tied": (untied, ""),
    }
    for name, (content, message) in forms.items():
        torch.save(content, tmp_path / f"{name}.pt")
        for key, value in read(tmp_path / f"{name}.pt").items():
            np.testing.assert_array_equal(value, WEIGHTS[key], err_msg=name)
        assert message in capsys.readouterr().out
    save_file(
        {name: value.contiguous() for name, value in untied.items()}, tmp_path / "model.safetensors"
    )
    for n, part in enumerate((list(untied)[::2], list(untied)[1::2])):
        torch.save({name: untied[name] for name in part}, tmp_path / f"part-{n}.bin")
    index = {"weight_map": {name: f"part-{n % 2}.bin" for n, name in enumerate(untied)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    # The folder: its safetensors file comes first.
    for place in (tmp_path, tmp_path / "pytorch_model.bin.index.json"):
        for key, value in read(place).items():
            np.testing.assert_array_equal(value, WEIGHTS[key])


def test_sixteen_bits_and_mixes_become_float32(
    state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "low.pt")
        found = read(tmp_path / "low.pt")
        assert {str(value.dtype) for value in found.values()} == {"float32"}
        np.testing.assert_array_equal(
            found["embedding.token.weight"],
            state["embedding.token.weight"].to(dtype).float().numpy(),
        )
        assert (
            f"note: {str(dtype).removeprefix('torch.')} becomes float32" in capsys.readouterr().out
        )
    first, *rest = state
    torch.save(
        {first: state[first].double(), **{name: state[name] for name in rest}},
        tmp_path / "mixed.pt",
    )
    assert read(tmp_path / "mixed.pt")["block.0.norm_1.bias"].dtype == np.float32
    assert "float32, float64 becomes float32" in capsys.readouterr().out


def test_what_is_no_state_dict_of_the_model_is_refused(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    name = "block.0.norm_1.bias"
    wrong = {
        "are both embedding.token.weight": state
        | {"module.embedding.token.weight": state["embedding.token.weight"]},
        f"{name} has dtype torch.int64": state | {name: state[name].long()},
        f"{name} has shape [1000000000000]": state | {name: torch.zeros(1).expand(10**12)},
        "the head differs from the token embedding": state | {HEAD: state[HEAD] + 1},
        "a checkpoint with one under 'state_dict' or 'model'": {"optimizer": {}, "epoch": 1},
        "weights_only": torch.nn.Linear(2, 2),
    }
    for message, content in wrong.items():
        torch.save(content, tmp_path / "wrong.pt")
        with pytest.raises(ExchangeError) as error:
            read(tmp_path / "wrong.pt")
        assert message in str(error.value) and "\n" not in str(error.value)
