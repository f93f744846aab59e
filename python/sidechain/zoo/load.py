# SPDX-License-Identifier: Apache-2.0
"""Load what ships with the package, after a check that its files are intact."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import InputError
from .checksums import CHECKSUMS, WEIGHTS, verify

if TYPE_CHECKING:
    import torch

    from ..sae import Sae

SAES = "sae"


def _folder(given: Path | str | None, shipped: str) -> Path:
    """Return the verified folder to load; one that `save_pretrained` wrote has no checksums."""
    path = Path(given) if given is not None else WEIGHTS / shipped
    if given is None or not path.is_dir() or (path / CHECKSUMS).is_file():
        verify(path)
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of both libraries: loading takes only a second."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def music(
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    folder: Path | str | None = None,
) -> Any:
    """Load the text-to-music pipeline of the zoo, ready to call.

    Args:
        device: where to put it.
        dtype: None = float32, or float16 | bfloat16 on devices that compute in them.
        folder: another saved `MusicPipeline` instead of the shipped one.

    Returns:
        A `sidechain.zoo.music.pipeline.MusicPipeline`.

    Raises:
        FileNotFoundError: no weights there.
        InputError: a folder with something else.
        ValueError: a damaged weight file.

    Example:
        >>> audio = sidechain.zoo.music()("a happy violin melody with drums").audios[0]
    """
    import torch

    from .music import codec
    from .music.pipeline import MusicPipeline

    path = _folder(folder, "music")
    # Folders saved before the codec moved name its old module, which diffusers looks up here.
    sys.modules.setdefault("sidechain.zoo.codec", codec)
    with quiet():
        try:
            pipe = MusicPipeline.from_pretrained(path, local_files_only=True)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            if folder is None:
                raise
            raise InputError(
                f"music: expected a saved MusicPipeline in {path}, got "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    # from_pretrained renamed its dtype argument; `to` of the modules works in every version.
    for part in (pipe.text_encoder, pipe.transformer, pipe.codec):
        torch.nn.Module.to(part, device, dtype or torch.float32)
    return pipe


def scorers(device: str | torch.device = "cpu", folder: Path | str | None = None) -> dict[str, Any]:
    """The two scorers, `{"latent": LatentScorer, "mel": MelScorer}`, in evaluation mode.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a damaged weight file.
    """
    from .music.scorer import LatentScorer, MelScorer

    path = _folder(folder, "judges")
    with quiet():
        found = {
            "latent": LatentScorer.from_pretrained(path / "latent", local_files_only=True),
            "mel": MelScorer.from_pretrained(path / "mel", local_files_only=True),
        }
    return {name: scorer.eval().to(device) for name, scorer in found.items()}


def dictionaries() -> tuple[str, ...]:
    """List the sites of the music model that have a shipped dictionary, by alias, in order."""
    listing = WEIGHTS / SAES / CHECKSUMS
    if not listing.is_file():
        return ()
    found = [Path(name).stem for name in json.loads(listing.read_text()) if _is_weights(name)]
    return tuple(sorted(f"cross:{name.removeprefix('cross-')}" for name in found))


def dictionary(site: str, device: str | torch.device = "cpu") -> Sae:
    """Load the shipped sparse dictionary of a site of the music model, in evaluation mode.

    Args:
        site: alias, "cross:6"; `dictionaries` lists them.
        device: where to put it.

    Raises:
        ValueError: no dictionary of that site, or a damaged file.
    """
    known = dictionaries()
    if site not in known:
        raise ValueError(
            f"dictionary: expected a site of {', '.join(known) or 'none shipped'}, got {site!r}"
        )
    from ..sae import Sae

    folder = WEIGHTS / SAES
    verify(folder)
    return Sae.load(folder / dictionary_file(site), device=device)


def dictionary_file(site: str) -> str:
    """Return the file name of the dictionary of a site."""
    return f"{site.replace(':', '-')}.safetensors"


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def localized(name: str) -> tuple[str, ...]:
    """List the sites of the music model that carry a concept, by alias, best first.

    Read from the shipped localization: the concept's best sites until half of its full effect.

    Raises:
        ValueError: a concept that was not localized.
        FileNotFoundError: the model was not localized yet.
    """
    path = WEIGHTS / "localization.json"
    if not path.is_file():
        raise FileNotFoundError(f"localized: expected the shipped localization {path}, got none")
    table = json.loads(path.read_text())["localized"]
    if name not in table:
        raise ValueError(f"localized: expected one of {', '.join(table)}, got {name!r}")
    return tuple(table[name])
