"""What a checkpoint brings to a run that starts from it: settings, tokenizer, and its text."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint import TOKENIZER, Manifest
from common.cli.settings import Setting, Settings
from common.io.usage import UsageError
from common.spec.corpus_files import CorpusError
from common.spec.data import Corpus, check_vocabulary, load_tokenizer, tokenize
from common.spec.run import RunConfig
from common.spec.text import read_texts
from common.spec.tokenizer import FileTokenizer, Tokenizer, read_tokenizer

KIND, FILE = ("run", "tokenizer"), ("run", "tokenizer_file")
UNKNOWN = "bpe"
"""The tokenizer in a configuration if it is unknown and not needed."""
FOR_IMPORTED = (
    "--tokenizer-file FILE with their tokenizer.json, or --tokenizer bytes if their "
    "tokens are bytes"
)


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint."""

    folder: Path
    manifest: Manifest

    @property
    def settings(self) -> Settings:
        """What applies if the user sets nothing."""
        saved, data = self.manifest, self.manifest.data
        parts: dict[str, dict[str, Any]] = {
            "model": dict(saved.model),
            "train": {"dtype": saved.dtype} if saved.train is None else dict(saved.train),
        }
        if data is not None:
            names = ("corpus", "sequence_lengths", "sequences_per_epoch")
            parts["run"] = {name: getattr(data, name) for name in names}
        settings = Settings()
        for section, values in parts.items():
            for name, value in values.items():
                settings.adapt(section, name, value, f"the checkpoint's {name}")
        return settings

    def tokenizer(self, given: Settings) -> Settings:
        """Return the tokenizer, which the user may give only where the checkpoint has none.

        Any other than the training's would give its tokens another meaning. Raises UsageError.
        """
        # Three cases: the weights' tokenizer is unknown; it is known and the user says the same or
        # nothing; the user says another one, which is wrong.
        own = self.manifest.tokenizer_kind
        kind, file = (
            None if setting is None or str(setting.value).lower() == "none" else setting
            for setting in (given.get(KIND), given.get(FILE))
        )
        if own is None:
            if file is not None:
                return Settings({KIND: Setting("file", file.where)})
            if kind is None:
                unknown = {KIND: UNKNOWN, FILE: None}
                return Settings({key: Setting(v, "imported") for key, v in unknown.items()})
            if kind.value == "bpe":
                raise UsageError(
                    f"{kind.where} = bpe: {self.folder} has weights for a vocabulary that exists "
                    f"already; expected {FOR_IMPORTED}"
                )
            return Settings()
        has, needed = f"{self.folder} has its own tokenizer ({own})", "which needs no option"
        if kind is not None and kind.value != own:
            raise UsageError(f"{kind.where} = {kind.value}: {has}; expected that one, {needed}")
        digest = self.manifest.tokenizer_digest
        if file is not None:
            path = Path(str(file.value))
            if hashlib.sha256(read_tokenizer(path).content).hexdigest() != digest:
                where = f"{file.where} = {path}"
                raise UsageError(f"{where}: {has}, another one; expected that one, {needed}")
        carried = {KIND: own, FILE: str(self.folder / TOKENIZER) if digest else None}
        return Settings(
            {key: Setting(value, f"the checkpoint's {key[1]}") for key, value in carried.items()}
        )

    def check_known(self, config: RunConfig) -> None:
        """Raise UsageError if text is to be read or written and the tokenizer is unknown."""
        if self.manifest.tokenizer_kind is None and config.tokenizer == UNKNOWN:
            what = f"imported weights without a tokenizer; expected {FOR_IMPORTED}"
            raise UsageError(f"{self.folder}: {what}")

    def load_tokenizer(self, config: RunConfig) -> Tokenizer:
        """Load the tokenizer; the text only for byte pairs saved without it. Raises UsageError."""
        self.check_known(config)
        if config.tokenizer == "bpe" and config.tokenizer_file is None:
            return FileTokenizer(load_text(config, self).tokenizer or b"", "tokenizer bpe")
        tokenizer = load_tokenizer(config)
        check_vocabulary(tokenizer, config.model.vocab_size, f"tokenizer {config.tokenizer_file}")
        return tokenizer

    def is_trained_on(self, digest: str) -> bool:
        """Return whether this is the text of that digest; true of any text if there was none."""
        return self.manifest.data is None or self.manifest.data.corpus_digest == digest


def load_text(config: RunConfig, saved: Saved | None, may_be_another: bool = False) -> Corpus:
    """Return a run's text in tokens: the checkpoint's own, unless it `may_be_another`."""
    if saved is not None:
        saved.check_known(config)
    trained_on = saved is not None and saved.manifest.data is not None
    hint = "; --corpus FILE says where the text of the checkpoint lies now" if trained_on else ""
    try:
        text = read_texts(config.corpus)
    except CorpusError as error:
        raise UsageError(f"--corpus: {error}{hint}") from None
    if saved is None or saved.is_trained_on(text.digest):
        return tokenize(config, text)
    name = " ".join(config.corpus) or f"the manual of Python {platform.python_version()}"
    sha = f"(SHA-256 {text.digest[:12]}..)"
    wrong = f"{saved.folder}: {name} is not the text that it was trained on {sha}"
    if config.tokenizer == "bpe" and config.tokenizer_file is None:
        raise UsageError(
            f"{wrong}, and it has no tokenizer but by that text; expected --corpus FILE with it"
        )
    if not may_be_another:
        raise UsageError(f"{wrong}; expected that text; --corpus FILE says where it lies now")
    return tokenize(config, text)
