"""Real text, tokens, and batches that depend on the seed and the step only."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.spec import RunConfig

HELD_OUT_FRACTION = 0.1
"""The end of the corpus, kept for evaluation."""

IGNORED = -1
"""A target that no loss counts: what follows the end of a sequence."""


class CorpusError(ValueError):
    """A corpus that cannot be read or is too short."""


@dataclass(frozen=True)
class Batch:
    """One mini-batch. `targets[b, s]` is the token that follows `inputs[b, s]`, or IGNORED."""

    step: int
    inputs: NDArray[np.int64]  # (B, S)
    targets: NDArray[np.int64]  # (B, S)

    @property
    def num_tokens(self) -> int:
        """What the summed loss is divided by: the targets of the whole mini-batch that count."""
        return int((self.targets != IGNORED).sum())

    def first(self, count: int) -> Batch:
        """Its first `count` sequences."""
        return Batch(self.step, self.inputs[:count], self.targets[:count])

    def micro_batches(self, count: int) -> list[MicroBatch]:
        """`count` pieces, in order, whose sizes differ by one at most, the larger ones first (as `np.array_split` cuts).

        Raises ValueError if there are fewer sequences than pieces.
        """
        size = len(self.inputs)
        if not 1 <= count <= size:
            raise ValueError(f"{size} sequences cannot be cut into {count} micro-batches; expected 1 to {size}")
        pieces = (np.array_split(array, count) for array in (self.inputs, self.targets, np.arange(size)))
        return [MicroBatch(*piece) for piece in zip(*pieces, strict=True)]


@dataclass(frozen=True)
class MicroBatch:
    """A piece of a mini-batch; `samples` are its rows' indices there.

    Its targets may all be IGNORED: it still goes through the pipeline, and adds nothing to loss and gradients.
    """

    inputs: NDArray[np.int64]  # (b, S)
    targets: NDArray[np.int64]  # (b, S)
    samples: NDArray[np.int64]  # (b,)


@dataclass(frozen=True)
class Corpus:
    """Tokens, split into a training part and a held-out end."""

    train: NDArray[np.int64]  # (n,)
    held_out: NDArray[np.int64]  # (n,)
    digest: str
    """SHA-256 of the text, so that two results are known to be about the same data."""
    num_bytes: int

    def training_batch(self, config: RunConfig, step: int) -> Batch:
        """The mini-batch of `step` as `config` trains on it, always (batch_size, context_length).

        Where a sequence ends early (`sequence_lengths`) or an epoch leaves fewer sequences than fit
        (`sequences_per_epoch`), the rest is token 0 and IGNORED: every framework and schedule sees one shape, and the
        gradient is that of the tokens that count.
        """
        train, length = config.train, config.model.context_length
        batch = self.batch(step, train.seed, train.batch_size, length)
        lengths = np.full(train.batch_size, length)
        if config.sequence_lengths == "random":
            lengths = _generator((train.seed, 2), step).integers(1, length + 1, train.batch_size)
        if config.sequences_per_epoch is not None:
            lengths[sequences_in(step, train.batch_size, config.sequences_per_epoch) :] = 0
        beyond = np.arange(length) >= lengths[:, None]  # (B, S)
        return Batch(step, np.where(beyond, 0, batch.inputs), np.where(beyond, IGNORED, batch.targets))

    def batch(self, step: int, seed: int, batch_size: int, context_length: int) -> Batch:
        """The training mini-batch of `step`: random windows, a function of (seed, step) only."""
        return _windows(self.train, step, (seed, 0), batch_size, context_length)

    def held_out_batch(self, index: int, seed: int, batch_size: int, context_length: int) -> Batch:
        """A mini-batch of windows of the held-out text."""
        return _windows(self.held_out, index, (seed, 1), batch_size, context_length)

    def held_out_batches(self, batch_size: int, context_length: int) -> Iterator[Batch]:
        """The whole held-out text, every token but the first a target once; what fills up the last batch is IGNORED."""
        count = len(self.held_out) - 1
        rows = -(-count // context_length)
        rows += -rows % batch_size
        inputs, targets = np.zeros(rows * context_length, np.int64), np.full(rows * context_length, IGNORED)
        inputs[:count], targets[:count] = self.held_out[:-1], self.held_out[1:]
        for index, start in enumerate(range(0, rows * context_length, batch_size * context_length)):
            piece = slice(start, start + batch_size * context_length)
            shape = (batch_size, context_length)
            yield Batch(index, inputs[piece].reshape(shape), targets[piece].reshape(shape))


def sequences_in(step: int, batch_size: int, sequences_per_epoch: int) -> int:
    """How many sequences the mini-batch of `step` has: the last one of an epoch takes what is left."""
    steps_per_epoch = -(-sequences_per_epoch // batch_size)
    return min(batch_size, sequences_per_epoch - step % steps_per_epoch * batch_size)


def load_corpus(config: RunConfig) -> Corpus:
    """Reads and tokenizes the text of `config`. Raises CorpusError."""
    data = _read(config.corpus)
    tokens = _bytes_as_tokens(data) if config.tokenizer == "bytes" else _byte_pairs(data, config.model.vocab_size)
    cut = int(len(tokens) * (1 - HELD_OUT_FRACTION))
    needed = config.model.context_length + 1
    if min(cut, len(tokens) - cut) < needed:
        raise CorpusError(
            f"the corpus has {len(tokens)} tokens; right would be at least {int(needed / HELD_OUT_FRACTION) + 1}, "
            f"so that a tenth of it holds one sequence of {needed}"
        )
    return Corpus(tokens[:cut], tokens[cut:], hashlib.sha256(data).hexdigest(), len(data))


def _read(paths: Sequence[str]) -> bytes:
    if not paths:
        topics: dict[str, str] = pydoc_data.topics.topics
        return "\n".join(topics[name] for name in sorted(topics)).encode()
    pieces = []
    for path in paths:
        try:
            if not stat.S_ISREG(Path(path).stat().st_mode):  # a device or a pipe may never end
                raise CorpusError(f"corpus {path}: not a plain file; right would be a readable text file")
            pieces.append(Path(path).read_bytes())
        except OSError as error:
            raise CorpusError(f"corpus {path}: {error.strerror}; right would be a readable text file") from None
    return b"\n".join(pieces)


def _bytes_as_tokens(data: bytes) -> NDArray[np.int64]:
    return np.frombuffer(data, np.uint8).astype(np.int64)


def _byte_pairs(data: bytes, vocab_size: int) -> NDArray[np.int64]:
    lines = _lines(data)
    encoded = _trained_byte_pairs(lines, vocab_size).encode_batch(lines)
    return np.asarray([token for line in encoded for token in line.ids], np.int64)


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", errors="replace").splitlines(keepends=True)


def _trained_byte_pairs(lines: list[str], vocab_size: int) -> Any:
    """Byte-pair encoding (Sennrich et al. 2016) trained on the corpus itself; deterministic."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer: Any = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(lines, vocab_size=vocab_size, show_progress=False)
    return tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that `load_corpus` uses. Raises CorpusError."""
    if config.tokenizer == "bytes":
        return Tokenizer(
            lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode("utf-8", errors="replace")
        )
    return _wrapped(_trained_byte_pairs(_lines(_read(config.corpus)), config.model.vocab_size))


def read_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json` as the tokenizers library writes it. Raises CorpusError."""
    from tokenizers import Tokenizer as FromFile

    try:
        return _wrapped(FromFile.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # the library raises plain Exceptions
        raise CorpusError(f"{path}: {error}; right would be a tokenizer.json") from None


def _wrapped(tokenizer: Any) -> Tokenizer:
    return Tokenizer(lambda text: list(tokenizer.encode(text).ids), lambda tokens: str(tokenizer.decode(list(tokens))))


def _windows(tokens: NDArray[np.int64], step: int, key: tuple[int, int], batch_size: int, context_length: int) -> Batch:
    starts = _generator(key, step).integers(0, len(tokens) - context_length, batch_size)
    windows = tokens[starts[:, None] + np.arange(context_length + 1)]  # (B, S + 1)
    return Batch(step, windows[:, :-1], windows[:, 1:])


def _generator(key: tuple[int, int], step: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, step])))
