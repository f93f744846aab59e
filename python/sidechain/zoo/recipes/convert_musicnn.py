# SPDX-License-Identifier: Apache-2.0
"""Convert the musicnn checkpoint of PyPI's wheel into the folder that the package ships.

`pip install --no-deps musicnn==0.1.0`, then `python -m sidechain.zoo.recipes.convert_musicnn`.
Neither TensorFlow nor the wheel's code is imported.
"""

from __future__ import annotations

import argparse
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...io.atomic import write_text
from ..checksums import WEIGHTS, write_checksums
from ..music.musicnn import MusicTagger
from .tensor_bundle import read_bundle

EPSILON = 1e-3  # of TensorFlow's batch normalisation

#: Modules in the order in which the original graph made its variables.
CONVOLUTIONS = [f"front.{i}.conv" for i in range(5)] + [f"middle.{i}.conv" for i in range(3)]
NORMS = [
    "entry",
    *(f"front.{i}.norm" for i in range(5)),
    *(f"middle.{i}.norm" for i in range(3)),
    "pool_norm",
    "dense_norm",
]
DENSE = ["dense", "head"]


def find_checkpoint() -> str:
    """Find the prefix of the MTT_musicnn checkpoint in the installed wheel.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    try:
        folder = metadata.distribution("musicnn").locate_file("musicnn/MTT_musicnn")
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            "convert_musicnn: expected the package musicnn, got none; "
            "pip install --no-deps musicnn==0.1.0"
        ) from error
    return f"{folder}/"  # its files have no stem: .index, .data-00000-of-00001


def convert(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """State of a `MusicTagger`, float64, from the variables of the checkpoint.

    Convolution kernels [height, width, in, out] become [out, in, height, width]; those of the
    middle span all channels and become [out, channels, frames]. Normalisations become scale and
    shift.
    """
    state: dict[str, Tensor] = {}

    def put(name: str, value: np.ndarray) -> None:
        state[name] = torch.from_numpy(np.ascontiguousarray(value, np.float64))

    for index, name in enumerate(CONVOLUTIONS):
        source = _numbered("conv2d", index)
        kernel = variables[f"{source}/kernel"]
        axes = (3, 2, 0, 1) if name.startswith("front") else (3, 1, 0, 2)
        weight = kernel.transpose(axes)
        put(f"{name}.weight", weight if name.startswith("front") else weight[..., 0])
        put(f"{name}.bias", variables[f"{source}/bias"])
    for index, name in enumerate(NORMS):
        source = _numbered("batch_normalization", index)
        gamma, beta, mean, variance = (
            variables[f"{source}/{part}"].astype(np.float64)
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        put(f"{name}.scale", scale)
        put(f"{name}.shift", beta - mean * scale)
    for index, name in enumerate(DENSE):
        source = _numbered("dense", index)
        put(f"{name}.weight", variables[f"{source}/kernel"].T)
        put(f"{name}.bias", variables[f"{source}/bias"])
    return state


def _numbered(stem: str, index: int) -> str:
    return f"{stem}_{index}" if index else stem


def build(prefix: Path | str) -> MusicTagger:
    """Float32 tagger with the weights of the checkpoint `prefix`."""
    tagger = MusicTagger()
    tagger.load_state_dict(convert(read_bundle(prefix)))
    return tagger.eval()


def export(target: Path) -> None:
    """Write config, float16 safetensors, licence and checksums to `target`."""
    tagger = build(find_checkpoint())
    shutil.rmtree(target, ignore_errors=True)
    tagger.half().save_pretrained(target, safe_serialization=True)
    licence = metadata.distribution("musicnn").read_text("LICENSE.md")
    if not licence:
        raise FileNotFoundError("convert_musicnn: expected LICENSE.md in the wheel, got none")
    write_text(target / "LICENSE", licence.strip() + "\n")
    write_checksums(target)


def main() -> None:
    """Command line: `--target` is the folder to write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=WEIGHTS / "musicnn")
    export(parser.parse_args().target)


if __name__ == "__main__":
    main()
