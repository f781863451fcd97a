"""`python -m tests.references.llama_reference make FOLDER`: the transformers library's Llama,
with random weights; its logits and gradients, as it comes and in float64 throughout.

`check FOLDER`: the library loads what `triptych export` made of it, with the same logits.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

CONTEXT, VOCABULARY = 12, 256
EPSILON = 2**-17
"""The specification rounds it to float32, and this one is exact there."""


def make(folder: Path) -> None:
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, VOCABULARY, (2, 4, CONTEXT))
    np.savez(folder / "tokens.npz", tokens=tokens, targets=targets)
    for tied in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=EPSILON,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
        model = LlamaForCausalLM(config).double().eval()
        with torch.no_grad():
            # Norms too, so that each of them matters. Larger weights make the softmax steep, which
            # enlarges what float32 rounds: with 0.3 gradients differ by 4e-6 as it comes.
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        name = "tied" if tied else "untied"
        save(folder / f"{name}-as-it-comes.npz", model, tokens, targets)
        with in_float64(model):
            save(folder / f"{name}-float64.npz", model, tokens, targets)
        model.save_pretrained(folder / name, max_shard_size="20KB")
    model.bfloat16().save_pretrained(folder / "bfloat16")


def save(path: Path, model: Any, tokens: Any, targets: Any) -> None:
    """Write the logits and the gradient of every parameter."""
    model.zero_grad()
    logits = model(torch.from_numpy(tokens)).logits
    functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()).backward()
    gradients = {
        name.removeprefix("model."): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
    }
    np.savez(path, logits=logits.detach().numpy(), **gradients)


@contextlib.contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Replace what the library computes in float32 whatever the dtype: norms, angles, softmax."""

    def norm(self: Any, x: Any) -> Any:
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    def angles(self: Any, x: Any, position_ids: Any) -> Any:
        width = self.config.head_dim
        powers = -torch.arange(0, width, 2, dtype=torch.float64) / width
        turns = self.config.rope_parameters["rope_theta"] ** powers  # (E/2,)
        both = (position_ids[..., None] * turns).repeat(1, 1, 2)  # (B, S, E)
        return both.cos(), both.sin()

    model.set_attn_implementation("sdpa")  # PyTorch's own, whose softmax keeps the dtype
    with (
        mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", norm),
        mock.patch.object(modeling_llama.LlamaRotaryEmbedding, "forward", angles),
    ):
        yield


def check(folder: Path) -> None:
    tokens = torch.from_numpy(np.load(folder / "tokens.npz")["tokens"])
    for name in ("untied", "tied"):
        model = LlamaForCausalLM.from_pretrained(
            folder / f"{name}-exported", attn_implementation="eager"
        )
        assert model.dtype == torch.float64 and model.config.rope_parameters["rope_theta"] == 500.0
        with torch.no_grad():
            logits = model(tokens).logits.numpy()
        expected = np.load(folder / f"{name}-as-it-comes.npz")["logits"]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
