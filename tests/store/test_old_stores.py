# SPDX-License-Identifier: Apache-2.0
"""A store and a cursor of batches that version 0.1.0 saved: they open, go on, are extended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sidechain.store import ActivationStore, ActivationWriter

SAVED = Path(__file__).parents[1] / "data" / "stores" / "v1"
CURSOR = {
    "seed": 3, "epoch": 1, "position": 6, "batch_size": 6, "shuffle": "rows",
    "fingerprint": 1289228604,
}  # fmt: skip


@pytest.fixture(params=["cursor", "progress"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the store, with the cursor under its newer and its older name."""
    folder = Path(shutil.copytree(SAVED, tmp_path / "s"))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"cursor"', f'"{request.param}"'))
    return folder


def test_opens(folder: Path) -> None:
    store = ActivationStore(folder, "cross:0")
    store.verify()
    assert store.read([0, 5, 23])[:, 0].tolist() == [0.0, 10.5, 120.5]
    labels = store.labels([0, 5, 23])
    assert torch.stack(list(vars(labels).values())).tolist() == [
        [0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 2, 2],
    ]  # fmt: skip
    assert store.statistics.total().m2.tolist() == [61001.5] * 5
    assert store.prompts() == ["one", "two"] and store.provenance == {"model": "tiny"}
    assert store.timesteps is not None and store.timesteps.tolist() == [0.9, 0.5]


def test_a_saved_cursor_goes_on(folder: Path) -> None:
    batches = ActivationStore(folder, "cross:0").batches(6, epochs=None)
    batches.load_state_dict(CURSOR)
    assert next(iter(batches)).rows.tolist() == [4, 6, 18, 9, 10, 0]
    # what a dictionary's run folder holds of a filtered store
    assert ActivationStore(folder, "cross:1", steps=[1]).fingerprint == 888653934


def test_can_be_extended(folder: Path) -> None:
    with ActivationWriter(folder, {"cross:0": 5, "cross:1": 3}, mode="append") as writer:
        assert writer.cursor == 2
        writer.write({"cross:0": torch.ones(2, 5), "cross:1": torch.ones(2, 3)}, prompt=2)
    store = ActivationStore(folder, "cross:1")
    assert len(store) == store.statistics.total().count == 26
    assert store.read([0, 25]).tolist() == [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]
