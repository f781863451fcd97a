"""What makes fleet's pipeline run on CPUs, and where stages share a GPU: a process group over
sockets in place of gloo.

Fleet's pipeline is written for NCCL. Gloo lacks the calls on a compute stream that it makes, counts
point-to-point messages per group instead of per pair, so that they get mixed up with more than two
ranks, blocks in send, and lets its groups race for the same keys of the store. `SocketGroup` has
what fleet's dynamic-graph pipeline uses, and NCCL's meaning: sends are queued, and receives of a
coalesced batch wait until all its sends are out.

A peer that dies closes its sockets, so whoever waits for it gets a ConnectionError at once. For one
that lives the ranks wait as long as it takes; that it hangs is for their parent to find
(`common.harness.launch`). Sockets listen at the address of PADDLE_CURRENT_ENDPOINT (the loopback
device, unless a launcher for several hosts says otherwise).

Differs: PyTorch and TensorFlow hand tensors from thread to thread.
"""

from __future__ import annotations

import ctypes
import os
import queue
import socket
import threading
import time
from multiprocessing.util import Finalize
from typing import Any

import paddle
from paddle import Tensor
from paddle.distributed import collective, parallel

_REDUCTIONS = {
    "SUM": paddle.add,
    "MAX": paddle.maximum,
    "MIN": paddle.minimum,
    "PRODUCT": paddle.multiply,
}


