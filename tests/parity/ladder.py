"""The parity ladder: which runs are compared with the oracle and with each other, and how they are
started.

The cases cover every value of p, m and dtype, every combination of head, norm and activation, all
kinds of partition, micro-batches with different numbers of tokens, or none, and of different sizes
(8 sequences in 3 or 5). "bert" is an encoder, trained on masked tokens, so that its micro-batches
have different numbers of targets. They train for 100 AdamW steps (or 30, see `LONG`) with
clipping, warm-up and cosine: four blocks over four stages, else two blocks. The variants are runs
of three steps whose bits must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

import common.harness.probes
from common.harness.probes import Expected, Run
from common.harness.zoo import NOISE, run_all
from common.spec import rules
from common.spec.run import RunConfig

EXTREME_NOISE = 2.0
"""Makes weights so large that logits and attention scores lie hundreds apart."""

# Sequences end anywhere; of 13 per epoch the second mini-batch has 5: micro-batches of 2, 2, 1 and
# 0 sequences.
UNEVEN: dict[str, Any] = {"sequence_lengths": "random", "sequences_per_epoch": 13}


LLAMA: dict[str, Any] = {
    "activation": "swiglu",
    "norm_kind": "rms",
    "position": "rotary",
    "num_kv_heads": 1,
    "biases": False,
}
BLOCKS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "bert": {"activation": "gelu", "causal": False},
    "bert-relu": {"activation": "relu", "causal": False},
    "bert-llama": LLAMA | {"causal": False},
}
"""What stands for an "activation" that is more than one: Llama's block; encoders."""


def config(
    framework: str,
    p: int,
    m: int,
    dtype: str,
    head: str,
    norm: str,
    activation: str,
    partition: str,
    dropout: float,
    schedule: str = "1f1b",
    steps: int = 100,
    chunks: int = 1,
    executor: str = "table",
    num_layers: int = 4,
    recompute: str = "none",
    uneven: bool = False,
    batch_size: int = 8,
    replicas: int = 1,
    tensor_parallel: int = 1,
    vocab_parallel: bool = False,
    model: Mapping[str, Any] = MappingProxyType({}),
) -> RunConfig:
    """One run, with one CPU thread per stage and shard: a kernel splits its sums by the number of
    threads, so bits depend on it. `model` goes before the rest.
    """
    return RunConfig.model_validate(
        {
            "framework": framework,
            "stages": p,
            "chunks": chunks,
            "schedule": schedule,
            "partition": partition,
            "device": "cpu",
            "threads": p * replicas * tensor_parallel,
            "replicas": replicas,
            "tensor_parallel": tensor_parallel,
            "vocab_parallel": vocab_parallel,
            "executor": executor,
            "recompute": recompute,
            **(UNEVEN if uneven else {}),
            **({"sequence_lengths": "full"} if "bert" in activation else {}),
            "model": {
                "context_length": 12,
                "num_layers": num_layers,
                "d_model": 24,
                "num_heads": 2,
                "d_ff": 40,
                "norm": norm,
                "tied_head": head == "tied",
                **BLOCKS.get(activation, {"activation": activation}),
                "dropout": dropout,
                **model,
            },
            "train": {
                "steps": steps,
                "batch_size": batch_size,
                "micro_batches": m,
                "dtype": dtype,
                "clip_norm": 1.0,
                "learning_rate": 2e-3,
                "learning_rate_schedule": "cosine",
                "warmup_steps": min(10, steps),
            },
        }
    )


