"""`python -m tests.campaigns.measure_code`: the shape of the code in numbers, as a table."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

from tests.common.test_mirror import IMPLEMENTATIONS, ROOT, in_all, public_names, shared_modules

FOLDERS = ("common", *IMPLEMENTATIONS)
LONG_LINE = 100
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
OF_A_PACKAGE = ("__init__", "__main__")


def files(folder: str) -> list[Path]:
    """Return the Python files of a folder, at any depth."""
    return sorted((ROOT / folder).rglob("*.py"))


def lines(folder: str) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files(folder))


def per_100_lines(folder: str, count: int) -> str:
    return f"{100 * count / lines(folder):.1f}"


def comments(path: Path) -> int:
    """Return how many comments a file has."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def comprehensions(path: Path) -> int:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree))


def long_lines(path: Path) -> int:
    return sum(len(line) > LONG_LINE for line in path.read_text(encoding="utf-8").splitlines())


def shared_names(implementation: str) -> str:
    """Return which share of its public names, in the modules of all three, all three have."""
    shared, own = 0, 0
    for module in shared_modules():
        names = set(public_names(implementation, module))
        shared, own = shared + len(names & in_all(module)), own + len(names)
    return f"{100 * shared / own:.0f}"


def main() -> None:
    """Print the table."""
    rows: list[tuple[str, list[str]]] = []
    for title, count in (
        ("comments per 100 lines", comments),
        ("comprehensions per 100 lines", comprehensions),
        (f"lines over {LONG_LINE} characters, %", long_lines),
    ):
        rows.append((title, [per_100_lines(f, sum(map(count, files(f)))) for f in FOLDERS]))
    rows.append(("lines", [f"{lines(folder):,}" for folder in FOLDERS]))
    rows.append(("public names shared by all three, %", ["-", *map(shared_names, IMPLEMENTATIONS)]))
    print(f"| | {' | '.join(FOLDERS)} |\n| --- |{' ---: |' * len(FOLDERS)}")
    for title, cells in rows:
        print(f"| {title} | {' | '.join(cells)} |")
    stems = [path.stem for folder in FOLDERS for path in files(folder)]
    often = {name: n for name, n in Counter(stems).items() if n > 3 and name not in OF_A_PACKAGE}
    print(f"\nmodules of one name in more than three places: {often or 'none'}")
    top = list((ROOT / "common").glob("*.py"))
    rooms = [path for path in (ROOT / "common").iterdir() if (path / "__init__.py").exists()]
    print(f"files at the top of common/: {len(top)}, folders: {len(rooms)}")


if __name__ == "__main__":
    main()
