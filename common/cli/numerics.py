"""The subcommands that find where two runs diverge: dump and bisect."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree
from safetensors.numpy import load_file

from common.checkpoint.dump import Dump, DumpError, read_dump, write_dump
from common.cli.numbers import add_timeout, natural
from common.cli.options import add_run_options, file_to_write, flag, read_run
from common.cli.parser import Parser
from common.harness.bench import describe
from common.harness.bisect import Bisection, Finding, bisect
from common.harness.launch import IMPLEMENTATIONS, ORACLE_MODULE, require, run_jobs_in_worker
from common.io.console import make_console, say
from common.io.edges import write_file
from common.io.usage import UsageError
from common.report.result import RunResult
from common.runtime.job import Job
from common.spec.data import load_corpus
from common.spec.parameters import TensorKey
from common.spec.run import RunConfig

EXIT_AGREE, EXIT_DIFFER = 0, 1
ORACLE = "oracle"


def register(subcommands: Any) -> None:
    """Add the subcommands to argparse's subparsers."""
    dump = subcommands.add_parser(
        "dump",
        description="Runs one step of one framework (or of --framework oracle) and writes all its "
        "tensors, and what every unit alone makes of the oracle's. docs/numerics.md describes the "
        "file.",
    )
    add_run_options(dump)
    _add_step(dump, "which one; those before are trained (default 0)")
    dump.add_argument(
        "--out", required=True, metavar="FILE", help="the file to write, such as a.safetensors"
    )
    add_timeout(dump)
    dump.set_defaults(run=_dump)

    walk = subcommands.add_parser(
        "bisect",
        usage="%(prog)s A B [options]",
        description="Each of A and B is a dump (FILE.safetensors), the folder of one run (with its "
        "result.json), or a run in words, such as framework=torch,stages=2,dtype=float64; runs are "
        "dumped first. Exit status: 0 they agree, 1 they differ, 2 wrong input.",
    )
    walk.add_argument("a", metavar="A", help="the one that counts as right")
    walk.add_argument("b", metavar="B", help="the other one")
    _add_step(walk, "of runs that are dumped first (default 0)")
    to_json = "write all findings to OUT; - is standard output, without the tree"
    walk.add_argument("--json", metavar="OUT", help=to_json)
    add_timeout(walk)
    walk.set_defaults(run=_bisect)


