# SPDX-License-Identifier: Apache-2.0
"""The attention sites of a pipeline and the patterns that select them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, overload

from torch import nn

from .adapter import Adapter, find_denoiser

KINDS = ("cross", "self", "joint")
_RANGE = re.compile(rf"^({'|'.join(KINDS)}):(\d+)-(\d+)$")

_UNET = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


@dataclass(frozen=True)
class Site:
    """One attention module.

    Attributes:
        name: module path inside the denoiser, `transformer_blocks.3.attn2`.
        alias: kind and index, `cross:3`.
        kind: "cross" | "self" | "joint" (one attention over latents and context, which puts out
            both; the site is the output for the latents).
        index: place among the sites of its kind.
        width: C of the module's output.
        context_width: C of what keys and values are computed from.
        heads: H.
        module: the attention module.
        denoiser: the model that holds it.
        source: number of the context it reads, in families with several; None for "self".
        note: what else has to be known of its output.
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

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the denoiser."""
        return dict(getattr(self.denoiser, "config", {}))

    def __str__(self) -> str:
        return self.name


SitePattern = str | Site | Iterable["str | Site"]


class SiteList(Sequence[Site]):
    """Ordered sites; indexable by place, name or alias; `str()` is a table.

    Attributes:
        family: name of the pipeline family.
        refused: module name -> why an attention module is no site.
    """

    def __init__(
        self, sites: Iterable[Site], family: str = "", refused: Mapping[str, str] | None = None
    ) -> None:
        self._sites = tuple(sites)
        self.family = family
        self.refused = dict(refused or {})
        self._by_key = {key: s for s in self._sites for key in (s.name, s.alias)}

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
                ("cross:2-5", both ends included), a site, or several of these.

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
        wanted: set[str] = set()
        for part in parts:
            found = self._matching(part)
            if not found:
                raise ValueError(self._unknown(str(part)))
            wanted |= found
        return SiteList((s for s in self._sites if s.name in wanted), self.family, self.refused)

    def _unknown(self, name: str) -> str:
        reason = self.refused.get(name)
        why = "" if reason is None else f" [an attention module, but no site: {reason}]"
        return f"sites: expected one of {self.summary()}, got {name!r}{why}"

    def _matching(self, part: str | Site) -> set[str]:
        if isinstance(part, Site):
            return {part.name} if part.name in self._by_key else set()
        if not isinstance(part, str):
            raise TypeError(f"sites: expected str or Site, got {type(part).__name__}")
        if part in self._by_key:
            return {self._by_key[part].name}
        span = _RANGE.match(part)
        if span:
            kind, first, last = span[1], int(span[2]), int(span[3])
            found = {s.name for s in self._sites if s.kind == kind and first <= s.index <= last}
            # A range past the last site is a mistake, not a request for fewer sites.
            return found if len(found) == last - first + 1 else set()
        return {
            s.name for s in self._sites if fnmatchcase(s.alias, part) or fnmatchcase(s.name, part)
        }

    def summary(self) -> str:
        """Say in one line what exists."""
        parts = []
        for kind in KINDS:
            some = [s for s in self._sites if s.kind == kind]
            if some:
                last = f"-{some[-1].index}" if len(some) > 1 else ""
                parts.append(f"{kind}:{some[0].index}{last} ({some[0].name} ... {some[-1].name})")
        return ", ".join(parts) or "no sites"

    def __str__(self) -> str:
        rows = [("alias", "name", "kind", "width", "heads", "source", "note")]
        for s in self._sites:
            source = "" if s.source is None else str(s.source)
            rows.append((s.alias, s.name, s.kind, str(s.width), str(s.heads), source, s.note))
        shown = [i for i in range(7) if i < 5 or any(row[i] for row in rows[1:])]
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = ["  ".join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in rows]
        lines += [f"no site: {name} ({reason})" for name, reason in self.refused.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"SiteList({self.aliases})"


def sites(pipe: Any, pattern: SitePattern = "*", kind: str | None = None) -> SiteList:
    """List the attention sites of a pipeline.

    Args:
        pipe: diffusers pipeline whose denoiser belongs to a registered family.
        pattern: see `SiteList.select`.
        kind: keep only "cross", "self" or "joint" attention. None = all.

    Returns:
        The sites in the order in which the denoiser runs them.

    Raises:
        TypeError: the pipeline has no denoiser of a known family.
        ValueError: the pattern or the kind names nothing that exists.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"sites: expected kind {', '.join(KINDS)} or None, got {kind!r}")
    _, denoiser, adapter = find_denoiser(pipe)
    refused: dict[str, str] = {}
    found = list(_discover(denoiser, adapter, refused))
    chosen = SiteList(found, adapter.family, refused).select(pattern)
    if kind is None:
        return chosen
    kept = SiteList((s for s in chosen if s.kind == kind), adapter.family, refused)
    if not len(kept):
        raise ValueError(
            f"sites: expected at least one {kind} site [kind={kind!r}], got {chosen.summary()}"
        )
    return kept


def _discover(denoiser: nn.Module, adapter: Adapter, refused: dict[str, str]) -> Iterator[Site]:
    counts = dict.fromkeys(KINDS, 0)
    modules = [(n, m) for n, m in denoiser.named_modules() if n and hasattr(m, "set_processor")]
    # U-Nets register their middle block last.
    for name, module in sorted(modules, key=lambda item: _UNET.get(item[0].partition(".")[0], 0)):
        found = adapter.describe(name, module, denoiser)
        if isinstance(found, str):
            refused[name] = found
            continue
        name = name.replace("_orig_mod.", "")  # of a block under torch.compile
        index = counts[found.kind]
        counts[found.kind] += 1
        alias = f"{found.kind}:{index}"
        yield Site(
            name=name, alias=alias, index=index, module=module, denoiser=denoiser, **vars(found)
        )
