# SPDX-License-Identifier: Apache-2.0
"""Folders of sparsify (eai-sparsify 1.3) and of TADA, which grew out of it.

`sae.safetensors` holds encoder.weight [F, d], encoder.bias [F], W_dec [F, d] and b_dec [d]. The
input has b_dec taken off before encoding, unless sparsify's `transcode` is set. TADA trains with
one selection over the batch and reads with one for each token, which is `topk` here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..architectures.registry import ARCHITECTURES, implementation
from ..model import Sae
from .parts import (
    assemble,
    check_held,
    encoder_biases,
    leftover,
    read_safetensors,
    take,
    write_json,
    write_safetensors,
)
from .settings import Settings

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_ACTIVATION = "topk"  # where a config names none
_TADA_KEYS = frozenset({"batch_topk", "sample_topk", "input_unit_norm"})
#: Settings that change the map in a way `Sae` has no word for, with what they would be.
_REFUSED = {
    "skip_connection": "a linear skip from input to output",
    "sample_topk": "a selection over all tokens of a clip",
    "input_unit_norm": "a normalisation of every token by itself",
    "signed": "negative activations",
}


def is_tada(config: Settings) -> bool:
    """Return whether a cfg.json has the settings that only TADA's trainer writes."""
    return any(key in config for key in _TADA_KEYS)


def read(folder: Path) -> Sae:
    """Read a folder of either library; see `formats.load`."""
    config = Settings.read(folder / CONFIG)
    name = "tada" if is_tada(config) else "sparsify"
    for setting, meaning in _REFUSED.items():
        if config.flag(setting):
            raise NotImplementedError(
                f"formats: expected {name} without {setting} [{meaning}], got {setting}=true in "
                f"{folder / CONFIG}"
            )
    words = {implementation(own).sparsify: own for own in ARCHITECTURES}
    activation = config.word("activation") if "activation" in config else _ACTIVATION
    if not activation or activation not in words:
        known = ", ".join(repr(word) for word in words if word)
        raise NotImplementedError(
            f"formats: expected {name} with activation {known}, got {activation or None!r} in "
            f"{folder / CONFIG}"
        )
    transcode, k = config.flag("transcode"), config.needed("k")
    path = folder / WEIGHTS
    tensors = read_safetensors(path)
    weight = take(tensors, "encoder.weight", dims=2, where=path)
    found = {
        "w_enc": weight,
        "b_enc": take(tensors, "encoder.bias", dims=1, where=path),
        "w_dec": take(tensors, "W_dec", dims=2, where=path),
        "b_dec": take(tensors, "b_dec", dims=1, where=path),
    }
    leftover(tensors, path)
    features, width = weight.shape
    config.agrees("d_in", width, "width of encoder.weight")
    config.agrees("num_latents", features, "rows of encoder.weight")
    if transcode:
        found["b_pre"] = torch.zeros(width)
    shape = {
        "d_in": width,
        "features": features,
        "architecture": words[activation],
        "k": k,
        "transcoder": transcode,
    }
    return assemble(shape, found, name, extra={"config": config.to_json()})


def write(sae: Sae, folder: Path) -> None:
    """Write a folder that `sparsify.SparseCoder.load_from_disk` opens."""
    _check(sae, "sparsify")
    transcode = sae.config.transcoder
    activation = implementation(sae.config.architecture).sparsify
    settings = {"activation": activation, "skip_connection": False, "transcode": transcode}
    _write(sae, folder, settings, subtracts=not transcode)


def write_tada(sae: Sae, folder: Path) -> None:
    """Write a folder that TADA's `Sae.load_from_disk` opens."""
    _check(sae, "tada")
    if sae.config.transcoder:
        raise NotImplementedError("formats: expected an autoencoder for tada, got a transcoder")
    settings = {"batch_topk": False, "sample_topk": False, "input_unit_norm": False}
    _write(sae, folder, settings, subtracts=True)


def _check(sae: Sae, name: str) -> None:
    check_held(sae, name)
    config = sae.config
    if config.width_out != config.d_in:
        raise NotImplementedError(
            f"formats: expected d_out == d_in [{name} has one width], got {config.width_out} and "
            f"{config.d_in}"
        )


def _write(sae: Sae, folder: Path, settings: dict[str, Any], *, subtracts: bool) -> None:
    config = sae.config
    write_safetensors(
        folder / WEIGHTS,
        {
            "encoder.weight": sae.w_enc,
            "encoder.bias": encoder_biases(sae, sae.b_dec if subtracts else None)["b_enc"],
            "W_dec": sae.w_dec,
            "b_dec": sae.b_dec,
        },
    )
    write_json(
        folder / CONFIG,
        {
            "expansion_factor": max(1, config.features // config.d_in),
            "normalize_decoder": config.unit_norm,
            "num_latents": config.features,
            "k": config.k,
            "multi_topk": False,
            **settings,
            "d_in": config.d_in,
        },
    )
