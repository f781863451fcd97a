"""Recording a training pass and replaying it. In the place of CUDA graphs stands a recorder of
operators on the CPU.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.runtime.executor import StageFailure
from common.spec.run import RunConfig
from tests.engines import Make, batch, different, small, train
from torch_impl import graphs, workspaces

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Graph(TorchDispatchMode):
    """`torch.cuda.CUDAGraph` as far as it is used, of operators on a CPU.

    These give their shapes only by computing; what they overwrote is put back at the end, so that
    recording, as on a GPU, changes nothing. As there, what is read back to the host is an error.
    """

    made: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.replays = 0
        Graph.made.append(self)

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        assert (pool[0], capture_error_mode) == (0, "thread_local")
        self.__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = [*args, *kwargs.values()]
        written = [
            value
            for argument, value in zip(func._schema.arguments, given, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.before += [(tensor, tensor.clone()) for tensor in tensors(written)]
        results = func(*args, **kwargs)
        is_new = all(result.alias_info is None for result in func._schema.returns)
        self.calls.append((func, args, kwargs, tensors(results) if is_new else []))
        return results

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        for tensor, before in reversed(self.before):
            tensor.data.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            for result, again in zip(results, tensors(func(*args, **kwargs)), strict=False):
                result.data.copy_(again)  # autograd must not see it, as it sees no GPU


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines record as they would on a GPU."""
    why_eager = graphs.why_eager
    monkeypatch.setattr(graphs, "why_eager", lambda config, device: why_eager(config, CUDA))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, len(Graph.made)))
    Graph.made.clear()


OFF = {"cuda_graphs": "off"}


@pytest.mark.parametrize(
    ("stages", "schedule", "options"),
    [
        (1, "1f1b", {}),
        (2, "1f1b", {"dtype": "float64", "train": {"micro_batches": 3}}),  # 3, 3 and 2 sequences
        (2, "zb-h1", {"tied_head": True, "run": {"recompute": "full"}}),
        (2, "zb-v", {"num_layers": 6, "run": {"chunks": 2}}),
        (2, "interleaved", {"num_layers": 6, "run": {"chunks": 2}, "dtype": "bfloat16"}),
    ],
)
def test_replayed_steps_have_the_eager_ones_bits(
    make: Make, stages: int, schedule: str, options: dict[str, Any]
) -> None:
    run = options.pop("run", {})
    eager = train(make(stages, schedule, run=run | OFF, **options), range(5))
    assert Graph.made == []
    engine = make(stages, schedule, run=run, **options)
    first = train(engine, range(2))
    actions = sum(map(len, engine.schedule.devices))
    assert [graph.replays for graph in Graph.made] == [1] * actions
    calls: list[str] = []
    for stage in engine.stages.values():
        for chunk in stage.chunks:
            chunk.units[0].register_forward_hook(lambda *_: calls.append("F"))
    assert different(eager, first | train(engine, range(2, 5))) == []
    assert [graph.replays for graph in Graph.made] == [4] * actions
    assert calls == []


