# SPDX-License-Identifier: Apache-2.0
"""The options that capture, patch and steer share: where they act, and how options are read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .._device import send
from ..pipelines import Generation, Site, SiteList, SitePattern, sites
from ..pipelines.adapter import find_denoiser

BRANCHES = ("cond", "uncond")
BRANCH_CHOICES = (*BRANCHES, "all")

Steps = tuple[int | float, int | float] | None
Tokens = slice | Tensor | None


@dataclass(frozen=True, eq=False)
class Where:
    """Where a tap acts: at which sites, in which branches and steps, on which tokens.

    These four belong together: they are the coordinates of an activation, and the same place is
    captured first and patched or steered later. So `capture`, `patch` and `steer` take one
    argument for them, and a bare site pattern where sites are all there is to say::

        capture(pipe, "cross:2-4")
        early = Where("cross:2-4", steps=(0.0, 0.5))
        capture(pipe, early)
        steer(pipe, vector, early, strength=2)

    Attributes:
        sites: see `SiteList.select`. None = what the function says.
        branches: guidance branches: "cond", "uncond" or "all"; `steer` knows more. None = "cond".
        steps: (start, stop) in scheduler steps, or in fractions of the generation. None = all.
        tokens: slice, or bool mask [T] or [B, T]. None = all; index 0 is the global token of
            Stable Audio.
    """

    sites: SitePattern | None = None
    branches: str | None = None
    steps: Steps = None
    tokens: Tokens = None

    @classmethod
    def of(cls, where: Where | SitePattern | None) -> Where:
        """Return a place that may be given by its sites alone."""
        return where if isinstance(where, Where) else cls(where)

    def chosen(self, pipe: Any, default: SitePattern) -> SiteList:
        """Return its sites in a pipeline."""
        return sites(pipe, default if self.sites is None else self.sites)


_P = ParamSpec("_P")
_T = TypeVar("_T")
_MOVED = {n: n for n in ("sites", "branches", "steps", "tokens")} | {"passes": "branches"}


def placed(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function answer keywords that stand in `Where` with one line that says so."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        old = [name for name in kwargs if name in _MOVED]
        if old:
            fields = ", ".join(f"{_MOVED[name]}=..." for name in old)
            raise TypeError(
                f"{function.__name__}: expected where=Where({fields}), got {', '.join(old)}"
            )
        return function(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Window:
    """Steps in which a tap acts: [start, stop) in steps, or in fractions of the generation."""

    start: int | float = 0
    stop: int | float = 1.0

    @classmethod
    def parse(cls, name: str, steps: Steps) -> Window:
        """Check (a, b): two step numbers, or two fractions in [0, 1] if either is a float."""
        if steps is None:
            return cls()
        if not isinstance(steps, Sequence) or len(steps) != 2:
            raise TypeError(
                f"{name}: expected steps as a pair (start, stop) or None, got {steps!r}"
            )
        for value in steps:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected steps of int or float, got {steps!r}")
        start, stop = steps
        if isinstance(start, float) or isinstance(stop, float):
            start, stop = float(start), float(stop)
            if not 0.0 <= start < stop <= 1.0:
                raise ValueError(
                    f"{name}: expected fractions 0 <= start < stop <= 1 in steps, got {steps!r}"
                )
        elif not 0 <= start < stop:
            raise ValueError(f"{name}: expected 0 <= start < stop in steps, got {steps!r}")
        return cls(start, stop)

    def resolve(self, name: str, steps: int) -> tuple[int, int]:
        """Return the window in steps of a generation of that length."""
        if isinstance(self.stop, float):
            start, stop = round(self.start * steps), round(self.stop * steps)
        else:
            start, stop = int(self.start), min(self.stop, steps)
        if start >= stop:
            raise ValueError(
                f"{name}: expected a window that holds at least one of {steps} steps [of this "
                f"generation], got ({self.start}, {self.stop})"
            )
        return start, stop


def parse_tokens(name: str, tokens: Any) -> Tokens:
    """Check a token selection: None, a slice with a positive stride, or a bool mask."""
    if tokens is None or (isinstance(tokens, slice) and tokens == slice(None)):
        return None
    if isinstance(tokens, slice):
        if tokens.step is not None and tokens.step < 1:
            raise ValueError(f"{name}: expected a slice of tokens with step >= 1, got {tokens}")
        return tokens
    if isinstance(tokens, Tensor) and tokens.dtype == torch.bool:
        if tokens.dim() not in (1, 2):
            raise ValueError(
                f"{name}: expected a token mask of shape [T] or [B, T], got {list(tokens.shape)}"
            )
        return tokens
    got = f"{tokens.dtype} tensor" if isinstance(tokens, Tensor) else type(tokens).__name__
    raise TypeError(f"{name}: expected tokens as None, a slice or a bool mask, got {got}")


def count_tokens(name: str, tokens: slice | None, site: Site, generation: Generation) -> int:
    """Return how many tokens of a site a slice keeps."""
    total = generation.tokens(site)
    kept = total if tokens is None else len(range(*tokens.indices(total)))
    if kept == 0:
        raise ValueError(
            f"{name}: expected tokens within [0, {total}) [tokens of {site}], got {tokens}"
        )
    return kept


def common_tokens(name: str, why: str, sites: SiteList, generation: Generation) -> int:
    """Return the one number of tokens that all sites have.

    Raises:
        ValueError: two of them differ; `why` says what for they must not.
    """
    first = sites[0]
    total = generation.tokens(first)
    for site in sites:
        here = generation.tokens(site)
        if here != total:
            raise ValueError(
                f"{name}: expected sites with one number of tokens [{why}], got {first} with "
                f"{total} and {site} with {here}"
            )
    return total


def token_mask(name: str, mask: Tensor, sites: SiteList, generation: Generation) -> Tensor:
    """Check a mask against the sites of a generation; return it as [1, T] or [B, T]."""
    total = common_tokens(name, "a mask is for all of them", sites, generation)
    samples = generation.samples
    wide = mask[None] if mask.dim() == 1 else mask
    if wide.shape[1] != total or wide.shape[0] not in (1, samples):
        raise ValueError(
            f"{name}: expected a token mask of shape [{total}] or [{samples}, {total}] [tokens of "
            f"{sites[0]} and samples of this generation], got {list(mask.shape)}"
        )
    return wide


def parse_branches(name: str, branches: str | None) -> tuple[str, ...] | None:
    """Return the guidance branches meant by "cond", "uncond" or "all" (None)."""
    branches = "cond" if branches is None else branches
    if branches not in BRANCH_CHOICES:
        raise ValueError(
            f"{name}: expected branches to be one of {', '.join(BRANCH_CHOICES)}, got {branches!r}"
        )
    return None if branches == "all" else (branches,)


def per_sample(name: str, option: str, value: Any, dtype: torch.dtype) -> Tensor:
    """Read a number, or one number for each sample.

    Returns:
        [1] or [B] on the CPU.

    Raises:
        TypeError: not numbers.
        ValueError: NaN or infinite, or more than one dimension.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise NotImplementedError(
            f"{name}: expected {option} without gradient [it is copied into a buffer], got "
            "requires_grad=True"
        )
    try:
        read = torch.as_tensor(value, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}: expected {option} as a number or one number for each sample, got {value!r}"
        ) from None
    if read.dtype == torch.bool and dtype != torch.bool:
        raise TypeError(f"{name}: expected numbers in {option}, got {value!r}")
    if not dtype.is_floating_point and read.dtype.is_floating_point:
        raise TypeError(f"{name}: expected integers in {option}, got {value!r}")
    if dtype == torch.bool and read.dtype != torch.bool:
        raise TypeError(f"{name}: expected True or False in {option}, got {value!r}")
    if read.dim() > 1 or read.numel() == 0:
        raise ValueError(
            f"{name}: expected {option} as a number or of shape [B], got {list(read.shape)}"
        )
    if read.dtype.is_floating_point and not bool(torch.isfinite(read).all()):
        bad = next(float(v) for v in read.reshape(-1) if not math.isfinite(v))
        raise ValueError(f"{name}: expected finite {option}, got {bad}")
    return read.reshape(-1).to(dtype)


