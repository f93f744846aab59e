# SPDX-License-Identifier: Apache-2.0
"""Words for clips: captions for training and prompts for studies, from one closed vocabulary.

What a caption leaves out means something: drums and vocals that are not mentioned are absent
(except drums inside jazz, rock and techno), and a tempo that is not mentioned is medium.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .attributes import ATTRIBUTES, draw

if TYPE_CHECKING:
    import numpy as np

#: attribute -> class -> phrases; the first is the plainest.
ADJECTIVES: dict[str, dict[str, tuple[str, ...]]] = {
    "mood": {
        "happy": ("happy", "cheerful", "joyful", "bright"),
        "sad": ("sad", "gloomy", "melancholic", "sorrowful"),
    },
    "tempo": {
        "slow": ("slow", "unhurried", "slow-paced"),
        "medium": ("moderate", "mid-tempo"),
        "fast": ("fast", "quick", "rapid"),
    },
    "genre": {name: (name,) for name in ("jazz", "rock", "techno", "classical")},
}
INSTRUMENT_WORDS: dict[str, tuple[str, ...]] = {
    "piano": ("piano",),
    "guitar": ("guitar", "acoustic guitar"),
    "violin": ("violin", "fiddle"),
    "cello": ("cello",),
    "flute": ("flute",),
    "trumpet": ("trumpet",),
    "saxophone": ("saxophone", "sax"),
    "xylophone": ("xylophone",),
}
TAILS: dict[str, dict[str, tuple[str, ...]]] = {
    "drums": {
        "yes": ("with drums", "with percussion", "with a drum beat"),
        "no": ("without drums", "no drums", "without percussion"),
    },
    "vocals": {
        "yes": ("with vocals", "with a choir", "with singing", "with voices"),
        "no": ("without vocals", "no vocals", "without singing"),
    },
}
NOUNS = ("melody", "tune", "song", "piece", "track", "solo", "music")
#: Words that prompts may use but captions never do: the trained encoder reads them as "a".
FILLERS = ("an", "by", "in", "lead", "mood", "of", "played", "playing", "style", "tempo", "the")
#: Clips of fresh captions are numbered from here, far from those the music model was trained on.
_FRESH_CLIPS = 10_000_000
_FRESH_WORDING = 77


def vocabulary() -> list[str]:
    """Every word that captions can use and the fillers, sorted."""
    phrases: list[str] = [*NOUNS, *FILLERS, "a and"]
    for table in (*ADJECTIVES.values(), *TAILS.values(), INSTRUMENT_WORDS):
        for options in table.values():
            phrases.extend(options)
    return sorted({word for phrase in phrases for word in phrase.split()})


def mentioned(labels: Sequence[int], rng: np.random.Generator) -> dict[str, str]:
    """Draw the attributes that a caption of a clip with these labels mentions."""
    clip = {name: ATTRIBUTES[name][index] for name, index in zip(ATTRIBUTES, labels, strict=True)}
    band = clip["genre"] in ("jazz", "rock", "techno")
    rates = {
        "instrument": 0.93,
        "drums": {"yes": 0.6 if band else 1.0, "no": 1.0 if band else 0.25}[clip["drums"]],
        "vocals": {"yes": 1.0, "no": 0.2}[clip["vocals"]],
        "tempo": 0.3 if clip["tempo"] == "medium" else 1.0,
        "mood": 0.88,
        "genre": 0.0 if clip["genre"] == "none" else 1.0,
    }
    return {name: value for name, value in clip.items() if rng.random() < rates[name]}


def describe(spec: Mapping[str, str], rng: np.random.Generator, *, plain: bool = False) -> str:
    """Word a prompt that mentions the attributes in `spec`, in random words and one of two forms.

    Args:
        spec: attribute -> class, only those to be mentioned.
        rng: source of the wording. The number of draws does not depend on the classes, so with one
            seed the prompts of two specs differ only in the classes that differ.
        plain: always use the plainest word and the sentence form.
    """
    picks = {name: float(rng.random()) for name in ATTRIBUTES}
    form = float(rng.random())
    noun = NOUNS[0] if plain else NOUNS[int(rng.random() * len(NOUNS))]
    order = rng.permutation(3)
    tail_order = rng.permutation(2)
    shuffle = rng.random(len(ATTRIBUTES))

    def word(options: tuple[str, ...], name: str) -> str:
        return options[0 if plain else int(picks[name] * len(options))]

    adjectives = {
        name: word(table[spec[name]], name)
        for name, table in ADJECTIVES.items()
        if spec.get(name, "none") != "none"
    }
    tails = {name: word(table[spec[name]], name) for name, table in TAILS.items() if name in spec}
    instrument = ""
    if "instrument" in spec:
        instrument = word(INSTRUMENT_WORDS[spec["instrument"]], "instrument")
    if plain or form < 0.6:
        names = list(ADJECTIVES)
        sequence = names if plain else [names[i] for i in order]
        head = [adjectives[name] for name in sequence if name in adjectives]
        tail_names = list(TAILS)
        ends = [tails[tail_names[i]] for i in tail_order if tail_names[i] in tails]
        if len(ends) == 2 and all(end.startswith("with ") for end in ends):
            ends[1] = ends[1].removeprefix("with ")
        words = ["a", *head, *([instrument] if instrument else []), noun]
        return " ".join([*words, " and ".join(ends)]).strip()
    parts = {**adjectives, **tails, **({"instrument": instrument} if instrument else {})}
    if not parts:
        return f"a {noun}"
    ranks = {name: shuffle[i] for i, name in enumerate(ATTRIBUTES)}
    return ", ".join(parts[name] for name in sorted(parts, key=ranks.__getitem__))


def caption(labels: Sequence[int], rng: np.random.Generator) -> str:
    """A random training caption for a clip with these labels."""
    return describe(mentioned(labels, rng), rng)


def fresh_captions(count: int, first: int = 0) -> list[str]:
    """Draw captions of clips that were never rendered, as those of the training clips were drawn.

    Caption number `first`, `first + 1`, ... is the same for any count.
    """
    import numpy as np

    return [
        caption(draw(_FRESH_CLIPS + i).labels(), np.random.default_rng([_FRESH_WORDING, i]))
        for i in range(first, first + count)
    ]
