"""Predict a run's activation memory: what each unit holds for its backward, counted, not measured.

A table says which tensors each framework's own operations save, per unit and micro-batch: the sum
of the rows whose words (`where`) all hold of the run. Its letters:

    b S D F V H   sequences of the micro-batch, tokens, width, feed-forward width, vocabulary, heads
    E K           width of a head, and of all keys (D, or less where heads share them)
    A             width of a shard's own heads: D / t, as F, H and K are its own parts
    e             bytes of an element of the run's dtype: 2, 4 or 8
    f             the same, but 4 in bfloat16: statistics, norms and the loss stay in float32
    n             f - e: what a tensor takes more for being kept in float32 (0 but in bfloat16)

Example: a PyTorch block in float32, b = 2, S = 128, D = 256, F = 1024, H = 8, holds

    e (8 bSD + 2 bSF + bHSS + 4 bS) = 4 (8 x 65,536 + 2 x 262,144 + 262,144 + 4 x 256) = 5,246,976 bytes

8 bSD: both norms' inputs and outputs, q, k, v and the attention's output; 2 bSF: the activation's
input and output; bHSS: the softmax' output; 4 bS: both norms' mean and deviation.

Source of the method: Korthikanti et al. 2022, section 4, who count 34 bSD + 5 bHSS bytes for a
layer in 16 bits with dropout.
"""  # noqa: E501

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from common.spec.run import ELEMENT_BYTES, RunConfig
from common.spec.shards import own_tokens

HELD = """
framework   unit       where                 between F and B                          between B and W
torch       embedding  any                   0                                        e bSD
torch       embedding  learned               0                                        e SD + 8 S
torch       embedding  dropout               e bSD                                    0
torch       embedding  vocab                 9 bS                                     0
torch       block      any                   4e bSD + 4e bSA + 2n bSD + 2e bSF + 4f bS + 8n D  4e bSD + 4e bSA + 2e bSF
torch       block      scores                e bHSS                                   0
torch       block      fused                 f bHS                                    0
torch       block      relu                  -e bSF                                   0
torch       block      dropout               2e bSD + 2e bHSS                         0
torch       block      swiglu                2e bSF                                   e bSF
torch       block      rms                   2f bSD + -2f bS + -4n D                  0
torch       block      plain layer           -4n D                                    0
torch       block      fused rotary          e bSA                                    0
torch       block      grouped               0                                        -2e bSA + 2e bSK
torch       head       any                   e bSD + f bSV + f                        e bSD + e bSV
torch       head       pre-norm              f bSD + 2f bS + 4n D                     0
torch       head       pre-norm rms          f bSD + -f bS + -2n D                    0
torch       head       pre-norm plain layer  -2n D                                    0
torch       head       vocab                 2f bS + 10 bS + -f                       0
tensorflow  embedding  any                   0                                        e bSD
tensorflow  embedding  dropout               bSD                                      bSD
tensorflow  embedding  vocab                 9 bS                                     9 bS
tensorflow  block      any                   8e bSD + 4e bSA + 2n bSD + 2e bSF + 6f bS  12e bSD + 6e bSA + 2n bSD + 3e bSF + 2f bS
tensorflow  block      scores                e bHSS                                   0
tensorflow  block      gelu_tanh             5f bSF                                   0
tensorflow  block      dropout               2 bSD + e bHSS + bHSS                    0
tensorflow  block      swiglu                e bSD + 2e bSF                           e bSD + 2e bSF
tensorflow  block      rms                   -4f bS                                   -2f bS
tensorflow  block      grouped               0                                        -2e bSA + 2e bSK
tensorflow  block      grouped biases        0                                        -e bSA + e bSK
tensorflow  block      plain                 0                                        -2e bSD + -2e bSA + -e bSF
tensorflow  block      plain layer           0                                        -2e bSD
tensorflow  block      plain swiglu          0                                        -e bSF
tensorflow  head       any                   e bSD + f bSV + 2 bS                     e bSD + e bSV
tensorflow  head       cast                  4                                        0
tensorflow  head       pre-norm              2e bSD + n bSD + 3f bS                   2e bSD + n bSD + f bS
tensorflow  head       pre-norm rms          -2f bS                                   -f bS
tensorflow  head       pre-norm plain layer  0                                        -e bSD
tensorflow  head       vocab                 3f bS + -bS                              0
paddle      embedding  learned               8 S                                      0
paddle      embedding  dropout               bSD                                      0
paddle      embedding  vocab                 f bSD + f bS + 8 bS                      0
paddle      block      any                   4e bSD + 4e bSA + 2e bSF + 4f bS         4e bSD + 4e bSA + 2e bSF
paddle      block      scores                e bHSS                                   0
paddle      block      relu                  -e bSF                                   0
paddle      block      dropout               2 bSD + e bHSS + bHSS                    0
paddle      block      swiglu                2e bSF                                   e bSF
paddle      block      rms                   2e bSD + 4n bSD + -2f bS                 0
paddle      block      rotary                f bSA + f bSK + 2f SE                    0
paddle      block      grouped               2e bSK                                   -2e bSA + 2e bSK
paddle      head       any                   e bSD + f bSV                            e bSD + e bSV
paddle      head       pre-norm              e bSD + 2f bS                            0
paddle      head       pre-norm rms          e bSD + 2n bSD + -f bS                   0
"""  # noqa: E501


