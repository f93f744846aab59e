# SPDX-License-Identifier: Apache-2.0
"""Figures and one self-contained HTML page per study.

`sidechain.report.data` says what a report holds, `sidechain.report.html.write_report` writes it,
`sidechain.report.figures` draws single figures, `sidechain.report.media.save_figure` saves them.
"""
