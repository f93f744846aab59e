# SPDX-License-Identifier: Apache-2.0
"""Labelled, rendered music: attributes -> notes -> audio and caption.

`attributes` names what a clip is, `compose` turns that into notes, `render` turns notes into audio
with a General MIDI sound font (only needed to re-create training data) and `captions` words it.
"""
