# SPDX-License-Identifier: Apache-2.0
"""Record the outputs of sites into a store: `sidechain capture`."""

from __future__ import annotations

import torch

from ...store import ActivationStore, record
from ...zoo.music.captions import fresh_captions
from .. import common
from .config import CaptureConfig


def run(config: CaptureConfig) -> dict[str, ActivationStore]:
    """Record into `config.out`, or continue the recording there."""
    pipe, _ = common.load(config.model, config.device, config.model_dtype)
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
