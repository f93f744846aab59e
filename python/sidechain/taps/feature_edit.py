# SPDX-License-Identifier: Apache-2.0
"""The change of dictionary features at one site, driven by device tensors."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import _device
from ..ops import CodeEdit, Encoder, sae_edit_, topk_encode
from ..pipelines import Generation
from ..reference.sae_edit import sae_edit as reference_edit
from .operations import Change
from .options import reuse
from .time_axis import TimeAxis


@runtime_checkable
class SaeLike(Protocol):
    """What an edit needs of a dictionary; `sidechain.sae.Sae` is one."""

    config: Any
    provenance: Any
    normaliser: Any
    target_normaliser: Any
    w_enc: Any
    b_enc: Any
    w_dec: Any

    @property
    def b_pre(self) -> Tensor:
        """Vector subtracted from the normalised input [d]."""

    def thresholded_encoder(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return (w, b, t): a feature is active where z = w u + b > t, with value z."""


class Reader(NamedTuple):
    """How the values of the edited features are read; all on the device of the site.

    Of an architecture with thresholds only the edited features are computed; topk compares all
    features of a token with each other, so all of them are.
    """

    encoder: Encoder
    k: int
    place: Tensor  # [F of encoder] int64: column of a feature in the edit, J = none
    threshold: Tensor  # [J]

    @classmethod
    def of(cls, sae: SaeLike, features: Tensor, device: torch.device, old: Reader | None) -> Reader:
        """Make the reader of features [J] of a dictionary, in the buffers of an old one."""
        count = len(features)
        place = torch.arange(count, device=device)
        if sae.config.kind.selects == "row":
            w, b, threshold = sae.w_enc, sae.b_enc, torch.zeros(count)
            columns, k = place, sae.config.k
            place = torch.full((sae.config.features,), count, device=device)
            place[features] = columns
        else:
            w, b, limit = sae.thresholded_encoder()
            picked = features.to(w.device)
            threshold = torch.as_tensor(limit, dtype=torch.float32, device=w.device)
            threshold = threshold.expand(sae.config.features)[picked]
            w, b, k = w[picked], b[picked], count
        before: Any = old or (None,) * 4
        bias_before: Any = before[0] or (None,) * 3
        weights = zip((w, b, sae.b_pre), bias_before, strict=True)
        return cls(
            Encoder(*(_placed(t, device, kept) for t, kept in weights)),
            k,
            reuse(before[2], place),
            reuse(before[3], threshold.detach().to(device)),
        )

    def read(self, y: Tensor) -> Tensor:
        """Return the values [N, J] of the edited features in normalised rows y [N, d]."""
        count = len(self.threshold)
        values, indices, _ = topk_encode(y, self.encoder, k=self.k)
        index = indices.long()
        place = torch.where(index < 0, count, self.place[index.clamp(min=0)])
        # Column J collects what is not edited.
        found = values.new_zeros(len(y), count + 1).scatter(1, place, values)[:, :count]
        return torch.where(found <= self.threshold, 0.0, found)  # NaN stays


class Units(NamedTuple):
    """Normalisation of a dictionary at each step of a generation."""

    mean: Tensor  # [S, d] of the input
    scale: Tensor  # [S] of the input
    out_scale: Tensor  # [S] of the output

    @classmethod
    def of(cls, sae: SaeLike, generation: Generation) -> Units:
        """Move the normalisation of a dictionary to the time grid of a generation.

        Raises:
            ValueError: entries for steps without timesteps, or grids that do not overlap.
        """
        (mean, scale), (_, out_scale) = (
            _on_grid(n, generation) for n in (sae.normaliser, sae.target_normaliser)
        )
        device = generation.shape.device
        return cls(mean.to(device), scale.to(device), out_scale.to(device))


def _on_grid(normaliser: Any, generation: Generation) -> tuple[Tensor, Tensor]:
    mean, scale = normaliser.mean, normaliser.scale
    if normaliser.steps is None or len(scale) == 1:
        steps = generation.steps
        return mean[:1].expand(steps, -1), scale[:1].expand(steps)
    if normaliser.timesteps is None:
        if normaliser.steps.tolist() != list(range(generation.steps)):
            raise ValueError(
                f"edit: expected a dictionary of steps 0 to {generation.steps - 1} [of this "
                f"generation; it has no timesteps to interpolate over], got steps "
                f"{normaliser.steps.tolist()}"
            )
        return mean, scale
    axis = TimeAxis.of(
        "edit: expected a dictionary", normaliser.timesteps.cpu(), _cpu(normaliser.sigmas),
        generation,
    )  # fmt: skip
    if axis.same:
        return mean, scale
    # As `Normaliser.resampled`: the scale linearly in its logarithm.
    return axis.move(mean), axis.move(scale.log()[:, None])[:, 0].exp()


