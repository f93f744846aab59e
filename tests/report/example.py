# SPDX-License-Identifier: Apache-2.0
"""A synthetic page: invented numbers of plausible shape, for tests and for looking at."""

from __future__ import annotations

import sys

import numpy as np

from sidechain.metrics.bootstrap import Interval, proportion_interval
from sidechain.metrics.impact import cumulative
from sidechain.metrics.results import ArmCurve, Impacts
from sidechain.report import feature_figures, figures
from sidechain.report.data import (
    Bullets,
    Clip,
    Commands,
    Facts,
    Files,
    Heading,
    Meter,
    Page,
    Section,
    Strip,
    Table,
    Text,
)
from sidechain.report.html import picture

CONCEPTS = ("violin", "drums", "vocals", "tempo", "mood", "genre")
SITES = tuple(f"cross:{index}" for index in range(8))


def around(value, spread, n=48):
    return Interval(float(value), float(value - spread), float(value + spread), n)


def impacts(seed=0, sites=SITES):
    rng = np.random.default_rng(seed)
    shape = np.exp(-0.5 * ((np.arange(len(sites)) - 3.2) / 1.1) ** 2)
    table = [np.clip(shape * rng.uniform(0.1, 0.7) + rng.normal(0, 0.02, len(sites)), 0, None)
             for _ in CONCEPTS]  # fmt: skip
    cells = [[around(v, 0.02 + 0.1 * v) for v in row] for row in table]
    means = [around(v, 0.015 + 0.05 * v, 288) for v in np.mean(table, axis=0)]
    return Impacts(sites, CONCEPTS, cells, means)


def share(p, n=48):
    return proportion_interval(round(float(np.clip(p, 0, 1)) * n), n)


def arm(gain, harm, strengths=(0, 1, 2, 3, 4, 6, 8)):
    s = np.array(strengths, dtype=float)
    p = 1 / (1 + np.exp(2.4 - gain * s)) - 1 / (1 + np.exp(2.4)) + 0.06
    kept = 1 / (1 + np.exp(-(4.2 - harm * s)))
    distance = [around(v, 0.06 * v) for v in 0.35 * harm * abs(s) + 0.25 * (s != 0)]
    return ArmCurve(list(s), [share(v) for v in p], distance, [share(v) for v in kept],
                    auc=0.11 * gain, smoothness=0.05 / gain)  # fmt: skip


def arms():
    return {
        "localized": arm(1.3, 0.45),
        "all": arm(1.2, 0.8),
        "ablated": arm(0.45, 0.6),
        "random": arm(0.05, 0.5),
    }


def curves():
    steps = np.arange(len(SITES) + 1)
    found = {}
    for index, label in enumerate(("mean", *CONCEPTS)):
        rise = 1 - np.exp(-steps / (1.0 + 0.35 * index % 1.7))
        found[label] = cumulative(SITES, rise / rise[-1], 0.0, 1.0)
    return found


class Dictionary:
    def __init__(self, index, features=1280):
        rng = np.random.default_rng(index)
        self.steps = np.arange(20)
        self.step_fvu = 0.05 + 0.01 * index + 0.03 * abs(self.steps - 9) / 9
        self.density = 10 ** rng.normal(-2.5, 0.9, features)
        self.density[self.density < 1e-5] = 0.0


def dictionaries(count=4):
    return {f"cross:{index}": Dictionary(index) for index in range(count)}


def strip(concept="drums", about="“a calm violin melody”", count=5, seconds=5.12):
    rate = 16000
    time = np.arange(int(rate * seconds)) / rate
    clips = []
    for index in range(count):
        beat = (np.sin(2 * np.pi * 2 * time) > 0.98) * np.random.default_rng(1).normal(
            size=time.size
        )
        tone = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 880 * time)
        frames, bins = np.arange(256)[:, None], np.arange(64)[None]
        mel = np.exp(-0.5 * ((bins % 13 - 6 - 3 * np.sin(frames / 23)) / 1.5) ** 2)
        mel = mel * (1 - bins / 90) + 0.25 * index * (frames % 16 < 2) * (1 - bins / 200)
        clips.append(
            Clip(
                f"+{2 * index}" if index else "unsteered",
                tone + 0.15 * index * beat,
                mel + 0.05 * np.random.default_rng(2).normal(size=mel.shape),
                meters=[
                    Meter(f"P({concept}), latent", min(0.98, 0.05 + 0.3 * index)),
                    Meter("kept: violin", 0.97 - 0.04 * index, effect=False),
                ],
                note=f"distance {0.4 * index:.2f}",
                base=not index,
            )
        )
    return Strip(concept, about, clips, "Log-mel spectrograms.")


