"""What every named schedule is, in a few lines and formulas: `triptych explain`, docs/schedules.md.

A formula is text in Python's syntax, so that one string is shown, put numbers into, and computed:

    p, m, v     stages, micro-batches, chunks per device
    F, B, W     what these take for one micro-batch on a whole stage; T = F + B + W

It is for equal stages that compute nothing again and messages that take no time. Where it is said
to hold it gives what the simulator gives: a test compares them over many sizes and costs.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from common.schedule.simulate import Simulation

Values = dict[str, float]
_SYMBOL = re.compile(r"\b[pmvFBWT]\b")

MEASURES: dict[str, Callable[[Simulation], float]] = {
    "bubble time": lambda simulation: simulation.makespan - float(simulation.busy.max()),
    "with a warm start": lambda simulation: simulation.warm_makespan - float(simulation.busy.max()),
    "peak activations": lambda simulation: max(simulation.peak_memory_per_stage),
}
"""What formulas are of, and what the simulator says of it. Bubble time: idle time of the busiest
device in a step; peak activations: those of the fullest, in micro-batches on a whole stage."""


@dataclass(frozen=True)
class Formula:
    """One of the `MEASURES` as a function of sizes and costs, and where it holds."""

    measure: str
    text: str
    condition: str = "True"

    def value(self, values: Values) -> float:
        return float(_evaluate(self.text, values))

    def holds(self, values: Values) -> bool:
        return bool(_evaluate(self.condition, values))

    @property
    def symbols(self) -> set[str]:
        return set(_SYMBOL.findall(f"{self.text} {self.condition}"))

    @property
    def shown(self) -> str:
        return _as_mathematics(self.text)

    @property
    def condition_shown(self) -> str:
        return "" if self.condition == "True" else _as_mathematics(self.condition)

    def put_in(self, values: Values) -> str:
        """Return the formula with numbers in the place of the symbols."""
        numbers = _SYMBOL.sub(lambda match: f"{values[match[0]]:g}", self.text)
        return numbers.replace("*", "×")


def _evaluate(text: str, values: Values) -> float | bool:
    # The texts are those of this file.
    # No builtins but two: an expression of numbers and symbols is all that it can be.
    result: float | bool = eval(text, {"__builtins__": {}, "min": min, "max": max}, dict(values))
    return result


def _as_mathematics(text: str) -> str:
    text = text.replace("m % p == 0", "p divides m").replace(" == ", " = ")
    return text.replace(" * ", " ").replace("*", "")


@dataclass(frozen=True)
class Explanation:
    """A schedule in words and formulas."""

    source: str
    """Whose idea it is: paper and section."""
    text: str
    formulas: tuple[Formula, ...] = ()


EXPLANATIONS: dict[str, Explanation] = {
    "naive": Explanation(
        "model parallelism as it is without a pipeline; Huang et al. 2019, figure 2b",
        "One micro-batch at a time: forward down the devices, backward up again, and only then the "
        "next. At any time one device works and the others are idle. Use it to see what pipelining "
        "is for, or when memory has room for only one micro-batch.",
        (Formula("bubble time", "(p-1) * m*T"), Formula("peak activations", "1")),
    ),
    "gpipe": Explanation(
        "Huang et al. 2019, section 2 and figure 2c",
        "All forwards, then all backwards. The first micro-batch reaches the last device after "
        "(p-1)F, and the last gradient needs (p-1)(B+W) to return to the first. All micro-batches "
        "are in flight at the turn. Use it when m is small, or with recomputation, which shrinks "
        "what is held.",
        (Formula("bubble time", "(p-1) * T"), Formula("peak activations", "m")),
    ),
    "1f1b": Explanation(
        "Narayanan et al. 2019, section 3.2; with a flush, Narayanan et al. 2021, section 2.2.1",
        "One forward, one backward. Device i warms up with p-1-i forwards; from then on every "
        "forward is followed by a backward. The first micro-batch comes down and the last one goes "
        "up as in gpipe, so the bubble is the same. But a device never has more forwards waiting "
        "than its warm-up plus one: min(p-i, m) are in flight. Use it by default.",
        (Formula("bubble time", "(p-1) * T"), Formula("peak activations", "min(p, m)")),
    ),
    "interleaved": Explanation(
        "Narayanan et al. 2021, section 2.2.2 and figure 4",
        "1f1b with v chunks per device: virtual stage k lies on device k mod p, and micro-batches "
        "go through the chunks in groups of p. Filling and draining take p-1 steps of a chunk, T/v "
        "each. The warm-up on device i is 2(p-i-1) + (v-1)p chunk forwards, and every micro-batch "
        "makes vp-1 hops instead of p-1. Use it when hops are cheap and m is not much larger than "
        "p.",
        (
            Formula("bubble time", "(p-1) * T/v", "m >= p"),
            Formula("peak activations", "min(m, ((v+1)*p-1) / v)", "m % p == 0"),
        ),
    ),
    "interleaved-overlap": Explanation(
        "Megatron-LM, `overlap_moe_expert_parallel_comm`",
        "interleaved, with every forward of the steady state at the same time as the backward "
        "after it: while one waits for the experts on other devices, the other computes. One more "
        "forward in the warm-up makes the two independent of one another. The gain is what a pair "
        "takes less than both (`--overlap`). Use it where a chunk waits for communication inside.",
        (
            Formula("bubble time", "(p-1) * T/v", "m >= p"),
            Formula("peak activations", "min(m, (v+1)*p / v)", "m % p == 0"),
        ),
    ),
    "interleaved-zb": Explanation(
        "PyTorch, `ScheduleInterleavedZeroBubble`; the idea is that of Qi et al. 2024, section 2.1",
        "interleaved and zb-h1 in one: v chunks per device in a loop, and Ws put off. Device d "
        "warms up with p-1-d forwards less than interleaved, so that no more than p activations "
        "are in flight where p divides m. Filling and draining take steps of a chunk: zb-h1's "
        "bubble divided by v, in 1f1b's memory. Use it when hops are cheap.",
        (
            Formula("bubble time", "(p-1) * max(F, B, F+B-W) / v", "m >= p"),
            Formula("peak activations", "min(p, m)", "m % p == 0"),
        ),
    ),
    "zb-h1": Explanation(
        "Qi et al. 2024, section 2.1 and figure 3",
        "1f1b with the backward split. A gradient on its way up waits only for B. Device i starts "
        "its Ws i micro-batches late and fills the drain with them, and device 0 has W for the gap "
        "while a gradient comes up: a third of 1f1b's bubble when F = B = W, in 1f1b's memory. Use "
        "it instead of 1f1b whenever the framework can split the backward.",
        (
            Formula("bubble time", "(p-1) * max(F, B, F+B-W)", "m >= p"),
            Formula("peak activations", "min(p, m)"),
        ),
    ),
    "zb-h2": Explanation(
        "Qi et al. 2024, section 2.2 and figure 3",
        "zb-h1 with twice the warm-up: 2(p-i-1) forwards fill the wait for the first gradient, and "
        "Ws follow 2i micro-batches late. Each hop costs F on the way down and B on the way up, "
        "and 2W fill it. The chart is a parallelogram: the plain makespan still has the (p-1)F of "
        "the first fill. Use it when memory is plentiful and the optimizer does not wait for all "
        "stages.",
        (
            Formula("bubble time", "(p-1) * max(F, B-F, F+B-2*W)", "m >= 2*p-1"),
            Formula("with a warm start", "(p-1) * max(0, B-F, F+B-2*W)", "m >= 2*p-1"),
            Formula("peak activations", "min(2*p-1, m)"),
        ),
    ),
    "zb-v": Explanation(
        "Qi et al. 2024, section 6",
        "Two chunks per device, placed in a V: down the devices and up again. Device 0 holds the "
        "first and the last part of the model, and the turn on the last device is no hop. The "
        "first forward is back at device 0 after 2p chunk forwards, and its backward starts there "
        "at once; from then on each device does six actions per micro-batch without waiting. Use "
        "it for zb-h2's bubble in 1f1b's memory, if F, B and W are alike.",
        (
            Formula("bubble time", "(p-1) * F/2", "m >= 2*p-1 and F == B == W"),
            Formula("with a warm start", "0", "m >= 2*p and F == B == W"),
            Formula("peak activations", "min(p, m)"),
        ),
    ),
    "v-half": Explanation(
        "Qi et al. 2024, Pipeline Parallelism with Controllable Memory, section 3",
        "zb-v's V with another rhythm: a micro-batch's four actions lie at fixed offsets on every "
        "device, and the next micro-batch follows six slots later. The offsets alone say how long "
        "an activation is held: about half as long as in 1f1b. Ws fill the slots between. Use it "
        "when 1f1b's memory is too much: half of it, at about half of its bubble.",
        (
            Formula(
                "bubble time", "(3*p-7 + 3*(p % 2)) * F/2", "p > 2 and m >= 2*p and F == B == W"
            ),
            Formula("peak activations", "min(m, (p+2) // 2)"),
        ),
    ),
    "v-min": Explanation(
        "Qi et al. 2024, Pipeline Parallelism with Controllable Memory, section 3",
        "v-half with the smallest offsets there are: an activation is held for about a third of "
        "the time that 1f1b holds it. There is no slack for unequal costs: where F, B and W "
        "differ, every micro-batch is late by the difference. Use it when memory decides and the "
        "three are alike; else v-half.",
        (
            Formula(
                "bubble time", "(4*p-5) * F/2", "p > 1 and p % 3 > 0 and m >= p and F == B == W"
            ),
            Formula("peak activations", "min(m, (p+4) // 3)", "p != 2"),
        ),
    ),
    "dualpipev": Explanation(
        "DeepSeek-AI 2024, DeepSeek-V3 Technical Report, section 3.2.1, as DeepSeek's DualPipeV",
        "zb-v's V, and in the steady state a forward of one chunk at the same time as a backward "
        "of the other: while one waits for communication, the other computes. The gain is what a "
        "pair takes less than both (`--overlap`). It needs 2p micro-batches. Use it where a chunk "
        "waits for communication inside, as with experts on many devices.",
        (
            Formula("bubble time", "(p-1) * F", "m >= 2*p and F == B == W"),
            Formula("peak activations", "p + 1/2", "m >= 2*p"),
        ),
    ),
    "search": Explanation(
        "our own; the question is that of Qi et al. 2024, section 3",
        "An order for your costs: the search looks for one with little bubble that keeps within a "
        "limit of memory. Its result is a table as any other, so `triptych simulate search "
        "--output found.txt` keeps it, and `--schedule file:found.txt` runs it.",
    ),
}


def explain(name: str, simulation: Simulation) -> str:
    """Return what the schedule is and its formulas, with the simulation's numbers put in."""
    explanation, values = EXPLANATIONS[name], _values(simulation)
    sizes = ", ".join(f"{symbol} = {value:g}" for symbol, value in values.items())
    lines = [f"{name}: {explanation.source}", *textwrap.wrap(explanation.text, 100), "", sizes]
    formulas = {formula.measure: formula for formula in explanation.formulas}
    # A schedule may have no formula for it: the simulation has a number all the same.
    for measure, simulated in MEASURES.items():
        found = f"simulated {_amount(measure, simulated(simulation), simulation)}"
        if formula := formulas.get(measure):
            found = f"{_with_numbers(formula, values, simulation)}; {found}"
        lines.append(f"{measure:20}{found}")
    return "\n".join(lines)


