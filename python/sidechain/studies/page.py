# SPDX-License-Identifier: Apache-2.0
"""What the pages of all studies share: a run folder read back, sounds, facts, how to run it again.

A page is made of the files of its run folder alone, so one can be made again of an old folder.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._errors import InputError
from .._options import options, present
from ..io.run_folder import MANIFEST, read_json, read_table
from ..report.data import Block, Commands, Facts, Files, Section, Text
from .common import today

#: Rate of the sounds on a page.
PAGE_RATE = 16_000
#: Name of the page in a run folder.
PAGE = "report.html"
#: Settings that a page names elsewhere, or that say nothing to its reader.
_UNSHOWN = frozenset({"out", "device", "prompts", "batch_rows", "audio"})


@dataclass(frozen=True)
class RunRead:
    """A run folder read back.

    Attributes:
        folder: where it is.
        config: its settings, as JSON has them.
        versions: of what it ran with.
        table: rows of its finished parts.
        finished: whether the study came to its end.
    """

    folder: Path
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    table: pd.DataFrame
    finished: bool

    @property
    def model(self) -> str:
        """Name of the model; version 1 had the one of the zoo alone."""
        return str(self.config.get("model", "zoo:music"))


def read_run(folder: Path, command: str, table: str, settings: type) -> RunRead:
    """Read a run folder of a study, of any version, finished or not.

    Args:
        folder: of the run.
        command: whose it has to be.
        table: file with all its rows; the parts count where it is not there yet.
        settings: class of its settings.

    Raises:
        InputError: nothing measured there, or a run of another command.
        OSError: it cannot be read.
    """
    manifest = read_json(folder / MANIFEST)
    config = manifest.get("config")
    if not isinstance(config, dict) or manifest.get("command", command) != command:
        raise InputError(
            f"{folder / MANIFEST}: expected the settings of a run of {command!r}, got those of "
            f"{manifest.get('command')!r}"
        )
    whole = folder / table
    files = [whole] if whole.is_file() else sorted((folder / "parts").glob("*.csv"))
    if not files:
        raise InputError(f"{folder}: expected a run with something measured, got none")
    rows = pd.concat([read_table(file) for file in files], ignore_index=True)
    finished = (folder / "summary.json").is_file()
    config = present(options(settings), config)
    return RunRead(folder, config, manifest.get("versions", {}), today(rows), finished)


def listed(names: Sequence[str]) -> str:
    """Write names as a sentence has them: "a, b and c"."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: "1 pair", "2 pairs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def scorer_label(name: str) -> str:
    """Write who scored; "both" is the mean of all scorers."""
    return "mean of the scorers" if name == "both" else f"{name} scorer"


def unfinished(run: RunRead, missing: Sequence[str] = ()) -> list[str]:
    """Write what a run that was cut off lacks, as a finding; nothing of a finished one."""
    if run.finished:
        return []
    lacks = f" without {listed(missing)}" if missing else ""
    return [f"This run is not finished: the page shows the parts measured so far{lacks}."]


def closing(run: RunRead, command: str, files: Mapping[str, str]) -> list[Section]:
    """Make the last sections of every page: facts, how to run it again, files."""
    folder = run.folder
    again = folder.with_name(f"{folder.name}-again")
    lines = [
        f"sidechain {command} --config {shlex.quote(str(folder))} --out {shlex.quote(str(again))}"
    ]
    settings = {
        name.replace("_", " "): ", ".join(map(_word, value))
        if isinstance(value, list)
        else _word(value)
        for name, value in run.config.items()
        if name not in _UNSHOWN and value is not None and value is not False
    }
    there = {path: about for path, about in files.items() if (folder / path).is_file()}
    blocks: list[Block] = [Facts({"Settings": settings, "Made with": run.versions})]
    return [
        Section("facts", "Settings and versions", blocks),
        Section("files", "Tables", [Files(there)] if there else []),
        Section(
            "reproduce",
            "Reproduce",
            [Text(["The settings are in the run folder; the same run again, in another one:"]),
             Commands(lines)],
        ),
    ]  # fmt: skip


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def sound(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Read a clip that a run wrote: samples [T] and log-mel [frames, bins]; None without one."""
    if not path.is_file():
        return None
    import soundfile

    from ..scorers.clap import resampled
    from ..zoo.music.codec import log_mel

    wave, rate = soundfile.read(path, dtype="float32")
    if wave.ndim == 2:
        wave = wave.mean(axis=1)
    wave = resampled(wave, rate, PAGE_RATE)
    if len(wave) < PAGE_RATE // 50:  # less than a column of the spectrogram
        return None
    return wave, log_mel(wave, sample_rate=PAGE_RATE)
