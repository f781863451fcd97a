"""Which Python runs a framework, what it has, and how it is started.

In order: the one that the user names (`RunConfig.python`), that of the framework's own environment
beside the project (`make install GPU=1` makes them), and this one. A named one is a stranger: it
gets this project's source through PYTHONPATH, and is asked what it has before a worker starts.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.runtime import inherited
from common.runtime import installed as question
from common.runtime.parent import PARENT
from common.spec.gpus import Gpu, why_no_gpu

PROJECT_ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENTS = {
    "torch_impl": ".venv-torch",
    "tf_impl": ".venv-tensorflow",
    "paddle_impl": ".venv-paddle",
}
"""Of each implementation: two frameworks' CUDA wheels own the same files, so none is shared."""

NEEDED = {"numpy": 0, "psutil": 0, "pydantic": 2, "safetensors": 0}
"""What a worker imports besides its framework, with the least major version."""

LEAST_PYTHON = (3, 11)
ANSWER_SECONDS = 60.0
ANSWER_BYTES = 2**16

ONE_THREAD = ("common.runtime.oracle_worker", "common.runtime.rounded_oracle")
"""Workers whose library would wait busily with more."""


class InterpreterError(ValueError):
    """A Python that cannot run a worker; one line."""


@dataclass(frozen=True)
class Answer:
    """What an interpreter has."""

    python: str
    packages: Mapping[str, str]
    """Versions, of those that were asked for and are there."""
    cuda: str
    """That the framework was built for; empty for a CPU build."""
    nccl: str
    """Empty if it came with no wheel."""


def interpreter(module: str, named: str | None = None) -> str:
    """Return the path of the Python that runs an implementation's module."""
    if named is not None:
        return named
    environment = PROJECT_ROOT / ENVIRONMENTS.get(module.partition(".")[0], "/")
    # The mark comes last: a half-made environment is not taken.
    return (
        str(environment / "bin/python") if (environment / "installed").exists() else sys.executable
    )


def find_interpreter(text: str) -> str:
    """Return the path of a Python, an environment's folder or a command, or InterpreterError."""
    path = Path(text).expanduser()
    command = shutil.which(text) if path.name == text and not path.exists() else None
    # Not resolved: a link to another Python is what makes a virtual environment.
    path = Path(command or path).absolute()
    if path.is_dir():
        path = path / "bin" / "python"
        if not path.exists():
            raise InterpreterError(f"the folder has no bin/python; expected {EXPECTED}")
    if not path.exists():
        raise InterpreterError(f"no such file; expected {EXPECTED}")
    return str(path)


EXPECTED = "a Python, or the folder of an environment"


@functools.cache
def ask(python: str, package: str) -> Answer:
    """Ask a Python what it has of `package` and of a worker's needs. Raises InterpreterError."""
    said = _answer(python, [package, *NEEDED, *(["common"] if _is_installed() else [])])
    try:
        found = Answer(**json.loads(said.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        last = (said.strip().splitlines() or ["nothing"])[-1][:200]
        raise InterpreterError(
            f"does not answer as Python {_least()} does ({last}); expected {EXPECTED}"
        ) from None
    if tuple(map(int, found.python.split(".")[:2])) < LEAST_PYTHON:
        raise InterpreterError(f"is Python {found.python}; expected {_least()} or later")
    return found


def _least() -> str:
    return ".".join(map(str, LEAST_PYTHON))


def _answer(python: str, packages: list[str]) -> str:
    """What the Python prints; what is no Python may print without end, or never."""
    try:
        process = subprocess.Popen(
            [python, str(Path(question.__file__)), *packages],
            env=worker_environment("", python),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise InterpreterError(f"{error.strerror}; expected {EXPECTED}") from None
    timer = threading.Timer(ANSWER_SECONDS, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        return process.stdout.read(ANSWER_BYTES)
    finally:
        timer.cancel()
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Installation:
    """What there is of one framework, and what to do about it."""

    interpreter: str
    answer: Answer | None
    """None where the Python does not answer."""
    version: str
    """Of the framework; empty if it is not there."""
    advice: str
    """Empty if nothing is to be done."""


def installation(
    module: str, package: str, install: str, named: str | None, gpus: Sequence[Gpu]
) -> Installation:
    """Look for a framework, importing nothing of it."""
    python = interpreter(module, named)
    lacking = why_lacking(module, package, install, named)
    try:
        answer = ask(python, package)
    except InterpreterError:
        answer = None
    version = answer.packages.get(package, "") if answer else ""
    advice = lacking or ""
    if answer and not lacking and gpus:
        name = f"{package} {version}"
        why = why_no_gpu(answer.cuda, gpus)
        if why is None and package == "tensorflow" and not answer.nccl:
            why = "it has no CUDA libraries beside it; expected tensorflow[and-cuda]"
        advice = f"{name}: {why}" if why else ""
    return Installation(python, answer, version, advice)


def why_lacking(module: str, package: str, install: str, named: str | None = None) -> str | None:
    """Return why the implementation's interpreter cannot run it, and what to do; None if it can."""
    python = interpreter(module, named)
    is_own = python == sys.executable
    try:
        found = ask(python, package).packages
    except InterpreterError as error:
        return f"{python}: {error}"
    if package not in found:
        do = install if is_own else install.rpartition(", or ")[2].replace("pip", _pip(python), 1)
        return f"{package} is not installed{'' if is_own else f' in {python}'}; {do}"
    if is_own:
        return None
    lacking = [
        f"'{name}>={least}'" if least else name
        for name, least in NEEDED.items()
        if name not in found or (least and _major(found[name]) < least)
    ]
    if lacking:
        return (
            f"{python} has {package} but not {', '.join(lacking)}, which a worker process needs; "
            f"{_pip(python)} install {' '.join(lacking)}"
        )
    if _is_installed() and "common" not in found:
        return f"{python} does not have this project; install it there as well"
    return None


def _major(version: str) -> int:
    """The first number; one that is unknown may be of any version."""
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() else sys.maxsize


def _pip(python: str) -> str:
    return f"{python} -m pip"


def worker_command(module: str, *arguments: str, python: str | None = None) -> list[str]:
    """Start a module of this project. -P: nothing of that name from the working directory."""
    return [python or sys.executable, "-P", "-m", module, *arguments]


def worker_environment(module: str, python: str | None = None) -> dict[str, str]:
    """Return the parent's environment but for what changes numbers (`inherited`), with this project
    importable from anywhere.

    PYTHONPATH makes this project importable from anywhere. If it is installed, it is found without:
    its folder then has other packages too, which must not come before Python's own modules.
    """
    paths = [] if _is_installed() else [str(PROJECT_ROOT)]
    paths += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # OpenBLAS' threads wait busily: on a machine with other work, two are five times slower than
    # one. A variable that the user has set stays. Frameworks set their own threads.
    one_thread = {"OPENBLAS_NUM_THREADS": "1"} if module in ONE_THREAD else {}
    found = {
        **one_thread,
        **inherited.kept(os.environ),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # of the log, whatever the parent's terminal has
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        PARENT: str(os.getpid()),
    }
    if python not in (None, sys.executable):
        found.pop("PYTHONHOME", None)  # where this Python has its own modules
    return found


def _is_installed() -> bool:
    """Whether this project lies among the installed packages, and not in a folder of its own."""
    return str(PROJECT_ROOT) in (sysconfig.get_path("purelib"), site.getusersitepackages())
