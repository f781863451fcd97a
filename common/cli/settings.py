"""The layers that a run is made from: presets, TOML, the command line.

Every field of `TransformerSpec`, `TrainSpec` and `RunConfig` is an option and a TOML key, made from
the field itself. The order of precedence is preset < TOML < command line. Wrong input is a
`UsageError`: one line with what is wrong, where it stands, and what would be right.
"""

from __future__ import annotations

import tomllib
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.harness.options import BenchOptions
from common.io.bounded import read_text
from common.io.edges import number, whole_number
from common.io.usage import UsageError, closest
from common.schedule import recompute
from common.schedule.generators import GENERATORS, default_chunks, keep_schedule
from common.spec import habits
from common.spec.data import CorpusError, load_corpus
from common.spec.rules import BFLOAT16, why_impossible
from common.spec.run import FRAMEWORKS, PRESETS, RunConfig, TrainSpec, TransformerSpec
from common.spec.tokenizer import TokenizerError, read_tokenizer

MAX_TOML_BYTES = 2**20


Key = tuple[str, str]
"""(section, field)"""


SECTIONS: Mapping[str, type[BaseModel]] = {
    "run": RunConfig,
    "bench": BenchOptions,
    "model": TransformerSpec,
    "train": TrainSpec,
}


# The last one changes fastest, so the frameworks of one schedule stand side by side.
GRID: tuple[Key, ...] = (
    ("run", "track"),
    ("train", "dtype"),
    ("run", "recompute"),
    ("run", "executor"),
    ("run", "chunks"),
    ("train", "micro_batches"),
    ("run", "stages"),
    ("run", "schedule"),
    ("run", "framework"),
)


PLURALS = {"framework": "frameworks", "schedule": "schedules"}
"""Fields whose option has another name."""


OF_ONE_OPTIMIZER = {"momentum": "sgd", "beta1": "adamw", "beta2": "adamw", "epsilon": "adamw"}


@dataclass(frozen=True)
class Setting:
    """A value and where it came from, as errors name it."""

    value: Any
    where: str


Settings = dict[Key, Setting]


NATIVE_DROPOUT = 0.1
"""The probability of `--dropout native` if neither the preset nor a file gives one."""


def add_option(group: Any, section: str, name: str, field: FieldInfo, default: Any) -> None:
    shown = ",".join(map(str, default)) if isinstance(default, tuple | list) else default
    text = field.description or ""
    if name == "chunks":
        shown = "what the schedule has"
    if name == "schedule":
        text += f": {', '.join(GENERATORS)}; or all of them that fit"
    if name == "dropout":
        text += f"; native or native:X: by the framework's own masks, with X or {NATIVE_DROPOUT:g}"
    if shown not in ("", None):
        text += f" (default: {shown})"
    options: dict[str, Any] = {"dest": f"{section}.{name}", "default": SUPPRESS, "help": text}
    if field.annotation is bool:
        options["action"] = BooleanOptionalAction
    elif name == "corpus":
        options |= {"nargs": "+", "metavar": "FILE"}
    else:
        options["metavar"] = _metavar(section, name, field)
    group.add_argument(flag(name), **options)
    if name in PLURALS:  # the singular works too
        group.add_argument(f"--{name}", **options | {"help": SUPPRESS})


def flag(name: str) -> str:
    return "--" + PLURALS.get(name, name).replace("_", "-")


def _metavar(section: str, name: str, field: FieldInfo) -> str:
    words = [word for part in _alternatives(field.annotation) for word in _words(part)]
    text = "|".join(words) or {int: "N", float: "X"}.get(_alternatives(field.annotation)[0], "NAME")
    if name == "partition":
        text += "|B1,B2,.."
    if name == "recompute":
        text = recompute.WORDS
    if name == "dropout":
        text += "|native[:X]"
    if name == "tokenizer_file":
        text = "FILE"
    return f"{text},.." if (section, name) in GRID else text


