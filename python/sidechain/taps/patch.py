# SPDX-License-Identifier: Apache-2.0
"""patch: give a site another input or output than the generation it is in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..pipelines import Generation, Site, SitePattern, execution_device, sites
from . import options
from .base import Tap
from .capture import Capture
from .layout import expect
from .options import Where, placed, reuse
from .processor import Ablate, Operation, Replace, Swap

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
        steps: tuple[int, ...] | None = None,
    ) -> None:
        if where.tokens is not None:
            raise NotImplementedError(
                f"patch: expected no tokens in where [every token is replaced], got {where.tokens}"
            )
        super().__init__(pipe, where.chosen(pipe, "*"), where.steps)
        self._wanted = options.parse_branches("patch", where.branches)
        self._inputs = inputs
        self._output = output
        self._output_steps = steps  # that `output` is of; None = those of the window
        self._rows = self._parse_rows(rows)
        self._base: dict[str, Tensor] = {}
        self._selected: dict[str, Tensor] = {}
        self._banks: dict[str, Tensor] = {}
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
            if getattr(site.module, "residual_connection", False):
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

    def _bind(self, generation: Generation) -> None:
        branches = self._branches(generation, self._wanted)
        in_branch = torch.tensor(
            [p in branches for p in generation.branches], device=generation.shape.device
        )
        in_branch = in_branch[generation.branch_of_row]
        for option, value in self._inputs.items():
            self._banks[option] = reuse(
                self._banks.get(option), self._bank(option, value, generation)
            )
        if self._slot is None or self._slot.device != generation.shape.device:
            self._slot = torch.zeros(1, dtype=torch.int64, device=generation.shape.device)
        for site in self.sites:
            rows = options.for_rows(
                "patch", f"rows at {site.alias}", self._rows[site.name], generation
            )
            self._base[site.name] = (rows & in_branch)[:, None, None]
            selected = reuse(self._selected.get(site.name), self._base[site.name])
            self._selected[site.name] = selected
            expect(self._operations[site.name], site, generation)
            for operation, option in zip(
                self._operations[site.name], self._inputs or [""], strict=True
            ):
                if isinstance(operation, Swap | Replace | Ablate):
                    operation.selected = selected
                if isinstance(operation, Swap):
                    operation.bank = self._banks[option]
                elif isinstance(operation, Replace):
                    bank = self._outputs(site, generation, branches)
                    operation.bank = reuse(getattr(operation, "bank", None), bank)
                    operation.slot = self._slot
        self._live = True

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
        if given not in (1, len(branches)):
            raise ValueError(
                f"patch: expected output with 1 or {len(branches)} branches [{list(branches)}], "
                f"got {given}"
            )
        return self._spread(value, generation, branches)

    def _output_at(self, site: Site) -> Tensor:
        """Return the output that is given for a site [steps, branches | 1, B, T, C]."""
        value = (self._output or {})[site.name]
        return value[:, None] if value.dim() == 4 else value

    @staticmethod
    def _spread(value: Tensor, generation: Generation, branches: tuple[str, ...]) -> Tensor:
        """Spread [steps, branches | 1, B, T, C] over [steps, R, T, C]; other rows are 0."""
        steps, tokens, width = value.shape[0], *value.shape[3:]
        value = value.to(generation.shape.dtype).expand(-1, len(branches), -1, -1, -1)
        bank = value.new_zeros(steps, generation.shape.rows, tokens, width)
        for place, branch in enumerate(branches):
            bank[:, generation.rows_of(branch)] = value[:, place]
        return bank

    def _places(self) -> tuple[int, ...]:
        """Return the step of each entry of the outputs."""
        return tuple(range(*self._span)) if self._output_steps is None else self._output_steps

    def _advance(self, step: int, inside: bool) -> None:
        if inside and self._output is not None and step not in self._places():
            raise ValueError(
                f"patch: expected an output for step {step}, got those of {list(self._places())} "
                "[steps of the capture]"
            )
        if inside != self._live:
            for site in self.sites:
                selected = self._selected[site.name]
                if inside:
                    selected.copy_(self._base[site.name])
                else:
                    selected.zero_()
            self._live = inside
        if inside and self._slot is not None and self._output is not None:
            self._slot.fill_(self._places().index(step))
        if self._generation is not None and inside:
            self._follow_gradients(self._generation, step)

    # -- gradients ----------------------------------------------------------------------------

    def _follow_gradients(self, generation: Generation, step: int) -> None:
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
                        operation.live = partial(self._output_of_step, site, generation, place)
                        operation.bank[place].copy_(operation.live())

    def _output_of_step(self, site: Site, generation: Generation, place: int) -> Tensor:
        """Return one entry of the outputs of a site [R, T, C]."""
        value = self._output_at(site)[place : place + 1]
        return self._spread(value, generation, self._branches(generation, self._wanted))[0]


@placed
def patch(
    pipe: Any,
    where: SitePattern | Where,
    *,
    context: Tensor | None = None,
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
            `contexts` makes it.
        key: the same for keys only.
        value: the same for values only.
        output: [steps, B, T, C], or [steps, branches, B, T, C], in place of the module's output;
            one tensor, one for each site, or a capture made with reduce="tokens".
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
    steps = output.steps if isinstance(output, Capture) else None
    return Patch(pipe, place, inputs, outputs, rows, steps)


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
        known = sites(pipe)
        given = {known[key].name: value for key, value in output.items()}
        missing = [s.alias for s in chosen if s.name not in given]
        if missing:
            raise ValueError(f"patch: expected an output for every site, got none for {missing}")
        return given
    raise TypeError(
        f"patch: expected output as a tensor, a mapping or a capture, got {type(output).__name__}"
    )
