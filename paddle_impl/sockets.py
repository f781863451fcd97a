"""What makes fleet's pipeline run on CPUs, and where stages share a GPU: a process group over
sockets in place of gloo.

Fleet's pipeline is written for NCCL. Gloo lacks the calls on a compute stream that it makes, counts
point-to-point messages per group instead of per pair, so that they get mixed up with more than two
ranks, blocks in send, and lets its groups race for the same keys of the store. `SocketGroup` has
what fleet's dynamic-graph pipeline uses, and NCCL's meaning: sends are queued, and receives of a
coalesced batch wait until all its sends are out.

A peer that dies closes its sockets, so whoever waits for it gets a ConnectionError at once; where
its host or the network is gone, TCP's own probes find it out (`_watch`). For one that lives the
ranks wait as long as it takes; that it hangs is for their parent to find (`common.harness.launch`).
Sockets listen at the address of PADDLE_CURRENT_ENDPOINT (the loopback device, unless a launcher for
several hosts says otherwise).

Differs: PyTorch and TensorFlow hand tensors from thread to thread.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import util
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor
from paddle.distributed import collective, parallel

from common.runtime.world import World
from common.spec.mesh import Mesh

_REDUCTIONS = {"SUM": np.add, "MAX": np.maximum, "MIN": np.minimum, "PRODUCT": np.multiply}

JOIN_SECONDS = 900.0
"""How long a rank waits for others to start, as Paddle's own store does."""
SILENT_SECONDS = 30
"""How long a host that answers nothing, not even TCP's probes, may be away."""


