# SPDX-License-Identifier: Apache-2.0
"""Sparse dictionaries of what flows through a site: architectures, training, files."""

from .config import ARCHITECTURES, Provenance, SaeConfig
from .log import LOGGERS
from .mesh import Mesh, from_environment
from .model import Codes, Sae
from .normaliser import Normaliser
from .online import PipelineSource
from .sources import IterableSource, Source, StoreSource
from .state import Rows
from .train_config import TrainConfig
from .trainer import Trainer, train

__all__ = [
    "ARCHITECTURES",
    "LOGGERS",
    "Codes",
    "IterableSource",
    "Mesh",
    "Normaliser",
    "PipelineSource",
    "Provenance",
    "Rows",
    "Sae",
    "SaeConfig",
    "Source",
    "StoreSource",
    "TrainConfig",
    "Trainer",
    "from_environment",
    "train",
]
