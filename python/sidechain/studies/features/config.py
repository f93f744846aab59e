# SPDX-License-Identifier: Apache-2.0
"""Settings of `sidechain sae score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ... import _values as values
from ..._options import Settings, choice, option, path, text, whole
from ..config import SCORES, Model, Sampling, dictionaries, folder, seed, sites
from ..localization.config import read_concepts

ACTIVATIONS = ("relu", "selected")
#: Group of the options of one's own dictionary and rows.
OWN = "own dictionary and rows"


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig(Sampling, Model):
    """Settings of `sidechain sae score`; see `sidechain sae score --help`."""

    sites: str = sites("those with a dictionary")
    dictionaries: Path | None = dictionaries()
    concepts: tuple[str, ...] = option(
        ("drums", "vocals", "violin"), "comma list, or all", read_concepts, metavar="A,B,..."
    )
    score: str = choice("tada", "what ranks features", SCORES)
    activations: str = choice(
        "relu",
        "relu: all that are positive, as published; selected: those that the dictionary selects",
        ACTIVATIONS,
        before={"open": "relu", "kept": "selected"},
    )
    features: int = whole(3, "features a concept and site", least=1)
    moments: int = whole(3, "clips a feature", least=1)
    pairs: int = whole(16, "prompt pairs a concept", least=1)
    prompts: int = whole(32, "held-out captions", least=1)
    batch_rows: int = whole(32, "clips generated at once", least=1, group="sampling")
    seed: int = seed()
    out: Path = folder("runs/sae-score")


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Settings):
    """Settings of `sidechain sae score DICT --rows FILE`."""

    dictionary: str = text(
        ...,
        "a dictionary of any format (file, folder, run or hub id), to measure on --rows; without "
        "it those of the music model of the zoo are measured",
        "DICT",
        positional=True,
    )
    rows: Path = path(
        ...,
        "measure DICT on these: a store, or a file or folder of activations (.npy, .safetensors, "
        ".pt, .parquet, .arrow)",
        "STORE|FILE",
        None,
        group=OWN,
    )
    column: str | None = text(
        None, "of a table, name of the tensor in a file, or site of a store", "NAME", group=OWN
    )
    row_steps: Path | None = path(
        None,
        ".npy file with the scheduler step of each row",
        "FILE",
        values.file_there,
        group=OWN,
    )
    strongest: int = whole(12, "features shown, those that carry most of the output", group=OWN)
    examples: int = whole(8, "rows shown of each, those of its largest values", least=1, group=OWN)
    device: str = option(
        "cpu",
        "where it runs: cpu, cuda, cuda:N, xpu or mps",
        values.device,
        metavar="DEVICE",
        replayed=False,
    )
    out: Path = folder("runs/sae-score")
