"""`python -m tests.campaigns.fuzz_importers --inputs 4000`: hostile files for `triptych import`.

As `tests.campaigns.fuzz_readers` for what needs no framework. Every framework's reader runs in a
process of its own, as it does in the program. What ends that process is a finding too; the next
input then goes to a new one.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from common.checkpoint import CheckpointError
from common.checkpoint.foreign.converter import check_size, checked
from common.checkpoint.foreign.errors import ExchangeError
from common.report.grid import Grid
from common.spec.parameters import initial_weights
from tests.campaigns.fuzz_readers import (
    KINDS,
    MODEL,
    Random,
    Reader,
    bounded,
    kind_of,
    mutated,
    try_one,
)

FILES = {
    "torch_impl": "weights.pt",
    "tf_impl": "model.weights.h5",
    "paddle_impl": "weights.pdparams",
}
INPUTS_PER_PROCESS = 500
"""The program has a process for each file; thousands of models in one would be another test."""
MEMORY_BYTES = 2 * 2**30
"""For the framework's own threads too."""


def importer(module: str) -> Reader:
    """Return what `triptych import` does with a file, in the framework's own process."""
    convert: ModuleType = importlib.import_module(f"{module}.convert")
    name = FILES[module]

    def prepare(folder: Path) -> None:
        for dtype in ("float32", "float64"):
            (folder / dtype).mkdir()
            convert.write_weights(MODEL, initial_weights(MODEL, 0, dtype), folder / dtype / name)

    def attack(folder: Path, rng: Random) -> Callable[[], object]:
        valid = (folder / rng.choice(["float32", "float64"]) / name).read_bytes()
        path = folder / name
        damaged = _inside_zip if valid[:2] == b"PK" and rng.random() < 0.7 else _near
        path.write_bytes(damaged(valid, rng))

        def read() -> object:
            check_size(path, MODEL)
            return checked(convert.read_weights(MODEL, path), MODEL)

        return read

    return Reader(f"import, {name}", (ExchangeError, CheckpointError, OSError), prepare, attack)


def _near(data: bytes, rng: Random) -> bytes:
    """Mutated anywhere, or in its first kilobytes, where such files say what they hold."""
    if rng.random() < 0.5:
        return mutated(data, rng, text=False)
    return mutated(data[:4096], rng, text=rng.random() < 0.5) + data[4096:]


def _inside_zip(data: bytes, rng: Random) -> bytes:
    """A valid archive with one file in it mutated, mostly the pickle."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as made:
        names = source.namelist()
        pickled = next(name for name in names if name.endswith("data.pkl"))
        chosen = pickled if rng.random() < 0.7 else rng.choice(names)
        for name in names:
            content = source.read(name)
            if name == chosen:
                content = mutated(content, rng, text=rng.random() < 0.5)
            made.writestr(name, content)
    return target.getvalue()


def run_some(module: str, seed: int, numbers: range) -> None:
    """In the framework's process: a line before each input, so that its end tells which one it was,
    and one after it.
    """
    reader = importer(module)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        reader.prepare(folder)
        with bounded(MEMORY_BYTES):
            for n in numbers:
                print(json.dumps([n, None]), flush=True)
                came = try_one(reader, folder, Random(f"{seed} {reader.name} {n}"))
                print(json.dumps([n, came]), flush=True)


def run_all(module: str, seed: int, inputs: int) -> tuple[Counter[str], list[str]]:
    """Start processes until all inputs are done: the counts and the findings."""
    counts: Counter[str] = Counter()
    findings: list[str] = []
    first = 0

    def note(reached: int, came: str) -> None:
        counts[kind_of(came)] += 1
        if kind_of(came) == "findings":
            findings.append(f"{module}, input {reached}: {came}")
            print(findings[-1], flush=True)

    while first < inputs:
        end = min(first + INPUTS_PER_PROCESS, inputs)
        options = f"--module {module} --seed {seed} --first {first} --inputs {end}"
        command = [sys.executable, "-m", "tests.campaigns.fuzz_importers", *options.split()]
        reached = None
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith("["):
                    reached, came = json.loads(line)
                    if came is not None:
                        note(reached, came)
                        first = reached + 1
        if worker.returncode:
            if reached is None:
                raise RuntimeError(f"{module} does not start: {' '.join(command)}")
            note(reached, f"the process ended with status {worker.returncode}")
            first = reached + 1
    return counts, findings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.fuzz_importers", description=__doc__
    )
    parser.add_argument(
        "--inputs", type=int, default=4000, help="for each framework (default: 4000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(FILES), action="append", help="default: all")
    parser.add_argument("--module", choices=tuple(FILES), help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.module:
        run_some(arguments.module, arguments.seed, range(arguments.first, arguments.inputs))
        return 0
    rows, found_any = [], False
    for module in arguments.only or FILES:
        began = time.monotonic()
        counts, findings = run_all(module, arguments.seed, arguments.inputs)
        numbers = (counts.total(), *(counts[kind] for kind in KINDS))
        rows.append([f"import, {FILES[module]}", *map(str, numbers)])
        print(*rows[-1], f"{time.monotonic() - began:.0f} s", flush=True)
        found_any |= bool(findings)
    print(Grid(("reader", "inputs", *KINDS), rows, ("reader",)).markdown())
    return 1 if found_any else 0


if __name__ == "__main__":
    sys.exit(main())
