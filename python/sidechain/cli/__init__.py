# SPDX-License-Identifier: Apache-2.0
"""The command `sidechain`: one file per command."""
