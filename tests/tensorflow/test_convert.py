"""Weights to and from Keras' own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.spec.run import TransformerSpec
from tests.converting import check_file, every_model
from tf_impl import convert


def logits(spec: TransformerSpec, file: Path, tokens: Any) -> Any:
    model = convert.plain_model(spec, "float64")
    model.load_weights(file)
    return model.predict(tokens, verbose=0)


@every_model
def test_the_file_works_in_a_plain_model_and_comes_back(
    spec: TransformerSpec, tmp_path: Path
) -> None:
    check_file(convert, "model.weights.h5", spec, tmp_path, logits)
