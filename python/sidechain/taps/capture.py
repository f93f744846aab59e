# SPDX-License-Identifier: Apache-2.0
"""capture: record what sites put out, reduced on the device while the pipeline runs."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from .._device import send
from ..ops import Capture as Buffers
from ..pipelines import CallShape, Generation, Site, SitePattern
from . import options
from .base import Tap
from .layout import expect
from .operations import ContextRecord, Operation, Record
from .options import Where, placed
from .recording import KeptCall, Labels, Layout, Recorded, each, gather, mean_of, tensors

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Capture(Tap):
    """Recorded activations; made by `capture`.

    `cap[site]` is, with several pipeline calls in one context joined along B:
    - reduce="mean" and "mean_square": mean over tokens [steps, branches, B, C] float32;
    - reduce="tokens": [steps, branches, B, T', C];
    - reduce="context": what the site's keys and values are computed from, [branches, B, S, C].

    Values of a branch that was absent at a step, as with guidance in some of the steps only, are
    NaN; `labels.present` says which.
    """

    name = "capture"
    #: The class of each reduction; a subclass adds its own.
    reductions: ClassVar[dict[str, type[Capture]]] = {}

    def __init__(
        self,
        pipe: Any,
        where: Where,
        reduce: str,
        dtype: torch.dtype,
    ) -> None:
        if dtype not in _DTYPES:
            raise TypeError(f"capture: expected dtype float32 | float16 | bfloat16, got {dtype}")
        super().__init__(pipe, where.chosen(pipe, "cross:*"), where.steps)
        if reduce == "context":
            for site in self.sites:
                if site.kind != "cross":
                    raise ValueError(
                        f"capture: expected cross-attention sites [reduce='context'], got {site}"
                    )
            if where.tokens is not None or where.steps is not None:
                raise ValueError(
                    "capture: expected neither tokens nor steps with reduce='context', got "
                    f"tokens={where.tokens!r}, steps={where.steps!r}"
                )
        self.reduce = reduce
        self.dtype = dtype
        self._wanted = options.parse_branches("capture", where.branches)
        self._tokens = options.parse_tokens("capture", where.tokens)
        if reduce == "tokens" and isinstance(self._tokens, Tensor):
            raise NotImplementedError(
                "capture: expected a slice of tokens with reduce='tokens', got a mask"
            )
        self._slot: Tensor | None = None
        self._kept_mask: Tensor | None = None
        self._layouts: dict[CallShape, Layout] = {}
        self._layout_now: Layout | None = None
        self._archive: list[Recorded] = []
        # Step, number and shape of every call of the current generation.
        self._seen: list[tuple[int, int, CallShape]] = []
        self._contexts: set[str] = set()  # branches whose context is recorded

    # -- results ------------------------------------------------------------------------------

    def __getitem__(self, site: str | Site | int) -> Tensor:
        """Return what was recorded at a site; shapes in the class docstring."""
        name = self.sites[site].name
        parts = []
        for labels, buffers in self._records():
            found = buffers[name]
            value = self._mean(found) if found.ring is None else found.ring
            parts.append(self._split_rows(value, labels))
        axis = 2 if self._per_step else 1
        joined = torch.cat(parts, axis) if len(parts) > 1 else parts[0]
        return joined.to(self.dtype)

    @property
    def _per_step(self) -> bool:
        """Tell whether every step has an entry of its own; else the buffers hold one for all."""
        return self.reduce != "context"

    def _mean(self, found: Buffers) -> Tensor:
        """Divide what was added up at a site by how often."""
        return mean_of(found.sums, found.counts)

    def mean_square(self, site: str | Site | int) -> Tensor:
        """Return the mean square over tokens, [steps, branches, B, C] (reduce="mean_square")."""
        if self.reduce != "mean_square":
            raise ValueError(
                f"capture: expected reduce='mean_square' for mean_square, got {self.reduce!r}"
            )
        name = self.sites[site].name
        return torch.cat(
            [
                self._split_rows(mean_of(found[name].squares, found[name].counts), labels)
                for labels, found in self._records()
            ],
            dim=2,
        )

    @property
    def labels(self) -> Labels:
        """What the axes mean."""
        records = self._records()
        first = records[0][0]
        return Labels(
            first.steps,
            first.timesteps,
            first.sigmas,
            first.branches,
            sum(labels.samples for labels, _ in records),
            first.present,
        )

    def mask(self, site: str | Site | int) -> Tensor | None:
        """Return which tokens of the context a site may read (reduce="context").

        Returns:
            [branches, B, S] bool; None where the attention has no mask.
        """
        if self.reduce != "context":
            raise ValueError(f"capture: expected reduce='context' for mask, got {self.reduce!r}")
        name = self.sites[site].name
        (operation,) = self._operations[name]
        records = self._records()
        if not (isinstance(operation, ContextRecord) and operation.masked):
            return None
        masks = [(buffers[name].mask, labels) for labels, buffers in records]
        return torch.cat([self._split_rows(m, at) for m, at in masks if m is not None], 1)

    @property
    def steps(self) -> tuple[int, ...]:
        """Step number of each entry of the first axis."""
        return self.labels.steps

    @property
    def timesteps(self) -> Tensor:
        """Timestep of each entry of the first axis, float64."""
        return self.labels.timesteps

    @property
    def sigmas(self) -> Tensor | None:
        """Noise level of each entry of the first axis, float64, or None."""
        return self.labels.sigmas

    @property
    def branches(self) -> tuple[str, ...]:
        """Guidance branch of each entry of the second axis."""
        return self.labels.branches

    @property
    def nbytes(self) -> int:
        """Bytes held on the device, archived generations included."""
        kept = [layout.buffers for layout in self._layouts.values()]
        kept += [buffers for _, buffers in self._archive]
        return sum(t.nbytes for each in kept for found in each.values() for t in tensors(found))

    def clear(self) -> None:
        """Forget the finished generations and the current one."""
        self._archive.clear()
        self._seen.clear()
        self._contexts.clear()
        for layout in self._layouts.values():
            for buffers in layout.buffers.values():
                for buffer in tensors(buffers):
                    buffer.zero_()

    def _records(self) -> list[Recorded]:
        records = list(self._archive)
        if self._seen:
            records.append(self._current())
        if not records:
            raise RuntimeError("capture: expected at least one pipeline call, got none")
        first = records[0][0]
        for labels, _ in records[1:]:
            same_grid = labels.steps == first.steps and torch.equal(
                labels.timesteps, first.timesteps
            )
            same_branches = labels.branches == first.branches
            if not (same_grid and same_branches and torch.equal(labels.present, first.present)):
                raise ValueError(
                    f"capture: expected generations with equal steps and branches in one capture, "
                    f"got {len(first.steps)} steps {list(first.branches)} and "
                    f"{len(labels.steps)} steps {list(labels.branches)}: use one capture for each, "
                    "or clear()"
                )
        return records

    def _split_rows(self, value: Tensor, labels: Labels) -> Tensor:
        """Turn [S, R', ...] into [S, branches, B, ...], without S where it is one for all."""
        rest = value.shape[2:]
        split = value.reshape(len(value), len(labels.branches), labels.samples, *rest)
        return split if self._per_step else split[0]

    def _current(self) -> Recorded:
        if self._generation is None:
            raise RuntimeError("capture: expected at least one pipeline call, got none")
        return gather(self._calls_kept(), self._generation, self._span, self.reduce == "context")

    def _calls_kept(self) -> list[KeptCall]:
        start, stop = self._span
        kept = [
            KeptCall(step, call, self._layouts[shape])
            for step, call, shape in self._seen
            if self.reduce == "context" or start <= step < stop
        ]
        if not kept:
            raise RuntimeError(
                f"capture: expected steps within [{start}, {stop}) [window of this capture], got "
                f"{sorted({step for step, _, _ in self._seen})}"
            )
        if not any(call.branches for call in kept):
            raise RuntimeError(
                f"capture: expected a call of the {' or '.join(self._wanted or ('any',))} branch, "
                f"got those of {', '.join(sorted(self._seen_branches))} [guidance off?]"
            )
        return kept

    # -- following the generation -------------------------------------------------------------

    def _put_in(self) -> None:
        # What an earlier use recorded is forgotten.
        self._archive, self._layouts, self._seen = [], {}, []
        self._contexts.clear()
        super()._put_in()

    def _operations_at(self, site: Site) -> list[Operation]:
        return [ContextRecord() if self.reduce == "context" else Record()]

    def _bind(self, generation: Generation) -> tuple[str, ...]:
        branches = self._branches(generation, self._wanted)
        rows = self._block(generation, branches)
        device = generation.shape.device
        if self._slot is None or self._slot.device != device:
            self._slot = torch.full((1,), -1, dtype=torch.int64, device=device)
        layout = self._layout_now = self._layout(generation, branches)
        blocks = max((len(some) for some in layout.branches.values()), default=0)
        mask = self._mask(generation, blocks)
        for site in self.sites:
            (operation,) = self._operations[site.name]
            old = layout.buffers[site.name]
            buffers = old._replace(slot=self._slot, mask=mask) if branches else Buffers()
            if isinstance(operation, ContextRecord):
                operation.rows, operation.mask = rows, old.mask
                operation.buffers = buffers._replace(mask=None)
            elif isinstance(operation, Record):
                expect([operation], site, generation)
                operation.rows = operation.active = rows
                operation.tokens = None if isinstance(self._tokens, Tensor) else self._tokens
                operation.buffers = buffers
        return branches

    def _layout(self, generation: Generation, branches: tuple[str, ...]) -> Layout:
        """Return the buffers for calls of this shape, at zero where a generation begins."""
        shape, number = generation.shape, generation.number
        old = self._layouts.get(shape)
        if old is None:
            # Kept over generations that change their shape on the way; not those of other batches.
            self._layouts = {
                key: layout
                for key, layout in self._layouts.items()
                if layout.generation.number >= number - 1
            }
        kept = {
            call: some
            for call, there in enumerate(generation.calls)
            if (some := tuple(b for b in there if b in branches))
        }
        found = self._layouts[shape] = Layout(generation, kept, {})
        rows = generation.samples * max((len(some) for some in kept.values()), default=0)
        for site in self.sites:
            known = Buffers() if old is None else old.buffers[site.name]
            fresh = old is None or old.generation.number != number
            found.buffers[site.name] = Buffers(
                **{
                    key: self._buffer(getattr(known, key), size, key, shape.device, fresh)
                    for key, size in self._shapes(site, generation, rows, len(kept)).items()
                }
            )
        return found

    def _buffer(
        self,
        old: Tensor | None,
        shape: tuple[int, ...],
        key: str,
        device: torch.device,
        fresh: bool,
    ) -> Tensor:
        """Return the buffer there is, at zero for a new generation, or a new one."""
        if old is None or old.shape != shape or old.device != device:
            dtype = {"ring": self.dtype, "mask": torch.bool}.get(key, torch.float32)
            return torch.zeros(shape, dtype=dtype, device=device)
        return old.zero_() if fresh else old

    def _mask(self, generation: Generation, branches: int) -> Tensor | None:
        if not isinstance(self._tokens, Tensor):
            return None
        mask = options.token_mask("capture", self._tokens, self.sites, generation)
        mask = send(mask, generation.shape.device)
        mask = mask if mask.shape[0] == 1 else mask.repeat(branches, 1)
        self._kept_mask = options.reuse(self._kept_mask, mask)
        return self._kept_mask

    def _width(self, site: Site) -> int:
        """Return the channels of what is recorded at a site."""
        return site.width

    def _shapes(
        self, site: Site, generation: Generation, rows: int, calls: int
    ) -> dict[str, tuple[int, ...]]:
        if self.reduce == "context":
            length = generation.context_tokens(site)
            # One slot more for the masks of the calls that are not recorded.
            mask = (calls + 1, rows, length)
            return {"ring": (calls, rows, length, site.context_width), "mask": mask}
        steps = (self._span[1] - self._span[0]) * calls
        tokens = None if isinstance(self._tokens, Tensor) else self._tokens
        kept = options.count_tokens("capture", tokens, site, generation)
        if self.reduce == "tokens":
            return {"ring": (steps, rows, kept, self._width(site))}
        shapes: dict[str, tuple[int, ...]] = {
            "sums": (steps, rows, self._width(site)),
            "counts": (steps, rows),
        }
        if self.reduce == "mean_square":
            shapes["squares"] = (steps, rows, self._width(site))
        return shapes

    def _finish(self) -> None:
        # Another generation is about to use the buffers.
        if not self._seen or self._generation is None:
            return
        reached = self._seen[-1][0] + 1
        if reached < self._span[1] and self.reduce != "context":
            warnings.warn(
                f"capture: a generation that stopped after {reached} of "
                f"{self._generation.steps} steps was dropped because another one followed",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            labels, buffers = self._current()
            if self.reduce != "context":  # contexts are copies already
                buffers = {name: each(torch.clone, found) for name, found in buffers.items()}
            self._archive.append((labels, buffers))
        self._seen.clear()
        self._contexts.clear()

    def _advance(self, step: int, call: int, inside: bool) -> None:
        generation, layout = self._generation, self._layout_now
        if self._slot is None or generation is None or layout is None:
            return
        place = step - self._span[0]
        if self.reduce == "context":
            # One context for the whole generation: it is the same at every step.
            new = set(layout.branches.get(call, ())) - self._contexts
            inside, place = bool(new), 0
            self._contexts |= new
            layout.recorded.update(dict.fromkeys(new, (step, call)))
        self._slot.fill_(layout.slot(place, call) if inside else -1)
        self._seen.append((step, call, generation.shape))


Capture.reductions.update(dict.fromkeys(("mean", "mean_square", "tokens", "context"), Capture))


@placed
def capture(
    pipe: Any,
    where: SitePattern | Where = "cross:*",
    *,
    reduce: str = "mean",
    dtype: torch.dtype = torch.float32,
) -> Capture:
    """Record what sites put out while the pipeline runs: attention, blocks, MLPs, resnets.

    The output of the module before its residual is read as the module put it out, before any
    steering at the same site. Reduction happens on the device, in the same pass as steering.

    Args:
        pipe: diffusers pipeline.
        where: sites, or a `Where`, which names branches, steps and tokens too.
        reduce: "mean" over tokens, "mean_square" (mean and mean square), "tokens" (all of them), or
            "context" (the text that a cross-attention site sees, once for each generation), "heads"
            (mean of what each head puts out, `taps.heads`), or "maps" (how much attention each
            token gives to each token of the text, mean over heads and steps, `taps.maps`).
        dtype: of the results; sums are kept in float32.

    Returns:
        A context manager (or handle: attach, remove) that is indexed by site.

    Raises:
        ValueError: unknown sites or options, or options that do not fit the generation.
        RuntimeError: on leaving the context, a site that never ran.

    Differentiable in: nothing; gradients flow through the site untouched.
    """
    kind = Capture.reductions.get(reduce)
    if kind is None:
        raise ValueError(
            f"capture: expected reduce to be one of {', '.join(Capture.reductions)}, got {reduce!r}"
        )
    return kind(pipe, Where.of(where), reduce, dtype)


class _Enough(Exception):
    """Ends a pipeline call once its first step is known."""


@overload
def contexts(
    pipe: Any,
    prompts: str | list[str],
    *,
    site: str | None = None,
    masks: Literal[False] = False,
    **call: Any,
) -> Tensor: ...
@overload
def contexts(
    pipe: Any, prompts: str | list[str], *, site: str | None = None, masks: bool, **call: Any
) -> tuple[Tensor, Tensor | None]: ...
def contexts(
    pipe: Any,
    prompts: str | list[str],
    *,
    site: str | None = None,
    masks: bool = False,
    **call: Any,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Return what cross-attention sees for some prompts.

    Runs one denoiser call and stops there: text encoders, projections and padding are those of
    the pipeline itself.

    Args:
        pipe: diffusers pipeline.
        prompts: one or several.
        site: cross-attention site to ask. None = the first.
        masks: also return which tokens the site may read.
        **call: further arguments of the pipeline call. Where bits matter, those that decide on
            the rows of a batch (`guidance_scale`): products of fewer rows may round otherwise.

    Returns:
        [B, S, C] of the cond branch, float32, as `patch(context=...)` takes it; with `masks` a
        pair of it and [B, S] bool, or None where the attention has no mask.
    """
    call.setdefault("generator", torch.Generator().manual_seed(0))
    where = Where("cross:0" if site is None else site)
    tap = _FirstCall(pipe, where, "context", torch.float32)
    bar = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        with tap:
            with contextlib.suppress(_Enough):
                pipe(prompts, **call)
            found, mask = tap[tap.sites[0]][0], tap.mask(tap.sites[0])
            return (found, None if mask is None else mask[0]) if masks else found
    finally:
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar


class _FirstCall(Capture):
    def _advance(self, step: int, call: int, inside: bool) -> None:
        if self._contexts:
            raise _Enough
        super()._advance(step, call, inside)
