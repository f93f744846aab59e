# SPDX-License-Identifier: Apache-2.0
"""Train every architecture at its defaults and write what comes out into one table.

    python -m sidechain.zoo.recipes.architectures [--out DIR] [--short] [--install]

On planted rows, whose dictionary is known, and on held-out rows of a cross-attention of the music
model. Nothing but the architecture and, on planted rows, the number of active features is set, so
that the table shows what a user gets who sets nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import sae, store
from ...io.atomic import write_text
from ...sae import ARCHITECTURES, Sae
from ...sae.features.evaluate import active_counts, measure
from ...sae.planted import Planted, share_found
from ..checksums import WEIGHTS, write_checksums
from ..load import SAES, music
from .train_sae import TABLE, SaeRecipe, card, record

#: Every architecture, and every penalty of those that have several.
VARIANTS: dict[str, dict[str, str]] = {
    "topk": {"architecture": "topk"},
    "batch_topk": {"architecture": "batch_topk"},
    "matryoshka": {"architecture": "matryoshka"},
    "relu": {"architecture": "relu"},
    "gated": {"architecture": "gated"},
    "jumprelu, tanh": {"architecture": "jumprelu", "penalty": "tanh"},
    "jumprelu, l0": {"architecture": "jumprelu", "penalty": "l0"},
}
SITE = "cross:6"

# Rows that no training reaches, and rows that are made at a time.
HELD_OUT, _CHUNK = 1 << 15, 1 << 12


@dataclass(frozen=True)
class TableRecipe:
    """Settings of the table; features of a dictionary = `expansion` times the atoms, or the width.

    Attributes:
        planted: kinds of planted rows; all but the last `HELD_OUT` are trained on, with k or l0 as
            many atoms as a row has.
        site: of the music model.
        prompts, held_out: captions that are recorded there, for training and for the figures.
        steps: of the sampler.
        zoo_tokens: rows of a run on those; no more than are recorded.
        batch: rows of a step; 0 = as `TrainConfig` chooses.
        planted_expansion, zoo_expansion: features over atoms, and over the width.
    """

    planted: tuple[Planted, ...] = (
        Planted(2_000_000 + HELD_OUT, 64, 256, 8),
        Planted(2_000_000 + HELD_OUT, 256, 1024, 32),
    )
    site: str = SITE
    prompts: int = 800
    held_out: int = 64
    steps: int = 20
    zoo_tokens: int = 1_000_000
    batch: int = 0
    planted_expansion: int = 2
    zoo_expansion: int = 8


#: Seconds: shows that every row of the table can be made.
SHORT = TableRecipe(
    planted=(Planted(2048 + HELD_OUT, 24, 48, 3),), prompts=2, held_out=1, steps=2, zoo_tokens=256,
    batch=128, zoo_expansion=2,
)  # fmt: skip


def figures_of(trained: Sae, batches: Iterable[Tensor]) -> dict[str, float]:
    """Return FVU (in normalised units), L0 and the share of features that no row activates."""
    features, width = trained.config.features, trained.config.d_in
    error, squares, rows = 0.0, 0.0, 0
    sums = torch.zeros(width, dtype=torch.float64)
    fired = torch.zeros(features, dtype=torch.int64)
    for x in batches:
        with torch.no_grad():
            codes = trained.encode(x)
            y = trained.normaliser.normalise(x).double()
            y_hat = trained.normaliser.normalise(trained.decode(codes)).double()
        error += float((y - y_hat).square().sum())
        squares += float(y.square().sum())
        sums += y.sum(0)
        rows += len(x)
        fired += active_counts(codes, features)
    return {
        "fvu": error / (squares - float(sums.square().sum()) / rows),
        "l0": float(fired.sum() / rows),
        "dead": float((fired == 0).double().mean()),
    }


def on_planted(planted: Planted, out: Path, recipe: TableRecipe) -> dict[str, dict[str, float]]:
    """Train every variant on planted rows; returns its figures and the atoms it found."""
    atoms, table = planted.directions(), {}
    tokens = planted.rows - HELD_OUT
    for name, shape in VARIANTS.items():
        asked = "k" if ARCHITECTURES[shape["architecture"]].takes("k") else "l0"
        trained = _train(
            partial(chunks, planted, 0, tokens), out / _folder(name),
            features=planted.atoms * recipe.planted_expansion, tokens=tokens, batch=recipe.batch,
            **shape, **{asked: planted.active},
        )  # fmt: skip
        found = {f"found_{c}": share_found(trained.w_dec, atoms, c) for c in (0.9, 0.95)}
        unseen = chunks(planted, tokens, planted.rows)
        table[name] = _rounded({**figures_of(trained, unseen), **found})
    return table


def chunks(planted: Planted, start: int, stop: int) -> Iterator[Tensor]:
    """Yield planted rows [start, stop), some at a time."""
    atoms = planted.directions()
    for first in range(start, stop, _CHUNK):
        yield torch.from_numpy(planted.slice(first, min(stop, first + _CHUNK), atoms))


def on_zoo(
    training: store.ActivationStore, unseen: store.ActivationStore, out: Path, recipe: TableRecipe
) -> dict[str, dict[str, float]]:
    """Train every variant on rows of a site; returns its figures on held-out captions."""
    table = {}
    for name, shape in VARIANTS.items():
        trained = _train(
            training, out / _folder(name), features=training.width * recipe.zoo_expansion,
            tokens=recipe.zoo_tokens, batch=recipe.batch, **shape,
        )  # fmt: skip
        health = measure(trained, unseen)
        table[name] = _rounded({"fvu": health.fvu, "l0": health.l0, "dead": health.dead})
    return table


def make(out: Path, recipe: TableRecipe) -> dict[str, Any]:
    """Make all rows of the table and write them to `out/architectures.json`.

    A run that is finished is read, one that was cut off goes on.
    """
    made: dict[str, Any] = {"recipe": asdict(recipe), "planted": [], "zoo": {}}
    for planted in recipe.planted:
        folder = out / f"planted-{planted.width}-{planted.atoms}-{planted.active}"
        made["planted"].append(
            {"rows": asdict(planted), "variants": on_planted(planted, folder, recipe)}
        )
    recording = SaeRecipe(prompts=recipe.prompts, held_out=recipe.held_out, steps=recipe.steps)
    stores = record(music(), out / "activations", [recipe.site], recording)
    training, unseen = (stores[part][recipe.site] for part in ("train", "held_out"))
    made["zoo"] = {
        "site": recipe.site, "width": training.width, "recorded_tokens": len(training),
        "held_out_tokens": len(unseen),
        "variants": on_zoo(training, unseen, out / "zoo", recipe),
    }  # fmt: skip
    write_text(out / TABLE, json.dumps(made, indent=1) + "\n")
    return made


def install(made: dict[str, Any], folder: Path) -> None:
    """Put the table beside dictionaries and into their card; the dictionaries stay as they are."""
    write_text(folder / TABLE, json.dumps(made, indent=1) + "\n")
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    recipe = SaeRecipe(**evaluation["recipe"])
    write_text(folder / "README.md", card(recipe, evaluation["sites"], made))
    write_checksums(folder)


def _train(
    data: store.ActivationStore | Callable[[], Iterable[Any]], out: Path, **settings: Any
) -> Sae:
    return sae.train(data, out, progress=False, **settings)


def _folder(name: str) -> str:
    return name.replace(", ", "-")


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def main(argv: list[str] | None = None) -> int:
    """Make the table; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m sidechain.zoo.recipes.architectures", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("runs/zoo-sae-architectures"))
    parser.add_argument("--short", action="store_true", help="seconds: shows that all rows work")
    parser.add_argument("--install", action="store_true", help="put it into the shipped card")
    chosen = parser.parse_args(argv)
    made = make(chosen.out, SHORT if chosen.short else TableRecipe())
    if chosen.install:
        install(made, WEIGHTS / SAES)
    print(chosen.out / TABLE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
