"""Which launcher has started this process, and what it says about the others.

    torchrun        RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    paddle launch   PADDLE_TRAINER_ID PADDLE_TRAINER_ENDPOINTS PADDLE_MASTER
    TF_CONFIG       {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}
    srun            SLURM_PROCID SLURM_STEP_NODELIST SLURM_STEP_TASKS_PER_NODE

All of it is read here, once. The frameworks' own readers disagree about it: TensorFlow's for Slurm
needs nvidia-smi, and sorts n10 before n2.
"""  # noqa: E501

from __future__ import annotations

import itertools
import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from common.io.edges import whole_number
from common.io.usage import UsageError
from common.runtime.world import World

PADDLE = "paddle.distributed.launch"
UNKNOWN = "?"
"""The host of a rank that torchrun does not tell; it is learned at the meeting."""
EXPECTED = "torchrun, paddle.distributed.launch, srun or TF_CONFIG (docs/hosts.md)"


@dataclass(frozen=True)
class Launched:
    """A process among those that its launcher has started."""

    launcher: str
    world: World
    master: str
    """host:port where the store of the run listens (`common.runtime.meeting`)."""
    has_store: bool = False
    """Whether the launcher itself holds it; else rank 0 does."""


def find(env: Mapping[str, str]) -> Launched:
    """Read the launcher's variables. Raises UsageError if there are none, or wrong ones."""
    # A launcher that srun has started is the nearer one.
    if "RANK" in env and "MASTER_ADDR" in env:
        return _torchrun(env)
    if "PADDLE_TRAINER_ENDPOINTS" in env:
        return _paddle(env)
    if "TF_CONFIG" in env:
        return _tf_config(env["TF_CONFIG"])
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        return _slurm(env)
    raise UsageError(
        f"no launcher has started this process; expected {EXPECTED}. On one machine "
        "`triptych train` starts all processes itself"
    )


def _number(env: Mapping[str, str], name: str, below: int = 10**9) -> int:
    found = whole_number(env.get(name, ""))
    if found is None or not 0 <= found < below:
        raise UsageError(f"{name} = {env.get(name)!r}: expected a whole number, 0 to {below - 1}")
    return found


def _torchrun(env: Mapping[str, str]) -> Launched:
    size = _number(env, "WORLD_SIZE")
    rank = _number(env, "RANK", below=size)
    # Hosts have their ranks in one piece. Of the others' torchrun says nothing.
    local_size = _number(env, "LOCAL_WORLD_SIZE")
    first = rank - _number(env, "LOCAL_RANK", below=local_size)
    own = range(first, first + local_size)
    hosts = [own_address(env["MASTER_ADDR"]) if r in own else UNKNOWN for r in range(size)]
    port = _number(env, "MASTER_PORT", below=2**16)
    world = World(rank, tuple(f"{host}:{port + 1 + r}" for r, host in enumerate(hosts)))
    master = f"{env['MASTER_ADDR']}:{port}"
    return Launched("torchrun", world, master, env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def _paddle(env: Mapping[str, str]) -> Launched:
    endpoints = tuple(env["PADDLE_TRAINER_ENDPOINTS"].split(","))
    rank = _number(env, "PADDLE_TRAINER_ID", below=len(endpoints))
    world = World(rank, _checked(endpoints, "PADDLE_TRAINER_ENDPOINTS"))
    return Launched(PADDLE, world, env.get("PADDLE_MASTER", endpoints[0]))


def _tf_config(text: str) -> Launched:
    expected = 'expected {"cluster": {"worker": ["host:port", ..]}, "task": {"type": "worker", ..}}'
    try:
        content = json.loads(text)
        cluster, task = content["cluster"], content["task"]
        chiefs, workers = cluster.get("chief", []), cluster.get("worker", [])
        index = int(task["index"]) + (len(chiefs) if task["type"] == "worker" else 0)
        endpoints = tuple(map(str, [*chiefs, *workers]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"TF_CONFIG = {text[:100]}: {expected}") from None
    if task["type"] not in ("chief", "worker") or not 0 <= index < len(endpoints):
        raise UsageError(f"TF_CONFIG: there is no task {task['type']} {task['index']}; {expected}")
    world = World(index, _checked(endpoints, "TF_CONFIG"))
    # The endpoints are the framework's; the store has the next port of the first host.
    first = world.hosts[0]
    own = [int(each.rpartition(":")[2]) for each in endpoints if each.startswith(f"{first}:")]
    return Launched("TF_CONFIG", world, f"{first}:{max(own) + 1}")


def _checked(endpoints: tuple[str, ...], where: str) -> tuple[str, ...]:
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        if not host or not 0 < (whole_number(port) or 0) < 2**16:
            raise UsageError(f"{where}: {endpoint!r}: expected host:port")
    if len(set(endpoints)) < len(endpoints):
        raise UsageError(f"{where}: one endpoint stands there twice; expected one for each process")
    return endpoints


def _slurm(env: Mapping[str, str]) -> Launched:
    nodes = expand_hosts(env["SLURM_STEP_NODELIST"])
    counts = expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(nodes) != len(counts):
        raise UsageError(
            f"SLURM_STEP_NODELIST = {env['SLURM_STEP_NODELIST']} names {len(nodes)} hosts, "
            f"SLURM_STEP_TASKS_PER_NODE tells the tasks of {len(counts)}; expected as many"
        )
    hosts = [node for node, n in zip(nodes, counts, strict=True) for _ in range(n)]
    rank = _number(env, "SLURM_PROCID", below=len(hosts))
    # Dealt out like cards, the tasks have the same counts, and other hosts.
    if env.get("SLURMD_NODENAME", hosts[rank]) != hosts[rank]:
        raise UsageError(
            f"task {rank} is on {env['SLURMD_NODENAME']}, in blocks it would be on {hosts[rank]}; "
            "expected srun --distribution=block"
        )
    # Two jobs on one node must not meet; MASTER_PORT is for who knows better.
    step = _number(env, "SLURM_JOB_ID") * 101 + (whole_number(env.get("SLURM_STEP_ID", "")) or 0)
    port = 20_000 + step * 64 % 10_000
    port = _number(env, "MASTER_PORT", below=2**16) if "MASTER_PORT" in env else port
    endpoints = tuple(f"{host}:{port + 1 + r}" for r, host in enumerate(hosts))
    return Launched("srun", World(rank, endpoints), f"{hosts[0]}:{port}")


def expand_hosts(text: str) -> list[str]:
    """Return the names in Slurm's `n[01-03,7],login`; `scontrol` may be missing in a container."""
    found = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        pieces = [
            [word] if word else [number for item in group.split(",") for number in _range(item)]
            for word, group in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part)
        ]
        found += ["".join(combination) for combination in itertools.product(*pieces)]
    return found


def _range(item: str) -> list[str]:
    """`08-10` is 08, 09, 10."""
    first, dash, last = item.partition("-")
    if not dash:
        return [item]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def expand_counts(text: str) -> list[int]:
    """Return the numbers in Slurm's `2(x3),1`: 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def own_address(master: str) -> str:
    """Return this host's address as `master`, a name or an address, sees it. Raises UsageError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        # Sends nothing: it only asks the routing table.
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(
            f"{master}: {error.strerror}; expected the first host's name or address, as this host "
            "reaches it"
        ) from None


def interface_of(address: str) -> str | None:
    """Return the network interface that has this address: gloo takes that of the host's name
    otherwise, which is often the loopback device. None for an address of no interface.
    """
    return next(
        (
            name
            for name, found in psutil.net_if_addrs().items()
            if any(each.address == address for each in found)
        ),
        None,
    )