# p, m, dtype, head, norm, activation, partition, dropout, schedule
CASES: dict[str, tuple[Any, ...]] = {
    "1-1-float64": (1, 1, "float64", "untied", "pre", "gelu", "even", 0.0, "1f1b"),
    "1-4-float64": (1, 4, "float64", "tied", "post", "relu", "even", 0.1, "gpipe"),
    "2-1-float64": (2, 1, "float64", "tied", "pre", "relu", "even", 0.0, "naive"),
    "2-4-float64": (2, 4, "float64", "untied", "post", "gelu", "1", 0.1, "1f1b"),
    "4-1-float64": (4, 1, "float64", "untied", "post", "relu", "even", 0.1, "gpipe"),
    "4-4-float64": (4, 4, "float64", "tied", "pre", "gelu", "1,2,5", 0.0, "1f1b"),
    "1-1-float32": (1, 1, "float32", "tied", "post", "relu", "even", 0.1, "1f1b"),
    "1-4-float32": (1, 4, "float32", "untied", "pre", "gelu", "even", 0.0, "gpipe"),
    "2-1-float32": (2, 1, "float32", "tied", "post", "gelu", "3", 0.1, "1f1b"),
    "2-4-float32": (2, 4, "float32", "tied", "pre", "relu", "balanced", 0.0, "gpipe"),
    "4-1-float32": (4, 1, "float32", "tied", "pre", "gelu", "1,2,5", 0.0, "1f1b"),
    "4-4-float32": (4, 4, "float32", "untied", "pre", "relu", "even", 0.1, "1f1b"),
    "2-3-float64": (2, 3, "float64", "untied", "pre", "gelu", "even", 0.1, "zb-h1"),
    "4-5-float32": (4, 5, "float32", "tied", "post", "gelu", "even", 0.1, "1f1b"),
    "2-4-float64-llama": (2, 4, "float64", "untied", "pre", "llama", "even", 0.1, "zb-h1"),
    "4-4-float32-llama": (4, 4, "float32", "tied", "pre", "llama", "even", 0.0, "1f1b"),
    "1-4-float64-llama-post": (1, 4, "float64", "tied", "post", "llama", "even", 0.0, "gpipe"),
    "2-4-float64-bert": (2, 4, "float64", "tied", "post", "bert", "even", 0.1, "zb-h1"),
    "4-4-float32-bert": (4, 4, "float32", "untied", "post", "bert", "1,2,5", 0.0, "1f1b"),
    "2-3-float64-bert-uneven": (2, 3, "float64", "untied", "post", "bert-relu", "1", 0.1, "gpipe"),
    "1-5-float32-bert": (1, 5, "float32", "tied", "pre", "bert-llama", "even", 0.1, "1f1b"),
    "2-4-float64-uneven": (2, 4, "float64", "tied", "pre", "gelu", "even", 0.1, "1f1b"),
    "2-4-float32-uneven": (2, 4, "float32", "untied", "post", "gelu", "even", 0.0, "zb-h1"),
}


# d and the sequences of a mini-batch; then as above, m for each replica.
REPLICATED: dict[str, tuple[int, int, tuple[Any, ...]]] = {
    "d2-1-2-float64": (2, 8, (1, 2, "float64", "tied", "post", "gelu", "even", 0.1, "1f1b")),
    "d2-2-2-float64": (2, 8, (2, 2, "float64", "tied", "pre", "gelu", "even", 0.1, "zb-h1")),
    # 3 and 2, 1 and 1 sequences: in each replica, and between them.
    "d2-2-2-float64-seven": (2, 7, (2, 2, "float64", "untied", "pre", "relu", "1", 0.1, "1f1b")),
    "d2-2-2-float64-uneven": (2, 8, (2, 2, "float64", "tied", "pre", "gelu", "even", 0.1, "gpipe")),
    "d2-2-2-float32-llama": (
        2,
        8,
        (2, 2, "float32", "untied", "pre", "llama", "even", 0.0, "1f1b"),
    ),
    "d3-1-3-float64": (3, 11, (1, 3, "float64", "untied", "pre", "gelu", "even", 0.1, "1f1b")),
}
CASES |= {name: run for name, (_, _, run) in REPLICATED.items()}

# Whether the vocabulary is cut, the case that is cut in two, which has the same oracle, and what
# its model has instead: d and p of 1 and 2.
SHARDED: dict[str, tuple[bool, str, dict[str, Any]]] = {
    "t2-1-4-float64-llama": (
        *(False, "1-4-float64-llama-post"),
        {"num_heads": 4, "num_kv_heads": 2, "dropout": 0.1},
    ),
    "t2-2-4-float64-uneven": (True, "2-4-float64-uneven", {}),
    "t2-d2-1-2-float64": (False, "d2-1-2-float64", {}),
    "t2-d2-2-2-float64": (True, "d2-2-2-float64", {}),
}
CASES |= {name: CASES[whole] for name, (_, whole, _) in SHARDED.items()}
LONG = {
    *(f"{p}-{m}-{dtype}" for p in (1, 2, 4) for m in (1, 4) for dtype in ("float32", "float64")),
    *("4-4-float32-llama", "4-4-float32-bert", "2-4-float32-uneven"),
    *("d2-2-2-float64", "d2-2-2-float32-llama", "t2-1-4-float64-llama"),
}
"""The cases that train for 100 steps: every p, m and dtype, and one of each further kind. What the
others add (another block, another cut of the mini-batch) is there from the first step on: 30 do.
"""


def case_config(framework: str, case: str) -> RunConfig:
    """The run of a ladder case."""
    vocab_parallel, whole, model = SHARDED.get(case, (False, case, {}))
    d, sequences, run = REPLICATED.get(whole, (1, 8, CASES[whole]))
    return config(
        framework,
        *run,
        steps=100 if case in LONG else 30,
        uneven=case.endswith("uneven"),
        num_layers=4 if run[0] == 4 else 2,
        batch_size=sequences,
        replicas=d,
        tensor_parallel=2 if case in SHARDED else 1,
        vocab_parallel=vocab_parallel,
        model=model,
    )


