# SPDX-License-Identifier: Apache-2.0
"""Record the outputs of sites into a store: `sidechain capture`."""

from __future__ import annotations

import torch

from ..._errors import InputError
from ...store import ActivationStore, Sampling, Storage, record
from ...taps import Where
from ...zoo.music.captions import fresh_captions
from .. import common, memory, models
from .config import CaptureConfig


def run(config: CaptureConfig) -> dict[str, ActivationStore]:
    """Record into `config.out`, or continue the recording there."""
    subject = models.load(config, config.model_dtype)
    count = config.prompts
    if isinstance(count, int) and not subject.zoo:
        raise InputError(
            f"--prompts: expected a text file for {config.model} [only the zoo's music model has "
            f"captions of its own], got the number {count}"
        )
    prompts = fresh_captions(count) if isinstance(count, int) else count
    seeds = [common.noise_seed(config.seed, index) for index in range(len(prompts))]
    dtype = getattr(torch, config.dtype)
    where = Where(common.site_patterns(config.sites), config.branches, config.window, config.tokens)
    call = subject.call(config.steps, config.guidance)
    call.pop("output_type", None)  # nothing is decoded
    return record(
        subject.pipe,
        where,
        prompts,
        config.out,
        every=config.every,
        sampling=Sampling(seeds, memory.batch_rows(config, subject, prompts[0])),
        storage=Storage(dtype, config.shard_bytes, config.queue_bytes),
        **call,
    )
