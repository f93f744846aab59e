# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are, write what they promise and find what must hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sidechain import InputError, SteeringVector
from sidechain.examples import attention_maps, localize_own, steer_sdxl, train_vector
from sidechain.testing import tiny_pipeline


def arguments(folder: Path) -> list[str]:
    return ["--out", str(folder / "new"), "--steps", "2"]


def check_picture(path: Path) -> None:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_localize_own(tmp_path: Path) -> None:
    found = localize_own.main(arguments(tmp_path))
    check_picture(tmp_path / "new" / "impact.png")
    assert found.impacts.shape == (len(localize_own.SEEDS), len(found.sites))
    np.testing.assert_allclose(found.everywhere, 1.0, atol=1e-4)
    # No site has the effect of all of them, and each row was patched at another site.
    assert (found.impacts < 0.99).all()
    assert (np.ptp(found.impacts, axis=1) > 0.01).all()


def test_attention_maps(tmp_path: Path) -> None:
    found = attention_maps.main(arguments(tmp_path))
    check_picture(tmp_path / "new" / "maps.png")
    assert list(found.words) == attention_maps.PROMPT.split()
    torch.testing.assert_close(found.total, torch.ones(8, 8), rtol=0, atol=1e-5)
    maps = torch.stack(list(found.words.values()))
    assert (maps >= 0).all() and (maps.sum(0) < 1).all()
    assert (torch.pdist(maps.flatten(1)) > 1e-4).all()  # each word has a map of its own


def test_steer_sdxl(tmp_path: Path) -> None:
    found = steer_sdxl.main(arguments(tmp_path))
    check_picture(tmp_path / "new" / "sweep.png")
    SteeringVector.load(tmp_path / "new" / "drums.safetensors")
    zero = steer_sdxl.STRENGTHS.index(0.0)
    for row, strength in enumerate(steer_sdxl.STRENGTHS):
        assert torch.equal(found.steered[row], found.plain[row]) == (row == zero), strength


def test_train_vector(tmp_path: Path) -> None:
    found = train_vector.main(arguments(tmp_path))
    check_picture(tmp_path / "new" / "loss.png")
    assert found.losses[-1] < 0.1 * found.losses[0]
    # The file holds the vector that reached the last loss, and knows whose it is.
    assert found.saved == pytest.approx(found.losses[-1], rel=1e-3)
    vector = SteeringVector.load(tmp_path / "new" / "vector.safetensors")
    assert vector.config_hash


def test_a_saved_pipeline(tmp_path: Path) -> None:
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "model")
    found = steer_sdxl.main([*arguments(tmp_path), "--model", str(tmp_path / "model")])
    assert len(found.steered) == len(steer_sdxl.STRENGTHS)
    with pytest.raises(InputError, match="expected a saved pipeline in"):
        steer_sdxl.main([*arguments(tmp_path), "--model", str(tmp_path)])


def test_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        steer_sdxl.main([])
    assert "--out" in capsys.readouterr().err
