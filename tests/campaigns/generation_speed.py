"""`python -m tests.campaigns.generation_speed`: tokens per second of `triptych generate` beside the
transformers library's `generate` with its cache, on the same weights, prompts and threads.

A GPT-2 with random weights (`--layers 12 --width 768` is GPT-2 small); every program generates in
turn, `--repeats` times, so that whatever else the machine does hits all of them. Rates leave out
the prompt and the first token behind it, where frameworks trace; the table has their medians, and
the median of the ratios within a repeat. What each program found has to be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from common.spec.run import FRAMEWORKS

ROOT = Path(__file__).resolve().parents[2]
PROMPT = tuple(range(100, 132))
LIBRARY = "transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--out", metavar="FILE.json", help="every single measurement")
    for name, default in (
        ("layers", 12),
        ("width", 768),
        ("vocabulary", 50257),
        ("tokens", 64),
        ("threads", 2),
        ("repeats", 5),
        ("samples", 1),
        ("beams", 0),
    ):
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default)
    parser.add_argument("--stages", metavar="N,..", default="1", help="of ours")
    parser.add_argument("--frameworks", metavar="NAME,..", default=",".join(FRAMEWORKS))
    arguments = parser.parse_args()
    if arguments.make:
        make(Path(arguments.make), arguments)
    elif arguments.library:
        print(json.dumps(by_library(arguments.library, arguments)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Print the table."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    sizes = [
        f"--{name}={getattr(arguments, name)}"
        for name in ("layers", "width", "vocabulary", "tokens", "threads", "samples", "beams")
    ]
    with tempfile.TemporaryDirectory() as temporary:
        model, ours = Path(temporary) / "gpt2", Path(temporary) / "ours"
        own = [sys.executable, "-m", "tests.campaigns.generation_speed", *sizes]
        run([*own, "--make", str(model)])
        triptych = [sys.executable, "-m", "common.cli"]
        run([*triptych, "import", str(model), "--from", "gpt2", "--out", str(ours)])
        wish = ["--prompt-tokens", ",".join(map(str, PROMPT)), "--tokens", str(arguments.tokens)]
        wish += ["--json", "--samples", str(arguments.samples), "--threads", str(arguments.threads)]
        wish += ["--num-beams", str(arguments.beams)] if arguments.beams else ["--greedy"]
        commands = {LIBRARY: [*own, "--library", str(model)]}
        for framework in arguments.frameworks.split(","):
            for stages in arguments.stages.split(","):
                # On the CPU, as the library's.
                where = ["--checkpoint", str(ours), "--framework", framework, "--device", "cpu"]
                where += ["--stages", stages]
                name = f"{framework}, {stages} stage{'s' * (stages != '1')}"
                commands[name] = [*triptych, "generate", *where, *wish]
        for _ in range(arguments.repeats):
            for name, command in commands.items():
                found[name].append(json.loads(run(command).splitlines()[-1]))
    same = found[LIBRARY][0]["tokens"]
    print("| | tokens/s | ratio to transformers | tokens | closest call |")
    print("| --- | ---: | ---: | --- | ---: |")
    for name, results in found.items():
        rates = [result["tokens_per_second"] for result in results]
        theirs = [result["tokens_per_second"] for result in found[LIBRARY]]
        ratio = statistics.median(a / b for a, b in zip(rates, theirs, strict=True))
        equal = "the same" if all(result["tokens"] == same for result in results) else "others"
        call = results[0].get("closest_call")
        print(
            f"| {name} | {statistics.median(rates):.1f} | {ratio:.2f} | {equal} | "
            f"{'' if call is None else f'{call:.1e}'} |"
        )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run(command: list[str]) -> str:
    """Return what the command prints."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def make(folder: Path, arguments: argparse.Namespace) -> None:
    """Save a GPT-2 of the library with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=arguments.vocabulary,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.width // 64,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # so that the next token depends on all that was before it
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def by_library(folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate by the library; tokens per second by the same rule as ours."""
    import torch
    from transformers import GPT2LMHeadModel, LogitsProcessorList

    torch.set_num_threads(arguments.threads)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    times: list[float] = []

    def note(tokens: Any, scores: Any) -> Any:
        times.append(time.perf_counter())
        return scores

    # The samples of a greedy search are equal, but each costs what it costs.
    text = torch.tensor([PROMPT] * (1 if arguments.beams else arguments.samples))
    options = {"num_beams": arguments.beams, "num_return_sequences": arguments.samples}
    with torch.no_grad():
        found = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=arguments.tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([note]),
            **(options if arguments.beams else {}),
        )
    rows = arguments.beams or arguments.samples
    rate = rows * (len(times) - 2) / (times[-1] - times[1])
    return {"tokens": found[:, len(PROMPT) :].tolist(), "tokens_per_second": rate}


if __name__ == "__main__":
    main()
