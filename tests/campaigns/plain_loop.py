"""How near does a PyTorch pipeline come to a plain loop with the same cores? Preset `small` on two
stages with m = 8, and a plain loop, all in one process and step by step in turns: a machine that
gets faster and slower within minutes does so for all. Run it with nothing else running.

    python -m tests.campaigns.plain_loop     128 sequences, 24 steps, 5 min

Whether the same runs pass parity `bench_all.py` says (the command in docs/schedules.md).
"""

from __future__ import annotations

import statistics
import tempfile
import time

from common.report.machine import this_machine
from common.runtime.allocator import keep_freed_memory
from common.runtime.job import Job
from common.runtime.training import starting_weights
from common.spec.data import load_corpus
from common.spec.run import RunConfig, preset

STAGES, MICRO_BATCHES, SEQUENCES = 2, 8, 128
STEPS, UNTIMED_STEPS = 24, 2
SCHEDULES = {"1f1b": 1, "zb-v": 2, "dualpipev": 2}
"""With their v."""


def configs() -> dict[str, RunConfig]:
    """Return the runs by name, the plain loop first."""
    base = preset("small").model_copy(update={"framework": "torch", "device": "cpu"})

    def config(count: int, **run: object) -> RunConfig:
        train = {"batch_size": SEQUENCES, "micro_batches": count, "warmup_steps": 0}
        own = {"train": base.train.model_copy(update=train)} | run
        return RunConfig.model_validate(dict(base) | own)

    found = {"plain loop": config(1, schedule="naive", stages=1, executor="plain")}
    for name, v in SCHEDULES.items():
        run = {"schedule": name, "chunks": v, "stages": STAGES, "partition": "balanced"}
        found[name] = config(MICRO_BATCHES, **run)
    return found


def measure() -> dict[str, list[float]]:
    """Return the seconds of every step by run."""
    from torch_impl import devices

    keep_freed_memory()
    runs = configs()
    devices.configure(1, None, "cpu")  # all cores for this thread; stages have threads of their own
    from torch_impl.engine import build_engine

    corpus = load_corpus(runs["plain loop"])
    engines = {name: build_engine(config) for name, config in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    with tempfile.TemporaryDirectory() as folder:
        for name, engine in engines.items():
            engine.reset(starting_weights(Job(config=runs[name], out=folder)))
    for step in range(STEPS):
        batch = corpus.training_batch(runs["plain loop"], step)
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.forward_backward(batch)
            engine.apply_gradients(step)
            seconds[name].append(time.perf_counter() - start)
    for engine in engines.values():
        engine.close()
    return seconds


def main() -> int:
    found = measure()
    plain = found["plain loop"][UNTIMED_STEPS:]
    for name, every in found.items():
        steps = every[UNTIMED_STEPS:]
        ratios = [one / own for one, own in zip(plain, steps, strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=10)
        print(
            f"{name:12s} {1e3 * statistics.median(steps):6.0f} ms a step, "
            f"{statistics.median(ratios):.3f} of the plain loop (80 % of the steps: "
            f"{low:.3f} to {high:.3f})"
        )
    print(this_machine().one_line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
