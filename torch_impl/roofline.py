"""`python -m torch_impl.roofline CONFIG`: the kernels of a run one by one, on one thread
or a GPU (`common.harness.kernel_times`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from common.runtime.kernels import COPIES, Operations, answer
from common.spec.run import RunConfig
from torch_impl import devices


def prepare(config: RunConfig) -> tuple[Operations, Mapping[str, Any]]:
    """Return operations by `kernels`' names, and environment. Raises ValueError, ImportError."""
    devices.configure(1, 1, config.device)
    import torch
    from torch import Tensor

    from torch_impl.layers import activation, summed_loss
    from torch_impl.precision import LayerNorm

    model, dtype = config.model, getattr(torch, config.train.dtype)
    b, s = config.micro_batch_sizes[0], model.context_length
    n, d, f, v, h = b * s, model.d_model, model.d_ff, model.vocab_size, model.num_heads
    device = devices.stage_devices(1, config.device)[0]
    norm = LayerNorm(d, model.norm_epsilon, dtype=dtype).to(device)
    targets = torch.zeros(b, s, dtype=torch.long).to(device)

    # A GPU's work is only queued; an operation has ended when this returns.
    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def made(*shape: int) -> list[Tensor]:
        return [torch.randn(shape).to(device, dtype) for _ in range(COPIES)]

    def repeated(compute: Callable[..., Tensor], *inputs: list[Tensor]) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> None:
            for each in zip(*inputs, strict=True):
                compute(*each)
            finish()

        return run

    def with_gradient(
        compute: Callable[[Tensor], Tensor], inputs: list[Tensor]
    ) -> Callable[[], object]:
        inputs = [x.requires_grad_() for x in inputs]
        like = compute(inputs[0])  # the output, whatever its shape
        gradient = torch.randn(like.shape).to(like)

        def run() -> None:
            for x in inputs:
                torch.autograd.grad(compute(x), x, gradient)
            finish()

        return run

    def linear(name: str, rows: int, columns: int) -> Operations:
        x, weight, y = made(n, rows), made(rows, columns), made(n, columns)
        return {
            name: repeated(lambda x, w: x @ w, x, weight),
            f"{name}, input gradient": repeated(lambda y, w: y @ w.T, y, weight),
            f"{name}, weight gradient": repeated(lambda x, y: x.T @ y, x, y),
        }

    queries, weights = made(b, h, s, d // h), made(b, h, s, s)
    operations = {
        **linear("query, key, value, output", d, d),
        **linear("feed-forward up", d, f),
        **linear("feed-forward down", f, d),
        **linear("head", d, v),
        "attention scores": repeated(
            lambda q, k: q @ k.transpose(-2, -1), queries, made(b, h, s, d // h)
        ),
        "attention mix": repeated(lambda w, v: w @ v, weights, queries),
        "softmax and gradient": with_gradient(lambda x: torch.softmax(x, -1), made(b, h, s, s)),
        f"{model.activation} and gradient": with_gradient(activation(model.activation), made(n, f)),
        "layer norm and gradient": with_gradient(norm, made(n, d)),
        "loss and gradient": with_gradient(lambda x: summed_loss(x, targets, n), made(b, s, v)),
    }
    return operations, devices.environment([device])


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], prepare))
