"""A run against the oracle: the loss of every step, and the gradients of step 0 by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from common.oracle.limits import (
    BFLOAT16_FACTOR,
    LIMITS,
    Comparison,
    Difference,
    compare,
    difference,
)
from common.report.result import Parity, RunResult, Step
from common.spec.parameters import Check, TensorKey, parameter_shapes
from common.spec.partition import plan_partition
from common.spec.run import RunConfig, TrainSpec

JUDGED_TOGETHER = "below bfloat16's ceiling; more needs a run of another framework beside it"


def oracle_config(config: RunConfig) -> RunConfig:
    """The one run of the oracle that `config` is compared with: what does not change the numbers is set aside."""
    train = TrainSpec(**config.train.model_dump() | {"micro_batches": 1, "dtype": "float64"})
    return RunConfig(
        model=config.model,
        train=train,
        corpus=config.corpus,
        tokenizer=config.tokenizer,
        tokenizer_file=config.tokenizer_file,
        sequence_lengths=config.sequence_lengths,
        sequences_per_epoch=config.sequences_per_epoch,
        stages=1,
        schedule="naive",
        device="cpu",
    )


def rounded_oracle_config(config: RunConfig) -> RunConfig | None:
    """The run that says how far bfloat16 weights alone lead a loss curve away; None where nothing is rounded."""
    if config.train.dtype != "bfloat16":
        return None
    oracle = oracle_config(config)
    return oracle.model_copy(update={"train": oracle.train.model_copy(update={"dtype": "bfloat16"})})


def why_not_comparable(config: RunConfig) -> str | None:
    """Why no oracle can say what this run should train; None if it can."""
    if config.model.dropout and config.model.dropout_masks == "native":
        return "native dropout: every framework draws masks of its own; --dropout-masks shared would be comparable"
    return None


def read_gradients(folder: Path) -> dict[TensorKey, NDArray[Any]]:
    """Step 0's gradients from all parts of a run."""
    arrays: dict[TensorKey, NDArray[Any]] = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        arrays |= {TensorKey.parse(name): array for name, array in load_file(path).items()}
    return {key: array for key, array in arrays.items() if key.phase == "backward"}


def parity(
    result: RunResult, folder: Path, oracle: RunResult, oracle_folder: Path, rounded: RunResult | None = None
) -> Parity:
    """Compares a finished run with a finished oracle; in bfloat16 in the light of one whose weights are `rounded`."""
    floor = 0.0
    if rounded is not None and rounded.status == "ok":
        floor = compare_runs(rounded.steps, {}, oracle.steps, {}, result.config).errors().get("loss_curve", 0.0)
    comparison = compare_runs(
        result.steps, read_gradients(folder), oracle.steps, read_gradients(oracle_folder), result.config, floor
    )
    first = comparison.first_failure
    if result.config.train.dtype == "bfloat16":
        return Parity(
            status="not checked" if first is None else "FAIL",
            reason=JUDGED_TOGETHER if first is None else f"above the ceiling: {first}",
            tensors=len(comparison.differences),
            errors=comparison.errors(),
            curve_floor=floor,
        )
    return Parity(
        status="pass" if comparison.passed else "FAIL",
        reason="" if first is None else str(first),
        tensors=len(comparison.differences),
        margins={str(check): margin for check, margin in comparison.margins().items()},
    )


def compare_runs(
    steps: tuple[Step, ...],
    gradients: dict[TensorKey, NDArray[Any]],
    expected_steps: tuple[Step, ...],
    expected_gradients: dict[TensorKey, NDArray[Any]],
    config: RunConfig,
    curve_floor: float = 0.0,
) -> Comparison:
    """In the order of computation: step 0's loss, its gradients from the head to the embedding, the later losses.

    The later losses may differ by `BFLOAT16_FACTOR` times `curve_floor` at least.
    """
    dtype = config.train.dtype
    plan = plan_partition(config)
    order = {name: -i for i, name in enumerate(parameter_shapes(config.model))}

    def in_stages(arrays: dict[TensorKey, NDArray[Any]]) -> dict[TensorKey, NDArray[Any]]:
        return {key._replace(stage=plan.part_of(key.unit)): array for key, array in arrays.items()}

    backwards = dict(sorted(expected_gradients.items(), key=lambda item: order[item[0].tensor]))
    least = BFLOAT16_FACTOR * curve_floor
    losses = [_loss(config, seen, expected, least) for seen, expected in zip(steps, expected_steps, strict=True)]
    return Comparison(
        (*losses[:1], *compare(in_stages(gradients), in_stages(backwards), "gradient", dtype).differences, *losses[1:])
    )


def _loss(config: RunConfig, seen: Step, expected: Step, least_of_curve: float) -> Difference:
    check: Check = "loss" if seen.step == 0 else "loss_curve"
    key = TensorKey(seen.step, "forward", config.stages - 1, -1, "head", "loss")
    limit = max(LIMITS[check][config.train.dtype], least_of_curve if check == "loss_curve" else 0.0)
    return difference(key, check, np.array(seen.loss), np.array(expected.loss), limit)
