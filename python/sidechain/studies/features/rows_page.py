# SPDX-License-Identifier: Apache-2.0
"""The page of `sidechain sae score DICT --rows FILE`: metrics, and the rows of strong features."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..._errors import InputError
from ...report import feature_figures
from ...report.data import Block, Bullets, Clip, Facts, Page, Picture, Section, Strip, Table, Text
from ...report.html import picture, write_page
from ...report.media import image_png
from ...sae.features.top import TopExample
from .health import health_table
from .rows import RowsStudy, StrongFeature

#: Shows the item of a row: a text, the path of an image, or an image [H, W] or [H, W, 3 | 4].
Show = Callable[[int], Any]
_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})


def write(study: RowsStudy, path: Path, *, show: Show | None = None) -> Path:
    """Write the page and return its path.

    Args:
        study: what was found.
        path: of the HTML file.
        show: (number of a row) -> a text; the path of an image; or an image, an array or tensor
            [H, W], [H, W, 3] or [H, W, 4] as `image_png` takes it. Called once for a row. None
            shows numbers alone.

    Raises:
        InputError: `show` returns something else; the message has the number of the row.
    """
    return write_page(page(study, show), path)


def page(study: RowsStudy, show: Show | None = None) -> Page:
    """Lay out what was found."""
    health = study.health
    facts = {
        "dictionary": study.name,
        "kind": study.config.architecture,
        "features": study.config.features,
        "width": study.config.d_in,
        "rows": f"{health.rows} of {study.rows}",
    }
    examples: list[Block] = [_examples(study)] if show is None else _strips(study, show)
    return Page(
        title="What a dictionary makes of its rows",
        summary=(
            f"The dictionary {study.name}, measured on {health.rows} rows of {study.rows}: how "
            "much of them it leaves unexplained, how often its features fire, and the rows in "
            "which the strongest ones are largest."
        ),
        findings=_findings(study),
        sections=[
            Section(
                "metrics",
                "Metrics",
                [_health(study), health_table(study.health_table(), "Metrics")],
            ),
            Section(
                "features",
                "Strongest features",
                [_features(study), *examples] if study.strong else [],
            ),
            Section("facts", "Run", [Facts({"Measured": facts})]),
            Section("limits", "Limits", [Bullets(_LIMITS)]),
        ],
    )


_LIMITS = [
    "FVU of rows that the dictionary was trained on is lower than that of others: measure it on "
    "rows that were held out.",
    "Dead are features that are active in none of these rows; rarer ones may fire on others.",
    "The share of the output leaves out that features overlap: two that point the same way count "
    "each by itself.",
]


def _findings(study: RowsStudy) -> list[str]:
    found = [f"{study.line()}."]
    if study.strong:
        first = study.strong[0]
        together = sum(one.share for one in study.strong)
        found.append(
            f"Feature {first.feature} is the strongest: {first.share:.1%} of the output, active in "
            f"{first.density:.1%} of the rows. The {len(study.strong)} strongest carry "
            f"{together:.1%}."
        )
    else:
        found.append("No feature is active in any row.")
    return found


def _health(study: RowsStudy) -> Picture:
    rows, stepped = {study.name: study.health}, study.has_steps and len(study.health.steps) > 1
    dead = int((study.health.density == 0).sum())
    draw = feature_figures.dictionary_health if stepped else feature_figures.feature_densities
    left = "Left: unexplained variance by step. Right: f" if stepped else "F"
    return picture(
        lambda mode, width: draw(rows, theme=mode, width=width),
        "How often the features of the dictionary fire.",
        f"{left}eatures by the share of rows in which they are active, on a logarithmic scale. "
        f"Never active here: {dead} of {study.config.features}.",
    )


def _features(study: RowsStudy) -> Table:
    return Table(
        "Features that carry most of the output",
        ["feature", "share of output", "active in", "size where active"],
        [[f.feature, f"{f.share:.1%}", f"{f.density:.2%}", f"{f.mean:#.3g}"] for f in study.strong],
    )


def _where(study: RowsStudy, example: TopExample) -> str:
    step = f", step {example.step}" if study.has_steps else ""
    return f"row {example.row}{step}"


def _examples(study: RowsStudy) -> Table:
    most = max(len(one.examples) for one in study.strong) if study.strong else 0
    rows = []
    for one in study.strong:
        cells = [f"{_where(study, e)}: {e.value:#.3g}" for e in one.examples]
        rows.append([one.feature, *cells, *[""] * (most - len(cells))])
    columns = ["feature", *(str(number + 1) for number in range(most))]
    return Table("Rows with their largest values", columns, rows)


def _strips(study: RowsStudy, show: Show) -> list[Block]:
    lead = "Rows in which a feature is largest, the largest first. Each strip scrolls sideways."
    shown: dict[int, dict[str, Any]] = {}
    strips = [_strip(study, one, show, shown) for one in study.strong]
    return [Text([lead], soft=True), *strips] if strips else []


def _strip(
    study: RowsStudy, one: StrongFeature, show: Show, shown: dict[int, dict[str, Any]]
) -> Strip:
    clips = []
    for example in one.examples:
        if example.row not in shown:
            shown[example.row] = _item(show, example.row)
        note = f"activation {example.value:#.3g}"
        clips.append(Clip(_where(study, example), note=note, **shown[example.row]))
    about = f"{one.share:.1%} of the output, active in {one.density:.2%} of the rows"
    return Strip(f"Feature {one.feature}", about, clips)


def _item(show: Show, row: int) -> dict[str, Any]:
    """Return what a clip shows of a row."""
    found = show(row)
    if isinstance(found, torch.Tensor):
        found = found.detach().cpu().float().numpy() if found.is_floating_point() else found.numpy()
    try:
        if isinstance(found, np.ndarray):
            return {"image": image_png(found)}
        if isinstance(found, os.PathLike) or _is_image(found):
            return {"image": image_png(Path(found))}
    except (ValueError, OSError) as error:
        raise InputError(
            f"show: expected an image for row {row}, got {' '.join(str(error).split())}"
        ) from None
    if isinstance(found, str):
        return {"text": found}
    raise InputError(
        f"show: expected a text, the path of an image or an array for row {row}, got "
        f"{type(found).__name__}"
    )


def _is_image(found: Any) -> bool:
    """Return whether a text is the path of an image that is there."""
    if not isinstance(found, str) or os.path.splitext(found)[1].lower() not in _IMAGES:
        return False
    return os.path.isfile(found)
