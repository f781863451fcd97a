"""`python -m tests.references.gpt2_reference make FOLDER`: the transformers library's GPT-2, with
random weights.

`check FOLDER`: the same logits from the checkpoint that was imported, through our pipeline of two
stages.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

CONTEXT, VOCABULARY = 12, 301
TOLERANCE = 1e-8
"""The specification rounds LayerNorm's epsilon to float32, which changes it by 3e-8 of itself."""


def make(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=24, n_layer=3, n_head=3, n_inner=40
    )
    model = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that each of them matters
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (4, CONTEXT)))
    with torch.no_grad():
        logits = model(tokens).logits
        text = tokens[:1, :4]
        for _ in range(CONTEXT - 4):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    np.savez(
        folder / "expected.npz", tokens=tokens.numpy(), logits=logits.numpy(), text=text.numpy()
    )
    model.save_pretrained(folder / "gpt2")
    save_pickled(model.state_dict(), folder)


def save_pickled(state: dict[str, torch.Tensor], folder: Path) -> None:
    """`bin`: shards with an index, as the library saved them once. checkpoint.pt: a training
    loop's, of a wrapped model.
    """
    (folder / "bin").mkdir()
    shutil.copy(folder / "gpt2" / "config.json", folder / "bin")
    names = sorted(state)
    places = {name: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, name in enumerate(names)}
    for place in set(places.values()):
        torch.save(
            {name: state[name] for name in names if places[name] == place}, folder / "bin" / place
        )
    (folder / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    wrapped = {
        f"module._orig_mod.{name}": tensor
        for name, tensor in state.items()
        if name != "lm_head.weight"
    }
    wrapped["module._orig_mod.transformer.h.0.attn.bias"] = torch.ones(
        1, 1, CONTEXT, CONTEXT, dtype=torch.bool
    )
    torch.save({"model": wrapped, "epoch": 3, "optimizer": {"state": {}}}, folder / "checkpoint.pt")


def check(folder: Path) -> None:
    from common import checkpoint
    from common.spec.run import RunConfig, TrainSpec
    from torch_impl.engine import build_engine

    saved, expected = checkpoint.load(folder / "imported"), np.load(folder / "expected.npz")
    train = TrainSpec(batch_size=4, micro_batches=2, dtype="float64")
    engine = build_engine(
        RunConfig(model=saved.manifest.model, train=train, tokenizer="bpe", threads=2)
    )
    engine.reset(saved.weights)
    found = engine.predict(expected["tokens"])
    engine.close()
    error = np.linalg.norm(found - expected["logits"]) / np.linalg.norm(expected["logits"])
    print(f"relative difference of the logits: {error:.1e}")
    assert error < TOLERANCE


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
