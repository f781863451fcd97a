"""Fleet's pipeline and ours on top of it.

    PipelineLayer       ◄── StageLayers      the units of one rank, placed as the schedule says
    PipelineParallel    ◄── NativePipeline   fleet's own 1F1B, with float64 losses and a record of what ran when
                        ◄── TablePipeline    the same layers, walking a schedule table

Both are fleet's own class with methods replaced, so fleet's `train_batch` runs them too.

Differs: TensorFlow has no pipeline, and PyTorch's (`torch_impl/torch_pipelining.py`) shares no
layers with ours.
"""  # noqa: E501

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import (
    LayerDesc,
    PipelineLayer,
    PipelineParallel,
    SharedLayerDesc,
)

from common.runtime.executor import Event, run_stage
from common.runtime.reduce import Reduction
from common.schedule.action import Action, Op, Schedule
from common.spec.parameters import unit_names
from common.spec.partition import PartitionPlan
from common.spec.run import RunConfig, TransformerSpec
from paddle_impl.clock import device_clock, followed
from paddle_impl.compression import Compressor, RunningSum
from paddle_impl.dropout import DropoutContext
from paddle_impl.groups import connect, sum_over_ranks
from paddle_impl.layers import Block, Embedding, Head
from paddle_impl.shards import Shards
from paddle_impl.stage import Channel, Stage


class StageLayers(PipelineLayer):
    """This rank's units, cut by our plan instead of fleet's `seg_method`.

    Fleet takes explicit boundaries for one chunk per rank only, and no placement but the loop. So
    the cut is made in the methods that fleet calls for it.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: PartitionPlan,
        schedule: Schedule,
        context: DropoutContext,
        shards: Shards,
    ) -> None:
        self._plan, self._schedule = plan, schedule
        super().__init__(
            layers=unit_descriptions(
                config, context, shards, tied_over_ranks(config.model, schedule)
            ),
            num_stages=schedule.num_devices,
            topology=fleet.get_hybrid_communicate_group()._topo,
            # Looked up when it is called: the pipeline puts another one here for every pass.
            loss_fn=lambda logits, targets: self.loss(logits, targets),
            seg_method="layer:Block",  # any name will do: the cut is made below
            num_virtual_pipeline_stages=schedule.num_chunks,
        )

    def _segment_network(self, seg_method: str) -> None:
        # Units segment_parts[k] to segment_parts[k + 1] are virtual stage k; fleet builds those
        # between the two positions.
        self.segment_parts = list(self._plan.boundaries)
        (k,) = self._schedule.parts[self._stage_id]
        self._start_pos, self._end_pos = self.segment_parts[k : k + 2]

    def _segment_network_for_interleave(self, seg_method: str) -> None:
        # With several chunks there are two lists of positions.
        self.segment_parts = list(self._plan.boundaries)
        for k in self._schedule.parts[self._stage_id]:
            self._start_poss.append(self.segment_parts[k])
            self._end_poss.append(self.segment_parts[k + 1])

    def get_stage_from_index(self, layer_idx: int) -> int:
        """Return the rank that has a unit; fleet asks for those that share a weight."""
        return self._schedule.location[bisect_right(self.segment_parts, layer_idx) - 1][0]

    def chunks(self) -> list[list[nn.Layer]]:
        """Return the units of every chunk of this rank, in the order of the model."""
        # A rank with one chunk has no list of chunks.
        return [list(chunk) for chunk in self.get_model_chunks() or [self.run_function]]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return what fleet's schedule calls behind the head; the pipeline puts its loss here."""
        raise NotImplementedError

    def finish_sums(self) -> None:
        """Wait for what replicas add up; the pipeline puts that of its pass here."""

    def allreduce_shared_weight_gradients(self) -> None:
        """Add up a tied head's two ends, which both of fleet's schedule and ours end with.

        Replicas add up before: so the embedding's own gradient, from all rows, is added to the
        head's, and the bits are those of both on one rank.
        """
        self.finish_sums()
        super().allreduce_shared_weight_gradients()


def unit_descriptions(
    config: RunConfig, context: DropoutContext, shards: Shards, tied_over_ranks: bool
) -> list[LayerDesc]:
    """One description per unit; fleet builds those of this rank only.

    A tied head's copy of the token embedding is shared by SharedLayerDesc, under a key, if the two
    are on different ranks: both add the other's gradient to their own. On one rank SharedLayerDesc
    would make them one parameter, with the gradients of both uses mixed in the order of the
    schedule; there they stay two, and the engine adds.
    """

    spec = config.model

    def describe(layer: type[nn.Layer], *arguments: Any) -> LayerDesc:
        if tied_over_ranks and layer is not Block:
            # key of the share, layer, its forward (None: its own), the attribute that is shared
            return SharedLayerDesc("token", layer, None, "tied_weight", spec, *arguments)
        return LayerDesc(layer, spec, *arguments)

    blocks = [LayerDesc(Block, spec, name, context, shards) for name in unit_names(spec)[1:-1]]
    first = describe(Embedding, context, shards, config.train.dtype)
    return [first, *blocks, describe(Head, shards)]


def tied_over_ranks(spec: TransformerSpec, schedule: Schedule) -> bool:
    """Return whether the head is tied to an embedding on another rank."""
    return spec.tied_head and schedule.location[0][0] != schedule.location[-1][0]


