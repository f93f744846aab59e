# SPDX-License-Identifier: Apache-2.0
"""Dictionaries in the files of other libraries: reading, writing, detection.

| format                | files                             | holds                              |
|-----------------------|-----------------------------------|------------------------------------|
| `sidechain`           | one safetensors file, or a folder | everything                         |
|                       | of a run with sae.safetensors     |                                    |
| `sparsify`            | cfg.json, sae.safetensors         | topk and its transcoders           |
| `tada`                | cfg.json, sae.safetensors         | topk                               |
| `saelens`             | cfg.json, sae_weights.safetensors | topk, jumprelu, relu, gated;       |
|                       |                                   | relu and jumprelu transcoders      |
| `dictionary_learning` | config.json, ae.pt                | all but transcoders                |

What a format cannot express is refused with NotImplementedError rather than approximated; what it
expresses otherwise (biases before or after, norms of decoder rows, input scales) is folded into
the weights, so that encoding and decoding stay the same map.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..model import Sae
from . import dictionary_learning, saelens, sparsify
from .hub import OWN, located
from .parts import folder_of, plain
from .settings import Settings

__all__ = ["FORMATS", "detect", "load", "located", "save"]


class _Format(NamedTuple):
    read: Callable[[Path], Sae]
    write: Callable[[Sae, Path], None]


_FOREIGN: dict[str, _Format] = {
    "sparsify": _Format(sparsify.read, sparsify.write),
    "tada": _Format(sparsify.read, sparsify.write_tada),
    "saelens": _Format(saelens.read, saelens.write),
    "dictionary_learning": _Format(dictionary_learning.read, dictionary_learning.write),
}
#: What the folder of a run holds before it is finished.
_RUN, _STEPS = "run.json", "checkpoints"
#: Names that `load` and `save` take.
FORMATS = ("sidechain", *_FOREIGN)


def detect(path: str | os.PathLike[str]) -> str:
    """Name the format of a file or folder by the names of its files and the keys of its config.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: none of `FORMATS`.
    """
    place = located(path)
    if not place.exists():
        raise FileNotFoundError(f"formats: expected a dictionary, got nothing at {place}")
    other = place.name in (sparsify.WEIGHTS, saelens.WEIGHTS) and _has_config(place.parent)
    if place.is_file() and place.suffix == ".safetensors" and not other:
        return "sidechain"
    folder = folder_of(place)
    if place.is_dir() and (place / OWN).is_file() and not _has_config(place):
        return "sidechain"
    if (folder / saelens.WEIGHTS).is_file():
        return "saelens"
    if (folder / sparsify.WEIGHTS).is_file() and (folder / sparsify.CONFIG).is_file():
        return "tada" if sparsify.is_tada(Settings.read(folder / sparsify.CONFIG)) else "sparsify"
    if (folder / dictionary_learning.WEIGHTS).is_file():
        return "dictionary_learning"
    if (folder / _RUN).is_file() and (folder / _STEPS).is_dir():
        raise ValueError(
            f"formats: expected a finished run, got one without {OWN} in {folder}: train it to its "
            "end first"
        )
    found = sorted(entry.name for entry in folder.iterdir())[:8]
    raise ValueError(
        f"formats: expected files of one of {', '.join(FORMATS)}, got {found} in {folder}"
    )


def load(path: str | os.PathLike[str], format: str = "auto", *, device: Any = None) -> Sae:
    """Read a dictionary of any known format, in eval mode.

    Args:
        path: the folder, or a file in it; the folder of a training run; or a hub id,
            "owner/name[/subfolder][@revision]", of which only the files of a dictionary are
            fetched.
        format: one of `FORMATS`; "auto" asks `detect`.
        device: where to put it.

    Returns:
        A dictionary in float32 with the same encoding and reconstruction.

    Raises:
        FileNotFoundError: a file is missing, or a repository that cannot be fetched.
        ValueError: corrupted, unsafe (a pickle with code in it) or inconsistent files.
        NotImplementedError: a feature of the format that this package cannot represent.
    """
    name = "" if format == "auto" else _known(format)
    place = located(path)
    name = name or detect(place)
    if name == "sidechain":
        return Sae.load(place / OWN if place.is_dir() else place, device=device)
    return _FOREIGN[name].read(folder_of(place)).to(device).eval()


def save(
    sae: Sae, path: str | os.PathLike[str], format: str = "sidechain", *, step: int | None = None
) -> Path:
    """Write a dictionary in a format.

    Args:
        sae: the dictionary.
        path: file (`sidechain`) or folder (all others, made if missing).
        format: one of `FORMATS`.
        step: scheduler step to fold the normalisation of, where it differs from step to step: the
            other formats know no steps.

    Raises:
        ValueError: a step is needed, or an unknown format.
        NotImplementedError: an architecture that the format does not have.
    """
    if _known(format) == "sidechain":
        return sae.save(path)
    target = Path(path)
    _FOREIGN[format].write(plain(sae, step), target)
    return target


def _known(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(
            f"formats: expected format to be one of {', '.join(FORMATS)}, got {name!r}"
        )
    return name


def _has_config(folder: Path) -> bool:
    return (folder / sparsify.CONFIG).is_file()
