# SPDX-License-Identifier: Apache-2.0
"""The sites of a pipeline and the patterns that select them.

Attention sites are listed; other places (blocks, MLPs, resnets, single layers) are found when they
are asked for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, overload

from torch import nn

from .adapter import Adapter, find_denoiser, unwrap
from .attention import ATTENTION_KINDS
from .places import PLACE_KINDS, Place, read_module

KINDS = (*ATTENTION_KINDS, *PLACE_KINDS)
_RANGE = re.compile(rf"^({'|'.join(KINDS)}):(\d+)-(\d+)$")

_UNET = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


@dataclass(frozen=True)
class Site:
    """One module whose output can be tapped.

    Attributes:
        name: module path inside the denoiser, `transformer_blocks.3.attn2`.
        alias: kind and index, `cross:3`; of a "module" its name.
        kind: of attention "cross" | "self" | "joint" (one attention over latents and context, which
            puts out both; the site is the output for the latents); of other places "block" | "mlp"
            | "resnet" | "module" (any other layer).
        index: place among the sites of its kind.
        width: C of the module's output.
        context_width: C of what keys and values are computed from, 0 where there is no attention.
        heads: H, 0 where there is no attention.
        module: the module.
        denoiser: the model that holds it.
        source: number of the context it reads, in families with several; None where it reads none.
        note: what else has to be known of its output.
        reads: what the context is, as a word: "text", "image", "second encoder".
        goes: where the output goes: "added to the residual", "gated, then added to the residual",
            "before the block's proj_out", "holds the residual"; empty = not known.
        element: number of the element for the latents in the tuple that a place puts out; None =
            one tensor, or attention.
        nick: a second alias, `resnet:mid`.
        order: sorts sites in the order in which they put out.
    """

    name: str
    alias: str
    kind: str
    index: int
    width: int
    context_width: int
    heads: int
    module: nn.Module = field(repr=False, compare=False)
    denoiser: nn.Module = field(repr=False, compare=False)
    source: int | None = None
    note: str = ""
    reads: str = ""
    goes: str = ""
    element: int | None = None
    nick: str = ""
    order: tuple[int, int] = field(default=(0, 0), repr=False, compare=False)

    @property
    def is_attention(self) -> bool:
        """Tell whether it is an attention module."""
        return self.kind in ATTENTION_KINDS

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the denoiser."""
        return dict(getattr(self.denoiser, "config", {}))

    def __str__(self) -> str:
        return self.name


SitePattern = str | Site | Iterable["str | Site"]
_Found = dict[str, Site]  # by name


