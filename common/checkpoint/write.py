"""Write a checkpoint: each process its shard, the process of device 0 the manifest and the rename.

    every process                                     process of device 0
    [1] shard-<device>.safetensors, then its note
                                        ───────────►  [2] wait until the notes cover every device
                                                      [3] tokenizer.json, then manifest.json
                                                      [4] rename the temporary folder into place
                                                      [5] remove checkpoints beyond the last `keep`

Until [4] everything is in `.step-....partial`, which no reader takes for a checkpoint. Each file is
flushed to the disk before whatever announces it: the shard before its note, all files before the
manifest, the folder before the rename. Where hosts share no folder, shard and note move to that of
device 0's process (`depot.py`), in this order. So after a crash or a power cut at any moment, a
folder with a checkpoint's name is a whole checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from common.checkpoint.depot import deliver
from common.checkpoint.directory import folder_name, prune
from common.checkpoint.header import digest_of
from common.checkpoint.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    CheckpointError,
    DataPosition,
    Entry,
    FileEntry,
    Manifest,
    TensorEntry,
    as_checkpoint_error,
    check_contents,
    moments_of,
)
from common.io.edges import printable, write_file
from common.spec.run import RunConfig, TransformerSpec

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes checkpoints into `directory` and keeps the last `keep`.

    Where stages are processes, each has a writer with the same `token`, which distinguishes this
    run's temporary folders from those that an earlier run may have left.
    """

    directory: Path
    keep: int
    token: str
    depot: str | None = None
    """Where the process of device 0 takes shards, if its `directory` is another one."""

    def write(
        self,
        config: RunConfig,
        steps_done: int,
        corpus_digest: str,
        devices: Sequence[int],
        weights: Mapping[str, NDArray[Any]],
        optimizer_state: Mapping[str, NDArray[Any]],
        written_by: Mapping[str, Any],
        tokenizer: bytes | None = None,
    ) -> Path | None:
        """Save what `devices` hold; return the folder in device 0's process, None in the others.

        That process waits for the others, as long as they take: whoever started them notices when
        one ends or hangs, and then ends all.

        A tied head's copy of the token embedding is left to the process that has the embedding.
        `tokenizer` is the tokenizer.json; None for bytes. Raises CheckpointError.
        """
        # A tied head has a copy of the embedding, with equal bits: one of the two is saved.
        tensors = {**weights, **optimizer_state}
        if 0 not in devices:  # device 0 has the embedding
            tensors = {name: array for name, array in tensors.items() if "embedding." not in name}
        with as_checkpoint_error(f"cannot save step {steps_done} in {self.directory}"):
            temporary = self.directory / f".{folder_name(steps_done)}.{self.token}.partial"
            temporary.mkdir(parents=True, exist_ok=True)
            try:
                written = _write_shard(temporary, devices, tensors)  # [1]
                if 0 not in devices:
                    if self.depot is not None:
                        deliver(*written, self.depot)
                    return None
                shards = _wait_for_shards(temporary, config.stages)  # [2]
                # [3], [4]
                folder = _finish(
                    temporary,
                    self.directory / folder_name(steps_done),
                    shards,
                    steps_done=steps_done,
                    model=config.model,
                    train=config.train,
                    data=_data_position(config, steps_done, corpus_digest),
                    tokenizer=_write_tokenizer(
                        temporary, b"" if config.tokenizer == "bytes" else tokenizer
                    ),
                    optimizer_state=moments_of(config.train),
                    written_by={
                        key: v
                        for key, v in written_by.items()
                        if isinstance(v, str | int | float | None)
                    },
                )
            except BaseException:  # a stop by signal too leaves nothing half-written
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            # [5] Only now: an old checkpoint goes when the new one is there.
            prune(self.directory, self.keep)
            return folder


def _data_position(config: RunConfig, steps_done: int, corpus_digest: str) -> DataPosition:
    return DataPosition(
        step=steps_done,
        seed=config.train.seed,
        corpus_digest=corpus_digest,
        corpus=config.corpus,
        tokenizer=config.tokenizer,
        sequence_lengths=config.sequence_lengths,
        sequences_per_epoch=config.sequences_per_epoch,
    )


