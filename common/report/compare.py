"""Judge runs: against the oracle, and in bfloat16 also beside those of the other frameworks.

[1] `parity` compares one run with the oracle: every step's loss, and step 0's gradients by name. In
    float64 and float32 that is the verdict. In bfloat16, and where replicas compress
    their gradients, it is only a ceiling, and the errors are written into the result.
[2] `judge_together` turns these errors into a verdict, once there are runs of two frameworks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    relative_margins,
)
from common.report.result import Parity, RunResult, Step
from common.spec.parameters import Check, TensorKey, parameter_shapes
from common.spec.partition import plan_partition
from common.spec.run import RunConfig, TrainSpec

JUDGED_TOGETHER = "below the ceiling of bfloat16; more needs a run of another framework beside it"


def oracle_config(config: RunConfig) -> RunConfig:
    """Return the oracle's run that `config` is compared with: without what changes no number."""
    train = TrainSpec(**config.train.model_dump() | {"micro_batches": 1, "dtype": "float64"})
    text = ("corpus", "tokenizer", "tokenizer_file", "sequence_lengths", "sequences_per_epoch")
    alike = {name: getattr(config, name) for name in ("model", *text)}
    return RunConfig(**alike, train=train, stages=1, schedule="naive", device="cpu")


def rounded_oracle_config(config: RunConfig) -> RunConfig | None:
    """Return the run that says how much rounded weights, or compressed gradients, alone change a
    loss curve; None for a run that has neither."""
    if not _is_lossy(config):
        return None
    oracle = oracle_config(config)
    alike: dict[str, object] = {}
    run: dict[str, object] = {}
    if config.train.dtype == "bfloat16":
        alike["dtype"] = "bfloat16"
    if config.compress != "none":  # which rows a replica has decides what it sends
        alike |= {"micro_batches": config.train.micro_batches}
        run = {"compress": config.compress, "replicas": config.replicas}
    return oracle.model_copy(update=run | {"train": oracle.train.model_copy(update=alike)})


def _is_lossy(config: RunConfig) -> bool:
    """Return whether a run's errors are judged beside those of other frameworks."""
    return config.train.dtype == "bfloat16" or config.compress != "none"


def why_not_comparable(config: RunConfig) -> str | None:
    """Return why the oracle cannot compute this run; None if it can."""
    if config.model.dropout and config.model.dropout_masks == "native":
        return (
            "native dropout: every framework draws masks of its own; --dropout-masks shared "
            "would be comparable"
        )
    if config.executor == "plain" and config.compression.kind == "powersgd":
        return (
            "PyTorch's PowerSGD begins in step 2, from a Q of its own, and joins tensors to "
            "buckets; executor = table would be comparable"
        )
    return None


def read_gradients(folder: Path) -> dict[TensorKey, NDArray[Any]]:
    """Read step 0's gradients from all parts of a run."""
    arrays: dict[TensorKey, NDArray[Any]] = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        arrays |= {TensorKey.parse(name): array for name, array in load_file(path).items()}
    return {key: array for key, array in arrays.items() if key.phase == "backward"}


def parity(
    result: RunResult,
    folder: Path,
    oracle: RunResult,
    oracle_folder: Path,
    rounded: RunResult | None = None,
    rounded_folder: Path | None = None,
) -> Parity:
    """Compare a finished run with a finished oracle. [1]

    `rounded` is the oracle's run of `rounded_oracle_config`: a loss curve may differ by what
    rounded weights or compressed gradients alone make; compressed ones are held against its own.
    """
    # The loss curve alone gets one: gradients are of step 0, before anything was rounded twice.
    floor = 0.0
    if result.config.compress != "none":
        if rounded is None or rounded.status != "ok" or rounded_folder is None:
            return Parity(reason="the oracle with compressed gradients has not run")
        oracle_folder = rounded_folder
    if rounded is not None and rounded.status == "ok":
        # How far the oracle's own losses move when its weights are rounded: no run in bfloat16,
        # whose weights always are, can be asked to stay closer.
        apart = compare_runs(rounded.steps, {}, oracle.steps, {}, result.config)
        floor = apart.errors().get("loss_curve", 0.0)
    seen, right = read_gradients(folder), read_gradients(oracle_folder)
    comparison = compare_runs(result.steps, seen, oracle.steps, right, result.config, floor)
    first = comparison.first_failure
    if _is_lossy(result.config):
        errors = comparison.errors()
        if result.config.compress != "none":
            # A value near an edge goes to one side or the other: which framework's, is chance.
            errors = {check: error for check, error in errors.items() if "gradient" not in check}
        return Parity(
            status="not checked" if first is None else "FAIL",
            reason=JUDGED_TOGETHER if first is None else f"above the ceiling: {first}",
            tensors=len(comparison.differences),
            errors=errors,
            curve_floor=floor,
        )
    return Parity(
        status="pass" if comparison.passed else "FAIL",
        reason="" if first is None else str(first),
        tensors=len(comparison.differences),
        margins={str(check): margin for check, margin in comparison.margins().items()},
    )


