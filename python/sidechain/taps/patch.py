# SPDX-License-Identifier: Apache-2.0
"""patch: give a site another input or output than the generation it is in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..pipelines import Generation, Site, SitePattern, execution_device, sites
from ..pipelines.attention import HOLDS, UNKNOWN
from . import options
from .base import Tap
from .capture import Capture
from .layout import expect
from .operations import Ablate, Operation, Replace, Swap
from .options import Where, placed, reuse

Rows = Any  # None | bool [B] | {site: bool [B]}


class Patch(Tap):
    """Edited inputs or outputs of sites; made by `patch`."""

    name = "patch"

    def __init__(
        self,
        pipe: Any,
        where: Where,
        inputs: dict[str, Tensor],
        output: Mapping[str, Tensor] | None,
        rows: Rows,
        source: Capture | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if where.tokens is not None:
            raise NotImplementedError(
                f"patch: expected no tokens in where [every token is replaced], got {where.tokens}"
            )
        super().__init__(pipe, where.chosen(pipe, "*"), where.steps)
        self._wanted = options.parse_branches("patch", where.branches)
        self._inputs = inputs
        self._output = output
        self._mask = mask  # [B, S] bool of the context
        # Of a capture its steps and branches are known; else they are those that are patched.
        self._output_steps = None if source is None else source.steps
        self._output_branches = None if source is None else source.branches
        self._call = 0  # denoiser call of the step that the selection is for
        self._rows = self._parse_rows(rows)
        self._base: dict[str, list[Tensor]] = {}  # by site, of each call
        self._selected: dict[str, Tensor] = {}
        self._banks: dict[str, Tensor] = {}
        self._spread_mask: Tensor | None = None
        self._live: bool | None = None
        self._slot: Tensor | None = None
        device = execution_device(pipe, self.sites[0].module)
        if inputs:
            self._check_sources()
        for option, value in inputs.items():
            self._check_input(option, value, device)
        if output is not None:
            for site in self.sites:
                self._check_output(site, device)
        elif not inputs:
            self._check_ablation()

    # -- checks -------------------------------------------------------------------------------

    def _parse_rows(self, rows: Rows) -> dict[str, Tensor]:
        if not isinstance(rows, Mapping):
            chosen = torch.ones(1, dtype=torch.bool)
            if rows is not None:
                chosen = options.per_sample("patch", "rows", rows, torch.bool)
            return {site.name: chosen for site in self.sites}
        read = {
            self.sites[key].name: options.per_sample("patch", f"rows[{key}]", value, torch.bool)
            for key, value in rows.items()
        }
        missing = [s.alias for s in self.sites if s.name not in read]
        if missing:
            raise ValueError(
                f"patch: expected rows for every site [rows is a mapping], got none for "
                f"{', '.join(missing)}"
            )
        return read

    def _check_sources(self) -> None:
        cross = [site for site in self.sites if site.kind == "cross"]
        for site in cross[1:]:
            if site.source != cross[0].source:
                raise ValueError(
                    f"patch: expected sites that read one context, got {cross[0].alias} (source "
                    f"{cross[0].source}) and {site.alias} (source {site.source})"
                )

    def _check_input(self, option: str, value: Tensor, device: torch.device) -> None:
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"patch: expected {option} as a float tensor [B, S, C], got {got}")
        self._check_device(option, value, device)
        for site in self.sites:
            if site.kind != "cross":
                raise ValueError(
                    f"patch: expected cross-attention sites [{option}=...], got {site}"
                )
            if value.dim() not in (2, 3) or value.shape[-1] != site.context_width:
                raise ValueError(
                    f"patch: expected {option} of shape [B, S, {site.context_width}] [context "
                    f"width of {site}], got {list(value.shape)}"
                )
            fused = getattr(site.module, "fused_projections", False)
            fused = fused or not hasattr(site.module, "to_k")
            normed = getattr(site.module, "norm_cross", None) is not None
            if option != "context" and (fused or normed):
                raise NotImplementedError(
                    f"patch: expected separate, un-normed key and value projections [{option}=...],"
                    f" got {'fused ones' if fused else 'a context norm'} at {site}"
                )

    def _check_output(self, site: Site, device: torch.device) -> None:
        value = (self._output or {})[site.name]
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"patch: expected output as a float tensor [steps, B, T, C], got {got}")
        self._check_device("output", value, device)
        if value.dim() not in (4, 5) or value.shape[-1] != site.width:
            raise ValueError(
                f"patch: expected output of shape [steps, B, T, {site.width}] or [steps, branches, "
                f"B, T, {site.width}] [width of {site}], got {list(value.shape)}"
            )

    def _check_ablation(self) -> None:
        for site in self.sites:
            if site.goes in (HOLDS, UNKNOWN) or getattr(site.module, "residual_connection", False):
                raise NotImplementedError(
                    f"patch: expected sites without a residual inside [ablate=True], got {site}: "
                    "zeros would take the residual away too"
                )

    # -- following the generation -------------------------------------------------------------

    def _operations_at(self, site: Site) -> list[Operation]:
        if self._output is not None:
            return [Replace()]
        if not self._inputs:
            return [Ablate()]
        if "context" in self._inputs:
            return [Swap(key=True, value=True)]
        return [Swap(key=option == "key", value=option == "value") for option in self._inputs]

    def _bind(self, generation: Generation) -> tuple[str, ...]:
        branches = self._branches(generation, self._wanted)
        for option, value in self._inputs.items():
            self._banks[option] = reuse(
                self._banks.get(option), self._bank(option, value, generation)
            )
        mask = self._bank_mask(generation)
        if self._slot is None or self._slot.device != generation.shape.device:
            self._slot = torch.zeros(1, dtype=torch.int64, device=generation.shape.device)
        for site in self.sites:
            rows = options.for_rows(
                "patch", f"rows at {site.alias}", self._rows[site.name], generation
            )
            self._base[site.name] = [
                (rows & self._rows_in(generation, call, branches))[:, None, None]
                for call in range(len(generation.calls))
            ]
            selected = reuse(self._selected.get(site.name), self._base[site.name][0])
            self._selected[site.name] = selected
            expect(self._operations[site.name], site, generation)
            for operation, option in zip(
                self._operations[site.name], self._inputs or [""], strict=True
            ):
                if isinstance(operation, Swap | Replace | Ablate):
                    operation.selected = selected
                if isinstance(operation, Swap):
                    operation.bank = self._banks[option]
                    operation.mask = mask
                    operation.partial = mask is not None and not bool(mask.all())
                elif isinstance(operation, Replace):
                    bank = self._outputs(site, generation, branches)
                    operation.bank = reuse(getattr(operation, "bank", None), bank)
                    operation.slot = self._slot
        self._live, self._call = True, 0
        return branches

    @staticmethod
    def _rows_in(generation: Generation, call: int, branches: tuple[str, ...]) -> Tensor:
        """Return which rows of a call are of some branches, [R] bool."""
        inside = torch.tensor([b in branches for b in generation.branches])
        return inside.to(generation.shape.device)[generation.branch_of_row(call)]

    def _bank_mask(self, generation: Generation) -> Tensor | None:
        """Spread the mask of the context over the rows: [R, S] bool."""
        if self._mask is None:
            return None
        samples = generation.samples
        for site in self.sites:
            tokens = generation.context_tokens(site)
            if self._mask.shape[0] not in (1, samples) or self._mask.shape[1] != tokens:
                raise ValueError(
                    f"patch: expected a mask of shape [{samples}, {tokens}] [samples of this "
                    f"generation, context tokens of {site}], got {list(self._mask.shape)}"
                )
        mask = self._mask.to(generation.shape.device)
        spread = mask.expand(samples, -1)[generation.sample_of_row]
        self._spread_mask = reuse(self._spread_mask, spread)
        return self._spread_mask

    def _bank(self, option: str, value: Tensor, generation: Generation) -> Tensor:
        """Spread [B | 1, S, C] over the rows: [R, S, C]."""
        value = value[None] if value.dim() == 2 else value
        samples = generation.samples
        for site in self.sites:
            tokens = generation.context_tokens(site)
            if value.shape[0] not in (1, samples) or value.shape[1] != tokens:
                raise ValueError(
                    f"patch: expected {option} of shape [{samples}, {tokens}, {value.shape[2]}] "
                    f"[samples of this generation, context tokens of {site}], got "
                    f"{list(value.shape)}"
                )
        value = value.to(generation.shape.dtype)
        return value.expand(generation.samples, -1, -1)[generation.sample_of_row]

    def _outputs(self, site: Site, generation: Generation, branches: tuple[str, ...]) -> Tensor:
        """Spread [steps, branches | 1, B, T, C] over [steps, R, T, C]; other rows are 0."""
        value = self._output_at(site)
        steps, given, samples, tokens, width = value.shape
        expected = [len(self._places()), generation.samples, generation.tokens(site)]
        if [steps, samples, tokens] != expected:
            raise ValueError(
                f"patch: expected output of shape {[*expected, width]} [steps and samples of "
                f"this generation, tokens of {site}], got {list(value.shape)}"
            )
        if given not in (1, len(branches)) and self._output_branches is None:
            raise ValueError(
                f"patch: expected output with 1 or {len(branches)} branches [{list(branches)}], "
                f"got {given}"
            )
        return self._spread(value, generation, branches).flatten(0, 1)

    def _output_at(self, site: Site) -> Tensor:
        """Return the output that is given for a site [steps, branches | 1, B, T, C]."""
        value = (self._output or {})[site.name]
        return value[:, None] if value.dim() == 4 else value

    def _spread(self, value: Tensor, generation: Generation, branches: tuple[str, ...]) -> Tensor:
        """Spread [steps, branches | 1, B, T, C] over [steps, calls, R, T, C]; other rows are 0."""
        steps, given, _, tokens, width = value.shape
        value = value.to(generation.shape.dtype)
        calls, rows = len(generation.calls), generation.shape.rows
        bank = value.new_zeros(steps, calls, rows, tokens, width)
        for branch in branches:
            place = self._place_of(branch, branches, given)
            if place is not None:
                bank[:, generation.call_of(branch), generation.rows_of(branch)] = value[:, place]
        return bank

    def _place_of(self, branch: str, branches: tuple[str, ...], given: int) -> int | None:
        """Return where an output has a branch, None if it has not."""
        if self._output_branches is not None:
            known = self._output_branches
            return known.index(branch) if branch in known else None
        return branches.index(branch) if given > 1 else 0

    def _places(self) -> tuple[int, ...]:
        """Return the step of each entry of the outputs."""
        return tuple(range(*self._span)) if self._output_steps is None else self._output_steps

    def _advance(self, step: int, call: int, inside: bool) -> None:
        generation = self._generation
        if (inside, call) != (self._live, self._call):
            for site in self.sites:
                selected = self._selected[site.name]
                if inside:
                    selected.copy_(self._base[site.name][call])
                else:
                    selected.zero_()
            self._live, self._call = inside, call
        if not inside or generation is None or self._slot is None:
            return
        if self._output is not None:
            self._check_outputs(step, generation.calls[call])
            self._slot.fill_(self._places().index(step) * len(generation.calls) + call)
        self._follow_gradients(generation, step, call)

    def _check_outputs(self, step: int, branches: tuple[str, ...]) -> None:
        if step not in self._places():
            raise ValueError(
                f"patch: expected an output for step {step}, got those of {list(self._places())} "
                "[steps of the capture]"
            )
        known = self._output_branches
        lacking = [] if known is None else [b for b in branches if b not in known]
        lacking = [b for b in lacking if b in self._acts_on]
        if lacking:
            raise ValueError(
                f"patch: expected an output for the {lacking[0]} branch, got those of "
                f"{list(known or ())} [branches of the capture]"
            )

    # -- gradients ----------------------------------------------------------------------------

    def _follow_gradients(self, generation: Generation, step: int, call: int) -> None:
        """Use the tensors that a gradient is wanted for: themselves, and in the buffers."""
        for site in self.sites:
            for operation, option in zip(
                self._operations[site.name], self._inputs or [""], strict=True
            ):
                if isinstance(operation, Swap):
                    value = self._inputs[option]
                    operation.live = None
                    if value.requires_grad:
                        operation.live = partial(self._bank, option, value, generation)
                        operation.bank.copy_(operation.live())
                elif isinstance(operation, Replace):
                    place = self._places().index(step)
                    operation.live = None
                    if self._output_at(site).requires_grad:
                        operation.live = partial(
                            self._output_of_call, site, generation, place, call
                        )
                        entry = place * len(generation.calls) + call
                        operation.bank[entry].copy_(operation.live())

    def _output_of_call(self, site: Site, generation: Generation, place: int, call: int) -> Tensor:
        """Return one entry of the outputs of a site [R, T, C]."""
        value = self._output_at(site)[place : place + 1]
        return self._spread(value, generation, self._branches(generation, self._wanted))[0, call]


@placed
def patch(
    pipe: Any,
    where: SitePattern | Where,
    *,
    context: Tensor | tuple[Tensor, Tensor | None] | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    output: Tensor | Mapping[Any, Tensor] | Capture | None = None,
    ablate: bool = False,
    rows: Rows = None,
) -> Patch:
    """Replace what chosen sites see or put out, for chosen samples.

    Give exactly one of: `context`; `key` and / or `value`; `output`; `ablate=True`.

    Args:
        pipe: diffusers pipeline.
        where: sites, or a `Where`, which names branches and steps too.
        context: [B, S, C], [1, S, C] or [S, C], what keys and values are computed from instead;
            `contexts` makes it. Where attention reads a mask, a pair of this and the tokens that
            may be read, [B, S] or [1, S] bool: `contexts(..., masks=True)`.
        key: the same for keys only.
        value: the same for values only.
        output: [steps, B, T, C], or [steps, branches, B, T, C], in place of the module's output;
            one tensor, {site: tensor}, or a capture made with reduce="tokens". A capture knows its
            steps and branches; tensors are of the steps of the window and of the branches in
            `where`: `Where(steps=(cap.steps[0], cap.steps[-1] + 1))` for one that began late.
        ablate: put out zeros.
        rows: samples to patch, bool [B], or {site: bool [B]}. None = all.

    Returns:
        A context manager (or handle: attach, remove).

    Raises:
        TypeError, ValueError: options that do not fit each other, the sites or the generation.
        RuntimeError: on leaving the context, a site that never ran.

    Differentiable in: the activations, and a context, key, value or output with requires_grad:
    where gradients are enabled the sites compute with that tensor, and without them with the
    values that it holds at the beginning of the step. Rows that are not selected stay
    bit-identical.
    """
    mask = None
    if isinstance(context, tuple):
        context, mask = _context_and_mask(context)
    inputs = {
        k: v for k, v in (("context", context), ("key", key), ("value", value)) if v is not None
    }
    given = [
        *(["context"] if context is not None else []),
        *(["key / value"] if key is not None or value is not None else []),
        *(["output"] if output is not None else []),
        *(["ablate"] if ablate else []),
    ]
    if len(given) != 1:
        raise ValueError(
            "patch: expected exactly one of context, key / value, output, ablate, got "
            f"{', '.join(given) or 'none'}"
        )
    place = Where.of(where)
    outputs = None if output is None else _outputs_by_name(pipe, place, output)
    source = output if isinstance(output, Capture) else None
    return Patch(pipe, place, inputs, outputs, rows, source, mask)


def _context_and_mask(pair: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    if len(pair) != 2:
        raise TypeError(
            f"patch: expected context as a tensor or a pair of it and its mask, got {len(pair)} "
            "values"
        )
    context, mask = pair
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"patch: expected the mask of a context as a bool tensor [B, S], got {got}")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"patch: expected the mask of a context of shape [B, S], got {list(mask.shape)}"
        )
    return context, mask


def _outputs_by_name(pipe: Any, where: Where, output: Any) -> dict[str, Tensor]:
    chosen = where.chosen(pipe, "*")
    if isinstance(output, Tensor):
        return {site.name: output for site in chosen}
    if isinstance(output, Capture):
        if output.reduce != "tokens":
            raise ValueError(
                f"patch: expected a capture with reduce='tokens', got {output.reduce!r}"
            )
        return {site.name: output[site.name] for site in chosen}
    if isinstance(output, Mapping):
        known = sites(pipe, list(output))
        given = {known[key].name: value for key, value in output.items()}
        missing = [s.alias for s in chosen if s.name not in given]
        if missing:
            raise ValueError(f"patch: expected an output for every site, got none for {missing}")
        return given
    raise TypeError(
        f"patch: expected output as a tensor, a mapping or a capture, got {type(output).__name__}"
    )
