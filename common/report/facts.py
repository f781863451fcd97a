"""What a report says in words: the verdict, what was run, and on what."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.report.collect import Collection
from common.report.names import dropout_words, framework_name
from common.report.result import RunResult
from common.spec.run import RunConfig

TIMING_LEGEND = (
    "Simulated: every action takes what it took on its stage in this run (the mean of a step, of "
    "that the median over steps), every message one hop, and nothing lies between two actions; "
    "replayed: the same, but every action takes what it took in that very step. Parts of a stage's "
    "step are means over the timed steps and add up. Communication wait: the sender had ended and "
    "the message was not there; schedule wait: the sender had not ended; host: between two "
    "actions; rest: outside of the pipeline, mostly the optimizer."
)


@dataclass(frozen=True)
class Verdict:
    """The answer to: did they all train the same?"""

    good: bool
    text: str


def parity_verdict(collection: Collection) -> Verdict:
    """Return the verdict over all runs that ended, and name those that were not compared."""
    parities = [result.parity for result in collection.results if result.status == "ok"]
    said = Counter(parity.status for parity in parities)
    passed, failed = said["pass"], said["FAIL"]
    ended = Counter(result.status for result in collection.results)
    words = [f"Parity: {passed} of {len(parities)} runs train what the float64 oracle trains"]
    # An error over its limit: 0.2 is a fifth of what is allowed.
    if margins := [
        (m, check)
        for parity in parities
        for check, m in parity.margins.items()
        if parity.status == "pass"
    ]:
        worst, check = max(margins)
        words.append(f"the largest error is {worst:.1%} of its limit ({check.replace('_', ' ')})")
    if failed:
        words.append(f"{failed} differ{'s' if failed == 1 else ''}")
    if incomparable := said["not comparable"]:
        words.append(f"{incomparable} not comparable")
    if unchecked := said["not checked"]:
        reasons = dict.fromkeys(
            p.reason for p in parities if p.status == "not checked" and p.reason
        )
        words.append(f"{unchecked} not checked" + (f" ({', '.join(reasons)})" if reasons else ""))
    words += [f"{ended[how]} {how}" for how in ("failed", "skipped") if ended[how]]
    return Verdict(failed + ended["failed"] == 0 and passed > 0, "; ".join(words) + ".")


def timing_note(collection: Collection) -> str:
    """Say how close the simulator comes, and why no closer."""
    timings = [
        group.timing for row, group in collection.pairs if group.timing and not row.shares_gpu
    ]
    if not timings:
        return ""
    differences = [abs(timing.step_difference) for timing in timings]
    near = sum(difference <= 0.05 for difference in differences)
    # Measured over replayed: what lies between actions. Replayed over simulated: that an action
    # does not always take its cost.
    overhead = [t.measured_pipeline_seconds / t.replayed_pipeline_seconds - 1 for t in timings]
    spread = [t.replayed_pipeline_seconds / t.simulated_pipeline_seconds - 1 for t in timings]
    return (
        f"The simulated step is within 5 % of the measured median in {near} of {len(timings)} rows "
        f"(median difference {statistics.median(differences):.1%}, largest "
        f"{max(differences):.1%}). Of the pipeline's time, the host between actions and messages "
        f"slower than a hop explain {min(overhead):+.1%} to {max(overhead):+.1%} (measured over "
        f"replayed), actions that do not all take the same {min(spread):+.1%} to "
        f"{max(spread):+.1%} (replayed over simulated)."
    )


def facts(collection: Collection) -> list[tuple[str, str]]:
    """Return what was run and on what, by name; merged benchmarks list their differences."""
    results = collection.results
    first = results[0]
    model, train = first.config.model, first.config.train
    digests = sorted({result.corpus_digest[:16] for result in results if result.corpus_digest})
    repeats = sorted({len(group.runs) for group in collection.groups})
    return [
        ("Command", _distinct(f"`{result.command}`" for result in results)),
        (
            "Model",
            f"{model.num_layers} blocks, d_model {model.d_model}, {model.num_heads} heads, d_ff "
            f"{model.d_ff}, context {model.context_length}, vocabulary {model.vocab_size}"
            f"{'' if model.causal else '; an encoder, trained on masked tokens'}",
        ),
        (
            "Training",
            f"{train.steps} steps of {train.batch_size} sequences, {train.optimizer}, learning "
            f"rate {train.learning_rate:.3g} ({train.learning_rate_schedule}, warm-up "
            f"{train.warmup_steps}), seed {train.seed}, "
            f"{_distinct(r.config.train.dtype for r in results)}; dropout "
            f"{_distinct(dropout_words(r.config) for r in results)}; recomputation "
            f"{_distinct(r.config.recompute for r in results)}; "
            f"{_distinct(_lengths(r.config) for r in results)}",
        ),
        (
            "Statistics",
            f"runs per row: {' or '.join(map(str, repeats))}, each in a fresh process, rows taking "
            "turns; first steps that are not counted: "
            f"{_distinct(str(r.untimed_steps) for r in results)}",
        ),
        ("Kernels", _kernels(results)),
        *_gpus(results),
        *_pythons(results),
        ("Machine", _distinct(result.machine.one_line for result in results)),
        ("Corpus", f"SHA-256 {', '.join(digests)}" if digests else "not read"),
        ("Commit", _distinct(result.git_commit or "unknown" for result in results)),
        ("Started", _distinct(result.started for result in results)),
    ]


def _kernels(results: Sequence[RunResult]) -> str:
    """The libraries and instructions that ran, as every framework said itself."""
    said = [
        (framework_name(result.config), result.environment.get("kernels")) for result in results
    ]
    return (
        _distinct(f"{framework} {kernels}" for framework, kernels in said if kernels) or "not known"
    )


def _pythons(results: Sequence[RunResult]) -> list[tuple[str, str]]:
    """The interpreters of runs that another one than the benchmark's own ran."""
    lines = [
        " ".join(
            [
                f"{framework_name(result.config)} {result.version}: Python {python}",
                *filter(None, [result.config.python]),
            ]
        )
        for result in results
        if (python := result.environment.get("python"))
        and (result.config.python is not None or python != result.machine.python)
    ]
    return [("Interpreters", _distinct(lines))] if lines else []


