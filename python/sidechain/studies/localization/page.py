# SPDX-License-Identifier: Apache-2.0
"""The page of `sidechain localize`: heat maps of impact, the sites to steer at and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...metrics.impact import functional, ranking
from ...metrics.results import Impacts
from ...report import figures
from ...report.data import Block, Clip, Meter, Page, Picture, Section, Strip, Table, Text
from ...report.html import picture, write_page
from ...zoo.music.concepts import concept
from .. import page as shared
from ..page import PAGE, RunRead, counted, listed, scorer_label
from .analyse import BOTH, STEERED_SHARE, Localization, analyse
from .config import LocalizationConfig
from .presets import clip_name

_FILES = {
    "ranking.csv": "sites by mean impact, with intervals and what each scorer reads",
    "impact.csv": "impact of every site on every concept, the input of sidechain impact",
    "scores.csv": "every reading: concept, preset, prompt pair, seed, scorer",
    "summary.json": "ranking, selected sites, cumulative effect",
}
_SWAPPED = {"context": "keys and values", "key": "keys", "value": "values"}


def write(folder: Path) -> Path:
    """Write `report.html` into the run folder, from the files in it; return its path.

    Raises:
        InputError: no localization there, or nothing measured yet.
        OSError: a file cannot be read or written.
    """
    run, found, missing = read(folder)
    return write_page(page(run, found, missing), folder / PAGE)


def read(folder: Path) -> tuple[RunRead, Localization, list[str]]:
    """Read a run back: its files, what it found, and the concepts not measured yet."""
    run = shared.read_run(folder, "localize", "scores.csv", LocalizationConfig)
    rows, seeds = run.table, list(run.config["seeds"])
    single = rows[~rows.preset.str.startswith("top:")]
    measured = {seed: set(single.concept[single.seed == seed]) for seed in seeds}
    concepts = [name for name in run.config["concepts"] if name in measured[seeds[0]]]
    seeds = [seed for seed in seeds if measured[seed] >= set(concepts)]
    rows = rows[rows.concept.isin(concepts) & rows.seed.isin(seeds)]
    if not set(concepts) <= set(rows.concept[rows.preset == "top:1"]):
        rows = rows[~rows.preset.str.startswith("top:")]
    sites = [name for name in single.preset.unique() if ":" in name and "-" not in name]
    found = analyse(
        sites, rows, concepts=concepts, seeds=seeds, tau=run.config["tau"], model=run.model
    )
    return run, found, [name for name in run.config["concepts"] if name not in concepts]


def page(run: RunRead, found: Localization, missing: Sequence[str] = ()) -> Page:
    """Lay out what a localization found."""
    config, names = run.config, found.concepts
    what = listed(names) if len(names) <= 3 else f"{len(names)} concepts"
    seeds = config["seeds"]
    return Page(
        title=f"Through which sites {what} {_enter(names)} {run.model}",
        summary=(
            f"Which of {counted(len(found.sites), 'cross-attention site')} of {run.model} "
            f"{'lets' if len(found.sites) == 1 else 'let'} {listed(names)} in? Asked with "
            f"{counted(found.scores.pair.nunique(), 'prompt pair')} a concept, "
            f"{counted(config['steps'], 'sampler step')}, guidance {config['guidance']:g}, "
            f"{'seed' if len(seeds) == 1 else 'seeds'} {listed([str(seed) for seed in seeds])}."
        ),
        findings=[*shared.unfinished(run, missing), *findings(found), *_selections(found)],
        sections=[
            Section("where", "Where the concepts enter", blocks(found)),
            Section("listen", "Listen", _sounds(run, found)),
            Section("method", "What was done", [Text(_method(config, "probability" in run.table))]),
            *shared.closing(run, "localize", _FILES),
        ],
    )


def _enter(names: Sequence[str]) -> str:
    return "enters" if len(names) == 1 else "enter"


def findings(found: Localization) -> list[str]:
    """Write what came out over all concepts."""
    if found.functional:
        reach = "reaches" if len(found.functional) == 1 else "reach"
        rows = [
            f"{listed(found.functional)} {reach} the threshold of {found.tau:.2f} of the mean "
            f"impact; the strongest is {found.order[0]}."
        ]
    else:
        rows = [
            f"No single site reaches the threshold of {found.tau:.2f} of the mean impact; the "
            "cumulative curve shows how many sites it takes together."
        ]
    if found.cumulative is not None and found.cumulative.needed:
        rows.append(
            f"The best {found.cumulative.needed} of {len(found.sites)} sites of a concept together "
            f"carry {found.cumulative.share:.0%} of its full effect (mean over concepts)."
        )
    return rows


def _selections(found: Localization) -> list[str]:
    if len(found.concepts) > 3:
        return []
    return [
        f"Selected for {name}: {listed(sites)}; {_why(found, name)[1]}."
        for name, sites in found.localized.items()
    ]


def _why(found: Localization, name: str) -> tuple[float, str]:
    """Share of the full effect that the selected sites carry together, and why they were taken."""
    chosen, curve = found.localized[name], found.cumulative_by_concept.get(name)
    if curve is not None and list(curve.order[: len(chosen)]) == chosen:
        share = curve.effect[len(chosen)]
        if share >= STEERED_SHARE:
            return share, f"the fewest that carry {STEERED_SHARE:.0%} of its effect together"
    if chosen == found.functional:
        return math.nan, f"the sites that reach {found.tau:.2f} of the mean impact"
    return math.nan, "the site of the largest mean impact"


def blocks(found: Localization) -> list[Block]:
    """Heat maps, selected sites, curve and tables of a localization."""
    both = found.scorers[BOTH]
    made: list[Block] = [heatmap(both, found.tau, "Single sites"), selection_table(found)]
    if found.windows:
        title = "Windows of consecutive sites"
        made += [
            heatmap(found.windows[BOTH], found.tau, title),
            site_table(found.windows[BOTH], found.tau, f"{title}, {scorer_label(BOTH)}"),
        ]
    if found.cumulative is not None:
        made.append(_cumulative(found))
    made.append(ranking_table(found))
    made += [
        site_table(one, found.tau, f"Single sites, {scorer_label(name)}", folded=name != BOTH)
        for name, one in sorted(found.scorers.items(), key=lambda item: item[0] != BOTH)
    ]
    return made


def heatmap(one: Impacts, tau: float, title: str) -> Picture:
    """Draw impacts as the mean of the scorers reads them."""
    means = [mean.value for mean in one.means]
    flags = functional(means, tau)
    reached = [site for site, hit in zip(one.sites, flags, strict=True) if hit]
    verdict = (
        f"Framed: mean impact of at least {tau:.2f} ({', '.join(reached)})."
        if reached
        else f"No mean impact reaches {tau:.2f}."
    )
    return picture(
        lambda mode, width: figures.impact_heatmap(one, tau=tau, theme=mode, width=width),
        f"Heat map of the impact of {counted(len(one.sites), 'site')} on "
        f"{', '.join(one.concepts)}; largest mean at {one.sites[ranking(means)[0]]}. Values in the "
        "tables below.",
        f"{title}, {scorer_label(BOTH)}. Impact: share of the effect of the full prompt that "
        f"enters through the site; 0 none, 1 all of it. {one.means[0].level:.0%} intervals (prompt "
        f"pairs resampled) stand in small print or in the table. {verdict}",
        heat=True,
    )


def _cumulative(found: Localization) -> Picture:
    assert found.cumulative is not None
    curves = {"mean": found.cumulative, **found.cumulative_by_concept}
    share = found.cumulative.share
    needed = "; ".join(
        f"{label} {'never' if one.needed is None else f'at {one.needed}'}"
        for label, one in curves.items()
    )
    return picture(
        lambda mode, width: figures.cumulative(curves, theme=mode, width=width),
        f"Share of the full effect against the number of sites patched. {share:.0%} reached: "
        f"{needed}.",
        f"Best sites of each concept added one by one, {scorer_label(BOTH)}. Rings: the smallest "
        f"number that reaches {share:.0%}.",
    )


def selection_table(found: Localization) -> Table:
    """Sites to steer each concept at, with the reason."""
    rows = []
    for name, sites in found.localized.items():
        share, why = _why(found, name)
        curve = found.cumulative_by_concept.get(name)
        needed = curve.needed if curve is not None and curve.needed is not None else math.nan
        rows.append([name, ", ".join(sites), share, needed, why])
    columns = ["concept", "selected sites", "effect together", "sites for 90%", "why"]
    return Table("Selected sites", columns, rows, "where to steer each concept")


def site_table(one: Impacts, tau: float, title: str, *, folded: bool = False) -> Table:
    """Impact of every site on every concept, the largest mean first."""
    means = [mean.value for mean in one.means]
    reached = functional(means, tau)
    rows = [
        [
            one.sites[site],
            one.means[site],
            "yes" if reached[site] else "no",
            *(row[site] for row in one.impacts),
        ]
        for site in ranking(means)
    ]
    columns = ["site", "mean impact", f"≥ {tau:.2f}", *one.concepts]
    return Table(title, columns, rows, f"n = {counted(one.means[0].n, 'pair')}", folded)


def ranking_table(found: Localization) -> Table:
    """Sites by falling impact, one column per scorer."""
    at = {site: index for index, site in enumerate(found.sites)}
    names = sorted(found.scorers, key=lambda name: name != BOTH)
    rows = [
        [
            site,
            *(found.scorers[name].means[at[site]] for name in names),
            "yes" if site in found.functional else "no",
        ]
        for site in found.order
    ]
    caption = "mean impact over concepts with 95% intervals"
    if found.stability is not None and found.stability_interval is not None:
        caption += (
            f"; rank correlation between seeds {found.stability_interval}, "
            f"lowest {found.stability.lowest:.2f}"
        )
    columns = ["site", *map(scorer_label, names), f"≥ {found.tau:.2f}"]
    return Table("Ranking", columns, rows, caption)


def _method(config: Mapping[str, Any], own: bool) -> list[str]:
    scores = "in log-odds of the scorers" if own else "in scores, such as the cosine with a text"
    rows = [
        "Every generation starts from the prompt without the concept; one site at a time gets the "
        f"{_SWAPPED[config['how']]} of the prompt with it, at every step. Impact is the share of "
        f"the full effect (all sites patched) that comes through, {scores}. All "
        "presets of a prompt pair run in one batch from the same noise.",
        "Intervals: 95% bootstrap over prompt pairs. A dash: the full prompt had no effect that "
        "could be shared out.",
    ]
    if not own:
        rows.append(
            "Patched is what cross-attention reads. A text that reaches the model by another way "
            "(the pooled text embedding of SDXL, for one) stays that of the prompt without the "
            "concept in every generation, so the full effect here is that of all sites, not of the "
            "whole prompt. For the mean of several scorers, the scores of each are divided by "
            "their standard deviation."
        )
    return rows


def _sounds(run: RunRead, found: Localization) -> list[Block]:
    """The first prompt pair of each concept: unpatched, selected sites, all sites."""
    strips = [_strip(run, found, name) for name in found.concepts]
    return [strip for strip in strips if strip.clips]


def _strip(run: RunRead, found: Localization, name: str) -> Strip:
    rows, chosen = run.table, found.localized[name]
    first = rows[(rows.concept == name) & (rows.pair == 0) & (rows.seed == run.config["seeds"][0])]
    shown = {"none": f"without {name}", chosen[0]: f"only {chosen[0]}"}
    if 1 < len(chosen) < len(found.sites) and chosen == found.orders[name][: len(chosen)]:
        shown[f"top:{len(chosen)}"] = f"best {len(chosen)} together"
    shown["all"] = "all sites"
    clips = []
    for preset, label in shown.items():
        read = shared.sound(run.folder / clip_name(name, preset))
        if read is not None:
            meters = _meters(first[first.preset == preset], name)
            clips.append(Clip(label, *read, meters=meters, base=preset == "none"))
    clean, corrupted = _prompts(run, name)
    return Strip(
        name,
        f"“{corrupted}”; patched: “{clean}”",
        clips,
        "From the prompt without the concept to the one with it, same noise. Log-mel spectrograms, "
        "one colour scale for the row.",
    )


def _meters(rows: pd.DataFrame, name: str) -> list[Meter]:
    if "probability" not in rows:
        return []  # a bar is a share, a cosine is none
    return [Meter(f"P({name}), {row.scorer}", float(row.probability)) for row in rows.itertuples()]


def _prompts(run: RunRead, name: str) -> tuple[str, str]:
    """The first prompt pair of a concept: with it, without it."""
    from ..common import LOCALIZE_PROMPTS

    if run.config.get("prompts"):
        clean, corrupted = run.config["prompts"][name][0][:2]
        return clean, corrupted
    (pair,) = concept(name).pairs(1, LOCALIZE_PROMPTS)
    return pair.clean, pair.corrupted
