"""Every command that README and docs show is one that the program takes, and what ends in seconds
is run.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from common.cli import main
from tests.campaigns import __main__ as campaigns

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "README.zh-CN.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
QUICK = ("draw", "simulate")
PROGRAMS = {
    "triptych": main.main,
    ".venv/bin/triptych": main.main,
    ".venv/bin/python bench_all.py": main.bench_main,
    "python -m tests.campaigns": campaigns.main,
}


def commands() -> list[tuple[str, str]]:
    """(page, command), without comments and brackets beside it; continued lines are one."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8") if (ROOT / page).exists() else ""
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(f"({'|'.join(map(re.escape, PROGRAMS))}) [-a-z]", line):
                    found.append((page, re.split(r"\s+[#\[]", line)[0].strip()))
    return found


def test_there_are_commands() -> None:
    assert len(commands()) > 30


@pytest.mark.parametrize(("page", "command"), commands())
def test_it_is_understood(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = next(name for name in PROGRAMS if command.startswith(name + " "))
    argv = shlex.split(command.removeprefix(program))
    monkeypatch.chdir(tmp_path)
    if argv[0] not in QUICK and "--dry-run" not in argv:
        monkeypatch.setattr(
            main, "run", lambda parser, argv, is_long=False: parser.parse_args(argv) and 0
        )
    assert PROGRAMS[program](argv) == 0
