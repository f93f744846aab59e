# SPDX-License-Identifier: Apache-2.0
"""Sources of training rows that are read by number: stores, arrays, files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..._errors import InputError
from ...store import ActivationStore, Batches, BatchOptions, Statistics
from ...store.arrays import BadFound, statistics_of
from ...store.finite import LARGEST, bad_rows
from ...store.protocol import RowReader
from ...store.shard import decode
from ..config import Provenance
from ..normaliser import Normaliser
from .bad_rows import BadRows
from .fitting import fit
from .mesh import Mesh
from .rows import Rows


class Source(Protocol):
    """Rows in an order that is the same every time, from any batch on.

    A source may also have `bad_rows` (`BadRows`, says that it looks at its rows itself; without it
    the trainer does), `available(batch)` (rows that it has in whole batches, None where nobody
    knows) and `targeted()` (whether its rows have a target; None = where the widths differ).
    """

    def widths(self) -> tuple[int, int]:
        """Return d_in and d_out."""

    def normalisers(self, kind: str, *, centre: bool) -> tuple[Normaliser, Normaliser | None]:
        """Return the normaliser of the input, and that of the target if there is one.

        Args:
            kind: "step", "global" or "none".
            centre: whether to subtract the mean.
        """

    def batches(self, batch: int, start: int, mesh: Mesh, device: torch.device) -> Iterator[Rows]:
        """Yield this process's rows of batch number `start` and of those that follow.

        Args:
            batch: rows of a batch over all processes.
            start: number of batches to pass over.
            mesh: whose slice of the rows to yield.
            device: where they should be.
        """

    def identity(self) -> dict[str, Any]:
        """Return what must be the same when a run continues, as JSON values."""

    def provenance(self) -> Provenance:
        """Return where the rows come from."""


class ReaderSource:
    """Rows that are read by number, in shuffled order, over and over.

    Args:
        reader: of the input.
        target: the same rows elsewhere, for a transcoder.
        seed: of the order.
        shuffle: see `BatchOptions`.
        epochs: times through the rows; None = without end.

    Raises:
        ValueError: the rows of the two readers are not the same ones.
    """

    def __init__(
        self,
        reader: RowReader,
        target: RowReader | None = None,
        *,
        seed: int = 0,
        shuffle: str = "rows",
        epochs: int | None = None,
    ) -> None:
        if target is not None and len(target) != len(reader):
            raise ValueError(
                f"{type(self).__name__}: expected the same rows at input and target, got "
                f"{len(reader)} and {len(target)}"
            )
        self.reader, self.target = reader, target
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.bad_rows = BadRows()

    @property
    def grid(self) -> dict[str, Tensor | None]:
        """Timesteps and sigmas by step, where known."""
        return {}

    def widths(self) -> tuple[int, int]:
        """Return d_in and d_out."""
        return self.reader.width, (self.target or self.reader).width

    def targeted(self) -> bool:
        """Return whether the rows have a target."""
        return self.target is not None

    def available(self, batch: int) -> int | None:
        """Return how many rows there are in whole batches; None = without end."""
        return None if self.epochs is None else self.epochs * (len(self.reader) // batch) * batch

    def normalisers(self, kind: str, *, centre: bool) -> tuple[Normaliser, Normaliser | None]:
        """Return normalisers from the statistics that the readers keep."""
        made = [
            fit(
                self._statistics(reader),
                kind if kind == "none" or _labelled(reader) else "global",
                centre=centre,
                **self.grid,
            )
            for reader in (self.reader, self.target)
            if reader is not None
        ]
        return made[0], made[1] if len(made) > 1 else None

    def _statistics(self, reader: RowReader) -> Statistics:
        """Return statistics of the good rows; counted here where bad ones are among the known.

        Raises:
            InputError: there are bad ones and they are not left out.
        """
        known = reader.statistics
        first = getattr(reader, "bad", BadFound(0, -1)).first
        whole = all(cell.finite() and cell.norm_max <= LARGEST for cell in known.cells.values())
        if first < 0 and whole:
            return known
        if self.bad_rows.policy == "error":
            first = _first_bad(reader) if first < 0 else first
            raise InputError(
                f"{type(self).__name__}: expected finite rows [and finite squares], got row "
                f"{first}: leave it out, or set on_bad_rows='skip'"
            )
        return known if whole else statistics_of(reader)

    def batches(self, batch: int, start: int, mesh: Mesh, device: torch.device) -> Iterator[Rows]:
        """Yield rows from batch number `start` on."""
        if len(self.reader) < batch:
            raise ValueError(
                f"{type(self).__name__}: expected at least {batch} rows [one batch], got "
                f"{len(self.reader)}"
            )
        options = BatchOptions(
            batch,
            seed=self.seed,
            shuffle=self.shuffle,
            epochs=self.epochs,
            labels=_labelled(self.reader),
            on_bad_rows=self.bad_rows.policy,
        )
        part = mesh.rows(batch) if mesh.data > 1 else None
        order = Batches(self.reader, options, device=device, target=self.target, part=part)
        epoch, place = divmod(start, len(order))
        order.load_state_dict({**order.state_dict(), "epoch": epoch, "position": place * batch})
        for got in order:
            self.bad_rows.skipped += got.skipped
            yield Rows(got.x, got.step, got.target)

    def identity(self) -> dict[str, Any]:
        """Return checksums of the rows, and their order."""
        parts = {"store": self.reader.fingerprint, "seed": self.seed, "shuffle": self.shuffle}
        return parts if self.target is None else {**parts, "target": self.target.fingerprint}

    def provenance(self) -> Provenance:
        """Return where the rows come from."""
        raise NotImplementedError


class StoreSource(ReaderSource):
    """Rows of a store in shuffled order, over and over.

    Args:
        store: the site of the input.
        target: the same rows at another site, for a transcoder.
        seed: of the order.
        shuffle: see `ActivationStore.batches`.
        epochs: times through the rows; None = without end.

    Raises:
        ValueError: the rows of the two stores are not the same ones.
    """

    def __init__(
        self,
        store: ActivationStore,
        target: ActivationStore | None = None,
        *,
        seed: int = 0,
        shuffle: str = "rows",
        epochs: int | None = None,
    ) -> None:
        super().__init__(store, target, seed=seed, shuffle=shuffle, epochs=epochs)
        self.store = store
        if target is not None:
            _same_labels(store, target)

    @property
    def grid(self) -> dict[str, Tensor | None]:
        """Timesteps and sigmas by step, where known."""
        return {"timesteps": self.store.timesteps, "sigmas": self.store.sigmas}

    def provenance(self) -> Provenance:
        """Return what the store says about itself."""
        known = self.store.provenance
        branches = sorted({branch for _, branch in self.store.statistics.cells})
        return Provenance(
            site=self.store.site,
            target_site=self.target.site if isinstance(self.target, ActivationStore) else "",
            model=str(known.get("model", "")),
            config_hash=str(known.get("config_hash", "")),
            branches=tuple(self.store.branches[number] for number in branches),
            source=Path(self.store.folder).name,
        )


class ArraySource(ReaderSource):
    """Rows of arrays or files in shuffled order, once or for some epochs.

    Args:
        reader: of the input, such as `sidechain.store.ArrayRows`.
        target: the same rows elsewhere, for a transcoder.
        seed: of the order.
        shuffle: see `BatchOptions`.
        epochs: times through the rows.
        origin: where they come from; None = the name of the rows.
    """

    def __init__(
        self,
        reader: RowReader,
        target: RowReader | None = None,
        *,
        seed: int = 0,
        shuffle: str = "rows",
        epochs: int = 1,
        origin: Provenance | None = None,
    ) -> None:
        super().__init__(reader, target, seed=seed, shuffle=shuffle, epochs=epochs)
        self._origin = origin or Provenance(source=str(getattr(reader, "name", "rows")))

    def provenance(self) -> Provenance:
        """Return where they come from."""
        return self._origin


def _first_bad(reader: RowReader) -> int:
    for numbers in torch.arange(len(reader)).split(1 << 14):
        stored = torch.empty(len(numbers), reader.row_bytes, dtype=torch.uint8)
        reader.gather(numbers.numpy(), stored.numpy())
        bad = bad_rows(decode(stored, reader.dtype, reader.width))
        if len(bad):
            return int(numbers[bad[0]])
    return -1


def _labelled(reader: RowReader) -> bool:
    """Return whether rows know their scheduler steps; those of a store do."""
    return bool(getattr(reader, "has_steps", True))


def _same_labels(store: ActivationStore, target: ActivationStore) -> None:
    for start in range(0, len(store), 1 << 20):
        rows = torch.arange(start, min(start + (1 << 20), len(store)))
        ours, theirs = store.labels(rows), target.labels(rows)
        if any(
            not torch.equal(a, b) for a, b in zip(_columns(ours), _columns(theirs), strict=True)
        ):
            raise ValueError(
                f"StoreSource: expected the same rows at {store.site} and {target.site}, got "
                f"other labels from row {start} on"
            )


def _columns(labels: Any) -> list[Tensor]:
    return [labels.step, labels.branch, labels.prompt, labels.token]
