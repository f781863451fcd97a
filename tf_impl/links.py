"""Messages between stages in different processes, over sockets.

TensorFlow has no point-to-point messages. What comes nearest, a broadcast in a group of two, keeps
its sender until it is received and asks the group's leader each time: 0.80 ms one way for 4 KB and
27.6 for 16 MB, where a socket takes 0.1 and 8. A step of two stages on two hosts (small, m = 8)
took 603 ms with broadcasts and 573 with sockets, on a network of 5 ms and 200 Mbit/s 896 and 737.

    a stage's thread            of each link            of each link         a stage's thread
    send ──► outbox ──► sending thread ──► socket ──► reading thread ──► mail ──► receive

So neither end waits for the other, and a message is there before it is asked for. It carries its
pass and address: what arrives in another order is found all the same, what nobody asks for is never
taken for something else.

A process that ends closes its sockets, and whoever waits for it gets a ConnectionError at once.

Differs: torch.distributed has point-to-point messages, and Paddle has fleet's groups.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from common.runtime.executor import Message
from tf_impl.stage import Channel

Arrived = Callable[[int, Message, NDArray[Any]], None]
"""(number of the pass, address, tensor)"""


class Link:
    """A connection to another rank. Sends never wait.

    A message is the length of its header (4 bytes), the header in JSON, and the tensor's memory.
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        arrived: Arrived,
        lost: Callable[[Exception], None],
    ) -> None:
        # A header is short: without this, the system would wait for more to send with it.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._peer, self._arrived, self._lost = connection, peer, arrived, lost
        self._outbox: queue.Queue[tuple[int, Message, tf.Tensor]] = queue.Queue()
        for work in (self._send_queued, self._read):
            threading.Thread(target=work, daemon=True).start()

    def send(self, number: int, message: Message, tensor: tf.Tensor) -> None:
        """Queue the tensor of pass `number`."""
        self._outbox.put((number, message, tensor))

    def flush(self) -> None:
        self._outbox.join()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)

    def _send_queued(self) -> None:
        while True:
            try:
                self._transmit(*self._outbox.get())
            except Exception as error:  # nobody looks at this thread
                self._end(error)
            finally:
                self._outbox.task_done()

    def _transmit(self, number: int, message: Message, tensor: tf.Tensor) -> None:
        array = np.ascontiguousarray(tensor.numpy())  # waits for a GPU, where it is on one
        address = [number, message.kind, message.micro_batch, message.virtual_stage]
        header = json.dumps([*address, array.dtype.name, array.shape]).encode()
        self._socket.sendall(len(header).to_bytes(4, "big") + header)
        self._socket.sendall(array.reshape(-1).view(np.uint8).data)

    def _read(self) -> None:
        try:
            while True:
                length = int.from_bytes(self._bytes(4), "big")
                number, kind, i, k, dtype, shape = json.loads(bytes(self._bytes(length)))
                kept = np.empty(shape, tf.as_dtype(dtype).as_numpy_dtype)
                self._fill(kept.reshape(-1).view(np.uint8).data)
                self._arrived(number, Message(kind, i, k), kept)
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        self._lost(ConnectionError(f"{self._peer} has ended ({error})"))

    def _bytes(self, count: int) -> bytearray:
        found = bytearray(count)
        self._fill(memoryview(found))
        return found

    def _fill(self, memory: memoryview) -> None:
        while memory:
            count = self._socket.recv_into(memory)
            if not count:
                raise EOFError("it closed the connection")
            memory = memory[count:]


class Links:
    """This process' links to the ranks that it talks to, for all passes."""

    def __init__(
        self,
        own: int,
        peers: Sequence[int],
        hosts: Sequence[str],
        ports_of: Callable[[int], Sequence[int]],
        name_of: Callable[[int], str],
    ) -> None:
        """`hosts` has that of every rank; `ports_of(port)` tells all ranks this one's, and returns
        that of every rank; `name_of(rank)` is for messages. Peers are each other's.
        """
        self._mail: dict[tuple[int, Message], NDArray[Any]] = {}
        self._lost: dict[int, Exception] = {}
        """By peer: why nothing comes from it any more."""
        self._changed = threading.Condition()
        self._links: dict[int, Link] = {}
        self._name_of = name_of
        # On one machine nobody else can connect. Among hosts it is as with TensorFlow's own server:
        # the name that others have for this host need not be that of one of its interfaces.
        at = hosts[own] if len(set(hosts)) == 1 else ""
        with socket.create_server((at, 0), backlog=len(hosts)) as server:
            ports = ports_of(server.getsockname()[1])  # all listen before anybody has them
            for peer in (rank for rank in peers if rank < own):
                connection = socket.create_connection((hosts[peer], ports[peer]))
                connection.sendall(own.to_bytes(4, "big"))  # who calls
                self._add(peer, connection)
            while len(self._links) < len(peers):
                connection = server.accept()[0]
                caller = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
                self._add(caller, connection)

    def send(self, rank: int, number: int, message: Message, tensor: tf.Tensor) -> None:
        self._links[rank].send(number, message, tensor)

    def take(self, rank: int, number: int, message: Message) -> NDArray[Any]:
        """Wait for a message of `rank`. Raises ConnectionError if it has ended before."""
        address = number, message
        with self._changed:
            self._changed.wait_for(lambda: address in self._mail or rank in self._lost)
            if address not in self._mail:
                raise self._lost[rank]
            return self._mail.pop(address)

    def check(self) -> None:
        """Raise ConnectionError once any of the ranks has ended."""
        for error in tuple(self._lost.values()):
            raise error

    def flush(self) -> None:
        """Wait until all that was sent is on its way, which it stays when this process ends."""
        for link in self._links.values():
            link.flush()

    def close(self) -> None:
        """End all links; the other ends notice."""
        for link in self._links.values():
            link.close()

    def _add(self, peer: int, connection: socket.socket) -> None:
        def arrived(number: int, message: Message, array: NDArray[Any]) -> None:
            with self._changed:
                self._mail[number, message] = array
                self._changed.notify_all()

        def lost(error: Exception) -> None:
            with self._changed:
                self._lost.setdefault(peer, error)
                self._changed.notify_all()

        self._links[peer] = Link(connection, self._name_of(peer), arrived, lost)


class LinkedChannel(Channel):
    """Carries one pass between this process' stage and those of others."""

    def __init__(self, links: Links, own: int, ranks: Sequence[int], number: int) -> None:
        """`own` is this stage, `ranks` every stage's, `number` the pass', the same on all ranks."""
        super().__init__()
        self._links, self._own, self._ranks, self._number = links, own, ranks, number

    def send(self, message: Message, tensor: Any, device: int) -> None:
        if device == self._own:  # where a V turns
            super().send(message, tensor, device)
            return
        # A forward hands on a list: its output and, where Keras has given it one, its mask.
        (content,) = tensor if message.kind == "activation" else [tensor]
        self._links.send(self._ranks[device], self._number, message, content)

    def receive(self, message: Message, device: int) -> Any:
        """Raises ConnectionError if the sender has ended."""
        if device == self._own:
            return super().receive(message, device)
        found = self._links.take(self._ranks[device], self._number, message)
        tensor = tf.convert_to_tensor(found)
        return [tensor] if message.kind == "activation" else tensor

    def check(self) -> None:
        super().check()
        self._links.check()
