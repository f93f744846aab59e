# SPDX-License-Identifier: Apache-2.0
"""Sparse dictionaries of the activations at a site: architectures, training, files."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .architectures.registry import ARCHITECTURES
    from .config import Provenance, SaeConfig
    from .model import Codes, Sae
    from .normaliser import Normaliser
    from .training.loggers import LOGGERS
    from .training.mesh import Mesh, from_environment
    from .training.pipeline_source import PipelineSource
    from .training.sources import IterableSource, Source, StoreSource
    from .training.state import Rows
    from .training.train_config import TrainConfig
    from .training.trainer import Trainer, train

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

# The config is imported by the command line, which imports no torch before a command runs.
lazy(
    __name__,
    {
        "ARCHITECTURES": ".architectures.registry",
        **dict.fromkeys(("Provenance", "SaeConfig"), ".config"),
        **dict.fromkeys(("Codes", "Sae"), ".model"),
        "Normaliser": ".normaliser",
        "LOGGERS": ".training.loggers",
        **dict.fromkeys(("Mesh", "from_environment"), ".training.mesh"),
        "PipelineSource": ".training.pipeline_source",
        **dict.fromkeys(("IterableSource", "Source", "StoreSource"), ".training.sources"),
        "Rows": ".training.state",
        "TrainConfig": ".training.train_config",
        **dict.fromkeys(("Trainer", "train"), ".training.trainer"),
    },
)
