# SPDX-License-Identifier: Apache-2.0
"""The page of `sidechain demo`: what its studies found, with the pieces of their own pages."""

from __future__ import annotations

from pathlib import Path

from ...report.data import Block, Bullets, Commands, Facts, Heading, Page, Section, Text
from ...report.html import write_page
from ..localization import page as localization
from ..page import counted, listed
from ..steering import page as steering
from .run import DemoResult, folder_of


def write(result: DemoResult, path: Path) -> Path:
    """Write the page and return its path."""
    return write_page(page(result), path)


def page(result: DemoResult) -> Page:
    """Lay out everything a demo found."""
    config = result.config
    curves: list[Block] = []
    sounds: list[Block] = []
    findings = localization.findings(result.localization)
    for name, found in result.steering.items():
        curves += [Heading(name), *steering.blocks(found)]
        sounds += steering.sounds(folder_of(result.out, name), found)
        findings += steering.findings(found)
    run = {
        **{f"seconds, {name}": round(value, 1) for name, value in result.seconds.items()},
        "steps of the sampler": config.steps,
        "guidance scale": config.guidance,
        "seed": config.seed,
    }
    return Page(
        title="Where a music model keeps its concepts, and how to turn them up",
        summary=(
            "A small text-to-music diffusion transformer with eight cross-attentions, trained for "
            "this package, was searched for the sites through which each concept enters. Then "
            f"{listed(config.steered)} were pushed up at those sites, at all sites, at the other "
            "sites and along a random direction of the same size."
        ),
        findings=findings,
        sections=[
            Section("method", "What was done", [Text(_method(result))]),
            Section("listen", "Listen", sounds),
            Section("where", "Where the concepts enter", localization.blocks(result.localization)),
            Section("steering", "Effect and preservation", curves),
            Section("facts", "Model and run", [Facts({"Model": result.model, "Run": run})]),
            Section("limits", "Limits", [Bullets(_LIMITS)]),
            Section("reproduce", "Reproduce", [Commands([f"sidechain demo --seed {config.seed}"])]),
        ],
    )


def _method(result: DemoResult) -> list[str]:
    config = result.config
    return [
        f"Localization: {counted(config.pairs, 'prompt pair')} per concept. The run starts from "
        "the prompt without the concept; one site at a time sees the prompt with it. Impact is the "
        "share of the full effect that comes through, in log-odds of the scorers (mean of both). "
        "All presets of a pair run in one batch.",
        f"Steering: the vector is the mean difference of a site's output over "
        f"{config.vector_pairs} other prompt pairs, per step; strength 1 adds exactly that "
        "difference to the conditional pass. All strengths and arms of a prompt run in one batch.",
        "Two classifiers that share neither architecture nor training clips read every result. "
        "Bars and bands are 95% intervals over prompts.",
    ]


_LIMITS = [
    "The model knows eight instruments, five seconds and about sixty words.",
    "The scorers learned from the same renderer as the model; `sidechain.zoo.music_tagger` is an "
    "outside witness.",
    "Few prompts: read intervals, not points. `sidechain localize` and `sidechain steer` run the "
    "same studies at full size.",
]
