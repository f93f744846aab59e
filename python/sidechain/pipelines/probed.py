# SPDX-License-Identifier: Apache-2.0
"""What `probe` found in a pipeline, as a table and as an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from .adapter import Adapter, CallShape, call_shape, call_timestep
from .attention import HOLDS, UNKNOWN, Attention, read_attention
from .places import Place

if TYPE_CHECKING:
    from .sites import Site

Form = tuple[int, ...] | list["Form | str"] | str  # of a tensor, of a tuple, of anything else
_GOES = {"yes": HOLDS, "no": "", "not known": UNKNOWN}


@dataclass(frozen=True)
class Argument:
    """A tensor that the denoiser is called with.

    Attributes:
        place: position among its parameters.
        name: of the parameter.
        shape: of the tensor.
    """

    place: int
    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"


@dataclass(frozen=True)
class Probed:
    """What one module did in one denoiser call.

    Attributes:
        name: module path inside the denoiser.
        class_name: of the module.
        role: "attention" | "block" | "mlp" | "" for any other module.
        calls: how often it ran.
        output: form of what it put out.
        context: tokens and width of the context that it received, None where there was none.
        residual: whether its output holds its input: "yes" | "no" | "not known".
        layers: T and C of what the linear layers and layer norms in it put out as [R, T, C].
        processor: whether it has an attention processor.
    """

    name: str
    class_name: str
    role: str
    calls: int
    output: Form
    context: tuple[int, int] | None
    residual: str
    layers: frozenset[tuple[int, int]]
    processor: bool

    def latents(self, rows: int, element: int | None) -> tuple[int, int] | str:
        """Return T and C of the output for the latents, or why it is no site."""
        if self.calls != 1:
            return f"it runs {self.calls} times in a denoiser call"
        form: Form | str = self.output
        if isinstance(form, list):
            if element is None:
                return f"it puts out {len(form)} values: say which with elements={{...}}"
            if not 0 <= element < len(form):
                return f"it puts out {len(form)} values, and elements says {element}"
            form = form[element]
        if not isinstance(form, tuple) or len(form) not in (3, 4):
            return f"it puts out {_shown(form)}, no [R, T, C] or [R, C, h, w]"
        if form[0] != rows:
            return f"it puts out {form[0]} rows of {rows}"
        if len(form) == 4:
            return form[2] * form[3], form[1]
        tokens, widths = ({layer[i] for layer in self.layers} for i in (0, 1))
        # A tuple may be the parts of one sequence, text and image.
        parts = self.output if isinstance(self.output, list) else []
        whole = sum(p[1] for p in parts if isinstance(p, tuple) and p[::2] == form[::2])
        if not {form[1], whole} & tokens or form[2] not in widths:
            return f"whether {list(form)} is [R, T, C] or [R, C, T] is not known"
        return form[1], form[2]


def _shown(form: Form | str) -> str:
    if isinstance(form, tuple):
        return str(list(form))
    return f"({', '.join(map(_shown, form))})" if isinstance(form, list) else form


@dataclass(frozen=True)
class Probe:
    """What one denoiser call of a pipeline showed; `str()` is a table.

    Attributes:
        component: attribute of the pipeline that holds the denoiser.
        denoiser_class: its class name.
        latents: the argument that holds the latents.
        contexts: other arguments of [R, S, C].
        timestep: the argument that held the timestep of the scheduler, None if none did.
        samples: B, the rows of scheduler.step.
        calls: denoiser calls in the step.
        modules: what each module did.
    """

    component: str
    denoiser_class: str
    latents: Argument
    contexts: tuple[Argument, ...]
    timestep: Argument | None
    samples: int
    calls: int
    modules: tuple[Probed, ...]

    @property
    def rows(self) -> int:
        """R of a denoiser call."""
        return self.latents.shape[0]

    def __str__(self) -> str:
        contexts = ", ".join(map(str, self.contexts)) or "none"
        lines = [
            f"denoiser: {self.component} ({self.denoiser_class}), {self.calls} calls in the step, "
            f"{self.rows} rows for {self.samples} samples",
            f"latents: {self.latents}; contexts: {contexts}; timestep: {self.timestep or 'none'}",
        ]
        table = [("name", "class", "role", "output", "context", "residual", "no site, because")]
        for module in self.modules:
            if not module.role:
                continue
            found = module.latents(self.rows, None)
            context = "" if module.context is None else str(list(module.context))
            why = found if isinstance(found, str) else ""
            row = (module.name, module.class_name, module.role, _shown(module.output))
            table.append((*row, context, module.residual, why))
        widths = [max(len(row[i]) for row in table) for i in range(7)]
        lines += ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
                  for r in table]  # fmt: skip
        return "\n".join(lines)

    def adapter(
        self,
        branches: Mapping[int, tuple[str, ...]],
        *,
        calls: tuple[str, ...] = (),
        contexts: tuple[str, ...] | None = None,
        elements: Mapping[str, int] | None = None,
    ) -> Adapter:
        """Make an adapter of what was found; `register_adapter(denoiser_class, adapter)` uses it.

        Args:
            branches: rows per sample -> the guidance branch of each block of rows, in batch order:
                what a call cannot show. {1: ("cond",)} without guidance; {} with `calls`.
            calls: guidance branch of each denoiser call of a step, where there are several.
            contexts: names of the arguments that are contexts. None = all that were found.
            elements: glob over module paths -> number of the element that holds the latents, for
                the modules of these that put out a tuple.

        Raises:
            ValueError: the branches do not fit the rows and calls that were seen; contexts or
                elements that do not exist.
        """
        self._check_branches(branches, calls)
        known = {context.name: context for context in self.contexts}
        unknown = [name for name in contexts or () if name not in known]
        if unknown:
            raise ValueError(f"probe: expected contexts of {list(known)}, got {unknown}")
        tuples = [m.name for m in self.modules if isinstance(m.output, list)]
        idle = [p for p in elements or () if not any(fnmatchcase(name, p) for name in tuples)]
        if idle:
            raise ValueError(
                f"probe: expected elements of modules that put out a tuple, got {idle}"
            )
        chosen = [known[name] for name in (known if contexts is None else contexts)]
        reader = _Reader(self, chosen, dict(elements or {}))
        timestep = self.timestep
        return Adapter(
            family=self.denoiser_class,
            components=(self.component,),
            branches=dict(branches),
            calls=calls,
            shape=call_shape(
                (self.latents.place, self.latents.name), *((c.place, c.name) for c in chosen)
            ),
            tokens=reader.tokens,
            timestep=None if timestep is None else call_timestep(timestep.place, timestep.name),
            describe=reader.describe,
            places=reader.places,
        )

    def _check_branches(
        self, branches: Mapping[int, tuple[str, ...]], calls: tuple[str, ...]
    ) -> None:
        if len(calls or "1") != self.calls:
            raise ValueError(
                f"probe: expected the branch of each of {self.calls} denoiser calls in a step "
                f"[calls=...], got {calls}"
            )
        per_sample, rest = divmod(self.rows, self.samples)
        stated = {1: ("cond",)} if calls else branches
        if rest or per_sample not in stated:
            raise ValueError(
                f"probe: expected branches for {self.rows} rows of {self.samples} samples, got "
                f"those of {sorted(stated)} rows per sample"
            )
        for count, names in ({**branches, len(calls): calls} if calls else branches).items():
            if len(names) != count or len(set(names)) != count or set(names) - {"cond", "uncond"}:
                raise ValueError(
                    f"probe: expected {count} different names of cond, uncond [branches], got "
                    f"{names}"
                )


class _Reader:
    """Answers an adapter's questions from a probe."""

    def __init__(self, probe: Probe, contexts: list[Argument], elements: dict[str, int]) -> None:
        self._probe, self._contexts, self._elements = probe, contexts, elements
        self._modules = {module.name: module for module in probe.modules}

    def _element(self, name: str) -> int | None:
        if not isinstance(self._modules[name].output, list):
            return None
        return next((e for p, e in self._elements.items() if fnmatchcase(name, p)), None)

    def tokens(self, site: Site, shape: CallShape) -> int:
        """Return T as it was in the probe, in calls of latents of the same shape."""
        wanted = self._probe.latents.shape[1:]
        if shape.latent != wanted:
            raise RuntimeError(
                f"sites: expected latents of {list(wanted)} [those of the probe that tells the "
                f"tokens], got {list(shape.latent)}: probe again with this call"
            )
        found = self._modules[site.name].latents(self._probe.rows, self._element(site.name))
        if isinstance(found, str):
            raise RuntimeError(f"sites: expected a site that the probe understood, got {site}: "
                               f"{found}")  # fmt: skip
        return found[0]

    def describe(self, name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
        """Describe attention whose processor can be tapped."""
        probed = self._modules.get(name)
        found = "it did not run in the probe"
        if probed is not None:
            answer = probed.latents(self._probe.rows, self._element(name))
            found = answer if isinstance(answer, str) else ""
        if found or probed is None:
            return found
        if isinstance(probed.output, list):
            return "it puts out a tuple: tap the block around it"
        goes = _GOES[probed.residual]
        try:
            if probed.context is None:
                return read_attention(module, "self", goes=goes)
            reading = [i for i, c in enumerate(self._contexts) if c.shape[1] == probed.context[0]]
            if len(reading) != 1:
                return "which context it reads is not known: name one with contexts=(...)"
            name = self._contexts[reading[0]].name
            return read_attention(module, "cross", reading[0], reads=name, goes=goes)
        except (AttributeError, TypeError, IndexError):
            return f"the projections of a {probed.class_name} are not known"

    def places(self, name: str, module: nn.Module, denoiser: nn.Module) -> Place | str | None:
        """Offer the outputs of blocks, MLPs, and attention without a processor."""
        probed = self._modules.get(name)
        if probed is None or not probed.role or probed.processor:
            return None
        element = self._element(name)
        found = probed.latents(self._probe.rows, element)
        if isinstance(found, str):
            return found
        kind = "module" if probed.role == "attention" else probed.role
        note = "attention" if probed.role == "attention" else ""
        return Place(kind, found[1], element, goes=_GOES[probed.residual], note=note)


def form_of(value: object) -> Form:
    """Return the form of what a module put out."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple):
        return [form_of(part) for part in value]
    return type(value).__name__
