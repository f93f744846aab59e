# SPDX-License-Identifier: Apache-2.0
"""steer: add directions to what sites put out, per sample, step and guidance branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._device import send
from ..ops import Steering
from ..pipelines import (
    Generation,
    Site,
    SiteList,
    SitePattern,
)
from . import options
from .base import Tap
from .layout import expect
from .live import live_generation
from .operations import Add, Operation
from .options import BRANCHES, Where, placed, reuse
from .vector_table import Vector, VectorLike, VectorTable

# mode -> for each guidance branch, the branch whose vector it gets
MODES: dict[str, dict[str, str]] = {
    "cond_only": {"cond": "cond"},
    "uncond_only": {"uncond": "uncond"},
    "both_cond": {"cond": "cond", "uncond": "cond"},
    "both_uncond": {"cond": "uncond", "uncond": "uncond"},
    "separate": {"cond": "cond", "uncond": "uncond"},
    "uncond_for_cond": {"cond": "uncond"},
}
# What the words of a capture mean here.
_OWN: dict[str | None, str] = {
    None: "cond_only", "cond": "cond_only", "uncond": "uncond_only", "all": "separate"
}  # fmt: skip


class Steer(Tap):
    """Directions added at sites; made by `steer`. `strength`, `removal` and `which` can be set."""

    name = "steer"

    def __init__(
        self,
        pipe: Any,
        tables: list[VectorTable],
        chosen: SiteList,
        where: Where,
        renorm: bool,
    ) -> None:
        mode = _OWN.get(where.branches, where.branches)
        if mode not in MODES:
            raise ValueError(
                f"steer: expected branches to be one of {', '.join(MODES)}, got {mode!r}"
            )
        super().__init__(pipe, chosen, where.steps)
        self.mode: str = mode
        self.renorm = bool(renorm)
        self._tokens = options.parse_tokens("steer", where.tokens)
        self._tables = tables
        # Branches whose vectors are needed, in the order of the table rows of each vector.
        self._sources = tuple(b for b in BRANCHES if b in MODES[mode].values())
        for table in tables:
            for site in chosen:
                for branch in self._sources:
                    table.at(site, branch)
        self._strength = self._removal = torch.zeros(1)
        self._given: dict[str, Tensor] = {}  # strength and removal that a gradient is wanted for
        self._which: Tensor | None = None
        self._steps_of_table = 1
        self._slot: Tensor | None = None
        self._call = 0  # denoiser call of the step that the index is for
        self._indices: list[Tensor] = []  # of each call
        self._row_buffers: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        self._mask: Tensor | None = None  # [1 | R, T]
        self._built_for: tuple[Tensor, Tensor | None] | None = None

    # -- what can be changed while the tap is in place ------------------------------------------

    @property
    def strength(self) -> Tensor:
        """Strength of each sample, [1] or [B]; set it to a number or to [B] numbers.

        A tensor that needs a gradient stays the one that was given.
        """
        return self._given.get("strength", self._strength)

    @strength.setter
    def strength(self, value: Any) -> None:
        self._strength = self._changed("strength", value, torch.float32)

    @property
    def removal(self) -> Tensor:
        """Share of the projection to take away for each sample, [1] or [B]."""
        return self._given.get("removal", self._removal)

    @removal.setter
    def removal(self, value: Any) -> None:
        self._removal = self._changed("removal", value, torch.float32)
        if self._tracker is not None and "removal" not in self._row_buffers:
            self._tracker.invalidate()  # the kernel has to be told about one buffer more

    @property
    def which(self) -> Tensor | None:
        """Number of the vector of each sample, -1 for none; None = the only one."""
        return self._which

    @which.setter
    def which(self, value: Any) -> None:
        if value is None:
            if len(self._tables) > 1:
                raise ValueError(
                    f"steer: expected which, the vector of each sample [{len(self._tables)} "
                    "vectors given; add vectors up or nest steers to apply several at once], got "
                    "None"
                )
            self._which = None
            self._refill_index()
            return
        read = self._changed("which", value, torch.int64)
        count = len(self._tables)
        if int(read.min()) < -1 or int(read.max()) >= count:
            raise ValueError(
                f"steer: expected which within [-1, {count}) [{count} vectors], got {read.tolist()}"
            )
        self._which = read
        self._refill_index()

    def _changed(self, option: str, value: Any, dtype: torch.dtype) -> Tensor:
        """Read an option; while a generation is under way, fill its buffer at once."""
        trained = isinstance(value, Tensor) and value.requires_grad and dtype.is_floating_point
        plain = value.detach() if trained else value
        read = options.per_sample("steer", option, plain, dtype)
        generation = live_generation(self)
        if generation is not None:
            rows = options.for_rows("steer", option, read, generation)
            if option in self._row_buffers:
                self.tracker.touch()
                with torch.inference_mode(False), torch.no_grad():
                    self._row_buffers[option].copy_(rows)
        self._given.pop(option, None)
        if trained:
            self._given[option] = value
        return read

    def _refill_index(self) -> None:
        generation = live_generation(self)
        if generation is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._fill("index", generation)

    # -- following the generation -------------------------------------------------------------

    def _operations_at(self, site: Site) -> list[Operation]:
        return [Add()]

    def _bind(self, generation: Generation) -> tuple[str, ...]:
        targets = MODES[self.mode]
        touched = tuple(b for b in generation.branches if b in targets)
        if not touched and not generation.elsewhere & targets.keys():
            raise ValueError(
                f"steer: expected a generation with the {' or '.join(targets)} branch [branches="
                f"{self.mode!r}], got branches {list(generation.branches)} [guidance off?]"
            )
        device = generation.shape.device
        if self._slot is None or self._slot.device != device:
            self._slot = torch.full((1,), -1, dtype=torch.int64, device=device)
        self._build_tables(generation)
        self._call = 0
        for option in ("strength", "removal", "index"):
            self._fill(option, generation)
        mask = self._token_mask(generation)
        for site in self.sites:
            (operation,) = self._operations[site.name]
            if isinstance(operation, Add):
                expect([operation], site, generation)
                operation.tokens = None if isinstance(self._tokens, Tensor) else self._tokens
                operation.active = self._block(generation, touched)
                operation.buffers = Steering(
                    self._vectors[site.name],
                    slot=self._slot,
                    mask=mask,
                    renorm=self.renorm,
                    **self._row_buffers,
                )
        return touched

    def _token_mask(self, generation: Generation) -> Tensor | None:
        if not isinstance(self._tokens, Tensor):
            for site in self.sites:
                options.count_tokens("steer", self._tokens, site, generation)
            return None
        mask = options.token_mask("steer", self._tokens, self.sites, generation)
        mask = send(mask, generation.shape.device)
        mask = mask if mask.shape[0] == 1 else mask[generation.sample_of_row]
        self._mask = reuse(self._mask, mask)
        return self._mask

    def _fill(self, option: str, generation: Generation) -> None:
        old = self._row_buffers.get(option)
        if option == "index":
            self._indices = [self._index(generation, n) for n in range(len(generation.calls))]
            new = self._indices[self._call]
        else:
            value = self._strength if option == "strength" else self._removal
            if option in self._given:
                value = self._given[option].detach().reshape(-1).float()
            elif option == "removal" and old is None and not bool(value.any()):
                return  # without removal the kernel needs no dot products
            new = options.for_rows("steer", option, value, generation)
        self._row_buffers[option] = reuse(old, new)

    def _index(self, generation: Generation, call: int) -> Tensor:
        """Row of the table for each row of a denoiser call, [R] int32, -1 for none."""
        targets = MODES[self.mode]
        which = torch.zeros(1, dtype=torch.int64) if self._which is None else self._which
        vector = options.for_rows("steer", "which", which, generation)
        known = generation.branches
        place = [self._sources.index(targets[b]) if b in targets else -1 for b in known]
        branch = torch.tensor(place, device=vector.device)[generation.branch_of_row(call)]
        index = vector * len(self._sources) + branch
        return torch.where((vector < 0) | (branch < 0), -1, index).to(torch.int32)

    def _build_tables(self, generation: Generation) -> None:
        """Stack the vectors of each site to [V x branches, S, C] on the grid of the generation."""
        grid = (generation.timesteps, generation.sigmas)
        fresh = any(table.trained for table in self._tables)
        if not fresh and self._built_for is not None and _same(self._built_for, grid):
            self._vectors = {k: v.to(generation.shape.device) for k, v in self._vectors.items()}
            return
        self._steps_of_table = 1 if all(t.steps == 1 for t in self._tables) else generation.steps
        for site in self.sites:
            stacked = self._stacked(site, generation).float()
            self._vectors[site.name] = reuse(self._vectors.get(site.name), stacked)
        self._built_for = grid

    def _stacked(self, site: Site, generation: Generation) -> Tensor:
        """Return the vectors of a site [V x branches, S, C], float64 if one of them is."""
        rows = [
            table.on_grid(table.at(site, branch), self._steps_of_table, generation)
            for table in self._tables
            for branch in self._sources
        ]
        wide = any(row.dtype == torch.float64 for row in rows)
        dtype = torch.float64 if wide else torch.float32
        return torch.stack([row.to(generation.shape.device, dtype) for row in rows])

    def _advance(self, step: int, call: int, inside: bool) -> None:
        if call != self._call:
            self._call = call
            self._row_buffers["index"].copy_(self._indices[call])
        if self._slot is not None:
            self._slot.fill_(min(step, self._steps_of_table - 1) if inside else -1)
        trained = bool(self._given) or any(table.trained for table in self._tables)
        generation = self._generation
        if generation is None:
            return
        if trained:
            self._refresh(generation)
        for site in self.sites:
            (operation,) = self._operations[site.name]
            if isinstance(operation, Add):
                operation.live = partial(self._live, site, generation) if trained else None

    # -- gradients ----------------------------------------------------------------------------

    def _refresh(self, generation: Generation) -> None:
        """Fill the buffers with what the tensors hold now: an optimiser may have changed them."""
        self._build_tables(generation)
        for option in self._given:
            self._fill(option, generation)

    def _live(self, site: Site, generation: Generation) -> Steering:
        """Return the steering of a site made of the tensors that a gradient is wanted for."""
        (operation,) = self._operations[site.name]
        buffers = operation.buffers if isinstance(operation, Add) else None
        if buffers is None:
            raise RuntimeError("steer: expected buffers of a generation, got none")
        vectors = buffers.vectors
        if any(table.trained for table in self._tables):
            vectors = self._stacked(site, generation)
        return buffers._replace(
            vectors=vectors,
            index=None if buffers.index is None else buffers.index.clone(),
            strength=self._live_rows("strength", buffers.strength, generation),
            removal=self._live_rows("removal", buffers.removal, generation),
        )

    def _live_rows(
        self, option: str, buffer: Tensor | None, generation: Generation
    ) -> Tensor | None:
        """Return strength or removal of each row [R], of the tensor that is trained if one is."""
        given = self._given.get(option)
        if given is None:
            # Autograd keeps it, and a later step may write the buffer.
            return None if buffer is None else buffer.clone()
        each = given.to(generation.shape.device).reshape(-1).expand(generation.samples)
        return each[generation.sample_of_row]


@placed
def steer(
    pipe: Any,
    vector: Vector | Sequence[Vector],
    where: SitePattern | Where | None = None,
    *,
    strength: Any = 1.0,
    which: Any = None,
    removal: Any = 0.0,
    renorm: bool = False,
) -> Steer:
    """Add directions to what sites put out: attention, blocks, MLPs, resnets.

    y = x + (strength - removal * max(0, <x, v>)) v for the output x of the module before its
    residual; with renorm every token keeps its norm. Several steers at one site act in the order
    of their attachment.

    Args:
        pipe: diffusers pipeline.
        vector: `SteeringVector`, {site: [C] or [steps, C]}, or several of these.
        where: sites, or a `Where`, which names branches, steps and tokens too. Its `branches` say
            which guidance branch gets which branch's vector: "cond_only" (or "cond"),
            "uncond_only" (or "uncond"), "both_cond", "both_uncond", "separate" (or "all"),
            "uncond_for_cond". None = the sites of the vector, in the cond branch.
        strength: number, or one for each sample [B]. 0 is bit-identical to no steering.
        which: with several vectors, the number of each sample's vector [B]; -1 for none.
        removal: how much of the positive projection on v to take away, number or [B].
        renorm: give every steered token the norm it had.

    Returns:
        A context manager (or handle: attach, remove) whose `strength`, `removal` and `which` can
        be set at any time.

    Raises:
        TypeError, ValueError: options that do not fit each other, the sites or the generation.
        RuntimeError: on leaving the context, a site that never ran.

    Differentiable in: the activations, and every vector, strength and removal that is given as a
    tensor with requires_grad: where gradients are enabled the sites compute with that tensor, and
    without them with the values that it holds at the beginning of the step. To train through a
    pipeline, whose `__call__` disables gradients: `type(pipe).__call__.__wrapped__(pipe, ...)`.
    """
    several = [vector] if isinstance(vector, VectorLike | Mapping) else list(vector)
    if not several:
        raise ValueError("steer: expected at least one vector, got none")
    tables = [VectorTable(pipe, one) for one in several]
    place = Where.of(where)
    tap = Steer(pipe, tables, place.chosen(pipe, tables[0].names()), place, renorm)
    tap.strength, tap.removal, tap.which = strength, removal, which
    return tap


def _same(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> bool:
    """Tell whether two grids of timesteps and sigmas are equal."""
    return all(
        x is y or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )
