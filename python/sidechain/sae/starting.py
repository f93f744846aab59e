# SPDX-License-Identifier: Apache-2.0
"""Start a training from a dictionary: what may change, the normalisers of the run, its weights.

A dictionary read from another library's files knows no normaliser: it works in the units of the
activations. A run works on y = (x - m) / s; `weights` writes the same map in those units, so that
before the first update the run reconstructs exactly what the dictionary does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._errors import InputError
from . import formats
from .architectures.registry import ARCHITECTURES, implementation
from .config import SaeConfig
from .initialise import random_rows
from .model import Sae
from .normaliser import Normaliser


class Started(NamedTuple):
    """A dictionary that a run starts from, and JSON values that say what it was."""

    sae: Sae
    facts: dict[str, Any]


Start = Started | Sae | str | os.PathLike[str]
#: Settings that are the dictionary's and do not change.
_FIXED = ("d_in", "d_out", "transcoder", "unit_norm", "tied_bias")


def opened(start: Start) -> Started:
    """Return the dictionary that a run starts from, and what it was.

    Args:
        start: a dictionary; a file or folder of any of `formats.FORMATS`; the folder of a finished
            training run; or a hub id, "owner/name[/subfolder][@revision]".

    Returns:
        The dictionary, float32 on the CPU, and JSON values for a record: place, format, digest
        (SHA-256 of its weights and normalisers), architecture, features, k, site, model, source,
        tokens, and `start` of a dictionary that was started from another one.

    Raises:
        TypeError: something else.
        FileNotFoundError, ValueError, NotImplementedError: see `formats.load`.
    """
    if isinstance(start, Started):
        return start
    if isinstance(start, Sae):
        place, name = "", "memory"
        sae = _copied(start)
    elif isinstance(start, str | os.PathLike):
        place, name = os.fspath(start), ""
        path = formats.located(start)
        name = formats.detect(path)
        sae = formats.load(path)
    else:
        raise TypeError(
            "start: expected a Sae, a file, a folder or a hub id, got " + type(start).__name__
        )
    _check_normalisers(sae)
    known, config = sae.provenance, sae.config
    facts = {
        "place": place,
        "format": name,
        "digest": digest(sae),
        "architecture": config.architecture,
        "features": config.features,
        "k": config.k,
        "site": known.site,
        "model": known.model,
        "source": known.source,
        "tokens": known.tokens,
    }
    if "start" in known.extra:
        facts["start"] = known.extra["start"]
    return Started(sae, facts)


def shaped(sae: Sae, wanted: Mapping[str, Any]) -> SaeConfig:
    """Return the shape of a run that starts from a dictionary.

    The widths, `transcoder`, `unit_norm` and `tied_bias` are the dictionary's. The architecture is
    the same, or another one if both select k features. k and prefixes are free. There may be more
    features: the old ones keep their numbers.

    Args:
        sae: the dictionary.
        wanted: fields of `SaeConfig` that the run asks for; None or left out = the dictionary's.

    Raises:
        TypeError: no field of `SaeConfig`.
        InputError: what cannot change.
        ValueError: values that do not fit each other, see `SaeConfig`.
    """
    old = sae.config
    known = {f.name for f in fields(SaeConfig)}
    unknown = sorted(wanted.keys() - known)
    if unknown:
        raise TypeError(f"start: expected settings of {sorted(known)}, got {unknown}")
    asked = {name: value for name, value in wanted.items() if value is not None}
    for name in _FIXED:
        here = old.width_out if name == "d_out" else getattr(old, name)
        if name in asked and asked[name] != here:
            raise InputError(
                f"start: expected {name}={here!r} [the dictionary it starts from], got "
                f"{asked[name]!r}"
            )
    architecture = asked.get("architecture", old.architecture)
    _check_architecture(old, architecture)
    features = asked.get("features", old.features)
    if isinstance(features, int) and not isinstance(features, bool) and features < old.features:
        raise InputError(
            f"start: expected features >= {old.features} [the dictionary it starts from], got "
            f"{features}"
        )
    prefixes: tuple[int, ...] = tuple(asked.get("prefixes", ()))
    if not prefixes and old.prefixes and ARCHITECTURES[architecture].takes("prefixes"):
        prefixes = (*old.prefixes, features) if features != old.features else old.prefixes
    return replace(
        old,
        architecture=architecture,
        features=features,
        k=asked.get("k", old.k),
        prefixes=prefixes,
    )


def normalisers(
    sae: Sae,
    fitted: Callable[[str], tuple[Normaliser, Normaliser | None]],
    kind: str,
) -> tuple[Normaliser, Normaliser | None]:
    """Return the normalisers of the input and, of a transcoder, of the output of a started run.

    A dictionary that was trained with normalisers keeps them. One in the units of the activations
    gets one entry for all steps from the data: several would make several maps of it.

    Args:
        sae: the dictionary.
        fitted: gives the normalisers of the data for a kind: "step", "global", "none".
        kind: that the run asks for; "step" counts as "global" here.

    Raises:
        InputError: the dictionary normalises each step by itself, and the data is of other steps or
            does not say of which.
    """
    transcoder = sae.config.transcoder
    own, target = sae.normaliser, sae.target_normaliser if transcoder else None
    if own.is_identity and (target is None or target.is_identity):
        own, target = fitted("none" if kind == "none" else "global")
        return own, target if transcoder else None
    for mine in (own, target):
        if mine is not None and mine.steps is not None:
            _check_steps(mine.steps, fitted("step")[0].steps)
    return own, target


def weights(
    sae: Sae,
    config: SaeConfig,
    normaliser: Normaliser,
    target_normaliser: Normaliser | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the first weights of a run: the same map as the dictionary's, in the run's units.

    With x = s y + m of the input and x' = s' y' + m' of the output (one pair for an autoencoder),
    b_pre' = (b_pre - m) / s, w_enc' = (s / s') w_enc, b_enc' = b_enc / s', b_dec' = (b_dec - m') /
    s', thresholds and a gate's bias / s'; decoder rows keep their length, and a tied bias stays
    tied. Features that come new take rows of `random_rows`, of the mean length of the old ones,
    biases 0, and the mean of the old thresholds (of the old gains of gated).

    Args:
        sae: the dictionary.
        config: of `shaped`.
        normaliser: of the run, see `normalisers`.
        target_normaliser: of a transcoder's output.
        seed: of the rows of new features.

    Returns:
        Tensors named as those of the training state, and `b_pre` where it is not tied; all of all
        features, float32, on the CPU.

    Raises:
        InputError: normalisers that the map cannot be written for.
    """
    old = {
        name: tensor.detach().cpu().double()
        for name, tensor in _in_units(sae, normaliser, target_normaliser).items()
    }
    own = implementation(config.architecture).own(sae.config.features, 0.0)
    found = {name: old[name] for name in ("w_enc", "w_dec", "b_enc", "b_dec")}
    found |= {name: old.get(name, first.double()) for name, first in own.items()}
    if not config.tied_bias:
        found["b_pre"] = old["b_pre"]
    extra = config.features - sae.config.features
    if extra:
        found = _grown(found, config, extra, seed)
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def digest(sae: Sae) -> str:
    """Return SHA-256 of the architecture, the weights and the normalisers of a dictionary."""
    found = hashlib.sha256(repr(sorted(sae.config.to_json().items())).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _copied(sae: Sae) -> Sae:
    """Return a float32 copy on the CPU: the run must not change what it was given."""
    copies = [n.copy() for n in (sae.normaliser, sae.target_normaliser)]
    made = Sae(
        sae.config,
        normaliser=copies[0],
        target_normaliser=copies[sae.target_normaliser is not sae.normaliser],
        provenance=sae.provenance,
    )
    try:
        made.fill(sae.weights())
    except ValueError as error:
        raise InputError(f"start: {error}") from None
    return made.eval()


def _check_normalisers(sae: Sae) -> None:
    if sae.config.transcoder or sae.target_normaliser is sae.normaliser:
        return
    if _alike(sae.normaliser, sae.target_normaliser):
        sae.target_normaliser = sae.normaliser
        return
    raise InputError(
        "start: expected one normaliser of input and output [an autoencoder], got two: "
        "start from its folded(step)"
    )


def _alike(a: Normaliser, b: Normaliser) -> bool:
    """Return whether two normalisers do the same to the same steps."""
    if a is b:
        return True
    mine, other = a.tensors("n"), b.tensors("n")
    return all(
        (name in mine) == (name in other)
        and (name not in mine or torch.equal(mine[name].cpu(), other[name].cpu()))
        for name in ("n.mean", "n.scale", "n.steps")
    )


def _check_architecture(old: SaeConfig, wanted: str) -> None:
    fitting = [old.architecture]
    if old.kind.selects:
        fitting = [name for name, found in ARCHITECTURES.items() if found.selects]
    if wanted not in fitting:
        raise InputError(
            f"start: expected architecture {', '.join(fitting)} [the dictionary it starts from is "
            f"{old.architecture}], got {wanted!r}"
        )


def _check_steps(known: Tensor, found: Tensor | None) -> None:
    if found is None:
        if len(known) > 1:
            raise InputError(
                f"start: expected rows with scheduler steps of {known.tolist()} [the dictionary "
                "normalises each step by itself], got rows without steps"
            )
        return
    other = found[~torch.isin(found, known)]
    if len(other):
        raise InputError(
            f"start: expected rows of scheduler steps {known.tolist()} [those that the dictionary "
            f"knows; see Normaliser.resampled], got step {int(other[0])}"
        )


def _in_units(
    sae: Sae, normaliser: Normaliser, target_normaliser: Normaliser | None
) -> dict[str, Tensor]:
    """Return the tensors of the same map behind other normalisers, and b_pre."""
    kind = implementation(sae.config.architecture)
    output = normaliser if target_normaliser is None else target_normaliser
    if _alike(sae.normaliser, normaliser) and _alike(sae.target_normaliser, output):
        return {**sae.weights(), "b_pre": sae.b_pre}
    if not (sae.normaliser.is_identity and sae.target_normaliser.is_identity):
        raise InputError(
            "start: expected the normalisers of the dictionary [it has its own], got others"
        )
    if len(normaliser.scale) > 1 or len(output.scale) > 1:
        raise InputError(
            f"start: expected one normaliser for all steps [the dictionary is in the units of the "
            f"activations], got {max(len(normaliser.scale), len(output.scale))}"
        )
    mean, scale = normaliser.mean[0].double().cpu(), normaliser.scale[0].double().cpu()
    out_mean, out_scale = output.mean[0].double().cpu(), output.scale[0].double().cpu()
    return {
        **sae.weights(),
        **kind.scaled(sae, 1 / out_scale),
        "w_enc": sae.w_enc.double() * (scale / out_scale),
        "b_enc": sae.b_enc.double() / out_scale,
        "b_dec": (sae.b_dec.double() - out_mean) / out_scale,
        "b_pre": (sae.b_pre.double() - mean) / scale,
    }


def _grown(
    found: Mapping[str, Tensor], config: SaeConfig, extra: int, seed: int
) -> dict[str, Tensor]:
    """Return tensors with `extra` more features behind the old ones."""
    first, stop = config.features - extra, config.features
    w_dec = random_rows(seed, 0, first, stop, config.width_out).double()
    w_enc = random_rows(seed, 1, first, stop, config.d_in).double() if config.transcoder else w_dec
    new = {"w_dec": w_dec, "w_enc": w_enc}
    made = dict(found)
    for name, rows in new.items():
        length = found[name].norm(dim=1).mean()
        if name == "w_dec" and config.unit_norm:
            length = torch.ones_like(length)
        made[name] = torch.cat([found[name], rows * length])
    made["b_enc"] = torch.cat([found["b_enc"], found["b_enc"].new_zeros(extra)])
    own = {name: found[name] for name in config.kind.tensors}
    return made | implementation(config.architecture).extended(own, extra)
