# SPDX-License-Identifier: Apache-2.0
"""Folders of SAELens (sae-lens 6).

`sae_weights.safetensors` holds W_enc [d, F] (the transpose of ours), W_dec [F, d], b_dec and, by
architecture, b_enc and threshold, or b_gate, b_mag and r_mag. The input has b_dec taken off where
`apply_b_dec_to_input` is set. Batch and Matryoshka dictionaries are kept as jumprelu with one
threshold for all features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import SaeConfig
from ..model import Sae
from .parts import (
    assemble,
    input_bias,
    leftover,
    read_json,
    read_safetensors,
    shift,
    take,
    with_unit_rows,
    write_json,
    write_safetensors,
)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: Version whose configuration is written: later ones read it unchanged.
_VERSION = "6.0.0"
_ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}


def read(folder: Path) -> Sae:
    """Read a folder of SAELens; see `formats.load`."""
    config = _modern(read_json(folder / CONFIG))
    name = config.get("architecture", "standard")
    if name not in _ARCHITECTURES:
        raise NotImplementedError(
            f"formats: expected a SAELens architecture of {', '.join(_ARCHITECTURES)}, got {name!r}"
        )
    _refuse(config, folder)
    path = folder / WEIGHTS
    tensors = read_safetensors(path)
    w_enc = take(tensors, "W_enc", where=path).T
    transcoder = name.endswith("transcoder")
    found = {
        "w_enc": w_enc,
        "w_dec": take(tensors, "W_dec", where=path),
        "b_dec": take(tensors, "b_dec", where=path),
    }
    if name == "gated":
        found["b_gate"] = take(tensors, "b_gate", where=path)
        found["b_enc"] = take(tensors, "b_mag", where=path)
        found["r_mag"] = take(tensors, "r_mag", where=path)
    else:
        found["b_enc"] = take(tensors, "b_enc", where=path)
    if _ARCHITECTURES[name] == "jumprelu":
        # A threshold below zero does not open a feature: the ReLU before it does not let it.
        found["threshold"] = take(tensors, "threshold", where=path).clamp(min=0)
    elif name == "batchtopk":
        found["threshold"] = take(tensors, "topk_threshold", where=path)
    leftover(tensors, path)
    subtracts = bool(config.get("apply_b_dec_to_input", True)) and not transcoder
    if not subtracts:
        found["b_pre"] = torch.zeros(w_enc.shape[1])
    shape = SaeConfig(
        d_in=w_enc.shape[1],
        features=w_enc.shape[0],
        architecture=_ARCHITECTURES[name],
        k=_active(config) if name in ("topk", "batchtopk") else None,
        d_out=found["w_dec"].shape[1] if transcoder else None,
        transcoder=transcoder,
        tied_bias=subtracts,
    )
    sae = assemble(shape, found, "saelens", extra={"config": config})
    if config.get("rescale_acts_by_decoder_norm"):
        with_unit_rows(sae)  # activations are z |w_dec|, and so is the threshold over the batch
    return sae


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of versions before 6, under their present names."""
    found = dict(config)
    activation = found.get("activation_fn", found.get("activation_fn_str"))
    if activation == "topk" and found.get("architecture", "standard") == "standard":
        found["architecture"] = "topk"
        found["k"] = (found.get("activation_fn_kwargs") or {}).get("k")
    normalised = found.get("normalize_activations") or "none"
    if normalised is True:
        normalised = "expected_average_only_in"
    found["normalize_activations"] = normalised
    return found


def _refuse(config: dict[str, Any], folder: Path) -> None:
    reasons = {
        "expected_average_only_in": "its scale is not in the folder: fold it first, "
        "sae.fold_activation_norm_scaling_factor(...)",
        "layer_norm": "a normalisation of every token by itself",
        "constant_norm_rescale": "a normalisation of every token by itself",
        "covariance_whitening": "its matrix is not in the folder: fold it first, "
        "sae.fold_activation_whitening(...)",
    }
    normalised = config["normalize_activations"]
    if normalised != "none":
        raise NotImplementedError(
            f"formats: expected normalize_activations='none' in {folder / CONFIG}, got "
            f"{normalised!r} [{reasons.get(normalised, 'unknown')}]"
        )
    if config.get("finetuning_scaling_factor"):
        raise NotImplementedError(
            f"formats: expected no finetuning_scaling_factor in {folder / CONFIG}, got one"
        )


def _active(config: dict[str, Any]) -> int:
    k = config.get("k")
    if k is None or k != int(k):
        raise NotImplementedError(f"formats: expected a whole k in a SAELens config, got {k!r}")
    return int(k)


def write(sae: Sae, folder: Path) -> None:
    """Write a folder that `sae_lens.SAE.load_from_disk` opens."""
    config = sae.config
    subtracts = not config.transcoder
    subtracted = sae.b_dec if subtracts else None
    tensors: dict[str, Tensor] = {"W_enc": sae.w_enc.T, "W_dec": sae.w_dec, "b_dec": sae.b_dec}
    settings: dict[str, Any] = {}
    bias = input_bias(sae, subtracted)
    if config.architecture == "gated":
        assert sae.b_gate is not None and sae.r_mag is not None
        name = "gated"
        tensors["b_gate"] = (sae.b_gate.double() + shift(sae, subtracted)).float()
        tensors |= {"b_mag": bias, "r_mag": sae.r_mag}
    else:
        tensors["b_enc"] = bias
        name = {"relu": "standard", "topk": "topk"}.get(config.architecture, "jumprelu")
    if name == "topk":
        settings = {"k": config.k, "rescale_acts_by_decoder_norm": False}
    elif name == "jumprelu":
        threshold = sae.thresholded_encoder()[2]
        tensors["threshold"] = torch.as_tensor(threshold).detach().expand(config.features)
    if config.transcoder:
        name = _transcoder(name)
        settings["d_out"] = config.width_out
    write_safetensors(folder / WEIGHTS, tensors)
    write_json(
        folder / CONFIG,
        {
            "architecture": name,
            "d_in": config.d_in,
            "d_sae": config.features,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": subtracts,
            "normalize_activations": "none",
            "reshape_activations": "none",
            **settings,
            "metadata": {"sae_lens_version": _VERSION, "hook_name": sae.provenance.site or None},
        },
    )


def _transcoder(name: str) -> str:
    known = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
    if name not in known:
        raise NotImplementedError(
            f"formats: expected a relu or jumprelu transcoder [those of SAELens], got {name!r}"
        )
    return known[name]
