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

from ..architectures.registry import ARCHITECTURES, implementation
from ..config import SaeConfig
from ..model import Sae
from .parts import (
    assemble,
    check_held,
    encoder_biases,
    leftover,
    read_json,
    read_safetensors,
    take,
    with_unit_rows,
    write_json,
    write_safetensors,
)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: Version whose configuration is written: later ones read it unchanged.
_VERSION = "6.0.0"
_TRANSCODER = "transcoder"
_STANDARD, _TOPK = "standard", "topk"


def read(folder: Path) -> Sae:
    """Read a folder of SAELens; see `formats.load`."""
    config = _modern(read_json(folder / CONFIG))
    name = config.get("architecture", _STANDARD)
    known = _readable()
    if name not in known:
        raise NotImplementedError(
            f"formats: expected a SAELens architecture of {', '.join(known)}, got {name!r}"
        )
    _refuse(config, folder)
    architecture = known[name]
    kind, layout = ARCHITECTURES[architecture], implementation(architecture).saelens
    path = folder / WEIGHTS
    tensors = read_safetensors(path)
    w_enc = take(tensors, "W_enc", where=path).T
    transcoder = name.endswith(_TRANSCODER)
    found = {
        "w_enc": w_enc,
        "w_dec": take(tensors, "W_dec", where=path),
        "b_dec": take(tensors, "b_dec", where=path),
    }
    for own in ("b_enc", *kind.tensors):
        found[own] = take(tensors, layout.tensors.get(own, own), where=path)
    if kind.threshold == "feature":
        # A threshold below zero does not open a feature: the ReLU before it does not let it.
        found["threshold"] = found["threshold"].clamp(min=0)
    leftover(tensors, path)
    subtracts = bool(config.get("apply_b_dec_to_input", True)) and not transcoder
    if not subtracts:
        found["b_pre"] = torch.zeros(w_enc.shape[1])
    shape = SaeConfig(
        d_in=w_enc.shape[1],
        features=w_enc.shape[0],
        architecture=architecture,
        k=_active(config) if kind.takes("k") else None,
        d_out=found["w_dec"].shape[1] if transcoder else None,
        transcoder=transcoder,
        tied_bias=subtracts,
    )
    sae = assemble(shape, found, "saelens", extra={"config": config})
    if config.get("rescale_acts_by_decoder_norm"):
        with_unit_rows(sae)  # activations are z |w_dec|, and so is the threshold over the batch
    return sae


def _readable() -> dict[str, str]:
    """Return SAELens's name -> ours, of all that can be read; transcoders last."""
    layouts = {name: implementation(name).saelens for name in ARCHITECTURES}
    plain = {layout.read: name for name, layout in layouts.items() if layout.read}
    # What is written under another architecture's name is read as that one.
    coders = {
        layout.transcoder: name
        for name, layout in layouts.items()
        if layout.transcoder and layout.read == layout.written
    }
    return plain | coders


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of versions before 6 under their present names."""
    found = dict(config)
    activation = found.get("activation_fn", found.get("activation_fn_str"))
    if activation == _TOPK and found.get("architecture", _STANDARD) == _STANDARD:
        found["architecture"] = _TOPK
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
    check_held(sae, "saelens")
    config, kind = sae.config, sae.config.kind
    layout = implementation(config.architecture).saelens
    if config.transcoder and not layout.transcoder:
        raise NotImplementedError(
            "formats: expected a relu or jumprelu transcoder [those of SAELens], got "
            f"{layout.written!r}"
        )
    subtracts = not config.transcoder
    tensors: dict[str, Tensor] = {"W_enc": sae.w_enc.T, "W_dec": sae.w_dec, "b_dec": sae.b_dec}
    own = encoder_biases(sae, sae.b_dec if subtracts else None)
    if kind.threshold:  # of every feature, also where one number holds for all
        tensors["threshold"] = sae.trained_threshold()
        del own["threshold"]
    tensors |= {layout.tensors.get(name, name): tensor for name, tensor in own.items()}
    settings: dict[str, Any] = {}
    if kind.takes("k") and not kind.threshold:
        settings = {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if config.transcoder:
        settings["d_out"] = config.width_out
    write_safetensors(folder / WEIGHTS, tensors)
    write_json(
        folder / CONFIG,
        {
            "architecture": layout.transcoder if config.transcoder else layout.written,
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
