# SPDX-License-Identifier: Apache-2.0
"""Notes of clips: every attribute can be heard alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sidechain.zoo.music.attributes import GENRES, INSTRUMENTS, TEMPOS, draw
from sidechain.zoo.music.compose import (
    BASS,
    CHOIR,
    CHORDS,
    CLIP_SECONDS,
    DRUMS,
    LEAD,
    LEADS,
    MAJOR,
    MINOR,
    compose,
)

CLIPS = [draw(seed) for seed in range(120)]
JITTER = 0.02  # five standard deviations of the human timing


def channel(clip, number):
    return [note for note in compose(clip) if note.channel == number]


def test_deterministic_and_sorted():
    for clip in CLIPS[:20]:
        notes = compose(clip)
        assert notes == compose(clip)
        assert [n.start for n in notes] == sorted(n.start for n in notes)


def test_notes_are_valid_midi_inside_the_clip():
    for clip in CLIPS:
        for note in compose(clip):
            assert 0 <= note.key <= 127
            assert 1 <= note.velocity <= 127
            assert 0.0 <= note.start < CLIP_SECONDS
            assert note.start < note.end


def test_bass_marks_every_beat():
    for clip in CLIPS:
        starts = np.array([note.start for note in channel(clip, BASS)])
        beat = 60.0 / clip.bpm
        offset = float(np.median(starts - np.arange(len(starts)) * beat))
        assert np.abs(starts - offset - np.arange(len(starts)) * beat).max() < JITTER
        assert starts[0] < 0.06 + JITTER
        assert starts[-1] + beat > CLIP_SECONDS - 0.03 - JITTER


def test_bass_lies_below_every_lead():
    assert max(n.key for clip in CLIPS for n in channel(clip, BASS)) <= 47
    assert min(n.key for clip in CLIPS for n in channel(clip, BASS)) >= 33


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_lead_in_range(name):
    _, low, high = LEADS[name]
    for clip in CLIPS[:40]:
        lead = channel(replace(clip, instrument=name), LEAD)
        assert lead
        assert all(low <= note.key <= high for note in lead)


@pytest.mark.parametrize(
    ("number", "attribute"), [(DRUMS, "drums"), (CHOIR, "vocals")], ids=["drums", "choir"]
)
def test_only_when_asked(number, attribute):
    for clip in CLIPS:
        assert not channel(replace(clip, **{attribute: "no"}), number)
        assert len(channel(replace(clip, **{attribute: "yes"}), number)) >= 3


def test_chords_only_inside_a_genre():
    for clip in CLIPS[:60]:
        for genre in GENRES:
            assert bool(channel(replace(clip, genre=genre), CHORDS)) == (genre != "none")


def test_drums_never_play_half_time():
    for clip in CLIPS[:60]:
        for genre in GENRES:
            loud = replace(clip, genre=genre, drums="yes")
            hits = np.array([note.start for note in channel(loud, DRUMS)])
            bass = np.array([note.start for note in channel(loud, BASS)])
            nearest = np.abs(hits[:, None] - bass[None]).min(axis=0)
            assert nearest.max() < 2 * JITTER


def test_what_is_added_leaves_the_lead_alone():
    """Drums, choir and chords come after the lead, so that labels can be changed one at a time."""
    for clip in CLIPS[:40]:
        bare = replace(clip, drums="no", vocals="no", genre="none")
        full = replace(clip, drums="yes", vocals="yes", genre="rock")
        assert [n.key for n in channel(bare, LEAD)] == [n.key for n in channel(full, LEAD)]


def test_mood_is_scale_and_register_and_density():
    def mean(values):
        return float(np.mean(list(values)))

    happy = [replace(clip, mood="happy", genre="none") for clip in CLIPS[:60]]
    sad = [replace(clip, mood="sad", genre="none") for clip in CLIPS[:60]]
    for quantity in (
        lambda clip: len(channel(clip, LEAD)),
        lambda clip: mean(n.key for n in channel(clip, LEAD)),
        lambda clip: mean(n.velocity for n in channel(clip, LEAD)),
    ):
        assert mean(map(quantity, happy)) > 1.05 * mean(map(quantity, sad))
    for clips, scale in ((happy, MAJOR), (sad, MINOR)):
        for clip in clips:
            keys = {n.key % 12 for n in channel(clip, LEAD)}
            assert any(keys <= {(root + s) % 12 for s in scale} for root in range(12))


def test_tempo_classes_do_not_touch():
    beats = {
        tempo: [len(channel(clip, BASS)) for clip in CLIPS if clip.tempo == tempo]
        for tempo in TEMPOS
    }
    assert max(beats["slow"]) < min(beats["medium"])
    assert max(beats["medium"]) < min(beats["fast"])
