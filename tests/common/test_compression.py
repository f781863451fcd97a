"""The definitions of what replicas send instead of gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.cli.train import say_what_is_forgotten
from common.io.console import make_console
from common.oracle.compression import CompressedSum, ReplicatedOracle, orthonormal
from common.oracle.reference import Oracle
from common.runtime.job import Job
from common.runtime.training import starting_weights
from common.spec.compression import Compression
from common.spec.data import load_corpus
from common.spec.rules import why_impossible
from common.spec.run import RunConfig
from common.spec.traffic import traffic_bytes
from tests.engines import small

SHAPE = (6, 8)


def summed(compress: str, *gradients: Any, steps: int = 1) -> list[Any]:
    """The sums of `steps` steps in which the replicas have the same gradients again."""
    compressed = CompressedSum(Compression.parse(compress), seed=0)
    return [compressed([{"w": np.array(g, float)} for g in gradients])["w"] for _ in range(steps)]


def test_topk_sends_what_it_has_not_sent_before() -> None:
    first, second = summed("topk:0.25", [3, 1, 0, -2], [0, 0, 0, 0], steps=2)
    assert first.tolist() == [3, 0, 0, 0] and second.tolist() == [0, 0, 0, -4]


def test_signs_have_the_mean_magnitude_and_with_feedback_make_good_what_it_hid() -> None:
    gradient = np.array([4.0, -1.0, 1.0, 0.0])
    assert summed("sign", gradient)[0].tolist() == [1.5, -1.5, 1.5, 1.5]
    of = {name: np.mean(summed(name, gradient, steps=400), 0) for name in ("sign", "ef-sign")}
    assert np.abs(of["ef-sign"] - gradient).max() < 0.05 < np.abs(of["sign"] - gradient).max()


def test_powersgd_has_a_sum_of_its_rank_at_once_and_every_sum_in_the_long_run() -> None:
    random = np.random.default_rng(0)
    low = random.standard_normal((6, 2)) @ random.standard_normal((2, 8))
    np.testing.assert_allclose(summed("powersgd:2", low, 2 * low)[0], 3 * low, atol=1e-12)
    full = random.standard_normal(SHAPE)
    mean = np.mean(summed("powersgd:1", full, full, steps=400), 0)
    assert np.abs(mean - 2 * full).max() < 0.05


def test_a_step_without_gradients_ends_no_column_of_powersgd() -> None:
    gradient = np.random.default_rng(1).standard_normal(SHAPE)
    compressed = CompressedSum(Compression.parse("powersgd:2"), seed=0)
    sums = [compressed([{"w": g}])["w"] for g in (0 * gradient, gradient)]
    assert not sums[0].any() and np.linalg.matrix_rank(sums[1]) == 2


def test_a_column_that_depends_on_others_is_dropped() -> None:
    a, b = np.random.default_rng(2).standard_normal((2, 5))
    p = orthonormal(np.stack([a, 2 * a * (1 + 1e-9), b, 0 * a], 1))
    np.testing.assert_allclose(p.T @ p, np.diag([1.0, 0, 1, 0]), atol=1e-12)


@pytest.mark.parametrize(("compress", "exact"), [("fp16", 1e-3), ("bf16", 8e-3)])
def test_a_cast_rounds_what_is_sent_and_the_sum(compress: str, exact: float) -> None:
    gradients = np.random.default_rng(3).standard_normal((3, *SHAPE))
    (found,) = summed(compress, *gradients)
    assert np.abs(found / gradients.sum(0) - 1).min() > 0
    assert np.linalg.norm(found - gradients.sum(0)) < exact * np.linalg.norm(gradients.sum(0))
    assert summed(compress, found)[0].tolist() == found.tolist(), "what travels is rounded"


@pytest.mark.parametrize("tied", [False, True])
def test_replicas_of_the_oracle_add_up_to_the_oracle(tied: bool) -> None:
    """An uneven mini-batch with dropout, compressed so little that float64 cannot tell."""
    train = {"batch_size": 7, "micro_batches": 2}
    run = {"replicas": 2, "sequence_lengths": "random", "compress": "topk:1"}
    config = small("torch", dtype="float64", train=train, run=run, tied_head=tied, dropout=0.1)
    weights = starting_weights(Job(config=config, out="", noise=0.1))
    batch = load_corpus(config).training_batch(config, 0)
    one, two = Oracle(config.model, config.train, weights), ReplicatedOracle(config, weights)
    assert two.forward_backward(batch) == pytest.approx(one.forward_backward(batch), rel=1e-13)
    assert two.gradients.keys() == one.gradients.keys()
    for name, right in one.gradients.items():
        np.testing.assert_allclose(two.gradients[name], right, atol=1e-14, rtol=1e-11)


def tiny(compress: str, **run: Any) -> RunConfig:
    return small("torch", run={"replicas": 2, "compress": compress} | run)


@pytest.mark.parametrize(
    ("compress", "share"),
    [
        *(("none", 1), ("fp16", 1 / 2), ("bf16", 1 / 2), ("powersgd:4", 1 / 5)),
        *(("powersgd:1", 1 / 15), ("topk:0.01", 1 / 49), ("sign", 1 / 32), ("topk:1", 2)),
    ],
)
def test_bytes_of_the_preset_tiny(compress: str, share: float) -> None:
    whole, sent = (traffic_bytes(tiny(each))[0, 1] for each in ("none", compress))
    assert sent / whole == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize(
    ("compress", "goes_on"), [("topk:0.1", True), ("fp16", True), ("sign", False)]
)
def test_a_training_that_goes_on_says_what_it_has_forgotten(
    compress: str, goes_on: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    say_what_is_forgotten(tiny(compress), goes_on, make_console())
    said = "compress = topk:0.1: what a replica has not sent yet is not in a checkpoint"
    assert (said in " ".join(capsys.readouterr().out.split())) == (compress == "topk:0.1")


def test_gathered_messages_go_to_every_other_replica_whole() -> None:
    train = {"batch_size": 8, "micro_batches": 2}
    sent = {
        (d, name): sum(traffic_bytes(tiny(name, replicas=d, train=train)).values()) / d
        for d in (2, 4)
        for name in ("fp16", "sign")
    }
    assert sent[4, "sign"] == 3 * sent[2, "sign"]
    assert sent[4, "fp16"] == pytest.approx(1.5 * sent[2, "fp16"], rel=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        "topk",
        "topk:0",
        "topk:1.01",
        "topk:-1",
        "topk:nan",
        "powersgd:0",
        "powersgd:1.5",
        "fp8",
        "",
        "powersgd",
        "sign:1",
        "topk:0.1:2",
        "FP16",
        "topk:1e99",
    ],
)
def test_what_is_no_compression_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected none, fp16, bf16, powersgd:R .* or ef-sign"):
        tiny(text)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"replicas": 1}, "one replica sends no gradients; expected none, or replicas of 2"),
        ({"executor": "plain", "compress": "bf16"}, "expected none, fp16, powersgd:R, or executor"),
        ({"executor": "plain", "framework": "paddle"}, "expected none, or executor = table"),
        ({"executor": "plain", "compress": "fp16"}, None),
        ({"tensor_parallel": 2}, "expected tensor_parallel = 1, or fp16 or bf16 with executor"),
        ({"tensor_parallel": 2, "compress": "bf16"}, None),
        ({"framework": "tensorflow"}, None),
    ],
)
def test_where_nothing_is_compressed_it_is_refused(
    run: dict[str, Any], expected: str | None
) -> None:
    found = why_impossible(RunConfig.model_validate(tiny("sign").model_dump() | run))
    assert found is None if expected is None else found is not None and expected in found.text
