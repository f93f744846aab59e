# SPDX-License-Identifier: Apache-2.0
"""Sources of training rows: a store, or any iterable of tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..._device import send
from ...store import ActivationStore, RunningStatistics, Statistics
from ..config import Provenance
from ..normaliser import Normaliser
from .checks import check_varying
from .mesh import Mesh
from .state import Rows

Item = Tensor | Rows | tuple[Tensor, ...]
#: Rows that an iterable is asked for to fit the normaliser.
CALIBRATION = 1 << 16


class Source(Protocol):
    """Rows in an order that is the same every time, from any batch on."""

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


class StoreSource:
    """Rows of a store in shuffled order, over and over.

    Args:
        store: the site of the input.
        target: the same rows at another site, for a transcoder.
        seed: of the order.
        shuffle: see `ActivationStore.batches`.

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
    ) -> None:
        self.store, self.target = store, target
        self.seed, self.shuffle = seed, shuffle
        if target is not None:
            _same_rows(store, target)

    def widths(self) -> tuple[int, int]:
        """Return d_in and d_out."""
        return self.store.width, (self.target or self.store).width

    def normalisers(self, kind: str, *, centre: bool) -> tuple[Normaliser, Normaliser | None]:
        """Return normalisers from the statistics that the store keeps."""
        own = _from_store(self.store, kind, centre)
        return own, None if self.target is None else _from_store(self.target, kind, centre)

    def batches(self, batch: int, start: int, mesh: Mesh, device: torch.device) -> Iterator[Rows]:
        """Yield rows from batch number `start` on."""
        if len(self.store) < batch:
            raise ValueError(
                f"StoreSource: expected at least {batch} rows [one batch] in the store, got "
                f"{len(self.store)}"
            )
        order = self.store.batches(
            batch,
            seed=self.seed,
            shuffle=self.shuffle,
            epochs=None,
            labels=True,
            device=device,
            target=self.target,
            part=mesh.rows(batch) if mesh.data > 1 else None,
        )
        epoch, place = divmod(start, len(order))
        order.load_state_dict({**order.state_dict(), "epoch": epoch, "position": place * batch})
        for got in order:
            yield Rows(got.x, got.step, got.target)

    def identity(self) -> dict[str, Any]:
        """Return checksums of the rows, and their order."""
        parts = {"store": self.store.fingerprint, "seed": self.seed, "shuffle": self.shuffle}
        return parts if self.target is None else {**parts, "target": self.target.fingerprint}

    def provenance(self) -> Provenance:
        """Return what the store says about itself."""
        known = self.store.provenance
        branches = sorted({branch for _, branch in self.store.statistics.cells})
        return Provenance(
            site=self.store.site,
            target_site="" if self.target is None else self.target.site,
            model=str(known.get("model", "")),
            config_hash=str(known.get("config_hash", "")),
            branches=tuple(self.store.branches[number] for number in branches),
            source=Path(self.store.folder).name,
        )


class IterableSource:
    """Rows of anything that yields tensors, in the order it yields them.

    Args:
        items: a list or another iterable that can be gone through again, a function that returns a
            fresh iterator, or an iterator. Each item is a tensor [..., d], a pair (x, step) or
            `Rows`. A run that continues passes over the rows it has seen, so the items have to
            come in the same order. In a mesh every process gets all rows and takes its slice.
        name: for the provenance.
    """

    def __init__(
        self, items: Iterable[Item] | Callable[[], Iterable[Item]], *, name: str = "iterable"
    ) -> None:
        self._items, self.name = items, name
        self._seen: list[Rows] = []  # what was read for calibration from an iterator

    def widths(self) -> tuple[int, int]:
        """Return d_in and d_out of the first item."""
        first = next(self._fresh(), None)
        if first is None:
            raise ValueError("IterableSource: expected at least one item, got none")
        if isinstance(self._items, Iterator):
            self._seen.insert(0, first)
        return first.x.shape[1], (first.x if first.target is None else first.target).shape[1]

    def normalisers(self, kind: str, *, centre: bool) -> tuple[Normaliser, Normaliser | None]:
        """Return normalisers fitted to the first rows."""
        d_in, d_out = self.widths()
        own, other = Statistics(d_in), Statistics(d_out)
        count, labelled, aimed = 0, False, False
        keep: list[Rows] = []
        for item in self._fresh():
            keep.append(item)
            labelled, aimed = item.step is not None, item.target is not None
            count_rows(own, item.x, item.step)
            if item.target is not None:
                count_rows(other, item.target, item.step)
            count += len(item.x)
            if count >= CALIBRATION or kind == "none":
                break
        if isinstance(self._items, Iterator):
            self._seen = keep
        found = [
            fit(statistics, kind if labelled or kind == "none" else "global", centre=centre)
            for statistics in (own, other)[: 2 if aimed else 1]
        ]
        return found[0], found[1] if aimed else None

    def batches(self, batch: int, start: int, mesh: Mesh, device: torch.device) -> Iterator[Rows]:
        """Yield rows from batch number `start` on."""
        first, last = mesh.rows(batch)
        for rows in regroup(self._fresh(), batch, start * batch):
            yield Rows(*(None if t is None else send(t[first:last], device) for t in rows))  # type: ignore[arg-type]

    def _fresh(self) -> Iterator[Rows]:
        if callable(self._items):
            items: Iterable[Item] = self._items()
        elif isinstance(self._items, Iterator):
            seen, self._seen = self._seen, []
            items = itertools.chain(seen, self._items)
        else:
            items = self._items
        return (as_rows(item) for item in items)

    def identity(self) -> dict[str, Any]:
        """Return its name; what it yields cannot be checked."""
        return {"iterable": self.name}

    def provenance(self) -> Provenance:
        """Return its name."""
        return Provenance(source=self.name)


