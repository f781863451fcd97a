"""A framework's own file of weights: used in its plain model, read back, and refused where it is
not what it should be.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import checkpoint
from common.checkpoint.foreign.converter import ExchangeError, main
from common.runtime.oracle_worker import OracleEngine
from common.spec.parameters import random_arrays
from common.spec.run import RunConfig, TrainSpec, TransformerSpec

MODEL = TransformerSpec(
    context_length=6, num_layers=2, d_model=12, num_heads=2, d_ff=20, dropout=0.1
)
TOLERANCE = 1e-12

every_model = pytest.mark.parametrize(
    "spec",
    [
        MODEL.model_copy(update={"tied_head": tied, "norm": norm})
        for tied, norm in ((True, "pre"), (False, "post"))
    ],
    ids=["tied-pre", "untied-post"],
)


class Hostile:
    """What makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def check_file(
    convert: Any,
    name: str,
    spec: TransformerSpec,
    place: Path,
    logits: Callable[[TransformerSpec, Path, Any], Any],
) -> None:
    """`convert` is the implementation's module; `logits(spec, file, tokens)` are those of its plain
    model.
    """
    file, both = place / name, (convert.write_weights, convert.read_weights)
    saved = checkpoint.load(
        checkpoint.write_weights(
            place / "saved", spec, random_arrays(spec, 1, "float64", 0.5), "a test"
        )
    )
    assert main(["export", str(place / "saved"), str(file)], *both) == 0
    oracle = OracleEngine(
        RunConfig(model=spec, train=TrainSpec(batch_size=4, micro_batches=2, dtype="float64"))
    )
    oracle.reset(saved.weights)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 6))
    expected = oracle.predict(tokens)
    assert np.linalg.norm(logits(spec, file, tokens) - expected) < TOLERANCE * np.linalg.norm(
        expected
    )

    assert main(["import", str(file), str(place / "back"), spec.model_dump_json()], *both) == 0
    for key, value in checkpoint.load(place / "back").weights.items():
        np.testing.assert_array_equal(value, saved.weights[key], key)

    wrong = [
        {"num_layers": spec.num_layers + 1},
        {"d_ff": spec.d_ff + 1},
        *([] if spec.tied_head else [{"tied_head": True}]),
    ]
    for changes in wrong:
        other = spec.model_copy(update=changes).model_dump_json()
        assert main(["import", str(file), str(place / "wrong"), other], *both) == 2, changes
    hostile = place / f"hostile-{name}"
    for content in (
        pickle.dumps({"x": Hostile(place / "harmed")}),
        b"",
        b"junk" * 100,
        file.read_bytes()[:500],
    ):
        hostile.write_bytes(content)
        with pytest.raises(ExchangeError, match=r"\w"):
            convert.read_weights(spec, hostile)
    assert not (place / "harmed").exists() and not (place / "wrong").exists()


def same_weights(a: Path, b: Path) -> None:
    """Two checkpoints hold the same model, to the bit."""
    one, other = checkpoint.load(a), checkpoint.load(b)
    assert one.manifest.model == other.manifest.model
    for name, value in one.weights.items():
        np.testing.assert_array_equal(value, other.weights[name], err_msg=name)
