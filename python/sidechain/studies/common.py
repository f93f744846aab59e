# SPDX-License-Identifier: Apache-2.0
"""Functions of all studies: scorers, digests of inputs, seeded noise, clips, site patterns."""

from __future__ import annotations

import io
import re
import zlib
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
from ..scorers import Samples
from ..taps import cache_context
from ..zoo.checksums import CHECKSUMS, WEIGHTS
from .config import MODEL

Array = NDArray[np.float64]
Item = TypeVar("Item")

#: Prompt pairs of localization, vectors and steering tests come from different seeds.
LOCALIZE_PROMPTS, VECTOR_PROMPTS, TEST_PROMPTS = 11, 23, 37


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
    from ..scorers import scorers_digest
    from .files import files_of

    model = getattr(config, "model", MODEL)
    revision = getattr(config, "revision", None)
    found = {
        "model": digest(WEIGHTS / "music" / CHECKSUMS)
        if model == MODEL
        else digest(files_of(model, revision))
    }
    for name in ("vector", "dictionaries"):
        path = getattr(config, name, None)
        if path is not None:
            found[name] = digest(path)
    if getattr(config, "scorer", ()):
        found["scorer"] = scorers_digest(config.scorer)
    if getattr(config, "distance", "scorer") != "scorer":
        found["distance"] = scorers_digest([config.distance])
    return found


def load_scorers(config: Any, subject: Any) -> dict[str, Any]:
    """Load the scorers of a study: those of the settings, or of the zoo for its own model.

    Raises:
        InputError: none given for another model, or one that cannot be loaded.
    """
    from ..scorers import load_scorers

    if not config.scorer and not subject.zoo:
        raise InputError(
            f"--scorer: expected clap:FOLDER|ID, clip:FOLDER|ID or module:function for "
            f"{config.model} [the zoo's classifiers read its own music model alone], got none"
        )
    if "zoo" in config.scorer and not subject.zoo:
        raise InputError(
            f"--scorer: expected no zoo for {config.model} [its classifiers read the latents of "
            "zoo:music alone], got it"
        )
    return load_scorers(config.scorer or ("zoo",), subject.device)


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


def today(rows: pd.DataFrame) -> pd.DataFrame:
    """Give the columns of an older version the names of today."""
    return rows.rename(columns={"judge": "scorer"})


def finished(folder: RunFolder, name: str) -> pd.DataFrame | None:
    """Return a finished part of a run, of any version, or None."""
    part = folder.part(name)
    return None if part is None else today(part)


def write_clips(out: Path, samples: Samples, rows: Mapping[str, int]) -> None:
    """Write samples as sounds, by path within the run folder; `rows` tells which one it is.

    Raises:
        InputError: the samples are images.
    """
    if not rows:
        return
    import soundfile

    waves = samples.rows(list(rows.values())).waves("--audio")
    for name, wave in zip(rows, waves, strict=True):
        clip = io.BytesIO()
        soundfile.write(clip, wave.cpu().numpy().T, samples.rate, format="FLAC")
        write_atomic(out / name, clip.getvalue(), parents=True)


def slug(name: str) -> str:
    """Return a name as a part of a file name; different names stay different."""
    plain = re.sub(r"[^\w.-]+", "-", name)
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"


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
