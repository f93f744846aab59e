# SPDX-License-Identifier: Apache-2.0
"""What plain hooks see and change at places beside attention, for tests of taps there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.pipelines import Site, SiteList
from sidechain.testing import call_tiny
from sidechain.testing.tiny import PROMPTS

STEPS = 3


def tokens_of(site: Site, out: Any) -> Tensor:
    """Output of a module for the latents, as [R, T, C]."""
    if site.element is not None:
        out = out[site.element]
    elif isinstance(out, tuple):
        out = out[0]
    return out.flatten(2).transpose(1, 2) if out.dim() == 4 else out


def changed(site: Site, out: Any, edit: Callable[[Tensor], Tensor]) -> Any:
    """Output of a module with that for the latents exchanged."""
    if isinstance(out, tuple):
        place = site.element or 0
        return (*out[:place], edit(out[place]), *out[place + 1 :])
    return edit(out)


@contextmanager
def hooked(sites: SiteList, hook: Callable[[Site, Any], Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for site in sites:
            handle = site.module.register_forward_hook(lambda m, a, out, s=site: hook(s, out))
            stack.callback(handle.remove)
        yield


def direction(width: int) -> Tensor:
    """A vector that a layer norm does not take away, as it does with ones."""
    return torch.randn(width, generator=torch.Generator().manual_seed(5))


def places_of(pipe: Any) -> SiteList:
    """All places that the family lists."""
    known = []
    for kind in ("block", "mlp", "resnet"):
        try:
            sidechain.sites(pipe, kind=kind)
        except ValueError:
            continue
        known.append(f"{kind}:*")
    return sidechain.sites(pipe, known)


@dataclass
class Runs:
    name: str
    pipe: Any

    @property
    def calls(self) -> bool:
        """Whether each branch is a denoiser call of its own."""
        return self.name in ("longcat_audio", "wan")

    def run(self) -> Tensor:
        return call_tiny(self.pipe, PROMPTS[:2], steps=STEPS, seeds=(0, 1))

    @functools.cached_property
    def sites(self) -> SiteList:
        return places_of(self.pipe)

    @functools.cached_property
    def plain(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Result, and by site what it put out: [calls, R, T, C]."""
        outputs: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}

        def note(site: Site, out: Any) -> None:
            outputs[site.name].append(tokens_of(site, out).clone())

        with hooked(self.sites, note):
            result = self.run()
        return result, {name: torch.stack(found) for name, found in outputs.items()}

    @functools.cached_property
    def captured(self) -> Any:
        place = Where(self.sites, branches="all")
        with sidechain.capture(self.pipe, place, reduce="tokens") as cap:
            cap.result = self.run()
        return cap

    def directions(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        return {s.name: torch.randn(s.width, generator=generator) for s in self.sites}
