"""Read a checkpoint: check everything before use, and sizes before memory is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from safetensors import safe_open

from common.checkpoint.header import digest_of, opened, read_header
from common.checkpoint.manifest import (
    MANIFEST,
    READABLE_VERSIONS,
    SCHEMA_VERSION,
    TOKENIZER,
    Arrays,
    CheckpointError,
    FileEntry,
    Manifest,
    as_checkpoint_error,
    check_contents,
    one_line,
    tensor_shapes,
)
from common.io.edges import printable
from common.spec.parameters import parameter_shapes

MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A manifest with its tensors."""

    manifest: Manifest
    weights: Arrays
    optimizer_state: Arrays


class _Version(BaseModel):
    schema_version: int


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check it against its own specification. Raises CheckpointError."""
    path = folder / MANIFEST
    with opened(path) as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; expected the manifest of a checkpoint"
        )
    # The version alone first: of a newer format's other fields nothing can be said.
    try:
        version = _Version.model_validate_json(text).schema_version
        if version not in READABLE_VERSIONS:
            newer = "; expected a newer version of this program" if version > SCHEMA_VERSION else ""
            known = " and ".join(map(str, READABLE_VERSIONS))
            raise CheckpointError(
                f"{path}: schema_version = {version}; this program reads {known}{newer}"
            )
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None
    check_contents(manifest, folder)
    return manifest


def verify(folder: Path) -> Manifest:
    """Read manifest, headers and digests once, and keep nothing. Raises CheckpointError."""
    manifest = read_manifest(folder)
    for name in manifest.files:
        _verify_file(folder / name, manifest)
    _read_tokenizer(folder, manifest)
    return manifest


def read_tokenizer(folder: Path) -> bytes | None:
    """Read and check its tokenizer.json; None if it has none. Raises CheckpointError."""
    return _read_tokenizer(folder, read_manifest(folder))


def load(folder: Path, with_moments: bool = True) -> Checkpoint:
    """Load and check the checkpoint, with or without optimizer state. Raises CheckpointError."""
    manifest = verify(folder)
    wanted = tensor_shapes(manifest.model, manifest.optimizer_state if with_moments else ())
    arrays: Arrays = {}
    for name in manifest.files:
        with as_checkpoint_error(f"{folder / name}"), safe_open(folder / name, "numpy") as file:
            # A shard holds some weights and their moments; an evaluation reads past the latter.
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if key in wanted:
                    arrays[key] = file.get_tensor(key)
    weights = {name: arrays.pop(name) for name in parameter_shapes(manifest.model)}
    return Checkpoint(manifest, weights, arrays)


def _read_tokenizer(folder: Path, manifest: Manifest) -> bytes | None:
    entry = manifest.tokenizer
    if not isinstance(entry, FileEntry):
        return None
    with opened(folder / TOKENIZER) as file:
        _verify_size(file, folder / TOKENIZER, entry)
        _verify_digest(file, folder / TOKENIZER, entry)
        file.seek(0)
        return bytes(file.read())


def _verify_file(path: Path, manifest: Manifest) -> None:
    with opened(path) as file:
        entry = manifest.files[path.name]
        # From cheap to dear: the size, then the header, and the digest of every byte last.
        _verify_size(file, path, entry)
        expected = {
            name: (tensor.dtype, tensor.shape)
            for name, tensor in manifest.tensors.items()
            if tensor.file == path.name
        }
        found = {name: (each.dtype, each.shape) for name, each in read_header(path).items()}
        if found != expected:
            name = min(
                name for name in {**found, **expected} if found.get(name) != expected.get(name)
            )
            raise CheckpointError(
                f"{path}: {printable(name)} is {found.get(name, 'missing')}; "
                f"the manifest says {expected.get(name, 'nothing')}"
            )
        _verify_digest(file, path, entry)


def _verify_size(file: Any, path: Path, entry: FileEntry) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != entry.bytes:
        raise CheckpointError(f"{path}: has {size} bytes; expected {entry.bytes}")


def _verify_digest(file: Any, path: Path, entry: FileEntry) -> None:
    file.seek(0)
    if digest_of(file) != entry.sha256:
        raise CheckpointError(
            f"{path}: SHA-256 differs from the manifest's: damaged; use another checkpoint"
        )
