"""`python -m tf_impl.roofline CONFIG`: the kernels of a run one by one, on one thread
or a GPU (`common.harness.kernel_times`).

Differs: all copies are operations of one traced function, called as those of a stage are
(`executors.OnCallingThread`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from common.runtime.kernels import COPIES, Operations, answer
from common.spec.data import IGNORED
from common.spec.run import RunConfig
from tf_impl import devices


def prepare(config: RunConfig) -> tuple[Operations, Mapping[str, Any]]:
    """Return operations by `kernels`' names, and environment. Raises ValueError, ImportError."""
    devices.configure(1, 1, config.device)
    import keras
    import tensorflow as tf

    from tf_impl.executors import OnCallingThread
    from tf_impl.layers import activation
    from tf_impl.precision import product, softmax

    model, dtype = config.model, tf.as_dtype(config.train.dtype)
    wide = tf.float64 if dtype == tf.float64 else tf.float32
    b, s = config.micro_batch_sizes[0], model.context_length
    n, d, f, v, h = b * s, model.d_model, model.d_ff, model.vocab_size, model.num_heads
    norm = keras.layers.LayerNormalization(epsilon=model.norm_epsilon, dtype=dtype.name)
    norm.build((n, d))
    on_gpu = "GPU" in devices.stage_devices(1, config.device)[0]
    targets = tf.zeros((b, s), tf.int64)
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=IGNORED, reduction="sum", dtype=wide.name
    )

    def made(*shape: int) -> list[tf.Tensor]:
        return [tf.cast(tf.random.normal(shape), dtype) for _ in range(COPIES)]

    def repeated(
        compute: Callable[..., tf.Tensor], *inputs: list[tf.Tensor]
    ) -> Callable[[], object]:
        @tf.function(autograph=False)
        def traced(*inputs: list[tf.Tensor]) -> tf.Tensor:
            found = [compute(*each) for each in zip(*inputs, strict=True)]
            # so that nothing is left out, and nothing kept
            with tf.control_dependencies(tf.nest.flatten(found)):
                return tf.constant(0)

        call = OnCallingThread(traced.get_concrete_function(*inputs))

        def run() -> None:
            call(*tf.nest.flatten(inputs))
            if on_gpu:  # its work is only queued
                tf.test.experimental.sync_devices()

        return run

    def with_gradient(
        compute: Callable[[tf.Tensor], tf.Tensor], inputs: list[tf.Tensor]
    ) -> Callable[[], object]:
        like = compute(inputs[0])
        gradient = tf.cast(tf.random.normal(like.shape), like.dtype)

        def both(x: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = compute(x)
            return y, tape.gradient(y, x, gradient)

        return repeated(both, inputs)

    def linear(name: str, rows: int, columns: int) -> Operations:
        x, weight, y = made(n, rows), made(rows, columns), made(n, columns)
        return {
            name: repeated(product, x, weight),
            f"{name}, input gradient": repeated(
                lambda y, w: tf.matmul(y, w, transpose_b=True), y, weight
            ),
            f"{name}, weight gradient": repeated(
                lambda x, y: tf.matmul(x, y, transpose_a=True), x, y
            ),
        }

    # (b, H, S, E) and (b, H, S, S), as in attention.
    queries, weights = made(b, h, s, d // h), made(b, h, s, s)
    operations = {
        **linear("query, key, value, output", d, d),
        **linear("feed-forward up", d, f),
        **linear("feed-forward down", f, d),
        **linear("head", d, v),
        "attention scores": repeated(
            lambda q, k: product(q, k, transpose_b=True), queries, made(b, h, s, d // h)
        ),
        "attention mix": repeated(product, weights, queries),
        "softmax and gradient": with_gradient(
            lambda x: softmax(x, dtype), [tf.cast(x, wide) for x in made(b, h, s, s)]
        ),
        f"{model.activation} and gradient": with_gradient(activation(model.activation), made(n, f)),
        "layer norm and gradient": with_gradient(norm, made(n, d)),
        "loss and gradient": with_gradient(
            lambda x: loss(targets, tf.cast(x, wide)) / n, made(b, s, v)
        ),
    }
    return operations, devices.environment(devices.stage_devices(1, config.device))


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], prepare))
