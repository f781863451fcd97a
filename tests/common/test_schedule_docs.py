"""docs/schedules.md shows what the code says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "schedules.md").read_text()


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_schedules", DOCS / "make_schedules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", ["overview", "published"])
def test_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    module, made = maker(), []
    monkeypatch.setattr(module, "fill", lambda name, content: made.append((name, content)))
    getattr(module, part)()
    ((name, content),) = made
    assert f"<!-- made: {name} -->\n{content}\n<!-- end -->" in PAGE


def test_every_picture_and_part_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    module = maker()
    for name in (*(f"schedule-{schedule}" for schedule in module.DRAWN), "schedule-curve"):
        assert f"images/{name}.png" in PAGE
        assert (DOCS / "images" / f"{name}.png").stat().st_size > 5000
    assert module.draw_text(module.make_schedule("1f1b", 4, 8)) in PAGE
    for part in ("curve", "measured", "searches"):
        assert f"<!-- made: {part} -->\n| " in PAGE
