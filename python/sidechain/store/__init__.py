# SPDX-License-Identifier: Apache-2.0
"""Activations on disk: sharded, labelled, checksummed, recorded as they come, read shuffled.

acts = store.record(pipe, ["cross:2", "cross:5"], prompts, "acts", num_inference_steps=20)
for batch in acts["cross:5"].batches(4096, seed=0, normalise="step"):
    batch.x                                      # [4096, C]
"""

from ..pipelines.generate import Sampling
from .arrays import ArrayRows, split
from .batches import Batch, Batches
from .files import open_rows
from .importing import import_rows
from .labels import Labels
from .options import BatchOptions, Storage
from .reader import ActivationStore
from .record import record
from .shuffle import Permutation
from .statistics import RunningStatistics, Statistics
from .writer import ActivationWriter

__all__ = [
    "ActivationStore",
    "ActivationWriter",
    "ArrayRows",
    "Batch",
    "BatchOptions",
    "Batches",
    "Labels",
    "Permutation",
    "RunningStatistics",
    "Sampling",
    "Statistics",
    "Storage",
    "import_rows",
    "open_rows",
    "record",
    "split",
]
