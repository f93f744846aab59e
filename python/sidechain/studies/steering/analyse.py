# SPDX-License-Identifier: Apache-2.0
"""Trade-off curves of a sweep: effect, preservation, AUC and smoothness of every arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...io.run_folder import write_json, write_table
from ...metrics import curves
from ...metrics.bootstrap import Interval, mean_interval, proportion_interval
from ...metrics.results import KEPT_FLOOR, ArmCurve
from ...zoo.music.concepts import Concept

#: Arms whose reach sets the cut-off of the area: the real directions, not the controls.
CUTOFF_ARMS = ("localized", "all")


@dataclass(frozen=True)
class Target:
    """What is steered towards where scorers read texts: a name, and the text they compare with."""

    name: str
    text: str


Wanted = Concept | Target
#: What should stay where there are no classes: the prompt of the run that a sample is closest to.
PROMPT = "prompt"


def kept_attribute(wanted: Wanted) -> str:
    """Return the attribute that steering should keep: the instrument, or drums for instruments.

    Without classes it is the prompt: the one that the scorer finds closest.
    """
    if isinstance(wanted, Target):
        return PROMPT
    return "drums" if wanted.attribute == "instrument" else "instrument"


def measure_of(wanted: Wanted) -> str:
    """Return what a score is called on a page."""
    return f"score of {wanted.name}" if isinstance(wanted, Target) else f"P({wanted.name})"


def clip_name(prompt: int, arm: str, strength: float) -> str:
    """Path in the run folder of a clip."""
    return f"audio/{prompt:03d}_{arm}_{strength:g}.flac"


@dataclass(frozen=True)
class Steering:
    """Results of a sweep.

    Attributes:
        concept: what was steered.
        localized: aliases of the localized sites.
        arms: scorer -> arm -> curve.
        cutoff: scorer -> direction -> distance up to which the area counts.
        prompts: number of prompts.
        readings: the score of every clip.
    """

    concept: Wanted
    localized: list[str]
    arms: dict[str, dict[str, ArmCurve]]
    cutoff: dict[str, dict[int, float]]
    prompts: int
    readings: pd.DataFrame

    def curve_table(self) -> pd.DataFrame:
        """One row per scorer, arm and strength."""
        rows = []
        for scorer, arms in self.arms.items():
            for arm, curve in arms.items():
                for index, strength in enumerate(curve.strength):
                    row: dict[str, Any] = {
                        "concept": self.concept.name,
                        "scorer": scorer,
                        "arm": arm,
                        "strength": strength,
                    }
                    for key in ("score", "distance", "kept"):
                        interval: Interval = getattr(curve, key)[index]
                        row |= {
                            key: interval.value,
                            f"{key}_low": interval.low,
                            f"{key}_high": interval.high,
                        }
                    rows.append(row)
        return pd.DataFrame(rows)

    def score_table(self) -> pd.DataFrame:
        """AUC, smoothness and the best point that keeps enough, per scorer and arm."""
        rows = []
        for scorer, arms in self.arms.items():
            for arm, curve in arms.items():
                best = curve.best_point()
                zero = curve.strength.index(0.0)
                rows.append(
                    {
                        "concept": self.concept.name,
                        "scorer": scorer,
                        "arm": arm,
                        "auc": curve.auc,
                        "smoothness": curve.smoothness,
                        "score_at_0": curve.score[zero].value,
                        "best_strength": curve.strength[best] if best is not None else math.nan,
                        "best_score": curve.score[best].value if best is not None else math.nan,
                        "best_kept": curve.kept[best].value if best is not None else math.nan,
                    }
                )
        return pd.DataFrame(rows)

    def operating_strength(self) -> float | None:
        """Return the strength of the localized arm with the largest P(concept), mean over scorers.

        Only strengths count at which every scorer sees at least `KEPT_FLOOR` kept.
        """
        found = [arms["localized"] for arms in self.arms.values() if "localized" in arms]
        if not found:
            return None
        best: tuple[float, float] | None = None
        for index, strength in enumerate(found[0].strength):
            if strength and all(curve.kept[index].value >= KEPT_FLOOR for curve in found):
                score = float(np.mean([curve.score[index].value for curve in found]))
                best = max(best or (-1.0, 0.0), (score, strength))
        return best[1] if best else None

    def write(self, out: Path) -> None:
        """Write `readings.csv`, `curves.csv`, `scores.csv` and `summary.json`."""
        write_table(out / "readings.csv", self.readings)
        write_table(out / "curves.csv", self.curve_table())
        write_table(out / "scores.csv", self.score_table())
        write_json(
            out / "summary.json",
            {
                "concept": self.concept.name,
                "localized": self.localized,
                "kept": kept_attribute(self.concept),
                "prompts": self.prompts,
                "operating_strength": self.operating_strength(),
                "scores": self.score_table().to_dict(orient="records"),
            },
        )


def analyse(readings: pd.DataFrame, wanted: Wanted, localized: Sequence[str]) -> Steering:
    """Turn the readings of `sweep` into curves with intervals over prompts."""
    arms: dict[str, dict[str, ArmCurve]] = {}
    cutoffs: dict[str, dict[int, float]] = {}
    names = [arm for arm in readings.arm.unique() if arm != "none"]
    for scorer, table in readings.groupby("scorer"):
        tables = {arm: table[table.arm.isin(["none", arm])] for arm in names}
        cutoffs[str(scorer)] = _cutoff(tables)
        arms[str(scorer)] = {
            arm: _curve(part, wanted, cutoffs[str(scorer)]) for arm, part in tables.items()
        }
    return Steering(wanted, list(localized), arms, cutoffs, readings.prompt.nunique(), readings)


def _means(part: pd.DataFrame) -> pd.DataFrame:
    return part.groupby("strength", as_index=False)[["score", "distance"]].mean()


def _cutoff(tables: dict[str, pd.DataFrame]) -> dict[int, float]:
    """Return, per direction, the smallest of the largest distances that the real arms reach."""
    reference = [tables[arm] for arm in CUTOFF_ARMS if arm in tables] or list(tables.values())
    sweeps = [
        (means.distance.to_numpy(), means.strength.to_numpy()) for means in map(_means, reference)
    ]
    signs = [s for s in (1, -1) if any((alpha * s > 0).any() for _, alpha in sweeps)]
    return {sign: curves.cutoff(sweeps, sign) for sign in signs}


def _curve(part: pd.DataFrame, wanted: Wanted, limits: dict[int, float]) -> ArmCurve:
    column = f"{kept_attribute(wanted)}_kept"
    strengths = sorted(part.strength.unique())
    points = {s: part[part.strength == s].sort_values("prompt") for s in strengths}
    means = _means(part)
    scored = curves.score(means.distance, means.score, means.strength, limits)
    return ArmCurve(
        strength=[float(s) for s in strengths],
        score=[mean_interval(points[s].score) for s in strengths],
        distance=[mean_interval(points[s].distance) for s in strengths],
        kept=[proportion_interval(int(points[s][column].sum()), len(points[s])) for s in strengths],
        auc=scored.auc,
        smoothness=scored.smoothness,
    )
