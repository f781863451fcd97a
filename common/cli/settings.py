"""The layers that a run is made from: preset < TOML < command line.

Every field of `TransformerSpec`, `TrainSpec`, `RunConfig` and `BenchOptions` is an option and a
TOML key, made from the field itself (`common.cli.options`). A `Setting` keeps where its value came
from, so that wrong input is one line: where, what is wrong, what is expected (`UsageError`).
"""

from __future__ import annotations

import tomllib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.harness.options import BenchOptions
from common.io.bounded import read_text
from common.io.edges import number, whole_number
from common.io.usage import UsageError, closest, known_word
from common.schedule import recompute
from common.schedule.generators import default_chunks, keep_schedule
from common.spec import habits
from common.spec.data import CorpusError, load_corpus, text_key
from common.spec.rules import has_bfloat16, why_impossible
from common.spec.run import FRAMEWORKS, PRESETS, RunConfig, TrainSpec, TransformerSpec
from common.spec.tokenizer import read_tokenizer

Key = tuple[str, str]
"""(section, field)"""

SECTIONS: Mapping[str, type[BaseModel]] = {
    "run": RunConfig,
    "bench": BenchOptions,
    "model": TransformerSpec,
    "train": TrainSpec,
}
FIELDS: Mapping[Key, FieldInfo] = {
    (section, name): field
    for section, model in SECTIONS.items()
    for name, field in model.model_fields.items()
    if name not in SECTIONS
}
PLURALS = {"framework": "frameworks", "schedule": "schedules"}
"""Fields that have this name too; the benchmark's help shows it."""
OF_ONE_OPTIMIZER = {"momentum": "sgd", "beta1": "adamw", "beta2": "adamw", "epsilon": "adamw"}
MAX_TOML_BYTES = 2**20
NATIVE_DROPOUT = 0.1
"""The probability of `--dropout native` if neither the preset nor a file gives one."""

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Setting:
    """A value, where it came from, as errors name it, and whether the user gave it."""

    value: Any
    where: str
    is_given: bool = True


class Settings(dict[Key, Setting]):
    """What is set, by section and field; a field that is not here has its own default."""

    def __or__(self, other: Mapping[Key, Setting]) -> Settings:  # type: ignore[override]
        return Settings({**self, **other})

    def value(self, section: str, name: str) -> Any:
        setting = self.get((section, name))
        return FIELDS[section, name].default if setting is None else setting.value

    def given(self, section: str, name: str) -> Setting | None:
        """Return the setting if the user gave it."""
        setting = self.get((section, name))
        return setting if setting is not None and setting.is_given else None

    def adapt(self, section: str, name: str, value: Any, where: str) -> None:
        """Set what the user did not."""
        if self.given(section, name) is None:
            self[section, name] = Setting(value, where, is_given=False)


# ------------------------------------------------------------------------------------------- layers


def base_settings(preset: str) -> Settings:
    """Return the defaults: the preset, all frameworks, and two schedules to compare."""
    settings = Settings()
    settings.adapt("run", "framework", list(FRAMEWORKS), "the default --frameworks")
    settings.adapt("run", "schedule", ["gpipe", "1f1b"], "the default --schedules")
    for section, values in PRESETS[preset].items():
        for name, value in values.items():
            settings.adapt(section, name, value, f"preset {preset}, {name}")
    return settings


def read_given(arguments: Namespace, plurals: Mapping[str, str]) -> tuple[Settings, Settings]:
    """Return what the TOML file of --config sets, and what the command line sets."""
    line = Settings()
    for dest, value in vars(arguments).items():
        section, _, name = dest.partition(".")
        if name:
            option = "--" + plurals.get(name, name).replace("_", "-")
            line[section, name] = Setting(value, option)
    path = getattr(arguments, "config", None)
    return (Settings() if path is None else read_toml(Path(path))), line


def read_preset(file: Settings, line: Settings) -> str | None:
    """Return the name of the preset, if one is given. Raises UsageError if there is no such one."""
    named = (file | line).get(("bench", "preset"))
    return None if named is None else known_word(named.where, named.value, PRESETS)


def layered(base: Settings, file: Settings, line: Settings) -> Settings:
    """Lay the command line over the file over the base, and adapt what is not given."""
    # A layer lies over those below it, key by key: what the command line says counts over the file.
    file = read_native_dropout(file, base)
    settings = base | file | read_native_dropout(line, base | file)
    adapt(settings)
    return settings


