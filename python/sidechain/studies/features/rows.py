# SPDX-License-Identifier: Apache-2.0
"""Quality of one dictionary on rows of one's own, and the rows of its strongest features.

    study = score_rows(sae, store.open_rows("acts.npy"))
    study.write(Path("out"))
    rows_page.write(study, Path("out/report.html"), show=lambda row: texts[row])

No prompts and no model are needed: an item is known by the number of its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..._errors import InputError
from ...io.run_folder import MANIFEST as RUN
from ...io.run_folder import RunFolder, write_json, write_table
from ...sae import Sae, SaeConfig, formats
from ...sae.features.evaluate import Health, has_steps, measure
from ...sae.features.top import TopExample, top_examples
from ...sae.starting import digest
from ...store import ActivationStore
from ...store.importing import rows_reader
from ...store.manifest import MANIFEST
from ...store.protocol import RowReader
from ..common import check_device
from .config import RowsConfig
from .health import health_record, on_rows

#: Edges of `density.csv`, log10 of the share of rows in which a feature is active.
EDGES = np.linspace(-6.0, 0.0, 37)


@dataclass(frozen=True)
class StrongFeature:
    """A feature that carries much of the output of a dictionary.

    Attributes:
        feature: its number.
        share: mean over rows of |f w_dec|^2, as a share of its sum over all features.
        density: share of rows in which it is active.
        mean: root mean square of its activation in the rows in which it is active.
        examples: rows in which it is largest.
    """

    feature: int
    share: float
    density: float
    mean: float
    examples: list[TopExample]


@dataclass(frozen=True)
class RowsStudy:
    """What was found of a dictionary on some rows.

    Attributes:
        name, rows: what they are called.
        config: of the dictionary.
        health: its metrics.
        strong: features, the strongest first.
        has_steps: whether the rows know their scheduler steps.
    """

    name: str
    rows: str
    config: SaeConfig
    health: Health
    strong: list[StrongFeature]
    has_steps: bool

    def line(self) -> str:
        """Return the metrics in one line."""
        found = self.health
        return (
            f"FVU {found.fvu:.4f}, L0 {found.l0:.1f}, dead {found.dead:.1%} of "
            f"{self.config.features} features on {found.rows} rows"
        )

    def health_table(self) -> pd.DataFrame:
        """Return the metrics as one row."""
        return pd.DataFrame([health_record(self.name, self.config, self.health)])

    def feature_table(self) -> pd.DataFrame:
        """Return one row for each strong feature."""
        names = ("feature", "share", "density", "mean")
        return pd.DataFrame(
            [[getattr(one, name) for name in names] for one in self.strong], columns=list(names)
        )

    def example_table(self) -> pd.DataFrame:
        """Return one row for each example of each strong feature."""
        names = ("row", "value", "step", "prompt", "token")
        found = [
            [one.feature, *(getattr(example, name) for name in names)]
            for one in self.strong
            for example in one.examples
        ]
        return pd.DataFrame(found, columns=["feature", *names])

    def density_table(self) -> pd.DataFrame:
        """Return the histogram of densities; features that are never active are in no bin."""
        density = self.health.density.numpy()
        alive = np.log10(np.clip(density[density > 0], 1e-6, 1.0))
        counts, _ = np.histogram(alive, EDGES)
        return pd.DataFrame(
            {"log10_from": EDGES[:-1], "log10_to": EDGES[1:], "features": counts.astype(int)}
        )

    def write(self, out: Path) -> None:
        """Write `health.csv`, `density.csv`, `features.csv`, `examples.csv`, `summary.json`."""
        write_table(out / "health.csv", self.health_table())
        write_table(out / "density.csv", self.density_table())
        write_table(out / "features.csv", self.feature_table())
        write_table(out / "examples.csv", self.example_table())
        write_json(
            out / "summary.json",
            {
                **health_record(self.name, self.config, self.health),
                "fvu_by_step": {
                    str(int(step)): float(value)
                    for step, value in zip(self.health.steps, self.health.step_fvu, strict=True)
                    if self.has_steps
                },
            },
        )


def score_rows(
    sae: Sae, rows: RowReader, *, name: str = "", strongest: int = 12, examples: int = 8
) -> RowsStudy:
    """Measure a dictionary on rows, and find the rows of its strongest features.

    Args:
        sae: an autoencoder.
        rows: `ArrayRows`, `open_rows`, a store, or others that are read by number.
        name: of the dictionary; "" = the site it was trained on.
        strongest: features looked at, in the order of their share of the output.
        examples: rows of each.

    Raises:
        ValueError: rows that do not fit the dictionary, see `measure`.
    """
    sae = on_rows(sae, rows)
    health = measure(sae, rows)
    strength = health.mean_square * sae.w_dec.detach().double().square().sum(1).cpu()
    order = torch.sort(strength, descending=True, stable=True).indices[:strongest]
    numbers = [int(f) for f in order if strength[f] > 0]
    found = top_examples(sae, rows, numbers, examples) if numbers else {}
    whole = float(strength.sum())
    strong = [
        StrongFeature(
            f,
            float(strength[f]) / whole,
            float(health.density[f]),
            float((health.mean_square[f] / health.density[f]).sqrt()),
            found[f],
        )
        for f in numbers
    ]
    called = str(getattr(rows, "name", getattr(rows, "site", "rows")))
    title = name or sae.provenance.site or "sae"
    return RowsStudy(title, called, sae.config, health, strong, has_steps(rows))


def run(config: RowsConfig, steps: Any = None) -> RowsStudy:
    """Measure and write tables into `config.out`.

    Args:
        config: what to measure, on what.
        steps: of the rows [N], as in `config.row_steps`.

    Raises:
        InputError: `config.out` holds another run, or options that the rows do not take.
        OSError, ValueError, NotImplementedError: no dictionary, no rows, or rows that do not fit.
    """
    check_device(config.device)
    sae = formats.load(config.dictionary, device=config.device)
    rows = _open(config, steps)
    if not has_steps(rows) and sae.normaliser.steps is not None and len(sae.normaliser.scale) > 1:
        raise InputError(
            "--row-steps: expected the scheduler step of each row [the dictionary normalises each "
            "step by itself], got none"
        )
    inputs = {"dictionary": digest(sae), "rows": f"{rows.fingerprint:08x}"}
    if (config.out / RUN).is_file():  # refuses the folder of another run before the work
        RunFolder(config.out, "sae score", config, inputs)
    name = sae.provenance.site or Path(config.dictionary).stem
    study = score_rows(sae, rows, name=name, strongest=config.strongest, examples=config.examples)
    RunFolder(config.out, "sae score", config, inputs)
    study.write(config.out)
    return study


def _open(config: RowsConfig, steps: Any) -> RowReader:
    if not (config.rows / MANIFEST).is_file():
        return rows_reader(config.rows, column=config.column, steps=steps)
    if steps is not None:
        raise InputError("--row-steps: expected none with a store, which has its own, got some")
    return ActivationStore(config.rows, config.column)
