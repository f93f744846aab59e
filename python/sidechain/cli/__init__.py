# SPDX-License-Identifier: Apache-2.0
"""The command line: one file per command, options from the dataclasses of its settings."""
