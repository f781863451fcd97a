"""The store of a run whose launcher holds none: text by key, kept by rank 0, over XML-RPC.

It carries a few words a second (`common.runtime.meeting`, `heartbeat`); tensors go through the
framework's own connections. torchrun has a store, and PyTorch a class for it (`torch_impl.ranks`).
"""

from __future__ import annotations

import http.client
import threading
import time
import xmlrpc.client
from socketserver import ThreadingMixIn
from xmlrpc.server import SimpleXMLRPCServer

from common.io.usage import UsageError
from common.runtime.launchers import Launched

ANSWER_SECONDS = 10.0
RETRY_SECONDS = 0.2


class _Server(ThreadingMixIn, SimpleXMLRPCServer):
    daemon_threads = True


class _Transport(xmlrpc.client.Transport):
    """As the library's, which would wait for an answer for ever."""

    def make_connection(self, host: object) -> http.client.HTTPConnection:
        connection = super().make_connection(host)  # type: ignore[arg-type]
        connection.timeout = ANSWER_SECONDS
        return connection


class TextStore:
    """A connection to it, and in the rank that holds it the store itself."""

    def __init__(self, launched: Launched, seconds: float) -> None:
        """Wait until it answers, `seconds` at most. Raises UsageError."""
        host, _, port = launched.master.rpartition(":")
        # What torchrun holds there is its own.
        number = int(port) + (1 + launched.world.size) * launched.has_store
        self._address = f"{host}:{number}"
        try:
            if launched.world.rank == 0:
                self._serve(host, number)
            self._wait(time.monotonic() + seconds)
        except OSError as error:
            does = "hold" if launched.world.rank == 0 else "reach"
            raise UsageError(
                f"cannot {does} the store of the run at {self._address}: "
                f"{error.strerror or error}; expected the first host's address, as all hosts "
                "reach it, and a port that is free there"
            ) from None

    def set(self, key: str, value: str) -> None:
        self._proxy().put(key, value)

    def get(self, key: str) -> str | None:
        found = self._proxy().get(key)
        return None if found is None else str(found)

    def _serve(self, host: str, port: int) -> None:
        kept: dict[str, str] = {}
        server = _Server((host, port), logRequests=False, allow_none=True)
        server.register_function(lambda key, value: kept.update({key: value}), "put")
        server.register_function(lambda key: kept.get(key), "get")
        threading.Thread(target=server.serve_forever, name="store", daemon=True).start()

    def _wait(self, deadline: float) -> None:
        while True:
            try:
                self.get("")
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)

    def _proxy(self) -> xmlrpc.client.ServerProxy:
        # A new one for each call: a proxy is for one thread alone.
        return xmlrpc.client.ServerProxy(f"http://{self._address}", _Transport(), allow_none=True)
