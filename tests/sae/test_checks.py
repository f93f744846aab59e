# SPDX-License-Identifier: Apache-2.0
"""Rows that do not vary are refused at the start, for what they are."""

from __future__ import annotations

import pytest
import torch

from sidechain.sae import train
from sidechain.sae.architectures.registry import ARCHITECTURES
from sidechain.sae.training.checks import check_varying
from sidechain.store import ActivationStore, ActivationWriter, Statistics

D = 6
SHORT = dict(features=16, tokens=128, batch=64, progress=False)


def statistics(*parts):
    """Statistics of rows by step."""
    made = Statistics(D)
    for step, x in enumerate(parts):
        made.at((step, 0)).add(x)
    return made


def varied(count=64, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, D, generator=generator) * scale + offset


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e8, 1e-30, 65504.0])
@pytest.mark.parametrize("count", [2, 64, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_rows(value, count, dtype):
    """Also where sums round: 0.1 in float64 has no bits to spare."""
    x = torch.full((count, D), value, dtype=dtype)
    with pytest.raises(ValueError, match=f"expected rows that vary .*, got {count} constant ones$"):
        check_varying(statistics(x), "global")
    rows = varied(1).expand(count, D)
    with pytest.raises(ValueError, match=r"constant ones at step 0$"):
        check_varying(statistics(rows), "step")


def test_one_constant_step():
    made = statistics(varied(), torch.full((64, D), 0.3), varied(offset=5.0))
    with pytest.raises(ValueError, match=r"got 64 constant ones at step 1$"):
        check_varying(made, "step")
    check_varying(made, "global")  # together they vary
    check_varying(made, "none")
    with pytest.raises(ValueError, match=r"got one at step 1$"):
        check_varying(statistics(varied(), varied(1)), "step")


def test_rows_that_vary_a_little():
    offset = varied(1, scale=1000.0).expand(100_000, D).clone()
    offset[77, 2] = torch.nextafter(offset[77, 2], torch.tensor(torch.inf))
    check_varying(statistics(offset), "step")
    check_varying(statistics(varied(scale=1e-30)), "step")
    column = torch.zeros(64, D)
    column[:, 3] = varied()[:, 0]
    check_varying(statistics(column), "step")  # other columns may be constant


def test_rows_that_are_not_finite_are_not_called_constant():
    x = varied()
    x[3, 3] = float("nan")
    check_varying(statistics(x), "step")


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("centre", [True, False])
def test_every_architecture_says_so_at_the_start(tmp_path, architecture, centre):
    x = torch.full((1024, D), 0.7)
    with pytest.raises(ValueError, match="expected rows that vary"):
        train([x], tmp_path, architecture=architecture, centre=centre, **SHORT)
    assert not (tmp_path / "sae.safetensors").exists()


def test_a_store_with_a_constant_step(tmp_path):
    with ActivationWriter(tmp_path / "store", {"cross:1": D}) as writer:
        writer.write({"cross:1": varied(600)}, step=0)
        writer.write({"cross:1": torch.zeros(600, D)}, step=3)
    store = ActivationStore(tmp_path / "store", "cross:1")
    with pytest.raises(ValueError, match="got 600 constant ones at step 3"):
        train(store, tmp_path / "run", k=2, **SHORT)


def test_a_constant_target(tmp_path):
    from sidechain.sae import Rows

    rows = [Rows(varied(1024), None, torch.ones(1024, 3))]
    with pytest.raises(ValueError, match="got 1024 constant ones"):
        train(rows, tmp_path, k=2, **SHORT)
