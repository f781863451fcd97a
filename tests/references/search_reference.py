"""`python -m tests.references.search_reference OUT.json COUNT MODELS FIRST`: what the transformers
library's `generate` finds in so many random searches (`tests.searches`), from number FIRST on, and
what its filters leave.

tests/golden/searches.json: COUNT 32, MODELS 4, FIRST 0.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.checkpoint.foreign.llama import write_llama
from tests.references.llama_reference import in_float64
from tests.searches import (
    Kept,
    Recorded,
    Search,
    random_filter,
    random_search,
    spec,
    weights,
)

EARLY = {"no": False, "yes": True, "never": "never"}


@functools.cache
def llama(model: int) -> Any:
    """Return the library's model with our weights."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "llama"
        write_llama(spec(model), weights(model), folder)
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def searched(search: Search) -> Search:
    """Return the search with what the library finds."""
    wish = search.wish
    text = torch.tensor([wish.prompt])
    options: dict[str, Any] = {"max_new_tokens": wish.tokens, "do_sample": False}
    if wish.eos is not None:
        options |= {"eos_token_id": wish.eos, "pad_token_id": wish.eos}
    if wish.num_beams:
        options |= {
            "num_beams": wish.num_beams,
            "num_return_sequences": wish.samples,
            "length_penalty": wish.length_penalty,
            "early_stopping": EARLY[wish.early_stopping],
        }
    model = llama(search.model)
    with torch.no_grad(), in_float64(model):
        found = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    rows = [ended(row, wish.eos) for row in found.sequences[:, len(wish.prompt) :].tolist()]
    scores = found.sequences_scores.tolist() if wish.num_beams else ()
    return search.model_copy(update={"tokens": tuple(map(tuple, rows)), "scores": tuple(scores)})


def filtered(kept: Kept) -> Kept:
    """Return the filter with the tokens that it leaves."""
    warpers = [TemperatureLogitsWarper(kept.temperature), TopPLogitsWarper(kept.top_p)]
    if kept.top_k is not None:
        warpers.insert(1, TopKLogitsWarper(kept.top_k))
    logits = LogitsProcessorList(warpers)(None, torch.tensor([kept.logits], dtype=torch.float64))
    return kept.model_copy(update={"tokens": tuple(logits[0].isfinite().nonzero()[:, 0].tolist())})


def ended(row: list[int], eos: int | None) -> list[int]:
    """Without what fills up a sequence that is shorter than others."""
    return row[: row.index(eos) + 1] if eos in row else row


def main(out: str, count: str, models: str, first: str) -> None:
    torch.set_num_threads(1)
    numbers = range(int(first), int(first) + int(count))
    found = Recorded(
        version=transformers.__version__,
        searches=[searched(random_search(number, int(models))) for number in numbers],
        filters=[filtered(random_filter(number)) for number in numbers],
    )
    text = json.dumps(found.model_dump(exclude_defaults=True))
    lines = text.replace("[{", "[\n{").replace("}, {", "},\n{").replace("}]", "}\n]")
    Path(out).write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
