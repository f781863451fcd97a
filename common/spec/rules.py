"""What no run can be: combinations of valid options that a framework or executor does not offer.

`why_impossible` is asked wherever a run is put together, before a worker starts, so that whatever
passes here runs. The rules within one specification (`common.spec.run`) are its own.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from common.schedule.action import Op, ScheduleError
from common.schedule.generators import make_schedule
from common.schedule.validate import validate
from common.spec import habits
from common.spec.gpus import visible_gpus
from common.spec.partition import schedule_of
from common.spec.run import FRAMEWORKS, RunConfig

NATIVE_SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "torch": (
        *("gpipe", "1f1b", "interleaved", "interleaved-zb", "zb-h1", "zb-v", "dualpipev"),
        "file:PATH",
    ),
    "paddle": ("1f1b",),
}
"""What `executor = native` offers, by framework."""

BFLOAT16_ON_CPU = tuple(name for name in FRAMEWORKS if name != "paddle")
"""Frameworks that can compute this model in bfloat16 on a CPU; see
`paddle_impl.devices.check_dtype`."""

REPLICATED_BASELINES: Mapping[str, tuple[str, ...]] = {
    "torch": ("plain",),
    "tensorflow": ("plain",),
    "paddle": ("plain", "native"),
}
"""Executors of a framework's own that train replicas: data parallelism, and fleet's pipeline."""

TENSOR_PARALLEL: tuple[str, ...] = ("torch", "tensorflow", "paddle")
"""Frameworks that cut the matrices of a stage into shards."""

TENSOR_PARALLEL_BASELINES: Mapping[str, tuple[str, ...]] = {"torch": ("plain",)}
"""Executors of a framework's own that do: DTensor in the plain loop."""
COMPRESSED_BASELINES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("torch", "plain"): ("none", "fp16", "powersgd:R")
}
"""What a framework's own data parallelism compresses on a CPU: PyTorch's by communication hooks."""


class Impossible(NamedTuple):
    """A rule that a run breaks."""

    field: str
    text: str
    """What follows the field's name, or its option's, in the error line."""

    def __str__(self) -> str:
        return self.field + self.text


def why_impossible(config: RunConfig) -> Impossible | None:
    """Return the first rule that the run breaks, or None."""
    return (
        _schedule(config)
        or _device(config)
        or _precision(config)
        or _drift(config)
        or _executor(config)
        or why_no_mesh(config)
        or _compression(config)
    )


def has_cuda() -> bool:
    """Return whether the machine has an NVIDIA driver, without asking a framework."""
    return shutil.which("nvidia-smi") is not None or any(
        map(Path.exists, map(Path, ("/dev/nvidiactl", "/dev/dxg")))
    )


def has_bfloat16(framework: str, device: str) -> bool:
    """Return whether a framework may compute in bfloat16 here, on a `RunConfig.device`."""
    return framework in BFLOAT16_ON_CPU or (device != "cpu" and has_cuda())


def _schedule(config: RunConfig) -> Impossible | None:
    try:
        schedule = schedule_of(config)
    except ScheduleError as error:
        return Impossible("schedule", f": {' '.join(str(error).split())}")
    # A named schedule is right by its tests; a file may be anything, and would hang its run.
    violations = validate(schedule)
    if not violations:
        not_cut = config.why_not_cut(schedule.num_virtual_stages)
        return None if not_cut is None else Impossible("schedule", f": {not_cut}")
    why = (
        f"breaks {len(violations)} rules, the first: {violations[0]}; `triptych validate FILE` "
        "lists them all"
    )
    return Impossible("schedule", f" = {config.schedule}: {why}")


def _device(config: RunConfig) -> Impossible | None:
    if config.device == "cuda" and not has_cuda():
        return Impossible(
            "device", " = cuda: this machine has no NVIDIA driver; expected cpu or auto"
        )
    return None


def _precision(config: RunConfig) -> Impossible | None:
    if config.train.dtype != "bfloat16":
        return None
    if not has_bfloat16(config.framework, config.device):
        why = (
            f"{config.framework} cannot compute in it on a CPU; expected a GPU, "
            f"{' or '.join(BFLOAT16_ON_CPU)}, or float32 or float64"
        )
    elif config.executor != "table":
        why = f"executor = {config.executor} does not compute in it; expected float32 or float64"
    else:
        return None
    return Impossible("dtype", f" = bfloat16: {why}")


def _drift(config: RunConfig) -> Impossible | None:
    if config.drift is None:
        return None
    # From the outside in: can this framework do it, does this executor ask for it, would it show?
    drift = habits.by_name(config.drift)
    able = drift.frameworks
    if config.framework not in able:
        why = f"{config.framework} has no such habit; expected --frameworks {','.join(able)}"
    elif config.executor != "table":
        why = f"executor = {config.executor} has no such habit; expected executor = table"
    elif lacking := drift.lacks(config.model):
        now, then = getattr(config.model, lacking), drift.model[lacking]
        now, then = (str(value).lower() for value in (now, then))
        why = f"changes nothing where {lacking} = {now}; expected for instance {then}"
    else:
        return None
    return Impossible("drift", f" = {config.drift}: {why}")


def _executor(config: RunConfig) -> Impossible | None:
    if config.executor == "table":
        return None
    if config.recompute != "none":
        why = f"executor = {config.executor} recomputes nothing; expected none, or executor = table"
        return Impossible("recompute", f" = {config.recompute}: {why}")
    why_not = _why_not_native(config) if config.executor == "native" else None
    return None if why_not is None else Impossible("executor", f" = native: {why_not}")