def as_rows(item: Item) -> Rows:
    """Return rows [n, d] of a tensor [..., d], of (x, step) or of `Rows`.

    Raises:
        TypeError: something else.
        ValueError: steps or targets that do not fit the rows.
    """
    x, step, target = (*item, None, None)[:3] if isinstance(item, tuple) else (item, None, None)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"IterableSource: expected float tensors [..., d], got {got}")
    flat = x.reshape(-1, x.shape[-1])
    if step is not None:
        step = torch.as_tensor(step)
        step = step.expand(len(flat)) if step.dim() == 0 else step.reshape(-1)
        if len(step) != len(flat):
            raise ValueError(
                f"IterableSource: expected {len(flat)} steps [rows of x], got {len(step)}"
            )
    if target is not None:
        target = target.reshape(-1, target.shape[-1])
        if len(target) != len(flat):
            raise ValueError(
                f"IterableSource: expected {len(flat)} target rows [rows of x], got {len(target)}"
            )
    return Rows(flat, step, target)


def regroup(items: Iterable[Rows], batch: int, skip: int) -> Iterator[Rows]:
    """Yield batches of exactly `batch` rows, after passing over `skip` rows; the rest is lost."""
    held: list[Rows] = []
    count = 0
    for item in items:
        if skip >= len(item.x):
            skip -= len(item.x)
            continue
        held.append(_slice(item, skip, len(item.x)))
        count += len(item.x) - skip
        skip = 0
        while count >= batch:
            whole = join(held)
            yield _slice(whole, 0, batch)
            held, count = [_slice(whole, batch, count)], count - batch


def fit(statistics: Statistics, kind: str, *, centre: bool, **grid: Any) -> Normaliser:
    """Return a normaliser after which rows have mean 0 and E |y|^2 = d.

    Args:
        statistics: of the rows.
        kind: "step", "global" or "none".
        centre: subtract the mean; otherwise only scale.
        **grid: timesteps and sigmas by step, where known.

    Raises:
        InputError: rows that do not vary.
    """
    check_varying(statistics, kind)
    if kind == "none":
        return Normaliser.identity(statistics.width)
    steps = sorted({step for step, _ in statistics.cells})
    if kind == "global" or not steps:
        mean, scale = _table(statistics.total(), centre)
        return Normaliser(mean[None], scale[None])
    tables = [_table(statistics.total([step]), centre) for step in steps]
    known = {n: None if t is None else t[steps] for n, t in grid.items()}
    return Normaliser(
        torch.stack([m for m, _ in tables]),
        torch.stack([s for _, s in tables]),
        torch.tensor(steps),
        **known,
    )


def _table(known: RunningStatistics, centre: bool) -> tuple[Tensor, Tensor]:
    if centre:
        return known.mean.float(), torch.tensor(known.scale)
    second = known.norm_squares / max(1, known.count) / len(known.mean)
    return torch.zeros(len(known.mean)), torch.tensor(second**0.5 or 1.0)


def _from_store(store: ActivationStore, kind: str, centre: bool) -> Normaliser:
    return fit(
        store.statistics, kind, centre=centre, timesteps=store.timesteps, sigmas=store.sigmas
    )


def _same_rows(store: ActivationStore, target: ActivationStore) -> None:
    if len(store) != len(target):
        raise ValueError(
            f"StoreSource: expected the same rows at {store.site} and {target.site}, got "
            f"{len(store)} and {len(target)}"
        )
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


def count_rows(statistics: Statistics, x: Tensor, step: Tensor | None) -> None:
    """Add rows [n, d] with steps [n] to statistics."""
    x = x.detach().cpu()
    if step is None:
        statistics.at((0, 0)).add(x)
        return
    for number in step.unique().tolist():
        statistics.at((number, 0)).add(x[step.cpu() == number])


def _slice(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(*(None if t is None else t[start:stop] for t in rows))  # type: ignore[arg-type]


def join(held: list[Rows]) -> Rows:
    """Return the rows of several one after the other."""
    if len(held) == 1:
        return held[0]
    columns = zip(*held, strict=True)
    return Rows(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]
