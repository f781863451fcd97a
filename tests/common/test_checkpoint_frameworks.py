"""Every framework, from a checkpoint: on to the bit, and the same tokens as the oracle. One worker
process for each.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import checkpoint
from common.harness.launch import IMPLEMENTATIONS, run_jobs_in_worker
from common.oracle.limits import LIMITS
from common.runtime.inference import Evaluated, Generated, evaluate, generate
from common.runtime.job import Generation, Job, Saving
from common.runtime.oracle_worker import OracleEngine
from common.runtime.outcome import Outcome
from common.spec.data import load_corpus
from common.spec.parameters import initial_weights, random_arrays
from common.spec.run import FRAMEWORKS, RunConfig, TrainSpec, TransformerSpec
from tests.engines import assert_within

MODEL = TransformerSpec(
    context_length=24, num_layers=2, d_model=16, num_heads=2, d_ff=24, tied_head=True, dropout=0.1
)
TRAIN = TrainSpec(
    steps=6, batch_size=4, micro_batches=2, learning_rate_schedule="cosine", warmup_steps=2
)
GREEDY = Generation(prompt=tuple(b"Hello, "), tokens=30, samples=1)
SAMPLED = GREEDY.model_copy(update={"samples": 3, "temperature": 0.9, "top_k": 40, "seed": 11})


def config(framework: str, **changes: Any) -> RunConfig:
    base = RunConfig(framework=framework, model=MODEL, train=TRAIN, stages=2, threads=2)
    return base.model_copy(update=changes)


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of weights with enough noise for every token to matter."""
    noise = random_arrays(MODEL, 5, "float32", 0.5)
    initial = initial_weights(MODEL, 0, "float32")
    weights = {name: value + noise[name] for name, value in initial.items()}
    folder = tmp_path_factory.mktemp("noisy")
    return checkpoint.write_weights(folder / "saved", MODEL, weights, "a test")


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, noisy: Path) -> Any:
    """(folder, outcomes) of a framework's jobs."""

    @functools.cache
    def run(framework: str) -> tuple[Path, list[Outcome]]:
        folder = tmp_path_factory.mktemp(framework)
        one = config(framework)

        def training(name: str, config: RunConfig, directory: str, **fields: Any) -> Job:
            saving = Saving(directory=str(folder / directory), every=None, keep=9, token="a1")
            fields |= {"saving": saving, "must_be_finite": True}
            return Job(config=config, out=str(folder / name), **fields)

        def asked(name: str, config: RunConfig, **fields: Any) -> Job:
            return Job(config=config, out=str(folder / name), resume=str(noisy), **fields)

        # Differs: Paddle's processes are one pipeline, so all its jobs have two stages.
        elsewhere = {"stages": 4, "threads": 4} if framework != "paddle" else {}
        middle = str(folder / "parts" / "step-00000003")
        again = config(framework, schedule="gpipe", **elsewhere)
        single = TRAIN.model_copy(update={"batch_size": 1, "micro_batches": 1})
        narrow = one.model_copy(update={"train": single})
        jobs = [
            training("whole", one, "whole-checkpoints"),
            training("first", one, "parts", stop_at=3),
            training("second", again, "parts", resume=middle),
            asked("greedy", narrow, kind="generate", generation=GREEDY),
            asked("sampled", one, kind="generate", generation=SAMPLED),
            asked("evaluated", one, kind="evaluate", batches=3),
        ]
        if framework == "torch":
            cut = config(framework, tensor_parallel=2, vocab_parallel=True, threads=4)
            otherwise = config(framework, tensor_parallel=2, stages=1)
            from_cut = str(folder / "cut" / "step-00000003")
            jobs += [
                training("cut", cut, "cut", stop_at=3),
                training("joined", one, "joined", resume=from_cut),
                training("cut-otherwise", otherwise, "otherwise", resume=from_cut),
            ]
        return folder, run_jobs_in_worker(IMPLEMENTATIONS[framework].module, jobs, folder)

    return run


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_goes_on_to_the_bit(framework: str, done: Any) -> None:
    folder, outcomes = done(framework)
    assert [outcome.reason for outcome in outcomes[:3]] == [""] * 3
    losses = [[step.loss for step in outcome.parts[0].steps] for outcome in outcomes[:3]]
    whole, first, second = losses
    assert len(first) == 3 and first + second == whole
    one, other = (
        checkpoint.load(folder / name / "step-00000006") for name in ("whole-checkpoints", "parts")
    )
    expected = {**other.weights, **other.optimizer_state}
    for name, value in {**one.weights, **one.optimizer_state}.items():
        np.testing.assert_array_equal(value, expected[name], name)
    assert one.manifest.written_by["framework"]


def test_shards_may_come_and_go_where_a_training_goes_on(done: Any) -> None:
    folder, outcomes = done("torch")
    assert [outcome.reason for outcome in outcomes[6:]] == [""] * 3
    whole, cut, *others = (
        [step.loss for step in outcome.parts[0].steps] for outcome in (outcomes[0], *outcomes[6:])
    )
    for losses in others:
        assert cut + losses == pytest.approx(whole, rel=LIMITS["loss_curve"]["float32"])
    expected, *found = (
        checkpoint.load(folder / name / "step-00000006").weights
        for name in ("whole-checkpoints", "joined", "otherwise")
    )
    for weights in found:
        assert_within(weights, expected, "trained_parameter", "float32")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_tokens_are_the_oracles(framework: str, done: Any, noisy: Path, tmp_path: Path) -> None:
    folder, outcomes = done(framework)
    assert [outcome.reason for outcome in outcomes[3:6]] == [""] * 3
    one = config("torch")
    oracle = OracleEngine(one)
    oracle.reset(checkpoint.load(noisy).weights)
    for name, wish in (("greedy", GREEDY), ("sampled", SAMPLED)):
        want = generate(oracle, Job(config=one, out=str(tmp_path), generation=wish))
        found = Generated.model_validate_json((folder / name / "generation.json").read_text())
        assert found.tokens == want.tokens
        assert len({token for sample in found.tokens for token in sample}) > 5
        # Far enough from every other choice for float32 to make the same: its logits differ by some
        # 1e-5 here.
        assert want.closest_call > 1e-5
        assert found.closest_call == pytest.approx(want.closest_call, rel=0.2)
        assert found.tokens_per_second > 0
    job = Job(config=one, out=str(tmp_path), batches=3)
    want_loss = evaluate(oracle, job, load_corpus(one)).loss
    text = (folder / "evaluated" / "evaluation.json").read_text()
    assert Evaluated.model_validate_json(text).loss == pytest.approx(want_loss, rel=1e-5)
