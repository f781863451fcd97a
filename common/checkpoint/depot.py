"""Checkpoints between hosts that share no folder: their files over HTTP.

    saving      host b: shard, then note   ──PUT──►   host a: .step-....partial, where the process
                                                      of device 0 waits for the notes of all
    resuming    host b: a whole checkpoint ◄──GET──   the host that has the newest one

Every file is compared by its SHA-256 on arrival, so what is announced as whole is whole. Addresses
begin with a word that only the processes of one run know.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from common.checkpoint.directory import folder_name, set_aside
from common.checkpoint.header import DIGEST_CHUNK_BYTES, digest_of
from common.checkpoint.manifest import MANIFEST, TOKENIZER, CheckpointError, FileEntry
from common.checkpoint.read import read_manifest, verify

TIMEOUT_SECONDS = 60.0
"""Without a byte for so long, the other host is gone."""
_SENT = re.compile(r"\.step-[0-9]{8,18}\.[0-9a-f]+\.partial/shard-[0-9]{5}\.safetensors(\.note)?")
_ASKED = re.compile(rf"{re.escape(MANIFEST)}|{re.escape(TOKENIZER)}|shard-[0-9]{{5}}\.safetensors")


class _Server(ThreadingHTTPServer):
    # A request that hangs must not keep the process from ending.
    daemon_threads = True
    word: str
    directory: Path
    offered: Path | None


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = TIMEOUT_SECONDS

    def do_GET(self) -> None:
        # Names are matched against a list, never joined with what came over the network.
        name, offered = self._name(), self.server.offered
        if offered is None or not _ASKED.fullmatch(name):
            self.send_error(404)
            return
        with (offered / name).open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            self.end_headers()
            shutil.copyfileobj(file, self.wfile, DIGEST_CHUNK_BYTES)

    def do_PUT(self) -> None:
        # `.step-00000100.<token>.partial/shard-00001.safetensors`, or its note; nothing else.
        if not _SENT.fullmatch(name := self._name()):
            self.send_error(404)
            return
        path = self.server.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # The digest of what arrived goes back, so that the sender knows before it deletes its own.
        digest = _receive(self.rfile, int(self.headers["Content-Length"]), path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(digest.encode())

    def _name(self) -> str:
        # Not a secret against an attacker in the network, but against another run's process.
        word, _, name = self.path.removeprefix("/").partition("/")
        return name if word == self.server.word else ""

    def log_message(self, format: str, *words: Any) -> None:
        """Say nothing: what goes wrong is said by the process that asked."""


@contextlib.contextmanager
def open_depot(host: str, word: str, directory: Path, offered: Path | None) -> Iterator[str]:
    """Take shards of checkpoints into `directory`, and give away the files of the checkpoint
    `offered`; yield the address. Raises CheckpointError.
    """
    with _as_error(f"cannot serve checkpoints at {host}"):
        server = _Server((host, 0), _Handler)
    server.word, server.directory, server.offered = word, directory, offered
    threading.Thread(target=server.serve_forever, name="depot", daemon=True).start()
    try:
        yield f"http://{host}:{server.server_address[1]}/{word}"
    finally:
        server.shutdown()
        server.server_close()


def deliver(shard: Path, note: Path, address: str) -> None:
    """Move a shard, then the note that it is whole, to a depot. Raises CheckpointError."""
    # The note last: the process of device 0 waits for it, and then takes the shard to be whole.
    for path in (shard, note):
        with path.open("rb") as file:
            digest = digest_of(file)
            file.seek(0)
            length = {"Content-Length": str(path.stat().st_size)}
            answer = _ask(address, f"{path.parent.name}/{path.name}", "PUT", file, length)
            with _as_error(f"{path.name} to {address}"):
                found = answer.read().decode()
        if found != digest:
            raise CheckpointError(f"{path}: arrived damaged at {address}; expected {digest}")
        path.unlink()


def fetch(address: str, directory: Path, word: str) -> Path:
    """Return a copy in `directory` of the checkpoint that a depot offers, whole and checked; the
    one of this name if it is the same. Raises CheckpointError.
    """
    # The step is known only with the manifest; until then the name is that of a leftover, which
    # `remove_leftovers` would find.
    temporary = directory / f".{folder_name(0)}.{word}.partial"
    temporary.mkdir(parents=True)
    try:
        _download(address, MANIFEST, temporary)
        manifest = read_manifest(temporary)
        folder = directory / folder_name(manifest.steps_done)
        if folder.exists():
            # Equal manifests have equal digests of every file, so nothing has to travel again.
            own = folder / MANIFEST
            with contextlib.suppress(CheckpointError):
                if own.read_bytes() == (temporary / MANIFEST).read_bytes():
                    verify(folder)
                    return folder
            # Of the same step and another run, or damaged: kept under another name.
            set_aside(folder)
        for name in manifest.files:
            _download(address, name, temporary)
        if isinstance(manifest.tokenizer, FileEntry):
            _download(address, TOKENIZER, temporary)
        verify(temporary)
        temporary.rename(folder)
        return folder
    except OSError as error:
        raise CheckpointError(f"{directory}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(address: str, name: str, folder: Path) -> None:
    answer = _ask(address, name, "GET")
    with _as_error(f"{name} from {address}"):
        _receive(answer, int(answer.headers["Content-Length"]), folder / name)


def _receive(source: Any, size: int, path: Path) -> str:
    """Write `size` bytes into a file, which has its name when it is whole; return their SHA-256."""
    # Under another name until it is whole, as a process that looks for notes lists the folder.
    digest, partial = hashlib.sha256(), path.with_name(f".{path.name}.coming")
    with partial.open("wb") as file:
        while size > 0:
            piece = source.read(min(size, DIGEST_CHUNK_BYTES))
            if not piece:
                raise ConnectionError(f"ended {size} bytes too early")
            file.write(piece)
            digest.update(piece)
            size -= len(piece)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return digest.hexdigest()


def _ask(
    address: str, name: str, method: str, body: Any = None, headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    url = urllib.parse.urlsplit(address)
    with _as_error(f"{name}, {method} {address}"):
        connection = http.client.HTTPConnection(url.netloc, timeout=TIMEOUT_SECONDS)
        connection.request(method, f"{url.path}/{name}", body, headers or {})
        answer = connection.getresponse()
    if answer.status != 200:
        raise CheckpointError(f"{name}, {method} {address}: {answer.status} {answer.reason}")
    return answer


@contextlib.contextmanager
def _as_error(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(f"{what}: {getattr(error, 'strerror', None) or error}") from None
