"""The zero-bubble schedules (Qi et al. 2024): W, which nobody waits for, fills the bubbles.

A backward is split into B (the input gradient, which the stage above waits for) and W (the weight
gradients, which only the optimizer needs). A device with nothing else to do runs a W that it has
put off. What that costs is memory: an activation is held, in part, until its W.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from common.schedule.action import Action, Op, Schedule
from common.schedule.fill import TARGETS, fill
from common.schedule.interleaved import rows
from common.schedule.shop import Shop
from common.schedule.simulate import Costs


def zb_h1(p: int, m: int) -> Schedule:
    """Keep 1F1B's order and memory, but put W off (Qi et al. 2024, section 2.1 and figure 3).

    Device d begins W only after d further backwards. In flight is what 1F1B has, min(p - d, m), and
    with what up to d delayed Ws hold no device has more than p activations, 1F1B's peak. Bubble
    time (p-1)(F+B-W), a third of 1F1B's when F = B = W.

        device 0 F0 F1 F2 ·  ·  B0 W0 F3 B1 W1 B2 W2 B3 W3
        device 1 ·  F0 F1 ·  B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
        device 2 ·  ·  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
    """
    # Device d is d hops below the first: it has d gradients less to wait for, and puts off d Ws.
    return Schedule("zb-h1", rows(p, [range(m)], 1, lambda d: p - 1 - d, delay=lambda d: d), m)


def zb_h2(p: int, m: int) -> Schedule:
    """Fill the warm-up with twice as many forwards (Qi et al. 2024, section 2.2 and figure 3).

    In flight on device d are up to 2(p - d) - 1, so 2p - 1 on the first; the delayed Ws fill the
    others up to the same. Counted from each device's own first forward the bubble time is
    (p-1)(F+B-2W), none when F = B = W: the devices then start and end one after the other, and the
    next step may follow without a gap.

        device 0 F0 F1 F2 F3 F4 B0 W0 F5 B1 W1 B2 W2 B3 W3 B4 W4 B5 W5
        device 1 ·  F0 F1 F2 B0 F3 B1 F4 B2 W0 F5 B3 W1 B4 W2 B5 W3 W4 W5
        device 2 ·  ·  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 F5 B5 W1 W2 W3 W4 W5
    """
    # Two forwards for each device below: one for the hop down, one for the hop back up.
    found = rows(p, [range(m)], 1, lambda d: 2 * (p - 1 - d), delay=lambda d: 2 * d)
    return Schedule("zb-h2", found, m)


def zb_v(p: int, m: int, costs: Costs | None = None) -> Schedule:
    """Place two chunks per device in a V: down with the first, back up with the second.

    Qi et al. 2024, section 6. Device 0 holds the first and the last part of the model, so that the
    first backward comes back to it early. When F = B = W and no hop costs anything, the bubble
    counted from each device's own first forward is 0 (for m >= 2p), and every device holds 2p
    chunks at most, which is p whole stages: 1F1B's peak.

    For other costs the order of F and B stays, and every W goes where it leaves least idle time
    from each device's own first forward on, with no more memory (`common.schedule.fill`).

        device 0 F0── F1── F2── F0.1 B0.1 W0.1 F1.1 B1.1 W1.1 F3── B0── W0── F2.1 B2.1 W2.1 B1── W1── F3.1 B3.1 ...
        device 1 ·    F0── F0.1 F1── F1.1 B0.1 W0.1 F2── B0── W0── F2.1 B1.1 W1.1 F3── B1── W1── F3.1 B2.1 W2.1 ...
    """  # noqa: E501
    # The pattern needs 2p - 1 micro-batches; fewer leave the others out: no dependency breaks.
    full = max(m, 2 * p - 1)
    rows = (_zb_v_row(p, full, device) for device in range(p))
    schedule = Schedule(
        "zb-v", tuple(tuple(a for a in row if a.micro_batch < m) for row in rows), m, 2, "vee"
    )
    if costs is None or costs.recompute != Costs.recompute:
        return schedule
    shop = Shop(p, m, 2, "vee", costs, [float(p)] * p, "warm")
    # By costs Ws may lie elsewhere; the order of F and B, and so every message, stays.
    order = shop.rows(schedule)
    # A large one gets fewer targets, so that a schedule of a million actions takes seconds.
    filled = fill(shop, order, min(TARGETS, 1_000_000 // shop.num_actions))
    if filled is None or shop.value(order, shop.play(order)) <= shop.value(
        filled, shop.play(filled)
    ):
        return schedule
    return replace(schedule, devices=shop.schedule(filled).devices)


def _zb_v_row(p: int, m: int, device: int) -> list[Action]:
    """Return one device's row for m >= 2p - 1 micro-batches."""
    done: Counter[tuple[Op, int]] = Counter()
    row: list[Action] = []

    def add(*actions: tuple[Op, int]) -> None:
        """Append each (operation, chunk) for its next micro-batch, unless all m have had it."""
        for op, chunk in actions:
            if done[op, chunk] < m:
                row.append(Action(op, done[op, chunk], chunk))
                done[op, chunk] += 1

    down, up = 0, 1
    up_whole = ((Op.F, up), (Op.B, up), (Op.W, up))
    # Fill: forwards until the first one has come back up, then the second chunk's backwards begin.
    for _ in range(2 * (p - device) - 1):
        add((Op.F, down))
    for _ in range(device):
        add((Op.F, up), (Op.F, down))
    for _ in range(p - device):
        add(*up_whole)
    # Steady state: every micro-batch's six actions in turn.
    while done[Op.F, up] < m:
        add((Op.F, down), (Op.B, down), (Op.W, down), *up_whole)
    # Drain: the backwards that others wait for first, W where there would be a bubble.
    for _ in range(device):
        add((Op.B, down), (Op.B, up))
    for _ in range(p - device):
        add((Op.B, down), (Op.W, down))
    add(*[(Op.W, up)] * (m - done[Op.W, up]))
    add(*[(Op.W, down)] * (m - done[Op.W, down]))
    return row
