"""Hostile input for everything that reads a file; `python -m tests.campaigns.fuzz_readers` is the
long form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.checkpoint import CheckpointError, load
from common.io.usage import UsageError
from common.report.result import ResultError, RunResult
from common.schedule.action import ScheduleError, parse_schedule
from common.schedule.generators import make_schedule
from common.spec.data import CorpusError, load_corpus
from common.spec.run import RunConfig
from tests.campaigns import fuzz_readers
from tests.campaigns.fuzz_readers import READERS, Random, Reader, bounded, no_corpora, try_one


@pytest.fixture(scope="module", params=READERS, ids=lambda reader: reader.name)
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Reader, Path]]:
    folder = tmp_path_factory.mktemp("fuzz")
    request.param.prepare(folder)
    with no_corpora(), bounded(2 * fuzz_readers.MEMORY_BYTES):
        yield request.param, folder


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=True))
def test_what_is_hostile_is_taken_or_refused_in_one_line(
    prepared: tuple[Reader, Path], rng: Random
) -> None:
    reader, folder = prepared
    assert try_one(reader, folder, rng) in ("taken", "refused")


def test_the_fuzzer_notices_what_is_not_documented(tmp_path: Path) -> None:
    def attack(error: Exception) -> Reader:
        def read() -> None:
            raise error

        return Reader("broken", (ScheduleError,), lambda folder: None, lambda folder, rng: read)

    rng = Random(0)
    assert try_one(attack(ScheduleError("no")), tmp_path, rng) == "refused"
    assert try_one(attack(ScheduleError("no\nno")), tmp_path, rng).startswith(
        "ScheduleError of several lines"
    )
    assert try_one(attack(KeyError("x")), tmp_path, rng).startswith(
        "KeyError: 'x' at test_fuzz_readers.py:"
    )


def test_memory_over_the_bound_is_an_error() -> None:
    with bounded(64 * 2**20), pytest.raises(MemoryError):
        bytearray(2**30)
    bytearray(2**27)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages = []", "stages: an empty list; expected at least one value"),
        ("replicas = []", "replicas: an empty list; expected at least one value"),
        ("stages = " + "[" * 3000 + "]" * 3000, "not TOML"),
        ("stages = " + "9" * 5000, "not TOML"),
        ("preset = ['tiny']", "preset = ['tiny']: unknown"),
        (
            "[model]\nnum_layers = 1000000000000",
            "expected a whole number, at least 1 and at most 10000",
        ),
        ("[train]\nlearning_rate = 1e300", "expected"),
        ("[train]\nbatch_size = 1048576\nmicro_batches = 1048576", "expected at most 1048576"),
    ],
)
def test_settings_that_the_fuzzer_found(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "found.toml"
    path.write_text(text)
    with no_corpora(), pytest.raises(UsageError) as error:
        fuzz_readers._read_toml(path)
    assert message in str(error.value)


def test_files_that_never_end_are_refused(tmp_path: Path) -> None:
    with bounded():
        with pytest.raises(ScheduleError, match="more than 67108864 bytes"):
            make_schedule("file:/dev/zero", 2, 4)
        with pytest.raises(UsageError, match="File too large"):
            fuzz_readers._read_toml(Path("/dev/zero"))
        with pytest.raises(CorpusError, match="not a plain file"):
            load_corpus(RunConfig(corpus=("/dev/zero",)))


@pytest.mark.parametrize(
    "header", ["chunks=1000000000", "micro_batches=999999999999", "micro_batches=-3", "chunks=0"]
)
def test_a_schedule_takes_no_memory_for_what_it_only_announces(header: str) -> None:
    with bounded(), pytest.raises(ScheduleError, match="expected at least 1 of each"):
        parse_schedule(f"# schedule: x {header}\nF0 BW0\n")


def test_a_long_word_takes_linear_time() -> None:
    with pytest.raises(ScheduleError):
        parse_schedule("0: F0 " + "x" * 1_000_000)


def test_deep_nesting_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ResultError, match="not a result"):
        RunResult.read(path)


def test_a_foreign_name_does_not_break_the_line(tmp_path: Path) -> None:
    fuzz_readers._write_valid_checkpoint(tmp_path)
    path = tmp_path / "valid" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"]["block\n\x1b[31m"] = manifest["tensors"].pop("head.norm.bias")
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "valid")
    assert str(error.value).isprintable()
