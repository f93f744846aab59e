# SPDX-License-Identifier: Apache-2.0
"""`run.json`: what a run was started with, what was changed in it and why, and whether it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..._errors import InputError
from ...io.run_folder import read_json, write_json
from ...io.same import difference
from ..config import SaeConfig

SETTINGS = "run.json"
#: Parts that must be the same when a run continues.
PARTS = ("config", "train", "source", "start")
#: Settings that may change while a run goes on: no weight depends on them.
_FREE = frozenset({"checkpoint_minutes", "on_bad_rows"})
#: Of a source: numbers that are equal up to rounding where the rows are the same.
SUMMARY = "summary"
# How far they may be apart, of the largest.
_ROUNDING = 1e-3
#: Of a source: what records of older versions lack.
_NEWER = frozenset({SUMMARY, "prompts_digest", "rows"})
#: Settings that may change where a reason is given.
CHANGEABLE = frozenset(
    {
        "tokens", "lr", "warmup", "decay", "decay_share", "clip", "weight_decay", "k", "sparsity",
        "l0", "aux_weight",
    }
)  # fmt: skip


class RunRecord:
    """The settings of a run folder.

    Args:
        folder: of the run.
        facts: of `PARTS`, as JSON values.

    Attributes:
        content: of the file, once it was read.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._path, self._facts = folder / SETTINGS, facts
        self.content: dict[str, Any] = {}

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the record of a run that is there.

        Raises:
            InputError: there is none, or it is damaged.
        """
        if not (folder / SETTINGS).is_file():
            raise InputError(f"finish: expected the folder of a run, got no {SETTINGS} in {folder}")
        record = cls(folder, {})
        record.content = _whole(record._path)
        return record

    def is_finished(self) -> bool:
        """Return whether the file says that the run has ended; damaged or missing = it has not."""
        try:
            self.content = _whole(self._path)
        except (InputError, OSError):
            return False
        return self.finished is not None

    def create(self) -> None:
        """Write the file if it is not there."""
        if not self._path.exists():
            write_json(self._path, {**self._facts, "changes": [], "finished": None})

    def compare(self, reason: str, done: int) -> dict[str, list[Any]]:
        """Read the file and compare it with the settings now.

        Args:
            reason: why settings of `CHANGEABLE` differ; "" = they may not.
            done: rows trained on already.

        Returns:
            The settings that differ: name -> [there, now].

        Raises:
            InputError: settings differ that may not.
        """
        self.content = _whole(self._path)
        changed: dict[str, list[Any]] = {}
        for part in PARTS:
            wanted = self._facts.get(part, {})
            now = {name: value for name, value in wanted.items() if name not in self._free()}
            found = self.content.get(part, {})
            if part == "start":
                self._check_start(found, now)
                continue
            there = {name: found.get(name) for name in now}
            if part == "source":
                there |= {n: now[n] for n in _NEWER & now.keys() if n not in found}
                if _alike(there.get(SUMMARY), now.get(SUMMARY)):
                    there[SUMMARY] = now[SUMMARY]
            while (other := difference(there, now)) is not None:
                name, theirs, value = other
                if part == "source":
                    raise InputError(
                        f"Trainer: expected the rows of the run in {self._path.parent}, got others "
                        f"[{name}={theirs!r} there, {value!r} here]: choose another folder"
                    )
                if not reason or name not in CHANGEABLE:
                    raise InputError(self._refusal(name, theirs, value))
                changed[name] = [theirs, value]
                there[name] = value
        if "tokens" in changed and changed["tokens"][1] < done:
            raise InputError(
                f"Trainer: expected tokens >= {done} [trained on already], got "
                f"{changed['tokens'][1]}: finish the run as it is"
            )
        return changed

    def _free(self) -> frozenset[str]:
        """Return the settings that may differ. Selection has no penalty: older runs noted one."""
        kind = SaeConfig.from_json(self._facts["config"]).kind
        return _FREE if kind.takes("sparsity") else _FREE | {"sparsity"}

    def _check_start(self, found: dict[str, Any], now: dict[str, Any]) -> None:
        """Compare the weights that a run starts from, wherever their file is."""
        if found.get("digest") == now.get("digest"):
            return
        there, here = (
            f"{start.get('place') or 'a dictionary'} ({str(start['digest'])[:12]})"
            if start.get("digest")
            else "none"
            for start in (found, now)
        )
        raise InputError(
            f"Trainer: expected a start from {there} [the run in {self._path.parent}], got {here}: "
            "choose another folder"
        )

    def _refusal(self, name: str, theirs: Any, value: Any) -> str:
        hint = ", or give a reason for the change" if name in CHANGEABLE else ""
        return (
            f"Trainer: expected {name}={theirs!r} [the run in {self._path.parent}], got "
            f"{value!r}: go on with its settings, or choose another folder{hint}"
        )

    def change(self, changed: dict[str, list[Any]], reason: str, step: int) -> None:
        """Note changed settings and write them; the run is not finished any more."""
        entry = {"step": step, "reason": reason, "settings": changed}
        self.content = {
            **self.content,
            **self._facts,
            "changes": [*self.changes, entry],
            "finished": None,
        }
        write_json(self._path, self.content)

    def finish(self, step: int, *, early: bool) -> None:
        """Note that the dictionary of a step was written."""
        self.content = {**self.content, "finished": {"step": step, "early": early}}
        write_json(self._path, self.content)

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Changes of the settings, oldest first."""
        found = self.content.get("changes", [])
        return list(found) if isinstance(found, list) else []

    @property
    def finished(self) -> dict[str, Any] | None:
        """How the run ended; None = it has not. Versions that kept no note wrote the file last."""
        known = self.content.get("finished", {"early": False})
        return known if isinstance(known, dict) else None


def recorded_batch(folder: Path) -> int:
    """Return the rows of a step of the run in a folder; 0 = there is none.

    What is chosen by the number of rows must not change when a run is made longer.
    """
    try:
        batch = read_json(folder / SETTINGS)["train"]["batch"]
    except (InputError, OSError, KeyError, TypeError):
        return 0
    return batch if isinstance(batch, int) and not isinstance(batch, bool) and batch > 0 else 0


def _alike(a: Any, b: Any) -> bool:
    """Return whether two summaries are equal up to rounding; NaN is like nothing."""
    try:
        most = max(abs(float(value)) for value in b)
        return len(a) == len(b) and all(
            abs(x - y) <= _ROUNDING * most for x, y in zip(a, b, strict=True)
        )
    except (TypeError, ValueError):
        return False


def _whole(path: Path) -> dict[str, Any]:
    content = read_json(path)
    for part in PARTS:
        if not isinstance(content.get(part, {}), dict):
            raise InputError(
                f"{path}: expected names and values in {part}, got {type(content[part]).__name__}"
            )
    return content
