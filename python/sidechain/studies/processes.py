# SPDX-License-Identifier: Apache-2.0
"""The processes that `torchrun` started, and how they share the parts of a run.

All see one run folder: each measures its share into files of its own, the first joins them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd
import torch.distributed as dist

from ..io.run_folder import RunFolder
from . import common

Item = TypeVar("Item")
PIECES = "pieces"


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Processes:
        """Join the others that `torchrun` started; one process outside of it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")  # nothing but turns and small values is exchanged
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, value: Item) -> Item:
        """Return the value of the first process."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box)
        found: Item = box[0]
        return found

    def open(self, make: Callable[[bool], RunFolder]) -> RunFolder:
        """Open a run folder, the first process before the others.

        Args:
            make: opens it; its argument says whether to lock it.
        """
        found = make(True) if self.first else None
        self.wait()
        return make(False) if found is None else found

    def device(self, name: str) -> str:
        """Return the device of this process: "cuda" alone is a GPU for each."""
        return (
            f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            if self.size > 1 and name == "cuda"
            else name
        )


def in_pieces(
    folder: RunFolder,
    processes: Processes,
    label: str,
    jobs: Sequence[Item],
    rows: int,
    measure: Callable[[Sequence[Item]], pd.DataFrame],
    progress: Any = None,
) -> pd.DataFrame:
    """Measure a part of a run, some jobs at a time, each time by one of the processes.

    A piece that is there is not measured again. Which jobs run together does not depend on the
    number of processes, so the table is the same.

    Args:
        folder: of the run.
        processes: all that work on it.
        label: of the part.
        jobs: what to measure.
        rows: jobs at a time.
        measure: makes the table of some jobs.
        progress: a bar that counts jobs.

    Returns:
        The table of all jobs, in their order, as it was written.
    """
    known = common.finished(folder, label)
    if known is not None:
        _count(progress, len(jobs))
        return known
    starts = range(0, len(jobs), rows)
    names = [f"{PIECES}/{label}.{start}-{min(start + rows, len(jobs))}" for start in starts]
    pieces = folder.path / "parts" / PIECES
    pieces.mkdir(exist_ok=True)
    for place in range(processes.rank, len(names), processes.size):
        if folder.part(names[place]) is None:
            chunk = jobs[starts[place] : starts[place] + rows]
            folder.save_part(names[place], measure(chunk))
        # The others are at the pieces that follow.
        _count(progress, len(jobs[starts[place] : starts[place] + rows * processes.size]))
    processes.wait()
    if processes.first:
        found = [folder.part(name) for name in names]
        folder.save_part(label, joined(dict(zip(names, found, strict=True))))
        for file in pieces.glob(f"{label}.*.csv"):
            file.unlink()
    processes.wait()
    return joined({label: common.finished(folder, label)})


def joined(tables: Mapping[str, pd.DataFrame | None]) -> pd.DataFrame:
    """Join the tables of a part, by name.

    Raises:
        RuntimeError: one of them is missing: its rows would be, without a word.
    """
    missing = [name for name, table in tables.items() if table is None]
    if missing:
        raise RuntimeError(f"studies: expected {missing[0]} in the run folder, got none")
    return pd.concat([t for t in tables.values() if t is not None], ignore_index=True)


def _count(progress: Any, jobs: int) -> None:
    if progress is not None:
        progress.update(jobs)
