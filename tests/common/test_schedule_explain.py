"""`triptych explain`: formulas are what the simulator says, or it says where they do not hold."""

from __future__ import annotations

import itertools
import textwrap

import pytest

from common.cli.main import main
from common.schedule.draw import draw_text
from common.schedule.explain import EXPLANATIONS, MEASURES
from common.schedule.generators import GENERATORS, default_chunks, make_schedule
from common.schedule.simulate import Costs, simulate

SIZES = [(p, m) for p in (1, 2, 3, 4, 6) for m in (1, 2, 5, 6, 8, 12)]
TIMES = [(1, 1, 1), (1, 1.2, 0.7), (2, 1, 1), (1, 1, 2.5), (1, 5, 3)]


def test_every_schedule_is_explained_in_five_lines() -> None:
    assert EXPLANATIONS.keys() == GENERATORS.keys()
    for name, explanation in EXPLANATIONS.items():
        assert explanation.source and 2 <= len(textwrap.wrap(explanation.text, 100)) <= 5, name


@pytest.mark.parametrize("name", [n for n, each in EXPLANATIONS.items() if each.formulas])
def test_formulas_hold_where_they_say(name: str) -> None:
    held = dict.fromkeys(EXPLANATIONS[name].formulas, 0)
    chunks = (1, 2, 3) if GENERATORS[name].chunks is None else (default_chunks(name),)
    for (p, m), (f, b, w), v in itertools.product(SIZES, TIMES, chunks):
        if name == "dualpipev" and m < 2 * p:
            continue
        simulation = simulate(make_schedule(name, p, m, v), Costs.uniform(p, f, b, w), check=False)
        values = {"p": p, "m": m, "v": v, "F": f, "B": b, "W": w, "T": f + b + w}
        for formula in held:
            if formula.holds(values):
                held[formula] += 1
                simulated = MEASURES[formula.measure](simulation)
                assert formula.value(values) == pytest.approx(simulated), (formula, values)
    assert min(held.values()) >= 5


def explained(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    assert main(["explain", *line]) == 0
    return capsys.readouterr().out


def test_numbers_and_chart(capsys: pytest.CaptureFixture[str]) -> None:
    said = explained(capsys, "zb-h1", "--stages", "3", "--micro-batches", "4")
    assert said.startswith(
        "zb-h1: Qi et al. 2024, section 2.1 and figure 3\n1f1b with the backward"
    )
    assert "\np = 3, m = 4, v = 1, F = 1, B = 1, W = 1, T = 3\n" in said
    bubble = "(p-1) max(F, B, F+B-W) = (3-1) × max(1, 1, 1+1-1) = 2 (14.29%); simulated 2 (14.29%)"
    assert f"\nbubble time         {bubble}\n" in said
    assert "\nwith a warm start   simulated 2 (14.29%)\n" in said
    assert "\npeak activations    min(p, m) = min(3, 4) = 3; simulated 3\n" in said
    assert said.endswith("\n\n" + draw_text(make_schedule("zb-h1", 3, 4)) + "\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("zb-h1 --micro-batches 2", "holds for m >= p only; simulated 5 (45.45%)"),
        ("zb-v --forward 2", "holds for m >= 2p-1 and F = B = W only; simulated"),
        ("1f1b --forward 1,2,3,4", "(p-1) T holds for equal stages only; simulated"),
        ("1f1b --communication 0.1", "(p-1) T does not hold with these options; simulated"),
        ("1f1b --communication 0.1", "min(p, m) = min(4, 8) = 4; simulated 4"),
        ("gpipe --recompute full", "peak activations    m does not hold with these options; sim"),
        ("interleaved --warm-up short", "((v+1)p-1) / v) does not hold with these options; simul"),
        ("dualpipev --overlap 1.5", "(p-1) F does not hold with these options; simulated"),
        ("gpipe --micro-batches 5000", "no chart: schedule gpipe has 40000 actions, too many"),
        ("search --effort 0.02", "bubble time         simulated 1.5 (5.88%)"),
    ],
)
def test_where_a_formula_does_not_hold(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in explained(capsys, *line.split())