def judge_together(results: Sequence[RunResult]) -> list[Parity]:
    """Return the parity of every result; in bfloat16 with a verdict. [2]

    A run is judged beside the runs of the same configuration in other frameworks. Without one it
    stays "not checked"; a run above the ceiling has failed already and is not compared with.
    """
    verdicts = [result.parity for result in results]
    # By configuration, whatever the framework: positions in `results`.
    alike: dict[RunConfig, list[int]] = {}
    for number, result in enumerate(results):
        if result.parity.errors and result.parity.status != "FAIL":
            key = result.config.model_copy(update={"framework": "torch", "python": None})
            alike.setdefault(key, []).append(number)
    # Say the gradient errors of one model are 0.010 (torch), 0.012 (paddle) and 0.035 (tensorflow).
    # The smallest is 0.010, so 0.030 is allowed: tensorflow fails by its margin of 0.035 / 0.030.
    for numbers in alike.values():
        frameworks = sorted({results[number].config.framework for number in numbers})
        if len(frameworks) < 2:
            continue
        # Repeats and frameworks have the same oracles, so these are equal, or 0 where one had none.
        floor = max(results[number].parity.curve_floor for number in numbers)
        margins = relative_margins([results[number].parity.errors for number in numbers], floor)
        for number, each in zip(numbers, margins, strict=True):
            verdicts[number] = _verdict(results[number].parity, each, frameworks)
    return verdicts


def _verdict(parity: Parity, margins: Mapping[str, float], frameworks: Sequence[str]) -> Parity:
    """Pass if no error is over BFLOAT16_FACTOR times the smallest; the reason names the worst."""
    check = max(margins, key=lambda name: margins[name])
    in_words = (f"{name.replace('_', ' ')} {error:.1e}" for name, error in parity.errors.items())
    errors = ", ".join(in_words)
    rule = f"no error more than {BFLOAT16_FACTOR:g} times the smallest of {', '.join(frameworks)}"
    floor = f"at least {parity.curve_floor:.1e}, what rounding or compression alone makes"
    rule += f" (the loss curve's {floor})"
    worst = f"{check.replace('_', ' ')} is {BFLOAT16_FACTOR * margins[check]:.1f} times it"
    return parity.model_copy(
        update={
            "status": "pass" if margins[check] <= 1 else "FAIL",
            "reason": f"errors: {errors}; {worst}; rule: {rule}",
            "margins": dict(margins),
        }
    )


def compare_runs(
    steps: tuple[Step, ...],
    gradients: dict[TensorKey, NDArray[Any]],
    expected_steps: tuple[Step, ...],
    expected_gradients: dict[TensorKey, NDArray[Any]],
    config: RunConfig,
    curve_floor: float = 0.0,
) -> Comparison:
    """Compare in the order of computation: step 0's loss, its gradients from the head to the
    embedding, later losses.

    Later losses may differ by `BFLOAT16_FACTOR` x `curve_floor`, if that is more than their limit.
    """
    dtype = "bfloat16" if _is_lossy(config) else config.train.dtype
    plan = plan_partition(config)
    order = {name: -i for i, name in enumerate(parameter_shapes(config.model))}

    def in_stages(arrays: dict[TensorKey, NDArray[Any]]) -> dict[TensorKey, NDArray[Any]]:
        return {key._replace(stage=plan.part_of(key.unit)): array for key, array in arrays.items()}

    # As the backward comes to them, the head first: then the first difference is the cause.
    backwards = dict(sorted(expected_gradients.items(), key=lambda item: order[item[0].tensor]))
    least = BFLOAT16_FACTOR * curve_floor
    losses = [
        _loss(config, seen, expected, least)
        for seen, expected in zip(steps, expected_steps, strict=True)
    ]
    return Comparison(
        (
            *losses[:1],
            *compare(in_stages(gradients), in_stages(backwards), "gradient", dtype).differences,
            *losses[1:],
        )
    )


def _loss(config: RunConfig, seen: Step, expected: Step, least_of_curve: float) -> Difference:
    check: Check = "loss" if seen.step == 0 else "loss_curve"
    key = TensorKey(seen.step, "forward", config.stages - 1, -1, "head", "loss")
    # The loss of step 0 comes before anything is compressed.
    dtype = "bfloat16" if check == "loss_curve" and _is_lossy(config) else config.train.dtype
    limit = max(LIMITS[check][dtype], least_of_curve if check == "loss_curve" else 0.0)
    return difference(key, check, np.array(seen.loss), np.array(expected.loss), limit)
