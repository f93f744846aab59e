# SPDX-License-Identifier: Apache-2.0
"""Call any tiny pipeline in one way and get a tensor back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .build import FAMILIES
from .family import Family

# Of equal length: some pipelines let the padding of shorter prompts through to the result.
PROMPTS = (
    "a slow piano song",
    "fast rock with drums",
    "a sad violin song",
    "happy techno bass music",
)
_OUTPUTS = ("audios", "images", "frames")


def tiny_call(
    pipe: Any,
    prompts: Sequence[str] | str | None = None,
    *,
    steps: int = 3,
    seeds: Sequence[int] = (0,),
    **changes: Any,
) -> dict[str, Any]:
    """Make the arguments with which a tiny pipeline is called.

    Args:
        pipe: pipeline of `tiny_pipeline`, or one that was saved and loaded again.
        prompts: one for each sample, or one for each `num_*_per_prompt` of them. A family that
            reads class labels maps each text to a label; one without conditions ignores them.
            None = `PROMPTS` in turn.
        steps: num_inference_steps.
        seeds: one for each sample, each of a generator of its own.
        **changes: further arguments of the pipeline, in place of the family's own.

    Returns:
        Keyword arguments of `pipe`.

    Raises:
        ValueError: a pipeline of no known family, or a number of prompts that does not fit.
    """
    family = _family(pipe)
    copies = changes.get(family.per_prompt, 1) if family.per_prompt else 1
    if prompts is None:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(seeds) // copies)]
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(texts) * copies != len(seeds):
        raise ValueError(
            f"tiny_call: expected {len(texts)} prompts x {copies} = {len(texts) * copies} seeds, "
            f"got {len(seeds)}"
        )
    return {
        **family.arguments(pipe, texts),
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        **changes,
    }


def call_tiny(
    pipe: Any,
    prompts: Sequence[str] | str | None = None,
    *,
    steps: int = 3,
    seeds: Sequence[int] = (0,),
    **changes: Any,
) -> Tensor:
    """Run a tiny pipeline; the arguments are those of `tiny_call`.

    Returns:
        Latents [samples, ...]; the decoded samples where the pipeline never returns latents.
    """
    return latents_of(pipe(**tiny_call(pipe, prompts, steps=steps, seeds=seeds, **changes)))


def latents_of(result: Any) -> Tensor:
    """Find the tensor in what a pipeline returned: audios, images, frames, or the first of a tuple.

    Raises:
        TypeError: none of these.
    """
    if isinstance(result, tuple) and result:
        result = result[0]
    for name in _OUTPUTS:
        result = getattr(result, name, result)
    try:
        return torch.as_tensor(result)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"latents_of: expected a pipeline's output with {', '.join(_OUTPUTS)}, "
            f"got {type(result).__name__}"
        ) from None


def generate(
    pipe: Any, prompts: list[str], *, steps: int = 4, seeds: list[int] | None = None, **call: Any
) -> Tensor:
    """Run an audio pipeline with one generator for each sample.

    Args:
        pipe: audio pipeline.
        prompts: one for each sample.
        steps: num_inference_steps.
        seeds: one for each sample. None = 0, 1, ...
        **call: further arguments of the pipeline.

    Returns:
        Latents.
    """
    samples = len(prompts) * call.get("num_waveforms_per_prompt", 1)
    seeds = list(range(samples)) if seeds is None else seeds
    call.setdefault("generator", [torch.Generator().manual_seed(s) for s in seeds])
    latents: Tensor = pipe(prompts, num_inference_steps=steps, output_type="latent", **call).audios
    return latents


def _family(pipe: Any) -> Family:
    kind = type(pipe).__name__
    for family in FAMILIES.values():
        if kind in family.pipelines:
            return family
    known = sorted({name for family in FAMILIES.values() for name in family.pipelines})
    raise ValueError(f"tiny_call: expected one of {', '.join(known)}, got {kind}")
