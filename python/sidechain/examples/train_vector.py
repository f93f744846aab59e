# SPDX-License-Identifier: Apache-2.0
"""Train a steering vector by gradient: one prompt has to give what another prompt gives.

The gradient runs through all denoising steps, which are kept in memory: take few of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sidechain
from sidechain.pipelines import config_hash
from sidechain.report.media import save_figure
from sidechain.report.theme import drawing
from sidechain.testing import latents_of
from sidechain.vectors import Provenance

from . import start

PROMPT, WANTED = "a slow piano song", "a fast rock song"
UPDATES, REACHED = 300, 0.02  # updates at most; share of the first loss to stop at


class Found(NamedTuple):
    """What training reached."""

    losses: list[float]  # before each update
    saved: float  # loss with the vector that was written


def main(argv: Sequence[str] | None = None) -> Found:
    """Train, write vector.safetensors, draw loss.png and return the losses."""
    given = start.options(__doc__, argv)
    # Small gradients are lost in half precision.
    pipe = start.pipeline(given.model, "stable_audio", torch.float32)
    # The pipeline's own call, without the decorator that disables gradients.
    with_gradients: Any = inspect.unwrap(type(pipe).__call__)
    call = {**start.settings(given, pipe), "output_type": "latent"}
    with torch.no_grad():
        target = latents_of(pipe(WANTED, generator=start.noise(0), **call))
    sites = sidechain.sites(pipe, "cross:*")
    sites[0].denoiser.requires_grad_(False)
    device = next(sites[0].module.parameters()).device
    vectors = {s.name: torch.zeros(s.width, device=device, requires_grad=True) for s in sites}
    optimiser = torch.optim.Adam(vectors.values(), lr=0.002)
    losses: list[float] = []
    with sidechain.steer(pipe, vectors):
        while len(losses) < UPDATES:
            made = with_gradients(pipe, PROMPT, generator=start.noise(0), return_dict=False, **call)
            loss = (latents_of(made) - target).float().square().mean()
            losses.append(float(loss.detach()))
            if losses[-1] <= REACHED * losses[0]:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    vector = sidechain.SteeringVector(
        {(name, "cond"): v.detach()[None].cpu() for name, v in vectors.items()},
        provenance=Provenance(method="trained", concept=WANTED, config_hash=config_hash(pipe)),
    )
    saved = sidechain.SteeringVector.load(vector.save(given.out / "vector.safetensors"), pipe)
    with sidechain.steer(pipe, saved):
        made = pipe(PROMPT, generator=start.noise(0), **call)
    found = Found(losses, float((latents_of(made) - target).float().square().mean()))
    print(draw(losses, given.out / "loss.png"))
    return found


def draw(losses: list[float], path: Path) -> Path:
    """Draw the loss after each number of updates."""
    with drawing("light", "wide", 3.2) as (figure, theme):
        axes = figure.add_subplot()
        axes.semilogy(losses, color=theme.arms["localized"])
        axes.axhline(REACHED * losses[0], color=theme.soft, lw=0.9, ls=(0, (4, 3)))
        axes.text(0, REACHED * losses[0], f"target: {REACHED:.0%} of the first loss", va="bottom")
        axes.set_xlabel("updates")
        axes.set_ylabel("mean squared distance")
        axes.set_title(f"{PROMPT!r} steered to {WANTED!r}")
    return save_figure(figure, path)


if __name__ == "__main__":
    main()
