# SPDX-License-Identifier: Apache-2.0
"""Scores: curves over a strength sweep, impact of sites, intervals, feature distance."""