class SiteList(Sequence[Site]):
    """Ordered sites; indexable by place, name or alias; `str()` is a table.

    Attributes:
        family: name of the pipeline family.
        refused: module name -> why a module is no site.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        family: str = "",
        refused: Mapping[str, str] | None = None,
        elsewhere: _Elsewhere | None = None,
    ) -> None:
        self._sites = tuple(sites)
        self.family = family
        self.refused = dict(refused or {})
        self._elsewhere = elsewhere  # what else `select` can find
        self._by_key = {key: s for s in self._sites for key in (s.name, s.alias, s.nick) if key}

    @overload
    def __getitem__(self, key: int | str | Site) -> Site: ...
    @overload
    def __getitem__(self, key: slice) -> SiteList: ...
    def __getitem__(self, key: int | str | Site | slice) -> Site | SiteList:
        """Return one site by place, name, alias or itself, or several by a slice of places."""
        if isinstance(key, slice):
            return SiteList(self._sites[key], self.family, self.refused)
        if isinstance(key, int):
            return self._sites[key]
        name = key.name if isinstance(key, Site) else key
        try:
            return self._by_key[name]
        except KeyError:
            raise ValueError(self._unknown(name)) from None

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __contains__(self, key: object) -> bool:
        name = key.name if isinstance(key, Site) else key
        return name in self._by_key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SiteList) and self._sites == other._sites

    def __hash__(self) -> int:
        return hash(self._sites)

    @property
    def names(self) -> list[str]:
        """Module paths in order."""
        return [s.name for s in self._sites]

    @property
    def aliases(self) -> list[str]:
        """Aliases in order."""
        return [s.alias for s in self._sites]

    def select(self, pattern: SitePattern = "*") -> SiteList:
        """Keep the sites a pattern names, in the order of the model.

        Args:
            pattern: glob over names or aliases ("*.attn2", "cross:*"), a range of aliases
                ("cross:2-5", both ends included), a site, or several of these. One that names no
                attention is looked up among the other places ("block:*", "mlp:3", "resnet:mid"),
                then as the path of a module ("transformer_blocks.3.norm1").

        Raises:
            ValueError: a part of the pattern matches nothing.
            TypeError: the pattern is of another type.
        """
        parts = [pattern] if isinstance(pattern, str | Site) else pattern
        if not isinstance(parts, Iterable):
            raise TypeError(
                f"sites: expected a pattern of type str, Site or several of them, got "
                f"{type(pattern).__name__}"
            )
        wanted: _Found = {}
        for part in parts:
            found = self._matching(part)
            if not found and self._elsewhere is not None and part != "*":
                found = self._elsewhere.matching(part)
            if not found:
                raise ValueError(self._unknown(str(part)))
            wanted |= found
        chosen = sorted(wanted.values(), key=lambda site: site.order)
        return SiteList(chosen, self.family, self.refused)

    def _unknown(self, name: str) -> str:
        known, refused = self.summary(), dict(self.refused)
        what = dict.fromkeys(refused, "an attention module")
        if self._elsewhere is not None:
            others = self._elsewhere.listed
            known += f", {others.summary()}" if len(others) else ""
            refused |= self._elsewhere.reasons(name)
        why = ""
        if name in refused:
            why = f" [{what.get(name, 'a module')}, but no site: {refused[name]}]"
        return f"sites: expected one of {known}, got {name!r}{why}"

    def _matching(self, part: str | Site) -> _Found:
        if isinstance(part, Site):
            found = self._by_key.get(part.name)
            return {} if found is None else {found.name: found}
        if not isinstance(part, str):
            raise TypeError(f"sites: expected str or Site, got {type(part).__name__}")
        if part in self._by_key:
            return {self._by_key[part].name: self._by_key[part]}
        span = _RANGE.match(part)
        if span:
            kind, first, last = span[1], int(span[2]), int(span[3])
            some = [s for s in self._sites if s.kind == kind and first <= s.index <= last]
            # A range past the last site is a mistake, not a request for fewer sites.
            return {s.name: s for s in some} if len(some) == last - first + 1 else {}
        return {
            s.name: s
            for s in self._sites
            if fnmatchcase(s.alias, part) or fnmatchcase(s.name, part)
        }

    def summary(self) -> str:
        """Say in one line what is listed."""
        parts = []
        for kind in KINDS:
            some = [s for s in self._sites if s.kind == kind]
            if some:
                last = f"-{some[-1].index}" if len(some) > 1 else ""
                parts.append(f"{kind}:{some[0].index}{last} ({some[0].name} ... {some[-1].name})")
        parts += [s.name for s in self._sites if s.kind == "module"]
        return ", ".join(parts) or "no sites"

    def __str__(self) -> str:
        rows = [("alias", "name", "kind", "width", "heads", "reads", "output", "note")]
        for s in self._sites:
            heads = str(s.heads) if s.heads else ""
            alias = f"{s.alias} {s.nick}" if s.nick else s.alias
            rows.append((alias, s.name, s.kind, str(s.width), heads, s.reads, s.goes, s.note))
        shown = [i for i in range(8) if i < 4 or any(row[i] for row in rows[1:])]
        widths = [max(len(row[i]) for row in rows) for i in range(8)]
        lines = ["  ".join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in rows]
        lines += [f"no site: {name} ({reason})" for name, reason in self.refused.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"SiteList({self.aliases})"


def sites(pipe: Any, pattern: SitePattern = "*", kind: str | None = None) -> SiteList:
    """List the attention sites of a pipeline, or other places where they are asked for.

    Args:
        pipe: diffusers pipeline whose denoiser belongs to a registered family.
        pattern: see `SiteList.select`.
        kind: keep only sites of a kind, see `Site.kind`. None = all that the pattern names.

    Returns:
        The sites in the order in which the denoiser runs them.

    Raises:
        TypeError: the pipeline has no denoiser of a known family; `sidechain.probe` looks into it.
        ValueError: the pattern or the kind names nothing that exists.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"sites: expected kind {', '.join(KINDS)} or None, got {kind!r}")
    _, denoiser, adapter = find_denoiser(pipe)
    refused: dict[str, str] = {}
    modules = _in_order(denoiser)
    found = list(_discover(modules, denoiser, adapter, refused))
    everything = SiteList(found, adapter.family, refused, _Elsewhere(modules, denoiser, adapter))
    if kind in PLACE_KINDS and pattern == "*":
        pattern = f"{kind}:*"
    _check_component(pipe, denoiser, pattern)
    chosen = everything.select(pattern)
    if kind is None:
        return chosen
    kept = SiteList((s for s in chosen if s.kind == kind), adapter.family, refused)
    if not len(kept):
        raise ValueError(
            f"sites: expected at least one {kind} site [kind={kind!r}], got {chosen.summary()}"
        )
    return kept


