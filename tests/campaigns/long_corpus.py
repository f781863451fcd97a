"""How much memory and time does a long corpus take? The table of docs/text.md.

    python -m tests.campaigns.long_corpus [--megabytes 1000] [--tokenizers bytes,file,bpe]

Half of the corpus is plain text and half `.jsonl.gz`. It, the tokens and the results lie in a
temporary folder, which takes up to four times the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.report.grid import Grid
from common.report.machine import this_machine
from common.spec.data import load_tokenizer
from common.spec.run import RunConfig
from common.spec.text import read_texts
from tests.campaigns.make_schedules import fill

PAGE = Path("docs/text.md")
LINES, VOCABULARY = 1000, 8000
SAMPLE_SECONDS = 0.2


@dataclass
class Run:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Of all processes together; a page that several share counts once."""


def write_corpus(folder: Path, megabytes: int) -> None:
    """Write lines of CPython's manual in a random order, as documents of LINES lines."""
    manual = "".join(read_texts(()).decoded(lambda more_bytes: None)).splitlines(keepends=True)
    random_lines = random.Random(0)
    folder.mkdir()
    with (folder / "plain.txt").open("w") as file:
        while file.tell() < megabytes * 500_000:
            file.write("".join(random_lines.choices(manual, k=LINES)))
    written = 0
    with gzip.open(folder / "records.jsonl.gz", "wt", compresslevel=1) as records:
        while written < megabytes * 500_000:
            text = "".join(random_lines.choices(manual, k=LINES))
            written += len(text.encode())
            records.write(json.dumps({"text": text}) + "\n")


def train(arguments: Sequence[str], cache: Path, log: Path) -> Run:
    """Train for two steps in a process of its own, and watch it and its worker processes."""
    line = [sys.executable, "-m", "common.cli", "train", "--preset", "tiny", "--steps", "2"]
    began, before, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    with log.open("wb") as output:
        program = subprocess.Popen(
            [*line, "--out", str(log.with_suffix(".results")), *arguments],
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
            stdout=output,
            stderr=output,
        )
        watched = psutil.Process(program.pid)
        while program.poll() is None:
            total = 0
            with contextlib.suppress(psutil.Error):  # one ends while it is looked at
                for each in (watched, *watched.children(recursive=True)):
                    total += each.memory_full_info().pss
            peak = max(peak, total)
            time.sleep(SAMPLE_SECONDS)
    if program.returncode:
        raise RuntimeError(log.read_text())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return Run(time.monotonic() - began, cpu, peak)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--tokenizers", default="bytes,file,bpe")
    arguments = parser.parse_args(argv)
    megabytes, tokenizers = arguments.megabytes, arguments.tokenizers.split(",")
    rows = []
    with tempfile.TemporaryDirectory(prefix="triptych-") as temporary:
        folder = Path(temporary)
        write_corpus(folder / "corpus", megabytes)
        of_manual = RunConfig.model_validate(
            {"tokenizer": "bpe", "model": {"vocab_size": VOCABULARY}}
        )
        (folder / "tokenizer.json").write_bytes(load_tokenizer(of_manual).content or b"")
        options = {
            "bytes": [],
            "file": ["--tokenizer-file", str(folder / "tokenizer.json")],
            "bpe": ["--tokenizer", "bpe", "--vocab-size", str(VOCABULARY)],
        }
        for name in tokenizers:
            line = ["--corpus", str(folder / "corpus"), *options[name]]
            cells = [name]
            for count in ("first", "second"):
                run = train(line, folder / "cache", folder / f"{count} {name}.log")
                print(name, count, run, flush=True)
                cells += [f"{run.seconds:.0f}", f"{run.peak_bytes / 1e6:,.0f}"]
                if count == "first":
                    cells.append(f"{run.cpu_seconds / run.seconds:.1f}")
            rows.append(cells)
    titles = ["tokenizer", "first run, s", "peak MB", "busy CPUs", "second run, s", "peak MB"]
    words = f"{megabytes:,} MB of text, half of it `.jsonl.gz`; {this_machine().cpu}."
    fill("memory", f"{Grid(titles, rows, titles[:1]).markdown()}\n{words}", PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
