"""`python -m paddle_impl.roofline CONFIG`: the kernels of a run one by one, on one thread
or a GPU (`common.harness.kernel_times`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from common.runtime.kernels import COPIES, Operations, answer
from common.spec.run import RunConfig
from paddle_impl import devices


def prepare(config: RunConfig) -> tuple[Operations, Mapping[str, Any]]:
    """Return operations by `kernels`' names, and environment. Raises ValueError, ImportError."""
    devices.configure(1, 1, config.device)
    import paddle
    from paddle import Tensor, nn
    from paddle.nn import functional

    from paddle_impl.layers import activation, summed_loss

    device = devices.stage_devices(1, config.device)[0]
    paddle.set_device(device)
    devices.check_dtype(config.train.dtype)
    paddle.set_default_dtype(config.train.dtype)
    model = config.model
    b, s = config.micro_batch_sizes[0], model.context_length
    n, d, f, v, h = b * s, model.d_model, model.d_ff, model.vocab_size, model.num_heads
    norm = nn.LayerNorm(d, model.norm_epsilon)
    targets = paddle.zeros([b, s], "int64")

    # A GPU's work is only queued; an operation has ended when this returns.
    def finish() -> None:
        if device != "cpu":
            paddle.device.synchronize()

    def made(*shape: int) -> list[Tensor]:
        return [paddle.randn(shape) for _ in range(COPIES)]

    def repeated(compute: Callable[..., Tensor], *inputs: list[Tensor]) -> Callable[[], object]:
        def run() -> None:
            with paddle.no_grad():
                for each in zip(*inputs, strict=True):
                    compute(*each)
            finish()

        return run

    def with_gradient(
        compute: Callable[[Tensor], Tensor], inputs: list[Tensor]
    ) -> Callable[[], object]:
        for x in inputs:
            x.stop_gradient = False
        gradient = paddle.randn(compute(inputs[0]).shape)

        def run() -> None:
            for x in inputs:
                paddle.grad(compute(x), x, gradient)
            finish()

        return run

    def linear(name: str, rows: int, columns: int) -> Operations:
        x, weight, y = made(n, rows), made(rows, columns), made(n, columns)
        return {
            name: repeated(paddle.matmul, x, weight),
            f"{name}, input gradient": repeated(
                lambda y, w: paddle.matmul(y, w, transpose_y=True), y, weight
            ),
            f"{name}, weight gradient": repeated(
                lambda x, y: paddle.matmul(x, y, transpose_x=True), x, y
            ),
        }

    queries, weights = made(b, h, s, d // h), made(b, h, s, s)
    operations = {
        **linear("query, key, value, output", d, d),
        **linear("feed-forward up", d, f),
        **linear("feed-forward down", f, d),
        **linear("head", d, v),
        "attention scores": repeated(
            lambda q, k: paddle.matmul(q, k, transpose_y=True), queries, made(b, h, s, d // h)
        ),
        "attention mix": repeated(paddle.matmul, weights, queries),
        "softmax and gradient": with_gradient(functional.softmax, made(b, h, s, s)),
        f"{model.activation} and gradient": with_gradient(activation(model.activation), made(n, f)),
        "layer norm and gradient": with_gradient(norm, made(n, d)),
        "loss and gradient": with_gradient(lambda x: summed_loss(x, targets, n), made(b, s, v)),
    }
    return operations, devices.environment([device])


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], prepare))
