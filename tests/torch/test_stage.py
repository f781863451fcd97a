"""Forward, B and W of a stage: what they compute, what they keep, and how a step ends when one
fails.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from common.runtime.executor import StageFailure
from common.runtime.mode import Mode
from common.spec import dropout_masks
from tests.engines import Make, batch, different, train
from torch_impl.dropout import DropoutContext, ElementHashes

SPLIT = "0: F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3\n1: F0 B0 F1 B1 W0 F2 B2 W1 F3 W2 B3 W3\n"


def test_split_backward_gives_the_bits_of_the_merged_one_and_runs_no_second_forward(
    make: Make, tmp_path: Path
) -> None:
    (tmp_path / "split.txt").write_text(SPLIT)
    found = []
    for stages, schedule in ((1, "gpipe"), (2, f"file:{tmp_path / 'split.txt'}")):
        engine, calls = make(stages, schedule, dropout=0.1), []
        units = [
            unit
            for stage in engine.stages.values()
            for chunk in stage.chunks
            for unit in chunk.units
        ]
        for unit in units:
            unit.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(train(engine, range(3)))
        assert len(calls) == 3 * 4 * len(units)  # steps, micro-batches
    assert different(*found) == []


def test_tapped_gradients_are_those_of_plain_autograd(make: Make) -> None:
    engine = make(1, dtype="float64", dropout=0.1, tied_head=True)
    given, stage = batch(engine), engine.stages[0]
    engine.forward_backward(given)
    logits = torch.from_numpy(given.inputs)
    context = DropoutContext(
        dropout_masks.step_key(0, 0), torch.arange(len(logits)), 0, ElementHashes()
    )
    for unit in stage.chunks[0].units:
        logits = unit(logits, context)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(given.targets).flatten()
    )
    theirs: dict[str, torch.Tensor] = {}
    found = torch.autograd.grad(loss, [item.parameter for item in stage.named])
    for item, gradient in zip(stage.named, found, strict=True):  # the uses of a tied weight add up
        theirs[item.name] = theirs.get(item.name, 0) + gradient
    for item in stage.named:
        assert (item.parameter.grad - theirs[item.name]).norm() < 1e-13 * theirs[
            item.name
        ].norm(), item.name


def test_b_frees_the_graph_and_w_frees_the_rest(make: Make) -> None:
    engine = make(2)
    # In its first forward a stage looks at the saved tensors itself.
    engine.forward_backward(batch(engine))
    stage = engine.stages[0]
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()
            alive.add(self)

    stage.begin(batch(engine), Mode.TRAIN)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        output = stage.forward(0, 0, None)
    assert len(alive) > 0
    stage.backward_input(0, 0, torch.ones_like(output))
    assert (len(alive), len(stage.waiting)) == (0, 1)
    stage.backward_weight(0, 0)
    assert (len(stage.waiting), len(stage.in_flight)) == (0, 0)


def test_bw_leaves_nothing_for_the_garbage_collector(make: Make) -> None:
    engine = make(2)
    stage = engine.stages[0]
    stage.begin(batch(engine), Mode.TRAIN)
    output = stage.forward(0, 0, None)
    inputs = weakref.WeakSet(tap.x for tap in stage.in_flight[0, 0].taps)
    assert len(inputs) > 0
    gc.disable()
    try:
        stage.backward(0, 0, torch.ones_like(output))
        assert len(inputs) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(("schedule", "peaks"), [("gpipe", [4, 4]), ("1f1b", [2, 1])])
def test_micro_batches_in_flight_are_as_many_as_the_schedule_says(
    make: Make, schedule: str, peaks: list[int]
) -> None:
    engine = make(2, schedule)
    seen: list[list[int]] = [[], []]
    for stage, counts in zip(engine.stages.values(), seen, strict=True):

        def forward(
            *arguments: Any, stage: Any = stage, counts: Any = counts, original: Any = stage.forward
        ) -> Any:
            result = original(*arguments)
            counts.append(len(stage.in_flight))
            return result

        stage.forward = forward
    engine.forward_backward(batch(engine))
    assert [max(counts) for counts in seen] == peaks


def test_tied_copies_stay_equal_and_do_not_depend_on_the_partition(make: Make) -> None:
    found = []
    for stages in (1, 2):
        engine = make(stages, tied_head=True)
        found.append(train(engine, range(3)))
        first = engine.stages[0].chunks[0].units[0].token.weight
        last = engine.stages[engine.devices[-1]].chunks[-1].units[-1].output.weight
        assert first is not last and torch.equal(first, last) and torch.equal(first.grad, last.grad)
    assert different(*found) == []


def test_a_failing_stage_ends_the_step_with_its_own_error(make: Make) -> None:
    """The head fails, after its stage's block, while the other stages wait; then the engine is used
    again.
    """
    engine = make(4, num_layers=4)
    expected = engine.forward_backward(batch(engine))
    head = engine.stages[engine.devices[-1]].chunks[-1].units[-1]

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("injected")

    head.forward, original = fail, head.forward
    with pytest.raises(
        StageFailure, match=r"^device 3, action F0: ZeroDivisionError: injected$"
    ) as failure:
        engine.forward_backward(batch(engine))
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    head.forward = original
    assert engine.forward_backward(batch(engine)) == expected
