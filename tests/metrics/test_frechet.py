# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from sidechain.metrics.frechet import frechet_distance


def rows(count, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)


def exact(mean, covariance, count=64):
    """Rows whose sample mean and unbiased covariance are exactly these."""
    width = len(mean)
    white = rows(count, width, seed=7)
    white = white - white.mean(0)
    white = torch.linalg.qr(white).Q * (count - 1) ** 0.5
    values, vectors = torch.linalg.eigh(covariance)
    return white @ torch.diag(values.sqrt()) @ vectors.T + mean


def test_equal_sets_are_at_zero():
    x = rows(50, 8)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x, x[torch.randperm(50)]) == pytest.approx(0.0, abs=1e-9)


def test_a_shift_costs_its_square():
    x = rows(40, 5)
    shift = torch.tensor([3.0, 0, -4.0, 0, 0], dtype=torch.float64)
    assert frechet_distance(x + shift, x) == pytest.approx(25.0, rel=1e-9)


def test_a_scale_costs_the_spread():
    # N(m, S) and N(m, c^2 S): (c - 1)^2 tr S
    x = rows(40, 5)
    x = x - x.mean(0)
    expected = 4.0 * torch.cov(x.T).trace().item()
    assert frechet_distance(3.0 * x, x) == pytest.approx(expected, rel=1e-9)


def test_commuting_covariances():
    # Diagonal Gaussians: sum (s1 - s2)^2 + |m1 - m2|^2
    s1 = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    s2 = torch.tensor([3.0, 2.0, 0.1], dtype=torch.float64)
    m1, m2 = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0]).double()
    first, second = exact(m1, torch.diag(s1**2)), exact(m2, torch.diag(s2**2))
    assert frechet_distance(first, second) == pytest.approx(4.0 + 0.16 + 5.0, rel=1e-9)


@pytest.mark.parametrize(
    ("n", "m", "width"),
    [(200, 150, 6), (4, 100, 9), (5, 3, 12)],
    ids=["tall", "one-thin", "both-thin"],
)
def test_against_the_matrix_root(n, m, width):
    mix = rows(width, width, seed=3)
    x, y = rows(n, width, 1) @ mix + 0.3, rows(m, width, 2)
    c1, c2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = sqrtm(c1 @ c2).real
    expected = np.sum((x.numpy().mean(0) - y.numpy().mean(0)) ** 2) + np.trace(c1 + c2 - 2 * root)
    # The root of a singular product is known to half the digits only.
    tolerance = 1e-8 if min(n, m) > width else 1e-5
    assert frechet_distance(x, y) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_components_of_the_reference():
    # Along the two leading axes the sets agree, in the third they do not.
    scales = torch.tensor([10.0, 5.0, 0.1], dtype=torch.float64)
    reference = exact(torch.zeros(3, dtype=torch.float64), torch.diag(scales**2))
    samples = reference + torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    assert frechet_distance(samples, reference, components=2) == pytest.approx(0.0, abs=1e-8)
    assert frechet_distance(samples, reference, components=3) == pytest.approx(4.0, rel=1e-8)
    assert frechet_distance(samples, reference) == pytest.approx(4.0, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_widened(dtype):
    x, y = rows(30, 4, 1, dtype), rows(30, 4, 2, dtype)
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.double())


NAN = torch.full((3, 2), float("nan"))


@pytest.mark.parametrize(
    ("samples", "reference", "options", "error", "match"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), rows(3, 2), {}, TypeError, "floating-point samples"),
        (rows(3, 2), rows(3, 2)[0], {}, ValueError, r"reference \[N, D\] with N >= 2"),
        (rows(1, 2), rows(3, 2), {}, ValueError, r"samples \[N, D\] with N >= 2"),
        (NAN, rows(3, 2), {}, ValueError, "finite samples"),
        (rows(3, 2), rows(3, 4), {}, ValueError, r"reference with D=2 .* got 4"),
        (rows(9, 4), rows(3, 4), {"components": 3}, ValueError, "1 <= components <= 2"),
        (rows(9, 4), rows(9, 4), {"components": 0}, ValueError, "1 <= components <= 4"),
    ],
)
def test_bad_calls(samples, reference, options, error, match):
    with pytest.raises(error, match=match):
        frechet_distance(samples, reference, **options)
