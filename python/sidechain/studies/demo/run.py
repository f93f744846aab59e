# SPDX-License-Identifier: Apache-2.0
"""The demo: localize, make vectors, sweep strengths; `page` shows the results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ...io.run_folder import RunFolder, facts
from ...vectors import SteeringVector
from ...zoo.music.concepts import concept
from .. import common
from .. import localization as loc
from .. import steering as st
from ..config import MODEL
from ..steering.run import Row, generate_rows, test_prompts
from ..vectors.config import VectorConfig
from ..vectors.run import build
from .config import SHORT, DemoConfig

Result = TypeVar("Result")


@dataclass(frozen=True)
class SweepClips:
    """Clips of one prompt over the strengths of one arm, to see and hear."""

    concept: str
    prompt: str
    seed: int
    strengths: tuple[float, ...]
    mels: torch.Tensor  # [strengths, 256, 64]
    audio: Any  # [strengths, 81920] float32
    probabilities: list[dict[str, float]]  # judge -> P(concept), by strength
    kept: list[dict[str, float]]  # class that should stay -> mean P, by strength


@dataclass(frozen=True)
class DemoResult:
    """Everything the report shows."""

    config: DemoConfig
    localization: loc.Localization
    steering: dict[str, st.Steering]
    clips: list[SweepClips]
    seconds: dict[str, float]
    model: dict[str, Any]


def settings(
    *, seed: int = 0, short: bool = False, device: str = "cpu", dtype: str = "float32"
) -> DemoConfig:
    """Return the sizes of `sidechain demo`."""
    sizes = SHORT if short else DemoConfig()
    return replace(sizes, seed=seed, device=device, dtype=dtype)


def run(out: Path, config: DemoConfig) -> DemoResult:
    """Run every study of the demo; a cut-off run continues.

    Tables go to `out/localization` and `out/steering-*`, vectors to `out/vectors`.

    Raises:
        ValueError: `out` holds a demo with other settings.
    """
    seconds: dict[str, float] = {}

    def timed(label: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = work()
        seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - started
        return result

    RunFolder(out, "demo", config, common.inputs(config))
    shared: dict[str, Any] = {
        "steps": config.steps,
        "guidance": config.guidance,
        "batch_rows": config.batch_rows,
        "device": config.device,
        "dtype": config.dtype,
    }
    localization = timed(
        "localization",
        lambda: loc.run(
            loc.LocalizationConfig(
                out=out / "localization",
                concepts=config.concepts,
                pairs=config.pairs,
                seeds=(config.seed,),
                **shared,
            )
        ),
    )
    pipe, judges = common.load(MODEL, config.device, config.dtype)
    steering: dict[str, st.Steering] = {}
    clips: list[SweepClips] = []
    for name in config.steered:
        path = out / "vectors" / f"{name}.safetensors"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            setup = VectorConfig(
                concept=name, pairs=config.vector_pairs, seed=config.seed, **shared
            )
            timed("vectors", lambda setup=setup, path=path: build(pipe, setup).save(path))  # type: ignore[misc]
        sites = localization.localized.get(name, localization.order[:1])
        sweep = st.SteeringConfig(
            out=out / f"steering-{name}",
            concept=name,
            vector=path,
            strengths=config.strengths,
            sites=",".join(sites),
            prompts=config.prompts,
            seed=config.seed,
            **shared,
        )
        steering[name] = timed("sweeps", lambda sweep=sweep: st.run(sweep))  # type: ignore[misc]
        clips.append(
            timed("audio", lambda sweep=sweep, sites=sites: _clips(sweep, pipe, judges, sites))  # type: ignore[misc]
        )
    return DemoResult(config, localization, steering, clips, seconds, _model_facts(pipe))


def _clips(
    config: st.SteeringConfig, pipe: Any, judges: dict[str, Any], localized: list[str]
) -> SweepClips:
    """Generate the first test prompt at every strength of the localized arm, with audio."""
    assert config.vector is not None and config.concept is not None
    wanted = concept(config.concept)
    vector = SteeringVector.load(config.vector, pipe)
    prompts = test_prompts(config, wanted)[:1]
    rows = [Row(0, "localized" if s else "none", s) for s in config.strengths]
    latents = generate_rows(config, pipe, vector, localized, prompts, rows)
    mels = pipe.codec.decode(latents)
    found = common.readings(judges, latents)
    attribute = st.kept_attribute(wanted)
    means = np.mean([f[attribute] for f in found.values()], axis=0)  # [strengths, classes]
    first = int(means[config.strengths.index(0.0)].argmax())
    label = judges["latent"].attributes[attribute][first]
    label = label if attribute == "instrument" else f"drums: {label}"
    return SweepClips(
        concept=wanted.name,
        prompt=prompts[0],
        seed=common.noise_seed(config.seed, 0),
        strengths=config.strengths,
        mels=mels,
        audio=pipe.codec.audio(mels),
        probabilities=[
            {judge: float(f[wanted.attribute][i, wanted.class_index]) for judge, f in found.items()}
            for i in range(len(rows))
        ],
        kept=[{label: float(means[i, first])} for i in range(len(rows))],
    )


def _model_facts(pipe: Any) -> dict[str, Any]:
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    text = sum(p.numel() for p in pipe.text_encoder.parameters())
    return {
        "pipeline": type(pipe).__name__,
        "denoiser": f"{type(pipe.transformer).__name__}, {parameters / 1e6:.2f} M parameters",
        "text encoder": f"{type(pipe.text_encoder).__name__}, {text / 1e6:.2f} M parameters",
        "scheduler": type(pipe.scheduler).__name__,
        **facts(),
    }
