# SPDX-License-Identifier: Apache-2.0
"""Capture of what each head puts out: the input of the output projection of an attention module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import Capture as Buffers
from ..ops import tap_
from ..pipelines import Site
from .capture import Capture
from .operations import Inside, Operation
from .options import Where


class Place(NamedTuple):
    """Which rows of a call are computed; the heads of the others put out zero.

    Attributes:
        active: block of these rows, or their numbers; None = all.
        rows: R of the call.
    """

    active: slice | Tensor | None
    rows: int

    def all_rows(self, values: Tensor) -> Tensor:
        """Return the values of the active rows with zeros at the others, [R, ...]."""
        if self.active is None:
            return values
        full = values.new_zeros(self.rows, *values.shape[1:])
        full[self.active] = values
        return full


def output_projection(attn: Any) -> Any:
    """Return the layer that mixes the heads; None where the module has none of its own."""
    out = getattr(attn, "to_out", None)
    if isinstance(out, nn.ModuleList) and len(out):
        out = out[0]
    return out if hasattr(out, "in_features") else None


class HeadRecord(Inside):
    """Captures the input of the output projection."""

    def view(self, attn: Any) -> Any:
        """Return the module with an output projection that is listened to."""
        return _Overheard(attn, self)

    def __call__(self, heads: Tensor) -> None:
        """Capture what the heads put out, [R, T, H D]."""
        if self.mark():
            self.take(heads)

    def take(self, heads: Tensor) -> None:
        """Capture without marking.

        Raises:
            RuntimeError: another shape than that of this generation.
        """
        sums, expected = self.buffers.sums, self.expected
        if sums is None or expected is None:
            return  # before the first denoiser call of a generation
        if heads.shape[1:] != (expected.tokens, sums.shape[-1]):
            raise RuntimeError(
                f"capture: expected [rows, {expected.tokens}, {sums.shape[-1]}] in front of the "
                f"output projection of {expected.site} [of this generation], got "
                f"{list(heads.shape)}"
            )
        kept = heads.detach()[self.rows or slice(None), self.tokens or slice(None)]
        if kept.stride(-1) != 1:
            kept = kept.contiguous()
        tap_(kept, self.buffers)

    def buffers_at(self, place: Place) -> Buffers | None:
        """Return the buffers for the active rows, None where they are not a part of what is kept.

        An op that computes these rows may then feed the buffers; `count_silent` does the rest.
        """
        if self.tokens is not None or isinstance(place.active, Tensor):
            return None
        kept, active = self._block(place), place.active or slice(0, place.rows)
        if self.buffers.sums is None or active.start < kept.start or active.stop > kept.stop:
            return None
        return self._cut(active.start - kept.start, active.stop - kept.start)

    def count_silent(self, place: Place, heads: Tensor) -> None:
        """Count the tokens of the rows that are kept and not computed: their sums stay zero."""
        kept = self._block(place)
        active = place.active if isinstance(place.active, slice) else slice(0, place.rows)
        for start, stop in ((kept.start, active.start), (active.stop, kept.stop)):
            if start < stop:
                zeros = heads.new_zeros(stop - start, heads.shape[1], 1)
                cut = self._cut(start - kept.start, stop - kept.start)
                tap_(zeros, Buffers(counts=cut.counts, slot=cut.slot, mask=cut.mask))

    def _block(self, place: Place) -> slice:
        return self.rows or slice(0, place.rows)

    def _cut(self, start: int, stop: int) -> Buffers:
        found, mask = self.buffers, self.buffers.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[start:stop]
        return found._replace(
            sums=None if found.sums is None else found.sums[:, start:stop],
            counts=None if found.counts is None else found.counts[:, start:stop],
            mask=mask,
        )


class _Overheard:
    """An attention module whose output projection tells what it gets.

    A view for one call: the module itself is not touched, so nothing is left behind and a compiled
    graph sees a plain function, not a hook that was added too late.
    """

    def __init__(self, attn: Any, record: HeadRecord) -> None:
        self._attn = attn
        self._record = record

    @property
    def to_out(self) -> Any:
        out = self._attn.to_out
        if isinstance(out, (nn.ModuleList, list)):
            return [_Projection(out[0], self._record), *out[1:]]
        return _Projection(out, self._record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_attn"], name)


class _Projection:
    def __init__(self, layer: Any, record: HeadRecord) -> None:
        self._layer = layer
        self._record = record

    def __call__(self, heads: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._record(heads)
        return self._layer(heads, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


class HeadCapture(Capture):
    """Mean over tokens of what each head puts out, before the output projection.

    `cap[site]` is [steps, branches, B, H, D], in the dtype asked for; sums are kept in float32.
    With W and b of the output projection, `cap[site].flatten(-2) @ W.T + b` is what
    `capture(reduce="mean")` finds there: the share of head h is its D columns of W.

    Alone it changes no bit of the result. Where `cache_context` computes the attention of a site,
    the same kernel feeds the capture (`attention_tap`): the attention is computed once, and the
    result is the one of `cache_context` without a capture.
    """

    def __init__(self, pipe: Any, where: Where, reduce: str, dtype: torch.dtype) -> None:
        super().__init__(pipe, where, reduce, dtype)
        for site in self.sites:
            self._width(site)

    def __getitem__(self, site: str | Site | int) -> Tensor:
        """Return what was recorded at a site, [steps, branches, B, H, D]."""
        return super().__getitem__(site).unflatten(-1, (self.sites[site].heads, -1))

    def _operations_at(self, site: Site) -> list[Operation]:
        return [HeadRecord()]

    def _width(self, site: Site) -> int:
        projection = output_projection(site.module)
        if projection is None:
            raise NotImplementedError(
                f"capture: expected an output projection [reduce='heads' reads in front of it] at "
                f"{site}, got {type(site.module).__name__} without a linear `to_out`"
            )
        return int(projection.in_features)


Capture.reductions["heads"] = HeadCapture
