"""CUDA graphs: a stage's training pass is recorded once, action by action, then replayed.

An action of a small model is hundreds of kernels of a few microseconds each, and the host takes
longer to launch one than the GPU to run it. A replay launches a whole action at once. It runs the
same kernels on the same memory, so its bits are those of the eager pass; whoever fills that memory
with new tokens gets a new step.

All graphs of a stage share one pool of memory. What an action frees while it is recorded, a later
one may get, and the addresses stay in the graphs. That is safe because a device's schedule is one
list, walked in one stream:

    recorded   F0 ──► F1 ──► B0 ──► F2 ──► B1 ──► B2      block a: from F0 to B0, then from F2 to B2
               a      b      │a     a      │b     │a      block b: from F1 to B1
                             free          free   free
    replayed   F0 ──► F1 ──► B0 ──► F2 ──► B1 ──► B2      the same order, so F2 overwrites what B0 has read

Only what goes to another stage is never free: an action's result, and the copy of its input that
the graph reads. The receiver has its own stream, and the pass ends for all stages before the next
one writes there.

What is recorded must not change: weights, gradients, tokens and targets keep their memory, and
`num_tokens` its value. A pass of another shape starts over. So does one after a failure, and one
after cuBLAS' workspaces, which graphs use, were freed.

Differs: TensorFlow's actions are compiled functions; Paddle's stages are processes.
"""  # noqa: E501

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.runtime.mode import Mode
from common.spec.data import Batch
from common.spec.run import RunConfig
from torch_impl import workspaces
from torch_impl.stage import Pass, Stage

ONE_AT_A_TIME = threading.Lock()
"""A process records one graph at a time: they share the state of the device's random generator."""

Work = Callable[[Tensor | None], Tensor | None]


def why_eager(config: RunConfig, device: torch.device) -> str | None:
    """Return why training `config` on this device records nothing; None if it does."""
    epoch, batch_size = config.sequences_per_epoch, config.train.batch_size
    ragged = config.sequence_lengths != "full" or not config.model.causal
    ragged |= epoch is not None and epoch % batch_size > 0
    reasons = {
        "no GPU": device.type != "cuda",
        "cuda_graphs = off": config.cuda_graphs == "off",
        f"executor = {config.executor}": config.executor != "table",
        f"drift = {config.drift}": config.drift is not None,
        "shards add up within an action": config.tensor_parallel > 1,
        "dropout draws other masks in every step": config.model.dropout > 0,
        "not every step has the same number of tokens that count": ragged,
    }
    return next((why for why, holds in reasons.items() if holds), None)


def environment(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Return the part of `environment` that says whether training is recorded, and why not."""
    why = why_eager(config, device)
    return {"cuda_graphs": "used" if why is None else f"not used: {why}"}


class Recorded(NamedTuple):
    """An action."""

    graph: torch.cuda.CUDAGraph
    given: Tensor | None  # (b, S, D), where a replay's input goes
    result: Tensor | None  # (b, S, D)


class GraphedStage:
    """Stands in for a `Stage` (`common.runtime.executor.Stage`): a first training pass is eager,
    the second records.

    The first one warms up: libraries make their workspaces, autograd its threads. Passes that do
    not train stay eager.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.drop()

    def drop(self) -> None:
        """Forget the recording and frees its memory. No replay may be running."""
        self._shape: tuple[Any, ...] | None = None
        self._static: Pass | None = None
        self._actions: dict[tuple[str, int, int], Recorded] = {}
        self._run = self._eager
        self.pool: torch.cuda._POOL_HANDLE | None = None

    @property
    def records(self) -> bool:
        """Whether the pass that was begun last is the one that is recorded."""
        return self._run == self._record

    def begin(self, batch: Batch, mode: Mode) -> None:
        stage = self._stage
        stage.begin(batch, mode)
        self._run = self._eager
        if mode is not Mode.TRAIN:
            return
        # The first pass of a shape is eager. The second records; its tokens' memory becomes static.
        # From the third on new tokens are copied there and everything is replayed.
        shape = (batch.num_tokens, batch.inputs.shape, workspaces.workspaces_freed)
        if shape != self._shape:
            self.drop()
            self._shape = shape
        elif self._static is None:
            self._static, self.pool = stage.now, torch.cuda.graph_pool_handle()
            self._run = self._record
        else:
            for static, new in (
                (self._static.tokens, stage.now.tokens),
                (self._static.targets, stage.now.targets),
            ):
                if new:
                    torch._foreach_copy_(static, new)
            stage.now = self._static
            self._run = self._replay

    def forward(self, micro_batch: int, chunk: int, x: Tensor | None) -> Tensor | None:
        return self._run(
            ("F", micro_batch, chunk), x, partial(self._stage.forward, micro_batch, chunk)
        )

    def backward(self, micro_batch: int, chunk: int, gradient: Tensor | None) -> Tensor | None:
        return self._run(
            ("BW", micro_batch, chunk), gradient, partial(self._stage.backward, micro_batch, chunk)
        )

    def backward_input(
        self, micro_batch: int, chunk: int, gradient: Tensor | None
    ) -> Tensor | None:
        return self._run(
            ("B", micro_batch, chunk),
            gradient,
            partial(self._stage.backward_input, micro_batch, chunk),
        )

    def backward_weight(self, micro_batch: int, chunk: int) -> None:
        self._run(
            ("W", micro_batch, chunk),
            None,
            lambda _: self._stage.backward_weight(micro_batch, chunk),
        )

    def _eager(self, key: tuple[str, int, int], given: Tensor | None, work: Work) -> Tensor | None:
        return work(given)

    def _record(self, key: tuple[str, int, int], given: Tensor | None, work: Work) -> Tensor | None:
        """Recording computes nothing, so the pass that records replays at once."""
        try:
            static = None if given is None else given.detach().clone()
            graph = torch.cuda.CUDAGraph()
            with ONE_AT_A_TIME:
                # thread_local: other stages' threads do not matter to this one.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    result = work(static)
                except Exception:
                    with suppress(RuntimeError):  # it would only say again why nothing is recorded
                        self._end(graph)
                    raise
                self._end(graph)
                graph.replay()
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise RuntimeError(
                f"{why}; recorded as a CUDA graph, --cuda-graphs off runs without"
            ) from error
        self._actions[key] = Recorded(graph, static, result)
        return result

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording. Where that fails, PyTorch's graph does not give the pool back, neither
        now nor when it is deleted (`CUDAGraph::capture_end`, `reset`), so it is done here: else the
        allocator would keep the memory, and ask about this pool at every allocation.
        """
        try:
            graph.capture_end()
        except RuntimeError:
            device, pool = self._stage.device.index, self.pool
            assert pool is not None  # made before the first recording
            with suppress(RuntimeError):  # it has ended already, and the graph alone is wrong
                torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
            raise

    @torch.no_grad()
    def _replay(self, key: tuple[str, int, int], given: Tensor | None, work: Work) -> Tensor | None:
        graph, static, result = self._actions[key]
        if static is not None:
            assert given is not None  # an action has an input in every pass, or in none
            static.copy_(given)
        graph.replay()
        return result


def idle_bytes(stages: Iterable[GraphedStage], device: torch.device) -> int:
    """Return the memory of recordings on `device` that the allocator does not count as allocated,
    though every replay uses it.
    """
    pools = {tuple(stage.pool) for stage in stages if stage.pool is not None}
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in (torch.cuda.memory_snapshot() if pools else [])
        if tuple(segment["segment_pool_id"]) in pools and segment["device"] == device.index
    )
