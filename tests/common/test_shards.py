"""What tensor parallelism cuts: every parameter by its name, back together, and counted."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from common.spec.mesh import Mesh, Place
from common.spec.parameters import initial_weights, parameter_shapes
from common.spec.rules import TENSOR_PARALLEL, why_impossible
from common.spec.run import LLAMA, RunConfig, TransformerSpec
from common.spec.shards import cut_axis, joined, own_tokens, shard_of, shard_shape, shards_of
from common.spec.traffic import traffic_bytes

MODELS = [
    TransformerSpec(num_heads=4, d_model=24, d_ff=36),
    TransformerSpec(num_heads=4, num_kv_heads=2, d_model=16, d_ff=40, tied_head=True, **LLAMA),
]


def cut(t: int, **run: Any) -> RunConfig:
    model = {"num_layers": 2, "d_model": 24, "num_heads": 12, "d_ff": 36, "context_length": 8}
    model |= run.pop("model", {})
    train = {"batch_size": 8, "micro_batches": 2} | run.pop("train", {})
    return RunConfig.model_validate(
        {"tensor_parallel": t, "stages": 1, "model": model, "train": train} | run
    )


def test_the_cut_of_every_parameter() -> None:
    axes = {}
    for config in (cut(2), cut(2, vocab_parallel=True)):
        axes[config.vocab_parallel] = {
            name.removeprefix("block.0."): cut_axis(config, name)
            for name in parameter_shapes(config.model)
            if not name.startswith("block.1.")
        }
    columns = ["attention.query", "attention.key", "attention.value", "feed_forward.up"]
    weights = dict.fromkeys([f"{name}.weight" for name in columns], 1)
    biases = dict.fromkeys([f"{name}.bias" for name in columns if "key" not in name], 0)
    rows = {"attention.output.weight": 0, "feed_forward.down.weight": 0}
    found = {name: axis for name, axis in axes[False].items() if axis is not None}
    assert found == weights | biases | rows
    ends = {"embedding.token.weight": 0, "head.output.weight": 1}
    assert axes[True] == axes[False] | ends
    assert cut_axis(cut(1), "block.0.attention.query.weight") is None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("t", [2, 4])
def test_what_is_cut_comes_back_together(model: TransformerSpec, t: int) -> None:
    config = RunConfig(model=model, tensor_parallel=t, vocab_parallel=True)
    whole = initial_weights(model, 0, "float32")
    moments = {f"first_moment/{name}": array for name, array in whole.items()}
    pieces = [shards_of(config, whole | moments, shard) for shard in range(t)]
    for key, array in (whole | moments).items():
        name = key.split("/")[-1]
        axis = cut_axis(config, name)
        own = [piece[key] for piece in pieces]
        assert [piece.shape for piece in own] == [
            shard_shape(config, name, array.shape, shard) for shard in range(t)
        ]
        assert_array_equal(own[-1] if axis is None else joined(own, axis), array)


def test_a_vocabulary_need_not_be_divisible() -> None:
    config = cut(4, vocab_parallel=True, tokenizer="bpe", model={"vocab_size": 259})
    tokens = [own_tokens(config, shard) for shard in range(4)]
    assert [token for part in tokens for token in part] == list(range(259))
    rows = np.arange(259)
    for shard, part in enumerate(tokens):
        assert_array_equal(shard_of(rows, 0, shard, 4), list(part))


def test_shards_are_the_closest_neighbours() -> None:
    mesh = Mesh(stages=2, replicas=2, shards=2)
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert places[:5] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0)]
    assert [mesh.rank(*place) for place in places] == list(range(8))
    assert [mesh.pipeline(line) for line in range(mesh.lines)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert mesh.copies(1, shard=1) == [5, 7] and mesh.shard_group(0, 1) == [2, 3]
    assert mesh.name(7) == "stage 1 of replica 1, shard 1"
    assert mesh.describe(["a"] * 4 + ["b"] * 4)[1].startswith("b: replica 0 shard 0 stage 1, ")
    assert Mesh(2, 1, 2).line_name(1) == "shard 1" and Mesh(2, 1).line_name(0) == "replica 0"
    assert Mesh.of(cut(2, framework="tensorflow")) == Mesh(1, 1)  # devices of one process
    assert Mesh.of(cut(2)).place(1) == Place(0, 0, 1)


def test_a_sum_of_shards_in_bytes() -> None:
    positions = 4 * 8  # of each of two micro-batches
    sums = 2 * (2 * 2 + 2 * 2) * positions * 24 * 4  # two blocks, two sums in F and in B
    assert traffic_bytes(cut(2)) == {(0, 1): sums, (1, 0): sums}
    assert traffic_bytes(cut(3))[0, 2] == sums * 2 // 3
    ends = 2 * (2 * positions * 24 * 4 + positions * 3 * 4)
    assert traffic_bytes(cut(2, vocab_parallel=True))[0, 1] == sums + ends


def test_every_line_sends_whole_activations_and_replicas_what_they_have() -> None:
    one, two = cut(1, stages=2, replicas=2), cut(2, stages=2, replicas=2)
    sent = traffic_bytes(two)
    assert sent[0, 4] == sent[1, 5] == traffic_bytes(one)[0, 2]
    for stage in range(2):
        mine, whole = (sum(_elements(each, stage)) for each in (two, one))
        assert mine < whole and sent[4 * stage, 4 * stage + 2] == 2 * 4 * mine / 2
    assert (0, 3) not in sent


def _elements(config: RunConfig, stage: int) -> list[int]:
    """Of shard 0's parameters; stage 0 has the embedding and block 0."""
    first = ("embedding", "block.0")
    return [
        math.prod(shard_shape(config, name, shape, 0))
        for name, shape in parameter_shapes(config.model).items()
        if name.startswith(first) == (stage == 0)
    ]


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (cut(1, vocab_parallel=True), "vocab_parallel: cuts among shards; expected"),
        (cut(8), "tensor_parallel = 8: does not divide num_heads = 12 and num_kv_heads = 12 and"),
        (cut(5), "expected one of [1, 2, 3, 4, 6, 12]"),
        (
            cut(2, model={"num_kv_heads": 1}),
            "does not divide num_kv_heads = 1; expected one of [1]",
        ),
        (cut(2, executor="native"), "executor = native has whole matrices; expected 1, or"),
        (cut(2, executor="plain", vocab_parallel=True), "executor = plain cuts blocks alone, of"),
        (cut(2, executor="plain", model={"dropout": 0.1}), "of one replica and without dropout"),
        (cut(2, drift="onednn", framework="tensorflow"), "tensor_parallel = 2: "),
    ],
)
def test_what_cannot_be_cut(config: RunConfig, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.spec.rules.TENSOR_PARALLEL", ("torch", "tensorflow", "paddle"))
    assert line in str(why_impossible(config))


def test_the_worked_example_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tensor-parallel.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})


@pytest.mark.parametrize("framework", ["torch", "tensorflow", "paddle"])
def test_a_framework_cuts_matrices_or_says_that_it_does_not(framework: str) -> None:
    why = why_impossible(cut(2, framework=framework))
    assert (why is None) == (framework in TENSOR_PARALLEL)
    assert why is None or f"{framework} does not cut matrices; expected" in str(why)
