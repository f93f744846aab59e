# SPDX-License-Identifier: Apache-2.0
"""Settings that several studies have, with their names, defaults and help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _values as values
from .._options import Settings, choice, number, option, path, text, whole

MODEL = "zoo:music"
DTYPES = ("float32", "float16", "bfloat16")
#: Of `sidechain.sae.features.scoring`, `sidechain.vectors` and `sidechain.taps`.
SCORES = ("tada", "diff", "ratio", "mean_pos", "cohens_d", "logistic")
WEIGHTINGS = ("natural", "none", "raw", "softmax", "sqrt", "log")
METHODS = ("caa", "sae")


def seed() -> Any:
    """Declare the seed of a study."""
    return whole(0, "seed of the noise", most=values.SEED_MOST, group="sampling")


def dictionaries(group: str = "", prefix: str = "") -> Any:
    """Declare a folder of dictionaries."""
    return path(
        None,
        f"{prefix}folder with a dictionary for each site, cross-6.safetensors (default: the zoo)",
        "DIR",
        values.folder_there,
        group=group,
    )


def folder(default: str) -> Any:
    """Declare the folder of a run."""
    return path(Path(default), "folder of the run", "DIR", values.folder_to_write, replayed=False)


def sites(help: str) -> Any:
    """Declare a pattern of sites, all cross-attentions by default."""
    return text("cross:*", help, "GLOB")


@dataclass(frozen=True)
class Model(Settings):
    """The model of a study, how it is called, where it runs and in which dtype."""

    model: str = option(
        MODEL,
        "zoo:music, the folder of a saved pipeline, or its id on the hub",
        values.model,
        probe=values.model_there,
        metavar="MODEL",
    )
    revision: str | None = text(None, "of a model of the hub", "NAME", group="model")
    call: tuple[tuple[str, Any], ...] = option(
        (),
        "argument of the pipeline, such as height=512 or audio_length_in_s=5; may be repeated",
        values.calls,
        metavar="KEY=VALUE",
        many="append",
        checked=True,
        group="model",
    )
    device: str = option(
        "cpu",
        "where the model runs: cpu, cuda, cuda:N, xpu or mps",
        values.device,
        metavar="DEVICE",
        group="model",
        replayed=False,
    )
    dtype: str = choice("float32", "of the model's weights", DTYPES, group="model")


@dataclass(frozen=True)
class Scoring(Settings):
    """Who scores; mixed into the settings of a study."""

    scorer: tuple[str, ...] = option(
        (),
        "zoo (default for zoo:music), clap:FOLDER|ID, clip:FOLDER|ID or module:function; may be "
        "repeated",
        values.scorers,
        metavar="SCORER",
        many="append",
        checked=True,
        group="scoring",
    )


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled; mixed into the settings of a study."""

    steps: int = whole(20, "num_inference_steps", least=1, group="sampling")
    guidance: float = number(3.0, "guidance_scale", least=0.0, group="sampling")
    batch_rows: int | str = option(
        64,
        "samples generated at once, or auto: as many as fit the memory",
        values.rows,
        metavar="N|auto",
        checked=True,
        group="sampling",
    )


_METHOD = "how the vector is made"


@dataclass(frozen=True)
class Method:
    """How a vector is made; mixed into the settings of a study."""

    method: str = choice(
        "caa",
        "caa: mean difference of activations; sae: decoder rows of the dictionary features that "
        "score best",
        METHODS,
        group=_METHOD,
    )
    dictionaries: Path | None = dictionaries(_METHOD, "sae: ")
    features: int = whole(20, "sae: features a step", least=1, group=_METHOD)
    score: str = choice("tada", "sae: what ranks them", SCORES, group=_METHOD)
    weighting: str = choice(
        "natural",
        "sae: natural (strength 1 is one natural difference) or as published (none), or by the "
        "scores",
        WEIGHTINGS,
        group=_METHOD,
    )
