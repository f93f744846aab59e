# SPDX-License-Identifier: Apache-2.0
"""Studies: config -> run -> analyse -> tables, each in one run folder that can be continued (floor 5)."""
