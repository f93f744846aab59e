# SPDX-License-Identifier: Apache-2.0
"""Pages of localization and steering, from run folders whose answer is known and from old ones."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from sidechain import InputError
from sidechain.io.run_folder import RunFolder
from sidechain.studies.localization import LocalizationConfig
from sidechain.studies.localization import page as localization
from sidechain.studies.localization.analyse import analyse as analyse_impacts
from sidechain.studies.steering import SteeringConfig
from sidechain.studies.steering import page as steering
from sidechain.studies.steering.analyse import analyse as analyse_sweep
from sidechain.zoo.music.concepts import concept
from studies import known

RUNS = Path(__file__).parents[1] / "data" / "runs"
SITES = ["cross:0", "cross:1", "cross:2"]


class Page(HTMLParser):
    """What a reader sees: text, tables by title, and where the page gets things from."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tables, self.links, self.sources, self.alts = "", {}, [], [], []
        self.labels, self._title, self._open, self._cell = [], "", False, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.sources += [found[name] for name in ("src", "srcset") if name in found]
        self.links += [found["href"]] if "href" in found else []
        self.alts += [found.get("alt")] if tag == "img" else []
        self.labels += [found.get("aria-label")] if tag == "audio" else []
        if tag == "caption":
            self._title, self._open = "", True
        elif tag == "tr":
            self.tables.setdefault(self._title, []).append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[self._title][-1].append(self._cell)
            self._cell = None
        if tag == "caption":
            self._title, self._open = self._title.split(" (")[0], False

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell += data
        elif self._open:
            self._title += data

    def column(self, title, name):
        """Cells of a column, by the first cell of their rows."""
        head, *rows = self.tables[title]
        return {row[0]: row[head.index(name)] for row in rows}


def self_contained(page, folder):
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert "http" not in "".join(page.links)
    files = [link for link in page.links if not link.startswith("#")]
    assert all((folder / link).is_file() for link in files)
    assert page.alts and all(alt and len(alt) > 10 for alt in page.alts)
    return files


def localized(out, **changes):
    """A finished run of `known.SCORES`, as the study writes it."""
    config = LocalizationConfig(
        **{"out": out, "concepts": ("drums", "violin"), "pairs": 3, "windows": 2, **changes}
    )
    folder = RunFolder(out, "localize", config)
    parts = []
    for stage, seeds in (("sites", config.seeds), ("top", config.seeds[:1])):
        for name in config.concepts:
            for seed in seeds:
                rows = known.scores(name, stage, (seed,))
                parts.append(folder.save_part(f"{stage}-{name}-{seed}", rows))
    rows = pd.concat(parts, ignore_index=True)
    found = analyse_impacts(
        SITES, rows, concepts=config.concepts, seeds=config.seeds, tau=config.tau
    )
    found.write(out)
    return found


def swept(out, rows=None, **changes):
    """A finished sweep of `known.readings`, as the study writes it."""
    config = SteeringConfig(
        **{"out": out, "concept": "drums", "sites": "cross:1", "prompts": 5, **changes}
    )
    RunFolder(out, "steer", config)
    rows = known.readings() if rows is None else rows
    analyse_sweep(rows, concept("drums"), ["cross:1"]).write(out)


def clip(path):
    path.parent.mkdir(exist_ok=True)
    wave = np.random.default_rng(0).normal(0, 0.1, 6400)
    soundfile.write(path, wave, 16_000, format="FLAC")


