"""The worker side of import and export, with a framework: `python -m <implementation>.convert`.

    export CHECKPOINT FILE          writes the framework's own file
    import FILE CHECKPOINT SPEC [TOKENIZER]   reads one; SPEC is the model as JSON, TOKENIZER a file, empty for bytes
    tensors OUT FILE..            PyTorch: all tensors of the files, by their own names, as one safetensors file

What was done to a file's content is said in lines with "note: " on stdout. A wrong file is one line
on stderr and exit status 2.
"""  # noqa: E501

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from common import checkpoint
from common.checkpoint import Arrays, CheckpointError
from common.checkpoint.foreign.errors import ExchangeError, note
from common.checkpoint.foreign.source import find
from common.io.edges import printable
from common.io.streams import set_up_streams
from common.spec.parameters import TOKEN_EMBEDDING, parameter_shapes
from common.spec.run import TransformerSpec

CHECKPOINT_BYTES_PER_WEIGHT = 32
"""A weight, two moments and a copy, in float64."""
OVERHEAD_BYTES = 64 * 2**20
"""Room for what a foreign file may hold besides the weights."""


def main(
    arguments: Sequence[str],
    write: Callable[[TransformerSpec, Arrays, Path], None],
    read: Callable[[TransformerSpec, Path], Mapping[str, NDArray[Any]]],
    read_tensors: Callable[[Sequence[Path]], Mapping[str, NDArray[Any]]] | None = None,
) -> int:
    """Run one of the directions with an implementation's own functions. Return the exit status."""
    set_up_streams()
    try:
        match list(arguments):
            case ["export", folder, file]:
                saved = checkpoint.load(Path(folder), with_moments=False)
                write(saved.manifest.model, saved.weights, Path(file))
            case ["import", file, folder, spec, *tokenizer]:
                model = TransformerSpec.model_validate_json(spec)
                check_size(Path(file), model)
                weights = checked(read(model, Path(file)), model)
                content = Path(tokenizer[0]).read_bytes() if tokenizer else None
                checkpoint.write_weights(Path(folder), model, weights, Path(file).name, content)
            case ["tensors", out, *files] if read_tensors is not None:
                save_file(dict(read_tensors([Path(file) for file in files])), out)
            case _:
                raise ExchangeError(
                    "usage: export CHECKPOINT FILE | import FILE CHECKPOINT SPEC [TOKENIZER] | "
                    "tensors OUT FILE.."
                )
        return 0
    except (ExchangeError, CheckpointError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2


def in_one_line(error: Exception) -> str:
    """Return a framework's error in one line: its type and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")


def check_size(path: Path, model: TransformerSpec) -> None:
    """Check a file's size before reading it. Raises ExchangeError if it is beyond all reason."""
    shapes = parameter_shapes(model)
    elements = sum(math.prod(shape) for shape in shapes.values()) + math.prod(
        shapes[TOKEN_EMBEDDING]
    )
    limit = CHECKPOINT_BYTES_PER_WEIGHT * elements + OVERHEAD_BYTES
    size = sum(file.stat().st_size for file in find(path).files)
    if size > limit:
        raise ExchangeError(f"{path}: {size} bytes; expected at most {limit} for this model")


def checked(found: Mapping[str, NDArray[Any]], model: TransformerSpec) -> Arrays:
    """Return `model`'s weights in canonical order; 16-bit becomes float32. Raises ExchangeError."""
    expected = parameter_shapes(model)
    check_names(set(found), set(expected))
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ExchangeError(
                f"{name} has shape {list(found[name].shape)}; expected {list(shape)}"
            )
        if not np.issubdtype(found[name].dtype, np.floating):
            raise ExchangeError(
                f"{name} has dtype {found[name].dtype}; expected float32 or float64"
            )
    dtypes = sorted({str(array.dtype) for array in found.values()})
    dtype = "float64" if dtypes == ["float64"] else "float32"
    note_dtypes(dtypes)
    with np.errstate(over="ignore"):  # said below
        weights = {name: np.ascontiguousarray(found[name].astype(dtype)) for name in expected}
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise ExchangeError(
                f"{name} has values that are not finite in {dtype}; expected weights that compute"
            )
    return weights


def note_dtypes(dtypes: Sequence[str]) -> None:
    """Note it if the weights are stored in another precision than the file's."""
    if list(dtypes) not in (["float32"], ["float64"]):
        note(f"{', '.join(dtypes)} becomes float32")


def check_names(found: set[str], expected: set[str]) -> None:
    """Raise ExchangeError with the first missing or unexpected name."""
    if found != expected:
        name = min(found ^ expected)
        raise ExchangeError(
            f"{printable(name)} is {'not part of this model' if name in found else 'missing'}"
        )


def check_tied(own: NDArray[Any], copy: NDArray[Any]) -> None:
    """Check that a tied head equals the token embedding. Raises ExchangeError."""
    if not np.array_equal(own, copy):
        raise ExchangeError("the head differs from the token embedding; expected --no-tied-head")