def extreme_config(framework: str) -> RunConfig:
    """A run whose weights begin with `EXTREME_NOISE`."""
    return config(
        framework, 2, 4, "float64", "untied", "pre", "gelu", "even", 0.0, steps=3, num_layers=2
    )


# name: p, partition, schedule, chunks, recompute; all with m = 4, over 4 units, and equal to the
# first to the bit.
VARIANTS: dict[str, tuple[int, str, str, int, str]] = {
    "one-stage": (1, "even", "gpipe", 1, "none"),
    "one-stage-1f1b": (1, "even", "1f1b", 1, "none"),
    "rerun": (2, "even", "1f1b", 1, "none"),
    # The same cut in other words: runs that are equal in all would be one run.
    "rerun-again": (2, "2", "1f1b", 1, "none"),
    "naive": (2, "even", "naive", 1, "none"),
    "gpipe": (2, "even", "gpipe", 1, "none"),
    "split": (2, "even", "file:SPLIT", 1, "none"),
    "uneven": (2, "1", "1f1b", 1, "none"),
    "four": (4, "even", "1f1b", 1, "none"),
    "three-uneven": (3, "1,3", "gpipe", 1, "none"),
    "interleaved": (2, "even", "interleaved", 2, "none"),
    "zb-h1": (4, "even", "zb-h1", 1, "none"),
    "zb-h2": (2, "even", "zb-h2", 1, "none"),
    "zb-v": (2, "even", "zb-v", 2, "none"),
    "interleaved-overlap": (2, "even", "interleaved-overlap", 2, "none"),
    "interleaved-zb": (2, "even", "interleaved-zb", 2, "none"),
    "v-half": (2, "even", "v-half", 2, "none"),
    "v-min": (2, "even", "v-min", 2, "none"),
    "dualpipev": (2, "even", "dualpipev", 2, "none"),
    "own-placement": (2, "even", "file:PLACED", 2, "none"),
    "unlike-chunks": (2, "even", "file:UNLIKE", 2, "none"),
    "from-the-last-device": (2, "balanced", "file:TURNED", 1, "none"),
    "recompute-full": (2, "even", "1f1b", 1, "full"),
    "recompute-full-split": (2, "even", "zb-h1", 1, "full"),
    "recompute-every-1": (2, "even", "zb-h1", 1, "every-1"),
    "recompute-except-last": (4, "even", "1f1b", 1, "except-last"),
}
FILES = {
    "SPLIT": """# schedule: split micro_batches=4
0: F0 F1 F2 B0 W0 F3 B1 W1 B2 B3 W2 W3
1: F0 B0 F1 B1 W0 F2 B2 F3 B3 W1 W2 W3
""",
    "PLACED": """# schedule: placed micro_batches=4
placement: 0 1 | 2 3
0: F0 F0.1 F1 F1.1 BW0.1 BW0 F2 (F2.1&BW1.1) BW1 F3 F3.1 BW2.1 BW2 BW3.1 BW3
1: F0 F0.1 BW0.1 BW0 F1 F1.1 BW1.1 BW1 F2 F2.1 BW2.1 BW2 F3 F3.1 BW3.1 BW3
""",
    "UNLIKE": """# schedule: unlike micro_batches=4
placement: 1 2 | 0
0: F0 F0.1 F1 F1.1 BW0.1 BW0 F2 (F2.1&BW1.1) BW1 F3 F3.1 BW2.1 BW2 BW3.1 BW3
1: F0 F1 F2 BW0 (F3&BW1) BW2 BW3
""",
    "TURNED": """# schedule: turned micro_batches=4
placement: 1 | 0
0: F0 BW0 F1 BW1 F2 BW2 F3 BW3
1: F0 F1 BW0 F2 BW1 F3 BW2 BW3
""",
}
MODELS: dict[str, tuple[str, str, str, str, int, tuple[str, ...]]] = {
    "d2": (
        *("float32", "tied", "pre", "gelu", 16),
        ("one-stage", "rerun", "zb-v", "recompute-full-split"),
    ),
    "t2": (
        *("float32", "untied", "post", "gelu", 8),
        ("one-stage", "uneven", "zb-v", "recompute-full-split"),
    ),
    # Three shards, whose sums have an order; of the 256 tokens one has 86.
    "t3": (*("float64", "tied", "pre", "gelu", 8), ("one-stage", "zb-v")),
    "float32": ("float32", "tied", "pre", "gelu", 8, tuple(VARIANTS)),
    "llama": (
        *("float32", "untied", "pre", "llama", 8),
        ("one-stage", "uneven", "interleaved-zb", "zb-v", "recompute-full-split"),
    ),
    "bert": (
        *("float64", "tied", "post", "bert", 8),
        ("one-stage", "uneven", "interleaved-zb", "zb-v", "recompute-full-split"),
    ),
    "float64": (
        *("float64", "untied", "post", "gelu", 10),
        ("one-stage", "uneven", "interleaved", "zb-h1", "zb-v", "recompute-full-split"),
    ),
}
"""dtype, head, norm, activation, batch size, and the variants: 8 sequences make micro-batches of 2;
10 make such of 3, 3, 2 and 2, for which TensorFlow traces everything twice. "d2" has two replicas,
"t2" and "t3" so many shards, which share the vocabulary too.

The order of the actions is the schedule's business and not the model's, so each of the models has
every kind of variant (one stage, more, cut unevenly, chunks, a split backward, recomputation) but
only one has every variant.
"""
IN_ORDER_ALONE = {
    *("one-stage-1f1b", "naive", "gpipe", "rerun-again", "split", "zb-h2"),
    *("interleaved-overlap", "v-half", "v-min"),
}
"""Variants that differ from another one in the order of the actions alone. TensorFlow, which traces
each for seconds, does without: that order is the business of `common.runtime.executor`, which is
the same for all. (Paddle's messages depend on it.)
"""


