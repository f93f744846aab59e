# SPDX-License-Identifier: Apache-2.0
"""Every architecture of dictionaries at its defaults, on planted rows and on rows of the zoo.

    python -m sidechain.bench.architectures [--quick] [--out FILE] [--card]

Only the number of active features is asked for (k, or l0 where there is a penalty); everything
else is the default. `--card` writes the table into the card of the shipped dictionaries; `make
zoo-sae` makes that card anew, so this comes after it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import sae, store
from ..io.atomic import write_text
from ..sae.features.evaluate import measure
from ..sae.planted import planted_rows, share_found
from ..store import ArrayRows
from ..zoo.checksums import WEIGHTS, write_checksums
from ..zoo.load import SAES, music
from ..zoo.music.captions import fresh_captions

#: Row of the table -> settings.
CASES: dict[str, dict[str, str]] = {
    "topk": {"architecture": "topk"},
    "batch_topk": {"architecture": "batch_topk"},
    "matryoshka": {"architecture": "matryoshka"},
    "relu": {"architecture": "relu"},
    "gated": {"architecture": "gated"},
    "jumprelu, tanh": {"architecture": "jumprelu", "penalty": "tanh"},
    "jumprelu, l0": {"architecture": "jumprelu", "penalty": "l0"},
}
START, END = "<!-- architectures -->", "<!-- /architectures -->"
_COLUMNS = ("FVU", "L0", "dead", "atoms >= .9", ">= .95", "zoo FVU", "L0", "dead")


@dataclass(frozen=True)
class Sizes:
    """What is trained on.

    Attributes:
        rows: planted, of `width`, each with `active` of `atoms`; as many features are trained.
        prompts: of the zoo's music model at `site`; 0 = planted rows alone.
        features: for the zoo's rows, `k` of them active.
        batch: rows of a step; `zoo_batch` of the zoo's rows, which are fewer.
    """

    rows: int = 400_000
    width: int = 64
    atoms: int = 256
    active: int = 8
    prompts: int = 40
    features: int = 1280
    k: int = 16
    batch: int = 1024
    zoo_batch: int = 256
    site: str = "cross:6"


QUICK = Sizes(rows=20_000, width=16, atoms=32, active=3, prompts=0, batch=256)


def compare(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Train all `CASES`; returns their metrics on rows they were not trained on, by name."""
    held = max(1000, sizes.rows // 20)
    x, atoms = planted_rows(
        sizes.rows + held, sizes.width, sizes.atoms, active=sizes.active, noise=0.02
    )
    zoo = _zoo_rows(sizes) if sizes.prompts else None
    made = {}
    for name, settings in CASES.items():
        one = _train(x[held:], sizes.atoms, sizes.active, sizes.batch, settings)
        row = _health(one, ArrayRows(x[:held]))
        row |= {f"found_{c}": share_found(one.w_dec, atoms, c / 100) for c in (90, 95)}
        if zoo is not None:
            first = len(zoo) // 10
            one = _train(zoo[first:], sizes.features, sizes.k, sizes.zoo_batch, settings)
            row |= {f"zoo_{n}": v for n, v in _health(one, ArrayRows(zoo[:first])).items()}
        made[name] = row
        print(name, json.dumps(row), file=sys.stderr, flush=True)
    return made


def _zoo_rows(sizes: Sizes) -> torch.Tensor:
    """Return outputs of a site of the music model, each scheduler step normalised by itself."""
    with tempfile.TemporaryDirectory() as folder:
        recorded = store.record(
            music(),
            [sizes.site],
            fresh_captions(sizes.prompts, 0),
            Path(folder),
            sampling=store.Sampling(0, 16),
            num_inference_steps=20,
            guidance_scale=3.0,
        )[sizes.site]
        source = sae.StoreSource(recorded)
        normaliser, _ = source.normalisers("step", centre=True)
        rows = next(source.batches(len(recorded), 0, sae.Mesh(), torch.device("cpu")))
        normalised: torch.Tensor = normaliser.normalise(rows.x.float(), rows.step)
    return normalised


def _train(x: torch.Tensor, features: int, active: int, batch: int, settings: Any) -> sae.Sae:
    kind = sae.ARCHITECTURES[settings["architecture"]]
    asked: dict[str, Any] = {"k" if kind.takes("k") else "l0": active}
    with tempfile.TemporaryDirectory() as folder:
        return sae.train(
            x, folder, features=features, batch=batch, progress=False, **asked, **settings
        )


def _health(one: sae.Sae, rows: ArrayRows) -> dict[str, float]:
    health = measure(one, rows)
    return {"fvu": health.fvu, "l0": health.l0, "dead": health.dead}


def table(metrics: dict[str, dict[str, float]], sizes: Sizes) -> list[str]:
    """Return the lines of the table, in Markdown."""
    lines = [
        f"Every architecture at its defaults, {sizes.active} active features asked for, on "
        f"{sizes.rows} planted rows ({sizes.width} wide, {sizes.atoms} atoms of which "
        f"{sizes.active} are active, as many features), steps of {sizes.batch} rows"
        + (
            f"; and {sizes.k} of {sizes.features} on {sizes.site}, 20 steps of {sizes.prompts} "
            f"captions, steps of {sizes.zoo_batch} rows"
            if sizes.prompts
            else ""
        )
        + ". Metrics are of rows that were not trained on. `atoms` is the share of planted atoms "
        "that a decoder row meets at that cosine. An L1 penalty takes from every value: relu "
        "explains less at the same L0. Made by `python -m sidechain.bench.architectures`.",
        "",
        "| architecture | " + " | ".join(_COLUMNS) + " |",
        "|---" * (len(_COLUMNS) + 1) + "|",
    ]
    names = ("fvu", "l0", "dead", "found_90", "found_95", "zoo_fvu", "zoo_l0", "zoo_dead")
    for name, row in metrics.items():
        cells = [f"{row[n]:.3f}" if n in row else "-" for n in names]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_card(folder: Path, lines: list[str]) -> None:
    """Put the table at the end of the card of the dictionaries, in place of one that is there."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8").split(START)[0].rstrip("\n")
    write_text(path, "\n".join([text, "", START, *lines, END, ""]))
    write_checksums(folder)


def main(argv: list[str] | None = None) -> int:
    """Train, print the table and write the metrics; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m sidechain.bench.architectures", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="seconds: shows that all of it works")
    parser.add_argument("--prompts", type=int, help="of the music model")
    parser.add_argument("--rows", type=int, help="planted")
    parser.add_argument("--out", type=Path, help="JSON file with the metrics")
    parser.add_argument("--card", action="store_true", help="write into the card that is shipped")
    chosen = parser.parse_args(argv)
    base = asdict(QUICK if chosen.quick else Sizes())
    given = {n: v for n in ("prompts", "rows") if (v := getattr(chosen, n)) is not None}
    sizes = Sizes(**{**base, **given})
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)  # a collapse shows for each
        metrics = compare(sizes)
    lines = table(metrics, sizes)
    print("\n".join(lines))
    if chosen.out is not None:
        text = json.dumps({"sizes": asdict(sizes), "architectures": metrics}, indent=1)
        write_text(chosen.out, text + "\n")
    if chosen.card:
        write_card(WEIGHTS / SAES, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
