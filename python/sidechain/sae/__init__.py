# SPDX-License-Identifier: Apache-2.0
"""Sparse dictionaries of the activations at a site: architectures, training, files."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .architectures.registry import ARCHITECTURES
    from .config import Provenance, SaeConfig
    from .model import Codes, Sae
    from .normaliser import Normaliser
    from .training.finishing import finish
    from .training.loggers import LOGGERS
    from .training.mesh import Mesh, from_environment
    from .training.options import DataOptions, RunOptions
    from .training.pipeline_source import PipelineSource
    from .training.rows import Rows
    from .training.sources import ArraySource, Source, StoreSource
    from .training.streams import IterableSource
    from .training.train import train
    from .training.train_config import TrainConfig
    from .training.trainer import Trainer

__all__ = [
    "ARCHITECTURES",
    "LOGGERS",
    "ArraySource",
    "Codes",
    "DataOptions",
    "IterableSource",
    "Mesh",
    "Normaliser",
    "PipelineSource",
    "Provenance",
    "Rows",
    "RunOptions",
    "Sae",
    "SaeConfig",
    "Source",
    "StoreSource",
    "TrainConfig",
    "Trainer",
    "finish",
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
        "finish": ".training.finishing",
        "LOGGERS": ".training.loggers",
        **dict.fromkeys(("DataOptions", "RunOptions"), ".training.options"),
        **dict.fromkeys(("Mesh", "from_environment"), ".training.mesh"),
        "PipelineSource": ".training.pipeline_source",
        "Rows": ".training.rows",
        **dict.fromkeys(("ArraySource", "Source", "StoreSource"), ".training.sources"),
        "IterableSource": ".training.streams",
        "TrainConfig": ".training.train_config",
        "train": ".training.train",
        "Trainer": ".training.trainer",
    },
)
