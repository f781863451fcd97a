"""The kernels that `triptych doctor` measures, for every framework. Imports no framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from common.runtime.kernels import kernels
from common.spec.run import preset


def check_kernels(prepare: Callable[..., Any], framework: str, dtype: str) -> Mapping[str, Any]:
    """Every kernel of `prepare(config)` runs, under its name and in its order. Returns what the
    framework says of itself.
    """
    tiny = preset("tiny")
    one = tiny.model_copy(update={"train": tiny.train.model_copy(update={"dtype": dtype})})
    operations, environment = prepare(one)
    assert list(operations) == [kernel.name for kernel in kernels(one)]
    for operation in operations.values():
        operation()
    assert environment["framework"] == framework
    return dict(environment)
