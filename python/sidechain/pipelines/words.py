# SPDX-License-Identifier: Apache-2.0
"""Where things stand: the words of a prompt in its context, the tokens of a site in an image."""

from __future__ import annotations

import math
import re
from typing import Any

from .adapter import CallShape
from .sites import Site, sites

#: Family -> {source: tokenizer whose tokens, with special ones, are the first of that context}.
_TOKENIZERS: dict[str, dict[int, str]] = {
    "stable_diffusion": {0: "tokenizer"},
    "stable_audio": {0: "tokenizer"},
    "pixart": {0: "tokenizer"},
    "flux": {0: "tokenizer_2"},
    # Its first context is what GPT-2 made of the prompt.
    "audioldm2": {1: "tokenizer_2"},
}


def token_places(
    pipe: Any, prompt: str, word: str, site: str | Site | int | None = None
) -> list[int]:
    """Find a word of a prompt in the context that cross-attention reads.

    Args:
        pipe: diffusers pipeline whose context is the sequence of its tokens.
        prompt: as the pipeline is called with.
        word: a whole word or several in a row, in upper or lower case; every place counts.
        site: cross-attention site that reads the context; for pipelines with several.

    Returns:
        Places in the context, in order: S indices, as `MapCapture.map` takes them.

    Raises:
        TypeError: prompt or word is no text.
        ValueError: the word is not in the prompt, or the site is none that reads a text.
        NotImplementedError: the context is not the sequence of tokens, or the tokenizer does not
            tell where its tokens come from.
    """
    if not isinstance(prompt, str) or not isinstance(word, str):
        got = type(word if isinstance(prompt, str) else prompt).__name__
        raise TypeError(f"token_places: expected one prompt and one word as str, got {got}")
    tokenizer = _tokenizer(pipe, site)
    text = _as_the_pipeline_reads(pipe, prompt, tokenizer)
    pattern = rf"(?<!\w){re.escape(word.strip())}(?!\w)"
    spans = [m.span() for m in re.finditer(pattern, text, re.IGNORECASE) if m.group()]
    tokens = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    places = [
        place
        for place, (start, stop) in enumerate(tokens)
        if start < stop and any(start < last and first < stop for first, last in spans)
    ]
    if not places:
        raise ValueError(f"token_places: expected a word of {prompt!r}, got {word!r}")
    return places


def _tokenizer(pipe: Any, site: str | Site | int | None) -> Any:
    found = sites(pipe)
    known = _TOKENIZERS.get(found.family, {})
    if site is None:
        sources = {s.source for s in found if s.source is not None}
        if known and len(sources) > 1:
            raise ValueError(
                f"token_places: expected site=... [{found.family} has {len(sources)} contexts], "
                "got none"
            )
        source = next(iter(sources), None)
    else:
        source = found[site].source
        if source is None:
            raise ValueError(f"token_places: expected a site that reads a text, got {found[site]}")
    tokenizer = None if source is None else getattr(pipe, known.get(source, ""), None)
    if tokenizer is None:
        raise NotImplementedError(
            f"token_places: expected a context that is the tokens of the prompt [known for "
            f"{', '.join(_TOKENIZERS)}], got context {source} of {found.family}"
        )
    if not getattr(tokenizer, "is_fast", False) or tokenizer.padding_side != "right":
        raise NotImplementedError(
            f"token_places: expected a fast tokenizer that pads on the right [it tells where "
            f"tokens come from], got {type(tokenizer).__name__}"
        )
    return tokenizer


def _as_the_pipeline_reads(pipe: Any, prompt: str, tokenizer: Any) -> str:
    """Return the text that the pipeline hands to its tokenizer."""
    if hasattr(pipe, "_text_preprocessing"):
        prompt = pipe._text_preprocessing(prompt, clean_caption=True)[0]
    if hasattr(pipe, "maybe_convert_prompt"):  # textual inversion
        prompt = pipe.maybe_convert_prompt(prompt, tokenizer)
    return prompt


def token_grid(site: Site, shape: CallShape, tokens: int) -> tuple[int, ...] | None:
    """Return the sizes of the grid that the tokens of a site are, row by row.

    Args:
        site: whose tokens.
        shape: of the denoiser call.
        tokens: T.

    Returns:
        (h, w), or (frames, h, w) of a video; None where the latents are no such grid.
    """
    places = shape.latent[1:]
    if len(places) < 2:
        return None
    patch = site.config.get("patch_size")
    if isinstance(patch, tuple | list):
        steps = [tuple(int(p) for p in patch)]
    else:
        # A U-Net halves its maps from level to level and rounds up.
        steps = [(int(patch or 1) * 2**level,) * len(places) for level in range(8)]
    for step in steps:
        if len(step) == len(places):
            grid = tuple(-(-size // by) for size, by in zip(places, step, strict=True))
            if math.prod(grid) == tokens:
                return grid
    return None
