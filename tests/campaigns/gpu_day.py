"""The first hour with a GPU in ten minutes for each framework: python -m tests.campaigns.gpu_day
[FOLDER], or make gpu-day

Runs with whatever Python has a framework and sees a GPU; installs nothing, needs no network. On one
GPU all but NCCL is tried, on several everything, for every framework found. Each check is one line:
pass, FAIL or not run, and why. FOLDER (gpu-day/ unless given) gets the lines, and the output and
results of every check.

Exit status: 0 no line fails; 1 one does; 2 there is no GPU, or no framework that sees one; 130
interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.harness.interpreters import interpreter
from common.harness.launch import IMPLEMENTATIONS
from common.spec.gpus import visible_gpus

ROOT = Path(__file__).parents[2]
BUDGET_SECONDS = 530.0
"""For each framework. No check starts later, and none runs on."""
SLOWER = 0.98
"""The goal for two stages on one GPU: at most 2 % slower than unpartitioned."""

PROBES = {
    "torch": "import torch; print(torch.cuda.device_count(), torch.__version__, "
    "torch.version.cuda)",
    "tensorflow": "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')), "
    "tf.__version__)",
    "paddle": "import paddle; n = paddle.device.cuda.device_count() if "
    "paddle.is_compiled_with_cuda() else 0; print(n, paddle.__version__)",
}
"""Prints how many GPUs a framework sees, and its versions."""


class Failed(Exception):
    """Why a check fails."""


Judge = Callable[[Path, str], str]
"""From a check's folder and its output to what was seen. Raises Failed."""


@dataclass(frozen=True)
class Check:
    """One line."""

    name: str
    commands: tuple[tuple[str, ...], ...] = ()
    judge: Judge = lambda folder, output: ""
    seconds: float = 150.0
    statuses: tuple[int, ...] = (0,)
    not_run: str = ""
    """Why, if it cannot be run here."""


