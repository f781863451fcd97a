"""What distinguishes runs, in words: besides framework, schedule and sizes, only non-defaults."""

from __future__ import annotations

from pathlib import PurePosixPath

from common.spec.run import RunConfig

COMMON_FOLDERS = ("venv", "env")
"""Names that so many environments have that they tell nothing."""


def interpreter_name(python: str | None) -> str:
    """Return a short name of an interpreter: its environment's folder, or its own; or nothing."""
    if python is None:
        return ""
    path = PurePosixPath(python)
    folder = path.parent.parent
    # /usr/bin/python3.12 is in no environment of its own, and is called by its own name.
    if path.parent.name != "bin" or folder.name in ("", "usr", "local"):
        return path.name
    if folder.name.startswith(".") or folder.name in COMMON_FOLDERS:
        return "/".join(folder.parts[-2:]).lstrip("/")
    return folder.name


def framework_name(config: RunConfig) -> str:
    """Return `torch`, or `torch@NAME` where the user has named an interpreter."""
    return "@".join(filter(None, [config.framework, interpreter_name(config.python)]))


def dropout_words(config: RunConfig) -> str:
    """Return `none`, `shared 0.1` or `native 0.1`; the rounding to float32 is not shown."""
    model = config.model
    return f"{model.dropout_masks} {model.dropout:.6g}" if model.dropout else "none"


def shards_word(config: RunConfig) -> str:
    """Return `t=2`, or `t=2-vocab` where the vocabulary is cut too; empty for whole matrices."""
    t = config.tensor_parallel
    return f"t={t}" + "-vocab" * config.vocab_parallel if t > 1 else ""


def variant(
    dtype: str,
    track: str,
    recompute: str,
    dropout: str,
    sequence_lengths: str,
    drift: str,
    compress: str,
) -> list[str]:
    """Return the words for everything that is not the default, for names of rows."""
    return [
        dtype if dtype != "float32" else "",
        f"recompute={recompute}" if recompute != "none" else "",
        f"{dropout.split()[0]}-dropout" if dropout.startswith("native") else "",
        f"{sequence_lengths}-lengths" if sequence_lengths != "full" else "",
        f"drift={drift}" if drift else "",
        f"compress={compress}" if compress != "none" else "",
        track if track != "matched" else "",
    ]


def variant_of(config: RunConfig) -> list[str]:
    """Return the same for a configuration, without empty words."""
    words = variant(
        dtype=config.train.dtype,
        track=config.track,
        recompute=config.recompute,
        dropout=dropout_words(config),
        sequence_lengths=config.sequence_lengths,
        drift=config.drift or "",
        compress=config.compress,
    )
    return [word for word in words if word]
