"""The verbs import and export: a snapshot's weights from and to other people's files."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common import snapshot
from common.data import check_vocabulary
from common.exchange.child import ExchangeError
from common.exchange.gpt2 import read_gpt2
from common.runtime.launch import (
    IMPLEMENTATIONS,
    Implementation,
    child_command,
    child_environment,
    last_error,
    why_missing,
)
from common.snapshot import TOKENIZER, SnapshotError
from common.spec import TransformerSpec, explain
from common.tokenizer import BYTES, TokenizerError, read_tokenizer
from common.usage import UsageError
from common.verbs.options import add_run_options, read_model, reporting

EXIT_OK, EXIT_FAILED = 0, 1
FORMATS = {"torch": "torch", "keras": "tensorflow", "paddle": "paddle"}
"""The framework that reads and writes each kind of file, in a process of its own."""
GPT2 = "gpt2"
TIMEOUT_SECONDS = 1800
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE)


def register(verbs: Any, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS) -> None:
    """Adds the verbs to argparse's subparsers."""
    export = verbs.add_parser(
        "export",
        description="Writes the weights of a snapshot as a PyTorch state dict, Keras weights (.weights.h5) or Paddle "
        "parameters (.pdparams) of the plain model; docs/snapshots.md says how to build that model.",
        usage="%(prog)s SNAPSHOT --to torch|keras|paddle --out FILE",
    )
    export.add_argument("snapshot", metavar="SNAPSHOT", help="a folder such as step-00000100")
    export.add_argument("--to", choices=tuple(FORMATS), required=True, help="the kind of file")
    export.add_argument("--out", metavar="FILE", required=True, help="the file to write")
    export.set_defaults(run=reporting(lambda arguments: _export(arguments, implementations)))

    importer = verbs.add_parser(
        "import",
        description="Makes a snapshot at step 0 of weights from such a file, or of a GPT-2 of the transformers library in "
        "safetensors. No code in a file is run. The model is what the options say; GPT-2's is read from the file.",
        usage="%(prog)s FILE --from torch|keras|paddle|gpt2 --out SNAPSHOT [options]",
    )
    importer.add_argument("file", metavar="FILE", help="the file to read")
    importer.add_argument("--from", dest="origin", choices=(*FORMATS, GPT2), required=True, help="the kind of file")
    importer.add_argument("--out", metavar="SNAPSHOT", required=True, help="the snapshot's folder, a new one")
    meaning = importer.add_mutually_exclusive_group()
    meaning.add_argument(
        "--tokenizer-file", metavar="FILE", help="what the tokens mean (default: a tokenizer.json beside FILE, if any)"
    )
    meaning.add_argument("--tokenizer", choices=("bytes",), help="the tokens are bytes")
    add_run_options(importer, sections=("model",))
    importer.set_defaults(run=reporting(lambda arguments: _import(arguments, implementations)))


def _export(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    folder, out = Path(arguments.snapshot), Path(arguments.out)
    tokenizer = snapshot.read_tokenizer(folder)
    if out.exists():
        raise UsageError(f"--out {out}: exists; right would be a new file")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} is no folder")
    beside = out.with_name(TOKENIZER)
    if tokenizer is not None and beside.exists() and beside.read_bytes() != tokenizer:
        raise UsageError(f"--out {out}: another {TOKENIZER} lies beside it; expected a folder without one")
    temporary = out.with_name(f".{os.getpid()}.{out.name}")  # a name that is half-written is never the good one
    try:
        status = _child(arguments.to, implementations, "export", str(folder), str(temporary))
        if status == EXIT_OK:
            temporary.rename(out)
            print(out)
            if tokenizer is not None:
                beside.write_bytes(tokenizer)
                print(f"{beside}: its tokenizer")
        return status
    finally:
        temporary.unlink(missing_ok=True)


def _import(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    file, out = Path(arguments.file), Path(arguments.out)
    if out.exists():
        raise UsageError(f"--out {out}: exists; right would be a new folder")
    status = EXIT_OK
    if arguments.origin == GPT2:
        heads = getattr(arguments, "model.num_heads", None)
        if heads is not None and not (heads.isdecimal() and int(heads)):
            raise UsageError(f"--num-heads = {heads!r}: right would be a whole number, at least 1")
        try:
            spec, weights = read_gpt2(file, None if heads is None else int(heads))
        except (ExchangeError, SnapshotError) as error:
            raise UsageError(str(error)) from None
        except ValidationError as error:
            raise UsageError(f"{file}: {explain(error).splitlines()[0]}") from None
        tokenizer, source = _tokenizer(arguments, file, spec)
        snapshot.write_weights(out, spec, weights, file.name, tokenizer)
    else:
        if not file.is_file():
            raise UsageError(f"{file}: no such file")
        spec = read_model(arguments)
        tokenizer, source = _tokenizer(arguments, file, spec)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / TOKENIZER
            place.write_bytes(tokenizer or b"")
            told = [str(place)] if tokenizer is not None else []
            model = spec.model_dump_json()
            status = _child(arguments.origin, implementations, "import", str(file), str(out), model, *told)
    if status == EXIT_OK:
        print(f"{out}: {_words(spec)}")
        print(f"tokenizer: {source}")
    return status


def _tokenizer(arguments: argparse.Namespace, file: Path, spec: TransformerSpec) -> tuple[bytes | None, str]:
    """What the tokens of a foreign file mean, and in words where that comes from. Raises UsageError and TokenizerError."""
    if arguments.tokenizer == "bytes":
        if spec.vocab_size != BYTES.vocab_size:
            raise UsageError(f"--tokenizer = bytes: has 256 tokens; the model has {spec.vocab_size}")
        return b"", "bytes"
    beside = (file if file.is_dir() else file.parent) / TOKENIZER
    path = beside if arguments.tokenizer_file is None else Path(arguments.tokenizer_file)
    if arguments.tokenizer_file is None and not beside.exists():
        return None, "not known; --tokenizer-file FILE or --tokenizer bytes gives it, here or later"
    try:
        tokenizer = read_tokenizer(path)
        check_vocabulary(tokenizer, spec.vocab_size, f"tokenizer {path}")
    except TokenizerError as error:
        if arguments.tokenizer_file is not None:
            raise
        return None, f"not known: {error}"
    return tokenizer.content, f"{path}, {tokenizer.vocab_size} tokens"


def _words(spec: TransformerSpec) -> str:
    return (
        f"{spec.num_layers} blocks, d_model {spec.d_model}, {spec.num_heads} heads, d_ff {spec.d_ff}, "
        f"vocabulary {spec.vocab_size}, context {spec.context_length}, {spec.norm}-norm, {spec.activation}"
    )


def _child(kind: str, implementations: Mapping[str, Implementation], *argv: str) -> int:
    """Runs the framework's own converter. Raises UsageError with its line where the input is wrong."""
    implementation = implementations[FORMATS[kind]]
    missing = why_missing(implementation)
    if missing:
        raise UsageError(missing)
    module = f"{implementation.module}.convert"
    child = subprocess.run(
        child_command(module, *argv),
        env=child_environment(module),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if child.returncode == 2:
        raise UsageError(child.stderr.strip().splitlines()[-1])
    if argv[0] == "import" and -child.returncode in CRASHES:  # a file that a library in C trips over
        name = signal.Signals(-child.returncode).name
        raise UsageError(f"{argv[1]}: reading it ended with {name}; right would be a file as `export` writes it")
    if child.returncode:
        print(f"failed: {last_error(child.stderr)}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK
