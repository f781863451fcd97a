"""`python -m torch_impl train run.toml`, and the same with the others: one rank of a run whose
processes a launcher starts (torchrun, paddle.distributed.launch, srun, or TF_CONFIG by hand).

    [1] find      who am I? the launcher's variables             common/runtime/launchers.py
    [2] meet      are all here? with one version?                common/runtime/meeting.py
    [3] choose    where results go, what to resume               common/cli/rank_folders.py
    [4] read      settings and text, on every host; equal?
    [5] join      the framework's own process group              <implementation>/ranks.py
    [6] train     with a sign of life every second               common/runtime/heartbeat.py
    [7] report    rank 0, of all ranks' parts                    common/cli/rank_record.py
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from common.cli import main, train
from common.cli.numbers import seconds
from common.cli.parser import Parser
from common.cli.rank_folders import Folders, choose_folders
from common.cli.rank_record import Record
from common.harness.bench import describe, run_name
from common.harness.restarts import Training, job_of, not_finite
from common.io.console import make_console, say
from common.io.usage import UsageError
from common.report.machine import git_commit, source_digest
from common.report.progress import progress_view
from common.runtime import inherited, launchers
from common.runtime.agreement import clock_offset
from common.runtime.engine import Engine
from common.runtime.heartbeat import BEAT_SECONDS, Heartbeat, Places, end_process
from common.runtime.importing import without_collections
from common.runtime.installed import installed
from common.runtime.job import Part
from common.runtime.launchers import Launched
from common.runtime.meeting import POLL_SECONDS, Room, agree, disagreement, meet
from common.runtime.outcome import of_first_line
from common.runtime.ranks import Ranks
from common.runtime.watch import Board, who_waits
from common.runtime.worker import run_job
from common.runtime.world import World
from common.spec.data import Corpus
from common.spec.mesh import Mesh
from common.spec.run import RunConfig

MAY_DIFFER = ("corpus", "tokenizer_file", "python", "threads")
"""Settings that hosts may have of their own: the texts are compared, not where they lie."""
FAREWELL_SECONDS = 1.0
"""How long a process that is not needed any more waits for the others to read or say why."""
HEARS_SECONDS = 5.0
"""Within which Paddle's elastic launcher hears from another host's that a process has failed, and
ends its own. One that sees its own fail meanwhile gives up for good: it sets its state to `failed`
and waits for a notice that has already come. So rank 0 ends so long after a failure (behind one
that was killed), and the others so long after rank 0.
"""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def train_rank(framework: str, ranks: Ranks, argv: Sequence[str]) -> int:
    """Be one rank of a run; `argv` is what follows `train`. Ends this process with a status."""
    parser = Parser(
        prog=f"{ranks.name} train",
        usage=f"LAUNCHER -m {ranks.name} train [FILE.toml] [options]",
        description="One rank of a training whose processes a launcher starts, a process for each "
        "stage, replica and shard (docs/hosts.md). Exit status as that of `triptych train`.",
    )
    parser.add_argument("file", nargs="?", metavar="FILE.toml", help="as --config")
    parser.add_argument(
        "--join-timeout",
        metavar="SECONDS",
        type=seconds,
        default=300.0,
        help="how long to wait for the other processes at the start (default: 300)",
    )
    parser.add_argument(
        "--hang-timeout",
        metavar="SECONDS",
        type=seconds,
        default=600.0,
        help="end the run when no process has begun another action for so long, and say who waits "
        "for whom (default: 600)",
    )
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="as many replicas as the launcher has started processes for, whatever --replicas says",
    )
    train.add_options(parser)
    parser.set_defaults(run=lambda arguments: _Rank(framework, ranks, arguments).run())
    status = main.run(parser, argv, is_long=True)
    # Threads of a framework that wait for a rank that is gone would keep this process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Rank:
    """This process' part in a run."""

    def __init__(self, framework: str, ranks: Ranks, arguments: Namespace) -> None:
        self._framework, self._ranks, self._arguments = framework, ranks, arguments
        self._console = Console(quiet=True)
        self._launcher = ""
        self._note_end: Callable[[str, bool], None] = lambda line, is_interrupted: None

    def run(self) -> int:
        launched = launchers.find(os.environ)  # [1]
        self._launcher = launched.launcher
        inherited.drop(os.environ)
        # One process speaks for all; the others say only what goes wrong.
        self._console = make_console() if launched.world.rank == 0 else self._console
        limit = self._arguments.join_timeout
        with contextlib.ExitStack() as stack:
            self._heed_signals(stack)
            try:
                store = self._ranks.connect(launched, limit)
                world, names = self._meet(launched, store, limit)  # [2]
                folders = choose_folders(world, self._arguments, self._console, stack)  # [3]
                config, corpus = self._read(world, folders)  # [4]
            except UsageError as error:
                # One line for each host, and no end before it: a launcher that sees one of its
                # processes end kills the others. The store may end with rank 0.
                if launched.world.local_rank == 0:
                    main.refuse(f"{self._ranks.name} train", error)
                if launched.world.rank == 0 or launched.world.local_rank:
                    time.sleep(FAREWELL_SECONDS)
                return main.EXIT_USAGE
            for line in Mesh.of(config).describe(world.hosts):
                say(self._console, line)
            say(self._console, f"results in {folders.folder / run_name(config)}/")
            goes_on = folders.resume is not None and not self._arguments.weights
            train.say_what_is_forgotten(config, goes_on, self._console)
            return self._train(world, names, folders, config, corpus, stack)

    def _heed_signals(self, stack: contextlib.ExitStack) -> None:
        """Let a signal end this process with a word. In a thread: the main one may wait inside the
        framework, where no handler of Python's is called.
        """
        heeded = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        signal.pthread_sigmask(signal.SIG_BLOCK, heeded)  # in all threads that follow

        def wait() -> None:
            number = signal.sigwait(heeded)
            with contextlib.suppress(Exception):
                self._note_end(f"ended by {signal.Signals(number).name}", number == signal.SIGINT)
            with contextlib.suppress(Exception):
                stack.close()
            os._exit(128 + number)

        threading.Thread(target=wait, name="signals", daemon=True).start()

    def _meet(self, launched: Launched, store: Any, limit: float) -> tuple[World, list[str]]:
        """Wait for all ranks; return where they are, and what to call them. Raises UsageError."""
        world = launched.world
        host = launchers.own_address(launched.master.rpartition(":")[0])
        own = {"host": socket.gethostname(), "address": host}
        versions = {
            "commit": git_commit() or "unknown",
            "source": source_digest(self._ranks.name),
            "framework": str(installed([self._framework])["packages"]),
        }
        room, everybody = meet(store, world.rank, world.size, own | versions, limit)
        ports = [endpoint.rpartition(":")[2] for endpoint in world.endpoints]
        addresses = [facts["address"] for facts in everybody]
        loops = [r for r, address in enumerate(addresses) if address.startswith("127.")]
        if loops and len(set(addresses)) > 1:
            raise UsageError(
                f"rank {loops[0]} ({everybody[loops[0]]['host']}) knows the first host as "
                f"{addresses[loops[0]]}, which the other hosts cannot reach; expected its address "
                "in the network, not a name that stands for the loopback device in /etc/hosts"
            )
        found = [f"{address}:{port}" for address, port in zip(addresses, ports, strict=True)]
        same = [{key: facts[key] for key in versions} for facts in everybody]
        if why := disagreement(same, addresses):
            raise UsageError(why)
        names = [f"rank {r} ({address})" for r, address in enumerate(addresses)]
        return World(world.rank, tuple(found), room), names

    def _read(self, world: World, folders: Folders) -> tuple[RunConfig, Corpus]:
        """Read settings and text, and see whether all ranks have the same."""
        found: list[tuple[RunConfig, Corpus]] = []

        def read() -> dict[str, str]:
            self._settle_arguments()
            if self._arguments.elastic:
                self._settle_replicas(world, folders)
            config, corpus = train.read_training(self._arguments, folders.resume, attempts=1)
            found.append((config, corpus))
            self._check(config, world)
            return _settings(config) | {
                "corpus": corpus.digest[:16],
                "tokenizer.json": corpus.tokenizer_digest[:16],
            }

        assert world.room is not None
        everybody = agree(world.room, world.hosts, "run", read)
        if why := disagreement(everybody, world.hosts):
            raise UsageError(why)
        return found[0]

    def _settle_arguments(self) -> None:
        """Lay what is the same in every rank's command line into the settings."""
        arguments = self._arguments
        if arguments.file is not None and arguments.config not in (None, arguments.file):
            raise UsageError(f"{arguments.file}, --config {arguments.config}: expected one file")
        arguments.config = arguments.file or arguments.config
        if getattr(arguments, "run.framework", self._framework) != self._framework:
            named = getattr(arguments, "run.framework")
            own = self._framework
            raise UsageError(
                f"--framework = {named}: {self._ranks.name} runs {own}; expected {own}"
            )
        setattr(arguments, "run.framework", self._framework)

    def _settle_replicas(self, world: World, folders: Folders) -> None:
        """Lay as many replicas as there are processes for into the settings."""
        arguments = vars(self._arguments)
        # Read as one pipeline: so many processes each takes, whatever --replicas says.
        alone = {"run.replicas": "1", "run.compress": "none"}  # one replica sends no gradients
        config, _ = train.read_training(Namespace(**arguments | alone), folders.resume, attempts=1)
        replicas = world.size // (config.stages * config.tensor_parallel)
        arguments.update({"run.replicas": str(replicas)} if replicas > 1 else alone)

    def _check(self, config: RunConfig, world: World) -> None:
        mesh = Mesh.of(config)
        if mesh.size != world.size:
            axes, sizes = "stages x replicas", f"{mesh.stages} x {mesh.replicas}"
            if mesh.shards > 1:
                axes, sizes = f"{axes} x tensor_parallel", f"{sizes} x {mesh.shards}"
            raise UsageError(
                f"{axes} = {sizes} takes {mesh.size} processes, the launcher started "
                f"{world.size}; expected as many"
            )
        if config.executor == "plain":
            raise UsageError("executor = plain is one process; expected table or native")
        if config.drift is not None:
            raise UsageError(f"drift = {config.drift}: expected none, or `triptych drift`")
        if config.python is not None:
            raise UsageError(f"python = {config.python}: the launcher has started this one")

    def _train(
        self,
        world: World,
        names: Sequence[str],
        folders: Folders,
        config: RunConfig,
        corpus: Corpus,
        stack: contextlib.ExitStack,
    ) -> int:
        """Train, and report in rank 0. Whatever goes wrong is one line in every rank."""
        assert world.room is not None
        mesh = Mesh.of(config)
        stage = mesh.place(world.rank).stage
        training = self._training(folders, config)
        watched = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        board = Board(watched, config)
        own = training.folder, training.resume, folders.token, next(iter(training.faults), None)
        job = job_of(training, *own, folders.depot, str(watched)).of_line(mesh.line(world.rank))
        out, is_first = Path(job.out), world.rank == 0
        log = out / f"failed-{stage}.txt"
        record = Record(training, self._arguments.command, self._console, is_first, log)
        linger = 2 * BEAT_SECONDS if is_first else 0.0
        if self._launcher == launchers.PADDLE:
            linger = HEARS_SECONDS * (1 if is_first else 2)
        end = end_process(names[world.rank], record.failed, stack.close, linger)
        places = Places(
            lambda: board.line(stage), self._arguments.hang_timeout, partial(who_waits, config)
        )
        heart = Heartbeat(world.room, names, end, places)
        try:
            record.begin()
            self._note_end = lambda line, stop: record.failed(line, is_interrupted=stop)
            heart.start()
            with without_collections():
                build = self._ranks.join(world, config)  # [5]
            offset = 0.0

            def build_and_set_clocks(config: RunConfig) -> Engine:
                nonlocal offset
                engine = build(config)
                offset = clock_offset(world.hosts, world.rank, engine.sum_over_ranks)
                return engine

            with progress_view(self._console, 1) as view:  # [6]
                view.start(describe(config), config.train.steps)
                part = run_job(job, build_and_set_clocks, corpus, view.step)
                seconds = time.monotonic() - record.began
                view.finish(f"{describe(config)}: ok, {seconds:.0f} s")
            self._ranks.wait_for_all(world.size)
            (out / f"part-{stage}.safetensors").unlink()  # gradients, large as the model
            parts = _collect(world.room, _on_clock(part, offset), config)
            heart.finish()
        except Exception as error:
            heart.give_way()
            line = not_finite(out) or _one_line(error)
            record.failed(line, traceback.format_exc())
            heart.fail(line)
            print(f"{heart.name}: {line}", file=sys.stderr)
            if self._launcher == launchers.PADDLE:
                time.sleep(linger)
            return train.EXIT_FAILED
        if is_first:  # [7]
            record.ok(parts, part.steps)
        return train.EXIT_OK

    def _training(self, folders: Folders, config: RunConfig) -> Training:
        return Training(
            config=config,
            module=self._ranks.name,
            folder=folders.folder / run_name(config),
            directory=folders.directory,
            resume=folders.resume,
            weights_alone=self._arguments.weights is not None,
            save_every=self._arguments.save_every,
            keep=self._arguments.keep,
            # Once: a launcher that starts all anew repeats the command line.
            faults=() if folders.resume else tuple(self._arguments.fault),
        )


def _settings(config: RunConfig) -> dict[str, str]:
    """Return every setting by its name, but for those that may differ from host to host."""
    content = config.model_dump(mode="json")
    model, train = content.pop("model"), content.pop("train")
    flat = content | model | train
    return {name: str(value) for name, value in flat.items() if name not in MAY_DIFFER}


def _on_clock(part: Part, offset: float) -> Part:
    """The part with its times on rank 0's clock."""
    for step in part.steps:
        for event in itertools.chain.from_iterable(step.events.values()):
            event.ready_seconds -= offset
            event.start_seconds -= offset
            event.end_seconds -= offset
    return part


def _collect(room: Room, own: Part, config: RunConfig) -> tuple[Part, ...]:
    """Hand this rank's part over. Rank 0 waits for all, and returns those of line 0."""
    room.set(f"part/{room.rank}", own.model_dump_json())
    if room.rank != 0:
        return ()
    texts = []
    for rank in range(room.size):
        while (text := room.get(f"part/{rank}")) is None:
            time.sleep(POLL_SECONDS)  # if that rank is lost, the heartbeat ends this one
        texts.append(text)
    parts = map(Part.model_validate_json, texts)
    return of_first_line(sorted(parts, key=lambda part: part.devices), config.stages)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
