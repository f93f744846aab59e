# SPDX-License-Identifier: Apache-2.0
"""Thresholds that settings use as defaults; no imports, so that settings stay light."""

#: A site is functional from this mean impact on (TADA, arXiv 2602.11910).
TAU = 0.10
