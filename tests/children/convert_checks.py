"""`python -m tests.children.convert_checks IMPLEMENTATION FOLDER..`: writes its file, uses it, and reads it back.

Every FOLDER has a snapshot `saved`, tokens.npy, and in logits.npy what the oracle says.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common import snapshot
from common.exchange.child import ExchangeError, main
from common.snapshot import Snapshot

FILES = {"torch_impl": "model.pt", "tf_impl": "model.weights.h5", "paddle_impl": "model.pdparams"}
TOLERANCE = 1e-12


def torch_logits(convert: Any, saved: Snapshot, file: Path, tokens: Any) -> Any:
    import torch

    model = convert.plain_model(saved.manifest.model).double()
    model.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).numpy()


def tf_logits(convert: Any, saved: Snapshot, file: Path, tokens: Any) -> Any:
    model = convert.plain_model(saved.manifest.model, "float64")
    model.load_weights(file)
    return model.predict(tokens, verbose=0)


def paddle_logits(convert: Any, saved: Snapshot, file: Path, tokens: Any) -> Any:
    import paddle

    model = convert.plain_model(saved.manifest.model)
    model.set_state_dict(paddle.load(str(file)))
    model.eval()
    with paddle.no_grad():
        return model(paddle.to_tensor(tokens)).numpy()


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def check(implementation: str, place: Path) -> None:
    folder = place / "saved"
    convert = importlib.import_module(f"{implementation}.convert")
    file, saved = place / FILES[implementation], snapshot.load(folder)
    spec = saved.manifest.model
    both = convert.write_weights, convert.read_weights
    assert main(["export", str(folder), str(file)], *both) == 0

    logits = {"torch_impl": torch_logits, "tf_impl": tf_logits, "paddle_impl": paddle_logits}[implementation]
    found, expected = logits(convert, saved, file, np.load(place / "tokens.npy")), np.load(place / "logits.npy")
    assert np.linalg.norm(found - expected) < TOLERANCE * np.linalg.norm(expected)

    assert main(["import", str(file), str(place / "back"), spec.model_dump_json()], *both) == 0
    for name, value in snapshot.load(place / "back").weights.items():
        np.testing.assert_array_equal(value, saved.weights[name], name)

    other = spec.model_copy(update={"num_layers": spec.num_layers + 1})
    wider = spec.model_copy(update={"d_ff": spec.d_ff + 1})
    tied = [spec.model_copy(update={"tied_head": True})] if not spec.tied_head else []
    for wrong in (other, wider, *tied):
        assert main(["import", str(file), str(place / "wrong"), wrong.model_dump_json()], *both) == 2, wrong
    hostile = place / f"hostile-{file.name}"
    for content in (
        pickle.dumps({"x": Hostile(f"touch {place / 'harmed'}")}),
        b"",
        b"junk" * 100,
        file.read_bytes()[:500],
    ):
        hostile.write_bytes(content)
        try:
            convert.read_weights(spec, hostile)
            raise AssertionError("a wrong file was read")
        except ExchangeError as error:
            assert str(error)
    assert not (place / "harmed").exists() and not (place / "wrong").exists()


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        check(sys.argv[1], Path(argument))
