# SPDX-License-Identifier: Apache-2.0
"""Find the sites that a concept enters through, with a score that is a function of your own.

Every row of a batch is called with the prompt that lacks the concept; row i sees the prompt with
the concept at site i alone. The impact of a site is the share of the effect that it restores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import sidechain
from sidechain.metrics.impact import impact
from sidechain.report.media import save_figure
from sidechain.report.theme import drawing
from sidechain.testing import latents_of

from . import start

CLEAN, CORRUPTED = "a slow piano song", "a slow violin song"
SEEDS = (0, 1, 2)


class Found(NamedTuple):
    """Impact of each site and of all sites together, by seed."""

    sites: list[str]
    impacts: np.ndarray  # [seeds, sites]
    everywhere: np.ndarray  # [seeds]; 1 where the text enters through these sites alone


def score(samples: Tensor, clean: Tensor) -> Tensor:
    """Put your own here: a number for each sample, higher with the concept. [rows, ...] -> [rows].

    This one is minus the distance to the sample that the prompt with the concept gives.
    """
    return -(samples - clean).double().flatten(1).norm(dim=1)


def main(argv: Sequence[str] | None = None) -> Found:
    """Measure, draw impact.png and return the impacts."""
    given = start.options(__doc__, argv)
    pipe = start.pipeline(given.model, "stable_audio")
    call = start.settings(given, pipe)
    sites = sidechain.sites(pipe, "cross:*").aliases
    # Both prompts in one call, so that their texts are padded alike.
    states, mask = sidechain.contexts(pipe, [CLEAN, CORRUPTED], site=sites[0], masks=True, **call)
    context = (states[:1], None if mask is None else mask[:1])
    # Rows: each site alone, all sites, no site, and the clean prompt with nothing patched.
    count = len(sites)
    prompts = [CORRUPTED] * (count + 2) + [CLEAN]
    rows = {}
    for index, site in enumerate(sites):
        rows[site] = torch.zeros(count + 3, dtype=torch.bool)
        rows[site][[index, count]] = True
    impacts = []
    for seed in SEEDS:
        generator = start.noise(*[seed] * len(prompts))
        with sidechain.patch(pipe, sites, context=context, rows=rows):
            made = pipe(prompts, generator=generator, output_type="latent", **call)
        samples = latents_of(made)
        scores = score(samples, samples[-1:]).cpu().numpy()
        impacts.append(impact(scores[: count + 1], scores[-2], scores[-1]))
    table = np.stack(impacts)
    found = Found(sites, table[:, :-1], table[:, -1])
    print(draw(found, given.out / "impact.png"))
    return found


def draw(found: Found, path: Path) -> Path:
    """Draw a bar for each site, the mean over seeds, and a dot for each seed."""
    labels, values = [*found.sites, "all sites"], np.c_[found.impacts, found.everywhere]
    with drawing("light", "wide", 3.2) as (figure, theme):
        axes = figure.add_subplot()
        colours = [theme.arms["localized"]] * len(found.sites) + [theme.arms["random"]]
        axes.bar(labels, values.mean(0), 0.6, color=colours)
        for row in values:
            axes.plot(labels, row, "o", color=theme.ink, markersize=4, zorder=4)
        axes.set_ylabel("impact")
        axes.set_xlabel("cross-attention site that sees the prompt with the concept")
        axes.set_title(f"{CLEAN!r} against {CORRUPTED!r}; dots are seeds")
        axes.grid(False, axis="x")
        if len(labels) > 12:
            axes.tick_params(axis="x", labelrotation=60)
    return save_figure(figure, path)


if __name__ == "__main__":
    main()
