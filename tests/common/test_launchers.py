"""Who am I among all processes? From whichever launcher started this one, or one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.io.usage import UsageError
from common.runtime import launchers
from common.runtime.launchers import expand_counts, expand_hosts, find

TORCHRUN = {
    **{"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"},
}
SLURM = {
    **{"SLURM_PROCID": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURMD_NODENAME": "n10"},
    **{"SLURM_STEP_NODELIST": "n[2,10]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
}
ENDPOINTS = "a:6170,a:6171,b:6170,b:6171"
PADDLE = {
    **{"PADDLE_TRAINER_ID": "3", "PADDLE_TRAINER_ENDPOINTS": ENDPOINTS, "PADDLE_MASTER": "a:999"},
}


def tf_config(kind: str = "worker", index: Any = 1, **cluster: list[str]) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("n[01-03,7],login", ["n01", "n02", "n03", "n7", "login"]),
        ("n[9-11]", ["n9", "n10", "n11"]),  # in its order, and not n10 before n9
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
        ("a-1,b-2.example.org", ["a-1", "b-2.example.org"]),
    ],
)
def test_slurms_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


def test_slurms_counts() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]


def test_what_each_launcher_says() -> None:
    found = find(TORCHRUN)
    assert (found.world.rank, found.world.size, found.master) == (2, 4, "127.0.0.1:29500")
    assert (found.world.local_rank, found.world.local_size) == (0, 2)
    assert found.has_store
    found = find(PADDLE)
    assert (found.world.rank, found.world.endpoints) == (3, tuple(ENDPOINTS.split(",")))
    assert (found.world.local_rank, found.master) == (1, "a:999")
    found = find(SLURM)
    assert found.world.hosts == ("n2", "n2", "n10", "n10")
    assert (found.world.rank, found.world.local_rank, found.world.local_size) == (2, 0, 2)
    assert find({**SLURM, "MASTER_PORT": "4000"}).master == "n2:4000"
    found = find(tf_config(worker=["a:1", "b:1"]))
    assert (found.world.rank, found.master, found.has_store) == (1, "a:2", False)
    found = find(tf_config(index=0, chief=["a:1"], worker=["b:1"]))
    assert (found.world.rank, found.world.size) == (1, 2)
    # The nearer launcher counts: torchrun, started by srun.
    assert find({**SLURM, **TORCHRUN}).launcher == "torchrun"
    # Two jobs that share a node do not share a port.
    assert find(SLURM).master != find({**SLURM, "SLURM_JOB_ID": "8"}).master


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "no launcher has started this process; expected torchrun, "),
        # A batch script, which srun has not started.
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, "no launcher has started this process"),
        ({**TORCHRUN, "RANK": "4"}, "RANK = '4': expected a whole number, 0 to 3"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "MASTER_PORT = 'x': expected a whole number, 0 to"),
        ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE = '': expected a whole number"),
        ({**TORCHRUN, "MASTER_ADDR": "no.such.host.invalid"}, "no.such.host.invalid: "),
        ({**SLURM, "SLURMD_NODENAME": "n2"}, "expected srun --distribution=block"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2"}, "names 2 hosts, SLURM_STEP_TASKS_PER_NODE"),
        ({**PADDLE, "PADDLE_TRAINER_ID": "9"}, "PADDLE_TRAINER_ID = '9': expected a whole number"),
        ({**PADDLE, "PADDLE_TRAINER_ENDPOINTS": "a,b,c,d"}, "'a': expected host:port"),
        ({**PADDLE, "PADDLE_TRAINER_ENDPOINTS": "a:1,a:1,b:1,b:2"}, "stands there twice"),
        ({"TF_CONFIG": "worker"}, "TF_CONFIG = worker: expected {"),
        (tf_config("ps", 0, worker=["a:1"]), "there is no task ps 0"),
        (tf_config(index=2, worker=["a:1", "b:1"]), "there is no task worker 2"),
        (tf_config(index="x", worker=["a:1"]), "expected {"),
        (tf_config(worker=["a", "b"]), "'a': expected host:port"),
    ],
)
def test_wrong_variables_are_one_line(env: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(env)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_interface_behind_an_address() -> None:
    assert launchers.own_address("127.0.0.1") == "127.0.0.1"
    assert launchers.interface_of("127.0.0.1") == "lo"
    assert launchers.interface_of("203.0.113.7") is None
