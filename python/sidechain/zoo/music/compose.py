# SPDX-License-Identifier: Apache-2.0
"""Notes of a clip: a lead melody over a beat-marking bass, with drums, choir and genre parts.

Design rules, so that each attribute can be heard alone: the bass marks every beat in every clip
(tempo is audible without drums); the lead is the loudest part (the instrument stays audible inside
a genre); mood is scale, register, density, articulation and loudness together; drums never play
half-time; choir is the only voice-like timbre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .attributes import Clip

CLIP_SECONDS = 5.12
LEAD, CHORDS, BASS, CHOIR, DRUMS = 0, 1, 2, 3, 9

#: General MIDI program, lowest and highest comfortable note of each lead.
LEADS: dict[str, tuple[int, int, int]] = {
    "piano": (0, 58, 84),
    "guitar": (24, 50, 74),
    "violin": (40, 64, 88),
    "cello": (42, 38, 60),
    "flute": (73, 72, 94),
    "trumpet": (56, 58, 80),
    "saxophone": (65, 54, 76),
    "xylophone": (13, 74, 98),
}
#: Programs of the chord part and the bass part in each genre.
CHORD_PROGRAMS = {"jazz": 4, "rock": 30, "techno": 81, "classical": 48}
BASS_PROGRAMS = {"none": 32, "jazz": 32, "rock": 34, "techno": 38, "classical": 45}

MAJOR = (0, 2, 4, 5, 7, 9, 11)
MINOR = (0, 2, 3, 5, 7, 8, 10)
PROGRESSIONS = {
    "happy": ((0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (3, 4, 0, 0)),
    "sad": ((0, 5, 2, 6), (0, 3, 0, 4), (0, 6, 5, 6), (0, 5, 3, 4)),
}
KICK, SNARE, HAT, OPEN_HAT, RIDE, CLAP = 36, 38, 42, 46, 51, 39


@dataclass(frozen=True)
class Note:
    """One note: channel, MIDI key, velocity, start and end in seconds."""

    channel: int
    key: int
    velocity: int
    start: float
    end: float


class _Score:
    """Collects notes in beats and converts them to seconds with slight random timing."""

    def __init__(self, clip: Clip, rng: np.random.Generator) -> None:
        self.beat = 60.0 / clip.bpm
        self.offset = float(rng.uniform(0.0, 0.06))
        self.beats = (CLIP_SECONDS - self.offset) / self.beat
        self.notes: list[Note] = []
        self._rng = rng

    def add(self, channel: int, key: int, velocity: float, start: float, length: float) -> None:
        """Add a note of `length` beats from beat `start` on; late ones are dropped."""
        begin = self.offset + start * self.beat + float(self._rng.normal(0.0, 0.004))
        if begin >= CLIP_SECONDS - 0.03:
            return
        loud = int(np.clip(velocity + self._rng.normal(0.0, 3.0), 1, 127))
        begin = max(begin, 0.0)
        self.notes.append(Note(channel, int(key), loud, begin, begin + length * self.beat))


def _chord(root: int, scale: tuple[int, ...], degree: int, sizes: tuple[int, ...]) -> list[int]:
    return [root + scale[(degree + s) % 7] + 12 * ((degree + s) // 7) for s in sizes]


def _into(key: int, low: int, high: int) -> int:
    while key < low:
        key += 12
    while key > high:
        key -= 12
    return key


def compose(clip: Clip) -> list[Note]:
    """Compose the notes of `clip`, the same for the same clip, sorted by start time."""
    rng = np.random.default_rng([clip.seed, 1])
    score = _Score(clip, rng)
    happy = clip.mood == "happy"
    scale = MAJOR if happy else MINOR
    root = int(rng.integers(48, 60))
    progression = PROGRESSIONS[clip.mood][int(rng.integers(4))]
    bars = int(np.ceil(score.beats / 4)) + 1
    degrees = [progression[i % 4] for i in range(bars)]
    _lead(score, clip, rng, root, scale, degrees)
    _bass(score, clip, rng, root, scale, degrees)
    if clip.genre != "none":
        _chords(score, clip, root, scale, degrees)
    if clip.vocals == "yes":
        _choir(score, clip, root, scale, degrees)
    if clip.drums == "yes":
        _drums(score, clip, rng)
    return sorted(score.notes, key=lambda note: note.start)


def _lead(
    score: _Score,
    clip: Clip,
    rng: np.random.Generator,
    root: int,
    scale: tuple[int, ...],
    degrees: list[int],
) -> None:
    happy = clip.mood == "happy"
    _, low, high = LEADS[clip.instrument]
    span = (high - low) // 2
    floor, ceiling = (low + span // 2, high) if happy else (low, high - span // 2)
    velocity = 118 if happy else 92
    swing = clip.genre == "jazz"
    step = int(rng.integers(0, 7))
    position = 0.0
    while position < score.beats:
        degree = degrees[int(position // 4) % len(degrees)]
        length = float(rng.choice((0.5, 0.5, 1.0) if happy else (1.0, 2.0, 2.0)))
        if position % 2 == 0:  # chord tone on the strong beats
            step = degree + int(rng.choice((0, 2, 4)))
        else:
            step += int(rng.choice((-2, -1, -1, 1, 1, 2)))
        key = root + scale[step % 7] + 12 * (step // 7)
        start = position
        if swing and position % 1 == 0.5:
            start += 1 / 6
        score.add(
            LEAD, _into(key, floor, ceiling), velocity, start, length * (0.55 if happy else 1.05)
        )
        position += length


def _bass(
    score: _Score,
    clip: Clip,
    rng: np.random.Generator,
    root: int,
    scale: tuple[int, ...],
    degrees: list[int],
) -> None:
    velocity = 84 if clip.mood == "happy" else 72
    for beat in range(int(np.ceil(score.beats))):
        degree = degrees[(beat // 4) % len(degrees)]
        tones = _chord(root, scale, degree, (0, 2, 4))
        if clip.genre == "jazz":
            key = tones[0] if beat % 4 == 0 else int(rng.choice(tones)) + int(rng.choice((0, 0, 2)))
        else:
            key = tones[0]
        score.add(BASS, _into(key, 33, 47), velocity, beat, 0.7)


def _chords(
    score: _Score, clip: Clip, root: int, scale: tuple[int, ...], degrees: list[int]
) -> None:
    soft = 0 if clip.mood == "happy" else -10
    for bar in range(int(np.ceil(score.beats / 4))):
        degree = degrees[bar % len(degrees)]
        start = 4.0 * bar
        if clip.genre == "jazz":
            for key in _chord(root, scale, degree, (0, 2, 4, 6)):
                for at in (0.0, 1.0 + 2 / 3, 2.0 + 2 / 3):
                    score.add(CHORDS, _into(key, 50, 66), 66 + soft, start + at, 0.5)
        elif clip.genre == "rock":
            power = _chord(root, scale, degree, (0, 4))
            for eighth in range(8):
                for key in power:
                    score.add(CHORDS, _into(key, 40, 57), 68 + soft, start + eighth / 2, 0.4)
        elif clip.genre == "techno":
            tones = _chord(root, scale, degree, (0, 4, 7, 4))
            for sixteenth in range(16):
                key = _into(tones[sixteenth % 4], 52, 70)
                score.add(CHORDS, key, 58 + soft, start + sixteenth / 4, 0.2)
        else:
            for key in _chord(root, scale, degree, (0, 2, 4)):
                score.add(CHORDS, _into(key, 48, 66), 66 + soft, start, 3.95)


def _choir(
    score: _Score, clip: Clip, root: int, scale: tuple[int, ...], degrees: list[int]
) -> None:
    velocity = 92 if clip.mood == "happy" else 84
    for bar in range(int(np.ceil(score.beats / 4))):
        for key in _chord(root, scale, degrees[bar % len(degrees)], (0, 2, 4)):
            score.add(CHOIR, _into(key, 57, 74), velocity, 4.0 * bar, 3.95)


def _drums(score: _Score, clip: Clip, rng: np.random.Generator) -> None:
    del rng
    soft = 0 if clip.mood == "happy" else -10
    for beat in range(int(np.ceil(score.beats))):
        odd = beat % 2 == 1
        if clip.genre == "jazz":
            score.add(DRUMS, RIDE, 86 + soft, beat, 0.2)
            if odd:
                score.add(DRUMS, RIDE, 76 + soft, beat + 2 / 3, 0.2)
                score.add(DRUMS, 44, 80 + soft, beat, 0.2)
            if beat % 4 == 0:
                score.add(DRUMS, KICK, 78 + soft, beat, 0.2)
        elif clip.genre == "techno":
            score.add(DRUMS, KICK, 112 + soft, beat, 0.2)
            score.add(DRUMS, OPEN_HAT, 80 + soft, beat + 0.5, 0.2)
            if odd:
                score.add(DRUMS, CLAP, 92 + soft, beat, 0.2)
        else:
            loud = 8 if clip.genre == "rock" else 0
            score.add(DRUMS, SNARE if odd else KICK, 100 + loud + soft, beat, 0.2)
            score.add(DRUMS, HAT, 80 + soft, beat, 0.1)
            score.add(DRUMS, HAT, 70 + soft, beat + 0.5, 0.1)