class Done:
    """The task of an operation that is complete on return."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class Link:
    """A connection to one peer. Messages arrive in the order in which they were sent; sends never
    wait.

    A message is its length (8 bytes) and the tensor's memory.
    """

    def __init__(self, connection: socket.socket, peer: int) -> None:
        # A header is 8 bytes: without this, the system would wait for more to send with it.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._peer = connection, peer
        # The sender's thread takes from here, so `send` returns at once; None ends it.
        self._outbox: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._sender = threading.Thread(target=self._send_queued, name=f"link-{peer}", daemon=True)
        self._sender.start()

    def send(self, tensor: Tensor) -> None:
        """Queue the tensor, which must not change afterwards. Raises ConnectionError if the peer is
        gone.
        """
        if self._error is not None:
            raise self._broken(self._error)
        self._outbox.put(tensor)

    def receive(self, tensor: Tensor) -> None:
        """Fill the tensor. Raises ConnectionError, or ValueError if the message has another size."""  # noqa: E501
        memory = _memory(tensor)
        header = bytearray(8)
        self._fill(memoryview(header))
        length = int.from_bytes(header, "big")
        if length != len(memory):
            raise ValueError(
                f"stage {self._peer} sent {length} bytes, {len(memory)} expected: its shape or "
                "dtype differs"
            )
        self._fill(memory)

    def close(self) -> None:
        """Send what is queued, then closes."""
        self._outbox.put(None)
        self._sender.join()
        self._socket.close()

    def _send_queued(self) -> None:
        try:
            while (tensor := self._outbox.get()) is not None:
                memory = _memory(tensor)
                self._socket.sendall(len(memory).to_bytes(8, "big"))
                self._socket.sendall(memory)
        except OSError as error:
            self._error = error  # for the next `send`: nobody looks at this thread

    def _fill(self, memory: memoryview) -> None:
        while memory:
            try:
                count = self._socket.recv_into(memory)
            except OSError as error:
                raise self._broken(error) from None
            if not count:  # the end of the stream
                raise self._broken(None)
            memory = memory[count:]

    def _broken(self, error: OSError | None) -> ConnectionError:
        return ConnectionError(
            f"stage {self._peer} has ended ({error or 'it closed the connection'})"
        )


class SocketGroup:
    """The part of Paddle's ProcessGroup that fleet's dynamic-graph pipeline uses. Ranks are those
    in the group.
    """

    def __init__(self, store: Any, rank: int, size: int, group: int) -> None:
        self._rank, self._size = rank, size
        # While fleet collects a batch of sends and receives: the receives, to be done after all.
        self._batch: list[tuple[Tensor, int]] | None = None
        self._links = {
            peer: Link(connection, peer)
            for peer, connection in _connect(store, rank, size, group).items()
        }
        # When nobody uses the group any more, or at the end: atexit would not run in a process made
        # by fork.
        Finalize(self, _close, args=(self._links,), exitpriority=0)

    def name(self) -> str:
        return "GLOO"  # fleet asks which backend this is; it knows no other for CPUs

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def send(self, tensor: Tensor, dst: int, sync_op: bool = True) -> Done:
        # `detach` shares the memory but not the graph, which would live until the bytes are out.
        self._links[dst].send(tensor.detach().contiguous().cpu())
        return Done()

    def recv(self, tensor: Tensor, src: int, sync_op: bool = True) -> Done:
        if self._batch is None:
            in_memory = tensor.cpu()  # on a CPU the tensor itself
            self._links[src].receive(in_memory)
            if in_memory is not tensor:
                tensor.copy_(in_memory, True)
        else:
            self._batch.append((tensor, src))
        return Done()

    # On a CPU there is one stream.
    send_on_calc_stream, recv_on_calc_stream = send, recv

    def _start_coalescing(self) -> None:
        self._batch = []

    def _end_coalescing(self, tasks: Any = None) -> None:
        batch, self._batch = self._batch, None
        for tensor, src in batch or ():
            self.recv(tensor, src)

    def broadcast(self, tensor: Tensor, root: int, sync_op: bool = True) -> Done:
        if self._rank != root:
            return self.recv(tensor, root)
        copy = tensor.clone()  # the caller may go on to change its tensor
        for peer in self._links:
            self.send(copy, peer)
        return Done()

    def all_reduce(self, tensor: Tensor, op: Any = None, sync_op: bool = True) -> Done:
        """In rank order, on the first rank, so that the bits do not depend on who comes first."""
        if self._rank:
            self.send(tensor.clone(), 0)
        else:
            reduce = _REDUCTIONS[str(op).rsplit(".", 1)[-1]]  # "ReduceOp.SUM"
            with paddle.no_grad():
                for peer in range(1, self._size):
                    other = paddle.zeros_like(tensor)
                    self.recv(other, peer)
                    tensor.copy_(reduce(tensor, other), True)
        return self.broadcast(tensor, 0)

    def barrier(self, *_: Any) -> Done:
        return self.all_reduce(paddle.zeros([1], "int32"), "SUM")


def enable() -> None:
    """Give fleet `SocketGroup` for its process groups, in this process. Call before `fleet.init`."""  # noqa: E501
    parallel.ParallelEnv._device_id = 0  # PipelineLayer reads it; builds without CUDA never set it

    def new_group(
        backend: str,
        store: Any,
        rank: int,
        world_size: int,
        group_name: str,
        pg_options: Any = None,
        group_id: int = 0,
        **_: Any,
    ) -> SocketGroup:
        return SocketGroup(store, rank, world_size, group_id)

    # The two modules have each imported the function by name.
    collective._new_process_group_impl = parallel._new_process_group_impl = new_group
    if int(os.environ.get("PADDLE_TRAINER_ID", 0)) > 0:
        _wait_for_store(os.environ["PADDLE_MASTER"])


def _close(links: dict[int, Link]) -> None:
    for link in links.values():
        link.close()


def _wait_for_store(endpoint: str) -> None:
    """Waits until rank 0 listens: Paddle's TCPStore would try again every 3 s only."""
    host, port = endpoint.rsplit(":", 1)
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            time.sleep(0.02)


def _connect(store: Any, rank: int, size: int, group: int) -> dict[int, socket.socket]:
    """A connection to every other rank of the group: each rank calls those before it and is called
    by those after.
    """
    host = os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]
    connections = {}
    with socket.create_server((host, 0), backlog=size) as server:
        store.set(f"socket_group/{group}/{rank}", f"{host}:{server.getsockname()[1]}".encode())
        for peer in range(rank):
            peer_host, port = (
                bytes(store.get(f"socket_group/{group}/{peer}")).decode().rsplit(":", 1)
            )
            connections[peer] = socket.create_connection((peer_host, int(port)))
            connections[peer].sendall(rank.to_bytes(4, "big"))  # who calls
        while len(connections) < size - 1:
            caller = server.accept()[0]
            connections[int.from_bytes(caller.recv(4, socket.MSG_WAITALL), "big")] = caller
    return connections


def _memory(tensor: Tensor) -> memoryview:
    """The tensor's own bytes, not a copy."""
    size = tensor.size * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