@dataclass(frozen=True)
class HeldBytes:
    """What one micro-batch of a unit, or of a chunk, holds."""

    forward: int
    """Between its F and its B."""
    waiting: int
    """Between its B and its W."""


def unit_held_bytes(config: RunConfig, unit: str, sequences: int) -> HeldBytes:
    """Return what a micro-batch of so many sequences holds in `unit`, without recomputation."""
    model = config.model
    # PyTorch's fused attention keeps one number a row, not the scores; it has no dropout of ours.
    is_fused = config.track == "best" and not model.dropout and config.framework == "torch"
    words = {
        "any",
        "fused" if is_fused else "scores",
        model.activation,
        model.norm_kind,
        model.position,
        f"{model.norm}-norm",
        "biases" if model.biases else "plain",
        *(["dropout"] if model.dropout else []),
        *(["grouped"] if model.kv_heads < model.num_heads else []),
        *(["vocab"] if config.vocab_parallel else []),
        *(["cast"] if config.train.dtype != "float64" else []),
    }
    # "block.3" and "block.0" hold the same, so the table has rows for a block.
    kind = unit.partition(".")[0]
    found = [0, 0]
    for framework, name, where, *sums in _rows():
        if framework == config.framework and name == kind and words.issuperset(where.split()):
            for i, terms in enumerate(sums):
                found[i] += sum(_value(term, config, sequences) for term in terms)
    return HeldBytes(*found)


@cache
def _rows() -> list[tuple[str, str, str, list[str], list[str]]]:
    rows = []
    for line in HELD.strip().splitlines()[1:]:
        framework, unit, where, forward, waiting = re.split(r"\s{2,}", line)
        rows.append((framework, unit, where, forward.split(" + "), waiting.split(" + ")))
    return rows


def _value(term: str, config: RunConfig, sequences: int) -> int:
    """Return the bytes of a term such as `8e bSD`."""
    model = config.model
    element, t = ELEMENT_BYTES[config.train.dtype], config.tensor_parallel
    letters = {
        "b": sequences,
        "S": model.context_length,
        "D": model.d_model,
        "A": model.d_model // t,
        "F": model.d_ff // t,
        "V": len(own_tokens(config, 0)),
        "H": model.num_heads // t,
        "E": model.d_head,
        "K": model.kv_heads * model.d_head // t,
        "e": element,
        "f": max(element, 4),
        "n": max(element, 4) - element,
    }
    term = term.replace(" ", "")
    factors = term.lstrip("-0123456789")
    number = term.removesuffix(factors)
    # "8e bSD" is 8 x e x b x S x D; "-e bSF" has a sign alone, and "bSD" no number at all.
    value = int(number + "1" if number in ("", "-") else number)
    for letter in factors:
        value *= letters[letter]
    return value
