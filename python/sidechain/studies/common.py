# SPDX-License-Identifier: Apache-2.0
"""What all studies share: model and judges, seeded noise, readings, run folders."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._version import __version__
from ..data.music.attributes import ATTRIBUTES
from ..taps import share

Array = NDArray[np.float64]
Item = TypeVar("Item")

#: Prompt pairs of localization, vectors and steering tests come from different seeds.
LOCALIZE_PROMPTS, VECTOR_PROMPTS, TEST_PROMPTS = 11, 23, 37


def load(model: str) -> tuple[Any, dict[str, Any]]:
    """Pipeline and judges of "zoo:music", or of a folder with a saved `MusicPipeline`.

    Raises:
        ValueError: another name.
        FileNotFoundError: no such folder.
    """
    from .. import zoo

    if model != "zoo:music" and not Path(model).is_dir():
        raise ValueError(f"model: expected zoo:music or a folder, got {model!r}")
    pipe = zoo.music() if model == "zoo:music" else zoo.music(folder=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe, zoo.judges()


def noise_seed(seed: int, index: int) -> int:
    """Seed of the start noise of prompt number `index` in repetition `seed`."""
    return 1_000_003 * seed + 7919 * index + 1


def generate(
    pipe: Any, contexts: Tensor, seeds: Sequence[int], *, steps: int, guidance: float
) -> Tensor:
    """Latents [B, 64, 64] of encoded prompts [B, S, C]; row i starts from the noise of seeds[i].

    Noise depends on the row's seed only, so a row is the same clip in any batch. Rows of one text
    share their keys and values, whatever else is attached to the pipeline.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with share(pipe):
        latents: Tensor = pipe(
            prompt_embeds=contexts,
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).audios
    return latents


def readings(judges: Mapping[str, Any], latents: Tensor) -> dict[str, dict[str, Array]]:
    """Probabilities [B, classes] by judge and attribute."""
    return {
        name: {
            attribute: values.double().cpu().numpy()
            for attribute, values in judge.probabilities(latents).items()
        }
        for name, judge in judges.items()
    }


def class_index(attribute: str, name: str) -> int:
    """Index of a class in the probabilities of its attribute."""
    return ATTRIBUTES[attribute].index(name)


def site_patterns(text: str) -> list[str]:
    """The patterns in a comma list, "cross:2,cross:5" or "cross:*", as `sites` takes them."""
    return [part.strip() for part in text.split(",")]


def log_odds(probability: Array, floor: float = 1e-4) -> Array:
    """ln(p / (1 - p)), with p kept away from 0 and 1 by `floor`."""
    inside = np.clip(probability, floor, 1.0 - floor)
    odds: Array = np.log(inside / (1.0 - inside))
    return odds


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, whole or not at all."""
    write_text(path, table.to_csv(index=False, float_format="%.6f"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; what is undefined (NaN) becomes null."""
    text = json.dumps(_nan_to_none(content), indent=1, default=str, allow_nan=False)
    write_text(path, text + "\n")


def _nan_to_none(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _nan_to_none(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_nan_to_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def digest(path: Path) -> str:
    """SHA-256 of a file, for configs: its path alone does not say what is in it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def facts() -> dict[str, str]:
    """Versions that a manifest should name."""
    import diffusers

    return {
        "sidechain": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


class RunFolder:
    """A folder that remembers its config and the finished parts of a run."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Open `path`, or start it; a folder in which nothing was finished yet starts anew.

        Raises:
            ValueError: it holds a run with another config.
            PermissionError: it cannot be written.
        """
        self.path = path
        text = json.dumps(config, sort_keys=True, default=str)
        config_hash = hashlib.sha256(text.encode()).hexdigest()[:16]
        manifest = path / "manifest.json"
        if manifest.is_file() and not self._unused():
            known = json.loads(manifest.read_text())
            if known.get("config_hash") != config_hash:
                raise ValueError(
                    f"--out: expected a new folder or the same settings as in {manifest}, "
                    "got other settings"
                )
        else:
            write_json(
                manifest,
                {"config_hash": config_hash, "config": json.loads(text), "versions": facts()},
            )
        (path / "parts").mkdir(exist_ok=True)

    def _unused(self) -> bool:
        others = {entry.name for entry in self.path.iterdir()} - {"manifest.json", "parts"}
        return not others and not any(self.path.glob("parts/*.csv"))

    def part(self, name: str) -> pd.DataFrame | None:
        """A finished part, or None."""
        file = self.path / "parts" / f"{name}.csv"
        return pd.read_csv(file, keep_default_na=False) if file.is_file() else None

    def save_part(self, name: str, rows: pd.DataFrame) -> pd.DataFrame:
        """Save a part; reading it back gives the same numbers as a continued run would see."""
        write_table(self.path / "parts" / f"{name}.csv", rows)
        saved = self.part(name)
        assert saved is not None
        return saved
