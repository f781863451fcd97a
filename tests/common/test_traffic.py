"""What travels in a step: the formulas against a count by hand."""

import pytest

from common.harness.bench import describe, run_name
from common.report.sweep import ideal_efficiency
from common.spec.parameters import parameter_shapes
from common.spec.run import RunConfig, preset
from common.spec.traffic import between_hosts, blocks, traffic_bytes


def tiny(**run: object) -> RunConfig:
    base = preset("tiny")
    return RunConfig.model_validate(
        base.model_dump() | {"train": base.train.model_dump() | {"micro_batches": 2}} | run
    )


def test_one_activation_forth_and_one_gradient_back_for_each_micro_batch() -> None:
    config = tiny(stages=2)  # micro-batches of 4 sequences, S 16, D 32, float32
    assert traffic_bytes(config) == {(0, 1): 2 * 4 * 16 * 32 * 4, (1, 0): 2 * 4 * 16 * 32 * 4}


def test_a_v_turns_on_its_own_device() -> None:
    # zb-v on 2 devices: virtual stages 0 1 | 3 2; from 1 to 2 nothing travels.
    config = tiny(stages=2, schedule="zb-v", chunks=2)
    one_way = 2 * 2 * 4 * 16 * 32 * 4  # 2 micro-batches, F 0 -> 1 and B 2 -> 3
    assert traffic_bytes(config) == {(0, 1): one_way, (1, 0): one_way}


def test_replicas_send_each_other_their_gradients() -> None:
    config = tiny(stages=1, replicas=3, train={"batch_size": 9, "micro_batches": 3})
    parameters = sum(
        rows * columns
        for shape in parameter_shapes(config.model).values()
        for rows, columns in [(shape[0], 1) if len(shape) == 1 else shape]
    )
    assert set(traffic_bytes(config)) == {(a, b) for a in range(3) for b in range(3) if a != b}
    for count in traffic_bytes(config).values():
        assert abs(count - 2 * 4 * parameters / 3) < 1


def test_replicas_of_a_stage_share_a_host() -> None:
    sent = traffic_bytes(tiny(stages=2, replicas=2))
    links = between_hosts(sent, blocks(4, 2))
    # Only activations and their gradients cross: two micro-batches of 2 sequences, both replicas.
    assert links["host 0", "host 1"] == links["host 1", "host 0"] == 2 * 2 * 2 * 16 * 32 * 4
    assert links["host 0", "host 0"] > links["host 0", "host 1"]  # gradients stay within


def test_a_run_is_named_after_its_replicas() -> None:
    config = tiny(stages=2, replicas=2)
    assert run_name(config) == "torch-1f1b-p2-m2-d2"
    assert describe(config) == "torch 1f1b p=2 d=2 m=2"


def test_the_ideal_over_replicas() -> None:
    # 2 replicas of 4 sequences in 2 micro-batches: each pipeline is busy in 2 of 3 slots.
    assert ideal_efficiency("replicas", 2, 2, 8, 2) == pytest.approx(2 * 2 / 3)
    assert ideal_efficiency("replicas", 2, 4, 8, 1) == pytest.approx(4 / 5)