def features(count=3):
    texts = (
        "“a slow gloomy fiddle solo with percussion and a choir”",
        "“techno, fast”",
        "“a tune”",
    )
    clips = [
        Clip(
            texts[index % 3],
            clip.audio,
            clip.mel,
            note=f"{3.2 - index:.2f} at step {7 * index}",
            place=None if index == 2 else 0.2 + 0.3 * index,
            trace=[max(0.0, np.sin(0.4 * token + index)) * (3.2 - index) for token in range(64)],
        )
        for index, clip in enumerate(strip(count=count).clips)
    ]
    return Strip("cross:6, feature 148", "drums; active in 41% of the tokens", clips)


def example():
    by_scorer = {"latent": arms(), "mel": arms()}
    preservation = Table(
        "Kept at the best strength",
        ("concept", "instrument", "drums", "vocals", "tempo"),
        (("violin", "\u2013", share(0.9), share(0.95), share(0.8)),
         ("drums", share(0.92), "\u2013", share(0.9), share(0.85))),
        "48 prompts each",
    )  # fmt: skip
    stability = Table(
        "Ranking of sites between seeds, Spearman's rho",
        ("scorer", "0 and 1", "0 and 2", "1 and 2", "mean"),
        (("latent", 0.95, 0.90, 0.93, around(0.93, 0.06)),
         ("mel", 0.88, 0.93, 0.90, around(0.90, 0.07))),
        folded=True,
    )  # fmt: skip
    where = [
        picture(lambda m, w: figures.impact_heatmap(impacts(), theme=m, width=w),
                "Heat map of invented impacts", "Impacts.", heat=True),
        picture(lambda m, w: figures.cumulative(curves(), theme=m, width=w),
                "Share of the full effect", "Best sites added one by one."),
        stability,
    ]  # fmt: skip
    steering = [
        Heading("drums"),
        picture(
            lambda m, w: figures.tradeoff(
                by_scorer, concept="drums", kept="instrument", theme=m, width=w
            ),
            "Effect and preservation", "Steering towards drums.",
        ),
        preservation,
    ]  # fmt: skip
    held = [
        picture(lambda m, w: feature_figures.dictionary_health(dictionaries(), theme=m, width=w),
                "Unexplained variance", "Left: FVU."),
        Table("Held-out metrics", ("site", "FVU", "dead"), (("cross:6", 0.03, "4.3%"),)),
    ]  # fmt: skip
    facts = {
        "Model": {"Sampler": "DPM-Solver++ multistep, 20 steps, guidance 3.0"},
        "Run": {"sidechain": "0.1.0", "torch": "2.13.0+cpu, 2 threads", "Seeds": "0, 1, 2"},
    }
    return Page(
        title="Where a music model hears “violin”, and how to turn it up",
        summary="A small text-to-music diffusion model, its eight cross-attention sites, six "
        "concepts. All numbers on this page are invented: it shows the layout only.",
        findings=(
            "Sites cross:3 and cross:2 carry most of every concept; their ranking agrees between "
            "seeds (Spearman 0.93, interval 0.81 to 0.98).",
            "Tempo does not reach the bar: 0.41 at best.",
        ),
        sections=[
            Section("method", "What was done", [Text(["Each site in turn.", "Vectors."])]),
            Section("listen", "Listen", [strip(), strip("violin", "“slow jazz”", 7)]),
            Section("where", "Where the concepts enter", where),
            Section("steering", "Effect and preservation", steering),
            Section("dictionaries", "Dictionaries", held),
            Section("features", "Features to hear", [Text(["Held out."], soft=True), features()]),
            Section("facts", "Model and run", [Facts(facts)]),
            Section("files", "Tables", [Files({"a table.csv": "every reading"})]),
            Section("limits", "Limits", [Bullets(["Both scorers learned from the same data."])]),
            Section("reproduce", "Reproduce", [Commands(["make demo", "sidechain localize"])]),
        ],
    )


if __name__ == "__main__":
    from sidechain.report.html import write_page

    print(write_page(example(), sys.argv[1]))
