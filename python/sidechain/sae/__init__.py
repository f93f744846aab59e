# SPDX-License-Identifier: Apache-2.0
"""Sparse dictionaries of what flows through a site: architectures, training, files."""

from .config import ARCHITECTURES, Provenance, SaeConfig
from .model import Codes, Sae
from .normaliser import Normaliser
from .train_config import TrainConfig

__all__ = ["ARCHITECTURES", "Codes", "Normaliser", "Provenance", "Sae", "SaeConfig", "TrainConfig"]
