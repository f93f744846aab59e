# SPDX-License-Identifier: Apache-2.0
"""capture: record what sites put out, reduced on the device while the pipeline runs."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._device import send
from ..pipelines import Run, Site, SitePattern, sites
from . import options
from .base import Tap
from .options import Steps
from .processor import ContextRecord, Operation, Pass

REDUCTIONS = ("mean", "moments", "tokens", "context")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Labels:
    """What the axes of a capture mean.

    Attributes:
        steps: step number of each entry of the first axis.
        timesteps: of these steps, [steps] float64.
        sigmas: of these steps, [steps] float64, or None.
        passes: CFG branch of each entry of the second axis.
        samples: B, all runs together.
    """

    steps: tuple[int, ...]
    timesteps: Tensor
    sigmas: Tensor | None
    passes: tuple[str, ...]
    samples: int


class Capture(Tap):
    """Recorded activations; made by `capture`.

    `cap[site]` is, with several pipeline calls in one context joined along B:
    - reduce="mean" and "moments": mean over tokens [steps, passes, B, C] float32;
    - reduce="tokens": [steps, passes, B, T', C];
    - reduce="context": what the site's keys and values are computed from, [passes, B, S, C].
    """

    name = "capture"

    def __init__(
        self,
        pipe: Any,
        sites_: SitePattern,
        reduce: str,
        passes: str,
        steps: Steps,
        tokens: Any,
        dtype: torch.dtype,
    ) -> None:
        if reduce not in REDUCTIONS:
            raise ValueError(
                f"capture: expected reduce to be one of {', '.join(REDUCTIONS)}, got {reduce!r}"
            )
        if dtype not in _DTYPES:
            raise TypeError(f"capture: expected dtype float32 | float16 | bfloat16, got {dtype}")
        super().__init__(pipe, sites(pipe, sites_), steps)
        if reduce == "context":
            for site in self.sites:
                if site.kind != "cross":
                    raise ValueError(
                        f"capture: expected cross-attention sites [reduce='context'], got {site}"
                    )
            if tokens is not None or steps is not None:
                raise ValueError(
                    "capture: expected neither tokens nor steps with reduce='context', got "
                    f"tokens={tokens!r}, steps={steps!r}"
                )
        self.reduce = reduce
        self.dtype = dtype
        self._wanted = options.parse_branches("capture", passes)
        self._tokens = options.parse_tokens("capture", tokens)
        if reduce == "tokens" and isinstance(self._tokens, Tensor):
            raise NotImplementedError(
                "capture: expected a slice of tokens with reduce='tokens', got a mask"
            )
        self._slot: Tensor | None = None
        self._kept_mask: Tensor | None = None
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._archive: list[tuple[Labels, dict[str, dict[str, Tensor]]]] = []
        self._number = -1
        self._reached = 0

    # -- results ------------------------------------------------------------------------------

    def __getitem__(self, site: str | Site | int) -> Tensor:
        """Return what was recorded at a site; shapes in the class docstring."""
        name = self.sites[site].name
        parts = []
        for labels, buffers in self._records():
            found = buffers[name]
            if self.reduce in ("mean", "moments"):
                value = found["sums"] / found["counts"][..., None]
            else:
                value = found["ring"]
            parts.append(self._split_rows(value, labels))
        axis = 1 if self.reduce == "context" else 2
        joined = torch.cat(parts, axis) if len(parts) > 1 else parts[0]
        return joined.to(self.dtype)

    def second_moment(self, site: str | Site | int) -> Tensor:
        """Return the mean over tokens of the squares, [steps, passes, B, C] (reduce="moments")."""
        if self.reduce != "moments":
            raise ValueError(
                f"capture: expected reduce='moments' for second_moment, got {self.reduce!r}"
            )
        name = self.sites[site].name
        return torch.cat(
            [
                self._split_rows(b[name]["squares"] / b[name]["counts"][..., None], labels)
                for labels, b in self._records()
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
            first.passes,
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
    def passes(self) -> tuple[str, ...]:
        """CFG branch of each entry of the second axis."""
        return self.labels.passes

    @property
    def nbytes(self) -> int:
        """Bytes held on the device, archived runs included."""
        kept = [self._buffers, *(buffers for _, buffers in self._archive)]
        return sum(t.nbytes for run in kept for site in run.values() for t in site.values())

    def clear(self) -> None:
        """Forget the finished runs and the current one."""
        self._archive.clear()
        self._reached = 0
        for buffers in self._buffers.values():
            for buffer in buffers.values():
                buffer.zero_()

    def _records(self) -> list[tuple[Labels, dict[str, dict[str, Tensor]]]]:
        records = list(self._archive)
        if self._reached:
            records.append(self._current())
        if not records:
            raise RuntimeError("capture: expected at least one pipeline call, got none")
        first = records[0][0]
        for labels, _ in records[1:]:
            same_grid = labels.steps == first.steps and torch.equal(
                labels.timesteps, first.timesteps
            )
            if not same_grid or labels.passes != first.passes:
                raise ValueError(
                    f"capture: expected runs with equal steps and passes in one capture, got "
                    f"{len(first.steps)} steps {list(first.passes)} and {len(labels.steps)} "
                    f"steps {list(labels.passes)}: use one capture for each, or clear()"
                )
        return records

    def _current(self) -> tuple[Labels, dict[str, dict[str, Tensor]]]:
        run = self._run
        if run is None:
            raise RuntimeError("capture: expected at least one pipeline call, got none")
        start, stop = self._span
        steps = tuple(range(start, min(stop, self._reached)))
        labels = Labels(
            steps,
            run.timesteps[list(steps)],
            None if run.sigmas is None else run.sigmas[list(steps)],
            self._branches(run, self._wanted),
            run.samples,
        )
        if self.reduce == "context":
            return labels, self._buffers
        # A run that stopped early has fewer steps than its buffers.
        return labels, {
            name: {k: v[: len(steps)] for k, v in buffers.items()}
            for name, buffers in self._buffers.items()
        }

    def _split_rows(self, value: Tensor, labels: Labels) -> Tensor:
        """[S, R', ...] -> [S, passes, B, ...], without S for a context."""
        rest = value.shape[2:]
        split = value.reshape(len(value), len(labels.passes), labels.samples, *rest)
        return split[0] if self.reduce == "context" else split

    # -- following the run --------------------------------------------------------------------

    def attach(self) -> Capture:
        """Put the tap in place; what an earlier use recorded is forgotten."""
        self._archive, self._buffers, self._number, self._reached = [], {}, -1, 0
        return super().attach()

    def _operations_at(self, site: Site) -> list[Operation]:
        return [ContextRecord() if self.reduce == "context" else Pass(steers=False)]

    def _bind(self, run: Run) -> None:
        fresh = run.number != self._number
        branches = self._branches(run, self._wanted)
        rows = self._block(run, branches)
        device = run.shape.device
        if self._slot is None or self._slot.device != device:
            self._slot = torch.full((1,), -1, dtype=torch.int64, device=device)
        mask = self._mask(run, len(branches))
        for site in self.sites:
            shapes = self._shapes(site, run, len(branches) * run.samples)
            old = self._buffers.get(site.name, {})
            buffers = {}
            for key, shape in shapes.items():
                dtype = self.dtype if key == "ring" else torch.float32
                kept = old.get(key)
                if kept is None or kept.shape != shape or kept.device != device:
                    if not fresh:
                        raise NotImplementedError(
                            "capture: expected a constant batch within a run, got a denoiser call "
                            f"with {run.shape.rows} rows"
                        )
                    kept = torch.zeros(shape, dtype=dtype, device=device)
                elif fresh:
                    kept.zero_()
                buffers[key] = kept
            self._buffers[site.name] = buffers
            (operation,) = self._operations[site.name]
            arguments: dict[str, Any] = {**buffers, "capture_slot": self._slot}
            if mask is not None:
                arguments["capture_mask"] = mask
            if isinstance(operation, ContextRecord):
                operation.rows, operation.buffers = rows, arguments
            elif isinstance(operation, Pass):
                operation.rows = operation.active = rows
                operation.tokens = None if isinstance(self._tokens, Tensor) else self._tokens
                operation.buffers = arguments
        self._number = run.number

    def _mask(self, run: Run, branches: int) -> Tensor | None:
        if not isinstance(self._tokens, Tensor):
            return None
        mask = options.token_mask("capture", self._tokens, run.shape.tokens, run.samples)
        mask = send(mask, run.shape.device)
        mask = mask if mask.shape[0] == 1 else mask.repeat(branches, 1)
        self._kept_mask = options.reuse(self._kept_mask, mask)
        return self._kept_mask

    def _shapes(self, site: Site, run: Run, rows: int) -> dict[str, tuple[int, ...]]:
        if self.reduce == "context":
            return {"ring": (1, rows, run.shape.context_tokens, site.context_width)}
        steps = self._span[1] - self._span[0]
        tokens = None if isinstance(self._tokens, Tensor) else self._tokens
        kept = options.count_tokens("capture", tokens, run.shape.tokens)
        if self.reduce == "tokens":
            return {"ring": (steps, rows, kept, site.width)}
        shapes: dict[str, tuple[int, ...]] = {
            "sums": (steps, rows, site.width),
            "counts": (steps, rows),
        }
        if self.reduce == "moments":
            shapes["squares"] = (steps, rows, site.width)
        return shapes

    def _finish(self) -> None:
        # Another run is about to use the buffers.
        if not self._reached or self._run is None:
            return
        if self._reached < self._span[1] and self.reduce != "context":
            warnings.warn(
                f"capture: a run that stopped after {self._reached} of {self._run.steps} steps "
                "was dropped because another one followed",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            labels, buffers = self._current()
            kept = {n: {k: v.clone() for k, v in b.items()} for n, b in buffers.items()}
            self._archive.append((labels, kept))
        self._reached = 0

    def _advance(self, step: int, inside: bool) -> None:
        if self._slot is None:
            return
        if self.reduce == "context":
            # One context for the whole run: it is the same at every step.
            self._slot.fill_(0 if step == 0 else -1)
        else:
            self._slot.fill_(step - self._span[0] if inside else -1)
        self._reached = step + 1


def capture(
    pipe: Any,
    sites: SitePattern = "cross:*",
    *,
    reduce: str = "mean",
    passes: str = "cond",
    steps: Steps = None,
    tokens: slice | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Capture:
    """Record what attention sites put out while the pipeline runs.

    The output of the module before its residual is read as the module put it out, before any
    steering at the same site. Reduction happens on the device, in the same pass as steering.

    Args:
        pipe: diffusers pipeline.
        sites: see `SiteList.select`.
        reduce: "mean" over tokens, "moments" (mean and mean square), "tokens" (all of them), or
            "context" (the text that a cross-attention site sees, once for each run).
        passes: "cond", "uncond" or "all".
        steps: (start, stop) in scheduler steps, or in fractions of the run. None = all.
        tokens: slice, or bool mask [T] or [B, T]. None = all; index 0 is the global token of
            Stable Audio.
        dtype: of the results; sums are kept in float32.

    Returns:
        A context manager (or handle: attach, remove) that is indexed by site.

    Raises:
        ValueError: unknown sites or options, or options that do not fit the run.
        RuntimeError: on leaving the context, a site that never ran.

    Differentiable in: nothing; gradients flow through the site untouched.
    """
    return Capture(pipe, sites, reduce, passes, steps, tokens, dtype)


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
        [B, S, C] of the cond pass, float32, as `patch(context=...)` takes it.
    """
    chosen = sites(pipe, "cross:0" if site is None else site)
    call.setdefault("generator", torch.Generator().manual_seed(0))
    tap = _FirstStep(pipe, chosen, "context", "cond", None, None, torch.float32)
    bar = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        with tap:
            with contextlib.suppress(_Enough):
                pipe(prompts, **call)
            return tap[chosen[0]][0]
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
