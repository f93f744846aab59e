# SPDX-License-Identifier: Apache-2.0
"""The small music model: pipeline, codec, classifiers, and the labelled music it was trained on.

`attributes` describes a clip, `compose` turns that into notes, `render` turns notes into audio with
a General MIDI sound font (only needed to re-create training data), and `captions` words it.
"""
