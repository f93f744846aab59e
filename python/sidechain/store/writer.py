# SPDX-License-Identifier: Apache-2.0
"""ActivationWriter: a thread that turns rows into durable shards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..io.atomic import write_atomic
from ..io.lock import Lock
from .labels import BroadcastLabels, read_labels
from .manifest import DTYPES, MANIFEST, Manifest, SiteEntry, site_folder
from .options import Storage
from .queue import WriteQueue
from .transaction import Appender, TransactionBatch, check_facts, clean

MODES = ("create", "append", "resume")
LOCK = ".lock"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ActivationWriter:
    """Writes rows of activations into a store; see `manifest` for the files.

        with ActivationWriter("acts", {"cross:3": 160}) as writer:
            writer.write({"cross:3": rows}, step=4, branch="cond", prompt=17)

    `write` hands the rows to a thread and returns; memory is bounded by `Storage.queue_bytes`.
    What is written in one `transaction` (or one `write` outside of any) becomes part of the store
    as a whole or not at all, for all sites at once. Commits happen when a shard is full, every
    `Storage.commit_seconds`, in `flush` and in `close`: a crash loses what came after the last of
    them, nothing else.

    Args:
        folder: made if it is not there.
        sites: width C by name of the site.
        storage: dtype and sizes; None = those of `Storage()`.
        branches: names of the guidance branches.
        mode: "create" (refuses a store that is there), "append" (needs one), "resume" (either).
        provenance: kept in the manifest.

    Raises:
        TypeError, ValueError: options.
        FileExistsError, FileNotFoundError: the mode does not fit what is there.
        RuntimeError: another writer is at work in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        sites: Mapping[str, int],
        storage: Storage | None = None,
        *,
        branches: Sequence[str] = ("cond", "uncond"),
        mode: str = "create",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        storage = storage or Storage()
        wanted = _manifest(sites, storage.dtype, branches, provenance)
        if mode not in MODES:
            raise ValueError(f"store: expected mode to be one of {', '.join(MODES)}, got {mode!r}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder / LOCK, "store: expected to be the only writer of a folder")
        try:
            manifest = _open(self.folder, wanted, mode)
            self._appender = Appender(self.folder, manifest, storage)
        except BaseException:
            self._lock.release()
            raise
        self.dtype = storage.dtype
        self.branches = tuple(branches)
        self.sites = dict(sites)
        self._queue = WriteQueue(storage.queue_bytes, batch_bytes=storage.shard_bytes)
        self._inside = False
        self._grid: Any = None
        self._failure: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sidechain-store", daemon=True)
        self._thread.start()

    # -- in the caller's thread ------------------------------------------------------------------

    @property
    def cursor(self) -> int:
        """The `cursor` of the last transaction that was committed: where to go on after a crash."""
        return self._appender.manifest.cursor

    @property
    def rows(self) -> dict[str, int]:
        """Committed rows by site."""
        return {name: site.rows for name, site in self._appender.manifest.sites.items()}

    @property
    def peak_bytes(self) -> int:
        """Most bytes of rows that ever waited in memory."""
        return self._queue.peak_bytes

    def set_grid(self, timesteps: ArrayLike, sigmas: ArrayLike | None = None) -> None:
        """Set the timestep and noise level of every step number, [S] each.

        Raises:
            ValueError: the store has another grid.
        """
        times = np.asarray(timesteps, dtype=np.float64).tolist()
        noise = None if sigmas is None else np.asarray(sigmas, dtype=np.float64).tolist()
        if (times, noise) != self._grid:
            self._ask(lambda: self._appender.set_grid(times, noise))
            self._grid = (times, noise)

    def set_prompts(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Keep what the numbers of the `prompt` column stand for."""
        self._ask(lambda: self._appender.set_prompts(prompts, seeds))

    def write(
        self,
        rows: Mapping[str, Tensor],
        *,
        step: int | ArrayLike = 0,
        branch: str | int | ArrayLike = 0,
        prompt: int | ArrayLike = -1,
        token: ArrayLike | None = None,
        copy: bool = True,
        ready: Callable[[], None] | None = None,
    ) -> None:
        """Add rows of one or several sites.

        Args:
            rows: [n, C] by site, float32 | float16 | bfloat16, any device; C of the site.
            step: of all rows or of each [n].
            branch: name or number, of all rows or of each [n].
            prompt: number, of all rows or of each [n]; -1 where it is not known.
            token: number of each row within its sample. None = 0, 1, ..., n - 1.
            copy: False hands the tensors over: they must not be written again.
            ready: called before the rows are looked at; waits for a copy that is still under way.
                Such rows must be on the CPU, in the dtype of the store, and handed over.

        Raises:
            TypeError, ValueError: rows or labels that do not fit.
            RuntimeError: the writer is closed.
            OSError: the writer thread has failed, for example on a full disk.
        """
        self._check_open()
        self._check_rows(rows)
        branch = self._branch_number(branch)
        packed: dict[str, tuple[Tensor, BroadcastLabels]] = {}
        target = torch.float32 if self.dtype == torch.int8 else self.dtype
        for site, tensor in rows.items():
            labels = read_labels(len(tensor), step, branch, prompt, token)
            packed[site] = (tensor.detach().to("cpu", target, copy=copy).contiguous(), labels)
        self._queue.put_rows(packed, ready)
        if not self._inside:
            self._queue.put(("end", None), urgent=False)

    @contextlib.contextmanager
    def transaction(self, cursor: int | None = None) -> Iterator[None]:
        """Write several times, all or nothing; an exception inside forgets all these rows.

        Args:
            cursor: what `ActivationWriter.cursor` says once this transaction is committed.
        """
        self._check_open()
        if self._inside:
            raise RuntimeError("store: expected no transaction inside of a transaction, got one")
        self._inside = True
        try:
            yield
        except BaseException:
            self._queue.put(("rollback", None))
            raise
        else:
            self._queue.put(("end", cursor), urgent=False)
        finally:
            self._inside = False

    def flush(self) -> None:
        """Wait until everything is written, and commit it."""
        self._ask(self._appender.commit)

    def close(self) -> None:
        """Commit what is complete and end the thread.

        Raises:
            OSError, ValueError: an error of the thread that was not raised before.
        """
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            with contextlib.suppress(BaseException):
                self._queue.put(("close", None))
        self._thread.join()
        self._lock.release()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(Exception):
                self.close()

    # -- checks ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("store: expected an open writer, got a closed one")

    def _check_rows(self, rows: Mapping[str, Tensor]) -> None:
        if not isinstance(rows, Mapping) or not rows:
            raise TypeError(f"store: expected rows as {{site: tensor}}, got {type(rows).__name__}")
        for site, tensor in rows.items():
            if site not in self.sites:
                raise ValueError(f"store: expected a site of {list(self.sites)}, got {site!r}")
            if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(
                    f"store: expected float32 | float16 | bfloat16 rows at {site}, got {got}"
                )
            if tensor.dtype == torch.int8:
                raise TypeError(f"store: expected float rows at {site}, got torch.int8")
            if tensor.dim() != 2 or tensor.shape[1] != self.sites[site]:
                raise ValueError(
                    f"store: expected rows [n, {self.sites[site]}] at {site}, got "
                    f"{list(tensor.shape)}"
                )

    def _branch_number(self, branch: Any) -> Any:
        if isinstance(branch, str):
            if branch not in self.branches:
                raise ValueError(
                    f"store: expected branch to be one of {', '.join(self.branches)}, got "
                    f"{branch!r}"
                )
            return self.branches.index(branch)
        if np.any(np.asarray(branch) >= len(self.branches)):
            raise ValueError(
                f"store: expected branch within [0, {len(self.branches)}), got {branch!r}"
            )
        return branch

    # -- in the writer thread -------------------------------------------------------------------

    def _ask(self, question: Any) -> None:
        """Have the thread run a function after what is queued, and wait for it."""
        self._check_open()
        answer = _Answer(question)
        self._queue.put(("ask", answer))
        while not answer.ready.wait(0.2):
            if not self._thread.is_alive():
                raise self._failure or RuntimeError("store: the writer thread has ended")
        if answer.error is not None:
            raise answer.error

    def _run(self) -> None:
        batch = TransactionBatch(self._appender)
        try:
            while True:
                for kind, content in self._queue.get():
                    if kind in ("rows", "end"):
                        batch.add(kind, content)
                        continue
                    batch.flush()
                    if kind == "ask":
                        content.run()
                    else:
                        self._appender.rollback()
                        batch.forget()
                    if kind == "close":
                        self._appender.commit()
                        return
                batch.flush()
                self._queue.done()
        except BaseException as error:
            self._failure = self._salvage(error)
            self._queue.fail(self._failure)

    def _salvage(self, error: BaseException) -> BaseException:
        """Keep the complete transactions if that is still possible; say what is intact."""
        try:
            self._appender.rollback()
            self._appender.commit()
        except BaseException:
            with contextlib.suppress(OSError):
                self._appender.abandon()
        if not isinstance(error, OSError) or error.errno is None:
            return error
        kept = Manifest.read(self.folder)
        rows = ", ".join(f"{site.rows} rows of {name}" for name, site in kept.sites.items())
        return OSError(
            error.errno,
            f"{error.strerror}; {rows} are intact, continue with mode='resume'",
            str(self.folder),
        )


class _Answer:
    def __init__(self, question: Any) -> None:
        self.question = question
        self.ready = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.question()
        except ValueError as error:
            self.error = error  # an answer to bad input; the thread goes on
        finally:
            self.ready.set()


def _manifest(
    sites: Mapping[str, int],
    dtype: torch.dtype,
    branches: Sequence[str],
    provenance: Mapping[str, Any] | None,
) -> Manifest:
    if not isinstance(sites, Mapping) or not sites:
        raise TypeError(f"store: expected sites as {{name: width}}, got {sites!r}")
    for name, width in sites.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"store: expected a width >= 1 of {name}, got {width!r}")
    folders = {name: site_folder(name) for name in sites}
    if len(set(folders.values())) != len(folders):
        raise ValueError(f"store: expected sites with different folder names, got {folders}")
    entries = {name: SiteEntry(width, folders[name]) for name, width in sites.items()}
    if not branches or len(branches) > 255:
        raise ValueError(f"store: expected 1 to 255 branches, got {len(branches)}")
    return Manifest(_NAMES[dtype], entries, list(branches), provenance=dict(provenance or {}))


def _open(folder: Path, wanted: Manifest, mode: str) -> Manifest:
    there = (folder / MANIFEST).exists()
    if mode == "create" and there:
        raise FileExistsError(
            f"store: expected a folder without a store [mode='create'], got {folder}"
        )
    if mode == "append" and not there:
        raise FileNotFoundError(f"store: expected a store [mode='append'], got none in {folder}")
    if not there:
        clean(folder, None)
        lost = next(folder.glob("*/[0-9]*.rows"), None)
        if lost is not None:
            raise FileExistsError(
                f"store: expected {MANIFEST} beside the shards in {folder}, got {lost.name} without"
            )
        write_atomic(folder / MANIFEST, wanted.to_json().encode())
        return wanted
    found = Manifest.read(folder)
    check_facts(found, wanted, folder)
    clean(folder, found)
    return found
