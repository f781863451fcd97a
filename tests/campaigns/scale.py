"""The tables of docs/scale.md: a 175 B model over thousands of devices, from formulas alone.

python -m tests.campaigns.scale
"""

from __future__ import annotations

from pathlib import Path

from common.report.grid import Grid
from common.schedule.simulate import Costs, simulate
from common.spec.efficiency import PUBLISHED_TFLOPS, model_flops_per_token
from common.spec.memory import Memory
from common.spec.mesh import Mesh
from common.spec.partition import plan_partition, schedule_of
from common.spec.run import RunConfig
from common.spec.traffic import traffic_bytes
from tests.campaigns.make_schedules import fill

PAGE = Path("docs/scale.md")
PUBLISHED_SECONDS = {"full": 18.13, "selective, with sequence parallelism": 13.75}
"""A step of 64 sequences on 64 A100s: Korthikanti et al. 2022, Table 5, 175 B."""
GPT3 = {
    "vocab_size": 51_200,
    "context_length": 2048,
    "num_layers": 96,
    "d_model": 12_288,
    "num_heads": 96,
    "d_ff": 49_152,
    "tied_head": True,
}
SEQUENCES = 1536
ROWS = (
    *((64, 128, "1f1b", 1), (64, 128, "zb-h1", 1), (64, 128, "zb-h2", 1)),
    *((48, 128, "1f1b", 1), (48, 128, "interleaved", 2), (48, 128, "zb-v", 2)),
    *((32, 256, "interleaved", 3), (32, 32, "interleaved", 3), (32, 32, "zb-v", 2)),
)
"""(p, d, schedule, v)."""


def run(p: int, d: int, schedule: str, v: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": GPT3,
            "train": {
                "batch_size": SEQUENCES,
                "micro_batches": SEQUENCES // d,
                "dtype": "bfloat16",
            },
            "stages": p,
            "replicas": d,
            "schedule": schedule,
            "chunks": v,
            "partition": "balanced",
            "recompute": "full",
            "tokenizer": "bpe",
        }
    )


def row(p: int, d: int, schedule: str, v: int) -> list[str]:
    config = run(p, d, schedule, v)
    parts, table = plan_partition(config).parts, schedule_of(config)
    # A block costs 1; embedding and head a little: their products are those of a fifth of a block.
    blocks = [sum(unit.startswith("block.") for unit in part) for part in parts]
    forward = tuple(max(count, 0.2) for count in blocks)
    # B computes the forward again, and costs twice what F does.
    again = tuple(2 * time for time in forward)
    costs = Costs(forward, again, forward, (0.0,) * len(forward))
    bubble = simulate(table, costs).bubble_fraction
    memory = max(each.total_bytes for each in Memory.of_run(config))
    sent, mesh = traffic_bytes(config), Mesh(p, d)
    gradients = sum(sent.get((0, other), 0) for other in mesh.copies(0))
    activations = sent.get((mesh.rank(0, 0), mesh.rank(1, 0)), 0)
    return [
        f"{p * d:,}",
        str(p),
        str(d),
        f"{schedule} v={v}" if v > 1 else schedule,
        str(config.train.micro_batches),
        f"{max(sum(blocks[k] for k in own) for own in table.parts)}",
        f"{memory / 1e9:.0f}",
        f"{bubble:.0%}",
        f"{gradients / 1e9:.1f} GB",
        f"{activations / 1e9:.2f} GB",
    ]


def published() -> str:
    """The published iteration times of the same shape, as MFU by our count of FLOPs."""
    sequences, gpus = 64, 64
    flops = model_flops_per_token(run(8, 1, "1f1b", 1)) * sequences * GPT3["context_length"]
    peak = PUBLISHED_TFLOPS["A100"]["bfloat16"] * 1e12 * gpus
    rows = [[name, f"{s:.2f}", f"{flops / s / peak:.1%}"] for name, s in PUBLISHED_SECONDS.items()]
    titles = ("recomputation", "seconds a step, measured there", "MFU by our count")
    table = Grid(titles, rows, titles[:1]).markdown().strip()
    return (
        "Korthikanti et al. 2022, Table 5: 175 B on 64 A100s, t = 8, p = 8, v = 3, 64 sequences a "
        f"step.\n\n{table}"
    )


def main() -> None:
    titles = ("devices", "p", "d", "schedule", "m", "blocks on the fullest", "GB", "bubble")
    titles = (*titles, "gradients", "activations")
    table = Grid(titles, [row(*each) for each in ROWS], ("schedule",))
    fill("rows", table.markdown().strip(), PAGE)
    fill("published", published(), PAGE)


if __name__ == "__main__":
    main()
