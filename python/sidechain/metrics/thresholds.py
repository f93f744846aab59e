# SPDX-License-Identifier: Apache-2.0
"""Thresholds that settings name as their defaults: no import, so that settings need none either."""

#: A site is functional from this mean impact on (TADA, arXiv 2602.11910).
TAU = 0.10
