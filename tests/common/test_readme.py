"""README.md and README.zh-CN.md: the same commands and figures, those of results/example."""

from __future__ import annotations

import re

from common.spec.habits import DRIFTS
from tests.campaigns.make_readme import PAGES, table
from tests.common.test_mirror import shared_modules

ENGLISH, CHINESE = (page.read_text(encoding="utf-8") for page in PAGES)


def code(text: str) -> list[str]:
    """All lines of code, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.split("#")[0].rstrip() for block in blocks for line in block.splitlines()]


def test_both_show_the_same_commands_figures_and_links() -> None:
    assert code(ENGLISH) == code(CHINESE) and len(code(ENGLISH)) > 25
    for pattern in (r"\d[\d.,]*", r"\]\(([^)]*)\)", r"(?<!`)`[^`\n]+`(?!`)"):
        each = [
            sorted(re.findall(pattern, re.sub(r"README[\w.-]*", "", text)))
            for text in (ENGLISH, CHINESE)
        ]
        assert each[0] == each[1], pattern


def test_the_table_is_that_of_the_example() -> None:
    for text in (ENGLISH, CHINESE):
        assert f"<!-- made: table -->\n{table()}\n<!-- end -->" in text
    assert ENGLISH.count("\n") < 120


def test_what_it_counts_is_so_many() -> None:
    assert f"share {len(shared_modules())} files" in ENGLISH
    assert f"{len(DRIFTS)} habits" in ENGLISH
