"""How much of each limit is used: every check of the parity ladder, over many seeds and models, in
every framework.

A limit with little room would fail one day for no reason, and one with too much would let something
pass.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.harness.probes import Run, compare_probe, expected, losses_as_tensors
from common.harness.zoo import NOISE, run_all, versions_of
from common.io.edges import OsText
from common.oracle.limits import Comparison, Difference, compare, relative_margins
from common.spec.run import RunConfig

ROOM = 0.2
"""At most this share of a limit may be used: five times room."""

LONG_CHECKS = frozenset({"loss_curve", "trained_parameter"})
"""What the rounding of 100 steps adds up to."""

REFUSED = "; expected "
"""What a framework says to a precision that it does not have; every other problem is a failed run.
"""

Errors = Mapping[str, float]
"""By check."""


class Margin(BaseModel):
    """One check in one framework and precision, over all repeats."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    framework: str
    dtype: str
    check: str
    worst: float
    """The largest observed value over its limit."""
    median: float
    """Over the repeats, of each one's largest."""
    repeats: int
    worst_run: str
    """The model of the worst repeat, in words."""
    worst_tensor: str
    left_out: int = 0
    """Further repeats, whose end float32 does not determine (`_is_determined`)."""

    @property
    def has_room(self) -> bool:
        """In bfloat16: keeps to the rule, to which the best framework has no room by definition."""
        return self.worst <= (1.0 if self.dtype == "bfloat16" else ROOM)


