# SPDX-License-Identifier: Apache-2.0
"""Pipeline calls for the activations only: seeded, without decoder or progress bar."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sampling:
    """How prompts are run for their activations.

    Attributes:
        seeds: prompt i starts from the noise of seeds[i % len(seeds)]; a number s stands for
            s, s + 1, ...
        batch_size: prompts in one pipeline call.
    """

    seeds: int | Sequence[int] = 0
    batch_size: int = 8


def quiet_settings(name: str, pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of a pipeline call and switch the decoder off.

    Args:
        name: caller, for messages.
        pipe: diffusers pipeline.
        call: arguments given by the user.

    Raises:
        ValueError: an argument that `generate` sets itself.
        TypeError: an argument that the pipeline does not know.
    """
    taken = {"prompt", "generator", "latents", "num_waveforms_per_prompt"} & call.keys()
    if taken:
        raise ValueError(f"{name}: expected no {', '.join(sorted(taken))} [set by {name}], got it")
    known = inspect.signature(type(pipe).__call__).parameters
    other = [key for key in call if key not in known]
    if other and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise TypeError(
            f"{name}: expected its own arguments or those of a {type(pipe).__name__} call, got "
            f"{', '.join(other)}"
        )
    if "output_type" in known:
        return {"output_type": "latent", **call}
    return dict(call)


def spread_seeds(name: str, seeds: int | Sequence[int], count: int) -> list[int]:
    """Return seeds of `count` generations: s, s + 1, ... for a number s, else the list repeated.

    Raises:
        ValueError: an empty list.
    """
    if isinstance(seeds, int):
        return list(range(seeds, seeds + count))
    if not len(seeds):
        raise ValueError(f"{name}: expected at least one seed, got none")
    return [int(seeds[i % len(seeds)]) for i in range(count)]


def generate(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]
) -> Any:
    """Run a pipeline and return its result; row i starts from the noise of seeds[i]."""
    negative = settings.get("negative_prompt")
    if isinstance(negative, str):
        settings = {**settings, "negative_prompt": [negative] * len(prompts)}
    # Generators on the CPU give the same noise on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _no_bar(pipe):
        return pipe(list(prompts), generator=generators, **settings)


def model_name(pipe: Any) -> str:
    """Return the class of a pipeline and where it was loaded from."""
    path = getattr(pipe, "name_or_path", None) or getattr(pipe, "_name_or_path", None)
    return f"{type(pipe).__name__}:{path}" if path else type(pipe).__name__


@contextlib.contextmanager
def _no_bar(pipe: Any) -> Iterator[None]:
    config = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if config is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = config
