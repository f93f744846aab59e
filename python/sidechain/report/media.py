# SPDX-License-Identifier: Apache-2.0
"""Figures, images and sounds as files or as data URIs."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sidechain.io.atomic import write_atomic

BROWSER_FONTS = (
    "-apple-system, Segoe UI, Roboto, Helvetica Neue, Liberation Sans, Arial, sans-serif"
)


def svg(figure: Figure) -> str:
    """Render a figure as SVG text, same bytes for the same figure, with the reader's fonts."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sidechain"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    family = r"(font-family: |font: [^;\"]*?px )[^;\"]*"
    text = re.sub(family, rf"\g<1>{BROWSER_FONTS}", stream.getvalue())
    return text[text.index("<svg") :]


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 200) -> Path:
    """Write a figure (png, svg or pdf by its suffix); the file appears whole or not at all."""
    target = Path(path)
    kind = target.suffix.lstrip(".").lower()
    if kind not in {"png", "svg", "pdf"}:
        raise ValueError(f"save_figure: expected a .png, .svg or .pdf file, got {target.name}")
    if kind == "svg":
        return write_atomic(target, svg(figure).encode(), parents=True)
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=dpi)
    return write_atomic(target, stream.getvalue(), parents=True)


def spectrogram_png(
    mel: NDArray[np.floating], low: float, high: float, *, colours: str = "magma", scale: int = 2
) -> bytes:
    """Render a log-mel spectrogram as a bare image, time to the right, low frequencies below.

    Args:
        mel: [frames, bins], low bins first.
        low: value of the darkest colour.
        high: value of the brightest colour.
        colours: name of a matplotlib colour map.
        scale: pixels per cell.
    """
    array = np.asarray(mel, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"spectrogram_png: expected mel [frames, bins], got {list(array.shape)}")
    level = np.clip((np.nan_to_num(array.T[::-1], nan=low) - low) / max(high - low, 1e-12), 0, 1)
    pixels = matplotlib.colormaps[colours](level, bytes=True)[..., :3]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    image = image.quantize(128, dither=Image.Dither.NONE)  # a third of the size, no visible loss
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def image_png(picture: str | Path | NDArray[np.generic], *, most: int = 512) -> bytes:
    """Encode an image as PNG, made smaller where a side has more than `most` pixels.

    Args:
        picture: path of an image file; or [H, W], [H, W, 3] or [H, W, 4] of uint8, or of floats,
            0 to 1 in colour, grey from the smallest to the largest value.
        most: pixels of the longer side.

    Raises:
        ValueError: no image in the file, or an array of another shape or kind.
        OSError: the file cannot be read.
    """
    if isinstance(picture, np.ndarray):
        image = Image.fromarray(_pixels(picture))
    else:
        try:
            image = Image.open(picture)
            image.load()
        except (UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(f"image_png: expected an image in {picture}, got {error}") from None
        image = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    image.thumbnail((most, most))
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _pixels(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    colour = array.ndim == 3 and array.shape[2] in (3, 4)
    if not array.size or not (colour or array.ndim == 2) or array.dtype.kind not in "ufb":
        raise ValueError(
            "image_png: expected [H, W], [H, W, 3] or [H, W, 4] of uint8 or floats, got "
            f"{list(array.shape)} of {array.dtype}"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    values = np.nan_to_num(array.astype(np.float64))
    low, high = (0.0, 1.0) if colour else (float(values.min()), float(values.max()))
    level = np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)
    return np.asarray(np.rint(255 * level), dtype=np.uint8)


def audio_bytes(samples: NDArray[np.floating], sample_rate: int, kind: str = "flac") -> bytes:
    """Encode audio as 16-bit FLAC or WAV; samples beyond -1 .. 1 are scaled down together."""
    if kind not in {"flac", "wav"}:
        raise ValueError(f"audio_bytes: expected kind flac|wav, got {kind!r}")
    array = np.asarray(samples, dtype=np.float32)
    if array.ndim not in (1, 2) or not array.size or not np.isfinite(array).all():
        raise ValueError(
            "audio_bytes: expected finite samples [T] or [T, channels], "
            f"got shape {list(array.shape)}"
        )
    peak = float(np.abs(array).max())
    stream = io.BytesIO()
    soundfile.write(
        stream, array / max(peak, 1.0), sample_rate, format=kind.upper(), subtype="PCM_16"
    )
    return stream.getvalue()


def data_uri(content: bytes | str, kind: str) -> str:
    """Wrap content as a data URI of that MIME type."""
    raw = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"