def read_toml(path: Path) -> Settings:
    try:
        content = tomllib.loads(read_text(path, MAX_TOML_BYTES))
    except OSError as error:
        what = f"{error.strerror}; expected a readable TOML file"
        raise UsageError(f"--config {path}: {what}") from None
    # tomllib lets those of numbers and of nesting through
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML: {error}") from None
    # By table, "" for the top level: the fields that stand there, under all their names.
    known: dict[str, dict[str, Key]] = {"": {}, "model": {}, "train": {}}
    for section, name in FIELDS:
        table = known.get(section, known[""])
        table |= dict.fromkeys((name, PLURALS.get(name, name)), (section, name))
    places = {"model": "under [model]", "train": "under [train]"}
    entries: list[tuple[str, str, Any]] = []
    settings = Settings()
    for name, value in content.items():
        if name == "python" and isinstance(value, dict):  # for each run, one (`common.cli.python`)
            for framework, each in value.items():
                settings[name, framework] = Setting(each, f"{path}: [python] {framework}")
        elif name == "python":
            raise UsageError(f"{path}: python = {value!r}; expected a table [python]")
        elif name not in places:
            entries.append(("", name, value))
        elif isinstance(value, dict):
            entries += [(name, inner, each) for inner, each in value.items()]
        else:
            raise UsageError(f"{path}: {name} = {value!r}; expected a table [{name}]")
    for table_name, name, value in entries:
        where = f"{path}: [{table_name}] {name}" if table_name else f"{path}: {name}"
        key = known[table_name].get(name)
        if key is None:
            where += ": unknown" if table_name else ": unknown at the top level"
            right = [places.get(each, "at the top level") for each in known if name in known[each]]
            names = [*known[table_name], *(() if table_name else places)]
            raise UsageError(where + (f"; expected {right[0]}" if right else closest(name, names)))
        if key in settings:
            raise UsageError(f"{where}: the same as {settings[key].where}; expected one of them")
        settings[key] = Setting(value, where)
    return settings


def listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return list(dict.fromkeys(word.strip() for word in value.split(",")))
    return list(value) if isinstance(value, list | tuple) else [value]


# ------------------------------------------------------------------------- what follows from others


def read_native_dropout(given: Settings, below: Settings) -> Settings:
    """Read `dropout = native` or `native:0.2` as two settings, with a default probability."""
    key, masks = ("model", "dropout"), given.get(("model", "dropout_masks"))
    setting = given.get(key)
    word, colon, probability = str(setting.value if setting else "").partition(":")
    if setting is None or word != "native":
        return given
    if masks is not None and masks.value != "native":
        raise UsageError(
            f"{setting.where} = {setting.value} and {masks.where} = {masks.value} disagree"
        )
    nearest = below.value(*key) or NATIVE_DROPOUT
    both = {key: probability if colon else nearest, ("model", "dropout_masks"): "native"}
    return given | {each: Setting(value, setting.where) for each, value in both.items()}


