# SPDX-License-Identifier: Apache-2.0
"""Folders of dictionary_learning: `ae.pt`, a pickled state dict, and `config.json`.

Classes built from linear layers keep encoder.weight [F, d] and decoder.weight [d, F], those built
from parameters W_enc [d, F] and W_dec [F, d]. Layouts are those of its commit 60ec6bf; forks give
other meanings to gated and jumprelu activations under the same names.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._errors import InputError
from ..architectures.base import ClassLayout
from ..architectures.registry import ARCHITECTURES, Architecture, implementation
from ..model import Sae
from .parts import (
    assemble,
    check_held,
    encoder_biases,
    leftover,
    read_pickle,
    take,
    take_whole,
    with_unit_rows,
    write_json,
    write_pickle,
)
from .settings import Settings

CONFIG, WEIGHTS = "config.json", "ae.pt"


def _classes() -> dict[str, tuple[str, ClassLayout]]:
    """Return dict_class -> architecture and layout."""
    return {
        layout.name: (architecture, layout)
        for architecture in ARCHITECTURES
        for layout in implementation(architecture).classes
    }


def read(folder: Path) -> Sae:
    """Read a folder of dictionary_learning; see `formats.load`."""
    path = folder / WEIGHTS
    tensors = read_pickle(path)
    trainer = Settings({}, str(folder))
    if (folder / CONFIG).is_file():
        trainer = Settings.read(folder / CONFIG).inner("trainer")
    name = trainer.word("dict_class") or _guess(tensors)
    known = _classes()
    if name not in known:
        raise NotImplementedError(
            f"formats: expected a dict_class of {', '.join(known)}, got {name!r}"
        )
    architecture, layout = known[name]
    kind = ARCHITECTURES[architecture]
    found = _weights(tensors, kind, layout, path)
    features, width = found["w_enc"].shape
    trainer.agrees("activation_dim", width, "width of the encoder")
    trainer.agrees("dict_size", features, "features of the encoder")
    if not layout.subtracts:
        found["b_pre"] = torch.zeros(width)
    if kind.threshold == "feature":
        found["threshold"] = found["threshold"].clamp(min=0)
    elif kind.threshold and found["threshold"] < 0:
        found["threshold"] = torch.tensor(torch.nan)  # its sign for "not trained yet"
    k = _k(trainer, tensors, path) if kind.takes("k") else None
    prefixes: tuple[int, ...] = ()
    if kind.takes("prefixes"):
        prefixes = _prefixes(tensors, path)
    tensors.pop("threshold", None)  # topk keeps one that its encode does not use
    leftover(tensors, path)
    shape = {
        "d_in": width,
        "features": features,
        "architecture": architecture,
        "k": k,
        "prefixes": prefixes,
        "tied_bias": layout.subtracts,
    }
    sae = assemble(shape, found, "dictionary_learning", extra={"trainer": _plain(trainer)})
    if layout.unit_norm:
        with_unit_rows(sae)  # as its own from_pretrained does
    return sae


def _k(trainer: Settings, tensors: dict[str, Tensor], path: Path) -> int:
    """Return k of the weights, or of the settings where the weights have none."""
    if "k" in tensors:
        return take_whole(tensors, "k", dims=0, where=path)[0]
    return trainer.needed("k")


def _prefixes(tensors: dict[str, Tensor], path: Path) -> tuple[int, ...]:
    if "group_sizes" not in tensors:
        raise InputError(f"formats: expected a tensor group_sizes in {path}, got none")
    return tuple(accumulate(take_whole(tensors, "group_sizes", dims=1, where=path)))


def _weights(
    tensors: dict[str, Tensor], kind: Architecture, layout: ClassLayout, path: Path
) -> dict[str, Tensor]:
    """Take the weights out of a state dict, under our names."""
    if layout.linear:
        w_enc = take(tensors, "encoder.weight", dims=2, where=path)
        w_dec = take(tensors, "decoder.weight", dims=2, where=path).T
    else:
        w_enc = take(tensors, "W_enc", dims=2, where=path).T
        w_dec = take(tensors, "W_dec", dims=2, where=path)
    found = {"w_enc": w_enc, "w_dec": w_dec}
    for name, word in layout.tensors.items():
        scalar = name == "threshold" and kind.threshold == "batch"
        found[name] = take(tensors, word, dims=0 if scalar else 1, where=path)
    return found


def _guess(tensors: dict[str, Tensor]) -> str:
    """Return the class by its tensors, for a file that came without its config."""
    if "group_sizes" in tensors:
        return "MatryoshkaBatchTopKSAE"
    if "gate_bias" in tensors:
        return "GatedAutoEncoder"
    if "W_enc" in tensors and "threshold" in tensors:
        return "JumpReluAutoEncoder"
    if "k" in tensors:
        raise InputError(
            f"formats: expected {CONFIG} beside {WEIGHTS} [its trainer.dict_class tells "
            "AutoEncoderTopK from BatchTopKSAE], got none"
        )
    return "AutoEncoderNew" if "decoder.bias" in tensors else "AutoEncoder"


def _plain(trainer: Settings) -> dict[str, Any]:
    kept = (str, int, float, bool, type(None))
    values = trainer.to_json()
    return {name: value for name, value in values.items() if isinstance(value, kept)}


def write(sae: Sae, folder: Path) -> None:
    """Write a folder that dictionary_learning's `load_dictionary` opens."""
    config = sae.config
    if config.transcoder:
        raise NotImplementedError(
            "formats: expected an autoencoder for dictionary_learning, got a transcoder"
        )
    check_held(sae, "dictionary_learning")
    layouts = implementation(config.architecture).classes
    layout = next(found for found in layouts if config.unit_norm or not found.unit_norm)
    tensors = {"encoder.weight": sae.w_enc, "decoder.weight": sae.w_dec.T}
    if not layout.linear:
        tensors = {"W_enc": sae.w_enc.T, "W_dec": sae.w_dec}
    own = encoder_biases(sae, sae.b_dec if layout.subtracts else None) | {"b_dec": sae.b_dec}
    tensors |= {word: own[name] for name, word in layout.tensors.items()}
    trainer = {
        "dict_class": layout.name,
        "activation_dim": config.d_in,
        "dict_size": config.features,
        "submodule_name": sae.provenance.site,
    }
    if config.k is not None:
        trainer["k"] = config.k
        tensors["k"] = torch.tensor(config.k, dtype=torch.int32)
        # Its classes with k all have a threshold, negative where there is none.
        tensors["threshold"] = own.get("threshold", torch.tensor(-1.0)).nan_to_num(nan=-1.0)
    elif "threshold" in own:
        tensors["threshold"] = own["threshold"].clamp(min=0)
    if config.prefixes:
        ends = torch.tensor(config.prefixes)
        tensors["group_sizes"] = ends.diff(prepend=ends.new_zeros(1))
    write_pickle(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {}})
