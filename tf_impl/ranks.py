"""One process per stage and replica (`common.runtime.ranks`), as TensorFlow's cluster joins them.

Replicas need it, and stages on several hosts. Without either, stages are one process' threads.

`MultiWorkerMirroredStrategy` starts the cluster: a server in every process, at the address that
TF_CONFIG would have for it, and the coordination service, which notices in about 10 s when a
process hangs or a host is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from common.runtime.cpus import threads_per_stage
from common.runtime.engine import Engine
from common.runtime.importing import without_collections
from common.runtime.job import Job
from common.runtime.ranks import Ranks
from common.runtime.ranks import run_on_ranks as run
from common.runtime.world import World
from common.spec.gpus import gpus_of_stages, visible_gpus
from common.spec.mesh import Mesh
from common.spec.run import RunConfig
from tf_impl import devices

_joined: Any
"""This process' `tf_impl.rank_engine.Ranks`, once it has joined."""


def run_on_ranks(jobs: Sequence[Job]) -> int:
    """Run the jobs, which share `stages`, `replicas`, `device`, `track` and the drift of oneDNN, on
    one process per stage and replica. Returns the exit status.

    Must run before this process' TensorFlow has started. Raises ImportError without TensorFlow,
    ValueError for device = cuda without a GPU.
    """
    config = jobs[0].config
    gpus = visible_gpus() if config.device != "cpu" else ()
    if config.device == "cuda" and not gpus:
        raise ValueError("device = 'cuda', but there is no GPU; expected 'cpu' or 'auto'")
    if not gpus:
        # The ranks inherit it imported; it starts in each of them (`devices.configure`). CUDA would
        # not work after a fork.
        devices.choose_kernels(config.track, config.drift == "onednn")
        with without_collections():
            import tf_impl.rank_engine  # noqa: F401
    return run(replace(RANKS, start_method="spawn" if gpus else "fork"), jobs, _switch)


def _join(world: World, config: RunConfig) -> Callable[[RunConfig], Engine]:
    """Make this process, whose TensorFlow has not started, one of a cluster. Returns, when all have
    joined, what builds its engines.

    Raises ValueError if the processes are not as many as the mesh has, and as `devices.configure`.
    """
    global _joined
    mesh = Mesh.of(config)
    if world.size != mesh.size:
        raise ValueError(
            f"stages x replicas = {mesh.size}, but {world.size} processes were started; expected "
            f"{mesh.size}"
        )
    shards = config.tensor_parallel
    if config.device != "cpu" and (gpus := visible_gpus()):
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = _own_gpus(world, shards, len(gpus), listed)
    onednn = config.drift == "onednn"
    threads = threads_per_stage(world.local_size, config.threads)
    devices.configure(shards, threads, config.device, config.track, onednn)
    import tensorflow as tf

    from tf_impl import rank_engine
    from tf_impl.engine import build_engine

    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(world.endpoints)}),
        task_type="worker",
        task_id=world.rank,
        num_accelerators={"GPU": 0},  # its own variables and sums would lie there
        rpc_layer="grpc",
    )
    tf.distribute.MultiWorkerMirroredStrategy(resolver)
    joined = _joined = rank_engine.Ranks(world, mesh)

    def build(config: RunConfig) -> Engine:
        if config.executor != "table":
            return build_engine(config)
        return rank_engine.RankEngine(config, joined)

    return build


def _own_gpus(world: World, shards: int, gpus: int, listed: str | None) -> str:
    """Those of its host's that this process is to see, one for each shard; CUDA_VISIBLE_DEVICES may
    list them. Neighbours share one where there are fewer, each with the memory it needs.
    """
    first = world.local_rank * shards
    cards = gpus_of_stages(world.local_size * shards, gpus)[first : first + shards]
    names = [str(card) for card in range(gpus)] if listed is None else listed.split(",")
    return ",".join(names[card].strip() for card in dict.fromkeys(cards))


def _wait_for_all(ranks: int) -> None:
    """Return when all ranks have called it."""
    _joined.wait_for_all()


def _switch(config: RunConfig) -> AbstractContextManager[Any]:
    from tf_impl.drift import switch  # after `devices.configure`, since it imports TensorFlow

    return switch(config)


RANKS = Ranks("tf_impl", _join, _wait_for_all)
