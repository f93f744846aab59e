# SPDX-License-Identifier: Apache-2.0
"""Settings of `sidechain demo`, and the sizes behind them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ... import _values as values
from ..._options import Settings, choice, flag, option, whole
from ..config import DTYPES, folder


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Options of `sidechain demo`."""

    seed: int = whole(0, "seed of the noise", most=values.SEED_MOST)
    short: bool = flag("fewer prompts and strengths")
    device: str = option(
        "cpu",
        "where the model runs: cpu, cuda, cuda:N, xpu or mps",
        values.device,
        metavar="DEVICE",
        replayed=False,
    )
    dtype: str = choice("float32", "of the model's weights", DTYPES)
    out: Path = folder("runs/demo")


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of a demo; `SHORT` is what tests run."""

    concepts: tuple[str, ...] = ("violin", "flute", "drums", "vocals", "fast", "happy", "jazz")
    steered: tuple[str, ...] = ("drums", "vocals", "violin")
    pairs: int = 4
    vector_pairs: int = 16
    prompts: int = 6
    strengths: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    steps: int = 12
    guidance: float = 3.0
    batch_rows: int = 24
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


SHORT = DemoConfig(
    concepts=("drums", "violin"),
    steered=("drums",),
    pairs=1,
    vector_pairs=2,
    prompts=2,
    strengths=(0.0, 1.0, 2.0),
    steps=4,
)
