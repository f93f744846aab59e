# SPDX-License-Identifier: Apache-2.0
"""The report: self-contained, complete, escaped, the same for the same data, written whole."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sidechain.metrics.bootstrap import Interval
from sidechain.report import media
from sidechain.report.data import Arm, Clip, ReportData, Sweep, Table
from sidechain.report.html import render, write_report

sys.path.insert(0, str(Path(__file__).parent))
from example import arm, example, impact_map

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def text():
    return render(example())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


class TestPage:
    def test_nests(self, page):
        assert page.open == []

    def test_nothing_comes_from_outside(self, text, page):
        for tag in ("img", "audio", "source", "script", "link", "iframe"):
            for attrs in page.all(tag):
                for name in ("src", "srcset", "href"):
                    assert attrs.get(name, "data:").startswith("data:")
        outside = re.sub(r"data:[^\"]*", "", text)
        assert "http://" not in outside
        assert "https://" not in outside
        assert "url(" not in outside

    def test_every_section_and_anchor(self, page):
        headings = ("What was done", "Listen", "Where the concepts enter", "What stays",
                    "Effect and preservation", "Dictionaries", "Features to hear",
                    "Model and run", "Limits", "Reproduce")  # fmt: skip
        assert all(heading in page.text for heading in headings)
        ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
        assert {attrs["href"][1:] for attrs in page.all("a")} <= ids

    def test_images_have_alt_texts_and_sizes(self, page):
        images = page.all("img")
        assert images
        for attrs in images:
            assert len(attrs["alt"]) > 10
            assert int(attrs["width"]) > 100
            assert int(attrs["height"]) > 50

    def test_figures_come_light_dark_wide_and_narrow(self, page):
        assert len(page.all("source")) == 3 * len(page.all("picture"))
        assert len(page.all("picture")) == 5

    def test_tables_scroll_in_their_own_box(self, text):
        assert text.count("<table>") == len(re.findall(r'class="scroll"[^>]*>\s*<table>', text))

    def test_audio_decodes(self, page):
        sounds = page.all("audio")
        assert len(sounds) == 18
        raw = base64.b64decode(sounds[0]["src"].split(",")[1])
        samples, rate = soundfile.read(io.BytesIO(raw))
        assert rate == 16000
        np.testing.assert_allclose(samples, example().sweeps[0].clips[0].audio, atol=1e-4)

    def test_intervals_in_tables(self, text):
        assert 'class="ends">0.87 to 0.99</span>' in text


class TestRendering:
    def test_same_text_for_the_same_data(self):
        small = dataclasses.replace(example(), tradeoffs=(), impacts=())
        assert render(small) == render(small)

    def test_text_is_escaped(self):
        evil = '<script>alert("1")</script>'
        page = Page(
            render(
                ReportData(
                    title=evil,
                    summary=evil,
                    findings=[evil],
                    method=[evil],
                    model={evil: evil},
                    reproduce=[evil],
                    steering_tables=[Table(evil, [evil], [[evil]], evil)],
                    sweeps=[Sweep(evil, evil, [Clip(0.0, probabilities={evil: 0.5})])],
                )
            )
        )
        assert len(page.all("script")) == 1  # the page's own

    def test_empty_parts_are_left_out(self):
        page = Page(render(ReportData(title="Nothing yet")))
        assert page.all("section") == []
        assert page.all("a") == []

    def test_undefined_values_are_dashes(self):
        nothing = Interval(math.nan, math.nan, math.nan)
        base = impact_map()
        cells = [list(row) for row in base.impacts]
        cells[0] = [nothing] * len(base.sites)
        page = Page(
            render(ReportData(title="t", impacts=[dataclasses.replace(base, impacts=cells)]))
        )
        assert "\u2013" in page.text
        assert "nan" not in page.text

    def test_no_functional_site_is_said(self):
        quiet = dataclasses.replace(impact_map(), tau=0.9)
        assert "No mean impact reaches 0.90." in render(ReportData(title="t", impacts=[quiet]))

    def test_wav(self):
        sweep = Sweep("drums", "p", [Clip(0.0, audio=np.zeros(100))])
        assert "data:audio/wav;base64" in render(ReportData(title="t", sweeps=[sweep]), audio="wav")


class TestWriting:
    def test_whole_or_nothing(self, tmp_path, monkeypatch):
        target = tmp_path / "deep" / "report.html"
        assert write_report(ReportData(title="one"), target) == target
        assert "one" in target.read_text()
        umask = os.umask(0)
        os.umask(umask)
        assert target.stat().st_mode & 0o777 == 0o666 & ~umask

        def fail(source, other):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(ReportData(title="two"), target)
        assert "one" in target.read_text()
        assert [path.name for path in target.parent.iterdir()] == ["report.html"]


class TestMedia:
    def test_loud_audio_is_scaled_not_clipped(self):
        raw = media.audio_bytes(np.array([0.5, -2.0, 1.0]), 16000, "wav")
        samples, _ = soundfile.read(io.BytesIO(raw))
        np.testing.assert_allclose(samples, [0.25, -1.0, 0.5], atol=1e-4)

    def test_spectrogram_is_upright(self):
        from PIL import Image

        mel = np.zeros((6, 4))
        mel[:, 0] = 1.0  # the lowest bin sounds all the time
        image = Image.open(io.BytesIO(media.spectrogram_png(mel, 0, 1, scale=1))).convert("L")
        assert image.size == (6, 4)
        pixels = np.asarray(image)
        assert pixels[-1].min() > pixels[:-1].max()


class TestArm:
    def test_operating_point(self):
        one = arm("localized", 1.3, 0.8)
        point = one.operating_point(0.8)
        assert one.kept[point].value >= 0.8
        assert one.kept[point + 1].value < 0.8
        assert arm("x", 1, 9).operating_point(0.99) is None


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Arm("a", [0.0], [], []), ValueError, r"Arm: expected .* N=1 .*got \[0, 0, 1\]"),
        (lambda: dataclasses.replace(impact_map(), means=[]), ValueError, "ImpactMap: .*0 means"),
        (lambda: media.audio_bytes(np.zeros(3), 16000, "mp3"), ValueError, "flac.wav, got 'mp3'"),
        (lambda: media.audio_bytes(np.array([np.nan]), 16000), ValueError, "finite samples"),
        (lambda: media.spectrogram_png(np.zeros(3), 0, 1), ValueError, r"mel \[frames, bins\]"),
    ],
)
def test_bad_calls(call, error, match):
    with pytest.raises(error, match=match):
        call()
