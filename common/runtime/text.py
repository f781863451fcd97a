"""The text of a job in tokens, from parent to workers by files: workers never read or tokenize.

So all workers of a run see the same text, whatever happens to its files, and its tokenizer can be
saved with the weights.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.runtime.job import Job, JobText
from common.spec.data import Corpus, load_corpus, text_key
from common.spec.run import RunConfig


class Texts:
    """The texts of the jobs of one run, each read when first asked for, then the same for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[tuple[object, ...], JobText] = {}

    def of(self, config: RunConfig) -> JobText:
        """Return the text of a run. Raises CorpusError and TokenizerError."""
        key = text_key(config)
        if key not in self.written:
            self.written[key] = write_text(load_corpus(config), self.folder, len(self.written))
        return self.written[key]

    def drop(self) -> None:
        for text in self.written.values():
            drop_tokens(text)


def write_text(corpus: Corpus, folder: Path, number: int = 0) -> JobText:
    """Write tokens, or a link to kept ones, and tokenizer.json into a folder, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f"-{number + 1}" if number else ""
    tokens, tokenizer = folder / f"tokens{suffix}.npy", folder / f"tokenizer{suffix}.json"
    try:
        tokens.unlink(missing_ok=True)  # or it would be written to what it is a link to
        kept = getattr(corpus.tokens, "filename", None)  # NumPy's, where it has mapped a file
        if kept is None or not _link(tokens, kept):
            np.save(tokens, corpus.tokens)
    except OSError as error:  # NumPy says how many numbers found no room, and not where
        raise OSError(
            error.errno or errno.ENOSPC, os.strerror(error.errno or errno.ENOSPC), str(tokens)
        ) from None
    if corpus.tokenizer is not None:
        tokenizer.write_bytes(corpus.tokenizer)
    return JobText(
        tokens=str(tokens.absolute()),  # `resolve` would name what it is a link to
        digest=corpus.digest,
        num_bytes=corpus.num_bytes,
        tokenizer=None if corpus.tokenizer is None else str(tokenizer.resolve()),
    )


def _link(path: Path, target: str) -> bool:
    """Make a link; not every disk has them."""
    with contextlib.suppress(OSError):
        path.symlink_to(target)
        return True
    return False


def drop_tokens(text: JobText) -> None:
    """Remove the tokens, which are as large as the text; the tokenizer stays."""
    Path(text.tokens).unlink(missing_ok=True)


def open_text(text: JobText) -> Corpus:
    """Open the text in a worker: tokens are memory-mapped, not read."""
    tokenizer = None if text.tokenizer is None else Path(text.tokenizer).read_bytes()
    return Corpus(np.load(text.tokens, mmap_mode="r"), text.digest, text.num_bytes, tokenizer)


@contextlib.contextmanager
def with_texts(jobs: Sequence[Job], folder: Path) -> Iterator[list[Job]]:
    """Return the jobs with texts, where they need one. Raises CorpusError and TokenizerError."""
    texts = Texts(folder)
    try:
        yield [
            job
            if job.text or job.kind == "generate"
            else job.model_copy(update={"text": texts.of(job.config)})
            for job in jobs
        ]
    finally:
        texts.drop()
