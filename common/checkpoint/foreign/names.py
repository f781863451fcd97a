"""Names and nesting that model wrappers and training loops add to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from common.checkpoint.foreign.errors import ExchangeError, note
from common.io.edges import printable

WRAPPERS: Mapping[str, str] = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_layers": "paddle.DataParallel",
}
"""Name parts that wrappers add anywhere in a name; neither our names nor GPT-2's contain them."""
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "module", "weights")
"""The keys under which training loops store the weights."""
MAX_DEPTH = 4


def unwrapped(names: Iterable[str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """Map names without wrappers and `prefixes` to the file's own; note what was removed.

    Raises ExchangeError if two names become one.
    """
    found: dict[str, str] = {}
    removed: dict[str, int] = {}
    for name in names:
        # "module._orig_mod.transformer.h.0.ln_1.weight" becomes "h.0.ln_1.weight": wrappers
        # anywhere, prefixes at the beginning, the last word always stays.
        words = name.split(".")
        kept = [word for word in words if word not in WRAPPERS]
        while len(kept) > 1 and kept[0] in prefixes:
            kept = kept[1:]
        for word in {*words} - {*kept}:
            removed[word] = removed.get(word, 0) + 1
        short = ".".join(kept)
        if short in found:
            raise ExchangeError(
                f"{printable(found[short])} and {printable(name)} are both {printable(short)} "
                "without what wraps them"
            )
        found[short] = name
    for word, count in removed.items():
        whose = f" ({WRAPPERS[word]})" if word in WRAPPERS else ""
        note(f"{word!r}{whose} was taken off {count} names")
    return found


def weights_in(loaded: Any, is_tensor: Callable[[Any], bool], besides: str = "") -> dict[str, Any]:
    """Return the state dict, without `besides`: the file, or under one of `CHECKPOINT_KEYS`."""
    for _ in range(MAX_DEPTH):
        if not isinstance(loaded, dict) or not loaded:
            break
        # Either this level is the state dict, or one of the usual keys leads a level down.
        state = {name: value for name, value in loaded.items() if name != besides}
        if all(isinstance(name, str) and is_tensor(value) for name, value in state.items()):
            return state
        key = next((key for key in CHECKPOINT_KEYS if isinstance(loaded.get(key), dict)), None)
        if key is None:
            break
        others = ", ".join(printable(str(other), 30) for other in list(state)[:9] if other != key)
        note(f"the weights are those under {key!r}" + (f"; not read: {others}" if others else ""))
        loaded = loaded[key]
    raise ExchangeError(
        "expected a dictionary of tensors, or a checkpoint with one under 'state_dict' or 'model'"
    )