def _check_component(pipe: Any, denoiser: nn.Module, pattern: SitePattern) -> None:
    """Refuse places in other models of the pipeline."""
    for part in [pattern] if isinstance(pattern, str) else ():
        name = part.partition(".")[0]
        model = dict(getattr(pipe, "components", {})).get(name)
        if isinstance(model, nn.Module) and unwrap(model) is not denoiser:
            raise ValueError(
                f"sites: expected a place in the denoiser [text encoders run outside of denoiser "
                f"calls, without step and guidance branch], got {part!r} in a "
                f"{type(model).__name__}"
            )


_Module = tuple[str, nn.Module, tuple[int, int]]  # name, itself, its `Site.order`


def _in_order(denoiser: nn.Module) -> list[_Module]:
    """List the modules of a denoiser, blocks under `torch.compile` by what they wrap."""
    found = [
        (".".join(part for part in name.split(".") if part != "_orig_mod"), module)
        for name, module in denoiser.named_modules()
        if name and "_orig_mod" not in module._modules
    ]
    # U-Nets register their middle block last.
    found.sort(key=lambda item: _UNET.get(item[0].partition(".")[0], 0))
    last: dict[str, int] = {}
    for place, (name, _) in enumerate(found):
        while name:
            last[name] = place
            name = name.rpartition(".")[0]
    # A module puts out after all of its parts have.
    return [(name, module, (last[name], -name.count("."))) for name, module in found]


def _discover(
    modules: list[_Module], denoiser: nn.Module, adapter: Adapter, refused: dict[str, str]
) -> Iterator[Site]:
    counts = dict.fromkeys(ATTENTION_KINDS, 0)
    for name, module, order in modules:
        if not hasattr(module, "set_processor"):
            continue
        found = adapter.describe(name, module, denoiser)
        if isinstance(found, str):
            refused[name] = found
            continue
        index = counts[found.kind]
        counts[found.kind] += 1
        yield Site(
            name=name,
            alias=f"{found.kind}:{index}",
            index=index,
            module=module,
            denoiser=denoiser,
            order=order,
            **vars(found),
        )


class _Elsewhere:
    """The places of a denoiser beside attention."""

    def __init__(self, modules: list[_Module], denoiser: nn.Module, adapter: Adapter) -> None:
        self._modules, self._denoiser, self._adapter = modules, denoiser, adapter

    @functools.cached_property
    def listed(self) -> SiteList:
        """Blocks, MLPs and resnets."""
        counts = dict.fromkeys((*PLACE_KINDS, "module"), 0)
        found: list[Site] = []
        refused: dict[str, str] = {}
        for item in sorted(self._modules, key=lambda item: item[2]):
            place = self._adapter.places(item[0], item[1], self._denoiser)
            if isinstance(place, Place):
                found.append(self._site(item, place, counts[place.kind]))
                counts[place.kind] += 1
            elif place is not None:
                refused[item[0]] = place
        return SiteList(found, self._adapter.family, refused)

    def matching(self, part: str | Site) -> _Found:
        """Find places by a part of a pattern, or any layer by its path."""
        found = self.listed._matching(part)
        name = part.name if isinstance(part, Site) else part
        item = next((item for item in self._modules if item[0] == name), None)
        if found or item is None or name in self.listed.refused:
            return found
        place = read_module(item[1])
        return {} if isinstance(place, str) else {name: self._site(item, place, 0)}

    def reasons(self, name: str) -> dict[str, str]:
        """Say why a module is no place; empty where there is none of that name."""
        found = dict(self.listed.refused)
        module = next((item[1] for item in self._modules if item[0] == name), None)
        if module is not None and name not in found and not hasattr(module, "set_processor"):
            place = read_module(module)
            found |= {name: place} if isinstance(place, str) else {}
        return found

    def _site(self, item: _Module, place: Place, index: int) -> Site:
        name, module, order = item
        return Site(
            name=name,
            alias=name if place.kind == "module" else f"{place.kind}:{index}",
            index=index,
            context_width=0,
            heads=0,
            module=module,
            denoiser=self._denoiser,
            order=order,
            **vars(place),
        )
