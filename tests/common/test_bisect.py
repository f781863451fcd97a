"""Dumps and bisect: the first place is named, whatever the cut; files from elsewhere are not
trusted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from common.checkpoint.dump import Dump, DumpError, read_dump, write_dump
from common.cli import numerics
from common.cli.main import main
from common.harness.bisect import bisect
from common.runtime.dumping import dump
from common.runtime.engine import Arrays
from common.runtime.job import Job
from common.runtime.oracle_worker import OracleEngine
from common.runtime.training import starting_weights
from common.spec.data import Batch, load_corpus
from common.spec.parameters import TensorKey
from common.spec.rounding import in_precision
from common.spec.run import RunConfig
from tests.program import assert_refused, words

ROOT = Path(__file__).resolve().parents[2]
SQUARE = "block.1.attention.query.weight"


def config(micro_batches: int = 4, **train: Any) -> RunConfig:
    model = {"context_length": 8, "num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 12}
    model["dropout"] = 0.1
    settings = {"steps": 4, "batch_size": 8, "micro_batches": micro_batches}
    settings |= {"dtype": "float64", "learning_rate": 2e-3}
    return RunConfig.model_validate({"model": model, "train": settings | train})


def dumped(
    one: RunConfig, build: Callable[[RunConfig], OracleEngine] = OracleEngine, step: int = 0
) -> Dump:
    engine = build(one)
    job = Job(config=one, out="", kind="dump", stop_at=step, noise=0.1)
    corpus = load_corpus(one)
    engine.reset(starting_weights(job))
    for earlier in range(step):
        engine.forward_backward(corpus.training_batch(one, earlier))
        engine.apply_gradients(earlier)
    return Dump(build.__name__, step, one, dump(engine, job, corpus))


class Transposed(OracleEngine):
    """A port that loads one square weight of block 1 the wrong way round."""

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        super().reset(dict(weights) | {SQUARE: weights[SQUARE].T})

    def weights(self) -> Arrays:
        weights = super().weights()
        return weights | {SQUARE: weights[SQUARE].T}


class WrongLoss(OracleEngine):
    """A mean over micro-batches of means that is off."""

    def forward_backward(self, batch: Batch) -> float:
        return super().forward_backward(batch) * (1 + 1e-9)


class UnscaledGradients(OracleEngine):
    """Micro-batch gradients added, not averaged."""

    def gradients(self) -> Arrays:
        return {name: 4 * value for name, value in super().gradients().items()}


class LateLearningRate(OracleEngine):
    """The learning rate of the next step."""

    def apply_gradients(self, step: int) -> float:
        return super().apply_gradients(step + 1)


class WrongMessage(OracleEngine):
    """What arrives at block 1 belongs to another micro-batch; alone it works."""

    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        found = super().unit_outputs(batch)
        pair = [TensorKey(batch.step, "forward", 0, i, "block.1", "output") for i in (2, 3)]
        return found | {pair[0]: found[pair[1]], pair[1]: found[pair[0]]}


@pytest.fixture(scope="module")
def right() -> Dump:
    return dumped(config())


def test_two_runs_of_the_same_agree_to_the_bit(right: Dump) -> None:
    found = bisect(right, dumped(config()))
    assert found.first is None and not found.missing
    assert max(finding.difference.relative for finding in found.findings) == 0
    assert found.verdict.startswith(f"all {len(found.findings)} tensors agree")


@pytest.mark.parametrize(
    ("build", "place", "unit", "tensor", "micro_batch"),
    [
        (Transposed, "forward", "block.1", "output", 0),
        (WrongMessage, "message", "block.1", "output", 2),
        (WrongLoss, "loss", "head", "loss", -1),
        (UnscaledGradients, "gradients", "head", "head.output.weight", -1),
        (LateLearningRate, "optimizer", "embedding", "embedding.token.weight", -1),
    ],
)
def test_the_first_place_is_named(
    right: Dump, build: type[OracleEngine], place: str, unit: str, tensor: str, micro_batch: int
) -> None:
    first = bisect(right, dumped(config(), build)).first
    assert first is not None
    found = (first.place, first.unit, first.tensor, first.difference.key.micro_batch)
    assert found == (place, unit, tensor, micro_batch)


def test_errors_do_not_add_up_from_unit_to_unit(right: Dump) -> None:
    """After the wrong block 1 the head is wrong as it ran, and right by itself."""
    findings = bisect(right, dumped(config(), Transposed)).findings
    (head,) = [each for each in findings if (each.place, each.unit) == ("forward", "head")]
    assert head.passed and head.running is not None and head.running > 1e-6


def test_another_number_of_micro_batches_is_joined(right: Dump) -> None:
    assert bisect(right, dumped(config(micro_batches=2))).first is None
    first = bisect(right, dumped(config(micro_batches=2), Transposed)).first
    assert first is not None and (first.unit, first.difference.key.micro_batch) == ("block.1", -1)


def test_pytorch_over_two_stages_agrees_with_the_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    small = "num_layers=1,d_model=8,num_heads=1,d_ff=8,context_length=8,steps=3,dropout=0.1"
    sides = [
        f"framework=oracle,{small}",
        f"framework=torch,{small},stages=2,schedule=zb-h1,micro_batches=2,replicas=2",
    ]
    status = main(["bisect", *sides, "--step", "2"])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "tensors agree within the limits of float32" in out
    assert "B torch zb-h1 p=2 d=2 m=2" in out


def test_a_habit_of_pytorch_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    small = "num_layers=1,d_model=8,num_heads=1,d_ff=8,context_length=8,steps=3,clip_norm=0.1"
    habit = f"framework=torch,{small},drift=clip-epsilon"  # which brings float64, where it shows
    assert main(["bisect", f"framework=oracle,{small},dtype=float64", habit]) == 1
    named = "first difference: embedding, optimizer, embedding.token.weight"
    assert named in capsys.readouterr().out


def test_a_later_step_starts_from_the_reference(right: Dump) -> None:
    late = dumped(config(), step=3)
    assert bisect(late, dumped(config(), step=3)).first is None
    first = bisect(late, dumped(config(), LateLearningRate, step=3)).first
    assert first is None or first.place != "forward"
    parted = bisect(late, dumped(config(), Transposed, step=3))
    assert parted.first is not None and parted.first.place == "weights before"
    alone = [each for each in parted.findings if each.place == "forward" and not each.passed]
    assert [each.unit for each in alone] == ["block.1"]
    with pytest.raises(DumpError, match="step 0 against step 3"):
        bisect(right, late)


def test_another_precision_is_judged_by_the_coarser_one(right: Dump) -> None:
    found = bisect(right, dumped(config(dtype="float32")))
    assert found.dtype == "float32" and found.first is None
    assert max(finding.difference.relative for finding in found.findings) > 1e-9


def test_another_model_is_refused(right: Dump) -> None:
    other = config(beta2=0.999)
    with pytest.raises(DumpError, match=r"beta2 = 0.9499.* against 0.999.*: not the same run"):
        bisect(right, Dump("x", 0, other, right.tensors))


def test_a_port_may_write_less_and_is_told_what_lacks(right: Dump) -> None:
    some = {key: value for key, value in right.tensors.items() if key.phase == "unit_forward"}
    found = bisect(right, Dump("port", 0, None, some))
    assert found.first is None and len(found.findings) == 4
    assert "B lacks 1 tensor of the phase forward" not in found.missing
    assert any(line.startswith("B lacks") and "unit_backward" in line for line in found.missing)


def test_values_are_rounded_to_bfloat16_as_the_nearest_even() -> None:
    # 1 + 2^-8 lies between 1 and 1 + 2^-7: to the even one; the next float32 above it goes up.
    values = np.array([1.0, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, -3.0])
    assert in_precision(values, "bfloat16").tolist() == [1.0, 1.0, 1 + 2**-7, 1 + 2**-6, -3.0]


# -------------------------------------------------------------------------------------------- files


def test_a_dump_reads_back(right: Dump, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_dump(path, right.tensors, config(), "mine", {"numpy": np.__version__})
    read = read_dump(path)
    assert (read.name, read.step, read.config) == ("mine", 0, config())
    assert bisect(right, read).first is None and not bisect(right, read).missing


def test_files_from_elsewhere_are_one_clear_line(
    right: Dump, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.safetensors"
    write_dump(good, right.tensors, config(), "good")
    content = good.read_bytes()
    key = str(TensorKey(0, "forward", 0, 0, "head", "output"))
    bad: dict[str, tuple[bytes | dict[str, Any], dict[str, str] | None, str]] = {
        "pickle": (b"\x80\x04\x95" + b"x" * 100, None, "not a safetensors file"),
        "cut": (content[:-5], None, "file not fully covered"),
        "empty": (b"", None, "not a safetensors file"),
        "name": ({"weights": np.ones(2)}, None, "'weights' is no tensor key"),
        "dtype": ({key: np.ones(2, np.uint8)}, None, "has dtype U8; expected F64"),
        "steps": (
            {key: np.ones(2), key.replace("step=0", "step=1"): np.ones(2)},
            None,
            "of steps [0, 1]",
        ),
        "none": ({}, None, "of steps []"),
        "future": (
            {key: np.ones(2)},
            {"schema_version": "9"},
            "schema_version = '9'; this program reads 1",
        ),
        "config": ({key: np.ones(2)}, {"config": '{"stages": 0}'}, "its configuration: stages"),
        "not-json": ({key: np.ones(2)}, {"config": "{"}, "its configuration"),
    }
    for name, (what, metadata, expected) in bad.items():
        path = tmp_path / f"{name}.safetensors"
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            save_file(what, path, metadata)
        status = main(["bisect", str(good), str(path)])
        assert_refused(status, expected, capsys, silent=True)


@pytest.mark.parametrize(
    ("field", "has"), [("replicas", "one pipeline"), ("tensor_parallel", "whole matrices")]
)
def test_the_oracle_is_not_cut(
    field: str, has: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"{field} = 2: the oracle has {has}; expected 1"
    run = f"framework=oracle,{field}=2"
    assert_refused(main(["bisect", run, run]), message, capsys)
    option = "--" + field.replace("_", "-")
    options = words(f"dump --framework oracle {option} 2 --out {{out}}", out=tmp_path / "dump")
    assert_refused(main(options), message, capsys)


def test_the_subcommand_prints_a_tree_and_writes_json(
    right: Dump, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, one in (("a", right), ("b", dumped(config(), Transposed))):
        write_dump(tmp_path / f"{name}.safetensors", one.tensors, config(), name)
    a, b, out = (str(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "found.json"))
    assert main(["bisect", a, b, "--json", out]) == 1
    text = capsys.readouterr().out
    assert "FIRST DIFFERENCE" in text
    assert "first difference: block.1, forward, output, micro-batch 0" in text
    found = json.loads(Path(out).read_text())
    first = found["first"]
    assert (found["agree"], first["unit"], first["place"]) == (False, "block.1", "forward")
    assert main(["bisect", a, a, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["agree"] is True


def test_runs_in_words_are_dumped_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "num_layers=1,d_model=8,num_heads=1,d_ff=8,context_length=8,steps=2"
    path = tmp_path / "oracle.safetensors"
    options = [f"--{word.replace('=', ' ').replace('_', '-')}".split() for word in small.split(",")]
    line = words("dump --framework oracle --out {path} --step 1", path=path)
    assert main([*line, *[word for two in options for word in two]]) == 0
    assert "oracle, step 1:" in capsys.readouterr().out
    other = f"framework=oracle,{small},micro_batches=2"
    assert main(["bisect", str(path), other, "--step", "1"]) == 0
    capsys.readouterr()
    for run, message in {
        "framework=oracle,d_modle=8": "--d-modle: unknown option; expected --d-model",
        "framework=oracle,steps": "expected NAME=VALUE",
        "nothing": "no such file",
        "framework=oracle,steps=1": "the run has 1; expected 0 to 0",
    }.items():
        assert_refused(main(["bisect", str(path), run, "--step", "1"]), message, capsys)
    monkeypatch.delattr(numerics, "run_jobs_in_worker")  # what is wrong with B, before A runs
    assert_refused(main(["bisect", other, "framework=torch,compress=fp16"]), "one replica", capsys)
    assert_refused(
        main(["bisect", other, "framework=oracle,steps=1", "--step", "1"]), "has 1;", capsys
    )


def test_the_documented_port_is_found_out_and_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "numerics.md").read_text()
    (example,) = re.findall(
        r"<!-- tests/common/test_bisect.py runs this -->\n```python\n(.*?)```", page, re.DOTALL
    )
    for tool in (["check", "-"], ["format", "--check", "-"]):
        command = [sys.executable, "-m", "ruff", *tool, "--config", str(ROOT / "pyproject.toml")]
        subprocess.run(command, input=example, text=True, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    line = "dump --framework oracle --preset tiny --dtype float64 --out oracle.safetensors"
    assert main(words(line)) == 0
    exact = example.replace(', approximate="tanh"', "")
    right = exact.replace("EPSILON = 1e-5", "EPSILON = 9.999999747378752e-06")
    for code, status, said in (
        (example, 1, "1.15e-06"),
        (exact, 1, "3.01e-11"),
        (right, 0, "tensors agree"),
    ):
        subprocess.run([sys.executable, "-c", code], check=True)
        capsys.readouterr()
        assert main(["bisect", "oracle.safetensors", "port.safetensors"]) == status
        assert said in capsys.readouterr().out