def _alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union; a plain type is its own only member."""
    if get_origin(annotation) in (None, Literal, tuple):
        return [annotation]
    return [
        float if get_origin(part) not in (None, Literal, tuple) else part
        for part in get_args(annotation)
    ]


def _words(annotation: Any) -> list[str]:
    if annotation is type(None):
        return []
    return [str(word) for word in get_args(annotation)] if get_origin(annotation) is Literal else []


def base_settings(preset: str) -> Settings:
    """Return the defaults: the preset, all frameworks, and two schedules to compare."""
    settings: Settings = {
        ("run", "framework"): Setting(list(FRAMEWORKS), "the default --frameworks"),
        ("run", "schedule"): Setting(["gpipe", "1f1b"], "the default --schedules"),
    }
    for section, values in PRESETS[preset].items():
        for name, value in values.items():
            settings[section, name] = Setting(value, f"preset {preset}, {name}")
    return settings


def read_native_dropout(given: Settings, below: Settings) -> Settings:
    """Read `dropout = native` or `native:0.2` as two settings, with a default probability."""
    key, masks = ("model", "dropout"), ("model", "dropout_masks")
    setting = given.get(key)
    word, _, number = str(setting.value).partition(":") if setting else ("", "", "")
    if setting is None or word != "native":
        return given
    if masks in given and given[masks].value != "native":
        raise UsageError(
            f"{setting.where} = {setting.value} and {given[masks].where} = {given[masks].value} "
            "disagree"
        )
    known = below[key].value if key in below else 0.0
    probability = number if ":" in str(setting.value) else (known or NATIVE_DROPOUT)
    return given | {
        key: Setting(probability, setting.where),
        masks: Setting("native", setting.where),
    }


def adapt(settings: Settings, given: Settings) -> None:
    """Adjust unset options to the ones the user set.

    For example, the warm-up is cut to the number of steps.
    """
    _adapt_to_drift(settings, given)
    _refuse_unused(settings, given)
    dtypes = listed(settings[("train", "dtype")].value) if ("train", "dtype") in settings else []
    default = settings.get(("run", "framework"), Setting(None, "")).value
    if dtypes == ["bfloat16"] and isinstance(default, list) and ("run", "framework") not in given:
        settings["run", "framework"] = Setting(
            [name for name in default if name in BFLOAT16], "default"
        )
    warmup, steps = settings.get(("train", "warmup_steps")), None
    if ("train", "steps") in settings:
        steps = whole_number(settings["train", "steps"].value)  # None: for validation to say so
    if steps and warmup and ("train", "warmup_steps") not in given:
        settings["train", "warmup_steps"] = Setting(min(warmup.value, steps), warmup.where)
    if steps and ("bench", "untimed_steps") not in given:
        fewer = max(1, min(BenchOptions().untimed_steps, steps - 1))
        settings["bench", "untimed_steps"] = Setting(fewer, "default")
    _adapt_to_tokenizer_file(settings, given)
    tokenizer = settings.get(("run", "tokenizer"), Setting("bytes", ""))
    if tokenizer.value == "bytes" and ("model", "vocab_size") not in given:
        settings["model", "vocab_size"] = Setting(256, "tokenizer bytes")


def _refuse_unused(settings: Settings, given: Settings) -> None:
    """Refuse a setting that nothing would read, unless it is the value that holds anyway."""
    optimizer = settings.get(("train", "optimizer"), Setting(TrainSpec().optimizer, ""))
    for name, owner in OF_ONE_OPTIMIZER.items():
        setting = given.get(("train", name))
        if (
            setting is None
            or optimizer.value == owner
            or number(setting.value) == TrainSpec.model_fields[name].default
        ):
            continue
        raise UsageError(
            f"{setting.where} = {setting.value}: {optimizer.value} has none; expected with "
            f"--optimizer {owner}"
        )
    masks, dropout = (
        given.get(("model", "dropout_masks")),
        settings.get(("model", "dropout"), Setting(0.0, "")),
    )
    if masks is not None and masks.value == "native" and number(dropout.value) == 0:
        raise UsageError(
            f"{masks.where} = native: nothing is dropped; expected with a --dropout of more than 0"
        )


def _adapt_to_drift(settings: Settings, given: Settings) -> None:
    """Set what a drift needs to show: dropout, a tied head, ragged sequences, a precision."""
    setting = settings.get(("run", "drift"))
    if setting is None or setting.value in (None, "none"):
        return
    names = [each.name for each in habits.DRIFTS]
    if setting.value not in names:
        raise UsageError(
            f"{setting.where} = {setting.value!r}: unknown{closest(str(setting.value), names)}"
        )
    habit = habits.by_name(setting.value)
    needs = {("model", name): value for name, value in habit.model.items()}
    needs |= {("train", name): value for name, value in habit.train.items()}
    needs |= {("run", name): value for name, value in habit.run.items()}
    needs[("train", "dtype")] = habit.dtype
    for key, value in needs.items():
        if key not in given:
            settings[key] = Setting(value, f"drift {habit.name}, {key[1]}")
    if ("run", "framework") not in given:
        settings["run", "framework"] = Setting(
            list(habit.frameworks), f"drift {habit.name}, frameworks"
        )


def _adapt_to_tokenizer_file(settings: Settings, given: Settings) -> None:
    """Take the kind of tokenizer and the vocabulary size from a tokenizer.json."""
    setting, kind = settings.get(("run", "tokenizer_file")), given.get(("run", "tokenizer"))
    if setting is None or not isinstance(setting.value, str) or setting.value.lower() == "none":
        return
    if kind is None:
        settings["run", "tokenizer"] = Setting("file", setting.where)
    if ("model", "vocab_size") not in given:
        try:
            size = read_tokenizer(Path(setting.value)).vocab_size
        except TokenizerError as error:
            raise UsageError(f"{setting.where}: {error}") from None
        settings["model", "vocab_size"] = Setting(size, f"{setting.where}, its vocabulary")


def read_toml(path: Path) -> Settings:
    try:
        content = tomllib.loads(read_text(path, MAX_TOML_BYTES))
    except OSError as error:
        raise UsageError(
            f"--config {path}: {error.strerror}; expected a readable TOML file"
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # tomllib lets those of numbers and of nesting through
        raise UsageError(f"{path}: not TOML: {error}") from None
    settings: Settings = {}
    top = {
        PLURALS.get(name, name): ("run", name)
        for name in RunConfig.model_fields
        if name not in ("model", "train")
    }
    top |= {name: ("run", name) for name in PLURALS}
    top |= {name: ("bench", name) for name in BenchOptions.model_fields}
    for name, value in content.items():
        if name in ("model", "train"):
            if not isinstance(value, dict):
                raise UsageError(f"{path}: {name} = {value!r}; expected a table [{name}]")
            for inner, inner_value in value.items():
                if inner not in SECTIONS[name].model_fields:
                    close = closest(inner, SECTIONS[name].model_fields)
                    raise UsageError(f"{path}: [{name}] {inner}: unknown{close}")
                settings[name, inner] = Setting(inner_value, f"{path}: [{name}] {inner}")
        elif name in top:
            settings[top[name]] = Setting(value, f"{path}: {name}")
        else:
            tables = [table for table in ("model", "train") if name in SECTIONS[table].model_fields]
            hint = (
                f"; expected under [{tables[0]}]"
                if tables
                else closest(name, [*top, "model", "train"])
            )
            raise UsageError(f"{path}: {name}: unknown at the top level{hint}")
    return settings


def listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return list(dict.fromkeys(word.strip() for word in value.split(",")))
    return list(value) if isinstance(value, list | tuple) else [value]


def make_run(settings: Settings) -> RunConfig:
    """One run. A schedule in a file is read here, for all processes. Raises UsageError."""
    name = settings["run", "schedule"].value
    keep_schedule(str(name))
    if ("run", "chunks") not in settings:
        settings["run", "chunks"] = Setting(default_chunks(str(name)), f"schedule {name}, chunks")
    model = TransformerSpec(**validated("model", settings))
    train = TrainSpec(**validated("train", settings))
    config = RunConfig(**validated("run", settings, model=model, train=train))
    if impossible := why_impossible(config):
        wheres = [
            setting.where for (_, name), setting in settings.items() if name == impossible.field
        ]
        raise UsageError(f"{(wheres or [impossible.field])[0]}{impossible.text}")
    return config


def validated(section: str, settings: Settings, **fixed: Any) -> dict[str, Any]:
    """Validate a section's values. Raises UsageError with the first wrong one and its origin."""
    model = SECTIONS[section]
    values = {
        name: _from_text(model, name, setting.value)
        for (s, name), setting in settings.items()
        if s == section
    }
    for name, value in values.items():
        field = model.model_fields[name]
        if isinstance(value, bool) and bool not in _alternatives(
            field.annotation
        ):  # pydantic would take it for 1
            what = _wrong(field, {"type": "bool", "msg": "expected text", "input": value})
            raise UsageError(f"{settings[section, name].where} = {str(value).lower()}: {what}")
    try:
        return dict(model.model_validate(values | fixed))
    except ValidationError as error:
        item = error.errors()[0]
        if not item["loc"]:  # a rule between fields; its message names them
            raise UsageError(item["msg"].removeprefix("Value error, ")) from None
        name = str(item["loc"][0])
        where = settings[section, name].where
        what = _wrong(model.model_fields[name], item)
        raise UsageError(f"{where} = {_shown(values[name])}: {what}") from None


