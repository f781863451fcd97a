"""CONTRIBUTING.md names files and names that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_file_it_names_exists() -> None:
    named = set(
        re.findall(r"`((?:common|torch_impl|tf_impl|paddle_impl|tests|docs)/[\w./-]*)`", TEXT)
    )
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_name_it_gives_is_in_its_file() -> None:
    for file, name in re.findall(r"`([\w/]+\.py)`: [^\n]*`([A-Z_]{5,}|TransformerSpec)`", TEXT):
        assert name in (ROOT / file).read_text(encoding="utf-8"), (file, name)