def adapt(settings: Settings) -> None:
    """Adjust unset options to the ones the user set.

    For example, the warm-up is cut to the number of steps, and the micro-batches to the sequences.
    """
    _adapt_to_drift(settings)
    _refuse_unused(settings)
    default = settings.value("run", "framework")
    if listed(settings.value("train", "dtype")) == ["bfloat16"] and isinstance(default, list):
        device = str(settings.value("run", "device"))
        able = [name for name in default if has_bfloat16(name, device)]
        settings.adapt("run", "framework", able, "default")
    steps = whole_number(settings.value("train", "steps"))  # None: for validation to say so
    if steps:
        if (warmup := settings.get(("train", "warmup_steps"))) and not warmup.is_given:
            settings.adapt("train", "warmup_steps", min(warmup.value, steps), warmup.where)
        untimed = max(1, min(FIELDS["bench", "untimed_steps"].default, steps - 1))
        settings.adapt("bench", "untimed_steps", untimed, "default")
    batch = whole_number(settings.value("train", "batch_size"))
    m = settings["train", "micro_batches"]
    replicas = [whole_number(d) or 1 for d in listed(settings.value("run", "replicas"))]
    if batch and not m.is_given:
        most = max(1, batch // max(replicas, default=1))
        settings.adapt("train", "micro_batches", min(m.value, most), m.where)
    _adapt_to_tokenizer_file(settings)
    if settings.value("run", "tokenizer") == "bytes":
        settings.adapt("model", "vocab_size", 256, "tokenizer bytes")


def _refuse_unused(settings: Settings) -> None:
    """Refuse a setting that nothing would read, unless it is the value that holds anyway."""
    optimizer = settings.value("train", "optimizer")
    for name, owner in OF_ONE_OPTIMIZER.items():
        setting = settings.given("train", name)
        default = FIELDS["train", name].default
        if setting and optimizer != owner and number(setting.value) != default:
            what = f"{optimizer} has none; expected with --optimizer {owner}"
            raise UsageError(f"{setting.where} = {setting.value}: {what}")
    masks = settings.given("model", "dropout_masks")
    if masks and masks.value == "native" and number(settings.value("model", "dropout")) == 0:
        what = "nothing is dropped; expected with a --dropout of more than 0"
        raise UsageError(f"{masks.where} = native: {what}")


def _adapt_to_drift(settings: Settings) -> None:
    """Set what a drift needs to show: dropout, a tied head, ragged sequences, a precision."""
    setting = settings.get(("run", "drift"))
    if setting is None or setting.value in (None, "none"):
        return
    names = [each.name for each in habits.DRIFTS]
    habit = habits.by_name(known_word(setting.where, setting.value, names))
    needs = {
        "model": habit.model,
        "train": {**habit.train, "dtype": habit.dtype},
        "run": {**habit.run, "framework": list(habit.frameworks)},
    }
    for section, values in needs.items():
        for name, value in values.items():
            settings.adapt(section, name, value, f"drift {habit.name}, {name}")


def _adapt_to_tokenizer_file(settings: Settings) -> None:
    """Take the kind of tokenizer and the vocabulary size from a tokenizer.json."""
    setting = settings.get(("run", "tokenizer_file"))
    if setting is None or not isinstance(setting.value, str) or setting.value.lower() == "none":
        return
    settings.adapt("run", "tokenizer", "file", setting.where)
    if settings.given("model", "vocab_size") is None:
        try:
            size = read_tokenizer(Path(setting.value)).vocab_size
        except UsageError as error:
            raise UsageError(f"{setting.where}: {error}") from None
        settings.adapt("model", "vocab_size", size, f"{setting.where}, its vocabulary")


# --------------------------------------------------------------------------------------- validation


def make_run(settings: Settings) -> RunConfig:
    """One run. A schedule in a file is read here, for all processes. Raises UsageError."""
    name = str(settings.value("run", "schedule"))
    keep_schedule(name)
    if ("run", "chunks") not in settings:
        settings.adapt("run", "chunks", default_chunks(name), f"schedule {name}, chunks")
    parts = {"model": validated(TransformerSpec, settings), "train": validated(TrainSpec, settings)}
    config = validated(RunConfig, settings, **parts)
    if impossible := why_impossible(config):
        wheres = [each.where for (_, name), each in settings.items() if name == impossible.field]
        raise UsageError(f"{(wheres or [impossible.field])[0]}{impossible.text}")
    return config


def validated(kind: type[_Model], settings: Settings, **fixed: Any) -> _Model:
    """Make a specification of its section's settings and what is `fixed`. Raises UsageError."""
    section = next(section for section, model in SECTIONS.items() if model is kind)
    # Pydantic sees one section at a time, so an error's place is a field of this one.
    own = {name: setting for (each, name), setting in settings.items() if each == section}
    values = {name: _read_words(section, name, setting.value) for name, setting in own.items()}
    try:
        return kind.model_validate(values | fixed)
    except ValidationError as error:
        item = error.errors()[0]
        if not item["loc"]:  # a rule between fields; its message names them
            raise UsageError(item["msg"].removeprefix("Value error, ")) from None
        name = str(item["loc"][0])
        value, where = own[name].value, own[name].where
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise UsageError(f"{where} = {shown}: {_wrong(FIELDS[section, name], item)}") from None


def _read_words(section: str, name: str, value: Any) -> Any:
    """Read what a shell or TOML can only write as words: none, and lists with commas."""
    kinds = kinds_of(FIELDS[section, name].annotation)
    if isinstance(value, bool) and {int, float} & {*kinds}:
        return str(value)  # pydantic would take it for 1
    if not isinstance(value, str):
        return value
    if value.lower() == "none" and type(None) in kinds:
        return None
    if name == "no_decay":
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return (value,) if name == "corpus" else value


def kinds_of(annotation: Any) -> list[Any]:
    """Return the types and words of an annotation, whatever union or tuple they stand in.

    For example "even", int and Ellipsis of `Literal["even"] | tuple[int, ...]`.
    """
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    return [kind for part in parts for kind in kinds_of(part)] if parts else [annotation]


def _wrong(field: FieldInfo, item: Any) -> str:
    """Return what is wrong with a field's value, and what is expected."""
    kinds = kinds_of(field.annotation)
    if item["type"] == "string_pattern_mismatch":  # only `recompute` has a pattern
        return f"unknown; expected {recompute.WORDS.replace('|', ', ')} with N at least 1"
    if item["type"] == "literal_error":
        return f"unknown{closest(str(item['input']), [k for k in kinds if isinstance(k, str)])}"
    if item["type"] == "value_error":
        message = str(item["msg"]).removeprefix("Value error, ")
        return message.partition("; ")[2] or str(item["msg"])
    nouns = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    noun = next((nouns[kind] for kind in kinds if kind in nouns), str(item["msg"]))
    noun = f"{noun}, or a list of it" if Ellipsis in kinds else noun
    signs = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = [
        f"{word} {getattr(limit, sign)}"
        for limit in field.metadata
        for sign, word in signs.items()
        if hasattr(limit, sign)
    ]
    noun += " that is not empty" if item["type"] == "string_too_short" else ""
    optional = " or none" if type(None) in kinds else ""
    return f"expected {', '.join([noun, *([' and '.join(bounds)] if bounds else [])])}{optional}"


def check_corpora(points: Sequence[RunConfig]) -> None:
    """Read every corpus once, so that a wrong path or a short text is found before any run."""
    distinct = {(*text_key(c), c.model.context_length): c for c in points}
    for config in distinct.values():
        try:
            load_corpus(config)
        except CorpusError as error:
            raise UsageError(f"--corpus: {error}") from None
