# SPDX-License-Identifier: Apache-2.0
"""Write bench/RESULTS.md and the measured table of README.md, or compare them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import hooks, music, ops, readme, sae, store, sweeps
from .files import Results
from .machines import machines
from .markdown import Section

START, END = "<!-- results -->", "<!-- /results -->"
HEAD = """\
# Results

`python -m bench.tables` writes this file from the files in `bench/results/`; nothing in it is
written by hand, and a test compares the two. Each table names the machine, the date and the commit
of its figures, and the command that measures them again.

Times are medians. "2.00x" against something means: twice as fast as that. A figure below 1.00x is a
loss, and losing rows stay in the tables.
"""


def results_page(results: Results) -> str:
    """The text of bench/RESULTS.md."""
    sections = [
        *(build(results) for build in (ops.section, ops.gpu_section, hooks.section, sae.section)),
        *(build(results) for build in (store.section, sweeps.section, music.section)),
    ]
    lines = [HEAD, "## Machines", *machines(results), "## Where we lose", *_losses(sections)]
    for section in sections:
        lines += [f"## {section.title}", *section.lines]
    return "\n".join(lines).rstrip("\n") + "\n"


def readme_page(results: Results, text: str) -> str:
    """The text of README.md with a new table between the markers.

    Raises:
        ValueError: the markers are not there, once each.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"tables: expected {START} and {END} once each in README.md")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return "\n".join([before + START, *readme.section(results), END]) + after


def _losses(sections: Sequence[Section]) -> list[str]:
    """Everything that is slower than what it is compared with, or that misses its aim."""
    lines = ["Rows that are slower than what stands beside them, or that miss the aim we set.", ""]
    for section in sections:
        if section.losses:
            lines += [f"{section.title}:", "", *(f"- {loss}" for loss in section.losses), ""]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or compare; returns 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if one differs"
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parents[2],
        help="folder of README.md and bench/ (default: of this checkout)",
    )
    options = parser.parse_args(arguments)
    results = Results(options.root / "bench" / "results")
    path, front = options.root / "bench" / "RESULTS.md", options.root / "README.md"
    wanted = {
        path: results_page(results),
        front: readme_page(results, front.read_text(encoding="utf-8")),
    }
    status = 0
    for file, text in wanted.items():
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            print(f"{file}: differs from bench/results; run python -m bench.tables")
            status = 1
        else:
            file.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