def _replicas(config: RunConfig) -> Impossible | None:
    if config.replicas == 1:
        return None
    if config.drift is not None:
        why = f"drift = {config.drift} is put back in one pipeline; expected 1"
    elif config.executor not in ("table", *REPLICATED_BASELINES[config.framework]):
        why = f"executor = {config.executor} has one pipeline; expected 1, or executor = table"
    else:
        return None
    return Impossible("replicas", f" = {config.replicas}: {why}")


def why_no_mesh(config: RunConfig) -> Impossible | None:
    """Return the first rule that the run's replicas or shards break, whatever else it is."""
    return _replicas(config) or _tensor_parallel(config)


def _tensor_parallel(config: RunConfig) -> Impossible | None:
    model, t = config.model, config.tensor_parallel
    if t == 1:
        if not config.vocab_parallel:
            return None
        return Impossible(
            "vocab_parallel", ": cuts among shards; expected tensor_parallel = 2 or more"
        )
    # What is cut by whole heads and whole features; the vocabulary alone may be cut unevenly.
    sizes = {"num_heads": model.num_heads, "num_kv_heads": model.kv_heads, "d_ff": model.d_ff}
    not_cut = [f"{name} = {size}" for name, size in sizes.items() if size % t]
    if config.framework not in TENSOR_PARALLEL:
        offered = " or ".join(TENSOR_PARALLEL) or "1"
        why = f"{config.framework} does not cut matrices; expected {offered}"
    elif config.executor not in ("table", *TENSOR_PARALLEL_BASELINES.get(config.framework, ())):
        why = f"executor = {config.executor} has whole matrices; expected 1, or executor = table"
    elif config.executor != "table" and (
        model.dropout or config.vocab_parallel or config.replicas > 1
    ):
        why = (
            f"executor = {config.executor} cuts blocks alone, of one replica and without dropout; "
            "expected that, or executor = table"
        )
    elif config.drift is not None:
        why = f"drift = {config.drift} is put back where matrices are whole; expected 1"
    elif not_cut:
        # Every divisor of all three fits: for 8 heads, 2 of keys and d_ff = 1024 that is 1 and 2.
        common = math.gcd(*sizes.values())
        fits = [n for n in range(1, common + 1) if common % n == 0]
        why = f"does not divide {' and '.join(not_cut)}; expected one of {fits}"
    elif config.vocab_parallel and t > model.vocab_size:
        why = f"more than vocab_size = {model.vocab_size}; expected at most as many"
    else:
        return None
    return Impossible("tensor_parallel", f" = {t}: {why}")


def _compression(config: RunConfig) -> Impossible | None:
    if config.compress == "none":
        return None
    offered = COMPRESSED_BASELINES.get((config.framework, config.executor), ("none",))
    kinds = [word.partition(":")[0] for word in offered]
    if config.replicas == 1:
        why = "one replica sends no gradients; expected none, or replicas of 2 or more"
    elif config.executor == "plain" and config.compression.kind not in kinds:
        what = f"{config.framework}'s own data parallelism on a CPU has no such compression"
        why = f"{what}; expected {', '.join(offered)}, or executor = table"
    elif config.tensor_parallel > 1 and (
        config.executor != "table" or config.compression.kind not in ("fp16", "bf16")
    ):
        why = "each shard would compress its part of a matrix; expected tensor_parallel = 1, or "
        why += "fp16 or bf16 with executor = table"
    else:
        return None
    return Impossible("compress", f" = {config.compress}: {why}")


def why_too_few_gpus(processes: int, gpus: int) -> str | None:
    """Return why so many processes cannot run on so many GPUs; None if they can."""
    if gpus >= processes:
        return None
    return (
        f"NCCL takes one process per GPU, and {processes} have {gpus}; expected stages x replicas "
        f"x tensor_parallel = {gpus}, or device = cpu"
    )


def _why_not_native(config: RunConfig) -> str | None:
    p, m, name = config.stages, config.train.micro_batches, config.schedule
    cards = len(visible_gpus()) if config.framework == "torch" and config.device != "cpu" else 0
    if cards and (why := why_too_few_gpus(p, cards)):
        return why
    from_file = name.startswith("file:")
    if ("file:PATH" if from_file else name) not in NATIVE_SCHEDULES.get(config.framework, ()):
        offered = "; ".join(
            f"{framework} with {', '.join(names)}" for framework, names in NATIVE_SCHEDULES.items()
        )
        return (
            f"{config.framework} has no pipeline of its own with the schedule {name}; expected "
            f"{offered}"
        )
    if not config.train.micro_batches_are_equal:
        return (
            f"micro_batches = {m} does not divide batch_size = {config.train.batch_size}; "
            "expected equal micro-batches"
        )
    if from_file:
        schedule = make_schedule(name, p, m, config.chunks)
        # PyTorch's runtime takes targets and losses as they come, so the first F of the last stage
        # has to be micro-batch 0's.
        last, chunk = schedule.location[-1]
        ends = [a.micro_batch for a in schedule.devices[last] if a.op is Op.F and a.chunk == chunk]
        if ends != sorted(ends):
            return (
                "the last stage's forwards are not in micro-batch order; expected them in order, "
                "as PyTorch's runtime takes them"
            )
    if config.framework == "torch" and name == "1f1b" and m < p:
        return f"micro_batches = {m}; PyTorch's 1f1b takes at least as many as stages, {p}"
    # p = 4: m = 8 makes 2 rounds of 4, m = 9 two of 4.5, which PyTorch refuses and we cut 5 and 4.
    rounds = max(1, m // p)  # what our `interleaved` calls groups; PyTorch's are all of one size
    in_rounds = ("interleaved", "interleaved-zb", "zb-h1")
    if config.framework == "torch" and name in in_rounds and m % rounds:
        return (
            f"micro_batches = {m}; PyTorch's {name} takes a multiple of {rounds} here "
            "(micro-batches // stages)"
        )
    return None
