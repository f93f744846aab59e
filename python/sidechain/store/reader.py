# SPDX-License-Identifier: Apache-2.0
"""ActivationStore: reads the rows of one site, memory-mapped, in any order."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batches import Batches
from .labels import Labels
from .manifest import COLUMNS, DTYPES, Manifest, read_prompts
from .options import BatchOptions
from .recount import load_statistics
from .row_index import RowIndex, gather_rows
from .shard import MappedShard, decode


class ActivationStore:
    """Rows of one site of a store.

        store = ActivationStore("acts", "cross:3")
        for batch in store.batches(4096, seed=0):
            batch.x                                  # [4096, C]

    Opening maps the shards and checks their sizes and labels; `verify` reads their rows as well.

    Args:
        folder: of the store.
        site: which site; None = the only one.
        steps: keep these steps: (start, stop), or a list of numbers. None = all.
        branches: keep these guidance branches: a name, several names, or "all".
        prompts: keep the rows of these prompts. None = all.

    Attributes:
        site, width, dtype: what a row is; `dtype` is as stored.
        branches, timesteps, sigmas: what the numbers of the labels stand for.
        statistics: `Statistics` of all rows of the site at the steps and branches that are kept;
            those of other prompts are still in it.

    Raises:
        FileNotFoundError: no store there.
        ValueError: unknown site or options, a broken manifest, a damaged shard.
    """

    def __init__(
        self,
        folder: str | Path,
        site: str | None = None,
        *,
        steps: tuple[int, int] | Sequence[int] | None = None,
        branches: str | Sequence[str] = "all",
        prompts: Iterable[int] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._manifest = Manifest.read(self.folder)
        self.sites = tuple(self._manifest.sites)
        self.site = self._one_site(site)
        entry = self._manifest.sites[self.site]
        self.width = entry.width
        self.dtype = DTYPES[self._manifest.dtype]
        self.branches = tuple(self._manifest.branches)
        self.timesteps = _table(self._manifest.timesteps)
        self.sigmas = _table(self._manifest.sigmas)
        self.provenance: dict[str, Any] = self._manifest.provenance
        self._shards = [
            MappedShard(self.folder, self._manifest, self.site, shard) for shard in entry.shards
        ]
        wanted = None if prompts is None else sorted(set(prompts))
        self._filter = (_steps(steps), self._branch_numbers(branches), wanted)
        found = load_statistics(self.folder, self._manifest, self.site)
        self.statistics = found.select(*self._filter[:2])
        self._rows = RowIndex([self._kept(shard) for shard in self._shards])

    # -- rows -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows that are kept."""
        return len(self._rows)

    @property
    def has_steps(self) -> bool:
        """Whether the label `step` was known; not where rows were imported without steps."""
        return bool(self.provenance.get("has_steps", True))

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return self._manifest.row_bytes(self.site)

    @property
    def fingerprint(self) -> int:
        """A number that changes with the rows: shards and filters."""
        parts = [self._rows.shard, self._rows.row, self._rows.ends]
        checksum = zlib.crc32(self.site.encode())
        for shard in self._shards:
            checksum = zlib.crc32(str(shard.shard).encode(), checksum)
        for part in parts:
            checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
        return checksum

    def read(self, rows: Tensor | NDArray[Any] | Sequence[int]) -> Tensor:
        """Read rows [n, C] by number, in the stored dtype (float32 for int8).

        Raises:
            IndexError: a number outside [0, len).
        """
        numbers = np.asarray(rows, dtype=np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(
                f"store: expected rows within [0, {len(self)}), got {numbers.min()} to "
                f"{numbers.max()}"
            )
        stored = np.empty((len(numbers), self.row_bytes), np.uint8)
        self.gather(numbers, stored)
        return decode(torch.from_numpy(stored), self.dtype, self.width)

    def gather(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy stored rows [n, row_bytes] by number, unchecked."""
        gather_rows([shard.rows for shard in self._shards], *self._rows.locate(rows), out)

    def labels(self, rows: Tensor | NDArray[Any] | Sequence[int]) -> Labels:
        """Labels of rows by number."""
        shard, row = self._rows.locate(np.asarray(rows, dtype=np.int64))
        found = {}
        for name, dtype in COLUMNS.items():
            columns = [
                s.columns[name].view(np.uint8).reshape(-1, dtype.itemsize) for s in self._shards
            ]
            values = np.empty(len(row), dtype)
            gather_rows(columns, shard, row, values.view(np.uint8).reshape(-1, dtype.itemsize))
            found[name] = torch.from_numpy(values.astype(np.int64))
        return Labels(**found)

    def prompts(self) -> list[str]:
        """Texts of the prompts by number; empty where none were kept.

        Raises:
            ValueError: the file is damaged.
        """
        return read_prompts(self.folder, self._manifest)["prompts"]

    def batches(
        self,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        target: ActivationStore | None = None,
        part: tuple[int, int] | None = None,
        **options: Any,
    ) -> Batches:
        """Iterate over batches.

        Args:
            batch_size: B.
            device: see `Batches`.
            target: see `Batches`.
            part: see `Batches`.
            **options: of `BatchOptions`.
        """
        chosen = BatchOptions(batch_size, **options)
        return Batches(self, chosen, device=device, target=target, part=part)

    def verify(self) -> None:
        """Read every row of every shard and compare checksums, which finds flipped bits.

        Raises:
            ValueError: a block of rows has changed; the message names the file and the rows.
        """
        for shard in self._shards:
            shard.verify()

    # -- opening --------------------------------------------------------------------------------

    def _one_site(self, site: str | None) -> str:
        if site is None and len(self.sites) == 1:
            return self.sites[0]
        if site not in self.sites:
            raise ValueError(f"store: expected a site of {list(self.sites)}, got {site!r}")
        return site

    def _branch_numbers(self, names: str | Sequence[str]) -> list[int] | None:
        if names == "all":
            return None
        chosen = [names] if isinstance(names, str) else list(names)
        for name in chosen:
            if name not in self.branches:
                raise ValueError(
                    f"store: expected branches of {', '.join(self.branches)}, or all, got {name!r}"
                )
        return [self.branches.index(name) for name in chosen]

    def _kept(self, shard: MappedShard) -> NDArray[np.bool_]:
        keep = np.ones(len(shard.rows), dtype=np.bool_)
        for name, wanted in zip(("step", "branch", "prompt"), self._filter, strict=True):
            if wanted is not None:
                keep &= np.isin(shard.columns[name], wanted)
        return keep


def _table(values: list[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def _steps(steps: tuple[int, int] | Sequence[int] | None) -> list[int] | None:
    if steps is None:
        return None
    if isinstance(steps, tuple):
        if len(steps) != 2 or not 0 <= steps[0] < steps[1]:
            raise ValueError(
                f"store: expected steps as (start, stop) with 0 <= start < stop, or a list of "
                f"numbers, got {steps!r}"
            )
        return list(range(*steps))
    return [int(step) for step in steps]
