# SPDX-License-Identifier: Apache-2.0
"""A synthetic report: invented numbers of plausible shape, for tests and for looking at."""

from __future__ import annotations

import sys

import numpy as np

from sidechain.metrics.bootstrap import Interval, proportion_interval
from sidechain.metrics.impact import cumulative
from sidechain.report.data import (
    Arm,
    Clip,
    CumulativeCurve,
    DictionaryHealth,
    FeatureCard,
    FeatureClip,
    ImpactMap,
    ReportData,
    Sweep,
    Table,
    Tradeoff,
)

CONCEPTS = ("violin", "drums", "vocals", "tempo", "mood", "genre")
SITES = tuple(f"cross:{index}" for index in range(8))


def around(value, spread, n=48):
    return Interval(float(value), float(value - spread), float(value + spread), n)


def impact_map(judge="latent", seed=0, sites=SITES):
    rng = np.random.default_rng(seed)
    shape = np.exp(-0.5 * ((np.arange(len(sites)) - 3.2) / 1.1) ** 2)
    table = [np.clip(shape * rng.uniform(0.1, 0.7) + rng.normal(0, 0.02, len(sites)), 0, None)
             for _ in CONCEPTS]  # fmt: skip
    cells = [[around(v, 0.02 + 0.1 * v) for v in row] for row in table]
    means = [around(v, 0.015 + 0.05 * v, 288) for v in np.mean(table, axis=0)]
    return ImpactMap(sites, CONCEPTS, cells, means, judge)


def share(p, n=48):
    return proportion_interval(round(float(np.clip(p, 0, 1)) * n), n)


def arm(name, gain, harm, strengths=(0, 1, 2, 3, 4, 6, 8)):
    s = np.array(strengths, dtype=float)
    p = 1 / (1 + np.exp(2.4 - gain * s)) - 1 / (1 + np.exp(2.4)) + 0.06
    kept = 1 / (1 + np.exp(-(4.2 - harm * s)))
    distance = [around(v, 0.06 * v) for v in 0.35 * harm * s + 0.25 * (s > 0)]
    return Arm(name, list(s), [share(v) for v in p], distance, [share(v) for v in kept],
               auc=0.11 * gain, smoothness=0.05 / gain)  # fmt: skip


def tradeoff(concept="drums", judge="latent"):
    arms = (
        arm("localized", 1.3, 0.45),
        arm("all", 1.2, 0.8),
        arm("ablated", 0.45, 0.6),
        arm("random", 0.05, 0.5),
    )
    kept = "drums kept" if concept == "violin" else "instrument kept"
    return Tradeoff(concept, judge, arms, f"P({concept})", kept, 0.8, 1.9, 48)


def sweep(concept="drums", prompt="a calm violin melody", count=5, seconds=5.12):
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
                strength=2.0 * index,
                audio=tone + 0.15 * index * beat,
                mel=mel + 0.05 * np.random.default_rng(2).normal(size=mel.shape),
                probabilities={"latent": min(0.98, 0.05 + 0.3 * index), "mel": 0.04 + 0.2 * index},
                kept={"violin": 0.97 - 0.04 * index},
                distance=0.4 * index,
            )
        )
    return Sweep(concept, prompt, clips, seed=11, seconds=seconds)


def dictionaries(count=4, features=1280):
    rng = np.random.default_rng(3)
    steps = range(20)
    return [
        DictionaryHealth(
            f"cross:{index}",
            list(steps),
            [0.05 + 0.01 * index + 0.03 * abs(step - 9) / 9 for step in steps],
            [float(d) if d > 1e-5 else 0.0 for d in 10 ** rng.normal(-2.5, 0.9, features)],
        )
        for index in range(count)
    ]


