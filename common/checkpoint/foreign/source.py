"""Where a model's tensors are: one file, a folder of the transformers library, or indexed shards.

Who names a file decides what it may be. What the user names may be a link, and so may what lies in
a folder that they name: the Hugging Face cache is made of links (snapshots/HASH/model.safetensors
-> ../../blobs/...). What an index names is the word of whoever wrote it: normalised, and with its
links followed, it has to lie in the model's folder, which in that cache is the one above
`snapshots` and `blobs`.
"""

from __future__ import annotations

import os.path
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from common.checkpoint.foreign.errors import ExchangeError
from common.checkpoint.manifest import one_line
from common.io.edges import printable

IN_A_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What to read from a folder: the first of these that exists."""
INDEX = ".index.json"
MAX_INDEX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Source:
    """The files with the tensors, and where config.json and tokenizer.json may be."""

    files: tuple[Path, ...]
    folders: tuple[Path, ...]

    def beside(self, name: str) -> Path | None:
        """Return the model's file of this name, if there is one."""
        return next((folder / name for folder in self.folders if (folder / name).exists()), None)


class _Index(BaseModel):
    weight_map: dict[str, str]


def find(path: Path) -> Source:
    """Find the files for a path that the user gives. Raises ExchangeError."""
    if path.is_dir():
        named = next((path / name for name in IN_A_FOLDER if (path / name).exists()), None)
        if named is None:
            revisions = sorted(path.glob("snapshots/*/"))
            hint = (
                str(revisions[0])
                if revisions
                else f"a folder with one of {', '.join(IN_A_FOLDER)}, or a file"
            )
            raise ExchangeError(f"{path}: no model in this folder; expected {hint}")
        path = named
    check_plain(path)
    # What lies beside the link is nearer than what lies beside its target.
    folders = tuple(dict.fromkeys((path.parent, path.resolve().parent)))
    return Source(_shards(path) if path.name.endswith(INDEX) else (path,), folders)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a small file beside a model, or a link to one. Raises ExchangeError."""
    check_plain(path)
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ExchangeError(f"{path}: more than {max_bytes} bytes; expected the file of a model")
    return content.removeprefix(b"\xef\xbb\xbf")


def check_plain(path: Path) -> None:
    """Accept only a regular file or a link to one, not a device. Raises ExchangeError."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ExchangeError(f"{path}: {error.strerror}; expected a file") from None
    if not stat.S_ISREG(mode):
        raise ExchangeError(f"{path}: not a plain file")


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = set(
            _Index.model_validate_json(read_bounded(index, MAX_INDEX_BYTES)).weight_map.values()
        )
    except ValidationError as error:
        raise ExchangeError(
            f"{index}: {one_line(error)}; expected an index with its weight_map"
        ) from None
    if not names:
        raise ExchangeError(f"{index}: its weight_map is empty")
    folder = index.parent.resolve()
    home = folder.parents[1] if folder.parent.name == "snapshots" else folder
    return tuple(_shard(index, name, folder, home) for name in sorted(names))


def _shard(index: Path, name: str, folder: Path, home: Path) -> Path:
    # Written on Windows, a name may have the other slash.
    inside = os.path.normpath(name.replace("\\", "/"))
    where = f"{index}: shard {printable(name)!r}"
    if (
        "\0" in name
        or Path(inside).is_absolute()
        or ":" in inside
        or inside.split("/")[0] in ("", ".", "..")
    ):
        raise ExchangeError(f"{where} leads out of the model's folder; expected a file in it")
    path = folder / inside
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or "a circle of links"
        raise ExchangeError(f"{where}: {reason}; expected a file beside the index") from None
    if not target.is_relative_to(home):
        raise ExchangeError(f"{where} is a link out of the model's folder; expected a file in it")
    check_plain(path)
    return path
