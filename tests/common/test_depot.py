"""Checkpoints between hosts that share no folder."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from common import checkpoint
from common.checkpoint import CheckpointError, CheckpointWriter
from common.checkpoint import depot as depot_module
from common.spec.parameters import parameter_names
from common.spec.partition import plan_partition
from tests.common.test_checkpoint import CONFIG, DIGEST, flip, state, write

HERE = "127.0.0.1"


def equal(one: Path, other: Path) -> bool:
    arrays = [
        {**found.weights, **found.optimizer_state} for found in map(checkpoint.load, (one, other))
    ]
    return all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[1])


def save(directory: Path, device: int, address: str | None) -> None:
    weights, moments = state()
    names = parameter_names(CONFIG.model, plan_partition(CONFIG).parts[device])
    own = {name: weights[name] for name in names}
    own_moments = {key: moments[key] for key in moments if key.split("/")[1] in names}
    writer = CheckpointWriter(directory, 3, "a1", address)
    writer.write(CONFIG, 2, DIGEST, (device,), own, own_moments, {})


def test_a_shard_of_another_host_becomes_part_of_the_checkpoint(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with checkpoint.open_depot(HERE, "word", a, None) as address:
        first = threading.Thread(target=save, args=(a, 0, None))
        first.start()
        save(b, 1, address)
        first.join()
    assert equal(a / "step-00000002", write(tmp_path / "alone", 2))
    assert [path for path in b.rglob("*") if path.is_file()] == []


def test_a_shard_that_arrives_damaged_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depot_module, "digest_of", lambda file: "of what was sent")
    with (
        checkpoint.open_depot(HERE, "word", tmp_path / "a", None) as address,
        pytest.raises(CheckpointError, match="arrived damaged at http"),
    ):
        save(tmp_path / "b", 1, address)
    assert list((tmp_path / "a").rglob("*.note")) == []  # nobody takes the shard for whole
    with pytest.raises(CheckpointError, match="Connection refused"):
        save(tmp_path / "b", 1, address)


def test_a_checkpoint_is_fetched_whole_or_not_at_all(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 2), tmp_path / "b"
    with checkpoint.open_depot(HERE, "word", tmp_path / "a", a) as address:
        folder = checkpoint.fetch(address, b, "a1")
        assert folder == b / a.name and equal(folder, a)
        made = folder.stat().st_ino
        assert checkpoint.fetch(address, b, "a1").stat().st_ino == made  # it is here already
        flip(folder / "shard-00000.safetensors", -1)
        assert equal(checkpoint.fetch(address, b, "a1"), a)
        aside = b / f"damaged-{a.name}-1"
        assert sorted(path.name for path in b.iterdir()) == [aside.name, a.name]
        flip(a / "shard-00000.safetensors", -1)
        with pytest.raises(CheckpointError, match="SHA-256 differs"):
            checkpoint.fetch(address, tmp_path / "c", "a1")
        assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("GET", "word/../a/manifest.json"),
        ("GET", "word/.lock"),
        ("GET", "other/manifest.json"),
        ("PUT", "word/step-00000009/manifest.json"),
        ("PUT", "word/.step-00000009.a1.partial/../../shard-00000.safetensors"),
        ("PUT", "other/.step-00000009.a1.partial/shard-00000.safetensors"),
    ],
)
def test_nothing_else_is_given_or_taken(tmp_path: Path, method: str, name: str) -> None:
    offered = write(tmp_path / "a", 2)
    before = sorted(tmp_path.rglob("*"))
    with checkpoint.open_depot(HERE, "word", tmp_path / "a", offered) as address:
        root = address.removesuffix("word")
        request = urllib.request.Request(root + name, b"" if method == "PUT" else None)
        request.method = method
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request)
    assert sorted(tmp_path.rglob("*")) == before
