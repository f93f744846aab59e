# SPDX-License-Identifier: Apache-2.0
"""What all examples begin with: their options, a pipeline and the arguments of its call."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..studies.files import load_pipeline
from ..testing import tiny_call, tiny_pipeline


def options(text: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read --out, --model and --steps; the folder is made."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument(
        "--model", help="folder or hub id of a pipeline; default: a tiny random one"
    )
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def pipeline(model: str | None, tiny: str, dtype: torch.dtype | None = None) -> Any:
    """Load a pipeline, on the GPU in half precision where there is one, or build a tiny one.

    Args:
        model: folder or hub id; None = a tiny random one.
        tiny: name of that one.
        dtype: of the weights; None = float16 on the GPU, float32 elsewhere.
    """
    if model is None:
        return tiny_pipeline(tiny)
    gpu = torch.cuda.is_available()
    pipe = load_pipeline(model, None, dtype or (torch.float16 if gpu else torch.float32))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if gpu else "cpu")


def settings(given: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """Return the arguments of every call, beside prompts and noise; tiny models have sizes."""
    call = {"num_inference_steps": given.steps}
    if given.model is None:
        call = tiny_call(pipe, steps=given.steps)
        for name in ("prompt", "generator", "output_type"):
            call.pop(name, None)
    return call


def noise(*seeds: int) -> list[torch.Generator]:
    """Return a generator for each sample, on the CPU: the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
