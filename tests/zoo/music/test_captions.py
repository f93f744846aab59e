# SPDX-License-Identifier: Apache-2.0
"""Captions: one closed vocabulary, and silence that means something."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from sidechain.zoo.music.attributes import (
    ATTRIBUTES,
    GENRES,
    INSTRUMENTS,
    TEMPO_RANGES,
    draw,
)
from sidechain.zoo.music.captions import (
    ADJECTIVES,
    FILLERS,
    INSTRUMENT_WORDS,
    TAILS,
    caption,
    describe,
    fresh_captions,
    mentioned,
    vocabulary,
)

CLIPS = [draw(seed) for seed in range(3000)]
FULL = {
    "instrument": "guitar",
    "drums": "yes",
    "vocals": "yes",
    "tempo": "slow",
    "mood": "sad",
    "genre": "classical",
}


def words_of(text):
    return re.sub(r"[^\w\- ]", " ", text.lower()).split()


def phrases_of(attribute):
    if attribute == "instrument":
        return INSTRUMENT_WORDS
    return ADJECTIVES.get(attribute) or TAILS[attribute]


def says(text, attribute, value):
    """Whether any phrase of the class stands in the text; `with` may be shared by two tails."""
    phrases = phrases_of(attribute).get(value, ())
    return any(re.search(rf"\b{re.escape(p.removeprefix('with '))}\b", text) for p in phrases)


def random_captions():
    for seed, clip in enumerate(CLIPS):
        yield clip, caption(clip.labels(), np.random.default_rng(seed))


class TestDraws:
    def test_deterministic(self):
        assert [draw(seed) for seed in range(50)] == CLIPS[:50]
        assert len({clip.bpm for clip in CLIPS}) == len(CLIPS)

    def test_labels_name_the_classes(self):
        for clip in CLIPS[:100]:
            read = {n: c[i] for (n, c), i in zip(ATTRIBUTES.items(), clip.labels(), strict=True)}
            assert read == {name: clip.as_dict()[name] for name in ATTRIBUTES}

    def test_tempo_stays_in_the_range_of_its_class(self):
        for clip in CLIPS:
            low, high = TEMPO_RANGES[clip.tempo]
            assert low <= clip.bpm <= high

    @pytest.mark.parametrize(
        ("attribute", "shares"),
        [
            ("instrument", dict.fromkeys(INSTRUMENTS, 1 / 8)),
            ("tempo", {"slow": 0.36, "medium": 0.28, "fast": 0.36}),
            ("mood", {"sad": 0.5, "happy": 0.5}),
            ("genre", {"none": 0.45, **dict.fromkeys(GENRES[1:], 0.1375)}),
            ("vocals", {"no": 0.65, "yes": 0.35}),
        ],
    )
    def test_shares(self, attribute, shares):
        counts = Counter(getattr(clip, attribute) for clip in CLIPS)
        expected = {name: share * len(CLIPS) for name, share in shares.items()}
        assert counts.keys() == expected.keys()
        chi2 = sum((counts[name] - e) ** 2 / e for name, e in expected.items())
        # five standard deviations above the mean of chi-square with that many degrees of freedom
        free = len(shares) - 1
        assert chi2 < free + 5 * (2 * free) ** 0.5

    def test_no_instrument_can_be_read_off_a_genre(self):
        table = Counter((clip.instrument, clip.genre) for clip in CLIPS)
        by_genre = Counter(clip.genre for clip in CLIPS)
        chi2 = sum(
            (table[i, g] - by_genre[g] / 8) ** 2 / (by_genre[g] / 8)
            for i in INSTRUMENTS
            for g in GENRES
        )
        free = 8 * 5 - 5
        assert chi2 < free + 5 * (2 * free) ** 0.5

    def test_drums_follow_the_genre(self):
        def share(*genres):
            some = [clip.drums == "yes" for clip in CLIPS if clip.genre in genres]
            return sum(some) / len(some)

        assert share("jazz", "rock", "techno") == pytest.approx(0.8, abs=0.05)
        assert share("none") == pytest.approx(0.45, abs=0.05)
        assert share("classical") == pytest.approx(0.1, abs=0.06)


class TestVocabulary:
    def test_sorted_lower_case_and_unique(self):
        known = vocabulary()
        assert known == sorted(set(known))
        assert all(re.fullmatch(r"[a-z]+(-[a-z]+)?", word) for word in known)

    def test_captions_use_no_other_word_and_every_one_but_the_fillers(self):
        used = {word for _, text in random_captions() for word in words_of(text)}
        assert used == set(vocabulary()) - set(FILLERS)

    def test_longest_caption_fits_the_encoder(self):
        longest = max(len(words_of(text)) for _, text in random_captions())
        assert longest <= 19

    def test_no_phrase_stands_for_two_classes(self):
        seen = Counter(
            (phrase, attribute)
            for attribute in ATTRIBUTES
            for phrases in phrases_of(attribute).values()
            for phrase in phrases
        )
        assert max(seen.values()) == 1


class TestCaption:
    def test_deterministic(self):
        labels = CLIPS[0].labels()
        texts = {caption(labels, np.random.default_rng(3)) for _ in range(5)}
        assert len(texts) == 1

    def test_never_says_a_wrong_class(self):
        for clip, text in random_captions():
            for attribute, classes in ATTRIBUTES.items():
                for value in classes:
                    if value == getattr(clip, attribute) or value == "none":
                        continue
                    if attribute in TAILS and value == "yes":
                        # "without drums" holds the phrase of "drums"
                        assert not says(re.sub(r"\b(without|no) \w+", "", text), attribute, value)
                    else:
                        assert not says(text, attribute, value), text

    def test_what_is_left_out_is_absent(self):
        for clip in CLIPS:
            spec = mentioned(clip.labels(), np.random.default_rng(clip.seed))
            assert all(spec[name] == getattr(clip, name) for name in spec)
            band = clip.genre in ("jazz", "rock", "techno")
            if "vocals" not in spec:
                assert clip.vocals == "no"
            if "drums" not in spec and not band:
                assert clip.drums == "no"
            if "tempo" not in spec:
                assert clip.tempo == "medium"
            if "genre" not in spec:
                assert clip.genre == "none"

    def test_absence_is_sometimes_said(self):
        specs = [mentioned(clip.labels(), np.random.default_rng(clip.seed)) for clip in CLIPS]
        quiet = [spec for spec, clip in zip(specs, CLIPS, strict=True) if clip.vocals == "no"]
        assert 0.1 < sum("vocals" in spec for spec in quiet) / len(quiet) < 0.3


class TestDescribe:
    def test_plain(self):
        text = describe(FULL, np.random.default_rng(0), plain=True)
        tails = {"with drums and vocals", "with vocals and drums"}
        assert text.startswith("a sad slow classical guitar melody ")
        assert text.removeprefix("a sad slow classical guitar melody ") in tails

    def test_says_all_of_the_spec_in_both_forms(self):
        forms = Counter()
        for seed in range(200):
            text = describe(FULL, np.random.default_rng(seed))
            forms["list" if "," in text else "sentence"] += 1
            assert all(says(text, name, value) for name, value in FULL.items()), text
        assert forms["sentence"] / 200 == pytest.approx(0.6, abs=0.12)

    def test_every_phrase_is_used(self):
        texts = [describe(FULL, np.random.default_rng(seed)) for seed in range(200)]
        for attribute, value in FULL.items():
            for phrase in phrases_of(attribute)[value]:
                plain = phrase.removeprefix("with ")
                assert any(plain in text for text in texts), phrase

    def test_nothing_to_say(self):
        for seed in range(20):
            assert re.fullmatch(r"a \w+", describe({}, np.random.default_rng(seed)))

    def test_wording_does_not_depend_on_the_classes(self):
        other = {**FULL, "mood": "happy", "tempo": "fast"}
        for seed in range(50):
            first = words_of(describe(FULL, np.random.default_rng(seed)))
            second = words_of(describe(other, np.random.default_rng(seed)))
            changed = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
            assert len(changed) == 2


def test_fresh_captions_do_not_depend_on_how_many_are_asked_for():
    many = fresh_captions(6, 40)
    assert fresh_captions(2, 40) == many[:2] and fresh_captions(1, 45) == many[5:]
    assert len(set(fresh_captions(50))) > 40
    words = {word.strip(",") for text in many for word in text.split()}
    assert words <= set(vocabulary())
