# SPDX-License-Identifier: Apache-2.0
"""What a report shows, as plain data: studies fill it, `sidechain.report.html` lays it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sidechain.metrics.bootstrap import Interval
from sidechain.metrics.impact import Cumulative
from sidechain.metrics.thresholds import TAU

Array = NDArray[np.float64]

ARM_LABELS: Mapping[str, str] = {
    "localized": "localized sites",
    "all": "all sites",
    "ablated": "all but localized",
    "random": "random direction",
}


@dataclass(frozen=True)
class ImpactMap:
    """Impact of sites (or windows of sites) on concepts, read by one judge.

    Attributes:
        sites: short names in network order [L], for example "cross:3".
        concepts: concept names [C].
        impacts: one interval per concept and site [C][L]; NaN where undefined.
        means: mean over concepts per site [L].
        judge: who scored.
        tau: threshold of the mean impact.
        title: what was patched.
        note: a remark for the caption.
    """

    sites: Sequence[str]
    concepts: Sequence[str]
    impacts: Sequence[Sequence[Interval]]
    means: Sequence[Interval]
    judge: str
    tau: float = TAU
    title: str = "Single sites"
    note: str = ""

    def __post_init__(self) -> None:
        rows = [len(row) for row in self.impacts]
        sites = len(self.sites)
        if rows != [sites] * len(self.concepts) or len(self.means) != sites or not rows:
            raise ValueError(
                f"ImpactMap: expected impacts [C][L] and means [L] with C={len(self.concepts)} "
                f"(concepts) and L={sites} (sites), got rows of {rows} and {len(self.means)} means"
            )


@dataclass(frozen=True)
class CumulativeCurve:
    """Cumulative effect of the best sites on one concept (or their mean), read by one judge."""

    label: str
    judge: str
    curve: Cumulative


@dataclass(frozen=True)
class Arm:
    """One way to steer, over its strengths.

    Attributes:
        name: key of `ARM_LABELS`, or any other text.
        strength: strengths [N], ascending, 0 among them.
        alignment: concept score per strength [N], for example P(concept).
        distance: distance to the unsteered output per strength [N].
        kept: share of what should stay that stayed, per strength [N]; empty if not measured.
        auc: area under alignment over distance, if computed.
        smoothness: unevenness of the climb, if computed.
    """

    name: str
    strength: Sequence[float]
    alignment: Sequence[Interval]
    distance: Sequence[Interval]
    kept: Sequence[Interval] = ()
    auc: float | None = None
    smoothness: float | None = None

    def __post_init__(self) -> None:
        lengths = [len(self.alignment), len(self.distance), len(self.kept) or len(self.strength)]
        if lengths != [len(self.strength)] * 3 or not self.strength:
            raise ValueError(
                f"Arm: expected alignment, distance and kept [N] with N={len(self.strength)} "
                f"(strength), got {lengths}"
            )

    @property
    def label(self) -> str:
        """Name as shown."""
        return ARM_LABELS.get(self.name, self.name)

    def operating_point(self, floor: float) -> int | None:
        """Index of the highest alignment among strengths != 0 that keep at least `floor`."""
        allowed = [
            index
            for index, strength in enumerate(self.strength)
            if strength != 0 and (not self.kept or self.kept[index].value >= floor)
        ]
        return max(allowed, key=lambda index: self.alignment[index].value, default=None)


@dataclass(frozen=True)
class Tradeoff:
    """Alignment against preservation of one concept, read by one judge.

    Attributes:
        concept: concept name.
        judge: who scored.
        arms: what is compared; the first is drawn on top.
        alignment_label: axis text, for example "P(drums)".
        kept_label: axis text, for example "instrument kept".
        kept_floor: preservation asked for at the operating point.
        cutoff: distance up to which the area counts, if any.
        prompts: number of prompts (units) behind each point.
    """

    concept: str
    judge: str
    arms: Sequence[Arm]
    alignment_label: str = "P(concept)"
    kept_label: str = "share kept"
    kept_floor: float = 0.8
    cutoff: float | None = None
    prompts: int = 0


@dataclass(frozen=True)
class Clip:
    """One output of a sweep.

    Attributes:
        strength: steering strength; 0 is the unsteered clip.
        audio: samples [T] or [T, channels] in -1 .. 1, or None.
        mel: log-mel spectrogram [frames, bins], low bins first, or None.
        probabilities: P(concept) by judge.
        kept: P of what should stay, by name, for example {"violin": 0.93}.
        distance: distance to the unsteered clip.
    """

    strength: float
    audio: NDArray[np.floating] | None = None
    mel: NDArray[np.floating] | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)
    distance: float | None = None


@dataclass(frozen=True)
class Sweep:
    """Clips of one prompt and seed over strengths.

    Attributes:
        concept: concept steered towards.
        prompt: text the clips share.
        clips: in order of strength.
        arm: sites acted on, key of `ARM_LABELS` or any text.
        seed: seed of the starting noise.
        sample_rate: of the audio, in Hz.
        seconds: length of the clips.
        hertz: lowest and highest frequency of the mel axis.
        note: a remark for the caption.
    """

    concept: str
    prompt: str
    clips: Sequence[Clip]
    arm: str = "localized"
    seed: int | None = None
    sample_rate: int = 16000
    seconds: float = 5.12
    hertz: tuple[float, float] = (30.0, 8000.0)
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Any further table; cells are shown as they are (floats with two decimals)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True)
class DictionaryHealth:
    """One dictionary in the figures: a line.

    Attributes:
        site: short name.
        steps: scheduler steps [S].
        step_fvu: unexplained share of the variance of each step [S].
        density: share of tokens in which each feature is active [F].
    """

    site: str
    steps: Sequence[int]
    step_fvu: Sequence[float]
    density: Sequence[float]


@dataclass(frozen=True)
class FeatureClip:
    """A clip in which a feature is large.

    Attributes:
        prompt: text of the clip.
        step: scheduler step of the moment.
        value: activation there.
        place: where it is, as a share of the clip's length; None = in the global token.
        trace: activation along the clip at that step.
        audio: samples [T].
        mel: log-mel spectrogram [frames, bins], low bins first.
    """

    prompt: str
    step: int
    value: float
    place: float | None
    trace: Sequence[float]
    audio: NDArray[np.floating] | None = None
    mel: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class FeatureCard:
    """A feature with its figures and the clips in which it is largest."""

    concept: str
    name: str
    facts: str
    clips: Sequence[FeatureClip]
    sample_rate: int = 16000
    seconds: float = 5.12
    hertz: tuple[float, float] = (30.0, 8000.0)


@dataclass
class ReportData:
    """Everything one report shows; empty parts are left out.

    Attributes:
        title: headline.
        summary: one paragraph under the headline.
        findings: what came out, one sentence each, the most important first.
        method: paragraphs on what was done.
        impacts: heat maps, each with its table of intervals.
        cumulative: cumulative curves, drawn together per judge.
        localization_tables: for example rank stability over seeds.
        tradeoffs: curves per concept and judge.
        steering_tables: further tables below the trade-off curves.
        sweeps: clips to hear and see.
        preservation_tables: what stayed: drums, instrument and so on under steering.
        dictionaries: lines of the figure of dictionaries.
        dictionary_tables: their figures, and the features that stand for concepts.
        features: features to hear and see.
        model: facts about the model, name to value.
        run: facts about the run: versions, seeds, times.
        reproduce: shell commands.
        limits: caveats.
    """

    title: str
    summary: str = ""
    findings: Sequence[str] = ()
    method: Sequence[str] = ()
    impacts: Sequence[ImpactMap] = ()
    cumulative: Sequence[CumulativeCurve] = ()
    localization_tables: Sequence[Table] = ()
    tradeoffs: Sequence[Tradeoff] = ()
    steering_tables: Sequence[Table] = ()
    sweeps: Sequence[Sweep] = ()
    preservation_tables: Sequence[Table] = ()
    dictionaries: Sequence[DictionaryHealth] = ()
    dictionary_tables: Sequence[Table] = ()
    features: Sequence[FeatureCard] = ()
    model: Mapping[str, object] = field(default_factory=dict)
    run: Mapping[str, object] = field(default_factory=dict)
    reproduce: Sequence[str] = ()
    limits: Sequence[str] = ()