def _from_text(model: type[BaseModel], name: str, value: Any) -> Any:
    alternatives = _alternatives(model.model_fields[name].annotation)
    if isinstance(value, str) and value.lower() == "none" and type(None) in alternatives:
        return None
    if isinstance(value, str) and name == "no_decay":
        return tuple(word.strip() for word in value.split(",") if word.strip())
    if isinstance(value, str) and name == "corpus":
        return (value,)
    return value


def _wrong(field: FieldInfo, item: Any) -> str:
    """Return what is wrong with a field's value, and what is expected."""
    kind = str(item["type"])
    if kind == "string_pattern_mismatch":  # only `recompute` has a pattern
        return f"unknown; expected {recompute.WORDS.replace('|', ', ')} with N at least 1"
    if kind == "literal_error":
        words = [word for part in _alternatives(field.annotation) for word in _words(part)]
        return f"unknown{closest(str(item['input']), words)}"
    if kind == "value_error":
        return str(item["msg"]).removeprefix("Value error, ").partition("; ")[2] or str(item["msg"])
    numbers = {int: "a whole number", float: "a number"}
    number = next(
        (numbers[part] for part in _alternatives(field.annotation) if part in numbers), None
    )
    if number is None:
        return str(item["msg"])
    signs = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = [
        f"{word} {getattr(limit, sign)}"
        for limit in field.metadata
        for sign, word in signs.items()
        if hasattr(limit, sign)
    ]
    optional = " or none" if type(None) in _alternatives(field.annotation) else ""
    return f"expected {', '.join([number, ' and '.join(bounds)]) if bounds else number}{optional}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_corpora(points: Sequence[RunConfig]) -> None:
    """Read every corpus once, so that a wrong path or a short text is found before any run."""
    distinct = {
        (c.corpus, c.tokenizer, c.tokenizer_file, c.model.vocab_size, c.model.context_length): c
        for c in points
    }
    for config in distinct.values():
        try:
            load_corpus(config)
        except CorpusError as error:
            raise UsageError(f"--corpus: {error}") from None
        except TokenizerError as error:
            raise UsageError(str(error)) from None
