# SPDX-License-Identifier: Apache-2.0
"""Prompt pairs: the concept's words differ, and nothing else."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from sidechain.zoo.music.attributes import ATTRIBUTES, GENRES, INSTRUMENTS
from sidechain.zoo.music.captions import ADJECTIVES, INSTRUMENT_WORDS, TAILS, vocabulary
from sidechain.zoo.music.concepts import CONCEPTS, DEFAULT_CONCEPTS, concept

NAMES = list(CONCEPTS)


def words_of(text):
    return re.sub(r"[^\w\- ]", " ", text).split()


def own_words(attribute):
    """Words that only this attribute uses, and the joints of a sentence that move with it."""
    table = {"instrument": INSTRUMENT_WORDS}.get(attribute)
    table = table or ADJECTIVES.get(attribute) or TAILS[attribute]
    words = {word for phrases in table.values() for phrase in phrases for word in phrase.split()}
    return words | ({"with", "and", "a"} if attribute in TAILS else set())


def test_the_eighteen():
    assert set(CONCEPTS) == {
        *INSTRUMENTS,
        *GENRES[1:],
        *("drums", "vocals", "fast", "slow", "happy", "sad"),
    }
    assert set(DEFAULT_CONCEPTS) <= set(CONCEPTS)
    covered = Counter(concept(name).attribute for name in DEFAULT_CONCEPTS)
    assert covered.keys() == ATTRIBUTES.keys()


@pytest.mark.parametrize("name", NAMES)
class TestPairs:
    def test_differ_in_the_concept_only(self, name):
        wanted = concept(name)
        allowed = own_words(wanted.attribute)
        for pair in wanted.pairs(40, seed=5):
            clean, corrupted = Counter(words_of(pair.clean)), Counter(words_of(pair.corrupted))
            gained, lost = clean - corrupted, corrupted - clean
            assert gained
            assert set(gained) | set(lost) <= allowed, pair
            if wanted.negatives:
                assert lost
            else:
                assert not lost, pair
            # what both say besides the concept stands in the same order
            left = [word for word in words_of(pair.clean) if word not in allowed]
            right = [word for word in words_of(pair.corrupted) if word not in allowed]
            assert left == right

    def test_words_are_known(self, name):
        known = set(vocabulary())
        for pair in concept(name).pairs(40, seed=6):
            assert set(words_of(pair.clean)) | set(words_of(pair.corrupted)) <= known

    def test_spec_leaves_the_attribute_open(self, name):
        wanted = concept(name)
        for pair in wanted.pairs(40, seed=7):
            assert wanted.attribute not in pair.spec
            assert wanted.attribute == "instrument" or "instrument" in pair.spec
            if wanted.attribute in ("drums", "genre"):
                assert not {"drums", "genre"} & pair.spec.keys()

    def test_deterministic_with_agreeing_prefixes(self, name):
        wanted = concept(name)
        long = wanted.pairs(12, seed=3)
        assert wanted.pairs(12, seed=3) == long
        assert wanted.pairs(5, seed=3) == long[:5]
        assert wanted.pairs(12, seed=4) != long

    def test_negatives_take_turns(self, name):
        wanted = concept(name)
        if not wanted.negatives:
            return
        choices = [one for one in wanted.negatives if one != wanted.positive]
        table = INSTRUMENT_WORDS if wanted.attribute == "instrument" else None
        table = table or ADJECTIVES[wanted.attribute]
        counts = Counter(
            value
            for pair in wanted.pairs(4 * len(choices), seed=8)
            for value in choices
            if any(set(p.split()) <= set(words_of(pair.corrupted)) for p in table[value])
        )
        assert counts == dict.fromkeys(choices, 4)


def test_class_index():
    assert concept("violin").class_index == 2
    assert concept("drums").class_index == 1
    assert concept("techno").class_index == 3


def test_bad_calls():
    with pytest.raises(ValueError, match=r"concept: expected one of piano, .*, got 'oboe'"):
        concept("oboe")
    with pytest.raises(ValueError, match=r"pairs: expected count >= 1, got 0"):
        concept("drums").pairs(0)
