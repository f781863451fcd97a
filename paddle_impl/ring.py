"""Hands on what is generated, from one stage's process to the next; behind the last comes stage 0.

Which group has ended is not written in a schedule. So every message carries its address, its shape,
and what the receiver is to know of the tokens.

Differs: between the others' threads that is an object, which their `Channel` hands over.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor

from common.runtime.decode import Extension
from common.runtime.executor import Message
from common.spec.run import TransformerSpec
from paddle_impl.groups import receive, send


class Ring:
    """As `common.runtime.decode.Channel`, for the ranks of one pipeline."""

    def __init__(self, device: int, model: TransformerSpec, dtype: str) -> None:
        self._device, self._model, self._dtype = device, model, dtype
        self._words: dict[Message, Extension | None] = {}
        self._tensors: dict[Message, Tensor] = {}

    def tell(self, message: Message, extension: Extension | None, device: int) -> None:
        if device == self._device:  # one stage, or where a V turns
            self._words[message] = extension
            return
        # Group, virtual stage, sequences, new positions (0 at the end), whether `rows` follow.
        head = [message.micro_batch, message.virtual_stage, 0, 0, 0]
        if extension is not None:
            head[2:] = [*extension.tokens.shape, int(extension.rows is not None)]
        self._send(head, device)
        if extension is not None:
            self._send([*extension.tokens.ravel(), *(extension.rows or ())], device)

    def send(self, message: Message, tensor: Tensor, device: int) -> None:
        if device == self._device:
            self._tensors[message] = tensor
        else:
            send(tensor, device)

    def hear(self, message: Message, device: int) -> Extension | None:
        """Raises ConnectionError if the other process ends."""
        while message not in self._words:
            group, k, b, t, has_rows = self._receive([5], "int64", device).tolist()
            coming = Message("activation", group, k)
            self._words[coming] = None
            if b:
                numbers = self._receive([b * t + has_rows * b], "int64", device).numpy()
                rows = tuple(numbers[b * t :].tolist()) if has_rows else None
                self._words[coming] = Extension(numbers[: b * t].reshape(b, t), rows)
                # What comes round to the first virtual stage is logits.
                shape = [b, t, self._model.d_model] if k else [b, self._model.vocab_size]
                self._tensors[coming] = self._receive(shape, self._dtype, device)
        return self._words.pop(message)

    def receive(self, message: Message, device: int) -> Tensor:
        """Return what came with the words."""
        return self._tensors.pop(message)

    def _send(self, numbers: Sequence[int], device: int) -> None:
        send(paddle.to_tensor(numbers, "int64"), device)

    def _receive(self, shape: Sequence[int], dtype: str, device: int) -> Tensor:
        tensor = paddle.zeros(shape, dtype)
        receive(tensor, device)
        return tensor
