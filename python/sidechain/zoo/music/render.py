# SPDX-License-Identifier: Apache-2.0
"""Render notes with a General MIDI sound font through tinysoundfont.

Only needed to re-create training data. The committed models were trained on FluidR3 (MIT), Debian's
package `fluid-soundfont-gm`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .attributes import Clip
from .compose import (
    BASS,
    BASS_PROGRAMS,
    CHOIR,
    CHORD_PROGRAMS,
    CHORDS,
    CLIP_SECONDS,
    DRUMS,
    LEAD,
    LEADS,
    compose,
)

SAMPLE_RATE = 16_000
CLIP_SAMPLES = int(CLIP_SECONDS * SAMPLE_RATE)
DEFAULT_FONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
#: Channel volumes (MIDI controller 7, amplitude ~ square), set so that in FluidR3 every lead has
#: about the same RMS level, the accompaniment lies 6-9 dB below it and no genre is louder.
LEAD_VOLUMES = {
    "piano": 127,
    "guitar": 66,
    "violin": 98,
    "cello": 106,
    "flute": 78,
    "trumpet": 68,
    "saxophone": 62,
    "xylophone": 127,
}
CHORD_VOLUMES = {"none": 0, "jazz": 58, "rock": 40, "techno": 74, "classical": 62}
BASS_VOLUMES = {"none": 48, "jazz": 48, "rock": 52, "techno": 84, "classical": 54}
DRUM_VOLUMES = {"none": 80, "jazz": 127, "rock": 80, "techno": 78, "classical": 80}
CHOIR_VOLUME = 58
FONT_GAIN_DB = 9.0


def find_font() -> Path:
    """Find the sound font: `SIDECHAIN_SOUNDFONT`, or FluidR3 of Debian.

    Raises:
        FileNotFoundError: neither exists; the message names the package to install.
    """
    path = Path(os.environ.get("SIDECHAIN_SOUNDFONT", DEFAULT_FONT))
    if not path.is_file():
        raise FileNotFoundError(
            f"render: expected a General MIDI sound font at {path}, got none; install Debian's "
            "fluid-soundfont-gm or set SIDECHAIN_SOUNDFONT"
        )
    return path


class Renderer:
    """A loaded sound font that renders clips one after another."""

    def __init__(self, font: Path | None = None) -> None:
        """Load `font` (default: `find_font()`), 0.4 s for the 148 MB FluidR3."""
        try:
            import tinysoundfont  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise RuntimeError(
                "render: expected the package tinysoundfont, got none; "
                "pip install --no-deps tinysoundfont"
            ) from error
        self._synth: Any = tinysoundfont.Synth(samplerate=SAMPLE_RATE)
        self._font = self._synth.sfload(str(font or find_font()), gain=FONT_GAIN_DB)

    def __call__(self, clip: Clip) -> np.ndarray:
        """Render a clip: mono audio [81920] float32 at 16 kHz, peak at most 0.95."""
        synth = self._synth
        synth.sounds_off()
        programs = {
            LEAD: LEADS[clip.instrument][0],
            CHORDS: CHORD_PROGRAMS.get(clip.genre, 0),
            BASS: BASS_PROGRAMS[clip.genre],
            CHOIR: 52,
        }
        for channel, program in programs.items():
            synth.program_select(channel, self._font, 0, program, False)
        synth.program_select(DRUMS, self._font, 128, 0, True)
        volumes = {
            LEAD: LEAD_VOLUMES[clip.instrument],
            CHORDS: CHORD_VOLUMES[clip.genre],
            BASS: BASS_VOLUMES[clip.genre],
            CHOIR: CHOIR_VOLUME,
            DRUMS: DRUM_VOLUMES[clip.genre],
        }
        for channel, volume in volumes.items():
            synth.control_change(channel, 7, volume)
        events: list[tuple[int, int, int, int, int]] = []  # sample, off first, channel, key, vel
        for note in compose(clip):
            start = int(note.start * SAMPLE_RATE)
            events.append((start, 1, note.channel, note.key, note.velocity))
            events.append((int(note.end * SAMPLE_RATE), 0, note.channel, note.key, 0))
        pieces: list[np.ndarray] = []
        now = 0
        for sample, on, channel, key, velocity in sorted(events):
            if sample >= CLIP_SAMPLES:
                break
            if sample > now:
                pieces.append(self._generate(sample - now))
                now = sample
            if on:
                synth.noteon(channel, key, velocity)
            else:
                synth.noteoff(channel, key)
        pieces.append(self._generate(CLIP_SAMPLES - now))
        stereo = np.concatenate(pieces).reshape(-1, 2)
        mono = stereo.mean(axis=1)
        peak = float(np.abs(mono).max())
        return (mono * min(1.0, 0.95 / max(peak, 1e-9))).astype(np.float32)

    def _generate(self, samples: int) -> np.ndarray:
        return np.frombuffer(bytes(self._synth.generate_simple(samples)), dtype=np.float32)