class TestLocalization:
    def test_shows_the_right_sites_and_the_numbers_of_the_tables(self, tmp_path):
        found = localized(tmp_path / "run")
        path = localization.write(tmp_path / "run")
        assert path == tmp_path / "run" / "report.html"
        page = Page(path)
        assert page.column("Selected sites", "selected sites") == {
            "drums": "cross:1",
            "violin": "cross:2, cross:0",
        }
        assert page.column("Selected sites", "effect together") == {
            "drums": "0.75",
            "violin": "0.70",
        }
        assert page.column("Selected sites", "sites for 90%") == {"drums": "2", "violin": "3"}
        impacts = page.column("Single sites, mean of the scorers", "drums")
        assert {site: cell.split()[0] for site, cell in impacts.items()} == {
            "cross:0": "0.10",
            "cross:1": "0.75",
            "cross:2": "0.00",
        }
        ranking = pd.read_csv(tmp_path / "run" / "ranking.csv", index_col="site")
        cells = page.column("Ranking", "mean of the scorers")
        assert list(cells) == list(ranking.index) == found.order
        for site, cell in cells.items():
            row = ranking.loc[site]
            assert cell == f"{row.mean_impact:.2f} {row.low:.2f} to {row.high:.2f}"
        windows = page.column("Windows of consecutive sites, mean of the scorers", "drums")
        assert windows["cross:0-1"].split()[0] == "0.85"

    def test_says_what_was_asked_and_how_to_run_it_again(self, tmp_path):
        localized(tmp_path / "my run", seeds=(0, 1))
        page = Page(localization.write(tmp_path / "my run"))
        for text in ("drums and violin", "zoo:music", "3 prompt pairs", "20 sampler steps",
                     "seeds 0 and 1", "Rank correlation".lower()):  # fmt: skip
            assert text in page.text
        assert f"sidechain localize --config '{tmp_path}/my run' --out" in page.text
        assert "not finished" not in page.text
        assert "seeds0, 1" in page.text  # of the settings
        files = self_contained(page, tmp_path / "my run")
        assert {"ranking.csv", "impact.csv", "scores.csv"} <= set(files)

    def test_clips_from_clean_to_patched(self, tmp_path):
        localized(tmp_path)
        for preset in ("none", "cross-2", "top-2", "all", "cross-1"):
            clip(tmp_path / "audio" / f"violin_{preset}.flac")
        page = Page(localization.write(tmp_path))
        assert page.labels == [
            f"violin: {name}"
            for name in ("without violin", "only cross:2", "best 2 together", "all sites")
        ]
        assert "P(violin), latent0.30" in "".join(page.text.split("\n"))  # 1.2 of 4, one site

    def test_is_the_same_when_made_again(self, tmp_path):
        localized(tmp_path)
        first = localization.write(tmp_path).read_bytes()
        assert localization.write(tmp_path).read_bytes() == first

    def test_of_a_run_that_was_cut_off(self, tmp_path):
        """Best sites of one of two concepts, one of two seeds of the other: nothing is mixed."""
        config = LocalizationConfig(out=tmp_path, concepts=("drums", "violin"), seeds=(0, 1))
        folder = RunFolder(tmp_path, "localize", config)
        for seed in (0, 1):
            folder.save_part(f"sites-drums-{seed}", known.scores("drums", "sites", (seed,)))
        folder.save_part("sites-violin-0", known.scores("violin", "sites"))
        folder.save_part("top-drums-0", known.scores("drums", "top"))
        page = Page(localization.write(tmp_path))
        assert "This run is not finished" in page.text
        whole = page.column("Selected sites", "selected sites")
        assert whole == {"drums": "cross:1, cross:2", "violin": "cross:1, cross:2"}
        assert "share of full effect" not in page.text


