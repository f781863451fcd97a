"""Shards of a stage: what they add up, how often, and what they must not add twice; and that
threads have the bits of processes. The parity ladder has both.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common.harness.probes import read_probe
from common.oracle.limits import BFLOAT16_FACTOR
from common.runtime.job import Job, JobFile
from common.runtime.mode import Mode
from common.runtime.training import starting_weights
from common.spec import dropout_masks
from common.spec.data import IGNORED, Batch, load_corpus
from common.spec.parameters import parameter_shapes, unit_names
from common.spec.run import LLAMA, RunConfig
from common.spec.shards import cut_axis, joined, own_tokens, shards_of
from common.spec.traffic import traffic_bytes
from tests.engines import SAMPLES, STEP_KEY, numpy_mask, small
from tests.parity.ladder import first_different_bits
from torch_impl import layers, shards
from torch_impl.dropout import DropoutContext, ElementHashes, keep_mask
from torch_impl.engine import build_engine
from torch_impl.rank_engine import RankEngine
from torch_impl.shard_threads import Meeting, ThreadShards, run_lines
from torch_impl.shards import RowLinear, Shards, columns_of, parallel_loss
from torch_impl.stage import Stage
from torch_impl.weights import export_gradients, load_weights


class Counting(Meeting):
    """Counts what shard 0 hands to shard 1."""

    sent_bytes = 0

    def put(self, message: Any, content: Any) -> None:
        super().put(message, content)
        if message.sender == 0 and message.receiver == 1:
            tensor, _ = content
            self.sent_bytes += tensor.numel() * tensor.element_size()


def together(config: RunConfig, work: Callable[[Shards], Any]) -> tuple[list[Any], Counting]:
    """What `work` gives for every shard of a stage, each in a thread of its own."""
    t, meeting = config.tensor_parallel, Counting(config)

    def guarded(shard: int) -> Any:
        try:
            return work(ThreadShards(t, shard, columns_of(config), meeting, stage=0))
        except BaseException as error:
            meeting.stop(error)
            raise

    with ThreadPoolExecutor(t) as pool:
        return list(pool.map(guarded, range(t))), meeting


def cut(t: int, dtype: str = "float64", **options: Any) -> RunConfig:
    """A run on one stage."""
    model = {"num_heads": 4, "dropout": 0.1, "num_layers": 1} | options.pop("model", {})
    run = {"tensor_parallel": t, "vocab_parallel": True} | options
    return small("torch", dtype=dtype, run=run, **model)


def uncut(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"tensor_parallel": 1, "vocab_parallel": False})


def step(config: RunConfig, own: Shards = shards.WHOLE) -> tuple[list[float], dict[str, Any]]:
    """F, B and W of every micro-batch: the losses, and the gradients of this shard."""
    stage = Stage(config, [unit_names(config.model)], torch.device("cpu"), shards=own)
    weights = starting_weights(Job(config=config, out="", noise=0.1))
    load_weights(stage.named, shards_of(config, weights, own.shard) if own.count > 1 else weights)
    batch: Batch = load_corpus(config).training_batch(config, 0)
    stage.begin(batch, Mode.TRAIN)
    for i in range(config.train.micro_batches):
        stage.forward(i, 0, None)
        stage.backward_input(i, 0, None)
    before = own.group.sent_bytes if own.count > 1 else 0
    for i in range(config.train.micro_batches):
        stage.backward_weight(i, 0)
    assert own.count == 1 or own.group.sent_bytes == before, "W sends nothing"
    # A tied head's gradient is another array under the embedding's name.
    return stage.losses(), export_gradients(item for item in stage.named if not item.is_copy)


@pytest.mark.parametrize("t", [2, 4])
@pytest.mark.parametrize("model", [{}, {"num_kv_heads": 4, **LLAMA}, {"norm": "post"}])
def test_the_gradients_are_those_of_whole_matrices(t: int, model: dict[str, Any]) -> None:
    config = cut(t, model=model)
    found, meeting = together(config, lambda own: step(config, own))
    losses, right = step(uncut(config))
    assert found[0][0] == pytest.approx(losses, rel=1e-14) and found[1][0] == []
    for name, expected in right.items():
        pieces, axis = [gradients[name] for _, gradients in found], cut_axis(config, name)
        if axis is None:
            for other in pieces[1:]:  # to the bit: nobody will add these up
                np.testing.assert_array_equal(other, pieces[0], name)
        whole = pieces[0] if axis is None else joined(pieces, axis)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-13 * scale, err_msg=name)
    assert meeting.sent_bytes == traffic_bytes(config)[0, 1]


def test_the_bytes_of_a_block_are_4_b_s_d() -> None:
    """With two shards whose vocabulary is whole, sums of blocks are all that is sent."""
    config = cut(2, vocab_parallel=False, model={"num_layers": 3})
    _, meeting = together(config, lambda own: step(config, own))
    b, s, d = config.train.batch_size, config.model.context_length, config.model.d_model
    assert meeting.sent_bytes == 3 * 4 * b * s * d * 8 == traffic_bytes(config)[0, 1]


def test_bfloat16_errs_as_it_does_on_whole_matrices() -> None:
    right, (_, whole) = step(uncut(cut(2)))[1], step(uncut(cut(2, "bfloat16")))
    found, _ = together(cut(2, "bfloat16"), lambda own: step(cut(2, "bfloat16"), own))
    for name, expected in right.items():
        pieces, axis = [gradients[name] for _, gradients in found], cut_axis(cut(2), name)
        mine = pieces[0] if axis is None else joined(pieces, axis)
        errors = [np.linalg.norm(each - expected) for each in (mine, whole[name])]
        assert errors[0] < BFLOAT16_FACTOR * errors[1], (name, errors)


def test_a_bias_behind_a_sum_is_added_once() -> None:
    config = cut(2)
    x = torch.arange(8.0).view(1, 8)

    def forward(own: Shards) -> Tensor:
        layer = RowLinear(8, 3, True, own)
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.ones_(layer.bias)
        return layer(x.chunk(2, 1)[own.shard])

    for found in together(config, forward)[0]:
        assert found.tolist() == [[29.0] * 3]


def test_the_norm_counts_what_is_not_cut_once() -> None:
    config = cut(2, replicas=2)
    for name in parameter_shapes(config.model):
        counting = [
            RankEngine._counts(
                SimpleNamespace(config=config, replica=r, shards=Shards(2, shard)),  # type: ignore[arg-type]
                name,
            )
            for r, shard in itertools.product(range(2), range(2))
        ]
        assert sum(counting) == (1 if cut_axis(config, name) is None else 2), name


def test_a_shards_heads_have_the_masks_that_they_have_together() -> None:
    context = DropoutContext(STEP_KEY, torch.from_numpy(SAMPLES), 3, ElementHashes())
    whole = numpy_mask(6, (4, 6, 5, 5), 0.3)
    for shard, expected in enumerate(np.split(whole, 3, 1)):
        mask = keep_mask(context, 6, torch.Size((4, 2, 5, 5)), 0.3, (shard, 3))
        np.testing.assert_array_equal(mask.numpy(), expected)


def test_native_masks_are_cut_by_heads_too() -> None:
    context = DropoutContext(
        dropout_masks.step_key(0, 0), torch.arange(2), 0, ElementHashes(), torch.Generator()
    )
    whole = layers.dropout(torch.ones(2, 6, 3, 3), 0.5, 1, context)
    pieces = [layers.dropout(torch.ones(2, 3, 3, 3), 0.5, 1, context, (n, 2)) for n in (0, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=0)


def test_the_loss_over_a_cut_vocabulary() -> None:
    """Logits hundreds apart, the largest in any shard; targets that do not count."""
    config = cut(3, tokenizer="bpe", model={"vocab_size": 10})
    generator = torch.Generator().manual_seed(0)
    logits = 300 * torch.randn(4, 5, 10, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 10, (4, 5), generator=generator)
    targets[1] = IGNORED
    whole = logits.clone().requires_grad_()
    expected = functional.cross_entropy(
        whole.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    expected.backward()

    def loss(own: Shards) -> tuple[Tensor, Tensor]:
        columns = [logits[..., list(own_tokens(config, own.shard))]]
        x = columns[0].clone().requires_grad_()
        found = parallel_loss(x, targets, 1, own)
        found.backward()
        assert x.grad is not None
        return found.detach(), x.grad

    found = together(config, loss)[0]
    gradient = torch.cat([gradient for _, gradient in found], -1)
    torch.testing.assert_close(gradient, whole.grad, rtol=0, atol=1e-14)
    for value, _ in found:
        torch.testing.assert_close(value, expected.detach(), rtol=1e-14, atol=0)


def job(out: Path) -> Job:
    """Two stages of three shards, which share the vocabulary, a tied head and dropout."""
    model = {"num_heads": 3, "d_model": 24, "d_ff": 36, "tied_head": True}
    made = Job(config=cut(3, stages=2, threads=6, model=model), out=str(out), kind="probe")
    for folder in made.folders:
        folder.mkdir()
    return made


PROCESSES = """
import sys
from common.runtime.job import JobFile
from torch_impl.ranks import run_on_ranks
from common.runtime.worker import no_drift
from torch_impl.devices import configure

configure(2, 4, "cpu")
sys.exit(run_on_ranks(JobFile.read(sys.argv[1]).jobs, no_drift))
"""


def test_threads_have_the_bits_of_processes(tmp_path: Path) -> None:
    threads, processes = job(tmp_path / "threads"), job(tmp_path / "processes")
    run_lines(threads, build_engine)
    JobFile(jobs=(processes,)).write(tmp_path / "jobs.json")
    subprocess.run([sys.executable, "-c", PROCESSES, str(tmp_path / "jobs.json")], check=True)
    own, theirs = (read_probe(Path(each.out), same_copies=True) for each in (threads, processes))
    assert first_different_bits(own, theirs) is None


def test_the_first_failure_of_a_shard_ends_all(tmp_path: Path) -> None:
    """In a pass, and between two."""
    for number, where in enumerate(("step=1,action=F1", "step=0,action=optimizer")):
        fault = f"exception@device=1,{where}"
        made = job(tmp_path / str(number)).model_copy(update={"fault": fault})
        with pytest.raises(RuntimeError, match=f"^shard 0: .*{fault}"):
            run_lines(made, build_engine)
