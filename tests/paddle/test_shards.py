"""Shards of a stage: what they send, fleet's layers beside ours, and what the parity ladder does
not ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest

from common.spec.mesh import Mesh
from common.spec.run import LLAMA
from common.spec.traffic import traffic_bytes
from paddle_impl.dropout import DropoutContext, dropout, keep_mask
from paddle_impl.shards import Shards
from tests.engines import (
    SAMPLES,
    STEP_KEY,
    Make,
    assert_within,
    batch,
    check_decoding,
    check_predictions,
    check_units_alone,
    different,
    numpy_mask,
    oracle_of,
    train,
)
from tests.paddle.ranks import Ranks


def cut(t: int = 2, stages: int = 1, **run: Any) -> dict[str, Any]:
    return {"tensor_parallel": t, "vocab_parallel": t > 1, "threads": t * stages} | run


def test_steps_are_the_oracles(make: Make) -> None:
    """Also where a residual connection goes round f, and the norm clips."""
    model = {"norm": "post", "tied_head": True, "dropout": 0.1}
    engine = make(2, "zb-h1", "float64", run=cut(2, 2, recompute="every-1"), **model)
    oracle = oracle_of(engine)
    for step in range(2):
        losses = [{"loss": one.forward_backward(batch(engine, step))} for one in (engine, oracle)]
        assert_within(*losses, "loss", "float64")
        assert_within(engine.gradients(), oracle.gradients(), "gradient", "float64")
        norms = [{"norm": one.apply_gradients(step)} for one in (engine, oracle)]
        assert_within(*norms, "loss", "float64")
    check_predictions(engine, (7, 16), (5, 3))


@pytest.mark.parametrize("vocab_parallel", [False, True])
def test_a_step_sends_what_the_formula_says_and_w_nothing(make: Make, vocab_parallel: bool) -> None:
    engine = make(1, "zb-h1", run=cut(2, vocab_parallel=vocab_parallel), **LLAMA)
    sent = traffic_bytes(engine.config)
    assert engine.on_all(_bytes_sent) == sent[0, 1] == sent[1, 0]


def _bytes_sent(engine: Any) -> int:
    """What a forward and backward sends to the other shard."""
    link, sent = engine.stage.shards.group.process_group._links[1 - engine._shard], []
    send, run_w = link.send, engine.stage.backward_weight

    def counted(array: Any) -> None:
        sent.append(array.nbytes)
        send(array)

    def watched(*arguments: Any) -> None:
        before = len(sent)
        run_w(*arguments)
        assert len(sent) == before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "send", counted)
        patch.setattr(engine.stage, "backward_weight", watched)
        engine.forward_backward(batch(engine))
    return sum(sent)


def test_another_number_of_shards_goes_on(make: Make) -> None:
    """With the same numbers; and what it has loaded it has, bit by bit. Of 256 tokens, three shards
    have 86, 85 and 85.
    """
    options = {"num_heads": 6, "d_model": 48, "d_ff": 48, "dtype": "float64", "dropout": 0.1}
    first, *others = (make(1, run=cut(t), **options) for t in (2, 1, 3))
    train(first, range(2))
    weights, state = first.weights(), first.optimizer_state()
    then = train(first, [2])
    for other in others:
        other.reset(weights)
        other.load_optimizer_state(state, 2)
        assert different(weights, other.weights()) == []
        assert different(state, other.optimizer_state()) == []
        assert_within(train(other, [2]), then, "gradient", "float64")


def test_units_alone_are_the_oracles(make: Make) -> None:
    def two(stages: int, **options: Any) -> Any:
        options["run"] |= cut(2, 2)
        return make(stages, **options)

    check_units_alone(two, "float64", "pre", True)


def test_generation_has_the_logits_of_all_shards(make: Make) -> None:
    check_decoding(make, "beams", 2, "1f1b", **cut(2, 2))


def test_masks_of_heads_are_parts_of_those_of_all() -> None:
    shared = DropoutContext(step_key=STEP_KEY, samples=SAMPLES)
    native = DropoutContext(True, STEP_KEY, SAMPLES)
    whole, ones = numpy_mask(6, (4, 6, 5, 5), 0.5), paddle.ones([4, 2, 5, 5])
    drawn = dropout(paddle.ones([4, 6, 5, 5]), 0.5, 6, native).numpy()
    for shard in range(3):
        heads, part = slice(2 * shard, 2 * shard + 2), (shard, 3)
        found = keep_mask(shared, 6, ones.shape, 0.5, part).numpy()
        np.testing.assert_array_equal(found, whole[:, heads])
        found = dropout(ones, 0.5, 6, native, part).numpy()
        np.testing.assert_array_equal(found, drawn[:, heads])


def test_fleets_layers_have_our_bits(ranks: Callable[[Mesh], Ranks]) -> None:
    for ours, fleets in ranks(Mesh(1, 1, 2)).ask(_both_feed_forwards):
        assert different(ours, fleets) == []


def _both_feed_forwards() -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours, and one of fleet's layers with what they need on CPUs, and for B and W."""
    from paddle.distributed.fleet import meta_parallel
    from paddle.distributed.fleet.meta_parallel.zero_bubble_utils import SplitBWMatmul
    from paddle.nn.functional import gelu

    from common.spec.run import TransformerSpec
    from paddle_impl.groups import here
    from paddle_impl.layers import FeedForward

    group = paddle.distributed.fleet.get_hybrid_communicate_group().get_model_parallel_group()
    spec = TransformerSpec(d_model=8, num_heads=2, d_ff=12, activation="gelu")
    ours = FeedForward(spec, Shards(2, here().place.shard, group=group))
    up = meta_parallel.ColumnParallelLinear(8, 12, has_bias=True, gather_output=False)
    down = meta_parallel.RowParallelLinear(12, 8, has_bias=True, input_is_parallel=True)
    for layer, own in ((up, ours.up), (down, ours.down)):
        layer.mp_skip_c_identity = True
        layer.linear = lambda x, weight, bias=None, name=None: SplitBWMatmul.apply(x, weight, bias)
        layer.weight.set_value(own.weight)
        own.bias.set_value(paddle.randn(own.bias.shape))
        layer.bias.set_value(own.bias)
    found = []
    for forward, layers in (
        (ours, (ours.up, ours.down)),
        (lambda x: down(gelu(up(x.clone()))), (up, down)),
    ):
        x = paddle.arange(48, dtype=up.weight.dtype).sin().reshape([2, 3, 8])
        x.stop_gradient = False
        y = forward(x)
        (y * y).sum().backward()
        gradients = {
            f"{i} {kind}": getattr(layer, kind).grad.numpy()
            for i, layer in enumerate(layers)
            for kind in ("weight", "bias")
        }
        found.append(gradients | {"output": y.numpy(), "input": x.grad.numpy()})
    return found[0], found[1]
