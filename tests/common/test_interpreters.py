"""Which Python runs a framework: named, found, asked what it has, and recorded."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from common.cli.main import main
from common.harness import interpreters
from common.harness.interpreters import NEEDED, InterpreterError, ask, interpreter, why_lacking
from common.oracle.reference import gelu
from common.report.names import framework_name, interpreter_name
from common.runtime.installed import cuda_in, version_in
from common.spec.run import preset
from tests.program import assert_refused

ROOT = Path(__file__).parents[2]
ALL = dict.fromkeys(("torch", "tensorflow", "paddle", *NEEDED), "2.0")


def environment(
    folder: Path, python: str = "3.12.1", packages: dict[str, str] = ALL, script: str = ""
) -> Path:
    """A folder like a virtual environment's, whose Python says that it has these packages, and
    otherwise is this one.
    """
    answer = {"python": python, "packages": packages, "cuda": "", "nccl": ""}
    path = folder / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(
        script
        or f"#!/bin/sh\ncase $1 in */installed.py) echo '{json.dumps(answer)}';;\n"
        f'*) exec {sys.executable} "$@";; esac\n'
    )
    path.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("torch", "--python torch: expected FRAMEWORK=PATH"),
        ("torch=", "--python torch=: expected FRAMEWORK=PATH"),
        ("jax=good", "--python jax=good: 'jax' is unknown; expected one of torch, tensorflow"),
        ("torch=none", "--python torch=none: no such file; expected a Python, or the folder"),
        ("torch=empty", "--python torch=empty: the folder has no bin/python"),
        ("torch=text", "Permission denied; expected a Python"),
        ("torch=other/bin/python", "does not answer as Python 3.11 does (Python 2.7.18)"),
        ("torch=endless", "does not answer as Python 3.11 does (y)"),
        ("torch=old", "old/bin/python: is Python 3.9.2; expected 3.11 or later"),
        ("torch=bare", "is not installed in {}/bare/bin/python; {}/bare/bin/python -m pip install"),
        ("torch=poor", "has torch but not psutil, 'pydantic>=2', which a worker process needs"),
        ("torch=past", "has torch but not 'pydantic>=2', which a worker process needs"),
        ("torch=good --python torch=good", "torch has two; --frameworks torch@PATH"),
        ("torch=good --frameworks torch@none", "--frameworks torch@none: no such file"),
        ("torch=good --frameworks torch@", "--frameworks torch@: expected a Python"),
        (
            "torch=good --frameworks torch,torch@a/good",
            "would both be called torch@good in the tables",
        ),
        ("torch=good --config number.toml", "number.toml: python = 3; expected a table [python]"),
        ("torch=good --config wrong.toml", "wrong.toml: [python] troch: 'troch' is unknown"),
        ("torch=good --config none.toml", "none.toml: [python] paddle: no such file"),
    ],
)
def test_a_wrong_interpreter_is_one_line_before_a_worker_starts(
    value: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    environment(tmp_path / "good")
    environment(tmp_path / "a" / "good")
    environment(tmp_path / "old", python="3.9.2")
    environment(tmp_path / "bare", packages={"numpy": "2.1"})
    environment(tmp_path / "poor", packages={"torch": "2.13", "numpy": "2", "safetensors": "1"})
    environment(tmp_path / "past", packages=ALL | {"pydantic": "1.10.24"})
    environment(tmp_path / "other", script="#!/bin/sh\necho Python 2.7.18\n")
    endless = environment(tmp_path / "more", script="#!/bin/sh\nexec yes\n") / "bin" / "python"
    (tmp_path / "endless").symlink_to(endless)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no program")
    (tmp_path / "number.toml").write_text("python = 3")
    (tmp_path / "wrong.toml").write_text('[python]\ntroch = "good"')
    (tmp_path / "none.toml").write_text('[python]\npaddle = "none"')
    status = main(["bench", "--preset", "tiny", "--python", *value.split()])
    assert_refused(status, said.replace("{}", str(tmp_path)), capsys)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "line",
    [
        "train --preset tiny --python torch=none",
        "train --preset tiny --framework torch@none",
        "dump --out x.safetensors --python torch=none",
        "bisect framework=torch@none framework=oracle",
        "drift --python torch=none",
        "doctor --rounds 0 --python torch=none",
        "doctor --rounds 0 --frameworks torch,torch@none",
    ],
)
def test_every_subcommand_that_starts_a_framework_takes_it(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(main(line.split()), "none: no such file; expected a Python", capsys)


def test_two_versions_of_a_framework_are_two_rows_of_one_benchmark(tmp_path: Path) -> None:
    """And what the file names is what the command line does not."""
    old, new = (environment(tmp_path / name) for name in ("old", "new"))
    (tmp_path / "run.toml").write_text(f'[python]\npaddle = "{old}"\ntorch = "/nowhere"')
    frameworks = f"torch,torch@{new},paddle"
    command = [sys.executable, "-m", "tests.fakes.bench", "--preset", "tiny", "--schedules", "1f1b"]
    command += ["--steps", "2", "--repeats", "1", "--out", str(tmp_path / "out")]
    command += ["--frameworks", frameworks, "--python", f"torch={old}"]
    command += ["--config", str(tmp_path / "run.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "out").iterdir()
    names = [f"{name}-1f1b-p2-m4" for name in ("torch@old", "torch@new", "paddle@old")]
    results = [json.loads((folder / name / "result.json").read_text()) for name in names]
    pythons = [f"{path}/bin/python" for path in (old, new, old)]
    assert [result["config"]["python"] for result in results] == pythons
    assert [result["parity"]["status"] for result in results] == ["pass"] * 3
    report = (folder / "report.md").read_text()
    for name, python in zip(("torch@old", "torch@new", "paddle@old"), pythons, strict=True):
        assert f"| {name} | 0.0 | 1f1b |" in report
        assert f"{name} 0.0: Python {sys.version.split()[0]} {python}" in report


def test_a_frameworks_own_environment_is_taken_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreters, "PROJECT_ROOT", tmp_path)
    environment(tmp_path / ".venv-tensorflow")
    assert interpreter("tf_impl") == sys.executable
    (tmp_path / ".venv-tensorflow" / "installed").touch()
    own = str(tmp_path / ".venv-tensorflow" / "bin" / "python")
    assert interpreter("tf_impl") == interpreter("tf_impl.roofline") == own
    assert interpreter("tf_impl", "/other/python") == "/other/python"
    assert interpreter("torch_impl") == interpreter("common.runtime.worker") == sys.executable
    assert why_lacking("tf_impl", "tensorflow", "") is None


def test_an_interpreter_says_what_it_has_without_importing_it() -> None:
    found = ask(sys.executable, "no_such_package")
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert set(found.packages) == set(NEEDED) and not found.cuda


def test_a_folder_that_pip_left_behind_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "left_behind" / "__pycache__").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "left_behind" not in ask(sys.executable, "left_behind").packages


def test_an_interpreter_without_an_answer_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = environment(tmp_path / "silent", script="#!/bin/sh\nexec sleep 1000\n")
    monkeypatch.setattr(interpreters, "ANSWER_SECONDS", 0.1)
    with pytest.raises(InterpreterError, match=r"\(nothing\)"):
        ask(str(silent / "bin" / "python"), "torch")


def test_what_a_worker_needs_is_what_it_imports() -> None:
    code = (
        "import sys, common.runtime.worker, common.runtime.ranks, common.runtime.baseline_engine, "
        "common.runtime.kernels; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {line.split(">")[0] for line in project["dependencies"]}
    assert declared & set(done.stdout.split()) == set(NEEDED)


def test_the_oracle_in_a_worker_needs_no_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.linspace(-6, 6, 97).reshape(-1, 1)
    expected = gelu(x)
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    np.testing.assert_allclose(gelu(x), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("text", "version", "cuda"),
    [
        ("__version__ = '2.14.1+cu130'\ncuda: Optional[str] = '13.0'\n", "2.14.1+cu130", "13.0"),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip = '6'\n", "2.13.0+cpu", ""),
        ("full_version     = '3.3.1'\ncuda_version     = '12.6'\n", "3.3.1", "12.6"),
        ("full_version = '3.3.1'\ncuda_version = 'False'\ncudnn_version = '9'", "3.3.1", ""),
        ("OrderedDict([('cuda_version', '12.5.1'), ('cudnn_version', '9')])", "", "12.5.1"),
        ("OrderedDict([('is_cuda_build', False)])", "", ""),
    ],
)
def test_a_wheel_says_what_it_was_built_for(text: str, version: str, cuda: str) -> None:
    assert (version_in(text), cuda_in(text)) == (version, cuda)


@pytest.mark.parametrize(
    ("python", "name"),
    [
        (None, ""),
        ("/opt/conda/envs/torch212/bin/python", "torch212"),
        ("/home/me/project/.venv/bin/python", "project/.venv"),
        ("/srv/venv/bin/python3.12", "srv/venv"),
        ("/usr/bin/python3.12", "python3.12"),
        ("/opt/python", "python"),
    ],
)
def test_an_interpreter_is_called_after_its_environment(python: str | None, name: str) -> None:
    assert interpreter_name(python) == name
    run = preset("tiny").model_copy(update={"python": python})
    assert framework_name(run) == (f"torch@{name}" if name else "torch")
