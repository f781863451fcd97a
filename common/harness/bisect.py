"""Walks two dumps of one step in the order of computation and names the first tensor that differs.

Every unit is judged by what it makes of the same input (the phases "unit_forward" and
"unit_backward"), so that errors do not add up: the first unit that differs is the one that is
wrong, not the one where rounding has piled up. What cannot be taken apart (the loss, the sum of the
gradients over micro-batches, the weights after the step) is judged as it ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.checkpoint.dump import Dump, DumpError
from common.oracle.limits import LIMITS, Difference, difference
from common.spec.parameters import Check, TensorKey, parameter_shapes, unit_names, unit_of
from common.spec.run import RunConfig, TrainSpec, TransformerSpec

COARSER = ("float64", "float32", "bfloat16")
MAY_DIFFER = ("dtype", "micro_batches", "steps", "dropout_masks")
"""Fields of model and training that do not change the mathematics of one step."""

ADVICE = {
    "weights before": "at step 0 they were loaded otherwise; later, a dump of an earlier step says "
    "where the runs parted",
    "forward": "the unit makes something else of the same input",
    "message": "the unit alone agrees; what it was fed with does not: what is sent between units, "
    "or which micro-batch",
    "loss": "the logits agree; the loss makes something else of them: which labels count, what it "
    "is divided by",
    "backward": "the unit's backward makes something else of the same input and output gradient",
    "gradients": "every unit's own gradients agree; their sum does not: over micro-batches, of a "
    "tied weight, its scale",
    "optimizer": "from the same weights, gradients and moments: clipping, the optimizer, or its "
    "hyperparameters",
    "weights after": "the optimizer alone agrees; in the run it had other moments or another "
    "gradient norm",
}
"""What a first difference at a place means, in the order of the walk."""


@dataclass(frozen=True)
class Finding:
    """One tensor, compared."""

    place: str
    unit: str
    tensor: str
    difference: Difference
    running: float | None = None
    """The relative difference of the same tensor in the step as it ran, with all earlier errors."""

    @property
    def passed(self) -> bool:
        return self.difference.passed

    def as_json(self) -> dict[str, Any]:
        d = self.difference
        return {
            "place": self.place,
            "unit": self.unit,
            "tensor": self.tensor,
            "micro_batch": None if d.key.micro_batch < 0 else d.key.micro_batch,
            "passed": self.passed,
            "relative": _finite(d.relative),
            "limit": d.limit,
            "largest": _finite(d.largest),
            "at": list(d.where),
            "a": _finite(d.expected),
            "b": _finite(d.observed),
            "relative_as_run": None if self.running is None else _finite(self.running),
        }


def _finite(number: float) -> float | str:
    """JSON has neither infinities nor NaN."""
    return number if np.isfinite(number) else str(number)


@dataclass(frozen=True)
class Bisection:
    """All findings in the order of computation."""

    a: Dump
    b: Dump
    dtype: str
    findings: tuple[Finding, ...]
    missing: tuple[str, ...]
    """What only one of the two has, in words."""

    @property
    def first(self) -> Finding | None:
        return next((finding for finding in self.findings if not finding.passed), None)

    @property
    def verdict(self) -> str:
        first = self.first
        if first is None:
            return f"all {len(self.findings)} tensors agree within the limits of {self.dtype}"
        d = first.difference
        where = "" if d.key.micro_batch < 0 else f", micro-batch {d.key.micro_batch}"
        return (
            f"first difference: {first.unit}, {first.place}, {first.tensor}{where}: relative "
            f"difference {d.relative:.2e}, limit {d.limit:.0e}; largest at {list(d.where)}: "
            f"{d.expected!r} in A, {d.observed!r} in B. {ADVICE[first.place].capitalize()}."
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "a": self.a.name,
            "b": self.b.name,
            "step": self.a.step,
            "dtype": self.dtype,
            "agree": self.first is None,
            "verdict": self.verdict,
            "first": None if self.first is None else self.first.as_json(),
            "missing": list(self.missing),
            "findings": [finding.as_json() for finding in self.findings],
        }


def bisect(a: Dump, b: Dump) -> Bisection:
    """Compare B with A. Raises DumpError if they are not runs of one model and one step."""
    config = a.config or b.config
    if config is None:
        raise DumpError("neither dump says its configuration; expected in at least one")
    if a.step != b.step:
        raise DumpError(f"step {a.step} against step {b.step}; expected dumps of the same step")
    if a.config and b.config:
        _require_same(a.config, b.config)
    _require_same_tokens(a, b)
    dtypes = [each.config.train.dtype for each in (a, b) if each.config]
    walk = _Walk(a, b, config, max(dtypes, key=COARSER.index))
    return Bisection(a, b, walk.dtype, tuple(walk.findings()), tuple(walk.missing()))


def _require_same(a: RunConfig, b: RunConfig) -> None:
    sections: tuple[tuple[Any, Any, Any], ...] = (
        (TransformerSpec, a.model, b.model),
        (TrainSpec, a.train, b.train),
    )
    for model, left, right in sections:
        for name in model.model_fields:
            if name not in MAY_DIFFER and getattr(left, name) != getattr(right, name):
                raise DumpError(
                    f"{name} = {getattr(left, name)} against {getattr(right, name)}: not the "
                    "same run"
                )


def _require_same_tokens(a: Dump, b: Dump) -> None:
    """Refuse dumps of different tokens: every tensor would differ, and none would say why."""
    for key, tokens in a.tensors.items():
        if key.phase == "reference_tokens" and not np.array_equal(
            tokens, b.tensors.get(key, tokens)
        ):
            raise DumpError(
                f"the {key.tensor} are other tokens in A and B; expected runs of one text and one "
                "tokenizer"
            )


class _Walk:
    """The tensors of both dumps by place, whatever the stage and the number of micro-batches."""

    def __init__(self, a: Dump, b: Dump, config: RunConfig, dtype: str) -> None:
        self.step, self.dtype = a.step, dtype
        self.units = unit_names(config.model)
        self.parameters = list(parameter_shapes(config.model))
        self.sides = [_by_place(dump) for dump in (a, b)]
        self.names = ["A", "B"]

    def findings(self) -> Iterator[Finding]:
        for name in self.parameters:
            yield from self._whole("weights before", "before", name, "trained_parameter")
        # Each unit alone first. If it agrees, and what it was fed with in the run does not, the
        # fault lies between the units: a message that went to the wrong micro-batch, say.
        for unit in self.units:
            yield from self._tensor(
                "forward", ("unit_forward", unit, "output"), "activation", self._running(unit)
            )
            yield from self._tensor("message", ("forward", unit, "output"), "activation")
        yield from self._tensor("loss", ("forward", "head", "loss"), "loss")
        for unit in reversed(self.units):
            # What the unit made by itself of one input and one gradient of its output.
            alone = [
                tensor
                for phase, of, tensor in self.sides[0]
                if phase == "unit_backward" and of == unit
            ]
            # The input's gradient has no place in `order`: it is the end of the unit's backward.
            order = {name: -i for i, name in enumerate(self.parameters)}
            for tensor in sorted(alone, key=lambda name: order.get(name, 1)):
                running = None
                if tensor in order:
                    running = self._relative(("backward", unit_of(tensor), tensor), "gradient")
                yield from self._tensor(
                    "backward", ("unit_backward", unit, tensor), "gradient", running
                )
        for name in reversed(self.parameters):
            yield from self._whole("gradients", "backward", name, "gradient")
        for name in self.parameters:
            yield from self._whole("optimizer", "optimizer", name, "optimizer_step")
        for name in self.parameters:
            yield from self._whole("weights after", "after", name, "trained_parameter")

    def missing(self) -> Iterator[str]:
        for mine, other, name in ((0, 1, "B"), (1, 0, "A")):
            lacking = [place for place in self.sides[mine] if place not in self.sides[other]]
            for phase in dict.fromkeys(
                phase for phase, _, _ in lacking if not phase.startswith("reference_")
            ):
                count = sum(place[0] == phase for place in lacking)
                yield f"{name} lacks {count} tensor{'' if count == 1 else 's'} of the phase {phase}"

    def _whole(self, place: str, phase: str, name: str, check: Check) -> Iterator[Finding]:
        yield from self._tensor(place, (phase, unit_of(name), name), check)

    def _running(self, unit: str) -> float | None:
        return self._relative(("forward", unit, "output"), "activation")

    def _relative(self, place: _Place, check: Check) -> float | None:
        found = [self._compared(place, check, joined=True)]
        return None if found[0] is None else found[0].relative

    def _tensor(
        self, place: str, key: _Place, check: Check, running: float | None = None
    ) -> Iterator[Finding]:
        found = self._compared(key, check)
        if found is not None:
            yield Finding(place, key[1], key[2], found, running)

    def _compared(self, place: _Place, check: Check, joined: bool = False) -> Difference | None:
        """Return the first micro-batch that differs, or the worst; cut otherwise, all as one."""
        # What only one side has is listed by `missing`, and compared with nothing.
        a, b = (side.get(place) for side in self.sides)
        if a is None or b is None:
            return None
        # Cut into other micro-batches, pieces cannot be compared one by one; the whole can.
        if joined or a.keys() != b.keys() or any(a[i].shape != b[i].shape for i in a):
            a, b = ({-1: _joined(each)} for each in (a, b))
        phase, unit, tensor = place
        limit = LIMITS[check][self.dtype]
        compared = [
            difference(TensorKey(self.step, phase, 0, i, unit, tensor), check, b[i], a[i], limit)
            for i in sorted(a)
        ]
        return next(
            (each for each in compared if not each.passed),
            max(compared, key=lambda each: each.relative),
        )


_Place = tuple[str, str, str]
"""(phase, unit, tensor)"""


def _by_place(dump: Dump) -> dict[_Place, dict[int, NDArray[Any]]]:
    found: dict[_Place, dict[int, NDArray[Any]]] = {}
    for key, value in dump.tensors.items():
        found.setdefault((key.phase, key.unit, key.tensor), {})[key.micro_batch] = value
    return found


def _joined(pieces: dict[int, NDArray[Any]]) -> NDArray[Any]:
    """Micro-batches in order, as one mini-batch."""
    arrays = [pieces[i] for i in sorted(pieces)]
    if len(arrays) == 1:
        return arrays[0]
    try:
        return np.concatenate(arrays)
    except ValueError:  # shapes that do not fit are a difference, not an error
        return np.full(0, np.nan)