class TestSteering:
    def test_shows_the_numbers_of_the_tables(self, tmp_path):
        swept(tmp_path, known.readings(kept=lambda arm, strength: float(strength < 3)))
        page = Page(steering.write(tmp_path))
        head, *rows = page.tables["Arms compared, drums"]
        table = pd.read_csv(tmp_path / "scores.csv")
        assert len(rows) == len(table) == 6
        for row, known_row in zip(rows, table.itertuples(), strict=True):
            cells = dict(zip(head, row, strict=True))
            assert cells["best strength"] == f"{known_row.best_strength:+g}"
            assert cells["P there"].split()[0] == f"{known_row.best_score:.2f}"
            assert cells["AUC ↑"] == f"{known_row.auc:.3f}"
        names = ["localized sites", "all sites", "random direction"]
        assert [row[0] for row in rows[:3]] == names and rows[0][3] == "+2"
        assert "with strength 2 moves P(drums) from 0.10 to 0.50" in page.text
        assert "random direction of the same length at the same sites reaches 0.10" in page.text
        curve = page.tables["Curves of drums, mel scorer"][2]
        assert curve[:2] == ["localized sites", "1"] and curve[3].split()[0] == "1.00"
        kept = page.tables["Attributes kept"]
        assert kept[0] == ["arm", "scorer", "instrument"] and kept[1][2].split()[0] == "1.00"
        assert {"scores.csv", "curves.csv"} <= set(self_contained(page, tmp_path))
        for text in ("5 prompts", "strengths 0 to 3", "at cross:1", "seed 0", "seed0", "zoo:music"):
            assert text in page.text

    def test_no_strength_keeps_enough(self, tmp_path):
        swept(tmp_path, known.readings(kept=lambda arm, strength: 0.0))
        page = Page(steering.write(tmp_path))
        assert "no strength at the localized sites keeps the instrument in 80%" in page.text
        assert "nan" not in page.text

    def test_a_row_of_clips_by_strength(self, tmp_path):
        swept(tmp_path)
        for name in ("none_0", "localized_1", "localized_3", "random_2"):
            clip(tmp_path / "audio" / f"000_{name}.flac")
        page = Page(steering.write(tmp_path))
        assert page.labels == [
            *(f"drums, localized sites: {name}" for name in ("unsteered", "+1", "+3")),
            *(f"drums, random direction: {name}" for name in ("unsteered", "+2")),
        ]
        assert "P(drums), latent0.70" in "".join(page.text.split("\n"))

    def test_only_unsteered_clips(self, tmp_path):
        rows = known.readings()
        swept(tmp_path, rows[rows.arm == "none"])
        assert "Only the unsteered clips" in Page(steering.write(tmp_path)).text


class TestOldFolders:
    """Written by the version before, and cut off after the first part."""

    def test_localization(self, tmp_path):
        shutil.copytree(RUNS / "localize", tmp_path / "run")
        page = Page(localization.write(tmp_path / "run"))
        assert "not finished: the page shows the parts measured so far without violin" in page.text
        part = pd.read_csv(RUNS / "localize" / "parts" / "sites-drums-0.csv")
        assert {"latent scorer", "mel scorer"} <= set(page.tables["Ranking"][0])
        assert {row[0] for row in page.tables["Ranking"][1:]} == set(SITES)
        assert part.pair.nunique() == 1 and "1 prompt pair a concept" in page.text
        assert self_contained(page, tmp_path / "run") == []

    def test_steering(self, tmp_path):
        shutil.copytree(RUNS / "steer", tmp_path / "run")
        page = Page(steering.write(tmp_path / "run"))
        assert "not finished" in page.text and "xylophone" not in page.text
        rows = page.tables["Arms compared, drums"][1:]
        assert [row[:2] for row in rows[:2]] == [
            ["localized sites", "latent"],
            ["random direction", "latent"],
        ]
        assert rows[0][2].split()[0] == "0.59"
        assert self_contained(page, tmp_path / "run") == ["vector.safetensors"]


def test_folders_of_something_else(tmp_path):
    localized(tmp_path / "run")
    with pytest.raises(InputError, match="expected the settings of a run of 'steer'"):
        steering.write(tmp_path / "run")
    RunFolder(tmp_path / "new", "localize", LocalizationConfig(out=tmp_path / "new"))
    with pytest.raises(InputError, match="new: expected a run with something measured, got none"):
        localization.write(tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        localization.write(tmp_path / "nowhere")