def _values(simulation: Simulation) -> Values:
    """The symbols of the formulas; without the costs where stages differ."""
    schedule, costs = simulation.schedule, simulation.costs
    values: Values = {"p": schedule.num_devices, "m": schedule.num_micro_batches}
    values["v"] = schedule.num_chunks
    times = {"F": costs.forward, "B": costs.backward_input, "W": costs.backward_weight}
    if all(len(set(each)) == 1 for each in times.values()):
        values |= {symbol: each[0] for symbol, each in times.items()}
        values["T"] = values["F"] + values["B"] + values["W"]
    return values


def _with_numbers(formula: Formula, values: Values, simulation: Simulation) -> str:
    if not formula.symbols <= values.keys():
        return f"{formula.shown} holds for equal stages only"
    if not formula.holds(values):
        return f"{formula.shown} holds for {formula.condition_shown} only"
    number = formula.value(values)
    # It holds without any further options: no communication, no recomputation, ...
    if not math.isclose(number, MEASURES[formula.measure](simulation), rel_tol=1e-6, abs_tol=1e-9):
        return f"{formula.shown} does not hold with these options"
    amount = _amount(formula.measure, number, simulation)
    return " = ".join(dict.fromkeys((formula.shown, formula.put_in(values), amount)))


def _amount(measure: str, number: float, simulation: Simulation) -> str:
    """A time as a share of the makespan too."""
    if measure == "peak activations":
        return f"{number:g}"
    whole = number + float(simulation.busy.max())
    return f"{number:g} ({number / whole if whole else 0:.2%})"