def write_weights(
    folder: Path,
    model: TransformerSpec,
    weights: Mapping[str, NDArray[Any]],
    origin: str,
    tokenizer: bytes | None = None,
) -> Path:
    """Write a checkpoint of weights alone, at step 0. Raises CheckpointError.

    `tokenizer` is the content of their tokenizer.json, empty for bytes, None if unknown. Raises
    CheckpointError, also if `folder` exists.
    """
    with as_checkpoint_error(f"cannot write {folder}"):
        if folder.exists():
            raise CheckpointError(f"{folder}: exists; expected a new folder")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        temporary.mkdir(parents=True)
        try:
            _write_shard(temporary, (0,), weights)
            return _finish(
                temporary,
                folder,
                _wait_for_shards(temporary, 1),
                steps_done=0,
                model=model,
                train=None,
                data=None,
                optimizer_state=(),
                tokenizer=_write_tokenizer(temporary, tokenizer),
                written_by={"imported_from": printable(origin)},
            )
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _write_tokenizer(temporary: Path, content: bytes | None) -> Literal["bytes"] | FileEntry | None:
    """Write tokenizer.json, if any, and return its entry in the manifest."""
    if not content:
        return None if content is None else "bytes"
    path = temporary / TOKENIZER
    path.write_bytes(content)
    _flush(path)
    return FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class _Shard(Entry):
    """What one process reports about the file it has written."""

    devices: tuple[int, ...]
    file: str
    entry: FileEntry
    tensors: dict[str, TensorEntry]


def _write_shard(
    temporary: Path, devices: Sequence[int], tensors: Mapping[str, NDArray[Any]]
) -> tuple[Path, Path]:
    """Write the tensors, then a note that they are complete; return both files. [1]"""
    name = f"shard-{devices[0]:05}.safetensors"
    path = temporary / name
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, path)
    _flush(path)
    # Of the file as the disk has it, not of the arrays: a reader checks the same bytes.
    with path.open("rb") as file:
        digest = digest_of(file)
    entries = {
        key: TensorEntry.model_validate(
            {"file": name, "dtype": str(array.dtype), "shape": array.shape}
        )
        for key, array in tensors.items()
    }
    shard = _Shard(
        devices=tuple(devices),
        file=name,
        entry=FileEntry(bytes=path.stat().st_size, sha256=digest),
        tensors=entries,
    )
    # Renamed when whole: the process that waits must not read half a note.
    note = temporary / f".{name}.writing"
    write_file(note, shard.model_dump_json())
    return path, note.rename(temporary / f"{name}.note")


def _wait_for_shards(temporary: Path, stages: int) -> list[_Shard]:
    """Wait for the notes of all processes, which together cover every device; remove them. [2]"""
    while True:
        notes = sorted(temporary.glob("*.note"))
        shards = [_Shard.model_validate_json(note.read_text(encoding="utf-8")) for note in notes]
        # Every device once: a process may hold several, so the number of notes says nothing.
        if {device for shard in shards for device in shard.devices} == set(range(stages)):
            for note in notes:
                note.unlink()
            return shards
        time.sleep(POLL_SECONDS)


def _finish(temporary: Path, folder: Path, shards: Sequence[_Shard], **fields: Any) -> Path:
    """Write the manifest and rename the folder: from here on the checkpoint exists. [3], [4]"""
    # Each tensor from one process only: else which one a reader gets would be chance.
    names = [name for shard in shards for name in shard.tensors]
    if len(names) != len(set(names)):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CheckpointError(f"{folder}: {twice[0]} was saved by two processes")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        files={shard.file: shard.entry for shard in shards},
        tensors={name: entry for shard in shards for name, entry in shard.tensors.items()},
        **fields,
    )
    check_contents(manifest, folder)  # whatever a reader would refuse must not be written
    path = temporary / MANIFEST
    write_file(path, manifest.model_dump_json(indent=1) + "\n")
    _flush(path)
    _flush(temporary)  # the names of the files, before the folder gets its own
    temporary.rename(folder)  # [4]
    _flush(folder.parent)  # the new name itself
    return folder


def _flush(path: Path) -> None:
    """Wait until the disk has the file or folder (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
