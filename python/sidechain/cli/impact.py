# SPDX-License-Identifier: Apache-2.0
"""`sidechain impact`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._options import Settings, number, text
from ..metrics.thresholds import TAU
from .builder import Command


@dataclass(frozen=True, kw_only=True)
class ImpactSettings(Settings):
    """Options of `sidechain impact`."""

    table: str = text(..., "the table; - reads standard input", "TABLE.csv", positional=True)
    tau: float = number(TAU, "functional from this mean on", least=0.0)
    metric: str | None = text(None, "use the rows of this metric only", "NAME")


def run(settings: ImpactSettings, given: Mapping[str, Any]) -> int:
    """Print the ranking."""
    from ..metrics import impact_table
    from ..metrics.tables import write_table

    rows = impact_table.read_impacts(settings.table)
    ranked = impact_table.mean_impacts(rows, tau=settings.tau, metric=settings.metric)
    for note in impact_table.incomplete_sites(rows, settings.metric):
        print(f"sidechain: note: {note}; mean over the others", file=sys.stderr)
    write_table(sys.stdout, impact_table.COLUMNS, ranked)
    return 0


COMMAND = Command(
    ImpactSettings,
    run,
    "Average impact over concepts per block. TABLE.csv has columns "
    "model,metric,concept,block,attn,impact. Prints CSV model,block,attn,mean_impact,functional; "
    "within a model the largest first.",
)
