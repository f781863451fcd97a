"""What a checkpoint holds, and whether a run may continue from it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from common.io.edges import OsText, printable
from common.io.usage import UsageError
from common.spec.parameters import parameter_shapes
from common.spec.run import RunConfig, TrainSpec, TransformerSpec

Arrays = dict[str, NDArray[Any]]

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 has no tokenizer: byte pairs are trained again from the text with its digest."""
TOKENIZER = "tokenizer.json"
MANIFEST = "manifest.json"
MAX_HEADER_BYTES = 16 * 2**20
"""Largest header of a safetensors file. A model with 1000 blocks needs about 8 MB."""
SHARD = re.compile(r"shard-[0-9]{5}\.safetensors")

Dtype = Literal["float32", "float64"]
Moment = Literal["first_moment", "second_moment"]
ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float64": 8}


class CheckpointError(UsageError):
    """A checkpoint that cannot be written or must not be read; its text is one line."""


class Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class FileEntry(Entry):
    """One shard."""

    bytes: int = Field(ge=8)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorEntry(Entry):
    """One tensor and the shard it is in."""

    file: str
    dtype: Dtype
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(max_length=2)


class DataPosition(Entry):
    """The training's position in its text; batches depend on (seed, step) only."""

    step: int = Field(ge=0)
    seed: int = Field(ge=0)
    corpus_digest: str = Field(max_length=64)
    corpus: tuple[OsText, ...]
    tokenizer: Literal["bytes", "bpe", "file"]
    """How the text became tokens; bpe: byte pairs trained on it (`common.spec.tokenizer`)."""
    sequence_lengths: Literal["full", "random"]
    sequences_per_epoch: int | None


class Manifest(Entry):
    """What a checkpoint holds.

    `steps_done` is also where learning rate and dropout masks are: they depend on the step alone.
    """

    schema_version: int
    steps_done: int = Field(ge=0)
    model: TransformerSpec
    train: TrainSpec | None
    """None for imported weights, which were not trained here."""
    data: DataPosition | None
    tokenizer: Literal["bytes"] | FileEntry | None = None
    """One of bytes, or the entry of tokenizer.json in the folder; None if unknown."""
    optimizer_state: tuple[Moment, ...]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    written_by: dict[str, str | int | float | bool | None]
    """Framework and versions, for information only."""

    def without_training(self) -> Manifest:
        """Return its weights alone, from which another training may start."""
        alone = {"steps_done": 0, "train": None, "data": None, "optimizer_state": ()}
        return self.model_copy(update=alone)

    @property
    def tokenizer_kind(self) -> Literal["bytes", "bpe", "file"] | None:
        """None for imported weights with an unknown tokenizer."""
        if self.data is not None:
            return self.data.tokenizer
        return None if self.tokenizer is None else "bytes" if self.tokenizer == "bytes" else "file"

    @property
    def tokenizer_digest(self) -> str | None:
        """SHA-256 of tokenizer.json; empty for bytes, None if the checkpoint has none."""
        if isinstance(self.tokenizer, FileEntry):
            return self.tokenizer.sha256
        return "" if self.tokenizer_kind == "bytes" else None

    @property
    def dtype(self) -> Dtype:
        """Precision of the weights and moments."""
        return next(iter(self.tensors.values())).dtype


