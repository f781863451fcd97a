"""Real text, its tokens, and batches that depend on the seed and the step only."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.spec.corpus_files import CorpusError as CorpusError
from common.spec.kept import NO_CACHE, find_kept, keep
from common.spec.masked_tokens import mask_tokens
from common.spec.run import RunConfig, TransformerSpec
from common.spec.text import BLANK_LINE, LONG_BYTES, Advance, Text, read_texts
from common.spec.tokenizer import (
    BYTES,
    RECIPE,
    FileTokenizer,
    Tokenizer,
    TokenizerError,
    blocks_of,
    lines_of,
    read_content,
    read_tokenizer,
    train_byte_pairs,
)

HELD_OUT_FRACTION = 0.1
"""The end of the corpus, kept for evaluation."""

IGNORED = -1
"""A target that no loss includes: beyond its sequence's end, or not asked of an encoder."""
MASKS = ("[MASK]", "<mask>")
"""What tokenizers call the token that masks."""


@dataclass(frozen=True)
class Batch:
    """One mini-batch. `targets[b, s]` is the token that follows `inputs[b, s]`, or IGNORED; of an
    encoder the one that was there before it was masked (`Corpus.masked`).
    """

    step: int
    inputs: NDArray[np.int64]  # (B, S)
    targets: NDArray[np.int64]  # (B, S)

    @property
    def num_tokens(self) -> int:
        """The divisor of the summed loss: the targets of the whole mini-batch that count."""
        return int((self.targets != IGNORED).sum())

    def first(self, count: int) -> Batch:
        """Return its first `count` sequences."""
        return Batch(self.step, self.inputs[:count], self.targets[:count])

    def micro_batches(self, count: int) -> list[MicroBatch]:
        """`count` pieces, in order, whose sizes differ by one at most, the larger ones first (as
        `np.array_split` cuts).

        Raises ValueError if there are fewer sequences than pieces.
        """
        size = len(self.inputs)
        if not 1 <= count <= size:
            raise ValueError(
                f"{size} sequences cannot be cut into {count} micro-batches; expected 1 to {size}"
            )
        pieces = (
            np.array_split(array, count) for array in (self.inputs, self.targets, np.arange(size))
        )
        return [MicroBatch(*piece) for piece in zip(*pieces, strict=True)]

    def share(self, replica: int, replicas: int, count: int) -> list[MicroBatch]:
        """Return the `count` micro-batches of one of `replicas`: the mini-batch is cut into those
        of all of them, so every row is dealt once, and a row keeps its number wherever it goes.
        """
        first = replica * count
        return self.micro_batches(replicas * count)[first : first + count]


@dataclass(frozen=True)
class MicroBatch:
    """A piece of a mini-batch; `samples` are its rows' indices there.

    Its targets may all be IGNORED: it still goes through the pipeline, and adds nothing.
    """

    inputs: NDArray[np.int64]  # (b, S)
    targets: NDArray[np.int64]  # (b, S)
    samples: NDArray[np.int64]  # (b,)


