"""PyTorch's own schedules are ours, action by action, and run as its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.stage import _PipelineStageBase

from common.harness.probes import compare_probe
from common.schedule.action import Action, Op, ScheduleError
from common.schedule.generators import GENERATORS, make_schedule
from tests.parity.ladder import config, expected, run_probes
from torch_impl.torch_pipelining import SCHEDULES

OPS = {"FORWARD": Op.F, "BACKWARD_INPUT": Op.B, "BACKWARD_WEIGHT": Op.W, "FULL_BACKWARD": Op.BW}
WITH_CHUNKS = ("interleaved", "interleaved-zb", "zb-h1", "zb-v", "dualpipev")


class Placeholder(_PipelineStageBase):
    """What PyTorch's schedules ask a stage for before they run."""

    _create_grad_recv_info = _prepare_backward_infra = _prepare_forward_infra = None  # type: ignore[assignment]

    def __init__(self, index: int, p: int, count: int) -> None:
        self.stage_index, self.group_size, self.num_stages = index, p, count
        self.group_rank, self.group, self.has_backward = 0, None, True
        self.device, self.submod = torch.device("cpu"), torch.nn.Identity()


def pytorchs(name: str, p: int, m: int, v: int) -> tuple[tuple[Action, ...], ...]:
    own = make_schedule(name, p, m, v).parts[0]
    stages = [Placeholder(k, p, p * v) for k in own]
    made = SCHEDULES[name](stages, m, loss_fn=lambda output, target: output)

    def actions(found: Any) -> list[Action]:
        if found is None:
            return []
        if found.sub_actions:
            (forward,), (backward,) = map(actions, found.sub_actions)
            return [forward, Action(Op.BW, backward.micro_batch, backward.chunk, overlaps=True)]
        op = OPS[found.computation_type.name]
        return [Action(op, found.microbatch_index, found.stage_index // p)]

    order = made.pipeline_order
    return tuple(tuple(a for found in order[rank] for a in actions(found)) for rank in range(p))


@pytest.mark.parametrize("name", WITH_CHUNKS)
def test_orders_are_pytorchs(name: str) -> None:
    equal = 0
    for p in range(1, 6):
        for m in (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 15):
            for v in (1, 2, 3) if GENERATORS[name].chunks is None else (GENERATORS[name].chunks,):
                try:
                    theirs = pytorchs(name, p, m, v)
                except (ValueError, ScheduleError):  # a size that PyTorch does not take, or neither
                    continue
                assert make_schedule(name, p, m, v).devices == theirs, (p, m, v)
                equal += 1
    assert equal > 20


def test_baselines_train_the_same(tmp_path: Path) -> None:
    configs = {
        name: config(
            "torch", 2, 4, "float64", "untied", "pre", "gelu", "even", 0.1,
            name, steps=3, chunks=2, executor="native", num_layers=2,
        )
        for name in ("interleaved-zb", "dualpipev")
    }  # fmt: skip
    runs = run_probes(configs, tmp_path)
    for name, one in configs.items():
        comparison = compare_probe(runs[name], expected(one), "float64")
        assert comparison.passed, comparison.report()
