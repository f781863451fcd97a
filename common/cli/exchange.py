"""The subcommands import and export: a checkpoint's weights from and to other projects' files."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common import checkpoint
from common.checkpoint import TOKENIZER, Arrays
from common.checkpoint.foreign.errors import NOTE
from common.checkpoint.foreign.gpt2 import NOT_IN_THE_WEIGHTS, read_gpt2
from common.checkpoint.foreign.llama import read_llama, write_llama
from common.checkpoint.foreign.source import Source, find
from common.cli.options import add_run_options, flag, read_model
from common.cli.python import add_python, checked_pythons, named_pythons
from common.cli.settings import Settings, read_given, read_native_dropout, validated
from common.harness.interpreters import interpreter, worker_command, worker_environment
from common.harness.launch import IMPLEMENTATIONS, Implementation, last_error, require
from common.io.edges import whole_number
from common.io.usage import UsageError
from common.spec.data import check_vocabulary
from common.spec.run import TransformerSpec, explain
from common.spec.tokenizer import BYTES, TokenizerError, read_tokenizer

EXIT_OK, EXIT_FAILED = 0, 1
FORMATS = {"torch": "torch", "keras": "tensorflow", "paddle": "paddle"}
"""The framework that reads and writes each kind of file, in a process of its own."""
FREE = ("dropout", "dropout_masks")
"""Options that are valid for any weights: they change the training, not what the weights mean."""
LLAMA = "llama"
PRETRAINED = {
    "gpt2": (read_gpt2, (*NOT_IN_THE_WEIGHTS, *FREE)),
    LLAMA: (read_llama, ("context_length", *FREE)),
}
"""Models of the transformers library: their reader, and the options that their files leave open."""
TIMEOUT_SECONDS = 1800
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE)


def register(
    subcommands: Any, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> None:
    """Add the subcommands to argparse's subparsers."""
    export = subcommands.add_parser(
        "export",
        description="Writes the weights of a checkpoint as a PyTorch state dict, Keras weights "
        "(.weights.h5) or Paddle parameters (.pdparams) of the plain model; docs/checkpoints.md "
        "says how to build that model. Or as a Llama's folder for the transformers library.",
        usage="%(prog)s CHECKPOINT --to torch|keras|paddle|llama --out FILE",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder such as step-00000100")
    export.add_argument("--to", choices=(*FORMATS, LLAMA), required=True, help="the kind of file")
    written = "the file to write; of a Llama, the folder"
    export.add_argument("--out", metavar="FILE", required=True, help=written)
    add_python(export)
    export.set_defaults(run=lambda arguments: _export(arguments, implementations))

    importer = subcommands.add_parser(
        "import",
        description="Makes a checkpoint at step 0 of weights from such a file, or of a GPT-2 or "
        "Llama of the transformers library: a file, an index of shards, or the folder. No code in "
        "a file is run. The model is what the options say; the library's is read from the file and "
        "its config.json.",
        usage="%(prog)s FILE --from torch|keras|paddle|gpt2|llama --out CHECKPOINT [options]",
    )
    file = "the file to read, or a folder as the transformers library saves it"
    importer.add_argument("file", metavar="FILE", help=file)
    importer.add_argument(
        "--from",
        dest="origin",
        choices=(*FORMATS, *PRETRAINED),
        required=True,
        help="the kind of file",
    )
    out = "the checkpoint's folder, a new one"
    importer.add_argument("--out", metavar="CHECKPOINT", required=True, help=out)
    meaning = importer.add_mutually_exclusive_group()
    meaning.add_argument(
        "--tokenizer-file",
        metavar="FILE",
        help="what the tokens mean (default: a tokenizer.json beside FILE, if any)",
    )
    meaning.add_argument("--tokenizer", choices=("bytes",), help="the tokens are bytes")
    add_run_options(importer, sections=("model",))
    importer.set_defaults(run=lambda arguments: _import(arguments, implementations))


def _export(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    folder, out = Path(arguments.checkpoint), Path(arguments.out)
    tokenizer = checkpoint.read_tokenizer(folder)
    makes_folder = arguments.to == LLAMA
    if out.exists():
        kind = "folder" if makes_folder else "file"
        raise UsageError(f"--out {out}: exists; expected a new {kind}")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} is no folder")
    beside = (out if makes_folder else out.parent) / TOKENIZER
    if tokenizer is not None and beside.exists() and beside.read_bytes() != tokenizer:
        what = f"another {TOKENIZER} lies beside it; expected a folder without one"
        raise UsageError(f"--out {out}: {what}")
    # A name that is half-written is never the good one.
    temporary = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        if makes_folder:
            _check_no_python(arguments, f"--to {LLAMA}")
            saved = checkpoint.load(folder, with_moments=False)
            write_llama(saved.manifest.model, saved.weights, temporary)
            status = EXIT_OK
        else:
            framework = FORMATS[arguments.to]
            argv = ["export", str(folder), str(temporary)]
            status = _convert(arguments, framework, implementations, *argv)
        if status == EXIT_OK:
            temporary.rename(out)
            print(out)
            if tokenizer is not None:
                beside.write_bytes(tokenizer)
                print(f"{beside}: its tokenizer")
        return status
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _import(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    path, out = Path(arguments.file), Path(arguments.out)
    if out.exists():
        raise UsageError(f"--out {out}: exists; expected a new folder")
    source = find(path)
    if arguments.origin in PRETRAINED:
        try:
            spec, weights = _read_pretrained(arguments, source, implementations)
        except ValidationError as error:
            raise UsageError(f"{path}: {explain(error).splitlines()[0]}") from None
        tokenizer, words = _tokenizer(arguments, source, spec)
        checkpoint.write_weights(out, spec, weights, path.name, tokenizer)
    else:
        spec = read_model(arguments)
        _say_what_no_file_says(arguments, spec)
        tokenizer, words = _tokenizer(arguments, source, spec)
        with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
            place = Path(folder) / TOKENIZER
            place.write_bytes(tokenizer or b"")
            told = [str(place)] if tokenizer is not None else []
            argv = ["import", str(path), str(out), spec.model_dump_json(), *told]
            status = _convert(arguments, FORMATS[arguments.origin], implementations, *argv)
        if status != EXIT_OK:
            return status
    print(f"{out}: {_words(spec)}")
    print(f"tokenizer: {words}")
    return EXIT_OK


def _tokenizer(
    arguments: argparse.Namespace, source: Source, spec: TransformerSpec
) -> tuple[bytes | None, str]:
    """Return a foreign file's tokenizer, and whence it is. Raises UsageError, TokenizerError."""
    if arguments.tokenizer == "bytes":
        if spec.vocab_size != BYTES.vocab_size:
            what = f"has {BYTES.vocab_size} tokens; the model has {spec.vocab_size}"
            raise UsageError(f"--tokenizer = bytes: {what}")
        return b"", "bytes"
    given = arguments.tokenizer_file
    path = source.beside(TOKENIZER) if given is None else Path(given)
    if path is None:
        return None, "not known; --tokenizer-file FILE or --tokenizer bytes gives it, here or later"
    try:
        tokenizer = read_tokenizer(path)
        check_vocabulary(tokenizer, spec.vocab_size, f"tokenizer {path}")
    except TokenizerError as error:
        if given is not None:
            raise
        return None, f"not known: {error}"
    return tokenizer.content, f"{path}, {tokenizer.vocab_size} tokens"


def _read_pretrained(
    arguments: argparse.Namespace, source: Source, implementations: Mapping[str, Implementation]
) -> tuple[TransformerSpec, Arrays]:
    """Raises UsageError for options that the file answers, and all that the readers raise."""
    # The file and its config.json say what the model is; options are what they leave open.
    read, options = PRETRAINED[arguments.origin]
    _, line = read_given(argparse.Namespace(**vars(arguments) | {"config": None}), plurals={})
    unused = [name for _, name in line if name not in options]
    unused += [] if arguments.config is None else ["config"]
    if unused:
        raise UsageError(
            f"{flag(unused[0])}: --from {arguments.origin} reads the model from the file and its "
            "config.json; expected without it"
        )
    said = _said(read_native_dropout(line, Settings()))
    pickled = [str(file) for file in source.files if file.suffix != ".safetensors"]
    if not pickled:
        _check_no_python(arguments, f"--from {arguments.origin} of safetensors")
        return read(source, said, list(source.files))
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        # PyTorch alone reads these; the rest goes on as for any other file.
        merged = Path(folder) / "model.safetensors"
        argv = ["tensors", str(merged), *pickled]
        if _convert(arguments, "torch", implementations, *argv) != EXIT_OK:
            raise UsageError(f"{pickled[0]}: cannot be read")
        others = [file for file in source.files if file.suffix == ".safetensors"]
        return read(source, said, [merged, *others])


def _said(line: Settings) -> dict[str, Any]:
    """The options' values, each checked by itself; rules between them need the file's shapes."""
    found: dict[str, Any] = {}
    for (section, name), setting in line.items():
        if name == "num_heads":  # what it has to divide is in the file
            found[name] = whole_number(setting.value)
            if (found[name] or 0) < 1:
                what = "expected a whole number, at least 1"
                raise UsageError(f"{setting.where} = {setting.value!r}: {what}")
        else:
            spec = validated(TransformerSpec, Settings({(section, name): setting}))
            found[name] = getattr(spec, name)
    return found


def _say_what_no_file_says(arguments: argparse.Namespace, spec: TransformerSpec) -> None:
    """Note the defaults of options that no shape shows, but that change what weights mean."""
    given = {dest.rpartition(".")[2] for dest in vars(arguments) if "." in dest}
    needed = (*NOT_IN_THE_WEIGHTS, *(["rope_theta"] if spec.position == "rotary" else []), "causal")
    unsaid = [name for name in needed if name not in given]
    if unsaid and arguments.config is None and "preset" not in given:
        values = ((name, getattr(spec, name)) for name in unsaid)
        shown = {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in values}
        shown["causal"] = ""  # a switch, on by default
        words = (f"{flag(name)} {shown[name]}".rstrip() for name in unsaid)
        print(f"{NOTE}the file does not say {', '.join(words)}; taken as by default")


def _words(spec: TransformerSpec) -> str:
    return (
        f"{spec.num_layers} blocks, d_model {spec.d_model}, {spec.num_heads} heads, d_ff "
        f"{spec.d_ff}, vocabulary {spec.vocab_size}, context {spec.context_length}, "
        f"{spec.norm}-norm, {spec.activation}{'' if spec.causal else ', encoder'}"
    )


def _check_no_python(arguments: argparse.Namespace, what: str) -> None:
    for text in arguments.python:
        raise UsageError(f"--python {text}: {what} starts no framework; expected without it")


def _convert(
    arguments: argparse.Namespace,
    framework: str,
    implementations: Mapping[str, Implementation],
    *argv: str,
) -> int:
    """Run the framework's converter in a worker, and pass its notes on. Raises UsageError."""
    implementation = implementations[framework]
    named = checked_pythons(named_pythons(arguments)).get(framework)
    require(implementation, python=named)
    module = f"{implementation.module}.convert"
    python = interpreter(module, named)
    worker = subprocess.run(
        worker_command(module, *argv, python=python),
        env=worker_environment(module, python),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    for line in worker.stdout.splitlines():
        if line.startswith(NOTE):
            print(line)
    if worker.returncode == 2:
        raise UsageError(worker.stderr.strip().splitlines()[-1])
    # A file that a library in C trips over.
    if argv[0] != "export" and -worker.returncode in CRASHES:
        name = signal.Signals(-worker.returncode).name
        file = argv[1] if argv[0] == "import" else argv[2]
        what = f"reading it ended with {name}; expected a file as `export` writes it"
        raise UsageError(f"{file}: {what}")
    if worker.returncode:
        print(f"failed: {last_error(worker.stderr)}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK
