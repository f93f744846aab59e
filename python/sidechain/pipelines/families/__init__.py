# SPDX-License-Identifier: Apache-2.0
"""Pipeline families: one file each, which registers an `Adapter` when it is imported."""

from . import (
    ace_step,
    audioldm,
    audioldm2,
    ddpm,
    dit,
    flux,
    longcat,
    pixart,
    sana,
    sd,
    sd3,
    stable_audio,
    stable_audio3,
    wan,
)

__all__ = [
    "ace_step",
    "audioldm",
    "audioldm2",
    "ddpm",
    "dit",
    "flux",
    "longcat",
    "pixart",
    "sana",
    "sd",
    "sd3",
    "stable_audio",
    "stable_audio3",
    "wan",
]