class Margins(BaseModel):
    """What docs/margins.md is made from."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    margins: list[Margin]
    problems: list[str]
    """Runs that could not be made."""
    command: OsText
    machine: str
    versions: dict[str, str]


def config_of(framework: str, dtype: str, seed: int) -> RunConfig:
    """Return a model of the ladder: the seed chooses weights, data and masks, and walks through
    head, norm, activation, dropout.

    p = 2, m = 4, one thread per stage, 100 steps with clipping, warm-up and cosine.
    """
    model = {
        "context_length": 12,
        "num_layers": 4,
        "d_model": 24,
        "num_heads": 2,
        "d_ff": 40,
        "tied_head": bool(seed & 1),
        "norm": ("pre", "post")[seed >> 1 & 1],
        "activation": ("gelu", "relu")[seed >> 2 & 1],
        "dropout": (0.0, 0.1)[seed % 3 > 0],
    }
    train = {"steps": 100, "batch_size": 8, "micro_batches": 4, "dtype": dtype, "seed": seed}
    train |= {"learning_rate": 2e-3, "learning_rate_schedule": "cosine", "warmup_steps": 10}
    run = {"framework": framework, "stages": 2, "threads": 2, "device": "cpu"}
    return RunConfig.model_validate(run | {"model": model, "train": train})


def describe(config: RunConfig) -> str:
    model = config.model
    head = "tied" if model.tied_head else "untied"
    dropout = f", dropout {model.dropout:.1g}" if model.dropout else ""
    return f"seed {config.train.seed}: {head}, {model.norm}-norm, {model.activation}{dropout}"


def measure(
    folder: Path,
    frameworks: Sequence[str],
    dtypes: Sequence[str],
    repeats: int,
    timeout_seconds: float,
    on_step: Callable[[str, int], None] = lambda framework, done: None,
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
) -> tuple[list[Margin], list[str], dict[str, str]]:
    """Run everything below `folder`. Returns the margins, what failed, and the frameworks'
    versions.
    """
    configs = [
        config_of(f, dtype, seed) for f in frameworks for dtype in dtypes for seed in range(repeats)
    ]
    outcomes = run_all(configs, folder, timeout_seconds, on_step, implementations)
    failed = Counter(
        (config.framework, config.train.dtype, outcome)
        for config, outcome in outcomes.items()
        if isinstance(outcome, str)
    )
    problems = [
        f"{f} {dtype}, {count} of {repeats} repeats: {why}"
        for (f, dtype, why), count in failed.items()
    ]
    judged = {
        config: _judge(config, run) for config, run in outcomes.items() if isinstance(run, Run)
    }
    compared = {config: comparison for config, (comparison, _) in judged.items()}
    undetermined = [config for config, (_, left_out) in judged.items() if left_out]
    margins = []
    for dtype in dtypes:
        used = _relative(compared) if dtype == "bfloat16" else _fixed(compared)
        for framework in frameworks:
            of = {c: used[c] for c in used if (c.framework, c.train.dtype) == (framework, dtype)}
            margins += _summarized(framework, dtype, of, compared, undetermined)
    return margins, problems, versions_of(outcomes)


def _is_determined(config: RunConfig) -> bool:
    """Whether float32 can decide where 100 steps of this model end.

    A hidden value beside the kink of a ReLU can be on the other side for no other reason than that
    weights are stored in float32 (docs/numerics.md). Then the oracle itself ends elsewhere if its
    weights are rounded to float32 after each step, and no float32 run can be held against it.
    """
    pure, stored = expected(config, NOISE), expected(config, NOISE, stores_float32=True)
    curves = losses_as_tensors(stored.losses), losses_as_tensors(pure.losses)
    moved = [
        compare(*curves, "loss_curve", "float32"),
        compare(stored.trained, pure.trained, "trained_parameter", "float32"),
    ]
    return all(share <= ROOM for each in moved for share in each.margins().values())


def _judge(config: RunConfig, run: Run) -> tuple[Comparison, bool]:
    """The run against the oracle; where float32 does not determine the long checks, without them.
    Whether it did not.
    """
    comparison = compare_probe(run, expected(config, NOISE), config.train.dtype)
    has_kinks = config.train.dtype == "float32" and config.model.activation == "relu"
    if not has_kinks or _is_determined(config):
        return comparison, False
    return Comparison(tuple(d for d in comparison.differences if d.check not in LONG_CHECKS)), True


def _fixed(compared: Mapping[RunConfig, Comparison]) -> dict[RunConfig, Errors]:
    return {
        config: {str(k): v for k, v in each.margins().items()} for config, each in compared.items()
    }


def _relative(compared: Mapping[RunConfig, Comparison]) -> dict[RunConfig, Errors]:
    """In bfloat16: each run's errors over the limit that the other frameworks' runs of the same
    model set.
    """
    alike: dict[int, list[RunConfig]] = {}
    for config in compared:
        if config.train.dtype == "bfloat16":
            alike.setdefault(config.train.seed, []).append(config)
    found: dict[RunConfig, Errors] = {}
    for configs in alike.values():
        if len(configs) > 1:
            margins = relative_margins([compared[c].errors() for c in configs])
            found |= zip(configs, margins, strict=True)
    return found


def _summarized(
    framework: str,
    dtype: str,
    used: Mapping[RunConfig, Errors],
    compared: Mapping[RunConfig, Comparison],
    undetermined: Sequence[RunConfig],
) -> list[Margin]:
    checks = list(dict.fromkeys(check for errors in used.values() for check in errors))
    found = []
    here = [(c.framework, c.train.dtype) for c in undetermined].count((framework, dtype))
    for check in checks:
        by_run = {config: errors[check] for config, errors in used.items() if check in errors}
        config = max(by_run, key=lambda each: by_run[each])
        found.append(
            Margin(
                framework=framework,
                dtype=dtype,
                check=check,
                worst=by_run[config],
                median=statistics.median(by_run.values()),
                repeats=len(by_run),
                worst_run=describe(config),
                worst_tensor=_tensor(compared[config], check),
                left_out=here if check in LONG_CHECKS else 0,
            )
        )
    return found


def _tensor(comparison: Comparison, check: str) -> str:
    """The tensor of the largest error of a check; of losses the step."""
    of: list[Difference] = [each for each in comparison.differences if check.startswith(each.check)]
    if not of:
        return ""
    worst = max(of, key=lambda each: each.relative / each.limit)
    key = worst.key
    if key.tensor == "loss":
        return f"step {key.step}"
    place = f"{key.unit}, micro-batch {key.micro_batch}"
    return place if worst.check == "activation" else key.tensor
