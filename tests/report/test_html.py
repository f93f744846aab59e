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
from PIL import Image

from sidechain.metrics.bootstrap import Interval
from sidechain.metrics.results import ArmCurve
from sidechain.report import media
from sidechain.report.data import (
    Bullets,
    Clip,
    Commands,
    Facts,
    Files,
    Heading,
    Meter,
    Section,
    Strip,
    Table,
    Text,
)
from sidechain.report.data import Page as PageData
from sidechain.report.html import render, write_page

sys.path.insert(0, str(Path(__file__).parent))
from example import arm, example, impacts, strip

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
        assert all(section.heading in page.text for section in example().sections)
        ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
        anchors = {attrs["href"][1:] for attrs in page.all("a") if attrs["href"][0] == "#"}
        assert anchors == ids == {section.anchor for section in example().sections}

    def test_images_have_alt_texts_and_sizes(self, page):
        images = page.all("img")
        assert images
        for attrs in images:
            assert len(attrs["alt"]) > 10
            assert int(attrs["width"]) > 100
            assert int(attrs["height"]) > 50

    def test_figures_come_light_dark_wide_and_narrow(self, page):
        assert len(page.all("source")) == 3 * len(page.all("picture"))
        assert len(page.all("picture")) == 4

    def test_tables_scroll_in_their_own_box(self, text):
        assert text.count("<table>") == len(re.findall(r'class="scroll"[^>]*>\s*<table>', text))

    def test_audio_decodes(self, page):
        sounds = page.all("audio")
        assert len(sounds) == 15
        raw = base64.b64decode(sounds[0]["src"].split(",")[1])
        samples, rate = soundfile.read(io.BytesIO(raw))
        assert rate == 16000
        np.testing.assert_allclose(samples, strip().clips[0].audio, atol=1e-4)

    def test_intervals_in_tables(self, text):
        assert 'class="ends">0.87 to 0.99</span>' in text


class TestRendering:
    def test_same_text_for_the_same_data(self):
        small = dataclasses.replace(example(), sections=example().sections[:2])
        assert render(small) == render(small)

    def test_text_is_escaped(self):
        evil = '<script>alert("1")</script>'
        blocks = [
            Text([evil]),
            Bullets([evil]),
            Heading(evil),
            Table(evil, [evil], [[evil]], evil),
            Facts({evil: {evil: evil}}),
            Commands([evil]),
            Files({evil: evil}),
            Strip(evil, evil, [Clip(evil, meters=[Meter(evil, 0.5)], note=evil)], evil),
        ]
        page = Page(render(PageData(evil, evil, [evil], [Section("a", evil, blocks)])))
        assert len(page.all("script")) == 1  # the page's own
        assert page.text.count("alert") >= 15

    def test_empty_parts_are_left_out(self):
        page = Page(render(PageData("Nothing yet", sections=[Section("a", "Nothing", [])])))
        assert page.all("section") == []
        assert page.all("a") == []

    def test_undefined_values_are_dashes(self):
        nothing = Interval(math.nan, math.nan, math.nan)
        table = Table(
            "t", ["a", "b"], [[nothing, math.nan], [Interval(0.5, math.nan, 1.0), -0.001]]
        )
        page = Page(render(PageData("t", sections=[Section("a", "A", [table])])))
        assert page.text.count("\u2013") == 2 and "0.50" in page.text and "0.00" in page.text
        assert "nan" not in page.text

    def test_files_are_links_beside_the_page(self, page):
        assert {"href": "a%20table.csv"} in page.all("a")

    def test_wav(self):
        strip = Strip("drums", "p", [Clip("x", np.zeros(100))])
        page = PageData("t", sections=[Section("a", "A", [strip])])
        assert "data:audio/wav;base64" in render(page, audio="wav")

    def test_one_colour_scale_and_one_trace_scale_for_a_strip(self):
        mel = np.linspace(0, 1, 64 * 16).reshape(64, 16)
        clips = [Clip("a", mel=mel, trace=[4.0, 0.0]), Clip("b", mel=mel + 3, trace=[1.0, 2.0])]
        page = Page(render(PageData("t", sections=[Section("a", "A", [Strip("s", "", clips)])])))
        images = [img["src"].split(",")[1] for img in page.all("img")]
        dark, bright = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("L")).mean()
            for one in images
        )
        assert dark < bright - 50
        assert [bar["height"] for bar in page.all("rect")] == ["30.00", "7.50", "15.00"]


class TestWriting:
    def test_whole_or_nothing(self, tmp_path, monkeypatch):
        target = tmp_path / "deep" / "report.html"
        assert write_page(PageData("one"), target) == target
        assert "one" in target.read_text()
        umask = os.umask(0)
        os.umask(umask)
        assert target.stat().st_mode & 0o777 == 0o666 & ~umask

        def fail(source, other):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_page(PageData("two"), target)
        assert "one" in target.read_text()
        assert [path.name for path in target.parent.iterdir()] == ["report.html"]


class TestMedia:
    def test_loud_audio_is_scaled_not_clipped(self):
        raw = media.audio_bytes(np.array([0.5, -2.0, 1.0]), 16000, "wav")
        samples, _ = soundfile.read(io.BytesIO(raw))
        np.testing.assert_allclose(samples, [0.25, -1.0, 0.5], atol=1e-4)

    def test_spectrogram_is_upright(self):
        mel = np.zeros((6, 4))
        mel[:, 0] = 1.0  # the lowest bin sounds all the time
        image = Image.open(io.BytesIO(media.spectrogram_png(mel, 0, 1, scale=1))).convert("L")
        assert image.size == (6, 4)
        pixels = np.asarray(image)
        assert pixels[-1].min() > pixels[:-1].max()


class TestCurve:
    def test_best_point(self):
        one = arm(1.3, 0.8)
        point = one.best_point(0.8)
        assert one.kept[point].value >= 0.8
        assert one.kept[point + 1].value < 0.8
        assert arm(1, 9).best_point(0.99) is None


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ArmCurve([0.0], [], [], [], 0, 0), ValueError, r"ArmCurve: .* N=1 .*\[0, 0, 0\]"),
        (lambda: dataclasses.replace(impacts(), means=[]), ValueError, "Impacts: .*0 means"),
        (lambda: media.audio_bytes(np.zeros(3), 16000, "mp3"), ValueError, "flac.wav, got 'mp3'"),
        (lambda: media.audio_bytes(np.array([np.nan]), 16000), ValueError, "finite samples"),
        (lambda: media.spectrogram_png(np.zeros(3), 0, 1), ValueError, r"mel \[frames, bins\]"),
    ],
)
def test_bad_calls(call, error, match):
    with pytest.raises(error, match=match):
        call()
