# SPDX-License-Identifier: Apache-2.0
"""Training rows from a running pipeline, of which one buffer at a time is kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._device import send
from ..._errors import InputError
from ...io.same import fingerprint
from ...pipelines import SitePattern, config_hash
from ...pipelines import sites as list_sites
from ...pipelines.generate import generate, model_name, quiet_settings
from ...store import Permutation, Statistics
from ...store.arrays import add_good
from ...taps.options import Where
from ...taps.stream import StepRows, StreamTap
from ..config import Provenance
from ..initialise import mix
from ..normaliser import Normaliser
from .bad_rows import BadRows, find
from .fitting import fit
from .mesh import Mesh
from .rows import Rows, join, selected
from .run_record import SUMMARY


class PipelineSource:
    """Rows of a site while a pipeline generates.

    Calls fill a buffer, which is shuffled and used up before the next calls. Which prompts and
    which noise a call gets is a function of the seed and its number, so a run that continues
    generates the buffer it was in again and goes on in it. In a mesh every slice of the rows comes
    from calls of its own.

    Args:
        pipe: diffusers pipeline.
        where: one site; branches, steps and a slice of its tokens that become rows.
        prompts: drawn without replacement, over and over.
        target: another site, for a transcoder.
        every: N keeps every Nth of the steps.
        buffer: least number of rows that are shuffled together.
        batch_size: prompts in one call.
        seed: of prompts, noise and order.
        **call: arguments of every pipeline call (num_inference_steps, guidance_scale, ...).

    Raises:
        ValueError: no prompts, or a pattern that names another number of sites than one.
    """

    def __init__(
        self,
        pipe: Any,
        where: Where | SitePattern,
        prompts: Sequence[str],
        *,
        target: SitePattern | None = None,
        every: int = 1,
        buffer: int = 1 << 18,
        batch_size: int = 8,
        seed: int = 0,
        **call: Any,
    ) -> None:
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"PipelineSource: expected a list of prompts, got {prompts!r}")
        self._pipe, self._prompts = pipe, list(prompts)
        where = Where.of(where)
        site = "*" if where.sites is None else where.sites
        patterns = [site] if target is None else [site, target]
        self._sites = [_one_site(pipe, pattern) for pattern in patterns]
        self._settings = quiet_settings("PipelineSource", pipe, call)
        self._buffer, self._batch_size, self._seed = buffer, batch_size, seed
        self._branches = where.branches or "cond"
        self._found: list[StepRows] = []
        both = replace(where, sites=list({s.name: s.alias for s in self._sites}.values()))
        self._tap = StreamTap(pipe, both, every, torch.float32, self._found.append)
        self._first: Rows | None = None
        self.bad_rows = BadRows()
        self._facts: dict[str, Any] = {
            "prompts": len(self._prompts),
            "prompts_digest": fingerprint(prompts=self._prompts),
            "sites": [s.alias for s in self._sites],
            "model": model_name(pipe),
            "config_hash": config_hash(pipe),
            "buffer": buffer,
            "batch_size": batch_size,
            # "passes": as checkpoints of every version call the branches.
            "passes": self._branches,
            "steps": where.steps,
            "every": every,
            "tokens": str(where.tokens),
            "seed": seed,
            "call": {k: v for k, v in call.items() if isinstance(v, str | int | float | None)},
        }

    def widths(self) -> tuple[int, int]:
        """Return d_in and d_out."""
        return self._sites[0].width, self._sites[-1].width

    def normalisers(self, kind: str, *, centre: bool) -> tuple[Normaliser, Normaliser | None]:
        """Return normalisers fitted to the first buffer."""
        rows = self._fill(0, 0, 1)
        run = self._found_run
        grid = {"timesteps": run.timesteps.cpu(), "sigmas": run.sigmas}
        made: list[Normaliser | None] = [None, None]
        for place, x in enumerate((rows.x, rows.target)):
            if x is not None:
                statistics = Statistics(x.shape[1])
                add_good(statistics, x, rows.step)
                made[place] = fit(statistics, kind, centre=centre, **grid)
        return made[0] or Normaliser.identity(rows.x.shape[1]), made[1]

    def batches(self, batch: int, start: int, mesh: Mesh, device: torch.device) -> Iterator[Rows]:
        """Yield this process's rows from batch number `start` on."""
        first, last = mesh.rows(batch)
        own = last - first
        each = self._calls_per_fill(mesh.data) * self._rows_per_call // own
        if not each:
            raise ValueError(
                f"PipelineSource: expected a buffer of at least {own} rows [one batch], got "
                f"{self._buffer}"
            )
        for number in itertools.count(start // each):
            rows, skipped = self._good(self._fill(number, mesh.data_rank, mesh.data), number)
            order = Permutation(len(rows.x), self._seed, number)
            begin = start % each if number == start // each else 0
            if not begin:  # a run that goes on in a buffer has counted its rows before
                self.bad_rows.skipped += skipped
            for place in range(begin, each):
                chosen = order(np.arange(place * own, (place + 1) * own))
                yield _pick(rows, torch.from_numpy(chosen), device)

    def identity(self) -> dict[str, Any]:
        """Return what decides the rows, and a summary of the first call's.

        Weights are not compared: other ones of the same configuration give other rows. The summary
        is compared up to the rounding of another device.
        """
        return {**self._facts, SUMMARY: self._summary()}

    def _summary(self) -> list[float]:
        """Return mean, root mean square and largest norm of the rows of the first call."""
        if self._first is None:
            self._first = self._call(0)
        parts = [t for t in (self._first.x, self._first.target) if t is not None]
        found = [
            [x.mean(), x.square().mean().sqrt(), x.norm(dim=1).amax()]
            for x in (part.double() for part in parts)
        ]
        return [float(value) for row in found for value in row]

    def provenance(self) -> Provenance:
        """Return site, model and branches."""
        return Provenance(
            site=self._sites[0].alias,
            target_site=self._sites[1].alias if len(self._sites) > 1 else "",
            model=self._facts["model"],
            config_hash=self._facts["config_hash"],
            branches=(self._branches,),
            source="generation",
        )

    @property
    def _rows_per_call(self) -> int:
        if self._first is None:
            self._first = self._call(0)
        return len(self._first.x)

    def _calls_per_fill(self, parts: int) -> int:
        """Return how many calls each of `parts` processes makes for one buffer."""
        return max(1, -(-self._buffer // (self._rows_per_call * parts)))

    def targeted(self) -> bool:
        """Return whether the rows have a target."""
        return len(self._sites) > 1

    def available(self, batch: int) -> int | None:
        """Return None: the pipeline generates without end."""
        return None

    def _good(self, rows: Rows, number: int) -> tuple[Rows, int]:
        """Return the rows of a buffer, good ones in the place of bad ones, and how many those were.

        The number of rows stays: it says which buffer a batch is in.
        """
        bad = find(rows)
        if not len(bad):
            return rows, 0
        step = None if rows.step is None else int(rows.step[bad[0]])
        keep = torch.ones(len(rows.x), dtype=torch.bool)
        keep[bad.cpu()] = False
        good = keep.nonzero()[:, 0]
        if self.bad_rows.policy == "error" or not len(good):
            raise InputError(
                f"PipelineSource: expected finite rows [and finite squares], got {len(bad)} others "
                f"among {len(rows.x)} of buffer {number}, the first at scheduler step {step} (row "
                f"{int(bad[0])}): half precision that overflows?"
            )
        place = torch.arange(len(rows.x))
        place[bad.cpu()] = good[torch.arange(len(bad)) % len(good)]
        return selected(rows, place.to(rows.x.device)), len(bad)

    def _fill(self, number: int, part: int, parts: int) -> Rows:
        calls = self._calls_per_fill(parts)
        known = self._first if number == 0 and part == 0 else None
        made = [] if known is None else [known]
        for place in range(len(made), calls):
            made.append(self._call((number * calls + place) * parts + part))
        return join(made)

    def _call(self, number: int) -> Rows:
        """Generate call `number` and return its rows, ordered by step."""
        total = len(self._prompts)
        numbers = range(number * self._batch_size, (number + 1) * self._batch_size)
        chosen = [
            self._prompts[int(Permutation(total, self._seed, i // total)(np.array([i % total]))[0])]
            for i in numbers
        ]
        self._found.clear()
        with self._tap:
            generate(self._pipe, chosen, [mix(self._seed, 3, i) for i in numbers], self._settings)
            self._tap.end()
        for found in self._found:
            if found.ready is not None:
                found.ready()
        self._found_run = self._found[0].generation
        step = torch.cat(
            [torch.full((len(f.rows[self._sites[0].alias]),), f.step) for f in self._found]
        )
        x, *target = (torch.cat([f.rows[s.alias] for f in self._found]) for s in self._sites)
        self._found.clear()
        return Rows(x, step, target[0] if target else None)


def _one_site(pipe: Any, pattern: SitePattern) -> Any:
    found = list_sites(pipe, pattern)
    if len(found) != 1:
        raise ValueError(
            f"PipelineSource: expected one site, got {len(found)} for {pattern!r}: "
            f"{', '.join(s.alias for s in found)}"
        )
    return found[0]


def _pick(rows: Rows, chosen: Tensor, device: torch.device) -> Rows:
    return Rows(*(None if t is None else send(t, device) for t in selected(rows, chosen)))  # type: ignore[arg-type]
