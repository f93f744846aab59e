# SPDX-License-Identifier: Apache-2.0
"""Record what sites put out into a store: `sidechain capture`."""

from __future__ import annotations

import torch

from ...store import ActivationStore, Sampling, Selection, Storage, record
from ...zoo.music.captions import fresh_captions
from .. import common
from .config import CaptureConfig


def run(config: CaptureConfig) -> dict[str, ActivationStore]:
    """Record into `config.out`, or continue what was begun there."""
    pipe, _ = common.load(config.model, config.device, config.model_dtype)
    count = config.prompts
    prompts = fresh_captions(count) if isinstance(count, int) else count
    seeds = [common.noise_seed(config.seed, index) for index in range(len(prompts))]
    dtype = getattr(torch, config.dtype)
    return record(
        pipe,
        common.site_patterns(config.sites),
        prompts,
        config.out,
        sampling=Sampling(seeds, config.batch_rows),
        selection=Selection(config.passes, config.window, config.every, config.tokens),
        storage=Storage(dtype, config.shard_bytes, config.queue_bytes),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
    )
