"""A Keras model that trains as a pipeline: `GPipeModel(layers, num_stages=4, num_micro_batches=8)`.

    model = GPipeModel([Dense(256, "relu"), Dense(256, "relu"), Dense(10)], num_stages=3, num_micro_batches=4)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(dataset, validation_data=held_out, epochs=3)

It is the synchronous pipeline of GPipe (Huang et al. 2019), with any schedule: the same weights as training the layers
on one device, because a mini-batch's gradients are added up over its micro-batches before the optimizer sees them.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np
import tensorflow as tf

from common.dropout import step_key
from common.partition import even_boundaries
from common.reference import clip_scale, global_norm
from common.runtime.executor import Event, run_stage, unwatched
from common.schedule.action import Action, Schedule
from common.schedule.generators import make_schedule
from common.schedule.recompute import WORDS, is_known, recomputes
from common.spec import TransformerSpec
from common.weights import unit_names
from tf_impl import devices
from tf_impl.cut import RECOMPUTED_EFFECT
from tf_impl.effects import mask_of, with_mask
from tf_impl.layers import Embedding, build_unit
from tf_impl.optimizer import StageOptimizer, check_optimizer
from tf_impl.stage import Channel, Chunk, ForwardOnly, Stage, apply_layer, concatenated

Result = TypeVar("Result")


class Loss(NamedTuple):
    """A Keras loss before its reduction."""

    per_element: Callable[[Any, Any], tf.Tensor]
    is_mean: bool
    """Whether Keras takes the mean of the elements; else their sum."""
    ignored: int | None
    """A label whose elements do not count (Keras' `ignore_class`)."""


class GPipeModel(keras.Model):
    """A row of Keras layers, or the Transformer of a `TransformerSpec`, cut over several devices.

    `partition` gives the first layer of every virtual stage after the first; "even" spreads the layers evenly.
    `schedule` is a name (gpipe, 1f1b, ...), `file:PATH`, or a `Schedule`. `recompute`: what the backward
    computes again instead of holding it (`common.schedule.recompute`; GPipe's choice is "full"). `dtype` and `seed` (of
    the dropout masks) are the Transformer's; ordinary layers have their own. One logical device per stage must exist
    (`tf_impl.devices.configure`).

    It gives what `keras.Sequential` gives with the same weights: masks, regularizers and `add_loss` included. What a
    layer adds with `add_loss` is taken for a mean over samples, as Keras' activity regularizers are: a micro-batch's
    counts by its part of the mini-batch (so a sum over samples counts for less than in Keras). Two things are each
    micro-batch's own: random numbers, and what layers update in the forward, such as the averages of a
    BatchNormalization, which is done m times a step, each time from one micro-batch. `compile` (or `build`, if that
    comes later) warns once and names the layers.

    Raises ValueError for more stages than layers, a partition that does not fit, missing devices, a layer that already has
    weights (they would be on the wrong device), comes twice or is stateful; ScheduleError for a schedule that cannot be
    made. `build` does for a device that would hand on integers or several tensors, for a `tf.py_function` that has to be
    differentiated, and for `recompute` where a layer calls Python or draws numbers without a Keras seed.
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
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, **({"dtype": dtype} if isinstance(layers, TransformerSpec) else {}))
        self.spec = layers if isinstance(layers, TransformerSpec) else None
        self.seed = seed
        if isinstance(layers, TransformerSpec):
            self.units = [build_unit(layers, unit, dtype) for unit in unit_names(layers)]
        else:
            self.units = list(layers)
            _check_layers(self.units)
        if isinstance(schedule, str):
            schedule = make_schedule(schedule, num_stages, num_micro_batches, num_chunks)
        self.schedule = schedule
        if not is_known(recompute):
            raise ValueError(f"recompute {recompute!r}; right would be one of {WORDS}")
        self.recompute = recompute
        edges = _edges(self.spec, len(self.units), schedule.num_virtual_stages, partition)
        names = devices.stage_devices(num_stages, device)
        strategies = devices.stage_strategies(names)
        self.chunks = [
            Chunk(
                self.units[edges[k] : edges[k + 1]],
                strategies[schedule.location[k][0]],
                is_first=k == 0,
                is_last=k == schedule.num_virtual_stages - 1,
            )
            for k in range(schedule.num_virtual_stages)
        ]
        self.stages = [
            Stage([self.chunks[schedule.virtual_stage(d, c)] for c in range(schedule.num_chunks)], self._recomputes)
            for d in range(num_stages)
        ]
        self.stage_devices = names
        self.events: dict[int, list[Event]] = {}
        """What the last `forward_backward` did, per device."""
        self.on_action: Callable[[int, Action | None], None] = unwatched
        """Called with the device ahead of every action, and with None after the last, on the stage's thread."""
        self._strategies = strategies
        self._threads = [ThreadPoolExecutor(1, f"stage-{d}") for d in range(num_stages)]
        self._optimizers: list[StageOptimizer] = []
        self._traced: dict[Any, tuple[list[Any], list[Any]]] = {}
        self._mask_parts: list[Any] = []
        """By chunk, where predictions have a mask: what computes it."""
        self._reports = False
        self._is_masked = False
        self._has_warned = False

    # ------------------------------------------------------------------------------------------- Keras' own methods

    def build(self, input_shape: Sequence[int | None], dtype: str | None = None) -> None:
        """Makes all weights, each on its stage's device. Called by the first step; needed before `load_weights`."""
        if dtype is None:
            dtype = "int32" if isinstance(self.units[0], Embedding | keras.layers.Embedding) else keras.config.floatx()
        x = keras.KerasTensor((None, *input_shape[1:]), dtype)
        for chunk, (d, _) in zip(self.chunks, self.schedule.location, strict=True):
            x = self.on_stage(d, functools.partial(chunk.build, x))
        self._is_masked = mask_of(x) is not None
        self._check_effects()
        if self._tied is not None:
            own, copy = self._tied
            copy.assign(own)
            self.cast_masters()

    def load_weights(self, *arguments: Any, **options: Any) -> None:
        """As `keras.Model.load_weights`."""
        super().load_weights(*arguments, **options)
        for chunk in self.chunks:
            for variable, master in zip(chunk.variables, chunk.masters, strict=True):
                if variable is not master:
                    master.assign(tf.cast(variable.value, tf.float32))

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adam",
        loss: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
    ) -> None:
        """As `keras.Model.compile`. Clipping by `global_clipnorm` is over all stages."""
        if loss is None:
            raise ValueError("compile needs a loss; right would be for example loss='mse'")
        self._loss = _unreduced(loss)
        self._reports = bool(metrics or weighted_metrics)
        # Eager, since the step is Python's: it starts functions that are already traced, from several threads.
        super().compile(
            optimizer=optimizer,
            loss=loss,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=True,
            jit_compile=False,
        )
        check_optimizer(self.optimizer)
        self._optimizers, self._traced = [], {}
        self._warn_of_states()

    def call(self, x: Any, training: bool = False) -> tf.Tensor:
        """The forward pass alone, stage after stage, without dropout."""
        if training:
            raise ValueError("a pipeline trains in forward_backward, not in call(training=True)")
        return self._evaluated(x)[0]

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        loss = self.forward_backward(x, y, sample_weight)
        self.apply_gradients()
        prediction = concatenated(self._collected_predictions()) if self._reports else None
        return self._update_metrics(loss, x, y, prediction, sample_weight)

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self._ensure_built(x)
        prediction, layer_losses = self._evaluated(x)
        loss = self.summed_loss(prediction, *_labels(y, sample_weight), *self._count(y, mask_of(prediction)))
        loss = math.fsum(float(value) for value in (loss, *layer_losses))
        return self._update_metrics(loss, x, y, prediction, sample_weight)

    def predict_step(self, data: Any) -> tf.Tensor:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        self._ensure_built(x)
        return self(x)

    # ------------------------------------------------------------------------------------------- one training step

    def forward_backward(self, x: Any, y: Any, sample_weight: Any = None, step: int | None = None) -> float:
        """Runs the schedule over a mini-batch, replacing the gradients. Returns the mini-batch's loss.

        `step` (default: the optimizer's) chooses the Transformer's dropout masks. Raises ValueError for a batch that
        does not divide into micro-batches, RuntimeError before `compile`, and a failed stage's StageFailure.
        """
        if not self.compiled:
            raise RuntimeError("the model has no optimizer and no loss yet; right would be compile(optimizer, loss)")
        m = self.schedule.num_micro_batches
        self._check_divides(len(x))
        self._ensure_built(x)
        labels = _labels(y, sample_weight)
        self._ensure_traced(x, labels)
        context = self.dropout_context(len(x), int(self.optimizer.iterations) if step is None else step)
        count = self._count(y, self._prediction_mask(x))

        def begin(d: int) -> Stage:
            stage = self.stages[d]
            for chunk in stage.chunks:
                chunk.clear_gradients()
            first, last = (any(getattr(c, end) for c in stage.chunks) for end in ("is_first", "is_last"))
            pieces = zip(*(tf.split(tf.convert_to_tensor(t), m) for t in labels), strict=True) if last else []
            stage.begin(
                tf.split(tf.convert_to_tensor(x), m) if first else [],
                [(*piece, *(tf.constant(n, tf.float64) for n in count)) for piece in pieces],
                [(tf.constant(key, tf.int64), tf.constant(samples)) for key, samples in context],
            )
            return stage

        self.events = self._run(self.schedule, begin)
        self._add_tied_gradients()
        losses = [*self.stages[self.schedule.location[-1][0]].losses.values()]
        return math.fsum(float(loss) for loss in itertools.chain(losses, *(s.layer_losses for s in self.stages)))

    def apply_gradients(self, step: int | None = None) -> float:
        """Clips over all stages, then one optimizer step (default: the next). Returns the norm before clipping."""
        self._ensure_optimizers()
        step = int(self.optimizer.iterations) if step is None else step
        self.optimizer.iterations.assign(step)
        rate = float(self.optimizer.learning_rate)
        norm, scales = 0.0, [1.0] * len(self.stages)
        if self.optimizer.global_clipnorm is not None:
            squares = self.on_all_stages(lambda d: self._optimizers[d].squared_norms())
            norm, scales = self._clip(squares)
        self.on_all_stages(lambda d: self._optimizers[d].step(step, rate, scales[d]))
        self.cast_masters()
        self.optimizer.iterations.assign(step + 1)
        return norm

    def reset_optimizer(self) -> None:
        """Forgets the optimizer's moments and steps."""
        self.optimizer.iterations.assign(0)
        for optimizer in self._optimizers:
            optimizer.reset()

    def cast_masters(self) -> None:
        """Gives the layers what they compute with, where that is less precise than what the optimizer updates."""
        if self.dtype_policy.name == "bfloat16":
            self.on_all_stages(lambda d: [chunk.cast_masters() for chunk in self.stages[d].chunks])

    def master_of(self, variable: keras.Variable) -> keras.Variable:
        """What the optimizer updates for a weight of a layer."""
        pairs = (pair for chunk in self.chunks for pair in zip(chunk.variables, chunk.masters, strict=True))
        return next(master for own, master in pairs if own is variable)

    def moments(self) -> dict[str, Callable[[keras.Variable], tf.Variable]]:
        """The optimizer's "first_moment" and "second_moment", as far as it has them: where that of a weight is."""
        self._ensure_optimizers()
        found: dict[str, dict[int, tf.Variable]] = {}
        for optimizer in self._optimizers:
            for name, of in optimizer.moments().items():
                found.setdefault(name, {}).update(of)
        return {name: lambda variable, of=of: of[id(variable)] for name, of in found.items()}

    def forward_only(self, x: Any) -> tf.Tensor:
        """The prediction without dropout, through the pipeline in micro-batches. Raises as `forward_backward`."""
        m = self.schedule.num_micro_batches
        self._check_divides(len(x))
        passes: dict[int, ForwardOnly] = {}

        def begin(d: int) -> ForwardOnly:
            chunks = self.stages[d].chunks
            passes[d] = ForwardOnly(chunks, tf.split(tf.convert_to_tensor(x), m) if chunks[0].is_first else [])
            return passes[d]

        self._run(self.schedule.only_forward(), begin)
        predictions = passes[self.schedule.location[-1][0]].predictions
        return concatenated([predictions[i] for i in range(m)])

    def summed_loss(self, prediction: tf.Tensor, y: tf.Tensor, *rest: tf.Tensor, pieces: int = 1) -> tf.Tensor:
        """What one of `pieces` equal parts of a mini-batch adds to its loss.

        Where Keras' loss is a mean, this is the sum over the part, divided by the count of the whole mini-batch: never a
        mean of means. `rest`: the sample weight, if there is one, and, where the loss ignores a label or the prediction
        has a mask, how many labels of the whole mini-batch count.
        """
        mask = mask_of(prediction)
        weight, count = (rest, ()) if self._loss.ignored is None and mask is None else (rest[:-1], rest[-1:])
        if prediction.dtype.size < tf.float32.size:
            prediction = tf.cast(prediction, tf.float32)
        values = self._loss.per_element(y, prediction)
        if weight:
            own = tf.cast(weight[0], values.dtype)
            values *= tf.reshape(own, (*own.shape, *[1] * (len(values.shape) - len(own.shape))))
        if mask is not None:
            own = tf.cast(mask, values.dtype)
            values *= tf.reshape(own, (*own.shape, *[1] * (len(values.shape) - len(own.shape))))
        total = tf.reduce_sum(values)
        if not self._loss.is_mean:
            return total
        return total / (tf.cast(count[0], values.dtype) if count else values.shape.num_elements() * pieces)

    def gradient_of(self, variable: keras.Variable) -> tf.Variable:
        """Where the gradients of a weight (its master) are added up."""
        return next(
            gradient
            for chunk in self.chunks
            for own, gradient in zip(chunk.masters, chunk.gradients, strict=True)
            if own is variable
        )

    def unit_outputs(self, x: Any, step: int, micro_batch: int) -> list[tf.Tensor]:
        """The output of every layer for one micro-batch, with the dropout of a training step (to compare them)."""
        m = self.schedule.num_micro_batches
        context = [
            tf.constant(value, tf.int64)
            for of_micro_batch in self.dropout_context(len(x) * m, step)[micro_batch : micro_batch + 1]
            for value in of_micro_batch
        ]
        outputs = []
        for chunk in self.chunks:
            with tf.device(chunk.device):
                for layer in chunk.layers:
                    x = apply_layer(
                        layer, with_mask(tf.identity(x), mask_of(x)), chunk._split(context)[1], training=True
                    )
                    outputs.append(x)
        return outputs

    def on_stage(self, d: int, work: Callable[[], Result]) -> Result:
        """Runs `work` on a stage's thread, where its device and its strategy may be entered.

        Not so on the caller's: `fit` calls `train_step` within Keras' own strategy.
        """
        return self._submit(d, work).result()

    def on_all_stages(self, work: Callable[[int], Result]) -> list[Result]:
        """Runs `work(device)` on the threads of all stages at once."""
        futures = [self._submit(d, functools.partial(work, d)) for d in range(len(self.stages))]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the stages' threads; the model can no longer train."""
        for thread in self._threads:
            thread.shutdown()

    # ------------------------------------------------------------------------------------------- inside

    def _run(self, schedule: Schedule, begin: Callable[[int], Any]) -> dict[int, list[Event]]:
        """Walks `schedule` on all stages, `begin(device)` first. Returns the events; raises the first stage's failure."""
        channel = Channel()

        def walk(d: int) -> list[Event]:
            def before(action: Action) -> None:
                channel.check()
                self.on_action(d, action)

            try:
                events = run_stage(schedule, d, begin(d), channel, before)
                self.on_action(d, None)
                return events
            except Exception as error:
                channel.stop(error)
                return []

        events = dict(enumerate(self.on_all_stages(walk)))
        if channel.failure is not None:
            raise channel.failure
        return events

    def _submit(self, d: int, work: Callable[[], Result]) -> Future[Result]:
        def on_device() -> Result:
            only_own_device = all(chunk.only_own_device for chunk in self.stages[d].chunks)
            with devices.stage_thread(self.stage_devices[d], only_own_device):
                return work()

        return self._threads[d].submit(on_device)

    @property
    def _tied(self) -> tuple[keras.Variable, keras.Variable] | None:
        """The token embedding and the tied head's copy of it: what the optimizer updates."""
        if self.spec is None or not self.spec.tied_head:
            return None
        return self.master_of(self.units[0].token), self.master_of(self.units[-1].token)

    def _add_tied_gradients(self) -> None:
        """The token embedding's gradient: that of its own use plus that of the head's copy, put in both."""
        if self._tied is not None:
            own, copy = (self.gradient_of(variable) for variable in self._tied)
            own.assign_add(copy)
            copy.assign(own)

    def _clip(self, squares: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
        """From each stage's squared norms: the norm over all stages, and what each multiplies its gradients by."""
        norm = global_norm([square for stage in squares for square in stage])
        return norm, [clip_scale(norm, self.optimizer.global_clipnorm)] * len(squares)

    def _make_optimizer(self, d: int) -> StageOptimizer:
        pairs = [p for chunk in self.stages[d].chunks for p in zip(chunk.masters, chunk.gradients, strict=True)]
        variables, gradients = [v for v, _ in pairs], [g for _, g in pairs]
        counted = [g for v, g in pairs if self._tied is None or v is not self._tied[1]]
        return StageOptimizer(self.optimizer, self._strategies[d], variables, gradients, counted)

    def _ensure_optimizers(self) -> None:
        if not self._optimizers:
            self._optimizers = self.on_all_stages(self._make_optimizer)

    def _ensure_built(self, x: Any) -> None:
        if not self.built:
            self.build(tuple(x.shape), keras.backend.standardize_dtype(x.dtype))

    def _ensure_traced(self, x: Any, labels: Sequence[Any]) -> None:
        """Traces and cuts every chunk, once for every shape of a batch."""
        m, specs = self.schedule.num_micro_batches, []
        for tensor in (x, *labels):
            shape = (len(tensor) // m, *tensor.shape[1:])
            specs.append(tf.TensorSpec(shape, tf.as_dtype(tensor.dtype)))
        key = tuple(specs)
        if key not in self._traced:
            received, traced = specs[:1], []
            specs += [tf.TensorSpec((), tf.float64)] if self._loss.ignored is not None or self._is_masked else []
            context = []
            if self._has_dropout:
                context = [tf.TensorSpec((), tf.int64), tf.TensorSpec((len(x) // m,), tf.int64)]
            for chunk, (d, _) in zip(self.chunks, self.schedule.location, strict=True):
                extra = [*(specs[1:] if chunk.is_last else []), *context]
                work = functools.partial(
                    chunk.trace, received, extra, self._micro_batch_loss, self._reports and chunk.is_last, 1 / m
                )
                traced.append(
                    {
                        again: self.on_stage(d, functools.partial(work, self._recomputed_layers if again else None))
                        for again in {self._recomputes(i) for i in range(m)}
                    }
                )
                received = next(iter(traced[-1].values())).handed_on
            self._traced[key] = traced, self._parts_for_mask(traced) if self._is_masked else []
        traced, self._mask_parts = self._traced[key]
        for chunk, functions in zip(self.chunks, traced, strict=True):
            chunk.functions = functions

    def _parts_for_mask(self, traced: Sequence[dict[bool, Any]]) -> list[tuple[Any, list[bool]]]:
        """By chunk: a function for what of its output the predictions' mask depends on, and of its input it takes.

        Where a mask depends on nothing but the tokens, as that of an Embedding, nothing else is computed.
        """
        parts, wanted = [], [False, True]
        for (d, _), functions in reversed(list(zip(self.schedule.location, traced, strict=True))):
            part = next(iter(functions.values())).forward_part
            function, wanted = self.on_stage(d, functools.partial(part, wanted))
            parts.insert(0, (function, wanted))
        return parts

    def _prediction_mask(self, x: Any) -> np.ndarray | None:
        """That of the whole mini-batch: its loss is a mean over what counts, known before the first backward."""
        if not self._is_masked:
            return None
        masks, takes_x = [], self._mask_parts[0][1][0]
        for piece in tf.split(tf.convert_to_tensor(x), self.schedule.num_micro_batches):
            handed = [piece] if takes_x else []
            for (d, _), (function, _) in zip(self.schedule.location, self._mask_parts, strict=True):
                handed = self.on_stage(d, lambda f=function, given=handed: f(*(tf.identity(t) for t in given)))
            masks.append(handed[0].numpy())
        return np.concatenate(masks)

    def _evaluated(self, x: Any) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The prediction, and what the layers add to its loss."""
        mask, losses = mask_of(x), []
        for chunk in self.chunks:
            with tf.device(chunk.device):
                x, mask, found = chunk.evaluate(*(t if t is None else tf.identity(t) for t in (x, mask)))
            losses += [] if found is None else [found]
        return with_mask(x, mask), losses

    def _check_effects(self) -> None:
        """Raises ValueError for layers that cannot run as often as a micro-batch asks; warns of those with a state."""
        for layer, effects in (found for chunk in self.chunks for found in chunk.effects):
            if effects.differentiates_python and self.schedule.num_micro_batches > 1:
                raise ValueError(
                    f"layer {layer.name}: TensorFlow keeps what the gradient of a tf.py_function needs of one call only; "
                    "expected one micro-batch, or tf.numpy_function in a tf.custom_gradient"
                )
            if self.recompute != "none" and not effects.is_undone:
                raise ValueError(f"layer {layer.name}: {RECOMPUTED_EFFECT}")
        self._warn_of_states()

    def _warn_of_states(self) -> None:
        """Names, once, the layers that update variables in the forward: they do so with every micro-batch."""
        names = [name for chunk in self.chunks for _, effects in chunk.effects for name in effects.changed]
        m = self.schedule.num_micro_batches
        if names and m > 1 and self.compiled and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{', '.join(dict.fromkeys(names))}: updated with every micro-batch, so {m} times a step, each time from "
                "that micro-batch alone; keras.Sequential does so once, from the whole mini-batch",
                stacklevel=2,
            )

    def _recomputes(self, micro_batch: int) -> bool:
        return recomputes(self.recompute, micro_batch, self.schedule.num_micro_batches)

    @property
    def _recomputed_layers(self) -> int:
        """In a piece; 0 for the whole chunk."""
        return int(self.recompute.removeprefix("every-")) if self.recompute.startswith("every-") else 0

    @property
    def _has_dropout(self) -> bool:
        return self.spec is not None and self.spec.dropout > 0

    def _micro_batch_loss(self, prediction: tf.Tensor, *labels: tf.Tensor) -> tf.Tensor:
        return self.summed_loss(prediction, *labels, pieces=self.schedule.num_micro_batches)

    def _check_divides(self, batch_size: int) -> None:
        m = self.schedule.num_micro_batches
        if batch_size % m:
            raise ValueError(
                f"a batch of {batch_size} samples cannot be cut into {m} equal micro-batches; right would be a multiple of "
                f"{m} (drop_remainder=True where a data set is batched)"
            )

    def _count(self, y: Any, mask: Any = None) -> list[int]:
        """How many labels count, where the loss ignores some or a mask does; at least 1, so that a loss over none is 0."""
        if self._loss.ignored is None and mask is None:
            return []
        counted = np.ones_like(y, bool) if self._loss.ignored is None else np.asarray(y) != self._loss.ignored
        if mask is not None:
            mask = np.asarray(mask, bool)
            counted = mask if self._loss.ignored is None else mask & counted.reshape(mask.shape)
        return [max(1, np.count_nonzero(counted))]

    def dropout_context(self, batch_size: int, step: int) -> list[tuple[int, np.ndarray]]:
        """Key and sample indices of every micro-batch; nothing without dropout."""
        if not self._has_dropout:
            return []
        samples = np.split(np.arange(batch_size), self.schedule.num_micro_batches)
        return [(step_key(self.seed, step), piece) for piece in samples]

    def _collected_predictions(self) -> list[tf.Tensor]:
        predictions = self.stages[self.schedule.location[-1][0]].predictions
        return [predictions[i] for i in range(self.schedule.num_micro_batches)]

    def _update_metrics(self, loss: Any, x: Any, y: Any, prediction: Any, sample_weight: Any) -> dict[str, Any]:
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=len(x))
            else:
                metric.update_state(y, prediction, sample_weight=sample_weight)
        return self.get_metrics_result()


def _labels(y: Any, sample_weight: Any) -> list[Any]:
    return [y] if sample_weight is None else [y, sample_weight]


def _unreduced(loss: Any) -> Loss:
    found = keras.losses.get(loss)
    if not isinstance(found, keras.losses.Loss):
        return Loss(found, True, None)
    if found.reduction not in ("sum_over_batch_size", "mean", "sum"):
        raise ValueError(
            f"loss reduction {found.reduction!r} is not supported; right would be sum_over_batch_size or sum"
        )
    return Loss(found.call, found.reduction != "sum", getattr(found, "ignore_class", None))


def _check_layers(layers: Sequence[keras.layers.Layer]) -> None:
    for i, layer in enumerate(layers):
        if layer.weights:
            raise ValueError(f"layer {i} ({layer.name}) already has weights; right would be a new layer, not built yet")
        if any(layer is other for other in layers[:i]):
            raise ValueError(f"layer {i} ({layer.name}) comes twice; right would be two layers")
        if any(getattr(inner, "stateful", False) for inner in layer._flatten_layers()):
            raise ValueError(
                f"layer {i} ({layer.name}) is stateful, so a micro-batch would begin where other samples ended; expected "
                "stateful=False"
            )


def _edges(spec: TransformerSpec | None, num_layers: int, parts: int, partition: str | Sequence[int]) -> list[int]:
    """The first layer of every virtual stage, and the number of layers."""
    if parts > num_layers:
        raise ValueError(f"{parts} virtual stages for {num_layers} layers; right would be at most {num_layers}")
    if isinstance(partition, str):
        if partition != "even":
            raise ValueError(f"partition {partition!r}; right would be 'even' or boundaries such as [2, 5]")
        inner = even_boundaries(spec.num_layers, parts) if spec else [k * num_layers // parts for k in range(1, parts)]
    else:
        inner = list(partition)
    edges = [0, *inner, num_layers]
    if len(inner) != parts - 1 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"partition {inner} needs {parts - 1} increasing boundaries between 1 and {num_layers - 1}")
    return edges
