# SPDX-License-Identifier: Apache-2.0
"""`sidechain sae score`: one's own dictionary on one's own rows, or those of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .._errors import InputError
from .._options import defaults, options
from ..studies.features.config import DictionaryConfig, RowsConfig
from .builder import Command, flag_of

_OWN, _ZOO = options(RowsConfig), options(DictionaryConfig)
_STRONGEST, _EXAMPLES = (defaults(RowsConfig)[name] for name in ("strongest", "examples"))


@dataclass(frozen=True, kw_only=True)
class SaeScoreSettings(DictionaryConfig):
    """Options of `sidechain sae score`: those of both ways to score."""

    dictionary: str | None = field(default=None, metadata={"option": _OWN["dictionary"]})
    rows: Path | None = field(default=None, metadata={"option": _OWN["rows"]})
    column: str | None = field(default=None, metadata={"option": _OWN["column"]})
    row_steps: Path | None = field(default=None, metadata={"option": _OWN["row_steps"]})
    strongest: int = field(default=_STRONGEST, metadata={"option": _OWN["strongest"]})
    examples: int = field(default=_EXAMPLES, metadata={"option": _OWN["examples"]})


def run(settings: SaeScoreSettings, given: Mapping[str, Any]) -> int:
    """Score and print the path of the report."""
    if settings.rows is not None:
        return _run_rows(settings, given)
    if settings.dictionary is not None:
        raise InputError(f"--rows: expected the rows to measure {settings.dictionary} on, got none")
    _none_of(given, [name for name in _OWN if name not in _ZOO], "without DICT and --rows")

    from ..studies.features import page
    from ..studies.features.run import run

    config = DictionaryConfig(**_values(settings, DictionaryConfig))
    print(page.write(run(config), config.out / "report.html"))
    return 0


def _run_rows(settings: SaeScoreSettings, given: Mapping[str, Any]) -> int:
    if settings.dictionary is None:
        raise InputError("sae score: expected DICT [what to measure on --rows], got none")
    _none_of(
        given,
        [name for name in _ZOO if name not in _OWN],
        "with --rows [it is for the music model of the zoo]",
    )

    from ..studies.features import rows_page
    from ..studies.features.rows import run
    from .row_steps import read_steps

    config = RowsConfig(**_values(settings, RowsConfig))
    study = run(config, read_steps("--row-steps", config.row_steps))
    print(study.line())
    print(rows_page.write(study, config.out / "report.html"))
    return 0


def _none_of(given: Mapping[str, Any], names: list[str], where: str) -> None:
    for name in names:
        if name in given:
            flag = flag_of(name, {**_ZOO, **_OWN}[name])
            raise InputError(f"{flag}: expected none {where}, got {given[name]!r}")


def _values(settings: SaeScoreSettings, kind: type) -> dict[str, Any]:
    return {one.name: getattr(settings, one.name) for one in fields(kind)}


COMMAND = Command(
    SaeScoreSettings,
    run,
    "Measure dictionaries: unexplained variance, active and dead features. With DICT and --rows: "
    "one dictionary of any format on activations of your own, with the rows in which its strongest "
    "features are largest; no prompts and no model are needed. Without: the dictionaries of the "
    "zoo's music model (or of --dictionaries) on captions they were not trained on, with scores of "
    "their features for concepts and the clips in which the best ones are most active. Tables and "
    "one HTML report go to --out; the path of the report is printed last.",
    replays=True,
)
