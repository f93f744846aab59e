# SPDX-License-Identifier: Apache-2.0
"""Statistics of a store: read from their file, or counted again if that is damaged."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load

from .labels import BroadcastLabels
from .manifest import DTYPES, Manifest
from .shard import MappedShard, decode
from .statistics import Statistics


def load_statistics(folder: Path, manifest: Manifest, site: str) -> Statistics:
    """Statistics of a site, empty before the first commit.

    A file that is missing or does not match its CRC-32 is named in a RuntimeWarning and replaced by
    a pass over the rows.
    """
    width = manifest.sites[site].width
    if manifest.statistics is None:
        return Statistics(width)
    path = folder / manifest.statistics["file"]
    try:
        content = path.read_bytes()
        reason = "expected another CRC-32"
    except OSError as error:
        content, reason = b"", error.strerror or str(error)
    if zlib.crc32(content) == manifest.statistics["crc32"]:
        return Statistics.from_tensors(site, width, load(content))
    warnings.warn(
        f"store: damaged {path}: {reason}; counting {manifest.sites[site].rows} rows of {site} "
        "again",
        RuntimeWarning,
        stacklevel=3,
    )
    return recount(folder, manifest, site)


def recount(folder: Path, manifest: Manifest, site: str) -> Statistics:
    """Statistics of the rows of a site, by reading and verifying them."""
    entry = manifest.sites[site]
    statistics = Statistics(entry.width)
    for shard in entry.shards:
        mapped = MappedShard(folder, manifest, site, shard)
        mapped.verify()
        for start, stop in mapped.blocks():
            stored = torch.from_numpy(np.array(mapped.rows[start:stop]))
            rows = decode(stored, DTYPES[manifest.dtype], entry.width)
            columns = {name: c[start:stop] for name, c in mapped.columns.items()}
            count(statistics, rows, BroadcastLabels(len(rows), **columns))
    return statistics


def count(statistics: Statistics, rows: torch.Tensor, labels: BroadcastLabels) -> bool:
    """Add rows [n, C] to the cells they belong to.

    Returns:
        Whether all rows were finite.
    """
    finite = True
    for start, stop, cell in labels.cells():
        found = statistics.at(cell)
        found.add(rows[start:stop])
        finite &= found.finite()
    return finite
