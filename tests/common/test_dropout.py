"""Dropout masks: functions of what they should depend on, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from common.spec.dropout_masks import MULTIPLIERS, keep_mask, mix, site_number, step_key, threshold


def test_the_mixer_is_a_bijection_without_overflow() -> None:
    assert all(multiplier < 2**31 for multiplier in MULTIPLIERS)
    some = np.random.default_rng(0).integers(0, 2**32, 100_000)
    assert len(np.unique(mix(some))) == len(np.unique(some))
    assert [mix(int(x)) for x in some[:50]] == list(mix(some[:50]))


def test_masks_do_not_depend_on_the_micro_batch() -> None:
    key = step_key(seed=3, step=5)
    whole = keep_mask(key, 9, np.arange(8), (8, 4, 6), 0.3)
    pieces = [keep_mask(key, 9, np.arange(i, i + 2), (2, 4, 6), 0.3) for i in range(0, 8, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_masks_differ_by_step_seed_site_and_sample() -> None:
    masks = [
        keep_mask(step_key(seed, step), site, np.array([sample]), (1, 4000), 0.5).ravel()
        for seed, step, site, sample in [
            (0, 0, 0, 0),
            (1, 0, 0, 0),
            (0, 1, 0, 0),
            (0, 0, 1, 0),
            (0, 0, 0, 1),
        ]
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.06  # 4 standard deviations


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements(dropout: float) -> None:
    keep = keep_mask(step_key(0, 0), 2, np.arange(50), (50, 2000), dropout)
    assert keep.mean() == pytest.approx(
        1 - dropout, abs=4 * (dropout * (1 - dropout) / keep.size) ** 0.5
    )
    assert threshold(dropout) == round(dropout * 2**32)


def test_sites_are_distinct() -> None:
    sites = [site_number("embedding", 0)] + [
        site_number(f"block.{i}", place) for i in range(5) for place in range(3)
    ]
    assert len(set(sites)) == len(sites)
