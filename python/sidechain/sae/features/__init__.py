# SPDX-License-Identifier: Apache-2.0
"""Features of a dictionary: their health, and scores for concepts."""
