"""A second Keras object with the attributes of the first."""

from __future__ import annotations

from typing import Any, TypeVar

Object = TypeVar("Object")


def shallow_copy(of: Object, **changes: Any) -> Object:
    """As `copy.copy`, which in Keras saves and loads; `changes` are attributes, untracked."""
    # `vars` and not `setattr`, which in Keras would track the attributes as the copy's own.
    new = object.__new__(type(of))
    vars(new).update(vars(of) | changes)
    return new
