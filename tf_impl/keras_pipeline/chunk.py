"""A virtual stage of any Keras layers: weights, gradients, and functions cut from their graph."""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from common.schedule.action import Op
from tf_impl.cut_graphs.functions import StageFunctions, cut_stage
from tf_impl.dropout import DropoutContext
from tf_impl.effects import (
    Effects,
    custom_gradients,
    effects_of,
    forget_gradients,
    mask_of,
    with_mask,
)
from tf_impl.executors import on_one_thread
from tf_impl.keras_pipeline.layer_losses import (
    Kind,
    kinds_of_losses,
    losses_of,
    num_regularized,
    shared,
    total,
)
from tf_impl.layers import Unit

SummedLoss = Callable[..., tf.Tensor]
"""(prediction, *labels) -> what a micro-batch adds to the mini-batch's loss."""


def apply_layer(
    layer: keras.layers.Layer, x: tf.Tensor, context: DropoutContext | None, training: bool
) -> tf.Tensor:
    """Call a Transformer's unit with its dropout context, any other layer with `training`."""
    return layer(x, context=context) if isinstance(layer, Unit) else layer(x, training=training)


def master_of(variable: keras.Variable) -> keras.Variable:
    """Return a float32 variable of the same values for one in bfloat16, else itself."""
    if variable.dtype != "bfloat16":
        return variable
    return keras.Variable(tf.cast(variable.value, tf.float32), dtype="float32", name=variable.name)


class Weight(NamedTuple):
    """A trainable weight of a chunk, on the chunk's device."""

    variable: keras.Variable
    """What the layers compute with."""
    master: keras.Variable
    """What the optimizer updates: the same, or float32 for bfloat16 (Micikevicius et al. 2018)."""
    gradient: tf.Variable
    """The sum over the micro-batches, like the master."""


def _move_here(layer: keras.layers.Layer) -> None:
    """Puts the weights that the layer has already on the device of the strategy entered now."""
    for variable in layer.weights:
        # Keras makes the variable anew, in the scope of the strategy that is entered now.
        variable._initialize(variable.numpy())
    for inner in layer._flatten_layers():
        if isinstance(inner, keras.Model):  # traced with the weights where they were
            inner.train_function = inner.test_function = inner.predict_function = None


class Chunk:
    """A virtual stage: consecutive layers on one device, with the sums of their gradients.

    Its life, for layers [Embedding, Dropout, Dense] on the first device:

        build       makes the weights there, and looks at what each layer does besides computing
        trace       one graph of all three; the Embedding is `first`, since tokens have no gradient
        functions   forward, backward ... of that graph, which `Stage` calls with tensors
        updated     the weights, with where their gradients were added up, for the optimizer
    """

    def __init__(
        self,
        layers: Sequence[keras.layers.Layer],
        strategy: tf.distribute.Strategy,
        is_first: bool,
        is_last: bool,
        ops: Collection[Op],
        shards: Sequence[tf.distribute.Strategy] = (),
        vocab_parallel: bool = False,
    ) -> None:
        """`ops` are those that its device's schedule has; `shards` the strategies of the devices
        that matrices are cut over, `strategy` first, nothing where they are whole.
        """
        self.shards, self.vocab_parallel = shards, vocab_parallel
        self.layers, self.strategy, self.ops = list(layers), strategy, ops
        self.is_first, self.is_last = is_first, is_last
        self.device: str = strategy.extended.worker_devices[0]
        self.weights: list[Weight] = []
        self.functions: Sequence[StageFunctions] = ()
        """By micro-batch; those of one size share theirs, unless one's B recomputes the forward."""
        self.num_first = 1
        """Layers up to the first floating output: a token or a category has no gradient."""
        self.effects: list[tuple[keras.layers.Layer, Effects]] = []
        """What the layers do besides computing their output; filled by `build`."""
        self.kinds: dict[int, Mapping[bool, list[Kind]]] = {}
        """How a layer's own losses go over micro-batches: by its identity and `training`."""
        self.only_own_device = not shards
        """Whether all variables lie here; a Keras Dropout's seed does not, made along with it."""
        self.evaluate = tf.function(self._evaluate, autograph=False)

    def build(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Make the weights on the chunk's device for an input like `x`; return one like the output.

        Raises ValueError for an output that cannot be handed on: several tensors, or integers,
        which have no gradient.
        """
        self.effects, self.kinds, floating = [], {}, []
        for layer in self.layers if self.shards else ():
            layer.split(self.shards, self.vocab_parallel)
        with self.strategy.scope():
            for layer in self.layers:
                if not isinstance(layer, Unit):
                    _move_here(layer)
                given, x = x, layer(x)  # a symbolic call: makes the weights, computes nothing
                floating.append(
                    isinstance(x, keras.KerasTensor) and tf.as_dtype(x.dtype).is_floating
                )
                # What a unit of the Transformer does is known: nothing but computing its output.
                if not isinstance(layer, Unit):
                    call = functools.partial(apply_layer, layer, context=None, training=True)
                    found = effects_of(layer, given, call)
                    if found is not None:
                        self.effects.append((layer, found))
                    if len(layer.losses) > num_regularized(layer):
                        self.kinds[id(layer)] = kinds_of_losses(layer, given, layer)
                    # Keras' own symbolic call does not see the mask of a nested model.
                    if found is not None and isinstance(x, keras.KerasTensor):
                        x._keras_mask = found.mask
        if not isinstance(x, keras.KerasTensor):
            raise ValueError(
                f"layer {self.layers[-1].name} is the last on its device and its output is a "
                f"{type(x).__name__}; expected one tensor"
            )
        if not self.is_last and not floating[-1]:
            raise ValueError(
                f"layer {self.layers[-1].name} is the last on its device and its output is "
                f"{x.dtype}, which has no gradient; expected a partition that puts the first layer "
                "with a floating output on the first device"
            )
        self.num_first = floating.index(True) + 1 if True in floating else len(floating)
        self.collect_variables()
        return x

    def collect_variables(self) -> None:
        """Take the weights trainable now. Those that were before keep masters and gradients."""
        # Layers may have been frozen or unfrozen since; those that stay keep what they have.
        known = {id(weight.variable): weight for weight in self.weights}
        units = {
            id(v)
            for layer in self.layers
            if isinstance(layer, Unit)
            for v in layer.trainable_variables
        }
        # One that several layers share counts once.
        trainable = {id(v): v for layer in self.layers for v in layer.trainable_variables}
        for variable in trainable.values():
            if id(variable) not in known:
                own = self.local(variable)  # there, so that the optimizer puts its slots there, too
                with variable.value.distribute_strategy.scope():
                    master = master_of(variable) if id(variable) in units else variable
                with tf.device(own.device):
                    zero = tf.zeros(master.shape, master.dtype)
                    gradient = tf.Variable(zero, trainable=False, name="gradient")
                known[id(variable)] = Weight(variable, master, gradient)
        self.weights = [known[key] for key in trainable]
        # One call instead of two operations a weight: at the start of a step all stages do this at
        # once, and operations called one by one make their threads pass Python's lock to and fro (4
        # ms alone, 10 to 20 ms for two stages).
        self._clear = tf.function(self._clear_gradients, autograph=False)
        self._cast = tf.function(self._cast_masters, autograph=False)

    def trace(
        self,
        received: Sequence[tf.TensorSpec],
        extra: Sequence[tf.TensorSpec],
        loss: SummedLoss,
        reports: bool,
        share: float,
        recomputed: int | None = None,
    ) -> StageFunctions:
        """Return the chunk's functions for (x or x and its mask, *labels, *dropout context).

        `reports`: the last one also gives its prediction. `share`: the micro-batch's part of the
        mini-batch, by which the layers' own losses count. `recomputed`: layers in each piece that B
        computes again, 0 for all of them, None for no recomputation.
        """
        # For 7 layers with num_first = 1 and recomputed = 2 the edges are 0 2 4 6 7.
        first = self.layers[: self.num_first] if self.is_first else []
        edges = [0, len(self.layers)]
        if recomputed:
            edges[1:1] = range(max(recomputed, len(first)), len(self.layers), recomputed)
        pieces = [self.layers[a:b] for a, b in itertools.pairwise(edges)]
        states: dict[int, list[tuple[keras.Variable, tf.Tensor]]] = {}
        losses: list[tf.Tensor] = []

        def call(
            layer: keras.layers.Layer, x: tf.Tensor, context: DropoutContext | None
        ) -> tf.Tensor:
            """Apply a layer; in a recomputation with the states that it began with."""
            scope: Any = contextlib.nullcontext()
            if id(layer) in states:  # the second time
                read = [
                    (v, v.value) for v in layer.trainable_variables if v.regularizer is not None
                ]
                # It collects losses (True), makes no variables (False), and what is assigned in it
                # is forgotten. Regularizers read the weights through it.
                scope = keras.StatelessScope([*states[id(layer)], *read], True, False)
            elif recomputed is not None and layer.non_trainable_variables:
                states[id(layer)] = [
                    (v, tf.identity(v.value)) for v in layer.non_trainable_variables
                ]
            with scope:
                y = apply_layer(layer, x, context, training=True)
                losses.extend(self._losses(layer, True, share))
            return y

        def run_first(x: tf.Tensor, *extra: tf.Tensor) -> tf.Tensor:
            for layer in first:
                x = call(layer, x, self._split(extra)[1])
            return x

        def run_piece(
            piece: Sequence[keras.layers.Layer], x: tf.Tensor, *extra: tf.Tensor
        ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
            # received is (x,) or (x, its mask): a mask is an attribute of x only in Python.
            mask, extra = extra[: len(received) - 1], extra[len(received) - 1 :]
            labels, context = self._split(extra)
            if piece is pieces[0] and mask:
                x = with_mask(x, mask[0])
            for layer in piece[len(first) if piece is pieces[0] else 0 :]:
                x = call(layer, x, context)
            reported = {}
            if piece is pieces[-1] and mask_of(x) is not None:
                reported["mask"] = mask_of(x)
            if losses:  # those of this piece, and of `first` if it ran before it
                reported["layer_losses"] = total(losses)
                losses.clear()
            if piece is pieces[-1] and self.is_last:
                reported |= {"prediction": x} if reports else {}
                x = loss(x, *labels)
            return x, reported

        def cut() -> StageFunctions:
            variables = [self.local(weight.variable) for weight in self.weights]
            return cut_stage(
                run_first if self.is_first else None,
                [functools.partial(run_piece, piece) for piece in pieces],
                variables,
                [weight.gradient for weight in self.weights],
                [*received, *extra],
                self.device,
                self.is_last,
                self.ops,
                recomputed is not None,
                len(received),
            )

        with self.strategy.scope():  # a layer may ask for it, and reads its variables' own copies
            functions = cut()
        captured = [
            outer.device.split("device:")[-1] for outer, _ in functions.forward.graph.captures
        ]
        self.only_own_device = all(
            device == self.device.split("device:")[-1] for device in captured
        )
        if on_one_thread(self.device, self.only_own_device):
            return functions.on_calling_thread()
        return functions

    @property
    def adds_losses(self) -> bool:
        """Whether any layer adds to the loss, by its call or by its weights' regularizers."""
        return bool(self.kinds) or any(map(num_regularized, self.layers))

    def updated(self) -> list[Weight]:
        """Return the weights with a gradient: Keras leaves others alone, their decay too."""
        # A weight has a gradient if what adds weight gradients takes in its sum.
        adding = [functions.backward or functions.backward_weight for functions in self.functions]
        added = {id(tensor) for function in adding for tensor in function.captured_inputs}
        weights = self.weights
        return [w for w in weights if not self.functions or id(w.gradient.handle) in added]

    def local(self, variable: keras.Variable) -> tf.Variable:
        """Return the variable on this chunk's device."""
        return self.strategy.experimental_local_results(variable.value)[0]

    def clear_gradients(self) -> None:
        with tf.device(self.device):
            self._clear()

    def cast_masters(self) -> None:
        """Make what layers compute with from the masters, once for a step's micro-batches."""
        if self.copies:
            with tf.device(self.device):
                self._cast()

    @property
    def copies(self) -> list[Weight]:
        """Those that the layers have less precisely than the optimizer."""
        return [weight for weight in self.weights if weight.variable is not weight.master]

    def _cast_masters(self) -> None:
        for weight in self.copies:
            own, master = self.local(weight.variable), self.local(weight.master)
            with tf.device(own.device):
                own.assign(tf.cast(master, own.dtype), read_value=False)

    def _split(
        self, extra: Sequence[tf.Tensor]
    ) -> tuple[Sequence[tf.Tensor], DropoutContext | None]:
        """Labels and dropout context."""
        with_dropout = any(
            isinstance(layer, Unit) and layer.spec.dropout > 0 for layer in self.layers
        )
        return (extra[:-2], DropoutContext(*extra[-2:])) if with_dropout else (extra, None)

    def _clear_gradients(self) -> None:
        for _, _, gradient in self.weights:
            with tf.device(gradient.device):
                gradient.assign(tf.zeros(gradient.shape, gradient.dtype), read_value=False)

    def _losses(self, layer: keras.layers.Layer, training: bool, share: Any) -> list[tf.Tensor]:
        """What the layer's last call, of a part of a mini-batch, adds to the mini-batch's loss."""
        kinds = self.kinds.get(id(layer), {}).get(training, ())
        return [] if isinstance(layer, Unit) else shared(losses_of(layer), kinds, share)

    def _evaluate(
        self, x: tf.Tensor, mask: tf.Tensor | None, share: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor | None]:
        """The chunk without dropout, for any batch size: its output, that one's mask, and the
        layers' losses.

        `share`: the part of a mini-batch that `x` is, as in `trace`.
        """
        losses = []
        with tf.device(self.device):
            x = with_mask(x, mask)
            for layer in self.layers:
                x = apply_layer(layer, x, None, training=False)
                losses += self._losses(layer, False, share)
        # Not before: the caller of the model may differentiate it.
        weakref.finalize(self, forget_gradients, custom_gradients(tf.compat.v1.get_default_graph()))
        return x, mask_of(x), total(losses)


class ElsewhereFunctions(NamedTuple):
    """What stands for the functions of a chunk that another process has."""

    handed_on: tuple[tf.TensorSpec, ...]

    def made(self) -> dict[str, Any]:
        return {}


class Elsewhere(Chunk):
    """A chunk of a Transformer's units that another process has: it has no weights here, and what
    it hands on is known all the same.
    """

    def build(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Return what the output for an input like `x` is like."""
        shape = functools.reduce(
            lambda s, layer: layer.compute_output_shape(s), self.layers, x.shape
        )
        return keras.KerasTensor(shape, self.layers[-1].compute_dtype)

    def trace(self, received: Sequence[tf.TensorSpec], *_: Any, **__: Any) -> Any:
        """Return functions that nobody calls."""
        like = self.build(keras.KerasTensor(received[0].shape, received[0].dtype.name))
        return ElsewhereFunctions((tf.TensorSpec(like.shape, like.dtype),))
