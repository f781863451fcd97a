"""What replicas send instead of gradients, over sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.spec.mesh import Mesh
from common.spec.run import RunConfig
from tests.compression import REPLICAS, TENSORS, Arrays, Sum, check, exchange
from tests.paddle.ranks import Ranks


def test_compressed_sums_are_the_oracles_and_as_few_bytes_as_promised(
    ranks: Callable[[Mesh], Ranks], tmp_path: Path
) -> None:
    ranks(Mesh(stages=1, replicas=max(REPLICAS))).ask(_exchange, tmp_path)
    check("paddle", tmp_path)


def _exchange(folder: Path) -> None:
    import paddle

    from paddle_impl import sockets
    from paddle_impl.groups import here

    send, sent = sockets.Link.send, [0]

    def counted(link: sockets.Link, tensor: Any) -> None:
        sent[0] += len(sockets._memory(tensor))
        send(link, tensor)

    groups = {d: paddle.distributed.new_group(list(range(d))) for d in REPLICAS}

    def summing(config: RunConfig) -> Sum:
        from paddle_impl.compression import Compressor
        from paddle_impl.weights import NamedParameter, to_array

        dtype = config.train.dtype
        named = [NamedParameter(t.name, paddle.zeros(t.shape, dtype), t.is_copy) for t in TENSORS]
        compressor = Compressor(config, named)

        def add(given: Arrays) -> tuple[Arrays, int]:
            sent[0] = 0
            gradients = [paddle.to_tensor(given[t.key]) for t in TENSORS]
            compressor.start(gradients, groups[config.replicas]).finish()
            found = {t.key: to_array(g) for t, g in zip(TENSORS, gradients, strict=True)}
            return found, sent[0]

        return add

    sockets.Link.send = counted  # type: ignore[method-assign]
    try:
        exchange("paddle", here().world.rank, folder, summing)
    finally:
        sockets.Link.send = send  # type: ignore[method-assign]
