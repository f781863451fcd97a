"""Paddle's stages are processes: here they are kept for many tests, and asked as if all of them
were one engine.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from functools import partial, reduce
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from common.runtime.ranks import _free_endpoints
from common.runtime.world import World
from common.spec.mesh import Mesh
from common.spec.run import RunConfig
from tests.paddle import fake_gpus


class Ranks:
    """Processes that have joined the pipelines of a mesh. On a CPU they are forked from one that
    has imported Paddle and done nothing else; with a `plugin` for fake GPUs they are spawned.
    """

    def __init__(self, mesh: Mesh, plugin: Path | None = None) -> None:
        if plugin is None:
            start: Any = multiprocessing.get_context("forkserver")
            start.set_forkserver_preload(["paddle_impl.engine"])
        else:
            start = multiprocessing.get_context("spawn")
        self.mesh, endpoints = mesh, tuple(_free_endpoints(mesh.size))
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(mesh.size):
            mine, theirs = start.Pipe()
            world = World(rank, endpoints)
            process = start.Process(target=_serve, args=(world, mesh, plugin, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def ask(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(*arguments)` returns on every rank. Where one fails, all are ended: the others
        would wait for it.
        """
        for end in self._ends:
            end.send((work, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < len(self._ends):
            for end in wait([e for rank, e in enumerate(self._ends) if rank not in answers]):
                try:
                    ended_well, answer = end.recv()  # type: ignore[union-attr]
                except EOFError:
                    ended_well, answer = False, "a rank has ended"
                if not ended_well:
                    self.end()
                    raise RuntimeError(answer)
                answers[self._ends.index(end)] = answer  # type: ignore[arg-type]
        return [answers[rank] for rank in range(len(self._ends))]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


class Pipeline:
    """An engine in every rank: a call goes to all of them, and their answers are put together."""

    def __init__(self, ranks: Ranks, config: RunConfig) -> None:
        self.config, self._ranks = config, ranks
        ranks.ask(_build, id(self), config)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self.on_all, _call, name)

    def events(self) -> Any:
        return self._of_first_replica("events")

    def held_bytes_peak(self) -> Any:
        return self._of_first_replica("held_bytes_peak")

    def _of_first_replica(self, name: str) -> Any:
        """What is measured differs between replicas, as what they compute does not."""
        answers = self._ranks.ask(_with_engine, id(self), _call, name)
        return reduce(_joined, [answers[rank] for rank in self._ranks.mesh.pipeline(0)])

    def on_all(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(engine, *arguments)`, a function of a module, on every rank. Raises AssertionError
        where answers differ.
        """
        return reduce(_joined, self._ranks.ask(_with_engine, id(self), work, *arguments))

    def end(self) -> None:
        self._ranks.end()

    def close(self) -> None:
        if self._ranks.alive:
            self._ranks.ask(_close, id(self))


def _joined(a: Any, b: Any) -> Any:
    """Dictionaries of what each rank holds become one; anything else, and what two ranks hold, has
    to be the same.
    """
    if not isinstance(a, dict):
        np.testing.assert_array_equal(a, b)
        return a
    for key in a.keys() & b.keys():
        np.testing.assert_array_equal(a[key], b[key], str(key))
    return a | b


# ---------------------------------------------------------------------------------------- in a rank

ENGINES: dict[int, Any] = {}


def _serve(world: World, mesh: Mesh, plugin: Path | None, end: Connection) -> None:
    from paddle_impl.ranks import join_pipeline

    if plugin is not None:
        fake_gpus.complete(plugin)
    join_pipeline(world, mesh, "auto" if plugin else "cpu")
    while True:
        try:
            work, arguments = end.recv()
        except EOFError:  # the tests have ended
            return
        try:
            end.send((True, work(*arguments)))
        except Exception:
            end.send((False, traceback.format_exc()))


def _build(name: int, config: RunConfig) -> None:
    from paddle_impl.engine import build_engine

    ENGINES[name] = build_engine(config)


def _close(name: int) -> None:
    ENGINES.pop(name).close()


def _with_engine(name: int, work: Callable[..., Any], *arguments: Any) -> Any:
    return work(ENGINES[name], *arguments)


def _call(engine: Any, name: str, *arguments: Any) -> Any:
    return getattr(engine, name)(*arguments)