def for_rows(name: str, option: str, value: Tensor, generation: Generation) -> Tensor:
    """Expand [1] or [B] to the rows of a generation, [R] on its device."""
    samples, sample_of_row = generation.samples, generation.sample_of_row
    if value.shape[0] not in (1, samples):
        raise ValueError(
            f"{name}: expected {option} of length 1 or {samples} [B of this generation], got "
            f"{value.shape[0]}"
        )
    return send(value.expand(samples), sample_of_row.device)[sample_of_row]


def refuse_compiled(name: str, pipe: Any, why: str) -> None:
    """Refuse a denoiser under `torch.compile`, as a whole or in parts.

    Raises:
        NotImplementedError: it is.
    """
    called, denoiser, _ = find_denoiser(pipe)
    for part in (called, *denoiser.modules()):
        if getattr(part, "_compiled_call_impl", None) or hasattr(part, "_orig_mod"):
            raise NotImplementedError(
                f"{name}: expected a denoiser that is not compiled [{why}], got one under "
                "torch.compile"
            )


def reuse(old: Tensor | None, new: Tensor) -> Tensor:
    """Fill the buffer that was there, so that compiled graphs keep it, or start a new one."""
    if old is None or old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
        return new.clone()
    return old.copy_(new)


def same_device(a: torch.device, b: torch.device) -> bool:
    """Tell whether two devices are one, "cuda" being its current index."""

    def number(device: torch.device) -> int:
        index: int | None = device.index  # the stubs forget that it may be None
        if index is None:
            return torch.cuda.current_device() if device.type == "cuda" else 0
        return index

    return a.type == b.type and number(a) == number(b)
