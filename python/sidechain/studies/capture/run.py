# SPDX-License-Identifier: Apache-2.0
"""Record the outputs of sites into a store: `sidechain capture`."""

from __future__ import annotations

import torch

from ...store import ActivationStore, Sampling, Storage, record
from ...taps import Where
from ...zoo.music.captions import fresh_captions
from .. import common
from .config import CaptureConfig


def run(config: CaptureConfig) -> dict[str, ActivationStore]:
    """Record into `config.out`, or continue the recording there."""
    pipe, _ = common.load(config.model, config.device, config.model_dtype)
    count = config.prompts
    prompts = fresh_captions(count) if isinstance(count, int) else count
    seeds = [common.noise_seed(config.seed, index) for index in range(len(prompts))]
    dtype = getattr(torch, config.dtype)
    where = Where(common.site_patterns(config.sites), config.branches, config.window, config.tokens)
    return record(
        pipe,
        where,
        prompts,
        config.out,
        every=config.every,
        sampling=Sampling(seeds, config.batch_rows),
        storage=Storage(dtype, config.shard_bytes, config.queue_bytes),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
    )
