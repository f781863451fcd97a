"""`python -m tests.campaigns.fuzz_readers --inputs 225000`: hostile input for everything that reads
a file.

Every reader gets random bytes and mutated valid input: flipped bits, cuts, repeated and swapped
pieces, huge and negative numbers, deep nesting, paths that lead elsewhere, links and pipes in place
of files. It may take it, or refuse it with its documented error, whose text is one line. Anything
else is a finding: another exception, a process that ends, memory over the bound, time over the cap.
Prints counts per reader; exits with 1 if there are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from common import checkpoint
from common.checkpoint import CheckpointError
from common.checkpoint.dump import DumpError, read_dump, write_dump
from common.checkpoint.foreign import llama
from common.checkpoint.foreign.errors import ExchangeError
from common.checkpoint.foreign.gpt2 import foreign_shapes, read_gpt2
from common.checkpoint.foreign.pretrained import HEAD
from common.checkpoint.foreign.source import find
from common.cli import config as configuration
from common.cli.config import add_options, read_bench
from common.cli.parser import Parser
from common.io.bounded import read_text
from common.io.usage import UsageError
from common.report.grid import Grid
from common.report.machine import this_machine
from common.report.result import Parity, ResultError, RunResult, Step
from common.runtime.faults import Fault, FaultError
from common.runtime.job import Job, JobFile
from common.schedule.action import ScheduleError, format_schedule
from common.schedule.generators import make_schedule
from common.schedule.pytorch_csv import format_csv, read_schedule
from common.schedule.simulate import simulate
from common.schedule.validate import validate
from common.spec.corpus_files import CorpusError
from common.spec.parameters import TensorKey, initial_weights
from common.spec.run import RunConfig, TrainSpec, TransformerSpec
from common.spec.text import read_texts
from common.spec.tokenizer import TokenizerError, read_tokenizer

MEMORY_BYTES = 512 * 2**20
"""What reading one input may take; the inputs themselves are a few kilobytes."""
CAP_SECONDS = 20
"""Per input. Only against what never ends."""

MODEL = TransformerSpec(context_length=4, num_layers=1, d_model=4, num_heads=2, d_ff=4)
CONFIG = RunConfig(
    model=MODEL, train=TrainSpec(steps=3, batch_size=2, micro_batches=2, dtype="float64")
)
Random = random.Random


# ---------------------------------------------------------------------------------------- mutations

NUMBERS = """-1 0 1 2 255 4096 65536 -9223372036854775808 1e308 1e999 0.5
NaN nan inf -Infinity 1e-320 0x10 1_000 ٣"""
WORDS = r"""../../../../etc/passwd /etc/passwd /dev/zero .. / a/../../b file:/dev/zero true null
\u0000 \ud800 🙂 %s%n [] {} [[]] native shard-00000.safetensors/.. none every-0"""
HOSTILE_NUMBERS = [
    *NUMBERS.split(),
    *map(str, (2**31, 2**32, 2**63 - 1, 2**63, 10**12, 2**64, 10**30, "9" * 5000)),
]
HOSTILE_WORDS = [
    *WORDS.split(),
    *("", "x" * 70_000, "every-" + "9" * 30),
    *("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000),
]
TOKEN = re.compile(rb'-?\d[\d.eE+-]*|"[^"\n]*"|[A-Za-z_][\w.-]*|[^\s\w]')


def mutated(data: bytes, rng: Random, text: bool) -> bytes:
    """`data` after one to four mutations, now and then wholly random bytes instead."""
    if rng.random() < 0.03:
        return rng.randbytes(rng.choice([0, 1, 7, 8, 9, 64, 1000]))
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        data = (_token if text and rng.random() < 0.7 else _bytes)(data, rng)
    return data


def _bytes(data: bytes, rng: Random) -> bytes:
    if not data:
        return rng.randbytes(4)
    i = rng.randrange(len(data))
    j = min(len(data), i + rng.choice([1, 2, 8, 100]))
    match rng.randrange(7):
        case 0:
            return data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]
        case 1:
            return data[:i]
        case 2:
            return data[:i] + rng.randbytes(j - i) + data[j:]
        case 3:
            return data[:i] + data[j:]
        case 4:
            return data[:j] + data[i:]
        case 5:
            return data + data[i:j] * rng.choice([1, 10, 1000])
        case _:
            piece = bytes([rng.choice([0, 10, 34, 91, 123, 255])]) * rng.choice([1, 3, 5000])
            return data[:i] + piece + data[i:]


def _token(data: bytes, rng: Random) -> bytes:
    """Another number, word or bracket in the place of one."""
    found = list(TOKEN.finditer(data[:100_000]))
    if not found:
        return _bytes(data, rng)
    token = rng.choice(found)
    old = token.group()
    if old[:1].isdigit() or old[:1] == b"-":
        new = rng.choice(HOSTILE_NUMBERS)
    elif old[:1] == b'"':
        word = f'"{rng.choice(HOSTILE_WORDS)}"'
        new = rng.choice([word, rng.choice(HOSTILE_NUMBERS), "null", "[]"])
    else:
        new = rng.choice(HOSTILE_WORDS)
    if rng.random() < 0.2:
        new = rng.choice(found).group().decode(errors="replace")
    return data[: token.start()] + new.encode(errors="replace") + data[token.end() :]


# ------------------------------------------------------------------------------------------ readers


@dataclass(frozen=True)
class Reader:
    """One thing that reads files."""

    name: str
    errors: tuple[type[Exception], ...]
    """Documented; anything else is a finding."""
    prepare: Callable[[Path], None]
    """Writes the valid input into a folder, once."""
    attack: Callable[[Path, Random], Callable[[], object]]
    """Makes one hostile input in the folder; what it returns reads it."""


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and not path.is_symlink()
    }


def _write_valid_checkpoint(folder: Path) -> None:
    weights = initial_weights(MODEL, 0, "float64")
    state = {
        f"{m}/{name}": np.zeros_like(v)
        for m in ("first_moment", "second_moment")
        for name, v in weights.items()
    }
    writer = checkpoint.CheckpointWriter(folder / "made", 3, "0" * 32)
    made = writer.write(CONFIG, 2, "0" * 64, (0, 1), weights, state, {"framework": "torch"})
    assert made is not None
    made.rename(folder / "valid")


def _attack_checkpoint(folder: Path, rng: Random) -> Callable[[], object]:
    valid, target = _files(folder / "valid"), folder / "step-00000002"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name, data in valid.items():
        (target / name).write_bytes(data)
    shard = next(name for name in valid if name.endswith(".safetensors"))
    attack = rng.random()
    if attack < 0.55:
        (target / "manifest.json").write_bytes(mutated(valid["manifest.json"], rng, text=True))
    elif attack < 0.95:
        data = _mutated_safetensors(valid[shard], rng)
        (target / shard).write_bytes(data)
        if rng.random() < 0.8:  # a hostile author computes the right digest
            manifest = json.loads(valid["manifest.json"])
            digest = hashlib.sha256(data).hexdigest()
            manifest["files"][shard] = {"bytes": len(data), "sha256": digest}
            (target / "manifest.json").write_text(json.dumps(manifest))
    else:
        _replace(target / rng.choice([shard, "manifest.json"]), rng)
    return lambda: checkpoint.load(target)


def _mutated_safetensors(data: bytes, rng: Random) -> bytes:
    """Mutates the header alone (with the right length before it, or another one), or all of the
    file.
    """
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(4):
        case 0:
            return mutated(data, rng, text=False)
        case 1:
            header = mutated(header, rng, text=True)
            length = rng.choice([0, 1, len(header) - 1, 2**31, 2**63, 2**64 - 1]) % 2**64
        case _:
            header = mutated(header, rng, text=True)
            length, rest = len(header), rest if rng.random() < 0.8 else rest[:-1]
    return struct.pack("<Q", length) + header + rest


def _replace(path: Path, rng: Random) -> None:
    """Something else in the place of a file."""
    path.unlink()
    match rng.randrange(6):
        case 0:
            path.symlink_to("/etc/passwd")
        case 1:
            path.symlink_to("/dev/zero")
        case 2:
            path.mkdir()
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to(path.name)
        case _:
            pass


def _damaged_text(data: bytes, rng: Random) -> bytes:
    return mutated(data, rng, text=True)


def _one_file(
    name: str,
    valid: Callable[[], list[bytes]],
    read: Callable[[Path], object],
    *errors: type[Exception],
    damaged: Callable[[bytes, Random], bytes] = _damaged_text,
) -> Reader:
    def prepare(folder: Path) -> None:
        for n, data in enumerate(valid()):
            (folder / f"valid-{n}").write_bytes(data)

    def attack(folder: Path, rng: Random) -> Callable[[], object]:
        path = folder / "input"
        path.unlink(missing_ok=True)  # it may still be mapped into memory
        path.write_bytes(damaged(rng.choice(_valid(folder)), rng))
        return lambda: read(path)

    return Reader(name, errors, prepare, attack)


def _valid(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("valid-*"))]


def _valid_dumps() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump"
        keys = [TensorKey(0, "forward", 0, i, "head", "output") for i in range(2)]
        write_dump(path, {key: np.ones((2, 3)) for key in keys}, CONFIG, "a fuzzer")
        return [path.read_bytes(), save({str(keys[0]): np.ones((2, 2), np.float32)})]


GPT2_CONFIG = b'{"n_head": 2, "layer_norm_epsilon": 1e-05, "activation_function": "gelu_new", "scale_attn_weights": true}'  # noqa: E501


def _prepare_gpt2(folder: Path) -> None:
    shapes = foreign_shapes(MODEL.model_copy(update={"vocab_size": 7}))
    for n, dtype in enumerate((np.float32, np.float64, np.float16)):
        data = save({name: np.ones(shape, dtype) for name, shape in shapes.items()})
        (folder / f"valid-{n}").write_bytes(data)
        if dtype is np.float16:
            end = 8 + int.from_bytes(data[:8], "little")
            header = data[8:end].replace(b'"F16"', b'"BF16"')
            (folder / "valid-bfloat16").write_bytes(
                len(header).to_bytes(8, "little") + header + data[end:]
            )


def _attack_gpt2(folder: Path, rng: Random) -> Callable[[], object]:
    path, config = folder / "model.safetensors", folder / "config.json"
    hostile_config = rng.random() < 0.3
    data = rng.choice(_valid(folder))
    path.write_bytes(data if hostile_config else _mutated_safetensors(data, rng))
    config.unlink(missing_ok=True)
    if hostile_config or rng.random() < 0.5:
        config.write_bytes(mutated(GPT2_CONFIG, rng, text=True) if hostile_config else GPT2_CONFIG)
    heads = rng.choice([None, 2, 3, 10**12])
    return lambda: read_gpt2(find(path), {} if heads is None else {"num_heads": heads})


LLAMA = MODEL.model_copy(update={**llama.FIXED, "vocab_size": 7})
LLAMA_CONFIG = json.dumps(
    {theirs: getattr(LLAMA, ours) for theirs, ours in llama.FIELDS.items()}
    | {"model_type": "llama", "head_dim": 2, "rope_parameters": {"rope_type": "default"}}
).encode()


def _prepare_llama(folder: Path) -> None:
    shapes = llama.foreign_shapes(LLAMA) | {HEAD: (7, 4)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    (folder / "valid").write_bytes(save(tensors))


def _attack_llama(folder: Path, rng: Random) -> Callable[[], object]:
    path, hostile_config = folder / "model.safetensors", rng.random() < 0.7
    data = (folder / "valid").read_bytes()
    path.write_bytes(data if hostile_config else _mutated_safetensors(data, rng))
    (folder / "config.json").write_bytes(
        mutated(LLAMA_CONFIG, rng, text=True) if hostile_config else LLAMA_CONFIG
    )
    return lambda: llama.read_llama(find(path))


TOML = b"""preset = "tiny"
frameworks = ["torch", "paddle"]
schedule = "1f1b"
stages = [1, 2]
repeats = 1
partition = "1"
recompute = "full"
seed_corpus = 1
[model]
num_layers = 2
d_model = 8
num_heads = 2
dropout = 0.1
[train]
steps = 4
batch_size = 4
micro_batches = 2
learning_rate = 1e-3
no_decay = ["*.bias"]
"""


def _read_toml(path: Path) -> object:
    parser = Parser(prog="fuzz")
    add_options(parser)
    return read_bench(parser.parse_args(["--config", str(path)]))


def _valid_toml() -> list[bytes]:
    good = TOML.replace(b"seed_corpus = 1\n", b"")
    return [
        TOML,
        good,
        good.replace(b'partition = "1"\n', b""),
        good.replace(b'"1f1b"', b'["gpipe", "zb-v"]'),
    ]


def _read_schedule_file(path: Path) -> object:
    found = []
    for m in (1, 4):
        with contextlib.suppress(ScheduleError):
            found.append(make_schedule(f"file:{path}", 2, m))
    schedule = read_schedule(read_text(path), path.stem)
    if not validate(schedule):
        simulate(schedule)
    return found


def _valid_schedules() -> list[bytes]:
    asked = [("1f1b", 2, 4, 1), ("interleaved", 2, 4, 2), ("zb-v", 2, 4, 2), ("gpipe", 1, 1, 1)]
    asked += [("dualpipev", 2, 4, 2)]
    return [format_schedule(make_schedule(*each)).encode() for each in asked] + [
        b"F1 F2 B1 B2\nF1 B1 F2 B2\n",
        b"0: F0 (F1&BW0) BW1\n1: F0 BW0 F1 BW1\n",
        *(format_csv(make_schedule(name, 2, 4, 2)).encode() for name in ("zb-v", "dualpipev")),
        b"placement: 0 1 4 | 2 3\n0: F0 F0.1 F0.2 BW0.2 BW0.1 BW0\n1: F0 F0.1 BW0.1 BW0\n",
    ]


def _valid_results() -> list[bytes]:
    step = Step(step=0, loss=5.5, gradient_norm=1.0, seconds=0.1)
    result = RunResult(
        status="ok",
        preset="tiny",
        config=CONFIG,
        command="fuzz",
        machine=this_machine(),
        git_commit=None,
        started="now",
        steps=(step,),
        environment={"version": "1"},
        actions={0: "F0 BW0"},
        parity=Parity(reason="none"),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        result.write(path)
        return [path.read_bytes()]


def _job_files() -> list[bytes]:
    job = Job(config=CONFIG, out="out", resume="step-00000001", fault="kill@step=1")
    return [JobFile(jobs=(job,)).model_dump_json(indent=1).encode()]


def _tokenizers() -> list[bytes]:
    """One of each kind, with all that may stand around it."""
    found = []
    for model in (
        models.BPE({"a": 0, "b": 1, "ab": 2, "[UNK]": 3}, [("a", "b")], unk_token="[UNK]"),
        models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("class", -2.0)], unk_id=0),
        models.WordLevel({"[UNK]": 0, "The": 1}, unk_token="[UNK]"),
    ):
        made: Any = Tokenizer(model)
        made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        made.decoder = decoders.WordPiece()
        made.add_special_tokens(["[CLS]"])
        made.enable_truncation(4)
        found.append(str(made.to_str(pretty=True)).encode())
    return found


def _corpora() -> list[bytes]:
    records = b"".join(b'{"text": "The class\\n", "n": [%d]}\n' % n for n in range(9))
    return [
        records,
        gzip.compress(records),
        gzip.compress("café\n".encode() * 99),
        b"\xef\xbb\xbfa",
    ]


def _read_corpus(path: Path) -> None:
    """Take the file for each kind of corpus that it may be."""
    endings = (".gz", ".jsonl.gz") if path.read_bytes()[:2] == b"\x1f\x8b" else (".txt", ".jsonl")
    found = []
    for ending in endings:
        link = path.with_name(f"corpus{ending}")
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        try:
            "".join(read_texts([str(link)]).decoded(lambda more_bytes: None))
        except CorpusError as error:
            found.append(error)
    if len(found) == len(endings):
        raise found[-1]


def _text(read: Callable[[str], object]) -> Callable[[Path], object]:
    return lambda path: read(path.read_bytes().decode(errors="replace"))


KEYS = [
    str(TensorKey(3, "backward", 1, -1, "block.0", "block.0.norm_1.bias")).encode(),
    b"step=1/phase=x/stage=0",
]
FAULTS = [b"kill@device=1,step=3,action=BW2", b"disk-full@step=8", b"oom"]

READERS: tuple[Reader, ...] = (
    Reader(
        "checkpoint (manifest, shards)",
        (CheckpointError,),
        _write_valid_checkpoint,
        _attack_checkpoint,
    ),
    _one_file("dump", _valid_dumps, read_dump, DumpError, damaged=_mutated_safetensors),
    Reader(
        "GPT-2 file", (ExchangeError, CheckpointError, ValidationError), _prepare_gpt2, _attack_gpt2
    ),
    Reader(
        "Llama file",
        (ExchangeError, CheckpointError, ValidationError),
        _prepare_llama,
        _attack_llama,
    ),
    _one_file("TOML configuration", _valid_toml, _read_toml, UsageError),
    _one_file(
        "schedule file", _valid_schedules, _read_schedule_file, ScheduleError, UnicodeDecodeError
    ),
    _one_file("result.json", _valid_results, RunResult.read, ResultError),
    _one_file(
        "tokenizer.json",
        _tokenizers,
        lambda path: read_tokenizer(path).encode("The class"),
        TokenizerError,
    ),
    _one_file("corpus", _corpora, _read_corpus, CorpusError, damaged=partial(mutated, text=False)),
    _one_file("job file", _job_files, JobFile.read, ValueError),
    _one_file("tensor key", lambda: KEYS, _text(TensorKey.parse), ValueError),
    _one_file("fault", lambda: FAULTS, _text(Fault.parse), FaultError),
)


# ------------------------------------------------------------------------------------------ the run


class TooSlow(BaseException):
    """An input that took longer than the cap."""


@contextlib.contextmanager
def bounded(memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Within, this process gets no more memory than that on top of what it has; then MemoryError
    comes.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def no_corpora() -> Iterator[None]:
    """Leave out reading and tokenizing the text, which would take most of the time."""
    with mock.patch.object(configuration, "check_corpora"):
        yield


KINDS = ("refused", "taken", "findings")


def kind_of(came: str) -> str:
    """Return which of `KINDS` the answer of `try_one` is."""
    return came if came in ("taken", "refused") else "findings"


def try_one(reader: Reader, folder: Path, rng: Random) -> str:
    """ "taken", "refused", or what was found. The input stays in the folder."""
    read = reader.attack(folder, rng)

    def too_slow(number: int, frame: Any) -> None:
        raise TooSlow(f"more than {CAP_SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(CAP_SECONDS)
    try:
        read()
    except reader.errors as error:
        if type(error).__module__.startswith("pydantic") or "\n" not in str(error):
            return "refused"
        return f"{type(error).__name__} of several lines: {str(error)[:300]!r}"
    except (Exception, TooSlow) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__}: {str(error)[:200]} at {where}"
    else:
        return "taken"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.fuzz_readers", description=__doc__
    )
    parser.add_argument("--inputs", type=int, default=225_000, help="in all (default: 225000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name contains this")
    parser.add_argument("--out", type=Path, help="where counts go, as JSON and Markdown")
    arguments = parser.parse_args(argv)
    readers = [reader for reader in READERS if arguments.only in reader.name]
    rows, findings, all_counts = [], [], Counter[str]()
    for reader in readers:
        counts: Counter[str] = Counter()
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name, no_corpora(), bounded():
            folder = Path(name)
            reader.prepare(folder)
            for n in range(arguments.inputs // len(readers)):
                came = try_one(reader, folder, Random(f"{arguments.seed} {reader.name} {n}"))
                counts[kind_of(came)] += 1
                if kind_of(came) == "findings":
                    findings.append(f"{reader.name}, input {n}: {came}")
                    if len(findings) <= 20:
                        print(findings[-1], flush=True)
        row = {"reader": reader.name, "inputs": counts.total(), **{k: counts[k] for k in KINDS}}
        rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
        print(rows[-1], flush=True)
        all_counts += counts
    cells = [[str(row[key]) for key in ("reader", "inputs", *KINDS)] for row in rows]
    cells.append(["all", *map(str, (all_counts.total(), *(all_counts[kind] for kind in KINDS)))])
    table = Grid(("reader", "inputs", *KINDS), cells, ("reader",)).markdown()
    print(table)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        found = json.dumps({"rows": rows, "findings": findings}, indent=1)
        (arguments.out / "fuzz.json").write_text(found + "\n")
        (arguments.out / "fuzz.md").write_text(table)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
