# SPDX-License-Identifier: Apache-2.0
"""The demo: localize, make vectors, sweep strengths, one page of results."""
