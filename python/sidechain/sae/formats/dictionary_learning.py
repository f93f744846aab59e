# SPDX-License-Identifier: Apache-2.0
"""Folders of dictionary_learning: `ae.pt`, a pickled state dict, and `config.json`.

Classes built from linear layers keep encoder.weight [F, d] and decoder.weight [d, F], those built
from parameters W_enc [d, F] and W_dec [F, d]. Layouts are those of its commit 60ec6bf; forks give
other meanings to gated and jumprelu activations under the same names.
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
    read_pickle,
    shift,
    take,
    with_unit_rows,
    write_json,
    write_pickle,
)

CONFIG, WEIGHTS = "config.json", "ae.pt"
#: dict_class -> architecture here.
_CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
}


def read(folder: Path) -> Sae:
    """Read a folder of dictionary_learning; see `formats.load`."""
    path = folder / WEIGHTS
    tensors = read_pickle(path)
    trainer: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        trainer = read_json(folder / CONFIG).get("trainer", {})
    name = trainer.get("dict_class") or _guess(tensors)
    if name not in _CLASSES:
        raise NotImplementedError(
            f"formats: expected a dict_class of {', '.join(_CLASSES)}, got {name!r}"
        )
    found = _weights(tensors, path)
    features, width = found["w_enc"].shape
    architecture = _CLASSES[name]
    subtracts = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    if not subtracts:
        found["b_pre"] = torch.zeros(width)
    count = tensors.pop("k", None)
    k = trainer.get("k") if count is None else int(count)
    prefixes: tuple[int, ...] = ()
    if architecture == "gated":
        found["b_gate"] = take(tensors, "gate_bias", where=path)
        found["b_enc"] = take(tensors, "mag_bias", where=path)
        found["r_mag"] = take(tensors, "r_mag", where=path)
    elif architecture in ("jumprelu", "batch_topk", "matryoshka"):
        found["threshold"] = take(tensors, "threshold", where=path).float()
    if architecture in ("batch_topk", "matryoshka") and found["threshold"] < 0:
        found["threshold"] = torch.tensor(torch.nan)  # its sign for "not trained yet"
    if architecture == "matryoshka":
        sizes = take(tensors, "group_sizes", where=path)
        prefixes = tuple(int(total) for total in sizes.cumsum(0))
    if architecture == "jumprelu":
        found["threshold"] = found["threshold"].clamp(min=0)
    tensors.pop("threshold", None)  # topk keeps one that its encode does not use
    leftover(tensors, path)
    selecting = architecture in ("topk", "batch_topk", "matryoshka")
    shape = SaeConfig(
        d_in=width,
        features=features,
        architecture=architecture,
        k=int(k) if selecting and k is not None else None,
        prefixes=prefixes,
        tied_bias=subtracts,
    )
    sae = assemble(shape, found, "dictionary_learning", extra={"trainer": _plain(trainer)})
    if name == "AutoEncoder":
        with_unit_rows(sae)  # as its own from_pretrained does
    return sae


def _weights(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Encoder, decoder and their biases, whichever way the class keeps them."""
    if "encoder.weight" in tensors:
        w_enc = take(tensors, "encoder.weight", where=path)
        w_dec = take(tensors, "decoder.weight", where=path).T
    else:
        w_enc = take(tensors, "W_enc", where=path).T
        w_dec = take(tensors, "W_dec", where=path)
    names = ("b_dec", "bias", "decoder_bias", "decoder.bias")
    found = {"w_enc": w_enc, "w_dec": w_dec, "b_dec": take(tensors, *names, where=path)}
    for name in ("encoder.bias", "b_enc"):
        if name in tensors:
            found["b_enc"] = tensors.pop(name)
    return found


def _guess(tensors: dict[str, Tensor]) -> str:
    """The class by its tensors, for a file that came without its config."""
    if "group_sizes" in tensors:
        return "MatryoshkaBatchTopKSAE"
    if "gate_bias" in tensors:
        return "GatedAutoEncoder"
    if "W_enc" in tensors and "threshold" in tensors:
        return "JumpReluAutoEncoder"
    if "k" in tensors:
        raise ValueError(
            f"formats: expected {CONFIG} beside {WEIGHTS} [its trainer.dict_class tells "
            "AutoEncoderTopK from BatchTopKSAE], got none"
        )
    return "AutoEncoderNew" if "decoder.bias" in tensors else "AutoEncoder"


def _plain(trainer: dict[str, Any]) -> dict[str, Any]:
    kept = (str, int, float, bool, type(None))
    return {name: value for name, value in trainer.items() if isinstance(value, kept)}


def write(sae: Sae, folder: Path) -> None:
    """Write a folder that dictionary_learning's `load_dictionary` opens."""
    config = sae.config
    if config.transcoder:
        raise NotImplementedError(
            "formats: expected an autoencoder for dictionary_learning, got a transcoder"
        )
    name, tensors = _layout(sae)
    write_pickle(folder / WEIGHTS, tensors)
    trainer = {
        "dict_class": name,
        "activation_dim": config.d_in,
        "dict_size": config.features,
        "submodule_name": sae.provenance.site,
    }
    if config.k is not None:
        trainer["k"] = config.k
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {}})


def _layout(sae: Sae) -> tuple[str, dict[str, Tensor]]:
    """Class and state dict of a dictionary."""
    config = sae.config
    linear = {"encoder.weight": sae.w_enc, "decoder.weight": sae.w_dec.T}
    free, bias = input_bias(sae, None), input_bias(sae, sae.b_dec)
    if config.architecture == "relu":
        if not config.unit_norm:  # AutoEncoder would be rescaled when it is opened
            return "AutoEncoderNew", {**linear, "encoder.bias": free, "decoder.bias": sae.b_dec}
        return "AutoEncoder", {**linear, "encoder.bias": bias, "bias": sae.b_dec}
    if config.architecture == "gated":
        assert sae.b_gate is not None and sae.r_mag is not None
        return "GatedAutoEncoder", {
            **linear,
            "decoder_bias": sae.b_dec,
            "r_mag": sae.r_mag,
            "gate_bias": (sae.b_gate.double() + shift(sae, sae.b_dec)).float(),
            "mag_bias": bias,
        }
    if config.architecture == "jumprelu":
        assert sae.threshold is not None
        return "JumpReluAutoEncoder", {
            "W_enc": sae.w_enc.T,
            "b_enc": free,
            "W_dec": sae.w_dec,
            "b_dec": sae.b_dec,
            "threshold": sae.threshold.clamp(min=0),
        }
    count = torch.tensor(config.k, dtype=torch.int32)
    common = {"k": count, "b_dec": sae.b_dec}
    if config.architecture == "topk":
        return "AutoEncoderTopK", {
            **linear,
            **common,
            "encoder.bias": bias,
            "threshold": torch.tensor(-1.0),
        }
    assert sae.threshold is not None
    common["threshold"] = sae.threshold.nan_to_num(nan=-1.0)
    if config.architecture == "batch_topk":
        return "BatchTopKSAE", {**linear, **common, "encoder.bias": bias}
    ends = torch.tensor(config.prefixes)
    return "MatryoshkaBatchTopKSAE", {
        **common,
        "W_enc": sae.w_enc.T,
        "b_enc": bias,
        "W_dec": sae.w_dec,
        "group_sizes": ends.diff(prepend=ends.new_zeros(1)),
    }
