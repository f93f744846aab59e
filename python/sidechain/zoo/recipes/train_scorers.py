# SPDX-License-Identifier: Apache-2.0
"""Train the two scorers on disjoint halves of the rendered clips."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...io.atomic import write_text
from ..music.attributes import ATTRIBUTES
from ..music.codec import LinearMelCodec
from ..music.scorer import LatentScorer, MelScorer, Scorer
from .train_music import encode_all


@dataclass(frozen=True)
class ScorerRecipe:
    """Schedule of a scorer; noise is the largest standard deviation added to latents."""

    epochs: tuple[int, int] = (8, 4)  # of the latent scorer and of the (slower) mel scorer
    batch: int = 64
    learning_rate: float = 2e-3
    noise: float = 0.35
    seed: int = 0


def _augment(latents: Tensor, recipe: ScorerRecipe, generator: torch.Generator) -> Tensor:
    """Add noise of random strength, shift in time by up to two steps and scale by a random gain."""
    count = len(latents)
    strength = torch.rand(count, 1, 1, generator=generator) * recipe.noise
    noisy = latents + strength * torch.randn(latents.shape, generator=generator)
    shift = int(torch.randint(-2, 3, (), generator=generator))
    gain = 1.0 + 0.1 * torch.randn(count, 1, 1, generator=generator)
    return noisy.roll(shift, dims=2) * gain


def train_scorer(
    scorer: Scorer, latents: Tensor, labels: Tensor, recipe: ScorerRecipe, name: str, epochs: int
) -> float:
    """Train `scorer` in place; returns the seconds it took."""
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=recipe.learning_rate, weight_decay=0.02)
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = len(latents) // recipe.batch
    total = epochs * batches
    progress = tqdm(total=total, desc=f"train scorer {name}", unit="step")
    scorer.train()
    for step in range(total):
        if step % batches == 0:
            order = torch.randperm(len(latents), generator=generator)
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / total))
        at = (step % batches) * recipe.batch
        rows = order[at : at + recipe.batch]
        logits = scorer(_augment(latents[rows].float(), recipe, generator))
        losses = [
            nn.functional.cross_entropy(logits[key], labels[rows, index], label_smoothing=0.02)
            for index, key in enumerate(ATTRIBUTES)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(scorer.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update()
        if step % 20 == 0:
            progress.set_postfix(loss=round(loss.item(), 3))
    scorer.eval()
    return time.perf_counter() - started


def accuracy(scorer: Scorer, latents: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right classes of every attribute."""
    found = scorer.probabilities(latents)
    return {
        name: float((found[name].argmax(1) == labels[:, index]).float().mean())
        for index, name in enumerate(ATTRIBUTES)
    }


def train(
    data: Path, codec_folder: Path, out: Path, recipe: ScorerRecipe, only: str | None = None
) -> None:
    """Train both scorers and write `out/latent`, `out/mel` and their accuracies on test clips."""
    codec = LinearMelCodec.from_pretrained(codec_folder)
    split = {
        name: (
            encode_all(codec, np.load(data / f"{name}_mels.npy", mmap_mode="r")),
            torch.from_numpy(np.load(data / f"{name}_labels.npy")),
        )
        for name in ("train", "test")
    }
    latents, labels = split["train"]
    for index, name in enumerate(("latent", "mel")):
        if only not in (None, name):
            continue
        torch.manual_seed(recipe.seed + 17 * index)
        scorer: Scorer = LatentScorer() if name == "latent" else MelScorer()
        if isinstance(scorer, MelScorer):
            scorer.codec.load_state_dict(codec.state_dict())
        seconds = train_scorer(
            scorer, latents[index::2], labels[index::2], recipe, name, recipe.epochs[index]
        )
        test_latents, test_labels = split["test"]
        facts = {
            "accuracy": accuracy(scorer, test_latents.float(), test_labels),
            "clips": len(latents[index::2]),
            "parameters": sum(p.numel() for p in scorer.parameters()),
            "seconds": round(seconds),
        }
        scorer.save_pretrained(out / name)
        write_text(out / name / "training.json", json.dumps(facts, indent=2) + "\n")
