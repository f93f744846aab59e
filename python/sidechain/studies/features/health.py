# SPDX-License-Identifier: Apache-2.0
"""What both ways to score dictionaries share: the metrics as a table, steps of a store."""

from __future__ import annotations

import pandas as pd

from ...report.data import Table
from ...sae import Sae, SaeConfig
from ...sae.features.evaluate import Health
from ...sae.features.scoring import on_grid
from ...store.protocol import RowReader


def on_rows(sae: Sae, rows: RowReader) -> Sae:
    """Return a dictionary for rows: on the time grid of a store, else as it is."""
    timesteps = getattr(rows, "timesteps", None)
    return sae if timesteps is None else on_grid(sae, timesteps, getattr(rows, "sigmas", None))


def health_record(name: str, config: SaeConfig, health: Health) -> dict[str, object]:
    """Return the row of `health.csv` of a dictionary."""
    return {
        "site": name,
        "architecture": config.architecture,
        "features": config.features,
        "k": config.k,
        "rows": health.rows,
        "fvu": health.fvu,
        "worst_step_fvu": float(health.step_fvu.max()),
        "raw_fvu": health.raw_fvu,
        "l0": health.l0,
        "dead": health.dead,
    }


def health_table(health: pd.DataFrame, title: str = "Held-out metrics") -> Table:
    """Lay out the rows of `health.csv`."""
    rows = [
        [
            row.site,
            f"{row.architecture}, k={row.k}" if row.k else row.architecture,
            row.features,
            f"{row.fvu:.4f}",
            f"{row.worst_step_fvu:.4f}",
            f"{row.raw_fvu:.4f}",
            f"{row.l0:.1f}",
            f"{row.dead:.1%}",
        ]
        for row in health.itertuples()
    ]
    columns = ["site", "kind", "features", "FVU", "worst step", "raw FVU", "L0", "dead"]
    return Table(title, columns, rows)
