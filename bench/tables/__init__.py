# SPDX-License-Identifier: Apache-2.0
"""The tables of bench/RESULTS.md and README.md, written from the files in bench/results.

    python -m bench.tables [--check] [--root FOLDER]

One module for each subject; each returns a `markdown.Section`.
"""
