# SPDX-License-Identifier: Apache-2.0
"""edit: change features of a sparse dictionary in what sites put out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._device import send
from ..pipelines import Generation, Site, SiteList, config_hash, execution_device, sites
from . import feature_values, options
from .base import Tap
from .feature_edit import FeatureEdit, SaeLike
from .feature_values import Line
from .layout import expect
from .live import live_generation
from .operations import Operation
from .options import Where, placed, reuse, same_device


class Edit(Tap):
    """Edited features; made by `edit`. `strength` and `values` can be set at any time."""

    name = "edit"

    def __init__(
        self, pipe: Any, chosen: SiteList, saes: dict[str, SaeLike], values: Any, where: Where
    ) -> None:
        super().__init__(pipe, chosen, where.steps)
        self._wanted = options.parse_branches("edit", where.branches)
        self._tokens = options.parse_tokens("edit", where.tokens)
        self._saes = saes
        given = feature_values.by_site(values, chosen)
        missing = [site.alias for site in chosen if site.name not in given]
        if missing:
            raise ValueError(f"edit: expected features for every site, got none for {missing}")
        self._lines = {
            site.name: feature_values.parse(given[site.name], saes[site.name].config.features, site)
            for site in chosen
        }
        self._strength = torch.ones(1)
        self._slot: Tensor | None = None
        self._call = 0  # denoiser call of the step that the strengths are for
        self._strengths: list[Tensor] = []  # of each row [R'], by call
        self._rows: Tensor | None = None  # those of this call
        self._mask: Tensor | None = None
        self._numbers: dict[str, tuple[Tensor, Tensor]] = {}  # gain and shift [R', J]

    # -- what can be changed while the tap is in place ------------------------------------------

    @property
    def strength(self) -> Tensor:
        """Share of the edit that each sample gets, [1] or [B]; set it to a number or to [B]."""
        return self._strength

    @strength.setter
    def strength(self, value: Any) -> None:
        read = options.per_sample("edit", "strength", value, torch.float32)
        generation = live_generation(self)
        if generation is not None:
            options.for_rows("edit", "strength", read, generation)
        self._strength = read
        self._refill(generation)

    @property
    def values(self) -> dict[str, dict[int, Any]]:
        """What becomes of each feature, by alias of the site.

        Set it to {feature: value} or {site: {feature: value}}, of features that are edited
        already; those that are not named stay as they are.
        """
        return {
            site.alias: {j: line.value for j, line in self._lines[site.name].items()}
            for site in self.sites
        }

    @values.setter
    def values(self, values: Any) -> None:
        new = dict(self._lines)
        for name, inner in feature_values.by_site(values, self.sites).items():
            site = self.sites[name]
            read = feature_values.parse(inner, self._saes[name].config.features, site)
            other = sorted(read.keys() - new[name].keys())
            if other:
                raise ValueError(
                    f"edit: expected features of {list(new[name])} [edited at {site}], got {other}"
                )
            new[name] = {**new[name], **read}
        generation = live_generation(self)
        if generation is not None:
            for name, lines in new.items():
                _numbers(lines, generation, self.sites[name])
        flips = any(_reads(new[n]) != _reads(lines) for n, lines in self._lines.items())
        self._lines = new
        self._refill(generation)
        if flips and self._tracker is not None:
            self._tracker.invalidate()  # what was only added to has to be encoded now

    def _refill(self, generation: Generation | None) -> None:
        if generation is not None:
            self.tracker.touch()
            with torch.inference_mode(False), torch.no_grad():
                self._fill(generation)

    # -- following the generation -------------------------------------------------------------

    def _operations_at(self, site: Site) -> list[Operation]:
        return [FeatureEdit()]

    def _bind(self, generation: Generation) -> tuple[str, ...]:
        device = generation.shape.device
        if self._slot is None or self._slot.device != device:
            self._slot = torch.full((1,), -1, dtype=torch.int64, device=device)
        self._call = 0
        self._fill(generation)
        mask = self._token_mask(generation)
        branches = self._branches(generation, self._wanted)
        rows = self._block(generation, branches)
        for site in self.sites:
            (operation,) = self._operations[site.name]
            if isinstance(operation, FeatureEdit):
                expect([operation], site, generation)
                operation.slot, operation.rows, operation.mask = self._slot, rows, mask
                operation.tokens = None if isinstance(self._tokens, Tensor) else self._tokens
                lines = self._lines[site.name]
                features = torch.tensor(list(lines))
                operation.prepare(self._saes[site.name], features, generation, reads=_reads(lines))
        return branches

    def _fill(self, generation: Generation) -> None:
        """Fill strength and numbers of each row of the edited branches."""
        branches = self._branches(generation, self._wanted)
        rows = self._block(generation, branches) or slice(None)
        strength = options.for_rows("edit", "strength", self._strength, generation)
        edited = torch.tensor([b in branches for b in generation.branches], device=strength.device)
        self._strengths = [
            torch.where(edited[generation.branch_of_row(call)], strength, 0.0)[rows]
            for call in range(len(generation.calls))
        ]
        self._rows = reuse(self._rows, self._strengths[self._call])
        for site in self.sites:
            new = [n[rows] for n in _numbers(self._lines[site.name], generation, site)]
            gain, shift = self._numbers.get(site.name, (None, None))
            self._numbers[site.name] = reuse(gain, new[0]), reuse(shift, new[1])
            (operation,) = self._operations[site.name]
            if isinstance(operation, FeatureEdit):
                operation.gain, operation.shift = self._numbers[site.name]
                operation.strength = self._rows

    def _token_mask(self, generation: Generation) -> Tensor | None:
        if not isinstance(self._tokens, Tensor):
            for site in self.sites:
                options.count_tokens("edit", self._tokens, site, generation)
            return None
        mask = options.token_mask("edit", self._tokens, self.sites, generation)
        mask = send(mask, generation.shape.device)
        if mask.shape[0] > 1:
            rows = self._block(generation, self._branches(generation, self._wanted))
            mask = mask[generation.sample_of_row][rows or slice(None)]
        self._mask = reuse(self._mask, mask)
        return self._mask

    def _advance(self, step: int, call: int, inside: bool) -> None:
        if call != self._call and self._rows is not None:
            self._call = call
            self._rows.copy_(self._strengths[call])
        if self._slot is not None:
            self._slot.fill_(step if inside else -1)
        for operations in self._operations.values():
            for operation in operations:
                if isinstance(operation, FeatureEdit):
                    operation.inside = inside


def _reads(lines: Mapping[int, Line]) -> bool:
    """Tell whether the values of features have to be known."""
    return any(line.word != "add" for line in lines.values())


def _numbers(
    lines: Mapping[int, Line], generation: Generation, site: Site
) -> tuple[Tensor, Tensor]:
    """Return gain and shift of every row and feature, [R, J] each."""

    def column(feature: int, value: Tensor) -> Tensor:
        option = f"number of feature {feature} at {site.alias}"
        return options.for_rows("edit", option, value, generation)

    gain = torch.stack([column(j, line.gain) for j, line in lines.items()], 1)
    return gain, torch.stack([column(j, line.shift) for j, line in lines.items()], 1)


@placed
def edit(
    pipe: Any,
    saes: Mapping[Any, SaeLike],
    values: Mapping[Any, Any],
    where: Any = None,
    *,
    strength: Any = 1.0,
) -> Edit:
    """Change features of sparse dictionaries in what attention sites put out.

    y = x + strength scale sum_j (f'_j - f_j) w_dec[j] for the output x of the module before its
    residual, with f = the features that the dictionary reads in x, in the units of `Sae.encode`,
    and scale = that of its normaliser at this step. Nothing but the edited features changes: what
    the dictionary does not reconstruct survives. Several edits and steers at one site act in the
    order of their attachment; captures see what was there before all of them.

    Args:
        pipe: diffusers pipeline.
        saes: {site: `sidechain.sae.Sae`}, dictionaries of the outputs of these sites.
        values: {feature: value} for every site, or {site: {feature: value}}. A value is
            ("scale", s): f' = s f, ("set", v): f' = v, ("add", a): f' = f + a, or "zero": f' = 0,
            with a number or one for each sample [B].
        where: sites, or a `Where`, which names branches, steps and tokens too. None = the sites
            of `saes` (where values are given by site, those of them), in the cond branch.
        strength: number, or one for each sample [B]. 1 is the full edit, 0 is bit-identical to no
            tap, linear in between and beyond.

    Returns:
        A context manager (or handle: attach, remove) whose `strength` and `values` can be set at
        any time.

    Raises:
        TypeError, ValueError: options that do not fit each other, the dictionaries, the sites or
            the generation.
        NotImplementedError: a transcoder, which says nothing of the site it reads.
        RuntimeError: on leaving the context, a site that never ran.

    Differentiable in: the activations. A normaliser with an entry for each step is interpolated to
    the steps of the generation. Source: Templeton et al. 2024 (feature clamping).
    """
    if not isinstance(saes, Mapping) or not saes:
        raise TypeError(f"edit: expected {{site: Sae}}, got {saes!r}")
    named = isinstance(values, Mapping) and all(isinstance(k, str | Site) for k in values)
    known = sites(pipe, [*saes, *(values if named else ())])
    by_name = {known[key].name: _checked(pipe, known[key], sae) for key, sae in saes.items()}
    place = Where.of(where)
    chosen = place.chosen(pipe, [known[k].name for k in values] if named else list(by_name))
    missing = [site.alias for site in chosen if site.name not in by_name]
    if missing:
        raise ValueError(f"edit: expected a dictionary for every site, got none for {missing}")
    tap = Edit(pipe, chosen, by_name, values, place)
    tap.strength = strength
    return tap


def _checked(pipe: Any, site: Site, sae: SaeLike) -> SaeLike:
    """Check a dictionary against its site."""
    if not isinstance(sae, SaeLike):
        raise TypeError(f"edit: expected a Sae for {site}, got {type(sae).__name__}")
    if sae.config.transcoder:
        raise NotImplementedError(
            f"edit: expected an autoencoder for {site}, got a transcoder [it writes elsewhere]"
        )
    if sae.config.d_in != site.width:
        raise ValueError(
            f"edit: expected a dictionary of width {site.width} [width of {site}], got "
            f"{sae.config.d_in}"
        )
    made, here = sae.provenance.config_hash, config_hash(pipe)
    if made and made != here:
        raise ValueError(
            f"edit: expected a dictionary made for a denoiser with config hash {here} [this "
            f"pipeline], got {made}"
        )
    device, lies = execution_device(pipe, site.module), sae.w_dec.device
    if lies.type != "cpu" and not same_device(lies, device):
        raise ValueError(
            f"edit: expected the dictionary of {site} on cpu or {device} [where the denoiser "
            f"computes], got {lies}"
        )
    if sae.config.kind.selects != "row":
        sae.thresholded_encoder()  # says so where none was trained
    if sae.provenance.site not in ("", site.name, site.alias):
        warnings.warn(
            f"edit: the dictionary given for {site} was trained at {sae.provenance.site}",
            RuntimeWarning,
            stacklevel=4,
        )
    return sae
