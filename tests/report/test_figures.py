# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest

from sidechain.report import feature_figures as dictionary_figures
from sidechain.report import figures
from sidechain.report.media import save_figure, svg
from sidechain.report.theme import THEMES, darkened

sys.path.insert(0, str(Path(__file__).parent))
from example import arm, arms, curves, dictionaries, impacts

DRUMS = {"concept": "drums", "kept": "instrument"}
DRAWN = {
    "heatmap": lambda **k: figures.impact_heatmap(impacts(), **k),
    "heatmap-24": lambda **k: figures.impact_heatmap(
        impacts(sites=[f"tf{i}" for i in range(24)]), **k
    ),
    "tradeoff": lambda **k: figures.tradeoff(
        {"latent": arms(), "mel": arms()}, cutoffs={"latent": 1.9}, **DRUMS, **k
    ),
    "cumulative": lambda **k: figures.cumulative(curves(), **k),
    "dictionaries": lambda **k: dictionary_figures.dictionary_health(dictionaries(), **k),
}


def words(figure):
    return " ".join(ElementTree.fromstring(svg(figure)).itertext())


@pytest.mark.parametrize(("theme", "width"), [("light", "wide"), ("dark", "narrow")])
@pytest.mark.parametrize("name", DRAWN)
def test_draws_in_every_variant(name, theme, width):
    before = dict(matplotlib.rcParams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "agg")
        figure = DRAWN[name](theme=theme, width=width)
        text = svg(figure)
    assert THEMES[theme].paper in text
    assert "DejaVu Sans'" not in text
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", ["tradeoff", "cumulative", "dictionaries"])
def test_recoloured_light_figure_is_the_dark_one(name):
    def plain(text):  # names of markers and clips are hashes that differ
        return re.sub(r'(id="|url\(#|href="#)[^"\)]*', "", text)

    assert plain(darkened(svg(DRAWN[name]()))) == plain(svg(DRAWN[name](theme="dark")))


def test_axes_are_labelled():
    text = words(DRAWN["tradeoff"]())
    for label in ("P(drums)", "instrument kept", "steering strength", "random direction",
                  "distance to the unsteered clip"):  # fmt: skip
        assert label in text
    text = words(DRAWN["cumulative"]())
    assert "90% of the full effect" in text
    assert "sites patched, best first" in text


def test_heatmap_notes_intervals_and_frames():
    found = impacts()
    text = words(figures.impact_heatmap(found, tau=0.2))
    assert all(site in text for site in found.sites)
    assert f"{found.means[3].low:.2f}"[1:] in text
    orange = THEMES["light"].arms["all"]
    reached = sum(mean.value >= 0.2 for mean in found.means)
    assert 0 < reached < len(found.sites)
    assert svg(figures.impact_heatmap(found, tau=0.2)).count(f"stroke: {orange}") == reached


@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_heatmap_has_a_scale(width):
    text = words(figures.impact_heatmap(impacts(), width=width)).split()
    assert {"impact", "0.0", "1.0"} <= set(text)


def test_negative_strengths_are_told_apart():
    both = {"latent": {"localized": arm(1, 0.3, (-4, -2, 0, 2, 4))}}
    assert "negative strength" in words(figures.tradeoff(both, **DRUMS))


def test_same_bytes_for_the_same_figure():
    assert svg(DRAWN["tradeoff"]()) == svg(DRAWN["tradeoff"]())


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_saves(tmp_path, suffix):
    path = save_figure(DRAWN["heatmap"](), tmp_path / f"map.{suffix}")
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: figures.tradeoff({}, **DRUMS), "at least one set of curves"),
        (lambda: figures.cumulative({}), "at least one curve"),
        (lambda: figures.impact_heatmap(impacts(), theme="sepia"), "light.dark.*'sepia'"),
        (lambda: figures.impact_heatmap(impacts(), width="huge"), "wide.narrow.*'huge'"),
        (lambda: save_figure(None, "map.jpg"), r"\.png, \.svg or \.pdf file, got map.jpg"),
    ],
)
def test_bad_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call()