def test_passes_that_do_not_train_change_no_recording(make: Make) -> None:
    def trained(engine: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for step in range(5):
            found |= train(engine, [step])
            given = batch(engine, step)
            found[f"held-out loss {step}"] = engine.evaluate(given)
            found[f"logits {step}"] = engine.predict(given.inputs[:5])
            found |= {str(key): value for key, value in engine.unit_outputs(given).items()}
        return found

    assert different(trained(make(2, run=OFF)), trained(make(2))) == []
    assert {graph.replays for graph in Graph.made} == {4}


def test_new_weights_and_moments_go_into_the_same_memory(make: Make) -> None:
    engine, eager = make(2), make(2, run=OFF)
    train(engine, range(4))
    recorded = len(Graph.made)
    weights, state = engine.weights(), engine.optimizer_state()
    found = []
    for each in (engine, eager):
        each.reset(weights)
        each.load_optimizer_state(state, 4)
        each.set_gradients(weights)
        each.apply_gradients(4)
        found.append(train(each, range(5, 8)))
    assert different(*found) == []
    assert len(Graph.made) == recorded


def start_over_with_a_shape(engine: Any) -> None:
    given = batch(engine)
    assert engine.forward_backward(given.first(5)) != engine.forward_backward(given)


def start_over_after_a_failure(engine: Any) -> None:
    engine.on_action = lambda device, action: (
        1 / 0 if device == 1 and str(action) == "BW1" else None
    )
    with pytest.raises(StageFailure, match="ZeroDivisionError"):
        engine.forward_backward(batch(engine))
    engine.on_action = lambda device, action: None


def start_over_without_workspaces(engine: Any) -> None:
    workspaces.workspaces_freed += 1


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize(
    "interrupt",
    [start_over_with_a_shape, start_over_after_a_failure, start_over_without_workspaces],
)
def test_it_starts_over(make: Make, done: int, interrupt: Any) -> None:
    """Whether the pass that is interrupted would have warmed up, recorded or replayed."""
    engine, eager = make(2), make(2, run=OFF)
    train(eager, range(done)), train(engine, range(done))
    interrupt(engine)
    made = len(Graph.made)
    assert (
        different(train(eager, range(done, done + 4)), train(engine, range(done, done + 4))) == []
    )
    assert len(Graph.made) == made + sum(map(len, engine.schedule.devices))


def test_what_cannot_be_recorded_names_the_option_and_leaves_nothing(make: Make) -> None:
    engine, eager = make(2), make(2, run=OFF)
    norm = engine.stages[engine.devices[-1]].chunks[-1].units[-1].norm
    norm.register_forward_hook(lambda layer, inputs, output: float(output.sum()) and None)
    train(engine, range(1)), train(eager, range(1))
    with pytest.raises(
        StageFailure, match=r"^device 1, action F0: RuntimeError: .*capturing; .*--cuda-graphs off"
    ):
        engine.forward_backward(batch(engine))
    norm._forward_hooks.clear()
    assert different(train(engine, range(1, 5)), train(eager, range(1, 5))) == []


@pytest.mark.parametrize("ended", [False, True])
def test_a_recording_that_cannot_end_gives_its_memory_back(
    make: Make, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, whether it is CUDA that cannot end it or PyTorch that gets nothing from it."""
    calls: list[tuple[str, Any]] = []

    def end_allocating(device: int | None, pool: Any) -> None:
        calls.append(("end", pool))
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def fails(graph: Graph) -> None:
        graph.__exit__(None, None, None)
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocating)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda device, pool: calls.append(("release", pool))
    )
    engine = make(1)
    train(engine, range(1))
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "capture_end", fails)
        with pytest.raises(StageFailure, match=r"previous error during capture; .*graphs off runs"):
            engine.forward_backward(batch(engine))
    (end, pool), (release, released) = calls
    assert (end, release) == ("end", "release") and pool == released is not None
    train(engine, range(1, 4))  # a recording that ends well gives nothing back by hand
    assert len(calls) == 2


def test_a_closed_engine_keeps_no_recording(make: Make) -> None:
    engine = make(2)
    train(engine, range(3))
    engine.close()
    assert [(stage.pool, stage._actions) for stage in engine._graphed.values()] == [(None, {})] * 2


@pytest.mark.parametrize(
    ("run", "options", "device", "said"),
    [
        ({}, {}, CUDA, "used"),
        ({"recompute": "full"}, {"tied_head": True, "train": {"micro_batches": 3}}, CUDA, "used"),
        ({"sequences_per_epoch": 16}, {}, CUDA, "used"),
        ({}, {}, CPU, "not used: no GPU"),
        ({"cuda_graphs": "off"}, {}, CUDA, "not used: cuda_graphs = off"),
        ({"executor": "native"}, {}, CUDA, "not used: executor = native"),
        ({"drift": "tf32"}, {}, CUDA, "not used: drift = tf32"),
        ({}, {"dropout": 0.1}, CUDA, "not used: dropout draws other masks in every step"),
        (
            {"sequence_lengths": "random"},
            {},
            CUDA,
            "not used: not every step has the same number of tokens that count",
        ),
        (
            {},
            {"causal": False},
            CUDA,
            "not used: not every step has the same number of tokens that count",
        ),
        (
            {"sequences_per_epoch": 12},
            {},
            CUDA,
            "not used: not every step has the same number of tokens that count",
        ),
    ],
)
def test_when_it_is_used(
    run: dict[str, Any],
    options: dict[str, Any],
    device: torch.device,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    config: RunConfig = small("torch", 2, run=run, **options)
    assert graphs.environment(config, device) == {"cuda_graphs": said}


def test_a_recordings_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(pool: int, device: int, allocated: int) -> dict[str, Any]:
        return {
            "segment_pool_id": (0, pool),
            "device": device,
            "total_size": 100,
            "allocated_size": allocated,
        }

    segments = [segment(0, 0, 10), segment(1, 0, 70), segment(2, 0, 95), segment(1, 1, 1)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    stages = [graphs.GraphedStage(None) for _ in range(3)]
    assert graphs.idle_bytes(stages, CUDA) == 0
    stages[0].pool, stages[1].pool = (0, 1), (0, 2)
    assert graphs.idle_bytes(stages, CUDA) == 30 + 5
