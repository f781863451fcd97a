"""The files that users of Keras have: weights alone, the whole model in either format, and one that
leads elsewhere.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from common.checkpoint.foreign.errors import ExchangeError
from common.spec.parameters import random_arrays
from common.spec.run import TransformerSpec
from tf_impl.convert import plain_model, read_weights, write_weights

MODEL = TransformerSpec(
    context_length=6, num_layers=2, d_model=12, num_heads=2, d_ff=20, tied_head=True
)
WEIGHTS = random_arrays(MODEL, 1, "float32", 0.5)


def test_weights_and_whole_models_are_the_same_weights(tmp_path: Path) -> None:
    write_weights(MODEL, WEIGHTS, tmp_path / "model.weights.h5")
    model = plain_model(MODEL)
    model.load_weights(tmp_path / "model.weights.h5")
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)  # its state has whole numbers too
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    model.save_weights(tmp_path / "trained.weights.h5")
    for name in ("model.weights.h5", "model.keras", "model.h5", "trained.weights.h5"):
        found = read_weights(MODEL, tmp_path / name)
        assert set(found) == set(WEIGHTS)
        for key, value in found.items():
            np.testing.assert_array_equal(value, WEIGHTS[key], err_msg=name)


def test_a_file_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    write_weights(MODEL, WEIGHTS, tmp_path / "elsewhere.weights.h5")
    with h5py.File(tmp_path / "elsewhere.weights.h5") as file:
        path = next(name for name in _datasets(file))
    for kind in ("link", "storage", "virtual"):
        write_weights(MODEL, WEIGHTS, tmp_path / "hostile.weights.h5")
        with h5py.File(tmp_path / "hostile.weights.h5", "a") as file:
            shape = file[path].shape
            del file[path]
            if kind == "link":
                file[path] = h5py.ExternalLink("elsewhere.weights.h5", path)
            elif kind == "storage":
                file.create_dataset(
                    path,
                    shape,
                    "f4",
                    external=[(str(tmp_path / "elsewhere.weights.h5"), 0, 4 * 10**4)],
                )
            else:
                layout = h5py.VirtualLayout(shape, "f4")
                layout[:] = h5py.VirtualSource(str(tmp_path / "elsewhere.weights.h5"), path, shape)
                file.create_virtual_dataset(path, layout)
        with pytest.raises(ExchangeError, match="leads to another file"):
            read_weights(MODEL, tmp_path / "hostile.weights.h5")
    with zipfile.ZipFile(tmp_path / "bomb.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(100 * 2**20))
    with pytest.raises(ExchangeError, match="packed in"):
        read_weights(MODEL, tmp_path / "bomb.keras")


def _datasets(file: h5py.File) -> list[str]:
    found: list[str] = []
    file.visititems(
        lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None
    )
    return found
