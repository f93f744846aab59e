# SPDX-License-Identifier: Apache-2.0
"""Steer SDXL: a direction from pairs of prompts, and one batch with a strength for each image.

A direction is the mean output of a site with the concept minus the mean without it, so strength 1
adds what the concept adds; strength 0 is the image without steering, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import sidechain
from sidechain.pipelines import PromptPairs
from sidechain.report.media import save_figure
from sidechain.report.theme import drawing
from sidechain.vectors import caa

from . import start

THINGS = ("piano", "violin", "guitar", "organ")
PROMPT = "a flute"
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0, 4.0)


class Found(NamedTuple):
    """The images."""

    steered: Tensor  # [strengths, 3, H, W] in 0 .. 1
    plain: Tensor  # the same batch without steering


def main(argv: Sequence[str] | None = None) -> Found:
    """Make the vector, sweep, draw sweep.png and return the images."""
    given = start.options(__doc__, argv)
    pipe = start.pipeline(given.model, "sdxl")
    call = start.settings(given, pipe)
    pairs = PromptPairs(
        [f"a {thing} with drums" for thing in THINGS],
        [f"a {thing}" for thing in THINGS],
        concept="drums",
    )
    vector = caa(pipe, pairs, "cross:*", batch_size=2, normalise=False, progress=False, **call)
    vector.save(given.out / "drums.safetensors")

    def images() -> Tensor:
        count = len(STRENGTHS)  # all start from the same noise
        made = pipe([PROMPT] * count, generator=start.noise(*[0] * count), output_type="pt", **call)
        return made.images.float().cpu()

    with sidechain.steer(pipe, vector, strength=list(STRENGTHS)):
        steered = images()
    print(draw(steered, given.out / "sweep.png"))
    return Found(steered, images())


def draw(steered: Tensor, path: Path) -> Path:
    """Draw the images in a row, each under its strength."""
    with drawing("light", "wide", 2.3) as (figure, _):
        panels = figure.subplots(1, len(STRENGTHS))
        for axes, image, strength in zip(panels, steered, STRENGTHS, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set_title(f"strength {strength:g}")
            axes.set_axis_off()
        figure.suptitle(f"{PROMPT!r} steered towards 'drums'", x=0.01, ha="left")
    return save_figure(figure, path)


if __name__ == "__main__":
    main()
