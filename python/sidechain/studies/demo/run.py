# SPDX-License-Identifier: Apache-2.0
"""The demo: localize, make vectors, sweep strengths; `page` shows the results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ...io.run_folder import RunFolder, facts
from ...vectors import SteeringVector
from ...zoo.music.concepts import concept
from .. import common, models
from .. import localization as loc
from .. import steering as st
from ..models import Subject
from ..steering.analyse import clip_name
from ..steering.run import Row, generate_rows, test_prompts, write_audio
from ..vectors.config import VectorConfig
from ..vectors.run import build
from .config import SHORT, DemoConfig

Result = TypeVar("Result")


@dataclass(frozen=True)
class DemoResult:
    """Everything the page shows, besides the clips in the folders of the sweeps."""

    out: Path
    config: DemoConfig
    localization: loc.Localization
    steering: dict[str, st.Steering]
    seconds: dict[str, float]
    model: dict[str, Any]


def folder_of(out: Path, concept: str) -> Path:
    """Folder of the sweep of a concept."""
    return out / f"steering-{concept}"


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

    _held = RunFolder(out, "demo", config, common.inputs(config))
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
    subject = models.load(loc.LocalizationConfig(device=config.device, dtype=config.dtype))
    steering: dict[str, st.Steering] = {}
    for name in config.steered:
        path = out / "vectors" / f"{name}.safetensors"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            setup = VectorConfig(
                concept=name, pairs=config.vector_pairs, seed=config.seed, **shared
            )
            timed("vectors", lambda setup=setup, path=path: build(subject, setup).save(path))  # type: ignore[misc]
        sites = localization.localized.get(name, localization.order[:1])
        sweep = st.SteeringConfig(
            out=folder_of(out, name),
            concept=name,
            vector=path,
            strengths=config.strengths,
            sites=",".join(sites),
            prompts=config.prompts,
            seed=config.seed,
            **shared,
        )
        steering[name] = timed("sweeps", lambda sweep=sweep: st.run(sweep))  # type: ignore[misc]
        timed("audio", lambda sweep=sweep, sites=sites: _clips(sweep, subject, sites))  # type: ignore[misc]
    return DemoResult(out, config, localization, steering, seconds, _model_facts(subject.pipe))


def _clips(config: st.SteeringConfig, subject: Subject, localized: list[str]) -> None:
    """Write the first test prompt at every strength of the localized arm, to hear."""
    assert config.vector is not None and config.concept is not None
    rows = [Row(0, "localized" if s else "none", s) for s in config.strengths]
    paths = [config.out / clip_name(row.prompt, row.arm, row.strength) for row in rows]
    if all(path.is_file() for path in paths):
        return
    vector = SteeringVector.load(config.vector, subject.pipe)
    prompts = test_prompts(config, concept(config.concept), subject)[:1]
    samples = generate_rows(config, subject, vector, localized, prompts, rows)
    write_audio(config.out, samples, rows)


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
