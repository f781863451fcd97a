"""docs/schedules.md shows what the code says today."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns import make_schedules

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "schedules.md").read_text()


@pytest.mark.parametrize("part", ["explanations", "overview", "published"])
def test_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    made: list[tuple[str, str]] = []
    monkeypatch.setattr(make_schedules, "fill", lambda name, content: made.append((name, content)))
    getattr(make_schedules, part)()
    assert made
    for name, content in made:
        assert f"<!-- made: {name} -->\n{content}\n<!-- end -->" in PAGE


def test_every_picture_and_part_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*(f"schedule-{schedule}" for schedule in make_schedules.DRAWN), "schedule-curve"):
        assert f"images/{name}.png" in PAGE
        assert (DOCS / "images" / f"{name}.png").stat().st_size > 5000
    assert make_schedules.draw_text(make_schedules.make_schedule("1f1b", 4, 8)) in PAGE
    for part in ("curve", "half-cores", "searches"):
        assert f"<!-- made: {part} -->\n| " in PAGE
