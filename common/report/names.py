"""What distinguishes runs, in words: besides framework, schedule and sizes, only non-defaults."""

from __future__ import annotations

from common.spec.run import RunConfig


def dropout_words(config: RunConfig) -> str:
    """Return `none`, `shared 0.1` or `native 0.1`; the rounding to float32 is not shown."""
    model = config.model
    return f"{model.dropout_masks} {model.dropout:.6g}" if model.dropout else "none"


def variant(
    dtype: str, track: str, recompute: str, dropout: str, sequence_lengths: str, drift: str
) -> list[str]:
    """Return the words for everything that is not the default, for names of rows."""
    return [
        dtype if dtype != "float32" else "",
        f"recompute={recompute}" if recompute != "none" else "",
        f"{dropout.split()[0]}-dropout" if dropout.startswith("native") else "",
        f"{sequence_lengths}-lengths" if sequence_lengths != "full" else "",
        f"drift={drift}" if drift else "",
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
    )
    return [word for word in words if word]
