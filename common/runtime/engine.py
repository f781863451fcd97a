"""What the harness asks of an implementation: `build_engine(config) -> Engine` in `<implementation>/engine.py`.

An engine holds some of the pipeline's devices: all of them where stages are threads (torch, TensorFlow), one where a stage
is a process (Paddle). Every dictionary of tensors it returns covers the devices that it holds, keyed by canonical names
with canonical shapes (`common.spec.parameters`), as NumPy arrays of `TrainSpec.master_dtype`. Where stages are processes, all ranks
call the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

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
    """Called with the device ahead of each of its actions, and with None after the last, in the device's own thread or
    process. The harness puts its own here: it watches progress, and makes faults. An error is the action's error. An
    executor that is the framework's own does not call it."""

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Starts over: these weights (all of them, canonical), zeroed optimizer state and gradients."""

    def forward_backward(self, batch: Batch) -> float:
        """Runs the schedule over the mini-batch, replacing the gradients. Returns the mean loss per token."""

    def apply_gradients(self, step: int) -> float:
        """Clips over all stages, then one optimizer step (from 0). Returns the global norm before clipping."""

    def evaluate(self, batch: Batch) -> float:
        """Mean loss per token without dropout; leaves weights and gradients as they are."""

    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        """The output of every unit for every micro-batch: key (step, "forward", stage, micro-batch, unit, "output")."""

    def probe_units(
        self, batch: Batch, inputs: Mapping[str, NDArray[Any]], output_gradients: Mapping[str, NDArray[Any]]
    ) -> dict[TensorKey, NDArray[Any]]:
        """Every unit by itself, fed with given tensors, so that no error of one unit reaches another.

        `inputs` (B, S, D) by unit (none for the embedding, which takes the batch's tokens) and `output_gradients`
        (B, S, D), for the head (B, S, V), are of the whole mini-batch. With the dropout of a training step, per
        micro-batch i: (step, "unit_forward", stage, i, unit, "output") and, but for the embedding,
        (step, "unit_backward", stage, i, unit, "input_gradient"). Summed over the micro-batches, in their order:
        (step, "unit_backward", stage, -1, unit, <a parameter's canonical name>), where a tied head's share of the token
        embedding's gradient stands under the unit "head".
        Leaves weights, optimizer and gradients as they are.
        """

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Logits (B, S, V) for tokens (B, S), without dropout, through the pipeline in micro-batches.

        B is at least the number of micro-batches and may differ from the training batch; S may be up to context_length.
        Every process gets all logits, as float32 or float64.
        """

    def optimizer_state(self) -> Arrays:
        """The moments: "first_moment/<name>" and, for AdamW, "second_moment/<name>", canonical names and shapes.

        SGD's momentum is the first moment; without momentum there is none. Before the first step they are zeros.
        """

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        """Goes on as if `steps_done` steps had left these moments: what `optimizer_state` gave, of all devices.

        The next call is `apply_gradients(steps_done)`. Bits are those of a run that was never interrupted.
        """

    def weights(self) -> Arrays: ...

    def gradients(self) -> Arrays:
        """The mini-batch's gradients, not clipped; those of a tied weight are the sum over its uses."""

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        """Replaces the gradients (to test one optimizer step from the same gradient everywhere)."""

    def events(self) -> dict[int, list[Event]]:
        """What the last `forward_backward` did, per device."""

    def environment(self) -> dict[str, Any]:
        """Versions, devices, threads and flags, read back from the framework rather than assumed."""

    def peak_memory_bytes(self) -> dict[int, int]:
        """CUDA: the allocator's peak per device. CPU: the process' peak resident size, under its first device."""

    def held_bytes_peak(self) -> dict[int, int]:
        """The most bytes of activations that each device held for its backwards, by tensors and not by the allocator.

        Counted after every action: tensors that autograd has saved and, where B and W are apart, those that W waits with;
        memory that several of them share counts once; weights and the mini-batch itself do not. Empty where the
        executor is the framework's own.
        """

    def in_flight_peak(self) -> dict[int, int]:
        """The most chunks of micro-batches per device whose F had run and whose B (or BW) had not; empty as above."""

    def close(self) -> None: ...