def _placed(t: Tensor, device: torch.device, old: Tensor | None) -> Tensor:
    """Return the weights themselves where they lie on the device, else a copy that is kept."""
    t = t.detach()
    return t if t.device == device else reuse(old, t.to(device))


def _cpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cpu()


class FeatureEdit(Change):
    """Moves the output of a site by the change of a few features of its dictionary.

    Attributes:
        rows: block of rows that the buffers describe; None = all.
        tokens: slice of tokens that are edited; None = all.
        inside: whether the step lies in the window; read only where no graph is recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: slice | None = None
        self.tokens: slice | None = None
        self.inside = True
        self.reader: Reader | None = None  # None: values are only added to
        self.units: Units
        self.w_dec: Tensor  # [J, C]
        self.columns: Tensor  # [J] int32, 0 ... J - 1
        self.slot: Tensor  # [1] int64, -1 outside of the window
        self.strength: Tensor  # [R'] float32, 0 in rows that stay
        self.gain: Tensor  # [R', J] float32
        self.shift: Tensor  # [R', J] float32
        self.mask: Tensor | None = None  # [1 | R', T] bool

    def prepare(
        self, sae: SaeLike, features: Tensor, generation: Generation, *, reads: bool
    ) -> None:
        """Fill the buffers with what the dictionary says of features [J].

        Args:
            sae: dictionary of the site.
            features: that are edited.
            generation: the generation to come.
            reads: whether their values have to be known.
        """
        device = generation.shape.device
        w_dec = sae.w_dec.detach()[features.to(sae.w_dec.device)].to(device)
        self.w_dec = reuse(getattr(self, "w_dec", None), w_dec)
        columns = torch.arange(len(features), dtype=torch.int32, device=device)
        self.columns = reuse(getattr(self, "columns", None), columns)
        units = Units.of(sae, generation)
        before = getattr(self, "units", (None,) * len(units))
        self.units = Units(*(reuse(old, new) for old, new in zip(before, units, strict=True)))
        self.reader = Reader.of(sae, features, device, self.reader) if reads else None

    def __call__(self, out: Tensor) -> Tensor:
        """Edit `out`, in place where no gradient is wanted."""
        self.mark()
        # A graph that is recorded must not hold the window of one step.
        if not torch.compiler.is_compiling() and not _device.capturing() and not self.inside:
            return out
        where = (self.rows or slice(None), self.tokens or slice(None))
        view = out[where]
        flat = view.reshape(-1, view.shape[2])
        edit, strength, mask = self._arguments(flat, view.shape[0], view.shape[1])
        if out.dtype != torch.float64 and not (torch.is_grad_enabled() and out.requires_grad):
            sae_edit_(flat, edit, self.w_dec, strength=strength, mask=mask)
            return out if view.is_contiguous() else self._put(out, where, flat)
        edited = reference_edit(flat, edit, self.w_dec, strength, mask)
        return self._put(out, where, edited)

    @staticmethod
    def _put(out: Tensor, where: tuple[slice, slice], flat: Tensor) -> Tensor:
        if flat.requires_grad:
            out = out.clone()
        view = out[where]
        view.copy_(flat.view(view.shape))
        return out

    def _arguments(
        self, flat: Tensor, rows: int, tokens: int
    ) -> tuple[CodeEdit, Tensor, Tensor | None]:
        """Return the change of every token, its strength [N] and the mask [N]."""
        units, step = self.units, self.slot.clamp(min=0)
        strength = torch.where(self.slot < 0, 0.0, self.strength * units.out_scale[step])
        mask = self.mask
        if mask is not None:
            mask = mask.expand(rows, tokens).reshape(-1)
        old, new = None, _each_token(self.shift, tokens)
        if self.reader is not None:
            rows_of_step = flat.to(units.mean.dtype) - units.mean[step]
            old = self.reader.read(rows_of_step / units.scale[step])
            new = _each_token(self.gain, tokens) * old + new
        edit = CodeEdit(old, new, self.columns.expand(len(flat), -1))
        return edit, _each_token(strength, tokens), mask


def _each_token(rows: Tensor, tokens: int) -> Tensor:
    """Repeat what holds for each row [R', ...] for its tokens [R' T, ...]."""
    return rows[:, None].expand(-1, tokens, *rows.shape[1:]).flatten(0, 1)
