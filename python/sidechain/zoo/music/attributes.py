# SPDX-License-Identifier: Apache-2.0
"""The attributes of a rendered clip: their classes and how they are drawn together."""

from __future__ import annotations

from dataclasses import asdict, dataclass

INSTRUMENTS = ("piano", "guitar", "violin", "cello", "flute", "trumpet", "saxophone", "xylophone")
GENRES = ("none", "jazz", "rock", "techno", "classical")
TEMPOS = ("slow", "medium", "fast")
MOODS = ("sad", "happy")

#: Classes of every attribute, in the order that scorers and label arrays use.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "instrument": INSTRUMENTS,
    "drums": ("no", "yes"),
    "vocals": ("no", "yes"),
    "tempo": TEMPOS,
    "mood": MOODS,
    "genre": GENRES,
}

#: Beats per minute of each tempo class; the gaps keep the classes apart.
TEMPO_RANGES: dict[str, tuple[float, float]] = {
    "slow": (60.0, 76.0),
    "medium": (96.0, 112.0),
    "fast": (150.0, 176.0),
}


@dataclass(frozen=True)
class Clip:
    """Description of a clip: a class for every attribute, exact tempo and the seed of its notes."""

    instrument: str
    drums: str
    vocals: str
    tempo: str
    mood: str
    genre: str
    bpm: float
    seed: int

    def labels(self) -> list[int]:
        """Class index of each attribute, in the order of `ATTRIBUTES`."""
        return [classes.index(getattr(self, name)) for name, classes in ATTRIBUTES.items()]

    def as_dict(self) -> dict[str, str | float | int]:
        """Return a plain dictionary, for metadata files."""
        return asdict(self)


def draw(seed: int) -> Clip:
    """Draw the attributes of clip number `seed`.

    Instrument, tempo, mood and genre are independent of each other, so that no instrument can be
    read off a genre. Drums follow the genre (usual in jazz, rock and techno, rare in classical).
    """
    import numpy as np

    rng = np.random.default_rng([seed, 0])
    genre = "none" if rng.random() < 0.45 else str(rng.choice(GENRES[1:]))
    drum_rate = {"none": 0.45, "classical": 0.1}.get(genre, 0.8)
    tempo = str(rng.choice(TEMPOS, p=(0.36, 0.28, 0.36)))
    low, high = TEMPO_RANGES[tempo]
    return Clip(
        instrument=str(rng.choice(INSTRUMENTS)),
        drums="yes" if rng.random() < drum_rate else "no",
        vocals="yes" if rng.random() < 0.35 else "no",
        tempo=tempo,
        mood=str(rng.choice(MOODS)),
        genre=genre,
        bpm=float(rng.uniform(low, high)),
        seed=seed,
    )