# ----------------------------------------------------------------------------------------- verdicts


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the table of the benchmark in `folder`."""
    found = sorted(folder.glob("*/summary.json"))
    if not found:
        raise Failed("no summary.json")
    table: list[dict[str, Any]] = json.loads(found[-1].read_text(encoding="utf-8"))["rows"]
    return table


def all_agree(folder: Path, output: str) -> str:
    """Return every row ran and trains what the oracle trains; bfloat16 alone is held against its
    ceiling.
    """
    table = [row for row in rows(folder) if row["status"] != "skipped"]
    wrong = [
        f"{row['name']}: {row['status']}, parity {row['parity']}"
        for row in table
        if row["status"] != "ok"
        or row["parity"] != ("not checked" if row["dtype"] == "bfloat16" else "pass")
    ]
    if wrong or not table:
        raise Failed("; ".join(wrong) or "no row")
    return next(
        (line for line in output.splitlines() if line.startswith("Parity: ")), f"{len(table)} rows"
    )


def same_bits(folder: Path, output: str) -> str:
    found = json.loads((folder / "bits.json").read_text(encoding="utf-8"))["findings"]
    other = [finding for finding in found if finding["relative"] or finding["relative_as_run"]]
    if other or not found:
        first = (
            f"{other[0]['place']} {other[0]['tensor']} by {other[0]['relative']:.1e}"
            if other
            else "no tensor"
        )
        raise Failed(f"{len(other)} of {len(found)} tensors differ: {first}")
    return f"all {len(found)} tensors are equal, bit by bit"


def agree(folder: Path, output: str) -> str:
    return output.strip().splitlines()[-1]


def same_tokens(folder: Path, output: str) -> str:
    """Two outputs of `generate --json` with the same tokens."""
    first, second = (
        json.loads(line)["tokens"] for line in output.splitlines() if line.startswith('{"')
    )
    if first != second:
        raise Failed(f"{first} on the GPU, {second} on the CPU")
    return f"{sum(map(len, first))} tokens are the same"


def same_weights(folder: Path, output: str) -> str:
    """Return the last checkpoints in `one` and `other` hold the same bytes."""
    one, other = (
        sorted((folder / name).glob("step-*/shard-*.safetensors")) for name in ("one", "other")
    )
    if not one or [path.read_bytes() for path in one] != [path.read_bytes() for path in other]:
        raise Failed(f"{len(one)} and {len(other)} shards that are not the same")
    return f"weights and moments of {len(one)} shards are equal, bit by bit"


def names_the_action(folder: Path, output: str) -> str:
    said = [line.strip() for line in output.splitlines() if "BW1" in line]
    if not said:
        raise Failed("BW1 is not named: " + output.strip()[-200:])
    return said[0]


def speeds(folder: Path, output: str) -> str:
    table = [row for row in rows(folder) if row["status"] == "ok"]
    if not table:
        raise Failed("no row ran")
    return "; ".join(
        f"{row['name']} {row['step_ms_median']:.4g} ms, {row['tokens_per_second']:,.0f} tokens/s"
        for row in table
    )


def not_slower(folder: Path, output: str) -> str:
    """Two stages against one, by framework."""
    seen, table = speeds(folder, output), rows(folder)
    for framework in dict.fromkeys(row["framework"] for row in table):
        one, two = (
            next(
                (
                    row["tokens_per_second"]
                    for row in table
                    if (row["framework"], row["stages"]) == (framework, p)
                ),
                None,
            )
            for p in (1, 2)
        )
        if not one or not two:
            raise Failed(f"{framework} did not run on one stage and on two; {seen}")
        if two < SLOWER * one:
            raise Failed(
                f"{framework}: two stages have {two / one:.3f} of the throughput of one; {seen}"
            )
    return seen


# -------------------------------------------------------------------------------------- what to run


def cli(line: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "common.cli", *line.split())


def bench(framework: str, options: str) -> tuple[tuple[str, ...], ...]:
    shared = f"--frameworks {framework} --device cuda --out ."
    return ((sys.executable, str(ROOT / "bench_all.py"), *f"{shared} {options}".split()),)


def checks(framework: str, gpus: int) -> Iterator[Check]:
    """Return what to try of one framework, which sees so many GPUs."""
    counts = [p for p in (1, 2, 4, 8) if p <= max(gpus, 4)]
    stages, most = ",".join(map(str, counts)), counts[-1]
    tiny = "--preset tiny --num-layers 6 --repeats 1"  # a unit for each of 8 stages
    kinds = ["float32 1f1b", "float32 gpipe", "float32 zb-h1", "float32 zb-h2", "float64 zb-h1"]
    for kind in [*kinds, "bfloat16 1f1b"]:
        dtype, schedule = kind.split()
        options = f"{tiny} --dtype {dtype} --stages {stages} --schedules {schedule}"
        yield Check(f"{framework} parity {kind}", bench(framework, options), all_agree)
    best = bench(framework, f"{tiny} --track best --stages 1")
    yield Check(f"{framework} parity of the track best", best, all_agree)
    one = f"framework={framework},device=cuda,preset=tiny,stages=1,schedule=naive,micro_batches=4"
    twice = cli(f"bisect {one} {one} --json bits.json")
    yield Check(f"{framework} bits of a second run", (twice,), same_bits)
    host = one.replace("cuda", "cpu")
    yield Check(f"{framework} GPU against CPU", (cli(f"bisect {host} {one}"),), agree)
    if most > 1:
        two = f"framework={framework},device=cuda,preset=tiny,stages=2,schedule=zb-h1"
        cut = cli(f"bisect {one} {two} --json bits.json")
        yield Check(f"{framework} bits of two stages", (cut,), same_bits)
        vee = "--stages 2 --chunks 2 --schedules interleaved,zb-v"
        harder = bench(framework, f"{tiny} {vee} --dropout 0.1 --tied-head --recompute full")
        yield Check(f"{framework} parity dropout, tied, recomputed", harder, all_agree)
        hang = cli(
            f"train --framework {framework} --device cuda --stages 2 --steps 4 --out . "
            "--hang-timeout 30 --fault hang@device=1,step=2,action=BW1"
        )
        name = f"{framework} hang is found and named"
        yield Check(name, (hang,), names_the_action, statuses=(1,))
    p = min(2, most)
    train = f"train --framework {framework} --preset tiny --save-dir saved --out ."
    generate = f"generate --framework {framework} --json --prompt The --tokens 8"
    generate += " --checkpoint saved/step-00000006"
    yield Check(
        f"{framework} trains on the GPU, goes on on the CPU, generates on both",
        (
            cli(f"{train} --device cuda --stages {p} --steps 4"),
            cli(f"{train} --device cpu --stages 1 --steps 6 --resume latest"),
            cli(f"{generate} --device cuda --stages {p}"),
            cli(f"{generate} --device cpu --stages 1"),
        ),
        same_tokens,
    )
    if framework == "torch":
        five = "train --device cuda --preset tiny --steps 5 --schedule zb-h1 --out ."
        auto = cli(f"{five} --cuda-graphs auto --save-dir one")
        off = cli(f"{five} --cuda-graphs off --save-dir other")
        yield Check("torch bits with CUDA graphs and without", (auto, off), same_weights)
    several = "" if gpus > 1 else "needs several GPUs"
    stages = ",".join(str(p) for p in (2, 4, 8) if p <= gpus)
    native = f"{tiny} --executor native --schedules 1f1b --micro-batches 8 --stages {stages}"
    yield Check(
        f"{framework} parity of its own pipeline over NCCL",
        bench(framework, native),
        all_agree,
        not_run="tensorflow has none" if framework == "tensorflow" else several,
    )


def timed(frameworks: dict[str, int]) -> Iterator[Check]:
    """Return what is measured, one check at a time."""
    for framework, count in frameworks.items():
        stages = ",".join(str(p) for p in (1, 2, 4, 8) if p <= max(count, 2))
        small = f"--preset small --stages {stages} --schedules 1f1b --no-parity --repeats 1"
        large = f"--preset gpu-1b --num-layers 8 --stages {stages} --schedules 1f1b --no-parity"
        why = "NCCL takes one process per GPU" if framework == "paddle" and count < 2 else ""
        runs: dict[str, tuple[Judge, str]] = {
            "small": (speeds, f"{small} --baselines"),
            "large, float32": (not_slower, f"{large} --dtype float32 --repeats 1"),
        }
        if framework == "torch":
            runs["small, without CUDA graphs"] = speeds, f"{small} --cuda-graphs off"
        runs["large, bfloat16"] = not_slower, f"{large} --repeats 1"
        for name, (judge, options) in runs.items():
            command = bench(framework, options)
            yield Check(f"{framework} speed, {name}", command, judge, 240, not_run=why)
    yield Check("doctor", (cli(f"doctor --frameworks {','.join(frameworks)}"),), agree)


# ------------------------------------------------------------------------------------------ running


class Day:
    """Runs checks and writes their lines."""

    def __init__(self, out: Path) -> None:
        self.out, self.began, self.budget_seconds = out, time.monotonic(), BUDGET_SECONDS
        self.verdicts: list[str] = []
        self._living: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._lock = threading.Lock()
        self._lines = (out / "verdicts.md").open("w", encoding="utf-8", buffering=1)

    def write(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)
            self._lines.write(line + "\n")

    def run(self, check: Check) -> None:
        """One line, whatever happens."""
        began = time.monotonic()
        left = self.budget_seconds - (began - self.began)
        verdict, why = "not run", check.not_run or "no time left"
        if not check.not_run and left > 0 and not self._stopped:
            try:
                verdict, why = "pass", self._seen(check, left)
            except Failed as failure:
                verdict, why = "FAIL", str(failure)
            except TimeoutError as error:  # a check that the day cut short says nothing
                verdict, why = "FAIL" if check.seconds <= left else "not run", str(error)
            except (
                Exception
            ) as error:  # a result that cannot be read is this check's failure, not the day's end
                verdict, why = "FAIL", f"{type(error).__name__}: {error}"
        if self._stopped:
            verdict, why = "not run", "interrupted"
        self.verdicts.append(verdict)
        why = " ".join(why.split()).replace("|", "/")[:400]
        self.write(f"| {verdict} | {check.name} | {time.monotonic() - began:.0f} s | {why} |")

    def _seen(self, check: Check, left: float) -> str:
        folder = self.out / check.name.replace(",", "").replace(" ", "-")
        folder.mkdir(parents=True)
        seconds, output = min(check.seconds, left), ""
        ends = time.monotonic() + seconds
        for i, command in enumerate(check.commands):
            status, said = self._run(command, folder, ends)
            output += said
            with (folder / "output.txt").open("a", encoding="utf-8") as file:
                file.write(f"$ {' '.join(command)}\n{said}exit status {status}\n")
            if status is None:
                raise TimeoutError(f"not done after {seconds:.0f} s, in command {i + 1}")
            if status not in check.statuses:
                last = [line for line in said.splitlines() if line.strip()][-1:] or ["no output"]
                reason = next(
                    (line for line in said.splitlines() if "failed:" in line or "Error" in line),
                    last[0],
                )
                raise Failed(f"exit status {status} of command {i + 1}: {reason}")
        return check.judge(folder, output)

    def _run(self, command: tuple[str, ...], folder: Path, ends: float) -> tuple[int | None, str]:
        """Exit status, None if it was ended, and output."""
        # Ours first, and what the user's own path adds to the environment behind it.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._living.add(process)
        try:
            said = process.communicate(timeout=max(ends - time.monotonic(), 1))[0]
            return process.returncode, said
        except subprocess.TimeoutExpired:
            self._end(process)
            return None, process.communicate()[0]
        finally:
            self._living.discard(process)

    def _end(self, process: subprocess.Popen[str]) -> None:
        """Politely, so that a benchmark ends its own processes; then not."""
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End what runs and begins nothing more."""
        self._stopped = True
        for process in tuple(self._living):
            self._end(process)


