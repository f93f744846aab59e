# SPDX-License-Identifier: Apache-2.0
"""capture: record what sites put out, reduced on the device while the pipeline runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._device import send
from ..ops import Capture as Buffers
from ..pipelines import Generation, Site, SitePattern
from . import options
from .base import Tap
from .layout import expect
from .options import Where, placed
from .processor import ContextRecord, Operation, Record

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Labels:
    """What the axes of a capture mean.

    Attributes:
        steps: step number of each entry of the first axis.
        timesteps: of these steps, [steps] float64.
        sigmas: of these steps, [steps] float64, or None.
        branches: guidance branch of each entry of the second axis.
        samples: B, all generations together.
    """

    steps: tuple[int, ...]
    timesteps: Tensor
    sigmas: Tensor | None
    branches: tuple[str, ...]
    samples: int


_Recorded = tuple[Labels, dict[str, Buffers]]  # one generation, by name of the site


def _tensors(buffers: Buffers) -> list[Tensor]:
    """Return the buffers that are there, without slot and mask."""
    return [t for t in buffers[:4] if t is not None]


def _each(function: Callable[[Tensor], Tensor], buffers: Buffers) -> Buffers:
    """Apply a function to every buffer that is there; slot and mask are left out."""
    return Buffers(*(None if t is None else function(t) for t in buffers[:4]))


def _mean(total: Tensor | None, counts: Tensor | None) -> Tensor:
    """Divide sums over tokens by the number of tokens."""
    if total is None or counts is None:
        raise RuntimeError("capture: expected sums and counts of this reduction, got none")
    return total / counts[..., None]


class Capture(Tap):
    """Recorded activations; made by `capture`.

    `cap[site]` is, with several pipeline calls in one context joined along B:
    - reduce="mean" and "mean_square": mean over tokens [steps, branches, B, C] float32;
    - reduce="tokens": [steps, branches, B, T', C];
    - reduce="context": what the site's keys and values are computed from, [branches, B, S, C].
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
        self._buffers: dict[str, Buffers] = {}
        self._archive: list[_Recorded] = []
        self._number = -1
        self._seen: list[int] = []  # steps of the current generation

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
        return _mean(found.sums, found.counts)

    def mean_square(self, site: str | Site | int) -> Tensor:
        """Return the mean square over tokens, [steps, branches, B, C] (reduce="mean_square")."""
        if self.reduce != "mean_square":
            raise ValueError(
                f"capture: expected reduce='mean_square' for mean_square, got {self.reduce!r}"
            )
        name = self.sites[site].name
        return torch.cat(
            [
                self._split_rows(_mean(found[name].squares, found[name].counts), labels)
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
        )

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
        kept = [self._buffers, *(buffers for _, buffers in self._archive)]
        return sum(t.nbytes for each in kept for found in each.values() for t in _tensors(found))

    def clear(self) -> None:
        """Forget the finished generations and the current one."""
        self._archive.clear()
        self._seen.clear()
        for buffers in self._buffers.values():
            for buffer in _tensors(buffers):
                buffer.zero_()

    def _records(self) -> list[_Recorded]:
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
            if not same_grid or labels.branches != first.branches:
                raise ValueError(
                    f"capture: expected generations with equal steps and branches in one capture, "
                    f"got {len(first.steps)} steps {list(first.branches)} and "
                    f"{len(labels.steps)} steps {list(labels.branches)}: use one capture for each, "
                    "or clear()"
                )
        return records

    def _current(self) -> _Recorded:
        generation = self._generation
        if generation is None:
            raise RuntimeError("capture: expected at least one pipeline call, got none")
        start, stop = self._span
        # Those that ran: a schedule may begin late, and a generation may stop early.
        steps = tuple(step for step in self._seen if start <= step < stop)
        labels = Labels(
            steps,
            generation.timesteps[list(steps)],
            None if generation.sigmas is None else generation.sigmas[list(steps)],
            self._branches(generation, self._wanted),
            generation.samples,
        )
        if self.reduce != "context" and not steps:
            raise RuntimeError(
                f"capture: expected steps within [{start}, {stop}) [window of this capture], got "
                f"{self._seen}"
            )
        if not self._per_step:
            return labels, self._buffers
        first, count = steps[0] - start, len(steps)
        if steps == tuple(range(steps[0], steps[0] + count)):
            place: Any = slice(first, first + count)
        else:
            place = [step - start for step in steps]
        return labels, {n: _each(lambda t: t[place], b) for n, b in self._buffers.items()}

    def _split_rows(self, value: Tensor, labels: Labels) -> Tensor:
        """Turn [S, R', ...] into [S, branches, B, ...], without S where it is one for all."""
        rest = value.shape[2:]
        split = value.reshape(len(value), len(labels.branches), labels.samples, *rest)
        return split if self._per_step else split[0]

    # -- following the generation -------------------------------------------------------------

    def _put_in(self) -> None:
        # What an earlier use recorded is forgotten.
        self._archive, self._buffers, self._number, self._seen = [], {}, -1, []
        super()._put_in()

    def _operations_at(self, site: Site) -> list[Operation]:
        return [ContextRecord() if self.reduce == "context" else Record()]

    def _bind(self, generation: Generation) -> None:
        branches = self._branches(generation, self._wanted)
        rows = self._block(generation, branches)
        device = generation.shape.device
        if self._slot is None or self._slot.device != device:
            self._slot = torch.full((1,), -1, dtype=torch.int64, device=device)
        mask = self._mask(generation, len(branches))
        for site in self.sites:
            shapes = self._shapes(site, generation, len(branches) * generation.samples)
            old = self._buffers.get(site.name, Buffers())._asdict()
            kept = {
                key: self._buffer(old[key], shape, key, generation) for key, shape in shapes.items()
            }
            buffers = Buffers(**kept, slot=self._slot, mask=mask)
            self._buffers[site.name] = buffers
            (operation,) = self._operations[site.name]
            if isinstance(operation, ContextRecord):
                operation.rows, operation.buffers = rows, buffers
            elif isinstance(operation, Record):
                expect([operation], site, generation)
                operation.rows = operation.active = rows
                operation.tokens = None if isinstance(self._tokens, Tensor) else self._tokens
                operation.buffers = buffers
        self._number = generation.number

    def _buffer(
        self, old: Tensor | None, shape: tuple[int, ...], key: str, generation: Generation
    ) -> Tensor:
        """Return a buffer of zeros for a new generation, the one there is within a generation."""
        device = generation.shape.device
        fresh = generation.number != self._number
        if old is None or old.shape != shape or old.device != device:
            if not fresh:
                raise NotImplementedError(
                    "capture: expected a constant batch within a generation, got a denoiser call "
                    f"with {generation.shape.rows} rows"
                )
            dtype = self.dtype if key == "ring" else torch.float32
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

    def _shapes(self, site: Site, generation: Generation, rows: int) -> dict[str, tuple[int, ...]]:
        if self.reduce == "context":
            return {"ring": (1, rows, generation.context_tokens(site), site.context_width)}
        steps = self._span[1] - self._span[0]
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
        reached = self._seen[-1] + 1
        if reached < self._span[1] and self.reduce != "context":
            warnings.warn(
                f"capture: a generation that stopped after {reached} of "
                f"{self._generation.steps} steps was dropped because another one followed",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            labels, buffers = self._current()
            kept = {name: _each(torch.clone, found) for name, found in buffers.items()}
            self._archive.append((labels, kept))
        self._seen.clear()

    def _advance(self, step: int, inside: bool) -> None:
        if self._slot is None:
            return
        if self.reduce == "context":
            # One context for the whole generation: it is the same at every step.
            self._slot.fill_(-1 if self._seen else 0)
        else:
            self._slot.fill_(step - self._span[0] if inside else -1)
        self._seen.append(step)


Capture.reductions.update(dict.fromkeys(("mean", "mean_square", "tokens", "context"), Capture))


@placed
def capture(
    pipe: Any,
    where: SitePattern | Where = "cross:*",
    *,
    reduce: str = "mean",
    dtype: torch.dtype = torch.float32,
) -> Capture:
    """Record what attention sites put out while the pipeline runs.

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


def contexts(
    pipe: Any, prompts: str | list[str], *, site: str | None = None, **call: Any
) -> Tensor:
    """Return what cross-attention sees for some prompts.

    Runs one denoiser call and stops there: text encoders, projections and padding are those of
    the pipeline itself.

    Args:
        pipe: diffusers pipeline.
        prompts: one or several.
        site: cross-attention site to ask. None = the first.
        **call: further arguments of the pipeline call. Where bits matter, those that decide on
            the rows of a batch (`guidance_scale`): products of fewer rows may round otherwise.

    Returns:
        [B, S, C] of the cond branch, float32, as `patch(context=...)` takes it.
    """
    call.setdefault("generator", torch.Generator().manual_seed(0))
    where = Where("cross:0" if site is None else site)
    tap = _FirstStep(pipe, where, "context", torch.float32)
    bar = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        with tap:
            with contextlib.suppress(_Enough):
                pipe(prompts, **call)
            return tap[tap.sites[0]][0]
    finally:
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar


class _FirstStep(Capture):
    def _advance(self, step: int, inside: bool) -> None:
        if step:
            raise _Enough
        super()._advance(step, inside)
