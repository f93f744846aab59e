# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidechain.store import ActivationWriter, Storage

WIDTH = 37
UNITS = 40
UNIT_ROWS = 25


def rows_of(unit: int, site: str = "cross:3") -> Tensor:
    """The rows of a unit [UNIT_ROWS, WIDTH]; another scale and mean for every step."""
    generator = torch.Generator().manual_seed(1000 * len(site) + unit)
    rows = torch.randn(UNIT_ROWS, WIDTH, generator=generator)
    return rows * (1.0 + unit % 4) + 10.0 * (unit % 4)


def write_unit(writer: ActivationWriter, unit: int) -> None:
    """Write unit number `unit`: steps 0 to 3, both branches, one prompt for each unit."""
    with writer.transaction(cursor=unit + 1):
        for site in writer.sites:
            writer.write(
                {site: rows_of(unit, site)},
                step=unit % 4,
                branch="cond" if unit % 2 else "uncond",
                prompt=unit,
            )


def fill(
    folder: Path, units: int = UNITS, sites: tuple[str, ...] = ("cross:3",), **options: Any
) -> Path:
    """Write a store of `units` units and return its folder."""
    storage = Storage(**{"dtype": torch.float32, "shard_bytes": 20_000, **options})
    with ActivationWriter(folder, dict.fromkeys(sites, WIDTH), storage) as writer:
        for unit in range(units):
            write_unit(writer, unit)
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`fill` a folder of this test's own."""
    return partial(fill, tmp_path / "acts")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests that only read: sites cross:3 and bcd."""
    return fill(tmp_path_factory.mktemp("whole") / "acts", sites=("cross:3", "bcd"))


@pytest.fixture
def expected() -> Callable[..., Tensor]:
    """All rows in the order of writing."""

    def build(units: int = UNITS, site: str = "cross:3") -> Tensor:
        return torch.cat([torch.empty(0, WIDTH), *(rows_of(u, site) for u in range(units))])

    return build
