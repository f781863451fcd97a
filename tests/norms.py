"""What docs/batch-norm.md says, at one mini-batch, in one framework."""

from __future__ import annotations

from common.spec.data import load_corpus
from tests.campaigns.batch_norm import run_config
from tests.campaigns.batch_norm_model import (
    Kind,
    Ops,
    gradient_differences,
    oracle_difference,
    train,
)


def check_norms(ops: Ops) -> None:
    """Micro-batches change the gradient of batch norm, deferred or not, and not of LayerNorm."""
    config = run_config(steps=2)
    corpus = load_corpus(config)
    batch = corpus.training_batch(config, 0)
    assert oracle_difference(ops, config, batch) < 1e-12
    assert max(gradient_differences(ops, config, "layer norm", (3, 8), batch)) < 1e-12
    kinds: tuple[Kind, Kind] = ("batch norm", "deferred batch norm")
    plain, deferred = (gradient_differences(ops, config, kind, (2, 8), batch) for kind in kinds)
    assert 0.01 < plain[0] < plain[1] < 1 and plain == deferred
    plain_run, deferred_run = (train(ops, config, kind, 8, corpus) for kind in kinds)
    assert plain_run[0] == deferred_run[0]  # the training curve
    assert plain_run[1] != deferred_run[1]  # the held-out loss: other running statistics
