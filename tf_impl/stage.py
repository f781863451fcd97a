"""One device's part of the pipeline: `Stage` computes, `Channel` hands tensors from device to device.

A stage calls the functions that `cut` made of its graph. Between the calls it holds what they pass on:

    forward(i)          saved tensors of micro-batch i; what    dropped by backward or backward_input
                        pieces start from, where B recomputes
    backward_input(i)   what W needs of them, and of B          dropped by backward_weight
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from common.runtime.executor import Message
from common.runtime.held import HeldActivations
from tf_impl.cut import StageFunctions, cut_stage
from tf_impl.devices import on_one_thread
from tf_impl.dropout import DropoutContext
from tf_impl.layers import Unit

SummedLoss = Callable[..., tf.Tensor]
"""(prediction, *labels) -> what a micro-batch adds to the mini-batch's loss."""


def apply_layer(layer: keras.layers.Layer, x: tf.Tensor, context: DropoutContext | None, training: bool) -> tf.Tensor:
    """Calls a unit of the Transformer with its dropout context, any other Keras layer with `training`."""
    return layer(x, context=context) if isinstance(layer, Unit) else layer(x, training=training)


def master_of(variable: keras.Variable) -> keras.Variable:
    """A float32 variable of the same values for one in bfloat16, else the variable itself."""
    if variable.dtype != "bfloat16":
        return variable
    return keras.Variable(tf.cast(variable.value, tf.float32), dtype="float32", name=variable.name)