class NativePipeline(PipelineParallel):
    """Fleet's 1F1B (`PipelineParallel.forward_backward_pipeline`), unchanged but for what it lacks.

    It records its actions, sets the dropout masks of each micro-batch, and hands on losses of any
    precision: fleet's broadcast sends all but float32 as float16.
    """

    config: RunConfig
    schedule: Schedule
    stage: Stage
    compressors: dict[int, Compressor]
    """By chunk."""
    on_action: Callable[[int, Action | None], None]
    _actions: list[tuple[Action, Any, Any, Any]]
    """What has run, with the clock's marks for ready, start and end."""

    def begin_pass(self, stage: Stage) -> None:
        """Tie the pipeline to its stage, whose `begin` the engine has called."""
        self.stage, self._layers.loss = stage, stage.loss
        self._layers.finish_sums = self._finish_sums
        actions, overlaps = self.schedule.devices[self.stage_id], self.config.reduce == "overlap"
        self._reduction = Reduction(actions, self._start_sum, overlaps)
        self._sums: list[RunningSum] = []
        self._actions, self._clock = [], device_clock(partial(self.on_action, self.stage_id))
        self._ready = self._clock.mark()

    def events(self) -> list[Event]:
        """Return what the pass did; on a GPU when that is done."""
        return [Event(action, *map(self._clock.seconds, when)) for action, *when in self._actions]

    def _start_sum(self, chunk: int) -> None:
        """Begin to add up a chunk's gradients over the replicas."""
        if self.use_data_parallel:
            named = self.stage.named_by_chunk[chunk]
            if chunk not in self.compressors:
                self.compressors[chunk] = Compressor(self.config, named)
            gradients = [item.parameter.grad for item in named]
            self._sums.append(self.compressors[chunk].start(gradients, self.dp_group))

    def _finish_sums(self) -> None:
        self._reduction.finish()
        for each in self._sums:
            each.finish()

    def walk(self, schedule: Schedule, ahead: Callable[[], None] = lambda: None) -> list[Event]:
        """Run this rank's line of the schedule, `ahead` before every action; return what it did."""
        # (b, S, D), at every cut
        shapes = [[*tokens.shape, self.config.model.d_model] for tokens in self.stage.tokens]
        channel = Channel(schedule, self.stage_id, shapes, self.config.train.dtype)
        with followed(self._clock, partial(self.on_action, self.stage_id)) as note:

            def before(action: Action) -> None:
                ahead()
                note(action)

            events = run_stage(schedule, self.stage_id, self.stage, channel, before, self._clock)
        self.on_action(self.stage_id, None)
        return events

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return what fleet's schedule reads: once for the input, once for the target."""
        reads = self.is_pipeline_first_stage(ignore_virtual=True) + self.is_pipeline_last_stage(
            ignore_virtual=True
        )
        for piece in zip(self.stage.tokens, self.stage.targets, strict=True):
            yield from [piece] * reads  # two where one rank has both ends of the model

    def _forward_step(
        self, input_tensor: Any, micro_dataset: Any, chunk_id: Any = None, step_id: Any = None
    ) -> Any:
        # Fleet has received the input by now, so the time before is that of waiting for it.
        start = self._clock.mark()
        self.stage.prepare(step_id)
        result = super()._forward_step(input_tensor, micro_dataset, chunk_id, step_id)
        self._record(Action(Op.F, step_id), start)
        return result

    def _backward_step(
        self,
        input_tensor: Any,
        output_tensor: Any,
        output_tensor_grad: Any,
        chunk_id: Any = None,
        step_id: Any = None,
    ) -> Any:
        start = self._clock.mark()
        result = super()._backward_step(
            input_tensor, output_tensor, output_tensor_grad, chunk_id, step_id
        )
        self._record(Action(Op.BW, step_id), start)
        return result

    def _record(self, action: Action, start: Any) -> None:
        end = self._clock.mark()
        self._actions.append((action, self._ready, start, end))
        self._ready = end

    def _broadcast_final_loss(self, return_micro_batch_loss: bool = False) -> Tensor:
        """The mean loss () or the micro-batches' shares of it (d m,), float64, on every rank."""
        # One place for each, so that the sum's bits do not depend on who adds when.
        shares = [0.0] * (self.config.replicas * self.accumulate_steps)
        for i, share in enumerate(self.stage.losses()):
            shares[self.stage.first + i] = share
        shares = sum_over_ranks(shares)
        return paddle.to_tensor(shares if return_micro_batch_loss else math.fsum(shares), "float64")


class TablePipeline(NativePipeline):
    """Fleet's pipeline with our executor as its loop: any schedule of F and BW, or F, B and W."""

    _walked: list[Event]

    def events(self) -> list[Event]:
        return self._walked

    def forward_backward_pipeline(
        self,
        data: Any,
        scaler: Any = None,
        static_scheduler: bool = False,
        return_micro_batch_loss: bool = False,
    ) -> Any:
        """As fleet's, but without `data`, which the stage has already, and without loss scaling."""
        if static_scheduler:
            return " ".join(map(str, self.schedule.devices[self.stage_id]))
        self._walked = self.walk(self.schedule, self._reduction.before)
        # Replicas, and a head tied to another rank's embedding; fleet's own schedule ends so too.
        self._layers.allreduce_shared_weight_gradients()
        return self._broadcast_final_loss(return_micro_batch_loss)


def build_pipeline(config: RunConfig, layers: StageLayers, schedule: Schedule) -> NativePipeline:
    """Return what `fleet.distributed_model` is for: a pipeline around the layers. All that it does
    for one is to choose a class, and ours it does not know.
    """
    strategy = fleet.fleet._user_defined_strategy
    strategy.pipeline_configs = {
        "accumulate_steps": config.train.micro_batches,
        "micro_batch_size": config.micro_batch_sizes[0],
    }
    chosen = NativePipeline if config.executor == "native" else TablePipeline
    pipeline = chosen(layers, fleet.get_hybrid_communicate_group(), strategy)
    pipeline.config, pipeline.schedule, pipeline.compressors = config, schedule, {}
    connect(schedule)  # fleet's own schedule, too, is evaluated by `walk`
    return pipeline
