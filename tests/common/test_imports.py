"""The import rules: `common` knows no framework, an implementation only its own, bench_all none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORK_OF = {
    "torch_impl": {"torch"},
    "tf_impl": {"tensorflow", "keras"},
    "paddle_impl": {"paddle"},
}
ALONE = ("references", "campaigns")
"""Folders whose files run in processes of their own."""

FRAMEWORKS = set().union(*FRAMEWORK_OF.values())


def imported(path: Path) -> set[str]:
    """Full names of all modules that the file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", ["common", "bench_all.py", "torch_impl", "tf_impl", "paddle_impl"])
def test_who_may_import_a_framework_or_an_implementation(room: str) -> None:
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        found = top(imported(path))
        assert found & FRAMEWORKS <= FRAMEWORK_OF.get(room, set()), path
        assert found & set(FRAMEWORK_OF) <= {room}, path


ROOMS = ("io", "schedule", "spec", "oracle", "checkpoint", "runtime", "report", "harness", "cli")
"""From the bottom to the top: a room imports itself and the rooms before it."""


def test_no_room_of_common_imports_a_room_above_it() -> None:
    rooms = {path.name for path in (ROOT / "common").iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(ROOMS) and [path.name for path in (ROOT / "common").glob("*.py")] == [
        "__init__.py"
    ]
    for height, room in enumerate(ROOMS):
        for file in (ROOT / "common" / room).rglob("*.py"):
            used = {name.split(".")[1] for name in imported(file) if name.startswith("common.")}
            assert used <= set(ROOMS[: height + 1]), (
                f"{file} imports {used - set(ROOMS[: height + 1])}"
            )


def test_only_the_command_line_knows_argparse_and_only_the_harness_starts_workers() -> None:
    for file in (ROOT / "common").rglob("*.py"):
        room = file.relative_to(ROOT / "common").parts[0]
        assert room == "cli" or "argparse" not in imported(file), file
        starts = {"subprocess.Popen", "subprocess"} & imported(file) and "Popen" in file.read_text()
        assert room == "harness" or not starts, file


def test_cpus_are_counted_in_one_place() -> None:
    """But for the physical cores of the report's machine, which are no measure of what a run may
    use.
    """
    rooms = [path for room in ("common", *FRAMEWORK_OF) for path in (ROOT / room).rglob("*.py")]
    counting = {
        str(path.relative_to(ROOT))
        for path in rooms
        if re.search("cpu_count|affinity", path.read_text())
    }
    assert counting == {"common/runtime/cpus.py", "common/report/machine.py"}


def test_only_tests_in_a_process_of_their_own_import_a_framework() -> None:
    home = {"torch": "torch_impl", "tensorflow": "tf_impl", "paddle": "paddle_impl"}
    for path in (ROOT / "tests").rglob("*.py"):
        folder = path.relative_to(ROOT / "tests").parts[0]
        own = home.get(folder, "")
        found = top(imported(path))
        assert found & FRAMEWORKS <= FRAMEWORK_OF.get(
            own, {"torch"} if folder in ALONE else set()
        ), path
        assert found & set(FRAMEWORK_OF) <= {own} or folder in ALONE, path
