# SPDX-License-Identifier: Apache-2.0
"""Rows with known features: any slice again, what is drawn, what counts as found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidechain._errors import InputError
from sidechain.sae import planted
from sidechain.sae.planted import Planted, planted_rows, share_found, write_planted

PLAN = Planted(1000, 24, 40, active=5, noise=0.0, seed=3)


@pytest.fixture(autouse=True)
def small_lots(monkeypatch):
    monkeypatch.setattr(planted, "_LOT", 64)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (63, 65), (100, 900), (999, 1000), (7, 7)])
def test_any_slice_is_the_same(start, stop):
    np.testing.assert_array_equal(PLAN.slice(start, stop), PLAN.slice(0, 1000)[start:stop])


def test_seeds_and_lots_differ():
    other = Planted(1000, 24, 40, active=5, noise=0.0, seed=4)
    assert not np.allclose(other.directions(), PLAN.directions())
    x = PLAN.slice(0, 1000)
    assert len(np.unique(x, axis=0)) == 1000


def test_rows_are_sums_of_as_many_atoms():
    """More directions than elements do not let one solve; with fewer, coefficients come back."""
    plan = Planted(1000, 64, 40, active=5, noise=0.0, seed=1)
    atoms = plan.directions().astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1.0, rtol=1e-6)
    coefficients = np.linalg.lstsq(atoms.T, plan.slice(0, 1000).T.astype(np.float64), rcond=None)[0]
    on = np.abs(coefficients) > 1e-3
    assert (on.sum(0) == 5).all()
    assert coefficients[on].min() >= 1 - 1e-4 and coefficients[on].max() < 2 + 1e-4
    # Every atom is as likely: 125 of 1000 rows, five standard deviations are 52.
    assert np.abs(on.sum(1) - 125).max() < 52


def test_all_atoms_can_be_active():
    plan = Planted(64, 16, 4, active=4, noise=0.0)
    atoms, x = plan.directions().astype(np.float64), plan.slice(0, 64).astype(np.float64)
    coefficients = np.linalg.lstsq(atoms.T, x.T, rcond=None)[0]
    assert (coefficients > 1 - 1e-4).all()


def test_noise_has_its_size():
    noisy = Planted(1000, 24, 40, active=5, noise=0.5, seed=3)
    assert (noisy.slice(0, 1000) - PLAN.slice(0, 1000)).std() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_command_writes_rows_that_are_mapped(tmp_path, capsys, dtype):
    line = [
        "--rows",
        "1000",
        "--width",
        "24",
        "--atoms",
        "40",
        "--active",
        "5",
        "--noise",
        "0",
        "--seed",
        "3",
        "--dtype",
    ]
    out = tmp_path / "x.npy"
    assert planted.main([str(out), *line, dtype]) == 0
    assert capsys.readouterr().out.split() == [str(out), str(tmp_path / "x.atoms.npy")]
    mapped = np.load(out, mmap_mode="r")
    assert mapped.dtype == dtype
    np.testing.assert_array_equal(mapped, PLAN.slice(0, 1000).astype(dtype))
    np.testing.assert_array_equal(np.load(tmp_path / "x.atoms.npy"), PLAN.directions())
    assert len(list(tmp_path.iterdir())) == 2


def test_tensors():
    x, atoms = planted_rows(1000, 24, 40, active=5, noise=0.0, seed=3)
    np.testing.assert_array_equal(x.numpy(), PLAN.slice(0, 1000))
    np.testing.assert_array_equal(atoms.numpy(), PLAN.directions())


def test_share_found():
    atoms = torch.eye(4, 8)
    rows = torch.zeros(3, 8)
    rows[0, 0] = 7.0  # along the first, of another norm
    rows[1, 1], rows[1, 2] = 1.0, 0.3  # cosine 0.958
    rows[2, 3] = -1.0  # against the fourth
    assert share_found(rows, atoms) == 0.5
    assert share_found(rows.half().numpy(), atoms.numpy(), cosine=0.97) == 0.25
    assert share_found(-atoms, atoms[:1]) == 0.0
    assert share_found(torch.zeros(0, 8), atoms) == 0.0
    assert share_found(torch.zeros(2, 8), atoms) == 0.0  # no NaN of rows without a direction


def test_a_plain_trainer_finds_them(tmp_path):
    from sidechain import sae

    x, atoms = planted_rows(20_000, 32, 48, active=2, noise=0.01)
    options = {"features": 96, "k": 2, "architecture": "topk", "batch": 256, "lr": 3e-3}
    found = sae.train(x, tmp_path / "run", epochs=4, progress=False, **options)
    untrained = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    assert share_found(untrained, atoms) < 0.05
    assert share_found(found.w_dec, atoms) >= 0.9


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rows": 0}, "rows >= 1, got 0"),
        ({"width": 0}, "width >= 1, got 0"),
        ({"atoms": 0}, "atoms >= 1, got 0"),
        ({"active": 0}, "active >= 1, got 0"),
        ({"active": 41}, r"active <= 40 \[atoms\], got 41"),
        ({"noise": -1.0}, "noise >= 0, got -1"),
        ({"noise": float("nan")}, "noise >= 0, got nan"),
        ({"seed": -1}, "seed >= 0, got -1"),
    ],
)
def test_bad_plans(options, text):
    with pytest.raises(InputError, match=text):
        Planted(**{"rows": 10, "width": 4, "atoms": 40, **options})


def test_bad_calls(tmp_path, capsys):
    with pytest.raises(InputError, match="0 <= start <= stop <= 1000, got 5 and 1001"):
        PLAN.slice(5, 1001)
    with pytest.raises(InputError, match=r"ending in \.npy"):
        write_planted(tmp_path / "x.bin", PLAN)
    with pytest.raises(InputError, match="dtype to be one of float16, float32, got 'int8'"):
        write_planted(tmp_path / "x.npy", PLAN, dtype="int8")
    with pytest.raises(ValueError, match="of one width, got"):
        share_found(torch.zeros(2, 3), torch.zeros(2, 4))
    assert (
        planted.main([str(tmp_path / "x.npy"), *["--rows", "5", "--width", "4", "--atoms", "0"]])
        == 2
    )
    assert capsys.readouterr().err == "planted: expected atoms >= 1, got 0\n"
    assert not list(tmp_path.iterdir())
