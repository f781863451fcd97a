"""Shards of a stage as threads of this process, which exchange what processes would send: what they
add up, how often, and what they must not add twice. The parity ladder has them as processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common.oracle.limits import BFLOAT16_FACTOR
from common.runtime.job import Job
from common.runtime.mode import Mode
from common.runtime.training import starting_weights
from common.spec import dropout_masks
from common.spec.data import IGNORED, Batch, load_corpus
from common.spec.parameters import parameter_shapes, unit_names
from common.spec.run import LLAMA, RunConfig
from common.spec.shards import cut_axis, joined, own_tokens, shards_of
from common.spec.traffic import traffic_bytes
from tests.engines import SAMPLES, STEP_KEY, numpy_mask, small
from torch_impl import layers, shards
from torch_impl.dropout import DropoutContext, ElementHashes, keep_mask
from torch_impl.rank_engine import RankEngine
from torch_impl.shards import RowLinear, Shards, parallel_loss
from torch_impl.stage import Stage
from torch_impl.weights import export_gradients, load_weights


@dataclass
class Meeting:
    """Where the threads of all shards hand over what each has."""

    count: int
    sent: list[int] = field(default_factory=list)
    """Bytes that shard 0 would send to each other one, of every exchange."""

    def __post_init__(self) -> None:
        self.barrier, self._found = Barrier(self.count), dict[int, Tensor]()

    def exchange(self, shard: int, x: Tensor) -> list[Tensor]:
        self._found[shard] = x.detach().clone()
        self.barrier.wait()
        found = [self._found[i] for i in range(self.count)]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Threads(Shards):
    """`group` is a `Meeting`."""

    def sum(self, x: Tensor) -> Tensor:
        if self.shard == 0:
            self.group.sent.append(2 * x.numel() * x.element_size() // self.count)
        first, *others = self.group.exchange(self.shard, x)
        total = first.clone()
        for other in others:
            total += other
        return total

    def gathered(self, x: Tensor) -> list[Tensor]:
        if self.shard == 0:
            self.group.sent.append(x.numel() * x.element_size())
        found: list[Tensor] = self.group.exchange(self.shard, x)
        return found


def together(config: RunConfig, work: Callable[[Shards], Any]) -> tuple[list[Any], Meeting]:
    """What `work` gives for every shard, each in a thread of its own."""
    t = config.tensor_parallel
    columns = tuple(len(own_tokens(config, n)) for n in range(t)) if config.vocab_parallel else ()
    meeting = Meeting(t)

    def guarded(own: Shards) -> Any:
        try:
            return work(own)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(t) as pool:
        return list(pool.map(guarded, [Threads(t, n, columns, meeting) for n in range(t)])), meeting


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
    before = len(own.group.sent) if own.count > 1 else 0
    for i in range(config.train.micro_batches):
        stage.backward_weight(i, 0)
    assert own.count == 1 or len(own.group.sent) == before, "W sends nothing"
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
    assert sum(meeting.sent) == traffic_bytes(config)[0, 1]


def test_the_bytes_of_a_block_are_4_b_s_d() -> None:
    """With two shards whose vocabulary is whole, sums of blocks are all that is sent."""
    config = cut(2, vocab_parallel=False, model={"num_layers": 3})
    _, meeting = together(config, lambda own: step(config, own))
    b, s, d = config.train.batch_size, config.model.context_length, config.model.d_model
    assert sum(meeting.sent) == 3 * 4 * b * s * d * 8 == traffic_bytes(config)[0, 1]


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
            RankEngine._counts(SimpleNamespace(config=config, replica=r, _shard=shard), name)  # type: ignore[arg-type]
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
