"""The import rules: `common` knows no framework, an implementation only its own, bench_all none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORK_OF = {"torch_impl": {"torch"}, "tf_impl": {"tensorflow", "keras"}, "paddle_impl": {"paddle"}}
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


def test_imports_point_one_way_inside_common() -> None:
    below = {
        "bounded": set(),
        "edges": set(),
        "figure": set(),
        "schedule": {"schedule", "bounded", "edges", "figure"},
        "spec": {"rounding", "schedule", "edges"},
        "weights": {"spec"},
        "partition": {"spec", "weights", "schedule"},
        "text": set(),
        "tokenizer": {"bounded"},
        "data": {"spec", "text", "tokenizer"},
        "parity": set(),
        "dropout": set(),
        "reference": {"spec", "weights", "data", "parity", "dropout"},
        "snapshot": {"snapshot", "spec", "weights", "edges"},
        "exchange": {"exchange", "snapshot", "spec", "weights", "edges", "rounding", "streams"},
    }
    for room, allowed in below.items():
        path = ROOT / "common" / room
        for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            used = {name.split(".")[1] for name in imported(file) if name.startswith("common.")}
            assert used <= allowed, f"{file} imports {used - allowed}"
    for file in (ROOT / "common" / "runtime").rglob("*.py"):
        assert not any(name.startswith(("common.report", "common.cli")) for name in imported(file)), file


def test_cpus_are_counted_in_one_place() -> None:
    """But for the physical cores of the report's machine, which are no measure of what a run may use."""
    rooms = [path for room in ("common", *FRAMEWORK_OF) for path in (ROOT / room).rglob("*.py")]
    counting = {str(path.relative_to(ROOT)) for path in rooms if re.search("cpu_count|affinity", path.read_text())}
    assert counting == {"common/runtime/cpus.py", "common/report/machine.py"}


def test_only_tests_in_a_process_of_their_own_import_a_framework() -> None:
    home = {"torch": "torch_impl", "tensorflow": "tf_impl", "paddle": "paddle_impl"}
    for path in (ROOT / "tests").rglob("*.py"):
        folder = path.relative_to(ROOT / "tests").parts[0]
        own = home.get(folder, "")
        found = top(imported(path))
        assert found & FRAMEWORKS <= FRAMEWORK_OF.get(own, {"torch"} if folder == "children" else set()), path
        assert found & set(FRAMEWORK_OF) <= {own} or folder == "children", path