def _gpus(results: Sequence[RunResult]) -> list[tuple[str, str]]:
    """Cards, driver and libraries of the runs that used any, and who could not."""
    keys = {
        "driver": "driver",
        "cuda": "CUDA",
        "nccl": "NCCL",
        "cublas_workspace": "cuBLAS workspace",
        "cuda_graphs": "CUDA graphs",
        "without_gpu_kernel": "no GPU kernel for",
    }
    said = [
        result.environment
        for result in results
        if "cuda" in str(result.environment.get("device_kind"))
    ]
    lines = [
        ", ".join(
            [
                str(one.get("device_name")),
                *(f"{name} {one[key]}" for key, name in keys.items() if one.get(key)),
            ]
        )
        for one in said
    ] + fallbacks(results)
    return [("GPUs", _distinct(lines))] if lines else []


def fallbacks(results: Sequence[RunResult]) -> list[str]:
    """Return why a framework took the CPU, unasked, where there is a GPU: a line each."""
    said = [result.environment.get("fell_back") for result in results]
    return list(dict.fromkeys(f"on the CPU: {why}" for why in said if why))


def _lengths(config: RunConfig) -> str:
    full = "every token counts" if config.model.causal else "the masked tokens count, 15 %"
    if config.sequence_lengths == "random":
        full = "sequences end anywhere, tokens after the end are computed and not counted"
    epoch = config.sequences_per_epoch
    return full if epoch is None else f"{full}, {epoch} sequences per epoch"


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))
