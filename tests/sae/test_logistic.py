# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from sidechain.sae.features.logistic import logistic_weights


def examples(rows=14, features=60, positive=6, shift=0.7, seed=0):
    x = torch.randn(
        rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    x[:positive, :3] += shift
    x[:, 7] = 4.0  # says nothing
    return x, positive


@pytest.mark.parametrize("cost", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("shift", [0.0, 0.7, 30.0])  # the last one is separable by far
def test_agrees_with_scikit_learn(cost, shift):
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x, positive = examples(shift=shift)
    scaled = preprocessing.StandardScaler().fit_transform(x.numpy())
    target = np.arange(len(x)) < positive
    theirs = linear_model.LogisticRegression(C=cost, tol=1e-10, max_iter=10_000)
    theirs.fit(scaled, target)
    ours = logistic_weights(x, positive, cost=cost)
    np.testing.assert_allclose(ours.numpy(), theirs.coef_[0], rtol=1e-4, atol=1e-6)


def test_no_direction_lowers_the_loss():
    x, positive = examples(rows=9, features=20, positive=4)
    weights = logistic_weights(x, positive).requires_grad_()
    z = (x - x.mean(0)) / x.std(0, unbiased=False).clamp(min=1e-12)
    sign = torch.where(torch.arange(9) < positive, 1.0, -1.0).double()

    def loss(w, b):
        return w.square().sum() / 2 + torch.nn.functional.softplus(-sign * (z @ w + b)).sum()

    # The bias that goes with the weights, by bisection on its own derivative.
    low, high = torch.tensor(-20.0).double(), torch.tensor(20.0).double()
    for _ in range(200):
        middle = ((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(loss(weights, middle), middle)
        low, high = (low, middle.detach()) if slope > 0 else (middle.detach(), high)
    (gradient,) = torch.autograd.grad(loss(weights, low), weights)
    assert float(gradient.abs().max()) < 1e-8
    assert weights[7] == 0


@pytest.mark.parametrize("positive", [0, 14])
def test_one_class_is_refused(positive):
    x, _ = examples()
    with pytest.raises(ValueError, match=f"expected rows of both classes, got {positive}/14"):
        logistic_weights(x, positive)
