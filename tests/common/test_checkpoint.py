"""Checkpoints: written whole or not at all, independent of who wrote them, and refused in one line
when anything is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import checkpoint
from common.checkpoint import CheckpointError, CheckpointWriter, directory
from common.checkpoint import header as header_module
from common.checkpoint import write as write_module
from common.runtime.oracle_worker import OracleEngine
from common.spec.parameters import TOKEN_EMBEDDING, initial_weights, parameter_names, random_arrays
from common.spec.partition import plan_partition
from common.spec.run import RunConfig, TrainSpec, TransformerSpec
from tests.waiting import LONG_SECONDS

CONFIG = RunConfig(
    model=TransformerSpec(
        context_length=4, num_layers=2, d_model=8, num_heads=2, d_ff=8, tied_head=True
    ),
    train=TrainSpec(steps=3, batch_size=4, micro_batches=2, dtype="float64", seed=7),
    stages=2,
)
DIGEST = "0" * 64


def state(config: RunConfig = CONFIG) -> tuple[dict[str, Any], dict[str, Any]]:
    weights = initial_weights(config.model, 0, config.train.master_dtype)
    moments = {}
    for seed, moment in enumerate(("first_moment", "second_moment")):
        drawn = random_arrays(config.model, seed, config.train.master_dtype, 1.0)
        moments |= {f"{moment}/{name}": value for name, value in drawn.items()}
    return weights, moments


def write(directory: Path, steps_done: int = 1, keep: int = 3, config: RunConfig = CONFIG) -> Path:
    writer = CheckpointWriter(directory, keep, "a1")
    folder = writer.write(
        config, steps_done, DIGEST, (0, 1), *state(config), {"framework": "oracle", "flags": [1]}
    )
    assert folder is not None
    return folder


def test_what_is_written_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    saved = checkpoint.load(folder)
    weights, moments = state()
    assert folder.name == "step-00000001"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.json", "shard-00000.safetensors"]
    assert list(saved.weights) == list(weights) and set(saved.optimizer_state) == set(moments)
    for name, value in {**weights, **moments}.items():
        np.testing.assert_array_equal({**saved.weights, **saved.optimizer_state}[name], value)
    manifest = saved.manifest
    assert (manifest.model, manifest.train, manifest.steps_done) == (CONFIG.model, CONFIG.train, 1)
    assert manifest.data is not None and (manifest.data.step, manifest.data.seed) == (1, 7)
    assert manifest.written_by == {"framework": "oracle"}


def test_processes_write_one_checkpoint_together_and_a_tied_weight_once(tmp_path: Path) -> None:
    weights, moments = state()
    parts = plan_partition(CONFIG).parts

    def save(device: int) -> None:
        names = parameter_names(CONFIG.model, parts[device])
        assert TOKEN_EMBEDDING in names  # both ends hold it
        own = {name: weights[name] for name in names}
        own_moments = {key: moments[key] for key in moments if key.split("/")[1] in names}
        CheckpointWriter(tmp_path, 3, "a1").write(
            CONFIG, 2, DIGEST, (device,), own, own_moments, {}
        )

    threads = [threading.Thread(target=save, args=(device,)) for device in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = checkpoint.load(tmp_path / "step-00000002")
    assert len(together.manifest.files) == 2
    alone = checkpoint.load(write(tmp_path / "alone", 2))
    for name, value in {**alone.weights, **alone.optimizer_state}.items():
        np.testing.assert_array_equal({**together.weights, **together.optimizer_state}[name], value)


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    kept = [path.name for path in checkpoint.checkpoints_in(tmp_path)]
    assert kept == ["step-00000003", "step-00000004"]
    checkpoint.prune(tmp_path, 0)
    assert [path.name for path in checkpoint.checkpoints_in(tmp_path)] == ["step-00000004"]


def test_unfinished_ones_and_links_are_no_checkpoints(tmp_path: Path) -> None:
    good = write(tmp_path, 1)
    (tmp_path / ".step-00000002.a1.partial").mkdir()
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000004").symlink_to(good)
    assert checkpoint.checkpoints_in(tmp_path) == [good]
    with checkpoint.locked(tmp_path):
        assert not list(tmp_path.glob(".step-*"))


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    flip(bad / "shard-00000.safetensors", -1)
    lines: list[str] = []
    assert checkpoint.newest(tmp_path, lines.append) == good
    assert len(lines) == 1 and "damaged" in lines[0]
    assert checkpoint.set_aside(bad).name == "damaged-step-00000002-1"
    assert checkpoint.newest(tmp_path / "none") is None


# ----------------------------------------------------------------------------------------- two runs

HOLD = """
import sys
from pathlib import Path
from common import checkpoint
with checkpoint.locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_run_at_a_time_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=root, **pipes)
    assert other.stdout is not None and other.stdout.readline() == b"locked\n"
    with (
        pytest.raises(CheckpointError, match=rf"in use by process {other.pid} on .* since 20"),
        checkpoint.locked(tmp_path),
    ):
        pass
    other.kill()
    other.wait()
    with checkpoint.locked(tmp_path):  # its lock went with it
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_lock_of_another_machine_is_respected_while_it_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"pid": 1, "host": "elsewhere", "since": "2026-01-01T00:00:00Z"}
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps(owner))
    monkeypatch.setattr(directory, "TOUCH_SECONDS", 0.01)
    monkeypatch.setattr(directory, "GONE_SECONDS", LONG_SECONDS)
    over = threading.Event()
    elsewhere = threading.Thread(target=directory._touch, args=(lock, lock.read_text(), over))
    elsewhere.start()
    with (
        pytest.raises(CheckpointError, match="in use by process 1 on elsewhere since 2026"),
        checkpoint.locked(tmp_path),
    ):
        pass
    over.set()
    elsewhere.join()
    monkeypatch.setattr(directory, "GONE_SECONDS", 0.0)
    with checkpoint.locked(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_process_whose_lock_another_machine_has_taken_ends(tmp_path: Path) -> None:
    quick = "from common.checkpoint import directory; directory.TOUCH_SECONDS = 0.01\n"
    root = Path(__file__).resolve().parents[2]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    held = subprocess.Popen([sys.executable, "-c", quick + HOLD, str(tmp_path)], cwd=root, **pipes)
    assert held.stdout is not None and held.stdout.readline() == b"locked\n"
    owner = {"pid": 1, "host": "elsewhere", "since": "2026-01-01T00:00:00Z"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    assert held.wait() == 1
    assert held.stderr is not None and b"now in use by process 1 on elsewhere" in held.stderr.read()


# ------------------------------------------------------------------------------------------- damage


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(keys: str, value: Any) -> Callable[[Path], None]:
    """Sets one place of the manifest."""

    def change(content: dict[str, Any]) -> None:
        *path, last = keys.split("/")
        for key in path:
            content = content[key]
        content[last] = value

    return lambda folder: edit(folder, change)


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrites the shard's header and lets the manifest agree with the file's size and digest."""

    def damage(folder: Path) -> None:
        path = folder / "shard-00000.safetensors"
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        fields = json.loads(content[8 : 8 + length])
        change(fields)
        text = json.dumps(fields).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        with path.open("rb") as file:
            digest = header_module.digest_of(file)
        entry = {"bytes": path.stat().st_size, "sha256": digest}
        put("files/shard-00000.safetensors", entry)(folder)

    return damage


def shard(folder: Path) -> Path:
    return folder / "shard-00000.safetensors"


def as_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


NAME = "head.norm.bias"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "No such file"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: "),
    "not an object": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json: "),
    "huge": (lambda f: (f / "manifest.json").write_text(" " * (16 * 2**20 + 1)), "larger than"),
    "newer": (
        put("schema_version", 3),
        "schema_version = 3; this program reads 1 and 2; expected a newer",
    ),
    "unknown key": (put("extra", 1), "extra: Extra inputs are not permitted"),
    "NaN": (put("model/dropout", float("nan")), "model.dropout"),
    "negative step": (put("steps_done", -1), "steps_done"),
    "other positions": (put("steps_done", 2), "data stands at step 1, the rest at 2"),
    "no moments": (put("optimizer_state", []), "optimizer_state = []"),
    "other model": (put("model/d_ff", 16), "has shape [8, 8]; expected [8, 16]"),
    "absurd model": (put("model/num_layers", 10_000), "blocks, but"),
    "absurd depth": (put("model/num_layers", 10**15), "model.num_layers"),
    "absurd width": (put("model/d_ff", 10**30), "model.d_ff|expected"),
    "lacking tensor": (lambda f: edit(f, lambda c: c["tensors"].pop(NAME)), f"{NAME} is missing"),
    "foreign tensor": (
        put("tensors/x", {"file": "a", "dtype": "float64", "shape": [1]}),
        "x is not part of the model",
    ),
    "other dtype": (put(f"tensors/{NAME}/dtype", "float32"), f"{NAME} has dtype float32; expected"),
    "no such file": (
        put(f"tensors/{NAME}/file", "../../secret"),
        "is in ../../secret, which is no",
    ),
    "path outside": (put("files/..", {"bytes": 9, "sha256": DIGEST}), "expected shard-NNNNN"),
    "absurd size": (put("files/shard-00000.safetensors/bytes", 10**15), "its tensors have"),
    "truncated": (lambda f: os.truncate(shard(f), 1000), "has 1000 bytes; expected"),
    "longer": (lambda f: shard(f).open("ab").write(b"x"), "expected"),
    "flipped bit": (lambda f: flip(shard(f), -1), "SHA-256 differs"),
    "flipped header": (lambda f: flip(shard(f), 20), "expected|header|manifest says"),
    "no header": (lambda f: flip(shard(f), 7), "not a safetensors file"),
    "missing shard": (lambda f: shard(f).unlink(), "No such file"),
    "link": (lambda f: as_link(shard(f)), "a link; expected a file"),
    "linked manifest": (lambda f: as_link(f / "manifest.json"), "a link; expected a file"),
    "pipe": (lambda f: (shard(f).unlink(), os.mkfifo(shard(f))), "not a plain file"),
    "folder": (lambda f: (shard(f).unlink(), shard(f).mkdir()), "shard-00000.safetensors: "),
    "overlap": (header(lambda h: h[NAME].update(data_offsets=[0, 64])), "invalid offset"),
    "header dtype": (header(lambda h: h[NAME].update(dtype="I64")), "manifest says"),
    "header type": (header(lambda h: h[NAME].update(dtype="OBJECT")), "unknown variant `OBJECT`"),
    "header shape": (header(lambda h: h[NAME].update(shape=[2, 4])), "manifest says"),
    "header size": (header(lambda h: h[NAME].update(shape=[10**18])), "overflow computing buffer"),
    "header junk": (header(lambda h: h.update(x=3)), "invalid JSON in header"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_line_that_says_where(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path)
    damage, expected = DAMAGE[kind]
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    text = str(error.value)
    assert any(words in text for words in expected.split("|"))
    assert "\n" not in text and len(text) < 600 and str(folder) in text


def test_a_save_that_fails_leaves_nothing_and_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_module, "_flush", full)
    with pytest.raises(CheckpointError, match=r"cannot save step 2 in .*: No space left on device"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
    checkpoint.load(before)


# ----------------------------------------------------------------------------------------- going on


def other(**changes: Any) -> RunConfig:
    fields = CONFIG.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition("_")
        if section in ("train", "model"):
            fields[section][name] = value
        else:
            fields[key] = value
    return RunConfig.model_validate(fields)


def test_what_may_change_and_what_may_not(tmp_path: Path) -> None:
    manifest = checkpoint.read_manifest(write(tmp_path))
    placed = {"framework": "paddle", "stages": 4, "schedule": "gpipe", "threads": 1}
    free = other(**placed, recompute="full", train_micro_batches=1, train_steps=9)
    assert checkpoint.differences(manifest, free) == []
    (line,) = checkpoint.differences(manifest, other(train_seed=8))
    assert line == "train.seed: the checkpoint has 7, the run 8"
    line = checkpoint.differences(manifest, other(model_norm="post"))[0]
    assert line.startswith("model.norm: the checkpoint has pre")
    assert checkpoint.differences(manifest, other(sequence_lengths="random"))
    cosine = write(tmp_path / "cosine", config=other(train_learning_rate_schedule="cosine"))
    longer = other(train_learning_rate_schedule="cosine", train_steps=9)
    (line,) = checkpoint.differences(checkpoint.read_manifest(cosine), longer)
    assert line == "train.steps: the checkpoint has 3, the run 9"


def test_weights_alone_are_a_checkpoint_too(tmp_path: Path) -> None:
    weights, _ = state()
    folder = checkpoint.write_weights(tmp_path / "imported", CONFIG.model, weights, "torch")
    saved = checkpoint.load(folder)
    assert saved.manifest.train is None and saved.manifest.steps_done == 0
    assert not saved.optimizer_state
    assert checkpoint.differences(saved.manifest, CONFIG) == []
    assert checkpoint.differences(saved.manifest, other(train_dtype="float32")) == []
    with pytest.raises(CheckpointError, match="exists"):
        checkpoint.write_weights(folder, CONFIG.model, weights, "torch")
    shutil.rmtree(folder)


def test_the_oracle_goes_on_to_the_bit() -> None:
    """Stops after two of four steps, hands everything over, and goes on in a new engine."""
    from common.spec.data import load_corpus

    corpus = load_corpus(CONFIG)

    def engine(weights: dict[str, Any]) -> OracleEngine:
        made = OracleEngine(CONFIG)
        made.reset(weights)
        return made

    def step(one: OracleEngine, number: int) -> float:
        loss = one.forward_backward(corpus.training_batch(CONFIG, number))
        one.apply_gradients(number)
        return loss

    whole = engine(initial_weights(CONFIG.model, 0, "float64"))
    losses = [step(whole, n) for n in range(4)]
    first = engine(initial_weights(CONFIG.model, 0, "float64"))
    assert [step(first, n) for n in (0, 1)] == losses[:2]
    second = engine(first.weights())
    second.load_optimizer_state(first.optimizer_state(), 2)
    assert [step(second, n) for n in (2, 3)] == losses[2:]