@dataclass(frozen=True)
class Corpus:
    """Tokens, split into a training part and a held-out end."""

    tokens: NDArray[Any]  # (n,)
    """Unsigned integers of any width, perhaps mapped from a file."""
    digest: str
    """SHA-256 of the text, so that two results are known to be about the same data."""
    num_bytes: int
    tokenizer: bytes | None = None
    """The tokenizer.json that made the tokens; None for bytes."""

    @property
    def train(self) -> NDArray[Any]:  # (n,)
        return self.tokens[: self._cut]

    @property
    def held_out(self) -> NDArray[Any]:  # (n,)
        return self.tokens[self._cut :]

    @property
    def _cut(self) -> int:
        return int(len(self.tokens) * (1 - HELD_OUT_FRACTION))

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer.json; empty for bytes."""
        return "" if self.tokenizer is None else hashlib.sha256(self.tokenizer).hexdigest()

    def training_batch(self, config: RunConfig, step: int) -> Batch:
        """Return the mini-batch of `step` as `config` trains on it: (batch_size, context_length).

        Where a sequence ends early (`sequence_lengths`) or an epoch leaves fewer sequences than fit
        (`sequences_per_epoch`), the rest is token 0 and IGNORED: every framework and schedule sees
        one shape, and the gradient is that of the tokens that count.
        """
        train, length = config.train, config.model.context_length
        batch = self.batch(step, train.seed, train.batch_size, length)
        lengths = np.full(train.batch_size, length)  # (B,)
        if config.sequence_lengths == "random":
            lengths = _generator((train.seed, 2), step).integers(1, length + 1, train.batch_size)
        if config.sequences_per_epoch is not None:
            lengths[sequences_in(step, train.batch_size, config.sequences_per_epoch) :] = 0
        # A length of 3 in a context of 5: positions 3 and 4 are beyond. Of a sequence that the
        # epoch has no more, all are.
        beyond = np.arange(length) >= lengths[:, None]  # (B, S)
        batch = Batch(
            step, np.where(beyond, 0, batch.inputs), np.where(beyond, IGNORED, batch.targets)
        )
        return self.masked(batch, config.model, (train.seed, 3, step))

    def masked(
        self, batch: Batch, model: TransformerSpec, key: tuple[int, ...], first_sample: int = 0
    ) -> Batch:
        """Return the mini-batch as the model trains on it: as it is, or with masked tokens.

        What is masked is a function of (key, sample). A sequence with IGNORED targets is none of an
        encoder's: it would see what fills it up.
        """
        if model.causal:
            return batch
        inputs, targets = batch.inputs.copy(), np.full_like(batch.targets, IGNORED)
        for row in np.flatnonzero((batch.targets != IGNORED).all(1)):
            random = _generator(key, first_sample + int(row))
            seen, chosen = mask_tokens(
                batch.inputs[row], self.mask_token(model), model.vocab_size, random
            )
            inputs[row], targets[row, chosen] = seen, batch.inputs[row, chosen]
        return Batch(batch.step, inputs, targets)

    def mask_token(self, model: TransformerSpec) -> int:
        """Return the tokenizer's own, or the vocabulary's last: of bytes 255, no UTF-8."""
        return model.vocab_size - 1 if self._own_mask is None else self._own_mask

    @functools.cached_property
    def _own_mask(self) -> int | None:
        if self.tokenizer is None:
            return None
        file = json.loads(self.tokenizer)
        words = file["model"].get("vocab")  # a list where tokens have scores
        known = dict(words) if isinstance(words, dict) else {}
        known |= {token["content"]: token["id"] for token in file.get("added_tokens", ())}
        return next((known[name] for name in MASKS if name in known), None)

    def batch(self, step: int, seed: int, batch_size: int, context_length: int) -> Batch:
        """Return the mini-batch of `step`: random windows, a function of (seed, step)."""
        return _windows(self.train, step, (seed, 0), batch_size, context_length)

    def held_out_batch(self, index: int, seed: int, batch_size: int, context_length: int) -> Batch:
        """Return a mini-batch of windows of the held-out text."""
        return _windows(self.held_out, index, (seed, 1), batch_size, context_length)

    def held_out_batches(self, batch_size: int, context_length: int) -> Iterator[Batch]:
        """Yield all held-out text: each token but the first is a target once, the rest IGNORED."""
        count = len(self.held_out) - 1
        rows = -(-count // context_length)
        rows += -rows % batch_size
        # Windows side by side, each with one token more, its last target: with a context of 4,
        # targets 1 to 4, then 5 to 8, so each token is one once.
        size, shape = batch_size * context_length, (batch_size, context_length)
        for index, start in enumerate(range(0, rows * context_length, size)):
            # as many as a batch needs, at the end fewer
            tokens = self.held_out[start : start + size + 1]
            inputs, targets = np.zeros(size, np.int64), np.full(size, IGNORED)  # (B S,) each
            inputs[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
            yield Batch(index, inputs.reshape(shape), targets.reshape(shape))


def sequences_in(step: int, batch_size: int, sequences_per_epoch: int) -> int:
    """Return the sequences in the mini-batch of `step`; an epoch's last takes the rest."""
    # 10 sequences in mini-batches of 4 are 4, 4, 2, and again 4, 4, 2.
    steps_per_epoch = -(-sequences_per_epoch // batch_size)
    return min(batch_size, sequences_per_epoch - step % steps_per_epoch * batch_size)


def text_key(config: RunConfig) -> tuple[object, ...]:
    """Return what the tokens of a run's text depend on."""
    model = config.model
    return (config.corpus, config.tokenizer, config.tokenizer_file, model.vocab_size, model.causal)


def load_corpus(config: RunConfig) -> Corpus:
    """Read and tokenize the text of `config`. Raises CorpusError and TokenizerError."""
    return tokenize(config, read_texts(config.corpus))


def tokenize(config: RunConfig, text: Text) -> Corpus:
    """Tokenize `text` as `config` says. Raises CorpusError and TokenizerError."""
    path = config.tokenizer_file
    corpus = _tokenized(
        text,
        config.tokenizer,
        None if path is None else read_content(Path(path)),
        f"tokenizer {path or config.tokenizer}",
        config.model.vocab_size,
        _words(config),
    )
    needed = config.model.context_length + 1
    if min(len(corpus.train), len(corpus.held_out)) < needed:
        raise CorpusError(
            f"the corpus has {len(corpus.tokens)} tokens; expected at least "
            f"{int(needed / HELD_OUT_FRACTION) + 1}, so that a tenth of it holds one sequence of "
            f"{needed}"
        )
    mask = corpus.mask_token(config.model)
    if not config.model.causal and mask == config.model.vocab_size - 1 == corpus.tokens.max():
        raise CorpusError(
            f"the text has token {mask}, the last one, which masks the others for an encoder; "
            "expected a larger vocab_size, or UTF-8 where tokens are bytes"
        )
    return corpus


def _words(config: RunConfig) -> int:
    """Return how many tokens byte pairs may make: an encoder's last one is the mask."""
    return config.model.vocab_size - (not config.model.causal)


@functools.lru_cache(maxsize=2)  # for a process that first checks a text and then runs with it
def _tokenized(
    text: Text, kind: str, content: bytes | None, where: str, vocab_size: int, words: int
) -> Corpus:
    tokenizer = None
    if kind != "bytes":
        tokenizer = FileTokenizer(content, where) if content else _byte_pairs(text, words)
        check_vocabulary(tokenizer, vocab_size, where)

    def encoded(advance: Advance) -> Iterator[NDArray[Any]]:
        if tokenizer is None:
            yield from (np.frombuffer(chunk, np.uint8) for chunk in text.data(advance))
        else:
            end = tokenizer.end_of_text
            blocks = blocks_of(text.decoded(advance, end or BLANK_LINE), end)
            yield from tokenizer.encode_all(lines_of(blocks) if kind == "bpe" else blocks)

    def into(take: Callable[[NDArray[Any]], object]) -> None:
        with text.bar("tokenizing the corpus") as advance:
            for tokens in encoded(advance):
                take(tokens)

    dtype = np.uint8 if tokenizer is None else tokenizer.dtype
    made = None if tokenizer is None else tokenizer.content
    tokens = _kept_tokens(text, kind, made, dtype, into) if text.num_bytes >= LONG_BYTES else None
    if tokens is None:
        memory = io.BytesIO()  # pieces of an array would take twice the memory when they are joined
        into(lambda piece: memory.write(piece.data))
        tokens = np.frombuffer(memory.getbuffer(), dtype)
    return Corpus(tokens, text.digest, text.num_bytes, made)


def _kept_tokens(
    text: Text,
    kind: str,
    tokenizer: bytes | None,
    dtype: type[np.unsignedinteger[Any]],
    into: Callable[[Callable[[NDArray[Any]], object]], None],
) -> NDArray[Any] | None:
    """Map a long text's tokens from their file in the cache folder, where `into` brings them the
    first time; None where no file can be kept.
    """
    from tokenizers import __version__

    made_of = (text.digest, kind, hashlib.sha256(tokenizer or b"").hexdigest(), __version__, RECIPE)
    key = hashlib.sha256(" ".join(made_of).encode()).hexdigest()

    def write(file: io.BufferedRandom) -> None:
        count = 0

        def take(tokens: NDArray[Any]) -> None:
            nonlocal count
            count += len(tokens)
            file.write(tokens.data)

        def write_header() -> None:  # NumPy leaves room in it for any count
            what = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count,)}
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, what)

        write_header()
        into(take)
        write_header()

    try:
        path = find_kept("tokens", key, ".npy") or keep("tokens", key, ".npy", write)
        tokens: NDArray[Any] = np.load(path, mmap_mode="r")
        return tokens
    except NO_CACHE as error:
        why = f"{getattr(error, 'strerror', None) or error}; XDG_CACHE_HOME names another folder"
        print(f"note: the tokens of the corpus are not kept: {why}", file=sys.stderr)
        return None


