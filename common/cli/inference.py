"""The subcommands evaluate and generate: a checkpoint, through any framework's pipeline."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from rich.console import Console

from common import checkpoint
from common.cli.numbers import add_timeout, at_least, natural, number_that, positive
from common.cli.options import add_run_options, flag, read_run
from common.cli.saved import Saved, load_text
from common.harness.launch import (
    IMPLEMENTATIONS,
    Implementation,
    Interrupted,
    require,
    run_jobs_in_worker,
    stop_on_signals,
)
from common.io.console import make_console, say
from common.io.edges import from_command_line, whole_number
from common.io.usage import UsageError
from common.report.names import framework_name
from common.runtime.inference import Evaluated, Generated
from common.runtime.job import Generation, Job
from common.runtime.text import write_text
from common.spec.data import Corpus
from common.spec.rules import why_impossible
from common.spec.run import RunConfig
from common.spec.tokenizer import BYTES

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
DEFAULT_TOKENS = 64
# Beyond the least temperature and the largest penalty, logits and scores are no numbers any more.
TEMPERATURE = number_that(
    lambda value: value >= 1e-100,
    "a number, more than 0, at least 1e-100 (for the likeliest: --greedy)",
)
TOP_P = number_that(lambda value: 0 < value <= 1, "a number, more than 0, at most 1")
PENALTY = number_that(lambda value: abs(value) <= 10, "a number from -10 to 10")
EARLY = ("no", "yes", "never")
CHOICES = ("temperature", "top_k", "top_p", "seed")
"""Options of random choices."""

Found = TypeVar("Found", bound=BaseModel)


def register(
    subcommands: Any, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> None:
    """Add the subcommands to argparse's subparsers."""
    evaluate = subcommands.add_parser(
        "evaluate",
        description="Loss per token and perplexity of a checkpoint over the held-out text, by a "
        "pipeline of forwards: the last tenth of its own text, or of another one that --corpus "
        "names. Of an encoder: per masked token, always the same ones.",
        usage="%(prog)s --checkpoint PATH [options]",
    )
    batches = "mini-batches of the held-out text (default: all of it)"
    evaluate.add_argument("--batches", metavar="N", type=positive, help=batches)
    generate = subcommands.add_parser(
        "generate",
        description="Continues a prompt, with a cache of keys and values on every stage. The three "
        "frameworks give the same tokens, greedy, sampled or by beam search; what decides is a "
        "number that depends on seed, sample and position only, and how close the closest decision "
        "was is said.",
        usage="%(prog)s --checkpoint PATH --prompt TEXT [options]",
    )
    text = generate.add_argument_group("the text")
    text.add_argument("--prompt", metavar="TEXT", help="what to continue")
    text.add_argument(
        "--prompt-tokens", metavar="N,N,..", help="the same as tokens; then tokens are printed"
    )
    for option, metavar, kind, default, what in (
        ("--tokens", "N", positive, DEFAULT_TOKENS, f"new tokens (default: {DEFAULT_TOKENS})"),
        ("--samples", "N", positive, 1, "continuations (default: 1); of beam search the best N"),
        ("--eos", "TOKEN", natural, None, "the number of the token that ends a text"),
        ("--temperature", "T", TEMPERATURE, None, "divides the logits (default: 1)"),
        ("--top-k", "K", positive, None, "only the K likeliest tokens (default: all)"),
        ("--top-p", "P", TOP_P, None, "of these the fewest whose probabilities reach P"),
        ("--seed", "N", natural, None, "of the choices (default: 0)"),
        ("--num-beams", "N", partial(at_least, 2), None, "beam search with N beams"),
        ("--length-penalty", "X", PENALTY, None, "score = sum of log-probabilities / tokens^X"),
    ):
        text.add_argument(option, metavar=metavar, type=kind, default=default, help=what)
    text.add_argument("--greedy", action="store_true", help="always the likeliest token")
    text.add_argument(
        "--early-stopping",
        metavar="|".join(EARLY),
        type=_early,
        nargs="?",
        const="yes",
        help="when beam search stops with N finished beams: no, when the best that goes on scores "
        "less (default); yes, at once; never, when none can score more any more",
    )
    for parser, run in ((evaluate, _evaluate), (generate, _generate)):
        parser.add_argument(
            "--checkpoint", metavar="PATH", required=True, help="a folder such as step-00000100"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")
        add_timeout(parser)
        add_run_options(parser, only_placement=True, also=("corpus", "tokenizer", "tokenizer_file"))
        parser.set_defaults(run=partial(run, implementations=implementations))


def _early(text: str) -> str:
    if text not in EARLY:
        raise argparse.ArgumentTypeError(f"{text!r}; expected one of {', '.join(EARLY)}")
    return text


def _evaluate(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    folder = Path(arguments.checkpoint)
    saved = Saved(folder, checkpoint.verify(folder))
    config = read_run(arguments, saved)
    corpus = load_text(config, saved, may_be_another=hasattr(arguments, "run.corpus"))
    resume, console = str(folder.resolve()), make_console()
    job = Job(config=config, out="", kind="evaluate", resume=resume, batches=arguments.batches)
    found = _run(
        job, Evaluated, "evaluation.json", implementations, arguments.timeout, console, corpus
    )
    if not isinstance(found, Evaluated):
        return found
    if arguments.json:
        facts = {
            "checkpoint": str(folder),
            "framework": config.framework,
            "steps_done": saved.manifest.steps_done,
            "corpus": list(config.corpus),
            "corpus_digest": corpus.digest,
        }
        names = ("loss", "perplexity", "batches", "tokens", "tokens_per_second")
        print(json.dumps(facts | {name: getattr(found, name) for name in names}))
        return EXIT_OK
    if not saved.is_trained_on(corpus.digest):
        what = "the last tenth of another text than it was trained on"
        say(console, f"{what}: {' '.join(config.corpus)}")
    fewer = ", all there are" if found.batches < (arguments.batches or 0) else ""
    masked = "" if config.model.causal else "masked "
    of = f"{found.loss:.6f} per {masked}token"
    say(console, f"held-out loss {of}, perplexity {found.perplexity:.4f}")
    say(
        console,
        f"{found.tokens:,} {masked}tokens in {found.batches} mini-batches{fewer}; "
        f"{_where(config)}; {found.tokens_per_second:,.0f} tokens/s",
    )
    return EXIT_OK


def _generate(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    _check_kind(arguments)
    folder = Path(arguments.checkpoint)
    saved = Saved(folder, checkpoint.verify(folder))
    if not saved.manifest.model.causal:
        what = "an encoder (causal = false), which fills in masked tokens and continues no text"
        raise UsageError(f"--checkpoint {folder}: {what}; expected a causal model's")
    config = _for_samples(read_run(arguments, saved), arguments)
    prompt, decode = _prompt(arguments, saved, config)
    _check_vocabulary(arguments, config.model.vocab_size)
    is_sampled = not (arguments.greedy or arguments.num_beams)
    wish = Generation(
        prompt=prompt,
        tokens=arguments.tokens,
        samples=arguments.samples,
        temperature=(arguments.temperature or 1.0) if is_sampled else None,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed or 0,
        num_beams=arguments.num_beams,
        length_penalty=1.0 if arguments.length_penalty is None else arguments.length_penalty,
        early_stopping=arguments.early_stopping or "no",
        eos=arguments.eos,
    )
    job = Job(config=config, out="", kind="generate", resume=str(folder.resolve()), generation=wish)
    console = make_console()
    found = _run(job, Generated, "generation.json", implementations, arguments.timeout, console)
    if not isinstance(found, Generated):
        return found
    texts = [decode([*prompt, *tokens]) for tokens in found.tokens]
    if arguments.json:
        facts = {"checkpoint": str(folder), "framework": config.framework}
        print(json.dumps({**facts, "prompt": prompt, "texts": texts, **found.model_dump()}))
        return EXIT_OK
    for sample, text in enumerate(texts):
        if len(texts) > 1:
            score = "" if found.scores is None else f", score {found.scores[sample]:.6f}"
            say(console, f"--- sample {sample}{score}")
        print(text)
    kind = "greedy"
    if found.scores is not None:
        kind = f"{wish.num_beams} beams, score {found.scores[0]:.6f}"
    elif wish.temperature is not None:
        kind = f"temperature {wish.temperature:g}, seed {wish.seed}"
    speed = f"{found.tokens_per_second:,.1f} tokens/s"
    say(console, f"\n{kind}; closest call {found.closest_call:.1e}; {_where(config)}; {speed}")
    return EXIT_OK


def _check_kind(arguments: argparse.Namespace) -> None:
    """Raise UsageError for options of two kinds of generation."""
    kinds = [("--num-beams", "num_beams"), ("--greedy", "greedy")]
    without_chance = [option for option, name in kinds if getattr(arguments, name)]
    if len(without_chance) > 1:
        raise UsageError(f"{' and '.join(without_chance)}: expected one of them")
    for option in CHOICES:
        if without_chance and getattr(arguments, option) is not None:
            what = f"{without_chance[0]} makes no random choice; expected one of them"
            raise UsageError(f"{flag(option)}: {what}")
    for option in ("length_penalty", "early_stopping"):
        if not arguments.num_beams and getattr(arguments, option) is not None:
            raise UsageError(f"{flag(option)}: no beam search; expected --num-beams N with it")
    if arguments.num_beams and arguments.samples > arguments.num_beams:
        what = f"beam search has --num-beams {arguments.num_beams}; expected at most as many"
        raise UsageError(f"--samples {arguments.samples}: {what}")


def _check_vocabulary(arguments: argparse.Namespace, vocab_size: int) -> None:
    """Raise UsageError for what this vocabulary does not have."""
    if arguments.eos is not None and arguments.eos >= vocab_size:
        raise UsageError(
            f"--eos {arguments.eos}: the vocabulary has {vocab_size} tokens; expected 0 to "
            f"{vocab_size - 1}"
        )
    # One that ends must leave as many that go on.
    if arguments.num_beams and arguments.num_beams >= vocab_size:
        raise UsageError(
            f"--num-beams {arguments.num_beams}: the vocabulary has {vocab_size} tokens; expected "
            f"at most {vocab_size - 1}"
        )


def _for_samples(config: RunConfig, arguments: argparse.Namespace) -> RunConfig:
    """Use as many micro-batches as stages if there are enough samples and nobody says otherwise."""
    said = hasattr(arguments, "train.micro_batches") or config.schedule.startswith("file:")
    # One search is one group.
    groups = 1 if arguments.num_beams else min(arguments.samples, config.stages)
    m = config.train.micro_batches if said else groups
    train = config.train.model_copy(
        update={"micro_batches": m, "batch_size": max(arguments.samples, m)}
    )
    config = config.model_copy(update={"train": train})
    if impossible := why_impossible(config):
        raise UsageError(f"--samples {arguments.samples}: {impossible}")
    return config


def _prompt(
    arguments: argparse.Namespace, saved: Saved, config: RunConfig
) -> tuple[tuple[int, ...], Callable[[Sequence[int]], str]]:
    """The prompt in tokens, and what makes text of tokens. Raises UsageError and TokenizerError."""
    decode: Callable[[Sequence[int]], str] = _as_numbers
    if (arguments.prompt is None) == (arguments.prompt_tokens is None):
        raise UsageError("--prompt: expected one of --prompt TEXT and --prompt-tokens N,N,..")
    if arguments.prompt_tokens is not None:
        numbers = [whole_number(word) for word in arguments.prompt_tokens.split(",")]
        tokens = [token for token in numbers if token is not None and token >= 0]
        if len(tokens) < len(numbers):
            raise UsageError(
                f"--prompt-tokens {arguments.prompt_tokens}: expected numbers, such as 1,2,3"
            )
    else:
        tokenizer = saved.load_tokenizer(config)
        try:
            text = from_command_line(arguments.prompt, "--prompt")
        except ValueError as error:
            if tokenizer is not BYTES:
                raise UsageError(str(error)) from None
            text = arguments.prompt  # any bytes
        tokens, decode = tokenizer.encode(text), tokenizer.decode
        unknown = tokenizer.unknown(text)
        if unknown:
            print(f"note: --prompt: the tokenizer has no token for {unknown!r}", file=sys.stderr)
    if not tokens:
        raise UsageError("--prompt: empty; expected at least one token")
    if max(tokens) >= config.model.vocab_size:
        raise UsageError(
            f"--prompt: token {max(tokens)}; the vocabulary has {config.model.vocab_size} tokens; "
            f"expected 0 to {config.model.vocab_size - 1}"
        )
    return tuple(tokens), decode


def _as_numbers(tokens: Sequence[int]) -> str:
    return ",".join(map(str, tokens))


def _run(
    job: Job,
    kind: type[Found],
    name: str,
    implementations: Mapping[str, Implementation],
    timeout_seconds: float,
    console: Console,
    corpus: Corpus | None = None,
) -> Found | int:
    """Return the worker process' result, or an exit status after a line that says why none."""
    implementation = implementations[job.config.framework]
    require(implementation, job.config.executor, job.config.python)
    with tempfile.TemporaryDirectory(prefix="triptych-") as temporary, stop_on_signals() as stopped:
        folder = Path(temporary)
        text = None if corpus is None else write_text(corpus, folder)
        here = job.model_copy(update={"out": str(folder), "text": text})
        try:
            (outcome,) = run_jobs_in_worker(
                implementation.module, [here], folder, timeout_seconds, stopped=stopped
            )
        except Interrupted:
            return EXIT_INTERRUPTED
        if outcome.status != "ok":
            say(console, f"failed: {outcome.reason}")
            return EXIT_FAILED
        return kind.model_validate_json((folder / name).read_text(encoding="utf-8"))


def _where(config: RunConfig) -> str:
    m = config.train.micro_batches
    size = f"{config.stages} stages, {config.schedule_name}, {m} micro-batch{'es' * (m > 1)}"
    return f"{framework_name(config)}, {size}"
