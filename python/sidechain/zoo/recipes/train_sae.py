# SPDX-License-Identifier: Apache-2.0
"""Make the dictionaries of the music model: record its sites, train, measure, write the card.

    python -m sidechain.zoo.recipes.train_sae [--out DIR] [--sites 6,3] [--short] [--install]

Every stage continues where it was cut off. The recorded activations stay in the run folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ... import sae, store
from ...io.atomic import write_text
from ...sae import Sae
from ...sae.features.evaluate import measure
from ..checksums import WEIGHTS, write_checksums
from ..load import SAES, dictionary_file, music
from ..music.captions import fresh_captions

#: All cross-attentions of the model: a concept enters through several of them.
SITES = tuple(f"cross:{index}" for index in range(8))

#: Number of the first held-out caption; training starts from 0.
_FIRST_HELD_OUT = 900_000


@dataclass(frozen=True)
class SaeRecipe:
    """Settings for the activations and the dictionary of one site.

    Steps are normalised one by one, because the variance of the outputs falls up to 24-fold within
    a generation. Every recorded token is trained on once; held-out tokens are only measured.
    """

    prompts: int = 1600
    held_out: int = 256
    steps: int = 20
    guidance: float = 3.0
    batch_prompts: int = 32
    features: int = 1280
    architecture: str = "batch_topk"
    k: int = 16
    tokens: int = 2_080_000
    batch: int = 2048
    lr: float = 2e-3
    resample: float = 0.05
    dead_tokens: int = 30_000
    seed: int = 0


def record(
    pipe: Any, out: Path, sites: Sequence[str], recipe: SaeRecipe
) -> dict[str, dict[str, store.ActivationStore]]:
    """Record the training and held-out rows by site: `{"train": {...}, "held_out": {...}}`."""
    parts = {"held_out": (recipe.held_out, _FIRST_HELD_OUT), "train": (recipe.prompts, 0)}
    return {
        name: store.record(
            pipe,
            list(sites),
            fresh_captions(count, first),
            out / name,
            sampling=store.Sampling(first, recipe.batch_prompts),
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
        )
        for name, (count, first) in parts.items()
    }


def train(source: store.ActivationStore, out: Path, recipe: SaeRecipe) -> Sae:
    """Train the dictionary of one site; a finished run is read, an interrupted one continues."""
    return sae.train(
        source,
        out,
        features=recipe.features,
        tokens=recipe.tokens,
        architecture=recipe.architecture,
        k=recipe.k,
        batch=recipe.batch,
        lr=recipe.lr,
        resample=recipe.resample,
        seed=recipe.seed,
        dead_tokens=recipe.dead_tokens,
        dead_every=10,
    )


def publish(
    trained: Sae, stores: tuple[store.ActivationStore, store.ActivationStore], target: Path
) -> dict[str, Any]:
    """Write the dictionary with its held-out figures into `target`; returns the figures."""
    source, held_out = stores
    health = measure(trained, held_out)
    figures = {
        "fvu": round(health.fvu, 5),
        "raw_fvu": round(health.raw_fvu, 5),
        "worst_step_fvu": round(float(health.step_fvu.max()), 5),
        "l0": round(health.l0, 3),
        "dead": round(health.dead, 5),
    }
    facts = {
        "recorded_tokens": len(source),
        "recorded_prompts": len(source.prompts()),
        "held_out_tokens": len(held_out),
        "held_out_prompts": len(held_out.prompts()),
    }
    trained.provenance = replace(
        trained.provenance,
        model="zoo:music",  # the path it was loaded from is private
        branches=("cond",),
        metrics=figures,
        extra={**trained.provenance.extra, **facts},
    )
    path = target / dictionary_file(source.site)
    target.mkdir(parents=True, exist_ok=True)
    trained.save(path)
    return {
        **figures,
        **facts,
        "trained_tokens": trained.provenance.tokens,
        "features": trained.config.features,
        "k": trained.config.k,
        "architecture": trained.config.architecture,
        "fvu_by_step": [round(float(v), 4) for v in health.step_fvu],
        "density_quantiles": [
            round(float(v), 6) for v in health.density.quantile(torch.linspace(0, 1, 5).double())
        ],
        "megabytes": round(path.stat().st_size / 1e6, 2),
    }


def make(out: Path, sites: Sequence[str], recipe: SaeRecipe) -> dict[str, dict[str, Any]]:
    """Run all stages; the finished dictionaries and their figures are in `out/export`."""
    stores = record(music(), out / "activations", SITES, recipe)
    target = out / "export"
    figures = {}
    for site in sites:
        source, held_out = stores["train"][site], stores["held_out"][site]
        trained = train(source, out / "runs" / dictionary_file(site).partition(".")[0], recipe)
        figures[site] = publish(trained, (source, held_out), target)
    text = json.dumps({"recipe": asdict(recipe), "sites": figures}, indent=1)
    write_text(target / "evaluation.json", text + "\n")
    write_text(target / "README.md", card(recipe, figures))
    write_checksums(target)
    return figures


def card(recipe: SaeRecipe, figures: dict[str, dict[str, Any]]) -> str:
    """Model card of the dictionaries, in Markdown."""
    columns = ("fvu", "worst_step_fvu", "raw_fvu", "l0", "dead", "trained_tokens", "megabytes")
    lines = [
        "# Dictionaries of the music model",
        "",
        f"Sparse autoencoders ({recipe.architecture}, {recipe.features} features, "
        f"{recipe.k} active) of what cross-attentions of `zoo.music()` put out: cond branch, all "
        f"tokens, {recipe.steps} steps, guidance {recipe.guidance:g}, random captions. Each "
        "scheduler step is normalised by itself; the normaliser is part of the file.",
        "",
        'Load one with `sidechain.zoo.dictionary("cross:6")`. Figures are of '
        f"{recipe.held_out} held-out captions; `fvu` is the unexplained share of the variance "
        "with all steps weighed alike, `raw_fvu` the same in the units of the activations, `dead` "
        "the share of features that never fired there.",
        "",
        "| site | FVU | of the worst step | raw FVU | L0 | dead | tokens trained | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {site} | " + " | ".join(str(row[name]) for name in columns) + " |"
        for site, row in figures.items()
    ]
    rows = next(iter(figures.values()))
    lines += [
        "",
        f"Recorded: {rows['recorded_tokens']} tokens of {rows['recorded_prompts']} captions at "
        "each site. Made by `make zoo-sae`; settings and figures by step are in "
        "`evaluation.json`.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run all stages; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m sidechain.zoo.recipes.train_sae", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("runs/zoo-sae"))
    parser.add_argument("--sites", default=",".join(SITES), metavar="A,B,...")
    parser.add_argument("--short", action="store_true", help="minutes: shows that all stages work")
    parser.add_argument("--install", action="store_true", help="replace the shipped dictionaries")
    chosen = parser.parse_args(argv)
    recipe = SaeRecipe()
    if chosen.short:
        recipe = replace(
            recipe, prompts=8, held_out=4, batch_prompts=4, features=64, k=4, tokens=20_480
        )
    make(chosen.out, [name.strip() for name in chosen.sites.split(",")], recipe)
    if chosen.install:
        shutil.rmtree(WEIGHTS / SAES, ignore_errors=True)
        shutil.copytree(chosen.out / "export", WEIGHTS / SAES)
    print(chosen.out / "export")
    return 0


if __name__ == "__main__":
    sys.exit(main())