def _byte_pairs(text: Text, vocab_size: int) -> FileTokenizer:
    with text.bar("training byte pairs") as advance:
        lines = lines_of(blocks_of(text.decoded(advance)))
        return train_byte_pairs(lines, vocab_size, text.digest)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raise TokenizerError if the model lacks tokens of the tokenizer. It may have more."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{where}: has {tokenizer.vocab_size} tokens, added and special ones included; the "
            f"model has vocab_size = {vocab_size}, expected at least {tokenizer.vocab_size}"
        )


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """Return the tokenizer that `load_corpus` uses. Raises CorpusError and TokenizerError."""
    if config.tokenizer == "bytes":
        return BYTES
    if config.tokenizer_file is not None:
        return read_tokenizer(Path(config.tokenizer_file))
    return _byte_pairs(read_texts(config.corpus), _words(config))


def _windows(
    tokens: NDArray[Any], step: int, key: tuple[int, int], batch_size: int, context_length: int
) -> Batch:
    starts = _generator(key, step).integers(0, len(tokens) - context_length, batch_size)
    # (B, S + 1)
    windows = np.asarray(tokens[starts[:, None] + np.arange(context_length + 1)], np.int64)
    return Batch(step, windows[:, :-1], windows[:, 1:])


def _generator(key: tuple[int, ...], step: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, step])))