def variant_configs(framework: str, model: str, folder: Path) -> dict[str, RunConfig]:
    """The variants of one of the `MODELS`; and, of one model, "few": one micro-batch for two
    stages, which makes other bits.
    """
    dtype, head, norm, activation, batch_size, names = MODELS[model]
    for file, text in FILES.items():
        (folder / file).write_text(text)

    def of(p: int, m: int, partition: str, schedule: str, chunks: int, recompute: str) -> RunConfig:
        return config(
            framework,
            p,
            m,
            dtype,
            head,
            norm,
            activation,
            partition,
            0.1,
            schedule.replace("file:", f"file:{folder}/"),
            steps=3,
            chunks=chunks,
            num_layers=2,
            recompute=recompute,
            batch_size=batch_size,
            replicas=2 if model == "d2" else 1,
            tensor_parallel=t,
            vocab_parallel=t > 1,
            model={"num_heads": t, "d_ff": 14 * t} if t > 1 else {},
        )

    t = {"t2": 2, "t3": 3}.get(model, 1)

    left_out = IN_ORDER_ALONE if framework == "tensorflow" else set()
    kept = [name for name in names if name not in left_out]
    found = {name: of(VARIANTS[name][0], 4, *VARIANTS[name][1:]) for name in kept}
    return found | ({"few": of(2, 1, "even", "zb-v", 2, "none")} if model == "float32" else {})


class Probed(NamedTuple):
    config: RunConfig
    run: Run


Runs = dict[str, Probed]


def configs(framework: str, folder: Path) -> dict[str, RunConfig]:
    """All runs of a framework: cases by name, variants as "model/variant", and "extreme"."""
    found = {name: case_config(framework, name) for name in CASES} | {
        "extreme": extreme_config(framework)
    }
    for model in MODELS:
        found |= {
            f"{model}/{name}": one
            for name, one in variant_configs(framework, model, folder).items()
        }
    return {
        name: one
        for name, one in found.items()
        if one.tensor_parallel == 1 or framework in rules.TENSOR_PARALLEL
    }


def run_probes(
    configs: Mapping[str, RunConfig],
    folder: Path,
    noises: Mapping[RunConfig, float] = MappingProxyType({}),
) -> dict[str, Run]:
    """Runs all configurations in as few worker processes as their framework allows. Raises
    RuntimeError.

    `noises` are added to all initial weights, else `NOISE`.
    """
    outcomes = run_all(list(dict.fromkeys(configs.values())), folder, math.inf, noises=noises)
    runs = {}
    for name, one in configs.items():
        outcome = outcomes[one]
        if isinstance(outcome, str):
            raise RuntimeError(f"{name}: {outcome}")
        runs[name] = outcome
    return runs


def expected(one: RunConfig, noise: float = NOISE) -> Expected:
    """What the oracle says about a case."""
    return common.harness.probes.expected(one, noise)


def first_different_bits(
    a: Run, b: Run, phases: Iterable[str] = ("forward", "backward", "trained")
) -> str | None:
    """The first tensor or loss of which two runs do not hold the same bits, in words."""
    for phase in phases:
        theirs = {key._replace(stage=0): value for key, value in b.phase(phase).items()}
        for key, value in a.phase(phase).items():
            other = theirs[key._replace(stage=0)]
            if not np.array_equal(value, other):
                where = np.unravel_index(int(np.argmax(value != other)), value.shape)
                return f"{key}{[int(i) for i in where]}: {value[where]!r} against {other[where]!r}"
    for step, (x, y) in enumerate(zip(a.losses, b.losses, strict=True)):
        if x != y:
            return f"step={step}/loss: {x!r} against {y!r}"
    return None
