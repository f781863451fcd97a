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
from common.spec.data import Corpus, check_vocabulary, load_tokenizer, tokenize
from common.spec.run import RunConfig, TransformerSpec
from common.spec.text import CorpusError, read_texts
from common.spec.tokenizer import FileTokenizer, Tokenizer, read_tokenizer

KIND, FILE = ("run", "tokenizer"), ("run", "tokenizer_file")
UNKNOWN = "bpe"
"""The tokenizer in a configuration if it is unknown and not needed."""


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint."""

    folder: Path
    manifest: Manifest

    @property
    def settings(self) -> Settings:
        """What applies if the user sets nothing."""
        saved = self.manifest
        found: dict[tuple[str, str], Any] = {
            ("model", name): getattr(saved.model, name) for name in TransformerSpec.model_fields
        }
        if saved.train is not None:
            found |= {
                ("train", name): getattr(saved.train, name)
                for name in type(saved.train).model_fields
            }
        else:
            found["train", "dtype"] = saved.dtype
        if saved.data is not None:
            for name in ("corpus", "sequence_lengths", "sequences_per_epoch"):
                found["run", name] = getattr(saved.data, name)
        return {key: Setting(value, f"the checkpoint's {key[1]}") for key, value in found.items()}

    def tokenizer(self, given: Settings) -> Settings:
        """Return the tokenizer, which the user may give only where the checkpoint has none. Raises
        UsageError.

        Any other than the training's would give its tokens another meaning.
        """
        kind = self.manifest.tokenizer_kind
        given = {
            key: given[key]
            for key in (KIND, FILE)
            if key in given and str(given[key].value).lower() != "none"
        }
        if kind is None:
            if FILE in given:
                return {KIND: Setting("file", given[FILE].where)}
            if KIND not in given:
                return {KIND: Setting(UNKNOWN, "imported"), FILE: Setting(None, "imported")}
            if given[KIND].value == "bpe":
                raise UsageError(
                    f"{given[KIND].where} = bpe: {self.folder} has weights for a vocabulary that "
                    "exists already; "
                    f"expected {FOR_IMPORTED}"
                )
            return {}
        own = f"{self.folder} has its own tokenizer ({kind})"
        if KIND in given and given[KIND].value != kind:
            raise UsageError(
                f"{given[KIND].where} = {given[KIND].value}: {own}; expected that one, which needs "
                "no option"
            )
        if FILE in given:
            where, path = given[FILE].where, Path(str(given[FILE].value))
            if (
                hashlib.sha256(read_tokenizer(path).content).hexdigest()
                != self.manifest.tokenizer_digest
            ):
                raise UsageError(
                    f"{where} = {path}: {own}, another one; expected that one, which needs "
                    "no option"
                )
        carried = str(self.folder / TOKENIZER) if self.manifest.tokenizer_digest else None
        return {
            KIND: Setting(kind, "the checkpoint's tokenizer"),
            FILE: Setting(carried, "the checkpoint's tokenizer_file"),
        }

    def check_known(self, config: RunConfig) -> None:
        """Raise UsageError if text is to be read or written and the tokenizer is unknown."""
        if self.manifest.tokenizer_kind is None and config.tokenizer == UNKNOWN:
            raise UsageError(
                f"{self.folder}: imported weights without a tokenizer; expected {FOR_IMPORTED}"
            )

    def load_tokenizer(self, config: RunConfig) -> Tokenizer:
        """Load the tokenizer of `config`. Raises UsageError, CorpusError and TokenizerError.

        The text is needed only for byte pairs that were saved without their tokenizer.
        """
        self.check_known(config)
        if config.tokenizer == "bpe" and config.tokenizer_file is None:
            return FileTokenizer(load_text(config, self).tokenizer or b"", "tokenizer bpe")
        tokenizer = load_tokenizer(config)
        check_vocabulary(tokenizer, config.model.vocab_size, f"tokenizer {config.tokenizer_file}")
        return tokenizer

    def is_trained_on(self, digest: str) -> bool:
        """Return whether this is the text of that digest; true of any text if there was none."""
        return self.manifest.data is None or self.manifest.data.corpus_digest == digest


FOR_IMPORTED = (
    "--tokenizer-file FILE with their tokenizer.json, or --tokenizer bytes if their "
    "tokens are bytes"
)


def load_text(config: RunConfig, saved: Saved | None, may_be_another: bool = False) -> Corpus:
    """Return the text of a run in tokens: with a checkpoint, the one it was trained on, unless it
    `may_be_another`.

    With a checkpoint it is the text it was trained on, unless it `may_be_another`.
    """
    if saved is not None:
        saved.check_known(config)
    trained_on = saved is not None and saved.manifest.data is not None
    try:
        text = read_texts(config.corpus)
    except CorpusError as error:
        hint = (
            "; --corpus FILE says where the text of the checkpoint lies now" if trained_on else ""
        )
        raise UsageError(f"--corpus: {error}{hint}") from None
    if saved is None or saved.is_trained_on(text.digest):
        return tokenize(config, text)
    name = " ".join(config.corpus) or f"the manual of Python {platform.python_version()}"
    wrong = (
        f"{saved.folder}: {name} is not the text that it was trained on (SHA-256 "
        f"{text.digest[:12]}..)"
    )
    if config.tokenizer == "bpe" and config.tokenizer_file is None:
        raise UsageError(
            f"{wrong}, and it has no tokenizer but by that text; expected --corpus FILE with it"
        )
    if not may_be_another:
        raise UsageError(f"{wrong}; expected that text; --corpus FILE says where it lies now")
    return tokenize(config, text)
