"""A Keras model that trains as a pipeline: `GPipeModel(layers, num_stages=4, num_micro_batches=8)`.

    layers = [Dense(256, "relu"), Dense(256, "relu"), Dense(10)]
    model = GPipeModel(layers, num_stages=3, num_micro_batches=4)
    model.compile("adam", SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(dataset, validation_data=held_out, epochs=3)

It is the synchronous pipeline of GPipe (Huang et al. 2019), with any schedule: the same weights as
training the layers on one device, because a mini-batch's gradients are added up over its
micro-batches before the optimizer sees them.

Differs: only Keras' users compile and fit a pipeline; `tf_impl.engine` is the harness' view.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

from common.runtime.executor import Event, unwatched
from common.schedule.action import Action, Schedule, ScheduleError
from common.schedule.generators import make_schedule
from common.schedule.recompute import WORDS, is_known
from common.schedule.validate import require_valid
from common.spec.dropout_masks import step_key
from common.spec.parameters import unit_names
from common.spec.run import TransformerSpec
from tf_impl import devices, executors
from tf_impl.cut_graphs.functions import RECOMPUTED_EFFECT
from tf_impl.effects import mask_of, with_mask
from tf_impl.keras_optimizers import check_optimizer
from tf_impl.keras_pipeline.batch import one_tensor, piece_sizes, unpacked
from tf_impl.keras_pipeline.chunk import Chunk, Elsewhere
from tf_impl.keras_pipeline.forward_only import ForwardOnly, Recorded, concatenated
from tf_impl.keras_pipeline.loss import BatchLoss, NoLoss, check_loss
from tf_impl.keras_pipeline.row import check_numbers, cut_row, row_of
from tf_impl.keras_pipeline.saving import SavedRow, schedule_text
from tf_impl.keras_pipeline.tracing import Traced, TracedRow
from tf_impl.keras_pipeline.updating import UpdatedRow
from tf_impl.layers import Embedding, build_unit
from tf_impl.optimizer import StageOptimizer
from tf_impl.stage import Stage
from tf_impl.threads import StageThreads

Result = TypeVar("Result")


@keras.saving.register_keras_serializable("triptych")
class GPipeModel(TracedRow, UpdatedRow, SavedRow, StageThreads):
    """A row of Keras layers, or the Transformer of a `TransformerSpec`, cut over several devices.

    `layers` are as `keras.Sequential` has them, a `keras.Input` ahead of them or not. Weights that
    they already have are moved to the stage's device. `partition` gives the first layer of every
    virtual stage after the first; "even" spreads the layers evenly. `num_micro_batches` need not
    divide a mini-batch: pieces then differ by one sample. `schedule` is a name (gpipe, 1f1b, ...),
    `file:PATH`, or a `Schedule`. `recompute`: what the backward computes again instead of holding
    it (`common.schedule.recompute`; GPipe's choice is "full"). `dtype` and `seed` (of the dropout
    masks) are the Transformer's; ordinary layers have their own. `tensor_parallel` cuts its
    matrices into shards, `vocab_parallel` the token embedding and the head too. One logical device
    per stage and shard must exist (`tf_impl.devices.configure`). `held`: the stages of a
    Transformer that this process computes, where others have the rest (`tf_impl.rank_engine`).

    It gives what `keras.Sequential` gives with the same weights: masks, regularizers and `add_loss`
    included, where what is added is a mean or a sum over samples, or depends on the weights alone.
    A layer sees one micro-batch at a time: random numbers are each micro-batch's own, so is
    whatever is computed across samples, and what layers update in the forward, such as the averages
    of a BatchNormalization, is updated m times a step, each time from one micro-batch. `compile`
    (or `build`, if that comes later) warns once of such updates and names the layers.

    Raises ValueError for more stages than layers, a partition that does not fit, missing devices, a
    layer that comes twice, is stateful or part of another model; ScheduleError for a schedule that
    cannot be made. `build` does for a device that would hand on integers or several tensors, for a
    `tf.py_function` that has to be differentiated, and for `recompute` where a layer calls Python
    or draws numbers without a Keras seed.
    """

    def __init__(
        self,
        layers: TransformerSpec | Sequence[keras.layers.Layer],
        num_stages: int,
        num_micro_batches: int,
        schedule: str | Schedule = "gpipe",
        *,
        num_chunks: int = 1,
        partition: str | Sequence[int] = "even",
        recompute: str = "none",
        device: str = "auto",
        dtype: str = "float32",
        seed: int = 0,
        tensor_parallel: int = 1,
        vocab_parallel: bool = False,
        held: Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        check_numbers(
            num_stages=num_stages, num_micro_batches=num_micro_batches, num_chunks=num_chunks
        )
        if not isinstance(schedule, str | Schedule):
            raise ValueError(f"schedule {schedule!r}; expected a name, file:PATH or a Schedule")
        super().__init__(
            name=name, **({"dtype": dtype} if isinstance(layers, TransformerSpec) else {})
        )
        self.spec = layers if isinstance(layers, TransformerSpec) else None
        self.seed = seed
        # Lists of layers must be complete before they become an attribute: Keras looks only then.
        start = None
        if isinstance(layers, TransformerSpec):
            self.units = [build_unit(layers, unit, dtype) for unit in unit_names(layers)]
        else:
            self.units, start = row_of(layers)
        if isinstance(schedule, str):
            made = make_schedule(schedule, num_stages, num_micro_batches, num_chunks)
            # What a saved model says of itself: a name, or the whole text where a file had it.
            schedule = made if schedule.startswith("file:") else schedule
        else:
            made = schedule
        sizes = made.num_devices, made.num_micro_batches
        if sizes != (num_stages, num_micro_batches):
            raise ScheduleError(
                f"schedule {made.name} has {sizes[0]} devices and {sizes[1]} micro-batches; "
                f"expected {num_stages} and {num_micro_batches}"
            )
        require_valid(made)  # else stages may wait for one another for ever
        self.schedule = made
        if not is_known(str(recompute)):
            raise ValueError(f"recompute {recompute!r}; expected one of {WORDS}")
        self.recompute = recompute
        edges = cut_row(self.spec, len(self.units), *made.grid, partition)
        self.held = tuple(range(num_stages) if held is None else held)
        if self.spec is None and tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel = {tensor_parallel}: only a TransformerSpec is cut; expected 1 "
                "for Keras layers"
            )
        self.tensor_parallel = t = tensor_parallel
        self.shard_devices = own = devices.stage_devices(len(self.held) * t, device)
        """Those of each held stage, its own first."""
        places = [t * self.held.index(d) if d in self.held else 0 for d in range(num_stages)]
        names = [own[place] for place in places]
        strategies = executors.stage_strategies(names)
        shards = [
            [strategy, *executors.stage_strategies(own[place + 1 : place + t])] if t > 1 else []
            for place, strategy in zip(places, strategies, strict=True)
        ]
        # By virtual stage: with two devices and two chunks each, chunks 0 and 2 are on device 0.
        self.chunks = [
            (Chunk if made.location[k][0] in self.held else Elsewhere)(
                self.units[edges[k] : edges[k + 1]],
                strategies[made.location[k][0]],
                is_first=k == 0,
                is_last=k == made.num_virtual_stages - 1,
                ops={action.op for action in made.devices[made.location[k][0]]},
                shards=shards[made.location[k][0]],
                vocab_parallel=vocab_parallel,
            )
            for k in range(made.num_virtual_stages)
        ]
        # By device.
        self.stages = [Stage([self.chunks[k] for k in made.parts[d]]) for d in range(num_stages)]
        self.stage_devices = names
        self.events: dict[int, list[Event]] = {}
        """What the last `forward_backward` did, per device, if `times_actions`."""
        self.times_actions = "GPU" not in names[0]
        """On GPUs this makes the host wait for the device three times an action."""
        self.on_action: Callable[[int, Action | None], None] = unwatched
        """Called with the device ahead of every action, with None after the last, on its thread."""
        self._options = {
            "num_stages": num_stages,
            "num_micro_batches": num_micro_batches,
            "schedule": schedule_text(schedule),
            "num_chunks": num_chunks,
            "partition": edges[1:-1],
            "recompute": recompute,
            "device": device,
            "dtype": dtype,
            "seed": seed,
            "tensor_parallel": tensor_parallel,
            "vocab_parallel": vocab_parallel,
        }
        self._input: keras.KerasTensor | None = None
        self._strategies = strategies
        self._threads = [ThreadPoolExecutor(1, f"stage-{d}") for d in range(num_stages)]
        self._optimizers: dict[int, StageOptimizer] = {}
        self._traced: dict[Any, Traced] = {}
        self._reports = False
        self._loss: BatchLoss | None = None
        self._is_masked = False
        self._has_warned = False
        # A step is Python's: it starts functions that are already traced, from several threads.
        self.run_eagerly, self.jit_compile = True, False
        if start is not None:
            self.build(start.shape, start.dtype)

    # --------------------------------------------------------------------------- Keras' own methods

    def build(self, input_shape: Sequence[int | None], dtype: str | None = None) -> None:
        """Make all weights, each on its stage's device. Called by the first step; needed before
        `load_weights`.
        """
        if self._input is not None:
            return
        if dtype is None:
            dtype = (
                "int32"
                if isinstance(self.units[0], Embedding | keras.layers.Embedding)
                else keras.config.floatx()
            )
        # The batch size stays open: micro-batches, and batches to predict, have different ones.
        x = start = keras.KerasTensor((None, *input_shape[1:]), dtype)
        taken: set[int] = set()
        for chunk, (d, _) in zip(self.chunks, self.schedule.location, strict=True):
            for shared in (v for layer in chunk.layers for v in layer.variables if id(v) in taken):
                raise ValueError(
                    f"layers of two virtual stages share the variable {shared.path}; expected a "
                    "partition that keeps them together"
                )
            x = self.on_stage(d, functools.partial(chunk.build, x))
            taken |= {id(v) for layer in chunk.layers for v in layer.variables}
        self._input, self._is_masked = start, mask_of(x) is not None
        self._check_effects()
        for first, copy in self._tied:
            if first is not None and copy is not None:
                copy.assign(first)  # two variables that begin and stay equal: `_add_tied_gradients`
        self.cast_masters()
        self._claim_optimizer()

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: str | bool = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """As `keras.Model.compile`. Clipping by `global_clipnorm` is over all stages.

        Whatever `run_eagerly` is, Python walks the schedule, and what it calls are traced
        functions. Raises ValueError for XLA, and for an optimizer or a loss that a pipeline cannot
        have (`check_optimizer`, `check_loss`).
        """
        check_loss(loss)
        if jit_compile is True:
            raise ValueError(
                "jit_compile=True: the cut functions are not compiled by XLA; expected 'auto' "
                "or False"
            )
        if type(self).compute_loss is not keras.Model.compute_loss:
            raise ValueError(
                "compute_loss is overridden, and a pipeline computes its loss in pieces; expected "
                "compile(loss=...)"
            )
        own_metrics = type(self).compute_metrics is not keras.Model.compute_metrics
        self._reports = bool(metrics or weighted_metrics or own_metrics)
        super().compile(
            optimizer=optimizer,
            loss=NoLoss() if loss is None else loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=True,
            steps_per_execution=steps_per_execution,
            jit_compile=False,
            auto_scale_loss=auto_scale_loss,
        )
        check_optimizer(self.optimizer)
        # The loss and the metrics are part of what is traced.
        self._optimizers, self._traced, self._loss = {}, {}, None
        self._claim_optimizer()
        self._warn_of_states()

    def __call__(self, x: Any, *arguments: Any, **options: Any) -> Any:
        """As `keras.Model`'s. Keras itself would build without a dtype."""
        self._ensure_built(x if isinstance(x, keras.KerasTensor) else one_tensor(x, "x"))
        return super().__call__(x, *arguments, **options)

    def call(self, x: Any, training: bool = False) -> tf.Tensor:
        """Return the forward pass alone, stage after stage, without dropout."""
        if training:
            raise ValueError("a pipeline trains in forward_backward, not in call(training=True)")
        mask = mask_of(x)
        for chunk, (d, _) in zip(self.chunks, self.schedule.location, strict=True):
            with self._executor(d):  # a loop that is traced for another does not run on it
                # `identity` copies to this stage's device; the last argument counts losses whole.
                given = (t if t is None else tf.identity(t) for t in (x, mask))
                x, mask, _ = chunk.evaluate(*given, tf.ones((), tf.float64))
        return with_mask(x, mask)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = unpacked(data, self._needs_labels)
        loss = self.forward_backward(x, y, sample_weight)
        if self._weights:
            self.apply_gradients()
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        prediction = None
        if self._reports:
            pieces = self.stages[self.schedule.location[-1][0]].predictions
            prediction = concatenated([pieces[i] for i in sorted(pieces)])
        return self._reported(loss, x, y, prediction, sample_weight)

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = unpacked(data, self._needs_labels)
        pieces, layer_losses = self.forward_pieces(x)
        prediction = concatenated(pieces)
        loss = math.fsum(
            float(value)
            for value in (self._compile_loss(y, prediction, sample_weight), *layer_losses)
        )
        return self._reported(loss, x, y, prediction, sample_weight)

    def predict_step(self, data: Any) -> tf.Tensor:
        return self.forward_only(one_tensor(keras.utils.unpack_x_y_sample_weight(data)[0], "x"))

    # ---------------------------------------------------------------------------- one training step

    def forward_backward(
        self, x: Any, y: Any, sample_weight: Any = None, step: int | None = None
    ) -> float:
        """Run the schedule over a mini-batch, replacing the gradients. Returns its loss.

        `step` (default: the optimizer's) chooses the Transformer's dropout masks. Raises ValueError
        for a batch with fewer samples than micro-batches, RuntimeError before `compile`, and a
        failed stage's StageFailure.
        """
        if not self.compiled:
            raise RuntimeError(
                "the model has no optimizer and no loss yet; expected compile(optimizer, loss)"
            )
        x, y, sample_weight = unpacked((x, y, sample_weight))
        m = self.schedule.num_micro_batches
        if len(x) < m:
            raise ValueError(
                f"a batch of {len(x)} samples cannot be cut into {m} micro-batches; expected at "
                f"least {m} (drop_remainder=True where a data set is batched)"
            )
        self._ensure_built(x)
        if not (self._needs_labels or any(chunk.adds_losses for chunk in self.chunks)):
            raise ValueError(
                "loss=None, and no layer adds a loss; expected compile(loss=...), for example 'mse'"
            )
        labels = [y] if sample_weight is None else [y, sample_weight]
        # Of the whole mini-batch, and known before the first micro-batch: every micro-batch then
        # adds its part of the one loss, and the gradients simply add up.
        divisor = self._divisor(self._ensure_traced(x, labels), x, labels)
        context = self.dropout_context(
            len(x), int(self.optimizer.iterations) if step is None else step
        )
        return math.fsum(self.run_schedule(x, labels, divisor, context))

    def run_schedule(
        self,
        x: tf.Tensor,
        labels: Sequence[tf.Tensor],
        divisor: float,
        context: Sequence[tuple[int, np.ndarray]],
    ) -> list[float]:
        """Run the schedule over a mini-batch, or a replica's share of it, replacing the gradients.
        Returns the parts of the loss that are computed here.

        `divisor`: that of the whole mini-batch's summed loss. `context`: as in `dropout_context`.
        """
        self._ensure_traced(x, labels)
        sizes = piece_sizes(len(x), self.schedule.num_micro_batches)

        def begin(d: int) -> Stage:
            stage = self.stages[d]
            for chunk in stage.chunks:
                chunk.clear_gradients()
            first, last = (
                any(getattr(c, end) for c in stage.chunks) for end in ("is_first", "is_last")
            )
            # Each stage cuts what it needs, on its own device: x (B, ...) into m of (b, ...).
            pieces = zip(*(tf.split(t, sizes) for t in labels), strict=True) if last else []
            stage.begin(
                tf.split(x, sizes) if first else [],
                [(*piece, tf.constant(divisor, tf.float64)) for piece in pieces],
                [(tf.constant(key, tf.int64), tf.constant(samples)) for key, samples in context],
            )
            return stage

        self.events = self._run(self.schedule, begin)
        self._add_tied_gradients()
        # Here the host waits for the devices. `fsum` has no order, so no schedule changes the loss.
        losses = self.stages[self.schedule.location[-1][0]].losses()
        return [*losses, *(float(loss) for stage in self.stages for loss in stage.layer_losses)]

    def forward_only(self, x: Any) -> tf.Tensor:
        """Return the prediction without dropout, through the pipeline in micro-batches, or, for a
        small batch, in single samples. Raises a failed stage's StageFailure.
        """
        return concatenated(self.forward_pieces(x)[0])

    def forward_pieces(
        self, x: Any, finish: Callable[[int, tf.Tensor], tf.Tensor] = lambda i, y: y
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """As `forward_only`, by micro-batch, without any where another process has the last stage;
        and what the layers add to the loss of the mini-batch.

        `finish(micro_batch, prediction)` is called on the last stage, for what to keep instead.
        """
        x = one_tensor(x, "x")
        self._ensure_built(x)
        # 3 samples for 4 micro-batches: three of one sample, and no action of the fourth.
        count = min(self.schedule.num_micro_batches, len(x))
        sizes, passes = piece_sizes(len(x), count), {}
        rows = self.schedule.only_forward().devices
        forwards = tuple(
            tuple(action for action in row if action.micro_batch < count) for row in rows
        )

        def begin(d: int) -> ForwardOnly:
            chunks = self.stages[d].chunks
            inputs = tf.split(x, sizes) if chunks[0].is_first else []
            passes[d] = ForwardOnly(chunks, inputs, [size / len(x) for size in sizes], finish)
            return passes[d]

        self._run(replace(self.schedule, devices=forwards), begin)
        found = {i: y for p in passes.values() for i, y in p.predictions.items()}
        losses = [loss for p in passes.values() for loss in p.layer_losses]
        return [found[i] for i in sorted(found)], losses

    def summed_loss(self, prediction: tf.Tensor, y: tf.Tensor, *rest: tf.Tensor) -> tf.Tensor:
        """Return what a part of a mini-batch adds to its loss. `rest`: the sample weight, if there
        is one, and the divisor.
        """
        *weight, divisor = rest
        loss = self._loss or self._understand_loss(prediction, y, *weight)
        total = loss.numerator(y, prediction, *weight)
        return tf.math.divide_no_nan(total, tf.cast(divisor, total.dtype))

    def unit_outputs(
        self, x: tf.Tensor, context: Sequence[tuple[int, np.ndarray]]
    ) -> dict[tuple[int, str], tf.Tensor]:
        """Return the output of every layer that is here, by micro-batch and name, with the dropout
        of a training step (to compare them).

        `context`: as `dropout_context` has it.
        """
        sizes = piece_sizes(len(x), self.schedule.num_micro_batches)
        passes = {
            d: Recorded(self.stages[d].chunks, tf.split(x, sizes), context) for d in self.held
        }
        self._run(self.schedule.only_forward(), passes.__getitem__)
        return {key: y for each in passes.values() for key, y in each.outputs.items()}

    # --------------------------------------------------------------------------------------- inside

    @property
    def _needs_labels(self) -> bool:
        return not isinstance(self.loss, NoLoss)

    def _ensure_built(self, x: tf.Tensor) -> None:
        if not self.built:
            self.build(tuple(x.shape), keras.backend.standardize_dtype(x.dtype))

    def _check_effects(self) -> None:
        """Raises ValueError for layers that cannot run as often as a micro-batch asks; warns of
        those with a state.
        """
        m = self.schedule.num_micro_batches
        for chunk, layer in ((c, each) for c in self.chunks for each in c.layers):
            if m > 1 and any(
                "neither" in kinds for kinds in chunk.kinds.get(id(layer), {}).values()
            ):
                raise ValueError(
                    f"layer {layer.name}: what it adds to the loss of a batch is not known to be "
                    "the sum or the mean of what it adds for the samples; expected one of the two, "
                    "or num_micro_batches=1"
                )
        for layer, effects in (found for chunk in self.chunks for found in chunk.effects):
            if effects.differentiates_python and m > 1:
                raise ValueError(
                    f"layer {layer.name}: TensorFlow keeps what the gradient of a tf.py_function "
                    "needs of one call only; expected one micro-batch, or tf.numpy_function in a "
                    "tf.custom_gradient"
                )
            if self.recompute != "none" and not effects.is_undone:
                raise ValueError(f"layer {layer.name}: {RECOMPUTED_EFFECT}")
        self._warn_of_states()

    def _warn_of_states(self) -> None:
        """Names, once, the layers that update variables in the forward: with every micro-batch."""
        names = [
            name
            for chunk in self.chunks
            for _, effects in chunk.effects
            for name in effects.changed
        ]
        m = self.schedule.num_micro_batches
        if names and m > 1 and self.compiled and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{', '.join(dict.fromkeys(names))}: updated with every micro-batch, so {m} times "
                "a step, each time from that micro-batch alone; keras.Sequential does so once, "
                "from the whole mini-batch",
                stacklevel=2,
            )

    def dropout_context(
        self, batch_size: int, step: int, pieces: int | None = None
    ) -> list[tuple[int, np.ndarray]]:
        """Key and sample indices of each micro-batch, or of `pieces`; nothing without dropout."""
        if not self._has_dropout:
            return []
        # A mask depends on the sample's place in the mini-batch, not on how that is cut.
        samples = np.array_split(np.arange(batch_size), pieces or self.schedule.num_micro_batches)
        return [(step_key(self.seed, step), piece) for piece in samples]

    def _reported(
        self, loss: Any, x: Any, y: Any, prediction: Any, sample_weight: Any
    ) -> dict[str, Any]:
        self._loss_tracker.update_state(loss, sample_weight=len(x))
        if self._compile_metrics is not None and not self._compile_metrics.built:
            self._compile_metrics.build(y, prediction)
            # of metrics that another model has used; Keras does so while it builds
            self._compile_metrics.reset_state()
        return dict(self.compute_metrics(x, y, prediction, sample_weight))
