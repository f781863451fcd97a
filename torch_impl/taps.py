"""Taps: places in autograd's graph where a chunk's weight gradients are taken apart from the rest.

Differs: only PyTorch's autograd takes a place in its graph (`GradientEdge`) as it takes a tensor.

With recomputation (Chen et al. 2016; GPipe, Huang et al. 2019, section 2.3) the first forward
leaves the taps' places in the graph, and the forward that `torch.utils.checkpoint` runs inside B
fills in what went into the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from common.spec.run import RunConfig
from torch_impl import devices
from torch_impl.layers import build_unit
from torch_impl.masters import masters
from torch_impl.shards import WHOLE, Shards
from torch_impl.weights import named_parameters


class Tap(NamedTuple):
    """A layer whose weight gradient waits for W."""

    layer: nn.Linear | nn.Embedding
    x: Tensor | None  # what went in, without its graph; None until B has computed it again
    output: GradientEdge


class Chunk(nn.Module):
    """Consecutive units of the model, with the places where their weight gradients are tapped."""

    def __init__(
        self, config: RunConfig, part: Sequence[str], device: torch.device, shards: Shards = WHOLE
    ) -> None:
        super().__init__()
        self.part = part
        self.units = nn.ModuleList(
            build_unit(config.model, name, devices.fused_attention(config), shards) for name in part
        )
        self.to(device=device, dtype=getattr(torch, config.train.dtype))
        compute = named_parameters(part, list(self.units), config.model.tied_head)
        self.named = masters(compute, getattr(torch, config.train.master_dtype))
        # Pairs of weights in lower precision and their masters; none where they are the same.
        self._casts = [
            (mine.parameter, master.parameter)
            for mine, master in zip(compute, self.named, strict=True)
            if mine is not master
        ]
        size = config.recomputed_units or len(part)
        self.recomputed_pieces = [slice(first, first + size) for first in range(0, len(part), size)]
        self.taps: list[Tap] = []
        self._holds_inputs = True
        self._again: list[Tensor] | None = None
        tapped = [layer for layer in self.modules() if isinstance(layer, nn.Linear | nn.Embedding)]
        # Linear and embedding layers hold nearly all weights; what is left is cheap (`direct`).
        for layer in tapped:
            layer.register_forward_pre_hook(self._collect)
            layer.register_forward_hook(self._tap)
        deferred = {id(parameter) for layer in tapped for parameter in layer.parameters()}
        self.direct = [p for p in self.parameters() if id(p) not in deferred]
        """Parameters whose gradients B gives along the way: those of the norms, which are small."""

    def _tap(self, layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        # Evaluation leaves no tap, nor does a recomputation's second forward: its graph is in B.
        if output.requires_grad and self._again is None:
            # An embedding's input is no activation, and its piece of the graph may never be run.
            holds = self._holds_inputs or isinstance(layer, nn.Embedding)
            self.taps.append(
                Tap(layer, inputs[0].detach() if holds else None, get_gradient_edge(output))
            )

    def _collect(self, layer: Any, inputs: tuple[Tensor]) -> None:
        """Before the layer runs, since a recomputation stops inside the last one."""
        if self._again is not None and isinstance(layer, nn.Linear):
            self._again.append(inputs[0].detach())

    def recomputed(
        self, run: Callable[[Tensor], Tensor], x: Tensor, inputs: list[Tensor]
    ) -> Tensor:
        """`run(x)`, holding `x` alone; the backward runs it again and fills the taps' `inputs`."""

        @contextmanager
        def first() -> Iterator[None]:
            self._holds_inputs = False
            try:
                yield
            finally:
                self._holds_inputs = True

        @contextmanager
        def again() -> Iterator[None]:
            self._again = inputs
            try:
                yield
            finally:
                self._again = None

        # Dropout's masks depend on the micro-batch, not on a generator's state: none is preserved.
        result: Tensor = checkpoint(
            run,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (first(), again()),
        )
        return result

    @torch.no_grad()
    def cast_weights(self) -> None:
        """Make the weights that compute those of their masters, where they are not the same."""
        if self._casts:
            compute, full = zip(*self._casts, strict=True)
            torch._foreach_copy_(compute, full)

    def take_taps(self) -> list[Tap]:
        """Return the taps since the last call."""
        # In the order in which the layers ran, by which `backward_input` matches them.
        taps, self.taps = self.taps, []
        return taps
