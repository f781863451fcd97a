"""Which device and which of TensorFlow's executors a stage's functions run on.

Differs: PyTorch and Paddle run an operation on the thread that calls it, so they need none of this.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf


def stage_strategies(devices: list[str]) -> list[tf.distribute.Strategy]:
    """One strategy per stage, over that stage's device of every replica (here: one replica).

    Reducing to one device keeps the stages' strategies apart; collectives would share a key.
    """
    import tensorflow as tf

    reduction = tf.distribute.ReductionToOneDevice
    return [
        tf.distribute.MirroredStrategy([device], cross_device_ops=reduction()) for device in devices
    ]


def one_core_per_stage() -> bool:
    """Return whether each stage is to compute on one core, as if it were a device of its own."""
    import tensorflow as tf

    if tf.config.threading.get_intra_op_parallelism_threads() != 1:
        return False
    # Grappler's rewrites do not know this executor.
    return bool(tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer"))


def on_one_thread(device: str, only_own_device: bool) -> bool:
    """Return whether a stage's functions on `device` run on TensorFlow's executor on one thread.

    The normal executor spreads independent operations over all cores, so that a lone stage would
    borrow those of the idle ones, and the bubble would hardly show. The one on one thread cannot
    wait for another device, so a stage whose functions read a variable that lies elsewhere
    (`only_own_device` is False) keeps the normal executor.
    """
    return only_own_device and "CPU" in device and one_core_per_stage()


def stage_thread(
    device: str, only_own_device: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """Return what a stage's thread runs in: its device and, where `on_one_thread`, one thread."""
    import tensorflow as tf
    from tensorflow.python.eager import context  # no public name for the executor

    # A function with a loop is traced for the executor of the thread that traces it, and no other
    # runs it: so whatever belongs to a stage is traced, too, within this context.
    stack = contextlib.ExitStack()
    stack.enter_context(tf.device(device))
    if on_one_thread(device, only_own_device):
        stack.enter_context(context.function_executor_type("SINGLE_THREADED_EXECUTOR"))
    return stack


def any_executor() -> contextlib.AbstractContextManager[Any]:
    """Within `stage_thread`: the normal executor, for a variable of another device."""
    from tensorflow.python.eager import context

    normal: contextlib.AbstractContextManager[Any] = context.function_executor_type("DEFAULT")
    return normal


class OnCallingThread:
    """A concrete function, called as an operation: TensorFlow's call takes a thread of its pool.

    There it would start anew on some core, with that core's caches. Its Python also checks every
    argument against the signature, for 0.9 ms at the 71 arguments of a W of 18 ms, with the lock
    that the other stages need.
    """

    def __init__(self, function: Any) -> None:
        import tensorflow as tf

        self.function = function
        self.captured_inputs = list(function.captured_inputs)
        self._types = [output.dtype for output in function.outputs]
        config = tf.compat.v1.ConfigProto()  # an operation does not look at `tf.config`
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        self._config = config.SerializeToString()

    def __call__(self, *arguments: tf.Tensor) -> list[tf.Tensor]:
        import tensorflow as tf

        found = tf.raw_ops.StatefulPartitionedCall(
            args=[*arguments, *self.captured_inputs],
            Tout=self._types,
            f=self.function,
            config_proto=self._config,
            executor_type="SINGLE_THREADED_EXECUTOR",
        )
        return found if self._types else []
