# SPDX-License-Identifier: Apache-2.0
"""Prompt pairs, concept templates and rendered music (floor 3)."""
