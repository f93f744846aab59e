# SPDX-License-Identifier: Apache-2.0
"""Functions of all studies: model and scorers, seeded noise, scores of samples, site patterns."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._errors import InputError
from ..io.atomic import write_atomic
from ..io.run_folder import RunFolder, digest
from ..taps import cache_context
from ..zoo.checksums import CHECKSUMS, WEIGHTS
from ..zoo.music.attributes import ATTRIBUTES
from .config import MODEL

Array = NDArray[np.float64]
Item = TypeVar("Item")

#: Prompt pairs of localization, vectors and steering tests come from different seeds.
LOCALIZE_PROMPTS, VECTOR_PROMPTS, TEST_PROMPTS = 11, 23, 37


def load(model: str, device: str = "cpu", dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
    """Load pipeline and scorers of "zoo:music", or of a folder with a saved `MusicPipeline`.

    Args:
        model: which.
        device: of both.
        dtype: of the pipeline; the scorers stay in float32.

    Raises:
        InputError: another name, or a device that this machine does not have.
        FileNotFoundError: no such folder.
    """
    from .. import zoo

    if model != MODEL and not Path(model).is_dir():
        raise InputError(f"model: expected {MODEL} or a folder, got {model!r}")
    check_device(device)
    folder = None if model == MODEL else model
    pipe = zoo.music(device, getattr(torch, dtype), folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, zoo.scorers(device)


def check_device(name: str) -> None:
    """Check that torch can use a device.

    Raises:
        InputError: it cannot; the message has torch's reason.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--device: expected a device of this machine, got {name!r} ({reason})"
        ) from None


def inputs(config: Any) -> dict[str, str]:
    """Return digests of the inputs of a study by field, since a path does not identify content."""
    model = getattr(config, "model", MODEL)
    found = {"model": digest(WEIGHTS / "music" / CHECKSUMS) if model == MODEL else digest(model)}
    for name in ("vector", "dictionaries"):
        path = getattr(config, name, None)
        if path is not None:
            found[name] = digest(path)
    return found


def noise_seed(seed: int, index: int) -> int:
    """Return the seed of the start noise of prompt number `index` in repetition `seed`."""
    return 1_000_003 * seed + 7919 * index + 1


def generate(
    pipe: Any, contexts: Tensor, seeds: Sequence[int], *, steps: int, guidance: float
) -> Tensor:
    """Generate latents [B, 64, 64] of encoded prompts [B, S, C]; row i has the noise of seeds[i].

    Noise depends on the seed of the row only, so a row is the same clip in any batch. Keys and
    values of a text are computed once, whatever else is attached to the pipeline.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with cache_context(pipe):
        latents: Tensor = pipe(
            prompt_embeds=contexts,
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).audios
    return latents


def readings(scorers: Mapping[str, Any], latents: Tensor) -> dict[str, dict[str, Array]]:
    """Compute probabilities [B, classes] by scorer and attribute."""
    return {
        name: {
            attribute: values.double().cpu().numpy()
            for attribute, values in scorer.probabilities(latents.float()).items()
        }
        for name, scorer in scorers.items()
    }


def today(rows: pd.DataFrame) -> pd.DataFrame:
    """Give the columns of an older version the names of today."""
    return rows.rename(columns={"judge": "scorer"})


def finished(folder: RunFolder, name: str) -> pd.DataFrame | None:
    """Return a finished part of a run, of any version, or None."""
    part = folder.part(name)
    return None if part is None else today(part)


def write_clips(out: Path, pipe: Any, latents: Mapping[str, Tensor]) -> None:
    """Write latents [64, 64] as sounds, by path within the run folder."""
    if not latents:
        return
    import soundfile

    waves = pipe.codec.audio(pipe.codec.decode(torch.stack(list(latents.values()))))
    for name, wave in zip(latents, waves, strict=True):
        clip = io.BytesIO()
        soundfile.write(clip, wave, pipe.codec.config.sample_rate, format="FLAC")
        write_atomic(out / name, clip.getvalue(), parents=True)


def class_index(attribute: str, name: str) -> int:
    """Return the index of a class in the probabilities of its attribute."""
    return ATTRIBUTES[attribute].index(name)


def site_patterns(text: str) -> list[str]:
    """Split a comma list of patterns, "cross:2,cross:5" or "cross:*", as `sites` takes them."""
    return [part.strip() for part in text.split(",")]


def log_odds(probability: Array, floor: float = 1e-4) -> Array:
    """Return ln(p / (1 - p)), with p kept away from 0 and 1 by `floor`."""
    inside = np.clip(probability, floor, 1.0 - floor)
    odds: Array = np.log(inside / (1.0 - inside))
    return odds


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
