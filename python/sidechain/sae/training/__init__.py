# SPDX-License-Identifier: Apache-2.0
"""Training of dictionaries: sources of rows, steps, checkpoints."""