class Done:
    """The task of an operation that is complete on return."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class Running(threading.Thread):
    """The task of an operation in a thread of its own, behind the one before."""

    def __init__(self, work: Callable[[], None], behind: threading.Thread | None) -> None:
        super().__init__(daemon=True)
        self._work, self._behind = work, behind
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            if self._behind is not None:
                self._behind.join()
            self._work()
        except Exception as error:
            self._error = error  # for `wait`: nobody looks at this thread

    def wait(self, timeout: Any = None) -> bool:
        """Raises what the operation did."""
        self.join()
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        return not self.is_alive()


class Link:
    """A connection to one peer. Messages arrive in the order of their sends, which never wait.

    A message is its length (8 bytes) and the tensor's memory. `peer` is its name in errors.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        # A header is 8 bytes: without this, the system would wait for more to send with it.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _watch(connection)
        self._socket, self._peer = connection, peer
        # The sender's thread takes from here, so `send` returns at once; None ends it.
        self._outbox: queue.SimpleQueue[Tensor | NDArray[Any] | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._sender = threading.Thread(target=self._send_queued, name=f"link-{peer}", daemon=True)
        self._sender.start()

    def send(self, tensor: Tensor | NDArray[Any]) -> None:
        """Queue the tensor, which must not change any more. Raises ConnectionError."""
        if self._error is not None:
            raise self._broken(self._error)
        self._outbox.put(tensor)

    def receive(self, tensor: Tensor | NDArray[Any]) -> None:
        """Fill the tensor. Raises ConnectionError, or ValueError if the message has another size."""  # noqa: E501
        memory = _memory(tensor)
        header = bytearray(8)
        self._fill(memoryview(header))
        length = int.from_bytes(header, "big")
        if length != len(memory):
            raise ValueError(
                f"{self._peer} sent {length} bytes, {len(memory)} expected: its shape or "
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
        return ConnectionError(f"{self._peer} has ended ({error or 'it closed the connection'})")


class SocketGroup:
    """What fleet's dynamic pipeline uses of a ProcessGroup; ranks are those in the group."""

    def __init__(self, store: Any, rank: int, size: int, group: int, mesh: Mesh) -> None:
        self._rank, self._size = rank, size
        self._last: Running | None = None
        """The operation that was put in the background last."""
        # While fleet collects a batch of sends and receives: the receives, to be done after all.
        self._batch: list[tuple[Tensor, int]] | None = None
        self._links = {
            peer: Link(connection, mesh.name(rank_of_peer))
            for peer, (connection, rank_of_peer) in _connect(store, rank, size, group).items()
        }
        # When nobody uses the group any more, or at the end: a forked process runs no atexit.
        util.Finalize(self, _close, args=(self._links,), exitpriority=0)

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

    def all_reduce(self, tensor: Tensor, op: Any = None, sync_op: bool = True) -> Done | Running:
        """Add up, or what `op` says, in the order of the ranks; each rank does one slice for all.

        rank 0   a0 a1 a2         a0+b0+c0                     all three slices
        rank 1   b0 b1 b2   ──►   a1+b1+c1               ──►   everywhere
        rank 2   c0 c1 c2         a2+b2+c2

        So the bits depend neither on who comes first nor on what else is in the tensor, and no rank
        sends more than twice the tensor, however many there are.
        """
        reduce = _REDUCTIONS[str(op).rsplit(".", 1)[-1]]  # "ReduceOp.SUM"
        return self._in_turn(lambda: self._all_reduce(tensor, reduce), tensor, sync_op)

    def all_gather_into_tensor(
        self, out: Tensor, tensor: Tensor, sync_op: bool = True
    ) -> Done | Running:
        """Fill `out` with the tensors of all ranks, in their order."""
        return self._in_turn(lambda: self._exchange(out, tensor, 1), tensor, sync_op)

    def all_to_all_single(
        self, out: Tensor, tensor: Tensor, out_sizes: Any, sizes: Any, sync_op: bool = True
    ) -> Done | Running:
        """Fill `out` with one slice from every rank, which cuts its tensor into one for each: equal
        ones, for which Paddle gives no sizes.
        """
        return self._in_turn(lambda: self._exchange(out, tensor, self._size), tensor, sync_op)

    def _in_turn(self, work: Callable[[], None], tensor: Tensor, sync_op: bool) -> Done | Running:
        """Do the work of an operation on a tensor behind those before it."""
        if sync_op or not tensor.place.is_cpu_place():  # else a GPU might not have computed it yet
            if self._last is not None:
                self._last.join()
            work()
            return Done()
        self._last = Running(work, self._last)
        return self._last

    all_reduce_on_calc_stream = all_reduce

    def _exchange(self, out: Tensor, tensor: Tensor, slices: int) -> None:
        in_memory, filled = tensor.cpu(), out.cpu()
        # A copy: the tensor may be gone before this has left.
        sent = np.array_split(_array(in_memory, np.uint8).copy(), slices)
        rows = np.array_split(_array(filled, np.uint8), self._size)
        for peer, link in self._links.items():
            link.send(sent[peer % slices])
        rows[self._rank][:] = sent[self._rank % slices]
        for peer, link in self._links.items():
            link.receive(rows[peer])
        if filled is not out:
            out.copy_(filled, True)

    def _all_reduce(self, tensor: Tensor, reduce: np.ufunc) -> None:
        in_memory = tensor.cpu()  # on a CPU the tensor itself
        slices = np.array_split(_array(in_memory), self._size)
        for peer, link in self._links.items():
            link.send(slices[peer])
        own = slices[self._rank]
        total, other = np.empty_like(own), np.empty_like(own)
        for rank in range(self._size):
            if rank != self._rank:
                self._links[rank].receive(other)
            term = own if rank == self._rank else other
            if rank == 0:
                total[:] = term
            else:
                reduce(total, term, out=total)
        own[:] = total
        # Of memory of its own: the caller may change its tensor before this has left.
        for link in self._links.values():
            link.send(total)
        for peer, link in self._links.items():
            link.receive(slices[peer])
        if in_memory is not tensor:
            tensor.copy_(in_memory, True)

    def barrier(self, *_: Any) -> Done | Running:
        return self.all_reduce(paddle.zeros([1], "int32"), "SUM")


def enable(mesh: Mesh) -> None:
    """Give fleet `SocketGroup` for its process groups, in this process. Call before `fleet.init`."""  # noqa: E501
    # What a launched process has queued must be sent before Paddle's own exit, registered earlier,
    # frees it. (A rank that is forked ends by `Finalize` alone.)
    atexit.register(util._run_finalizers, 0)  # type: ignore[attr-defined]
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
        return SocketGroup(store, rank, world_size, group_id, mesh)

    # The two modules have each imported the function by name.
    collective._new_process_group_impl = parallel._new_process_group_impl = new_group


def _close(links: dict[int, Link]) -> None:
    for link in links.values():
        link.close()


def wait_for_store(world: World) -> None:
    """Wait until rank 0 listens, as TCPStore would, but every 20 ms. Raises ConnectionError."""
    host, port = world.endpoints[0].rsplit(":", 1)
    until = time.monotonic() + JOIN_SECONDS
    while world.rank:
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                why = f"rank 0 does not listen at {host}:{port} ({error.strerror or error})"
                raise ConnectionError(f"{why} after {JOIN_SECONDS:g} s") from None
            time.sleep(0.02)


def _watch(connection: socket.socket) -> None:
    """Make a connection fail, and not wait for ever, once the other host is gone (tcp(7))."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", SILENT_SECONDS // 3),
        ("TCP_KEEPINTVL", SILENT_SECONDS // 6),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", SILENT_SECONDS * 1000),  # for bytes that are under way
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _connect(store: Any, rank: int, size: int, group: int) -> dict[int, tuple[socket.socket, int]]:
    """By rank in the group, a connection to every other one and its rank in the run: each calls
    those before it and is called by those after.
    """
    host = os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]
    of_run = int(os.environ["PADDLE_TRAINER_ID"])
    connections = {}
    with socket.create_server((host, 0), backlog=size) as server:
        server.settimeout(JOIN_SECONDS)
        own = f"{host}:{server.getsockname()[1]}:{of_run}"
        store.set(f"socket_group/{group}/{rank}", own.encode())
        for peer in range(rank):
            told = bytes(store.get(f"socket_group/{group}/{peer}")).decode()
            peer_host, port, name = told.rsplit(":", 2)
            call = socket.create_connection((peer_host, int(port)))
            call.sendall(rank.to_bytes(4, "big") + of_run.to_bytes(4, "big"))  # who calls
            connections[peer] = call, int(name)
        while len(connections) < size - 1:
            caller = server.accept()[0]
            said = caller.recv(8, socket.MSG_WAITALL)
            connections[int.from_bytes(said[:4], "big")] = caller, int.from_bytes(said[4:], "big")
    return connections


def _memory(tensor: Tensor | NDArray[Any]) -> memoryview:
    """The tensor's own bytes, not a copy."""
    if isinstance(tensor, np.ndarray):
        return tensor.view(np.uint8).data
    size = tensor.size * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _array(tensor: Tensor, dtype: Any = None) -> NDArray[Any]:
    """The tensor's own elements (n,), not a copy, while the tensor is there."""
    return np.frombuffer(_memory(tensor), dtype or str(tensor.dtype).rpartition(".")[2])
