# SPDX-License-Identifier: Apache-2.0
"""Show where in an image each word of the prompt is read: attention maps, one for each word.

A map is the share of attention that each place gives to the word, the mean over heads, steps and
sites. The shares of all tokens, those of the padding included, add up to 1 at every place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sidechain
from sidechain.report.media import save_figure
from sidechain.report.theme import drawing

from . import start

PROMPT = "a sad piano and the happy violin"


class Found(NamedTuple):
    """The image and the maps."""

    image: Tensor  # [H, W, 3] in 0 .. 1
    words: dict[str, Tensor]  # word -> [h, w]
    total: Tensor  # [h, w], maps of all tokens added up


def main(argv: Sequence[str] | None = None) -> Found:
    """Generate, draw maps.png and return the maps."""
    given = start.options(__doc__, argv)
    pipe = start.pipeline(given.model, "sd")
    with sidechain.capture(pipe, "cross:*", reduce="maps") as cap:
        made = pipe(
            PROMPT, generator=start.noise(0), output_type="pt", **start.settings(given, pipe)
        )
    length = cap["cross:0"].shape[-1]
    words = dict.fromkeys(PROMPT.split())
    maps = {w: over_sites(cap, sidechain.token_places(pipe, PROMPT, w)) for w in words}
    image = made.images[0].permute(1, 2, 0).float().cpu()
    found = Found(image, maps, over_sites(cap, range(length)))
    print(draw(found, given.out / "maps.png"))
    return found


def over_sites(cap: Any, places: Sequence[int]) -> Tensor:
    """Bring the maps of all sites to the size of the largest and return their mean [h, w]."""
    maps = [cap.map(site, places)[0].float().cpu() for site in cap.sites]
    size = max((m.shape for m in maps), key=lambda shape: shape[0] * shape[1])
    grown = [F.interpolate(m[None, None], size, mode="bilinear")[0, 0] for m in maps]
    return torch.stack(grown).mean(0)


def draw(found: Found, path: Path) -> Path:
    """Draw the image and a map for each word, all in one scale of colours."""
    top = max(float(m.max()) for m in found.words.values())
    columns = 4
    lines = -(-(len(found.words) + 1) // columns)
    with drawing("light", "wide", 2.6 * lines) as (figure, theme):
        panels = figure.subplots(lines, columns, squeeze=False).reshape(-1)
        for axes in panels:
            axes.set_axis_off()
        panels[0].imshow(found.image.numpy())
        panels[0].set_title("image")
        for axes, (word, place) in zip(panels[1:], found.words.items(), strict=False):
            shown = axes.imshow(place.numpy(), cmap=theme.heat, vmin=0.0, vmax=top)
            axes.set_title(word)
        figure.colorbar(shown, ax=panels.tolist(), label="share of attention", fraction=0.03)
    return save_figure(figure, path)


if __name__ == "__main__":
    main()
