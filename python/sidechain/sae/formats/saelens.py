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

from ..._errors import InputError
from ..architectures.registry import ARCHITECTURES, implementation
from ..model import Sae
from .parts import (
    assemble,
    check_held,
    encoder_biases,
    leftover,
    read_safetensors,
    take,
    with_unit_rows,
    write_json,
    write_safetensors,
)
from .settings import Settings

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: Version whose configuration is written: later ones read it unchanged.
_VERSION = "6.0.0"
_TRANSCODER = "transcoder"
_STANDARD, _TOPK, _RELU, _NONE = "standard", "topk", "relu", "none"
_ACTIVATIONS = ("activation_fn", "activation_fn_str")
_FINETUNED, _NORMALISED = "finetuning_scaling_factor", "normalize_activations"


def read(folder: Path) -> Sae:
    """Read a folder of SAELens; see `formats.load`."""
    config = _modern(Settings.read(folder / CONFIG))
    config.needed("d_in")
    config.needed("d_sae")
    name = config.word("architecture", _STANDARD)
    known = _readable()
    if name not in known:
        raise NotImplementedError(
            f"formats: expected a SAELens architecture of {', '.join(known)}, got {name!r}"
        )
    _refuse(config)
    architecture, transcoder = known[name], name.endswith(_TRANSCODER)
    kind = ARCHITECTURES[architecture]
    k = config.needed("k") if kind.takes("k") else None
    rescaled = config.flag("rescale_acts_by_decoder_norm") and k is not None
    subtracts = config.flag("apply_b_dec_to_input", True) and not transcoder
    found = _weights(folder / WEIGHTS, architecture, config)
    features, width = found["w_enc"].shape
    config.agrees("d_in", width, "rows of W_enc")
    config.agrees("d_sae", features, "columns of W_enc")
    if transcoder:
        config.agrees("d_out", found["w_dec"].shape[1], "columns of W_dec")
    if not subtracts:
        found["b_pre"] = torch.zeros(width)
    shape = {
        "d_in": width,
        "features": features,
        "architecture": architecture,
        "k": k,
        "d_out": found["w_dec"].shape[1] if transcoder else None,
        "transcoder": transcoder,
        "tied_bias": subtracts,
    }
    sae = assemble(shape, found, "saelens", extra={"config": config.to_json()})
    if rescaled:
        with_unit_rows(sae)  # activations are z |w_dec|, and so is the threshold over the batch
    return sae


def _weights(path: Path, architecture: str, config: Settings) -> dict[str, Tensor]:
    """Return the weights of a file under our names, with a factor of the activations folded in."""
    kind, layout = ARCHITECTURES[architecture], implementation(architecture).saelens
    tensors = read_safetensors(path)
    found = {
        "w_enc": take(tensors, "W_enc", dims=2, where=path).T,
        "w_dec": take(tensors, "W_dec", dims=2, where=path),
        "b_dec": take(tensors, "b_dec", dims=1, where=path),
    }
    for own in ("b_enc", *kind.tensors):
        scalar = own == "threshold" and kind.threshold == "batch"
        name = layout.tensors.get(own, own)
        found[own] = take(tensors, name, dims=0 if scalar else 1, where=path)
    if kind.threshold == "feature":
        # A threshold below zero does not open a feature: the ReLU before it does not let it.
        found["threshold"] = found["threshold"].clamp(min=0)
    factor = _factor(tensors, len(found["w_enc"]), config, path)
    leftover(tensors, path)
    if factor is not None:
        found["w_dec"] = factor[:, None] * found["w_dec"]
    return found


def _factor(
    tensors: dict[str, Tensor], features: int, config: Settings, path: Path
) -> Tensor | None:
    """Return what the activations are multiplied by before decoding [F]; None = 1.

    Versions before 6 write `scaling_factor` into every file, ones unless it was trained, which
    `finetuning_scaling_factor` says.
    """
    wanted = config.flag(_FINETUNED)
    names = [name for name in ("scaling_factor", _FINETUNED) if name in tensors]
    if not names:
        return None
    if len(names) > 1:
        raise InputError(f"formats: expected one scaling factor in {path}, got {names}")
    (name,) = names
    found = take(tensors, name, dims=tensors[name].dim(), where=path)
    if found.numel() != features or found.dim() != 1:
        if found.numel() != 1:
            raise InputError(
                f"formats: expected {name} of shape [{features}] in {path}, got {list(found.shape)}"
            )
        found = found.reshape(1).expand(features)
    if torch.allclose(found, torch.ones_like(found)):
        return None
    if not wanted:
        raise InputError(
            f"formats: expected {name} of ones in {path} [{_FINETUNED} is not set in {CONFIG}], "
            "got others"
        )
    if config.flag("rescale_acts_by_decoder_norm"):
        raise NotImplementedError(
            f"formats: expected a scaling factor of activations that are not rescaled by the norm "
            f"of the decoder in {path}, got both"
        )
    return found


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


def _modern(config: Settings) -> Settings:
    """Return the settings of versions before 6 under their present names.

    Raises:
        InputError: no architecture, which versions before 6 alone leave out.
        NotImplementedError: an activation that is neither a ReLU nor topk, or options of it.
    """
    if not config.word("architecture") and ("metadata" in config or "k" in config):
        raise InputError(f"formats: expected architecture in {config.place} [version 6], got none")
    named = [config.word(name, _RELU) for name in _ACTIVATIONS if name in config]
    theirs = config.word("architecture", _STANDARD)
    for activation in named:
        fine = (_RELU, _TOPK) if theirs in (_STANDARD, _TOPK) else (_RELU,)
        if activation not in fine:
            raise NotImplementedError(
                f"formats: expected activation_fn {' or '.join(fine)} of architecture "
                f"{theirs!r} in {config.place}, got {activation!r}"
            )
    if _TOPK in named and len(set(named)) > 1:
        raise InputError(f"formats: expected one activation in {config.place}, got {named}")
    changes: dict[str, Any] = {}
    if _TOPK in named:
        options = config.inner("activation_fn_kwargs")
        other = sorted(set(options) - {"k"})
        if other:
            raise NotImplementedError(
                f"formats: expected activation_fn_kwargs of k in {config.place}, got {other}"
            )
        changes["architecture"] = _TOPK
        if "k" in options or "k" not in config:
            changes["k"] = options.needed("k")
    return config.changed(**changes) if changes else config


def _refuse(config: Settings) -> None:
    """Refuse normalisations and shapes of the input that no weights can hold."""
    reasons = {
        "expected_average_only_in": "its scale is not in the folder: fold it first, "
        "sae.fold_activation_norm_scaling_factor(...)",
        "layer_norm": "a normalisation of every token by itself",
        "constant_norm_rescale": "a normalisation of every token by itself",
        "covariance_whitening": "its matrix is not in the folder: fold it first, "
        "sae.fold_activation_whitening(...)",
    }
    old = {True: "expected_average_only_in", False: _NONE}
    found = config.to_json().get(_NORMALISED)
    normalised = old[found] if isinstance(found, bool) else config.word(_NORMALISED, _NONE)
    if normalised != _NONE:
        raise NotImplementedError(
            f"formats: expected normalize_activations='none' in {config.place}, got "
            f"{normalised!r} [{reasons.get(normalised, 'unknown')}]"
        )
    shaped = config.word("reshape_activations", _NONE)
    if shaped not in (_NONE, "hook_z"):  # hook_z: heads side by side are one row
        raise NotImplementedError(
            f"formats: expected reshape_activations none or hook_z in {config.place}, got "
            f"{shaped!r}"
        )


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
