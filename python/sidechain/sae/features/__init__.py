# SPDX-License-Identifier: Apache-2.0
"""What the features of a dictionary stand for: scores, health."""