def feature_card(concept="drums", count=3):
    shown = sweep(concept, count=count)
    texts = ("a slow gloomy fiddle solo with percussion and a choir", "techno, fast", "a tune")
    clips = [
        FeatureClip(
            prompt=texts[index % 3],
            step=7 * index,
            value=3.2 - index,
            place=None if index == 2 else 0.2 + 0.3 * index,
            trace=[max(0.0, np.sin(0.4 * token + index)) * (3.2 - index) for token in range(64)],
            audio=clip.audio,
            mel=clip.mel,
        )
        for index, clip in enumerate(shown.clips)
    ]
    return FeatureCard(concept, "cross:6, feature 148", "active in 41% of the tokens", clips)


def example():
    steps = np.arange(len(SITES) + 1)
    curves = []
    for judge, shift in (("latent", 0.0), ("mel", 0.4)):
        for index, label in enumerate((*CONCEPTS, "mean")):
            rise = 1 - np.exp(-steps / (1.0 + shift + 0.35 * index % 1.7))
            effect = cumulative(SITES, rise / rise[-1], 0.0, 1.0)
            curves.append(CumulativeCurve(label, judge, effect))
    return ReportData(
        title="Where a music model hears “violin”, and how to turn it up",
        summary="A small text-to-music diffusion model, its eight cross-attention sites, six "
        "concepts. All numbers on this page are invented: it shows the layout only.",
        findings=(
            "Sites cross:3 and cross:2 carry most of every concept; their ranking agrees between "
            "seeds (Spearman 0.93, interval 0.81 to 0.98).",
            "Steering drums at the localized sites lifts P(drums) from 0.06 to 0.83 with the "
            "instrument kept at 0.92; a random direction of equal norm stays below 0.10.",
            "Tempo does not reach the bar: 0.41 at best.",
        ),
        method=(
            "Each site in turn received the prompt that names the concept, while all other sites "
            "received the same prompt without it. Two judges that never saw the generator's "
            "weights scored the result.",
            "Contrastive vectors were taken from 50 pairs of prompts and added at several "
            "strengths, at the localized sites, at all sites and at all but the localized ones.",
        ),
        impacts=(impact_map(), impact_map("mel", 1)),
        cumulative=curves,
        localization_tables=(
            Table(
                "Ranking of sites between seeds, Spearman's rho",
                ("judge", "0 and 1", "0 and 2", "1 and 2", "mean"),
                (("latent", 0.95, 0.90, 0.93, around(0.93, 0.06)),
                 ("mel", 0.88, 0.93, 0.90, around(0.90, 0.07))),
            ),
        ),
        tradeoffs=[tradeoff(c, j) for c in ("drums",) for j in ("latent", "mel")],
        sweeps=(sweep(), sweep("violin", "slow jazz with drums", 7)),
        preservation_tables=(
            Table(
                "Kept at the best strength",
                ("concept", "instrument", "drums", "vocals", "tempo"),
                (("violin", "\u2013", share(0.9), share(0.95), share(0.8)),
                 ("drums", share(0.92), "\u2013", share(0.9), share(0.85))),
                "48 prompts each",
            ),
        ),
        dictionaries=dictionaries(),
        dictionary_tables=(
            Table("Held-out figures", ("site", "FVU", "dead"), (("cross:6", 0.03, "4.3%"),)),
        ),
        features=(feature_card(), feature_card("vocals")),
        model={
            "Model": "zoo:music, StableAudioDiTModel, 8 layers, width 160",
            "Weights": "4.1 M parameters, sha256 3f2a…91c0",
            "Sampler": "DPM-Solver++ multistep, 20 steps, guidance 3.0",
        },
        run={
            "sidechain": "0.1.0 (commit 38d5a7a)",
            "torch": "2.13.0+cpu, 2 threads",
            "Machine": "AMD EPYC, avx512",
            "Seeds": "0, 1, 2",
            "Time": "7 min 41 s",
        },
        limits=("Both judges learned from the same rendered data as the model.",),
        reproduce=("make demo", "sidechain localize --model zoo:music --concepts all --pairs 16 "
                   "--seeds 0 1 2 --out runs/localize"),
    )  # fmt: skip


if __name__ == "__main__":
    from sidechain.report.html import write_report

    print(write_report(example(), sys.argv[1]))
