# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from sidechain.metrics.distance import feature_distance


def maps(seed, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 7), (8, 5, 3), (16,)]
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def by_hand(first, second):
    """The formula in plain loops."""
    total = np.zeros(first[0].shape[0])
    for a, b in zip(first, second, strict=True):
        a, b = (m.double().numpy().reshape(*m.shape[:2], -1) for m in (a, b))
        for row in range(a.shape[0]):
            squares = [
                np.sum(
                    (
                        a[row, :, p] / np.linalg.norm(a[row, :, p])
                        - b[row, :, p] / np.linalg.norm(b[row, :, p])
                    )
                    ** 2
                )
                for p in range(a.shape[2])
            ]
            total[row] += np.sqrt(np.mean(squares))
    return total


def test_matches_the_formula():
    first, second = maps(0), maps(1)
    np.testing.assert_allclose(feature_distance(first, second), by_hand(first, second), rtol=1e-5)


def test_metric_properties():
    first, second = maps(0), maps(1)
    assert torch.equal(feature_distance(first, first), torch.zeros(3))
    assert torch.allclose(feature_distance(first, second), feature_distance(second, first))
    scaled = [5 * stage for stage in first]
    assert feature_distance(first, scaled).max() < 1e-5
    opposite = [-stage for stage in first]
    assert torch.allclose(feature_distance(first, opposite), torch.full((3,), 6.0))


def test_one_reference_serves_all_rows():
    first, second = maps(0), [stage[:1] for stage in maps(1)]
    repeated = [stage.expand(3, *stage.shape[1:]) for stage in second]
    assert torch.equal(feature_distance(first, second), feature_distance(first, repeated))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    result = feature_distance(maps(0, dtype=dtype), maps(1, dtype=dtype))
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(result.float(), feature_distance(maps(0), maps(1)), rtol=0.05)


def test_silence_is_finite():
    assert torch.isfinite(feature_distance(maps(0), [0 * stage for stage in maps(0)])).all()


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ([], [], "at least one"),
        (maps(0), maps(0)[:1], "got 3 and 1"),
        ([torch.ones(2, 3)], [torch.ones(2, 4)], r"stage 0, got \[2, 3\] and \[2, 4\]"),
        ([torch.ones(2, 3)], [torch.ones(3, 3)], r"got \[2, 3\] and \[3, 3\]"),
        ([torch.ones(2)], [torch.ones(2)], "at stage 0"),
    ],
)
def test_bad_calls(first, second, match):
    with pytest.raises(ValueError, match=match):
        feature_distance(first, second)