def tensor_shapes(model: TransformerSpec, moments: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors: the weights, and each moment of each weight."""
    shapes = parameter_shapes(model)
    return shapes | {
        f"{moment}/{name}": shape for moment in moments for name, shape in shapes.items()
    }


def moments_of(train: TrainSpec) -> tuple[Moment, ...]:
    """Return what the optimizer keeps between steps."""
    if train.optimizer == "adamw":
        return ("first_moment", "second_moment")
    return ("first_moment",) if train.momentum else ()


def check_contents(manifest: Manifest, folder: Path) -> None:
    """Check that the tensors match the specification, and the files the tensors.

    Each tensor is in one file, and no file is larger than its tensors. Raises CheckpointError.
    """

    def wrong(text: str) -> CheckpointError:
        return CheckpointError(f"{folder}: {text}")

    # From here on every check is of what the file says against what the specification implies;
    # nothing is allocated for it yet.
    train, moments = manifest.train, manifest.optimizer_state
    if manifest.data is not None and manifest.data.step != manifest.steps_done:
        raise wrong(f"data stands at step {manifest.data.step}, the rest at {manifest.steps_done}")
    if manifest.steps_done and (train is None or moments != moments_of(train)):
        raise wrong(
            f"optimizer_state = {list(moments)} after {manifest.steps_done} steps; the optimizer "
            "has other moments"
        )
    # Before the shapes are listed: a specification is small, its list of shapes may not be.
    if manifest.model.num_layers > len(manifest.tensors):
        raise wrong(f"{manifest.model.num_layers} blocks, but {len(manifest.tensors)} tensors")
    expected = tensor_shapes(manifest.model, moments)
    if set(manifest.tensors) != set(expected):
        name = min(set(manifest.tensors) ^ set(expected))
        raise wrong(
            f"{printable(name)} is "
            f"{'not part of the model' if name in manifest.tensors else 'missing'}"
        )
    # What the tensors of each file take together, to be held against the file's size.
    size = dict.fromkeys(manifest.files, 0)
    dtype = manifest.dtype if train is None else train.master_dtype
    for name, entry in manifest.tensors.items():
        if entry.shape != expected[name]:
            raise wrong(f"{name} has shape {list(entry.shape)}; expected {list(expected[name])}")
        if entry.dtype != dtype:
            raise wrong(f"{name} has dtype {entry.dtype}; expected {dtype}")
        if entry.file not in size:
            raise wrong(f"{name} is in {printable(entry.file)}, which is no file of the checkpoint")
        size[entry.file] += math.prod(entry.shape) * ITEM_BYTES[dtype]
    for name, content in size.items():
        if not SHARD.fullmatch(name):
            raise wrong(f"file {printable(name)}; expected shard-NNNNN.safetensors")
        # A safetensors file is 8 bytes of length, the header, and the tensors without a gap.
        extra = manifest.files[name].bytes - content
        if not 8 <= extra <= 8 + MAX_HEADER_BYTES:
            raise wrong(
                f"{name} has {manifest.files[name].bytes} bytes; its tensors have {content}"
            )


MAY_CHANGE = ("micro_batches",)
"""Fields of `TrainSpec` that do not change what is learned."""
NOT_OF_THE_WEIGHTS = ("dropout", "dropout_masks")
"""Fields of `TransformerSpec` about training, not about what the weights mean."""


def differences(manifest: Manifest, config: RunConfig) -> list[str]:
    """Return what keeps `config` from going on from the checkpoint, one line each; none if it can.

    Framework, stages, chunks, schedule, partition, micro-batches, recomputation, device and threads
    are free. So is the number of steps if the learning rate does not depend on it. From weights
    alone (`without_training`) any training may start, in any precision and with any dropout.
    """
    if manifest.train is None:
        return _differing("model", manifest.model, config.model, NOT_OF_THE_WEIGHTS)
    lines = _differing("model", manifest.model, config.model, ())
    # A schedule that falls until the last step is another one with more steps.
    steps = ("steps",) if manifest.train.learning_rate_schedule == "constant" else ()
    lines += _differing("train", manifest.train, config.train, (*MAY_CHANGE, *steps))
    if manifest.data is not None:
        for name in ("tokenizer", "sequence_lengths", "sequences_per_epoch"):
            saved, asked = getattr(manifest.data, name), getattr(config, name)
            if saved != asked:
                lines.append(f"{name}: the checkpoint has {saved}, the run {asked}")
    return lines


def _differing(section: str, saved: BaseModel, asked: BaseModel, free: Iterable[str]) -> list[str]:
    return [
        f"{section}.{name}: the checkpoint has {getattr(saved, name)}, the run "
        f"{getattr(asked, name)}"
        for name in type(saved).model_fields
        if name not in free and getattr(saved, name) != getattr(asked, name)
    ]


def one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(printable(str(part)) for part in first["loc"][:6])
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror or error}") from error
    except (SafetensorError, ValidationError, ValueError) as error:
        raise CheckpointError(f"{what}: {one_line(error)}") from error