class Chunk:
    """Consecutive layers of the model on one device, with the sums of their gradients: a virtual stage."""

    def __init__(
        self, layers: Sequence[keras.layers.Layer], strategy: tf.distribute.Strategy, is_first: bool, is_last: bool
    ) -> None:
        self.layers, self.strategy, self.is_first, self.is_last = list(layers), strategy, is_first, is_last
        self.device: str = strategy.extended.worker_devices[0]
        self.variables: list[keras.Variable] = []
        """What the layers compute with."""
        self.masters: list[keras.Variable] = []
        """What the optimizer updates: the same, or where units compute in bfloat16, float32 (Micikevicius et al. 2018)."""
        self.gradients: list[tf.Variable] = []
        self.functions: dict[bool, StageFunctions]
        """By whether B computes the forward again."""
        self.only_own_device = True
        """Whether all variables lie here. The seed of a Keras Dropout does not: it is made along with the layer."""
        self.evaluate = tf.function(self._evaluate, autograph=False)
        # One call instead of two operations a weight: at the start of a step all stages do this at once, and operations
        # called one by one make their threads pass Python's lock to and fro (4 ms alone, 10 to 20 ms for two stages).
        self._clear = tf.function(self._clear_gradients, autograph=False)
        self._cast = tf.function(self._cast_masters, autograph=False)

    def build(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Makes the weights, on the chunk's device, for an input like `x`. Returns what the output is like."""
        with self.strategy.scope():
            for layer in self.layers:
                x = layer(x)
        self.variables = [variable for layer in self.layers for variable in layer.trainable_variables]
        units = {
            id(variable) for layer in self.layers if isinstance(layer, Unit) for variable in layer.trainable_variables
        }
        with self.strategy.scope():
            self.masters = [master_of(variable) if id(variable) in units else variable for variable in self.variables]
        with tf.device(self.device):
            zeros = [tf.zeros(v.shape, v.dtype) for v in self.masters]
            self.gradients = [tf.Variable(zero, trainable=False, name="gradient") for zero in zeros]
        return x

    def trace(
        self, signature: Sequence[tf.TensorSpec], loss: SummedLoss, reports: bool, recomputed: int | None = None
    ) -> StageFunctions:
        """The chunk's functions for (x, *labels, *dropout context). `reports`: the last one also gives its prediction.

        `recomputed`: layers in each piece that B computes again, 0 for all of them, None for no recomputation.
        """
        first = self.layers[0] if self.is_first else None
        size = recomputed or len(self.layers)
        pieces = [self.layers[i : i + size] for i in range(0, len(self.layers), size)]

        def run_first(x: tf.Tensor, *extra: tf.Tensor) -> tf.Tensor:
            return apply_layer(first, x, self._split(extra)[1], training=True)

        def run_piece(
            piece: Sequence[keras.layers.Layer], x: tf.Tensor, *extra: tf.Tensor
        ) -> tuple[tf.Tensor, list[tf.Tensor]]:
            labels, context = self._split(extra)
            for layer in piece:
                if layer is not first:
                    x = apply_layer(layer, x, context, training=True)
            has_loss = self.is_last and piece is pieces[-1]
            return (loss(x, *labels), [x] if reports else []) if has_loss else (x, [])

        def cut() -> StageFunctions:
            variables = [self.local(variable) for variable in self.variables]
            return cut_stage(
                run_first if self.is_first else None,
                [functools.partial(run_piece, piece) for piece in pieces],
                variables,
                self.gradients,
                signature,
                self.device,
                self.is_last,
                recomputed is not None,
            )

        with self.strategy.scope():
            functions = cut()
        captured = [outer.device.split("device:")[-1] for outer, _ in functions.forward.graph.captures]
        self.only_own_device = all(device == self.device.split("device:")[-1] for device in captured)
        return functions.on_calling_thread() if on_one_thread(self.device, self.only_own_device) else functions

    def local(self, variable: keras.Variable) -> tf.Variable:
        """The variable on this chunk's device."""
        return self.strategy.experimental_local_results(variable.value)[0]

    def clear_gradients(self) -> None:
        with tf.device(self.device):
            self._clear()

    def cast_masters(self) -> None:
        """Makes what the layers compute with from the masters, once for all micro-batches of a step."""
        if self._copies:
            with tf.device(self.device):
                self._cast()

    @property
    def _copies(self) -> list[tuple[tf.Variable, tf.Variable]]:
        pairs = zip(self.variables, self.masters, strict=True)
        return [(self.local(own), self.local(master)) for own, master in pairs if own is not master]

    def _cast_masters(self) -> None:
        for own, master in self._copies:
            own.assign(tf.cast(master, own.dtype), read_value=False)

    def _split(self, extra: Sequence[tf.Tensor]) -> tuple[Sequence[tf.Tensor], DropoutContext | None]:
        """Labels and dropout context."""
        with_dropout = any(isinstance(layer, Unit) and layer.spec.dropout > 0 for layer in self.layers)
        return (extra[:-2], DropoutContext(*extra[-2:])) if with_dropout else (extra, None)

    def _clear_gradients(self) -> None:
        for gradient in self.gradients:
            gradient.assign(tf.zeros(gradient.shape, gradient.dtype), read_value=False)

    def _evaluate(self, x: tf.Tensor) -> tf.Tensor:
        """The chunk without dropout, for any batch size."""
        with tf.device(self.device):
            for layer in self.layers:
                x = apply_layer(layer, x, None, training=False)
        return x


class Stage:
    """The chunks of one device, as `common.runtime.executor.run_stage` drives them."""

    def __init__(self, chunks: Sequence[Chunk], recomputes: Callable[[int], bool]) -> None:
        """`recomputes(micro_batch)`: whether its B computes its forward again."""
        self.chunks = chunks
        self.held = HeldActivations(len(chunks), recomputes)
        self._recomputes = recomputes
        self.begin([], [], [])

    def begin(
        self,
        inputs: Sequence[tf.Tensor],
        labels: Sequence[Sequence[tf.Tensor]],
        contexts: Sequence[Sequence[tf.Tensor]],
    ) -> None:
        """Takes the micro-batches of a step: their inputs (first stage), labels (last) and dropout contexts."""
        self._inputs, self._labels, self._contexts = inputs, labels, contexts
        self._saved: dict[tuple[int, int], list[tf.Tensor]] = {}
        self._waiting: dict[tuple[int, int], list[tf.Tensor]] = {}
        self.losses: dict[int, tf.Tensor] = {}
        self.predictions: dict[int, tf.Tensor] = {}

    def forward(self, micro_batch: int, chunk: int, x: tf.Tensor | None) -> tf.Tensor | None:
        part, functions = self.chunks[chunk], self._functions(micro_batch, chunk)
        arguments = [self._inputs[micro_batch] if x is None else x]
        if part.is_last:
            arguments += self._labels[micro_batch]
        if self._contexts:
            arguments += self._contexts[micro_batch]
        y, *results = functions.forward(*arguments)
        reported = functions.num_reported
        self._saved[micro_batch, chunk] = results[reported:]
        self.held.bytes_of(micro_batch)[chunk] = functions.saved_bytes
        self.held.note(self._saved, self._waiting)
        if not part.is_last:
            return y
        self.losses[micro_batch] = y
        if reported:
            self.predictions[micro_batch] = results[0]
        return None

    def backward(self, micro_batch: int, chunk: int, gradient: tf.Tensor | None) -> tf.Tensor | None:
        saved = self._saved.pop((micro_batch, chunk))
        found = self._functions(micro_batch, chunk).backward(*_given(gradient), *saved)
        return found[0] if found else None

    def backward_input(self, micro_batch: int, chunk: int, gradient: tf.Tensor | None) -> tf.Tensor | None:
        part, saved = self.chunks[chunk], self._saved.pop((micro_batch, chunk))
        functions = self._functions(micro_batch, chunk)
        found = functions.backward_input(*_given(gradient), *(saved[i] for i in functions.saved_for_input))
        if not part.is_first:
            input_gradient, *found = found
        self._waiting[micro_batch, chunk] = [*(saved[i] for i in functions.saved_for_weight), *found]
        self.held.waiting_bytes_of(micro_batch)[chunk] = functions.waiting_bytes
        self.held.note(self._saved, self._waiting)
        return None if part.is_first else input_gradient

    def backward_weight(self, micro_batch: int, chunk: int) -> None:
        self._functions(micro_batch, chunk).backward_weight(*self._waiting.pop((micro_batch, chunk)))

    def _functions(self, micro_batch: int, chunk: int) -> StageFunctions:
        return self.chunks[chunk].functions[self._recomputes(micro_batch)]


class ForwardOnly:
    """A pass that only predicts: the forward half of `common.runtime.executor.Stage`, without dropout."""

    def __init__(self, chunks: Sequence[Chunk], inputs: Sequence[tf.Tensor]) -> None:
        """`inputs` are the micro-batches of the mini-batch, on the first stage."""
        self.chunks = chunks
        self._inputs = inputs
        self.predictions: dict[int, tf.Tensor] = {}

    def forward(self, micro_batch: int, chunk: int, x: tf.Tensor | None) -> tf.Tensor | None:
        part = self.chunks[chunk]
        y = part.evaluate(self._inputs[micro_batch] if x is None else x)
        if not part.is_last:
            return y
        self.predictions[micro_batch] = y
        return None


def _given(gradient: tf.Tensor | None) -> tuple[tf.Tensor, ...]:
    return () if gradient is None else (gradient,)


class PipelineStopped(RuntimeError):
    """Another stage has failed, so what this one waits for will never come."""


class Channel:
    """Hands tensors between the threads of one process; made anew for every pass.

    A tensor moves to its receiver's device in `receive`, on the receiver's thread. Sends never wait.
    """

    def __init__(self) -> None:
        self._mail: dict[Message, tf.Tensor] = {}
        self._changed = threading.Condition()
        self.failure: BaseException | None = None
        """Why the pass was stopped: the first error of any stage."""

    def send(self, message: Message, tensor: tf.Tensor, device: int) -> None:
        with self._changed:
            self._mail[message] = tensor
            self._changed.notify_all()

    def receive(self, message: Message, device: int) -> tf.Tensor:
        """Raises PipelineStopped if a stage fails before the tensor is there."""
        with self._changed:
            self._changed.wait_for(lambda: message in self._mail or self.failure)
            self.check()
            tensor = self._mail.pop(message)
        return tf.identity(tensor)  # on the thread's own device

    def check(self) -> None:
        """Raises PipelineStopped once a stage has failed."""
        if self.failure is not None:
            raise PipelineStopped("another stage failed")

    def stop(self, failure: BaseException) -> None:
        """Ends the pass for all stages; the first failure is kept."""
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()