def probe(framework: str) -> tuple[int, str]:
    """Return how many GPUs the framework sees here, and its versions or why it cannot be used."""
    try:
        done = subprocess.run(
            (interpreter(IMPLEMENTATIONS[framework].module), "-c", PROBES[framework]),
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return 0, "does not start within 120 s"
    words = done.stdout.split()
    if done.returncode or not words:
        return 0, (done.stderr.strip().splitlines() or ["says nothing"])[-1]
    return int(words[0]), " ".join(words[1:])


def main(arguments: list[str]) -> int:
    cards = visible_gpus()
    if not cards:
        print(
            "no GPU: nvidia-smi names none (or CUDA_VISIBLE_DEVICES hides them); nothing was run",
            file=sys.stderr,
        )
        return 2
    out = Path(arguments[0] if arguments else "gpu-day").resolve()
    if out.exists() and any(out.iterdir()):
        print(f"{out} is not empty; expected a new folder", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    day = Day(out)
    with ThreadPoolExecutor() as pool:
        seen = dict(zip(PROBES, pool.map(probe, PROBES), strict=True))
    machine = (
        f"{len(cards)} x {cards[0].name}, driver {cards[0].driver}, {os.cpu_count()} CPU cores"
    )
    day.write(f"# GPU day: {machine}, {time.strftime('%Y-%m-%d')}\n")
    versions = [f"{name} {text or 'not known'} sees {n} GPUs" for name, (n, text) in seen.items()]
    day.write(f"Python {sys.version.split()[0]}; {'; '.join(versions)}\n")
    day.write("| verdict | check | time | seen |\n| --- | --- | --- | --- |")
    frameworks = {name: count for name, (count, _) in seen.items() if count}
    for name in PROBES:
        if name not in frameworks:
            day.run(Check(f"{name}, all", not_run=f"sees no GPU: {seen[name][1]}"))
    if not frameworks:
        print("no framework of this Python sees a GPU", file=sys.stderr)
        return 2
    day.budget_seconds *= len(frameworks)
    together = [check for name, count in frameworks.items() for check in checks(name, count)]
    # A run keeps about one core busy, and a GPU has room for many small models.
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) * 2 // 3)) as pool:
        try:
            list(pool.map(day.run, together))
            for check in timed(frameworks):
                day.run(check)
        except KeyboardInterrupt:
            day.stop()
            return 130
    counts = ", ".join(
        f"{day.verdicts.count(verdict)} {verdict}" for verdict in ("pass", "FAIL", "not run")
    )
    day.write(f"\n{counts} in {time.monotonic() - day.began:.0f} s; all output is in {out}")
    return int("FAIL" in day.verdicts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
