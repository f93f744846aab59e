# SPDX-License-Identifier: Apache-2.0
"""Record what sites put out into a store: `sidechain capture`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...store import ActivationStore, record
from ...zoo.music.captions import fresh_captions
from .. import common


@dataclass(frozen=True)
class CaptureConfig:
    """Settings of `sidechain capture`; see `sidechain capture --help`."""

    out: Path
    model: str = "zoo:music"
    prompts: int | tuple[str, ...] = 100
    sites: str = "cross:*"
    passes: str = "cond"
    window: tuple[int | float, int | float] | None = None
    every: int = 1
    tokens: slice | None = None
    dtype: str = "float16"
    queue_bytes: int = 256 << 20
    shard_bytes: int = 256 << 20
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    batch_rows: int = 64


def run(config: CaptureConfig) -> dict[str, ActivationStore]:
    """Record into `config.out`, or continue what was begun there."""
    pipe, _ = common.load(config.model)
    count = config.prompts
    prompts = fresh_captions(count) if isinstance(count, int) else count
    return record(
        pipe,
        common.site_patterns(config.sites),
        prompts,
        config.out,
        seeds=[common.noise_seed(config.seed, index) for index in range(len(prompts))],
        batch_size=config.batch_rows,
        passes=config.passes,
        steps=config.window,
        every=config.every,
        tokens=config.tokens,
        dtype=getattr(torch, config.dtype),
        queue_bytes=config.queue_bytes,
        shard_bytes=config.shard_bytes,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
    )
