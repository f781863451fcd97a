"""What a network costs: one pipeline in one process, in two, on two hosts, and behind slow links.

    python -m tests.campaigns.hosts --out FOLDER       as root, with nothing else running; 15 min

Makes the tables and the picture of docs/hosts.md (`hosts_page.py`), and leaves every run in FOLDER;
what is there already is not measured again. Hosts are network namespaces (`tests.hosts`), joined by
`delaynet.c`, so that all places have the same cores and only the way between them differs.
`--steps 3 --preset tiny --page COPY.md` tries it in two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.io.edges import write_file
from common.report.result import RunResult
from common.spec.run import FRAMEWORKS
from tests.campaigns.hosts_page import (
    LINKS,
    PAGE,
    PLACES,
    REDUCE_LINK,
    SCHEDULES,
    SIZES,
    Link,
    write_page,
)
from tests.hosts import ROOT, Hosts

FLAT, SLOW = "10.77.0", "10.78.0"
"""The networks of `tests.hosts` and of `delaynet.c`."""


@contextlib.contextmanager
def slow_link(hosts: Hosts, link: Link, folder: Path) -> Iterator[None]:
    program = folder / "delaynet"
    if not program.exists():
        source = Path(__file__).with_name("delaynet.c")
        subprocess.run(["cc", "-O2", "-o", program, source], check=True)
    command = [str(program), str(round(link.milliseconds * 1000)), str(link.mbit), *hosts.names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "up\n":
                raise SystemExit("the slow link did not come up")
            yield
        finally:
            process.kill()


def settle_tcp(hosts: Hosts) -> None:
    """As one sets it for training: a connection that is often idle keeps what it knows of the link.
    BBR, some machines' default, would take it for one of a third of its rate.
    """
    settings = ("tcp_congestion_control=reno", "tcp_slow_start_after_idle=0")
    for name in hosts.names:
        words = [f"net.ipv4.{setting}" for setting in settings]
        subprocess.run(["ip", "netns", "exec", name, "sysctl", "-qw", *words], check=True)


class Campaign:
    """Runs in a folder, each under a name of its own."""

    def __init__(self, folder: Path, steps: int, preset: str) -> None:
        self.folder, self._steps, self._preset = folder, steps, preset
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self, name: str, words: Sequence[str], hosts: Hosts | None = None, network: str = FLAT
    ) -> None:
        """Train on one process of each host (by TF_CONFIG, with PyTorch), or on this one."""
        out = self.folder / name
        if out.exists():
            return
        print(name, flush=True)
        out.mkdir(parents=True)
        run = [*("--preset", self._preset, "--device", "cpu", "--steps", str(self._steps)), *words]
        run += ["--out", str(out)]
        if hosts is None:
            self._wait(out, [self._start(["-m", "common.cli", "train", *run], out / "log")])
        else:
            self._wait(out, self._on(hosts, network, ["-m", "torch_impl", "train", *run], out))

    def transport(self, framework: str, hosts: Hosts) -> None:
        out = self.folder / f"transport-{framework}"
        if out.exists():
            return
        print(out.name, flush=True)
        out.mkdir()
        words = ["-m", "tests.campaigns.transport", framework, *map(str, SIZES)]
        self._wait(out, self._on(hosts, FLAT, words, out))
        line = (out / "host-0.log").read_text().splitlines()[-1]
        write_file(out / "found.json", json.dumps(json.loads(line)))

    def _on(
        self, hosts: Hosts, network: str, words: list[str], out: Path
    ) -> list[subprocess.Popen[bytes]]:
        addresses = [address.replace(FLAT, network) for address in hosts.addresses]
        workers = [f"{address}:{7000 + n}" for n, address in enumerate(addresses)]
        started = []
        for n in range(len(workers)):
            task = {"type": "worker", "index": n}
            env = {"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": task})}
            started.append(hosts.start(n, words, out / f"host-{n}.log", env))
        return started

    def _start(self, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, *words], env=env, stdout=output, stderr=output, cwd=log.parent
            )

    def _wait(self, out: Path, started: list[subprocess.Popen[bytes]]) -> None:
        if any([process.wait() for process in started]):  # noqa: C419  wait for all of them
            out.rename(out.with_name(f"failed-{out.name}"))
            raise SystemExit(f"{out.name} failed: see failed-{out.name}")


def measure(campaign: Campaign) -> None:
    pipeline = ["--stages", "2", "--threads"]
    schedules = {
        name: ["--schedule", name, *(["--chunks", str(chunks)] if chunks > 1 else [])]
        for name, chunks in SCHEDULES.items()
    }
    with Hosts(1, "c") as one, Hosts(2, "d") as two:
        settle_tcp(two)
        # As many processes as `one` has names: two on the same host.
        pair = Hosts(0)
        pair.names, pair.addresses = one.names * 2, one.addresses * 2
        # A schedule in all places: they are compared, and the machine is not as fast all the time.
        for name, words in schedules.items():
            campaign.run(f"{PLACES[0]}/{name}", [*pipeline, "2", *words])
            campaign.run(f"{PLACES[1]}/{name}", [*pipeline, "2", *words], pair)
            campaign.run(f"{PLACES[2]}/{name}", [*pipeline, "1", *words], two)
            for link in LINKS:
                with slow_link(two, link, campaign.folder):
                    campaign.run(f"{link}/{name}", [*pipeline, "1", *words], two, SLOW)
        for framework in FRAMEWORKS:
            campaign.transport(framework, two)
        with slow_link(two, REDUCE_LINK, campaign.folder):
            for reduce in ("flush", "overlap"):
                words = ["--stages", "1", "--replicas", "2", "--threads", "1", "--reduce", reduce]
                words += ["--schedule", "zb-v", "--chunks", "2"]
                campaign.run(f"reduce/{reduce}", words, two, SLOW)
    for framework in FRAMEWORKS:
        words = ["--framework", framework, "--schedule", "gpipe", "--stages", "1"]
        campaign.run(f"replicas/{framework}-1", [*words, "--threads", "1"])
        (first,) = (campaign.folder / f"replicas/{framework}-1").glob("*/*/result.json")
        train = RunResult.read(first).config.train
        two_of = ["--replicas", "2", "--threads", "2", *words]
        half = ["--micro-batches", str(train.micro_batches // 2)]
        double = ["--batch-size", str(2 * train.batch_size)]
        campaign.run(f"replicas/{framework}-strong", [*two_of, *half])
        campaign.run(f"replicas/{framework}-weak", [*two_of, *double])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    campaign = Campaign(arguments.out.resolve(), arguments.steps, arguments.preset)
    measure(campaign)
    write_page(campaign.folder, arguments.page)


if __name__ == "__main__":
    main()
