"""Options of subcommands that do one run: every field of the specification, over its defaults."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.checkpoint import CheckpointError
from common.cli.saved import Saved
from common.cli.settings import (
    PLURALS,
    SECTIONS,
    Key,
    Setting,
    Settings,
    adapt,
    add_option,
    base_settings,
    check_corpora,
    make_run,
    read_native_dropout,
    read_toml,
    validated,
)
from common.io.usage import UsageError, closest
from common.spec.data import CorpusError
from common.spec.run import PRESETS, RunConfig, TransformerSpec
from common.spec.tokenizer import TokenizerError

PRESET = "tiny"
PLACEMENT = ("framework", "stages", "chunks", "schedule", "partition", "device", "threads")
"""Fields of a run that decide who computes what, not what is computed."""
TITLES = {"run": "the run", "model": "the model", "train": "the training"}


def add_run_options(
    parser: argparse.ArgumentParser,
    only_placement: bool = False,
    also: Sequence[str] = (),
    without: Sequence[str] = (),
    sections: Sequence[str] = tuple(TITLES),
    defaults: Mapping[Key, Any] = MappingProxyType({}),
    preset: str = PRESET,
) -> None:
    """Options for one run but those `without`. `only_placement`: where the rest comes from a
    checkpoint, but `also` these.

    `only_placement`: if the rest comes from a checkpoint, only placement options and those in
    `also`. `defaults` is what the help shows instead of the values of `preset`, which applies if
    the user names none.
    """
    if not only_placement:
        parser.add_argument(
            "--preset",
            metavar="NAME",
            help=f"where to start from: {', '.join(PRESETS)} (default: {preset})",
        )
        parser.add_argument(
            "--config",
            metavar="FILE.toml",
            help="settings in TOML; the command line goes before it",
        )
    shown = {key: setting.value for key, setting in base_settings(preset).items()} | dict(defaults)
    taken: list[Key] = [("bench", "preset")]
    for section in sections:
        fields = SECTIONS[section].model_fields
        names = [name for name in fields if name not in ("model", "train")]
        if only_placement:
            names = {"run": [*PLACEMENT, *also], "train": ["micro_batches"]}.get(section, [])
        names = [name for name in names if name not in without]
        group = _OneValue(parser.add_argument_group(TITLES[section])) if names else None
        for name in names:
            default = (
                fields[name].default
                if name in PLURALS
                else shown.get((section, name), fields[name].default)
            )
            add_option(group, section, name, fields[name], default)
            taken.append((section, name))
    parser.set_defaults(taken=tuple(taken), base_preset=preset)


class _OneValue:
    """A group of options that take one value each; the benchmark's take lists."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def add_argument(self, flag: str, **options: Any) -> None:
        name = str(options["dest"]).split(".")[1]
        if flag == f"--{PLURALS.get(name)}":  # the singular comes next
            self.help = options["help"]
            return
        if name in PLURALS:
            options["help"] = self.help
        if isinstance(options.get("metavar"), str):
            options["metavar"] = options["metavar"].removesuffix(",..")
        self.group.add_argument(flag, **options)


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
    settings = _layers(arguments, saved, defaults)
    for key, setting in settings.items():
        if (
            isinstance(setting.value, list)
            and key[0] != "model"
            and key[1] in ("framework", "schedule")
        ):
            raise UsageError(f"{setting.where} = {','.join(setting.value)}: this takes one")
    config = make_run(settings)
    if saved is None and reads_text:
        check_corpora([config])
    return config


def read_model(arguments: argparse.Namespace) -> TransformerSpec:
    """Return the model alone, of any vocabulary. Raises UsageError."""
    return TransformerSpec(**validated("model", _layers(arguments, None, {})))


def _layers(
    arguments: argparse.Namespace, saved: Saved | None, defaults: Mapping[Key, Any]
) -> Settings:
    line: Settings = {}
    for dest, value in vars(arguments).items():
        section, _, name = dest.partition(".")
        if section in TITLES and name:
            line[section, name] = Setting(value, f"--{name.replace('_', '-')}")
    path = getattr(arguments, "config", None)
    file = read_toml(Path(path)) if path else {}
    for key, setting in file.items():
        if key not in arguments.taken:
            raise UsageError(
                f"{setting.where}: not a setting of this command; expected those that its "
                "--help lists"
            )
    named = file.pop(("bench", "preset"), Setting(None, ""))
    if getattr(arguments, "preset", None) is not None:
        named = Setting(arguments.preset, "--preset")
    preset = named.value
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise UsageError(f"{named.where} = {preset!r}: unknown{closest(str(preset), PRESETS)}")
    base = base_settings(preset or arguments.base_preset) | {
        ("run", "framework"): Setting("torch", "the default --framework"),
        ("run", "schedule"): Setting("1f1b", "the default --schedule"),
    }
    if preset is None:
        base |= {key: Setting(value, "default") for key, value in defaults.items()}
    if saved is not None and preset is None:
        base |= saved.settings
    file = read_native_dropout(file, base)
    given = file | read_native_dropout(line, base | file)
    if saved is not None:
        given |= saved.tokenizer(given)
        given.setdefault(
            ("model", "vocab_size"),
            Setting(saved.manifest.model.vocab_size, "the checkpoint's vocab_size"),
        )
    settings = base | given
    adapt(settings, given)
    return settings


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
        raise UsageError(
            f"{what}: {error.strerror}; expected a folder that can be written"
        ) from None


def reporting(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Run `run` and turn errors of the input into one line and exit status 2."""

    def wrapped(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except (CheckpointError, CorpusError, TokenizerError, OSError) as error:
            raise UsageError(str(error)) from None

    return wrapped
