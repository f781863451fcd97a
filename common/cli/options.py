"""Options made from the fields of the specification, and what subcommands that do one run read."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.cli.python import SECTION, add_python, named_pythons, with_python
from common.cli.saved import Saved
from common.cli.settings import (
    FIELDS,
    NATIVE_DROPOUT,
    PLURALS,
    Key,
    Setting,
    Settings,
    base_settings,
    check_corpora,
    kinds_of,
    layered,
    make_run,
    read_given,
    read_preset,
    validated,
)
from common.io.usage import UsageError
from common.schedule import recompute
from common.schedule.generators import GENERATORS
from common.spec import compression
from common.spec.run import RunConfig, TransformerSpec

PRESET = "tiny"
PLACEMENT = ("framework", "stages", "chunks", "schedule", "partition", "device", "threads")
"""Fields of a run that decide who computes what, not what is computed."""
TITLES = {"run": "the run", "model": "the model", "train": "the training"}
METAVARS = {
    "partition": "even|balanced|B1,B2,..",
    "recompute": recompute.WORDS,
    "compress": compression.WORDS,
    "dropout": "X|native[:X]",
    "corpus": "PATH",
    "tokenizer_file": "FILE",
}
MORE_HELP = {
    "schedule": f": {', '.join(GENERATORS)}; or all of them that fit. `triptych simulate --output "
    "PATH` writes a file, with --group-size, --warm-up or costs of yours",
    "dropout": f"; native or native:X: by the framework's own masks, with X or {NATIVE_DROPOUT:g}",
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_config(group: Any) -> None:
    group.add_argument(
        "--config",
        metavar="FILE.toml",
        help="settings in TOML, with tables [model] and [train]; the command line goes before it",
    )


def add_option(group: Any, key: Key, default: Any, names: Sequence[str], many: bool) -> None:
    """Add the option of a field by all its `names`, of which the help shows the first alone.

    `many`: it takes a list.
    """
    section, name = key
    kinds = kinds_of(FIELDS[key].annotation)
    words = "|".join(kind for kind in kinds if isinstance(kind, str))
    shown = ",".join(map(str, default)) if isinstance(default, tuple | list) else default
    shown = "what the schedule has" if name == "chunks" else shown
    text = (FIELDS[key].description or "") + MORE_HELP.get(name, "")
    if shown not in ("", None):
        text += f" (default: {shown})"
    options: dict[str, Any] = {"dest": f"{section}.{name}", "default": argparse.SUPPRESS}
    if kinds == [bool]:
        options["action"] = argparse.BooleanOptionalAction
    else:
        metavar = METAVARS.get(name) or words or {int: "N", float: "X"}.get(kinds[0], "NAME")
        options["metavar"] = f"{metavar},.." if many else metavar
    if name == "corpus":
        options["nargs"] = "+"
    for each in names:
        group.add_argument(flag(each), **options, help=text)
        text = argparse.SUPPRESS


def add_run_options(
    parser: argparse.ArgumentParser,
    only_placement: bool = False,
    also: Sequence[str] = (),
    without: Sequence[str] = (),
    sections: Sequence[str] = tuple(TITLES),
    defaults: Mapping[Key, Any] = MappingProxyType({}),
    preset: str = PRESET,
) -> None:
    """Add the options for one run but those `without`.

    `only_placement`: if the rest comes from a checkpoint, only placement options and those in
    `also`. `defaults` is what the help shows instead of the values of `preset`, which applies if
    the user names none.
    """
    # Options come from the specification itself: a new field is a new option without a line here.
    keys = [key for key in FIELDS if key[0] in sections and key[1] not in (*without, "python")]
    if only_placement:
        wanted = [*(("run", name) for name in (*PLACEMENT, *also)), ("train", "micro_batches")]
        keys = [key for key in wanted if key in keys]
    else:
        add_option(parser, ("bench", "preset"), preset, ["preset"], many=False)
        add_config(parser)
    add_python(parser)
    below = base_settings(preset)
    groups: dict[str, Any] = {}
    for section, name in keys:
        if section not in groups:
            groups[section] = parser.add_argument_group(TITLES[section])
        # By default the benchmark compares several of these; a run takes the field's own.
        default = FIELDS[section, name].default if name in PLURALS else below.value(section, name)
        default = defaults.get((section, name), default)
        add_option(groups[section], (section, name), default, [name], many=False)
    parser.set_defaults(taken=(("bench", "preset"), *keys), base_preset=preset)


def read_run(
    arguments: argparse.Namespace,
    saved: Saved | None = None,
    defaults: Mapping[Key, Any] = MappingProxyType({}),
    reads_text: bool = True,
) -> RunConfig:
    """Return the one run that the command line asks for. Raises UsageError.

    Below it stands the checkpoint `saved`, or else the preset, which `defaults` follow where nobody
    names one. The text is looked at too, if the subcommand `reads_text`, unless there is a
    checkpoint: `load_text` knows which one belongs to it.
    """
    settings = with_python(_settings(arguments, saved, defaults))
    for key, setting in settings.items():
        if isinstance(setting.value, list) and Ellipsis not in kinds_of(FIELDS[key].annotation):
            what = "expected one value, not a list"
            raise UsageError(f"{setting.where} = {setting.value!r}: {what}")
    config = make_run(settings)
    if saved is None and reads_text:
        check_corpora([config])
    return config


def read_model(arguments: argparse.Namespace) -> TransformerSpec:
    """Return the model alone, of any vocabulary. Raises UsageError."""
    return validated(TransformerSpec, _settings(arguments, None, {}))


def _settings(
    arguments: argparse.Namespace, saved: Saved | None, defaults: Mapping[Key, Any]
) -> Settings:
    file, line = read_given(arguments, plurals={})
    line.update(named_pythons(arguments))
    for key, setting in file.items():
        if key not in arguments.taken and key[0] != SECTION:
            what = "not a setting of this command; expected those that its --help lists"
            raise UsageError(f"{setting.where}: {what}")
    preset = read_preset(file, line)
    base = base_settings(preset or arguments.base_preset)
    base["run", "framework"] = Setting("torch", "the default --framework", is_given=False)
    base["run", "schedule"] = Setting("1f1b", "the default --schedule", is_given=False)
    if preset is None:
        for (section, name), value in defaults.items():
            base.adapt(section, name, value, "default")
    if saved is not None:
        base.update(saved.settings if preset is None else {})
        line.update(saved.tokenizer(file | line))
        if ("model", "vocab_size") not in file | line:
            vocab_size = saved.manifest.model.vocab_size
            line["model", "vocab_size"] = Setting(vocab_size, "the checkpoint's vocab_size")
    return layered(base, file, line)


def file_to_write(text: str, option: str) -> Path:
    """Return a path to write, checked before the work is done. Raises UsageError."""
    path = Path(text)
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder; expected a file")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: expected a path in a folder that exists")
    check_writable(path.parent, f"{option} {path}")
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{option} {path}: cannot be written")
    return path


def check_writable(folder: Path, what: str) -> None:
    """Raise UsageError if no file can be created in `folder`, for example on a read-only disk."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = f"{error.strerror}; expected a folder that can be written"
        raise UsageError(f"{what}: {why}") from None
