"""What the harness asks of an implementation: `build_engine(config) -> Engine` in its `engine.py`.

An engine holds some of the pipeline's devices: all of them where stages are threads (PyTorch and
TensorFlow with one replica on one host), one where a stage is a process (Paddle, and everybody with
replicas or over hosts). Where a run has several engines, in processes or, for PyTorch's shards, in
threads of one, all call the same methods in the same order, and each reads the whole mini-batch: a
replica takes its own micro-batches of it (`Batch.share`), divides by the tokens of all and numbers
samples over all, so that gradients are simply added up over the replicas.

One training step is `forward_backward`, then `apply_gradients`. The rest reads, replaces or checks:

    training       reset, forward_backward, apply_gradients, evaluate
    checkpoints    weights, optimizer_state, load_optimizer_state
    inference      predict, decode
    parity         unit_outputs, probe_units, gradients, set_gradients
    measurement    events, environment, peak_memory_bytes, held_bytes_peak, in_flight_peak

Tensors come and go as NumPy arrays of `TrainSpec.master_dtype` with canonical names and shapes
(`common.spec.parameters`); every dictionary covers the devices that the engine holds.

Letters in shapes: B samples, S positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from common.runtime.decode import Feed
from common.runtime.executor import Event
from common.schedule.action import Action
from common.spec.data import Batch
from common.spec.parameters import TensorKey

Arrays = dict[str, NDArray[Any]]


class Engine(Protocol):
    """One model, cut over devices, with its optimizer, in one framework."""

    devices: tuple[int, ...]
    """The pipeline devices whose stages live in this process."""
    on_action: Callable[[int, Action | None], None]
    """Called with the device ahead of each of its actions, and with None after the last, in the
    device's own thread or process. The harness sets it to watch progress and to inject faults. If
    it raises, the action fails. A framework's own pipeline (`native`) does not call it."""

    # Training.

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Start over from `weights` (those of all stages), with zeroed moments and gradients."""

    def forward_backward(self, batch: Batch) -> float:
        """Run the schedule over a mini-batch, replacing gradients; return the mean token loss."""

    def apply_gradients(self, step: int) -> float:
        """Clip by the norm over all stages, do one optimizer step (from 0), return that norm."""

    def evaluate(self, batch: Batch) -> float:
        """Return the mean loss per token without dropout; change neither weights nor gradients."""

    # Parity: one unit or one tensor at a time, beside the oracle's.

    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        """Return the output of every unit for every micro-batch, (B, S, D), of the head (B, S, V).

        Replica r's micro-batches are those from r x m on, of all that the mini-batch is cut into.

        Keys are (step, "forward", stage, micro-batch, unit, "output").
        """

    def probe_units(
        self,
        batch: Batch,
        inputs: Mapping[str, NDArray[Any]],
        output_gradients: Mapping[str, NDArray[Any]],
    ) -> dict[TensorKey, NDArray[Any]]:
        """Run every unit by itself on given tensors, so that no unit's error reaches another.

        `inputs` (B, S, D) by unit (none for the embedding, which takes the batch's tokens) and
        `output_gradients` (B, S, D), for the head (B, S, V), are of the whole mini-batch. Dropout
        is that of a training step. The result has, per micro-batch i and then summed over all of
        them in order (the embedding has no input gradient):

            (step, "unit_forward", stage, i, unit, "output")
            (step, "unit_backward", stage, i, unit, "input_gradient")
            (step, "unit_backward", stage, -1, unit, <canonical name of a parameter>)

        A tied head's share of the token embedding's gradient is under the unit "head".
        Weights, optimizer state and gradients stay as they are.
        """

    # Inference.

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Return logits (B, S, V) for tokens (B, S), without dropout, as float32 or float64.

        They go through the pipeline in micro-batches. B is at least the number of micro-batches and
        may differ from the training batch; S is at most `context_length`. Every process gets all.
        """

    def decode(self, feed: Feed) -> None:
        """Let groups of sequences grow until `feed` has ended all of them, with a cache of keys and
        values on every stage.

        There are as many groups as micro-batches. Where stages are processes, `feed` is called in
        that of the embedding alone.
        """

    # What checkpoints hold, and gradients for the parity tests.

    def optimizer_state(self) -> Arrays:
        """Return the moments: "first_moment/<name>" and, for AdamW, "second_moment/<name>".

        SGD's momentum is the first moment; without momentum none. Before the first step they are 0.
        """

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        """Continue after `steps_done` steps that left `state`, which is of all devices.

        The next call is `apply_gradients(steps_done)`. Then every bit is an uninterrupted run's.
        """

    def weights(self) -> Arrays: ...

    def gradients(self) -> Arrays:
        """Return the gradients before clipping; a tied weight's is the sum over its uses."""

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        """Replace the gradients, to test one optimizer step from the same gradient everywhere."""

    # Measurement.

    def events(self) -> dict[int, list[Event]]:
        """Return what the last `forward_backward` did, per device."""

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values`, place by place, over all processes of the run; every one
        calls it, with as many. Alone: `values` themselves.
        """

    def environment(self) -> dict[str, Any]:
        """Return versions, devices, threads and flags, as the framework itself reports them."""

    def peak_memory_bytes(self) -> dict[int, int]:
        """Return peak memory: CUDA's allocator by device, or the resident size of the process."""

    def held_bytes_peak(self) -> dict[int, int]:
        """Return, per device, the most bytes of activations that it held for its backwards.

        Counted by tensors and not by the allocator, after every action: what autograd has saved
        and, where B and W are separate, what W waits with. Memory that several tensors share counts
        once; weights and the mini-batch itself do not count. Empty with `executor = native`.
        """

    def in_flight_peak(self) -> dict[int, int]:
        """Return, per device, the most forwards that waited for their B (or BW); empty as above."""

    def close(self) -> None: ...
