# SPDX-License-Identifier: Apache-2.0
"""Make the music model and its scorers from nothing: data, training, export, evaluation, card.

    python -m sidechain.zoo.recipes [--out DIR] [--short] [--install]

Needs tinysoundfont and a General MIDI sound font (Debian: fluid-soundfont-gm). Every stage
continues where it was cut off.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from .. import music, music_tagger, scorers
from ..checksums import WEIGHTS, write_checksums
from . import dataset, train_music, train_scorers
from .card import write_card
from .evaluate import evaluate, write
from .export import export_music, export_scorers


def main(argv: list[str] | None = None) -> int:
    """Run all stages; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m sidechain.zoo.recipes", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/zoo-music"))
    parser.add_argument("--short", action="store_true", help="minutes: shows that all stages work")
    parser.add_argument("--install", action="store_true", help="replace the shipped weights")
    chosen = parser.parse_args(argv)
    make(chosen.out, short=chosen.short)
    if chosen.install:
        for name in ("music", "judges"):
            shutil.rmtree(WEIGHTS / name, ignore_errors=True)
            shutil.copytree(chosen.out / "export" / name, WEIGHTS / name)
    print(chosen.out / "export")
    return 0


def make(out: Path, *, short: bool) -> None:
    """Run all stages into `out`; the finished folders are `out/export/{music,scorers}`."""
    recipe, scorer_recipe = train_music.MusicRecipe(), train_scorers.ScorerRecipe()
    train, test, per_cell = 22_000, 2_000, 48
    if short:
        recipe = replace(recipe, layers=2, steps=60, warmup=20)
        scorer_recipe = replace(scorer_recipe, epochs=(2, 1))
        train, test, per_cell = 500, 100, 2
    dataset.build(out / "data", train=train, test=test)
    train_music.train(out / "data", out / "music", recipe)
    if not (out / "judges" / "mel" / "training.json").is_file():
        train_scorers.train(out / "data", out / "music" / "codec", out / "judges", scorer_recipe)
    target = out / "export"
    export_music(out / "music", target / "music", recipe)
    export_scorers(out / "judges", target / "judges")
    measure(target, per_cell=per_cell)


def measure(target: Path, *, per_cell: int) -> None:
    """Evaluate the exported model, in half precision as it ships, and write its card."""
    pipe = music(folder=target / "music")
    found = evaluate(pipe, scorers(folder=target / "judges"), music_tagger(), per_cell=per_cell)
    write(found, target / "music" / "evaluation.json")
    write_card(target / "music", target / "judges")
    write_checksums(target / "music")


if __name__ == "__main__":
    sys.exit(main())
