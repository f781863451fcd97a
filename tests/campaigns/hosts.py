"""What a network costs: one pipeline in one process, in two, on two hosts, and behind slow links.

    python -m tests.campaigns.hosts --out FOLDER       as root, with nothing else running

Prints a table: the median step of every schedule in PyTorch beside the step that the simulator makes
of the same run's own actions and messages. Hosts are network namespaces (`tests.hosts`), joined by
`delaynet.c`, so that both have the same two cores and only the way between them differs.
"""  # noqa: E501

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from common.report.result import RunResult
from common.spec.traffic import traffic_bytes
from tests.hosts import ROOT, Hosts

SCHEDULES = ("gpipe", "1f1b", "zb-h1")
LINKS = ((0.1, 10_000), (0.5, 1_000), (1, 1_000), (5, 200), (10, 100))
"""Milliseconds one way, and Mbit/s."""
SETTINGS = """
preset = "small"
device = "cpu"
[train]
steps = 12
"""


@contextlib.contextmanager
def slow_link(hosts: Hosts, milliseconds: float, mbit: float, folder: Path) -> Iterator[None]:
    program = folder / "delaynet"
    if not program.exists():
        source = Path(__file__).with_name("delaynet.c")
        subprocess.run(["cc", "-O2", "-o", program, source], check=True)
    command = [str(program), str(round(milliseconds * 1000)), str(mbit), *hosts.names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as link:
        try:
            assert link.stdout is not None
            if link.stdout.readline() != "up\n":
                raise SystemExit("the slow link did not come up")
            yield
        finally:
            link.kill()


def torchrun(address: str, nodes: int, node: int, per_host: int) -> list[str]:
    where = ["--master-addr", address, "--master-port", "29400"]
    count = ["--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(per_host)]
    return ["-m", "torch.distributed.run", *count, *where, "-m", "torch_impl", "train", "run.toml"]


def step(folder: Path, started: list[subprocess.Popen[bytes]], out: str) -> str:
    """The median step beside the simulated one, in milliseconds."""
    if any([process.wait() for process in started]):  # noqa: C419  wait for all of them
        return "failed"
    timing = RunResult.read(next(folder.glob(f"{out}/*/*/result.json"))).timing
    assert timing is not None
    median, simulated = timing.measured_step_seconds, timing.simulated_step_seconds
    return f"{median * 1e3:,.0f} / {simulated * 1e3:,.0f}"


def row(folder: Path, name: str, hosts: Hosts | None, network: str, per_host: int) -> str:
    """Run all schedules in one place; return its line of the table."""
    cells = []
    for schedule in SCHEDULES:
        out = f"{len(list(folder.iterdir()))}-{schedule}"
        # A core for each stage: the number is that of a host.
        threads = "2" if hosts is None else "1"
        words = ["--schedule", schedule, "--threads", threads, "--out", out]
        if hosts is not None:
            address = f"{network}.1"
            started = [
                hosts.start(
                    n, [*torchrun(address, 2, n, per_host), *words], folder / f"{out}-{n}.log"
                )
                for n in range(2)
            ]
        else:
            alone = ["-m", "common.cli", "train", "--config", "run.toml"]
            command = torchrun("127.0.0.1", 1, 0, per_host) if per_host > 1 else alone
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            with (folder / f"{out}.log").open("wb") as output:
                whole = [sys.executable, *command, *words]
                started = [subprocess.Popen(whole, cwd=folder, env=env, stdout=output)]
        cells.append(step(folder, started, out))
    line = f"| {name} | {' | '.join(cells)} |"
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_args().out.resolve()
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(SETTINGS)
    print(f"| step ms, measured / simulated | {' | '.join(SCHEDULES)} |")
    print(f"| --- |{' ---: |' * len(SCHEDULES)}")
    row(folder, "one process", None, "", 1)
    row(folder, "two processes", None, "", 2)
    with Hosts(2, "c") as hosts:
        row(folder, "two hosts", hosts, "10.77.0", 1)
        for milliseconds, mbit in LINKS:
            with slow_link(hosts, milliseconds, mbit, folder):
                name = f"two hosts, {milliseconds:g} ms, {mbit:,} Mbit/s"
                row(folder, name, hosts, "10.78.0", 1)
    result = RunResult.read(next(folder.glob("*/*/*/result.json")))
    megabytes = sum(traffic_bytes(result.config).values()) / 1e6
    print(f"\n{megabytes:.1f} MB a step between the stages, on {result.machine.one_line}")


if __name__ == "__main__":
    main()
