# SPDX-License-Identifier: Apache-2.0
"""Figures and one self-contained HTML page per study.

`sidechain.report.data` has the blocks of a page, `sidechain.report.html` renders and writes it,
`sidechain.report.figures` draws single figures, `sidechain.report.media.save_figure` saves them.
"""