def _add_step(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--step", type=natural, default=0, metavar="N", help=text)


# --------------------------------------------------------------------------------------------- dump


def _dump(arguments: argparse.Namespace) -> int:
    config, oracle = _read_run_or_oracle(arguments)
    path = file_to_write(arguments.out, "--out")
    make_dump(config, oracle, arguments.step, path, arguments.timeout)
    found, size = read_dump(path), path.stat().st_size / 1e6
    print(f"{found.name}, step {found.step}: {len(found.tensors)} tensors, {size:.1f} MB in {path}")
    return 0


def _read_run_or_oracle(arguments: argparse.Namespace) -> tuple[RunConfig, bool]:
    """Return the run, and whether the oracle does it: the specification knows frameworks only."""
    oracle = getattr(arguments, "run.framework", None) == ORACLE
    if oracle:
        delattr(arguments, "run.framework")
    config = read_run(arguments)
    if oracle and config.replicas > 1:
        raise UsageError(f"replicas = {config.replicas}: the oracle has one pipeline; expected 1")
    if oracle and (t := config.tensor_parallel) > 1:
        raise UsageError(f"tensor_parallel = {t}: the oracle has whole matrices; expected 1")
    return config, oracle


def check_dump(config: RunConfig, oracle: bool, step: int) -> None:
    """Raise DumpError if the run has no such step, or cannot be dumped here."""
    steps, executor = config.train.steps, config.executor
    if step >= steps:
        raise DumpError(f"--step {step}: the run has {steps}; expected 0 to {steps - 1}")
    if oracle:
        return
    if executor != "table":
        what = "runs no unit by itself; expected executor = table"
        raise DumpError(f"executor = {executor}: {what}")
    require(IMPLEMENTATIONS[config.framework], executor, config.python)


def make_dump(
    config: RunConfig, oracle: bool, step: int, path: Path, timeout_seconds: float
) -> None:
    """Run `config`, or the oracle, up to `step` in a worker; write its dump. Raises DumpError."""
    check_dump(config, oracle, step)
    name, module = (ORACLE, ORACLE_MODULE)
    if not oracle:
        implementation = IMPLEMENTATIONS[config.framework]
        name, module = describe(config), implementation.module
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        job = Job(config=config, out=str(out), kind="dump", stop_at=step)
        outcome = run_jobs_in_worker(module, [job], Path(folder), timeout_seconds)[0]
        if outcome.status != "ok":
            raise DumpError(f"{name}: {outcome.reason}")
        tensors: dict[TensorKey, Any] = {}
        for part in sorted(out.rglob("part-*.safetensors")):
            tensors |= {TensorKey.parse(text): array for text, array in load_file(part).items()}
        write_dump(path, tensors, config, name, outcome.parts[0].environment)


# ------------------------------------------------------------------------------------------- bisect


def _bisect(arguments: argparse.Namespace) -> int:
    out = file_to_write(arguments.json, "--json") if arguments.json not in (None, "-") else None
    if arguments.step and Path(arguments.a).is_file() and Path(arguments.b).is_file():
        raise UsageError(
            f"--step {arguments.step}: both are dumps, each of its own step; expected without it"
        )
    # A file, a run's folder, or a run in words: each side becomes a dump.
    sides = [_read_side(text) for text in (arguments.a, arguments.b)]
    for side in sides:  # both before one runs
        if not isinstance(side, Dump):
            check_dump(*side, arguments.step)
    with tempfile.TemporaryDirectory() as folder:
        a, b = (
            _dumped(side, arguments.step, Path(folder) / f"{n}.safetensors", arguments.timeout)
            for n, side in enumerate(sides)
        )
        found = bisect(a, b)
    if arguments.json:
        text = json.dumps(found.as_json(), indent=1) + "\n"
        if out is None:
            print(text, end="")
        else:
            write_file(out, text)
    if arguments.json != "-":
        print_bisection(found, make_console())
    return EXIT_AGREE if found.first is None else EXIT_DIFFER


def _read_side(text: str) -> Dump | tuple[RunConfig, bool]:
    """Return the dump that `text` names, or the run, and whether the oracle does it."""
    given = Path(text)
    if given.is_file():
        return read_dump(given)
    if given.is_dir():
        result = RunResult.read(given / "result.json")
        return _as_it_was(result, given), result.is_oracle
    if "=" in text:
        return _run_in_words(text)
    raise UsageError(
        f"{text}: no such file; expected a dump, a run's folder, or framework=torch,stages=2,.."
    )


def _dumped(
    side: Dump | tuple[RunConfig, bool], step: int, path: Path, timeout_seconds: float
) -> Dump:
    if isinstance(side, Dump):
        return side
    make_dump(*side, step, path, timeout_seconds)
    return read_dump(path)


def _as_it_was(result: RunResult, folder: Path) -> RunConfig:
    """The run's configuration, with the text and the tokenizer that it had, or not at all.

    Raises UsageError, CorpusError and TokenizerError.
    """
    config = result.config
    # train's tokenizer lies in its folder, the benchmark's in the one above.
    for path in (*folder.glob("tokenizer*.json"), *folder.parent.glob("tokenizer*.json")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if config.tokenizer != "bytes" and digest == result.tokenizer_digest:
            config = config.model_copy(update={"tokenizer_file": str(path)})
    corpus = load_corpus(config)
    for what, now, then in (
        ("corpus", corpus.digest, result.corpus_digest),
        ("tokenizer", corpus.tokenizer_digest, result.tokenizer_digest),
    ):
        if then not in (None, now):
            changed = f"has changed since (SHA-256 {now[:12]}..); expected {then[:12]}.."
            raise UsageError(f"{folder}: its {what} {changed}")
    return config


def _run_in_words(text: str) -> tuple[RunConfig, bool]:
    """`framework=oracle,dtype=float64`: the options of `dump` without their dashes."""
    parser = Parser(prog=text, add_help=False)
    add_run_options(parser)
    words: list[str] = []
    for word in text.split(","):
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{text}: {word!r}; expected NAME=VALUE with commas between")
        option = flag(name.strip())
        switches = {"true": [option], "false": [option.replace("--", "--no-", 1)]}
        words += switches.get(value.lower(), [option, value])
    return _read_run_or_oracle(parser.parse_args(words))


def print_bisection(found: Bisection, console: Console) -> None:
    """Print the tree: units in the order of computation, then what belongs to the whole step."""
    b = f" {found.b.name}   step {found.a.step}"
    tree = Tree(Text.assemble(("A", "bold"), f" {found.a.name}   ", ("B", "bold"), b))

    def add(branch: Tree, title: str, place: str, unit: str = "", tensors: str = "") -> None:
        """Add a line about the findings in this place, if there are any."""
        rows = [f for f in found.findings if f.place == place and unit in ("", f.unit)]
        if tensors:
            is_input = tensors == "input"
            rows = [f for f in rows if (f.tensor == "input_gradient") == is_input]
        if rows:
            branch.add(_summary(title, rows, found.first))

    add(tree, "weights before the step", "weights before")
    forward = [finding for finding in found.findings if finding.place == "forward"]
    for unit in dict.fromkeys(finding.unit for finding in forward):
        branch = tree.add(unit)
        add(branch, "output", "forward", unit)
        add(branch, "output as it ran", "message", unit)
        add(branch, "input gradient", "backward", unit, "input")
        add(branch, "parameter gradients", "backward", unit, "parameters")
    add(tree, "loss", "loss")
    add(tree, "gradients of the mini-batch", "gradients")
    add(tree, "optimizer, from the same gradients", "optimizer")
    add(tree, "weights after the step", "weights after")
    console.print(tree)
    for line in found.missing:
        say(console, f"note: {line}")
    say(console, found.verdict)


def _summary(title: str, findings: Sequence[Finding], first: Finding | None) -> Text:
    """Summarize some tensors in one line: the first that differs, or the worst."""
    failed = [finding for finding in findings if not finding.passed]
    shown = failed[0] if failed else max(findings, key=lambda finding: finding.difference.relative)
    relative, limit = shown.difference.relative, shown.difference.limit
    name = "" if len(findings) == 1 else f" ({shown.tensor})"
    running = "" if shown.running is None else f", as it ran {shown.running:.1e}"
    mark = ("ok", "green")
    if failed:
        count = "" if len(findings) == 1 else f", {len(failed)} of {len(findings)}"
        what = "FIRST DIFFERENCE" if any(finding is first for finding in findings) else "differs"
        mark = (f"{what}{count}", "red")
    return Text.assemble(f"{title}: {relative:.1e} of {limit:.0e}{running}{name} ", mark)
