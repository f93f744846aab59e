# SPDX-License-Identifier: Apache-2.0
"""Studies (floor 5): config -> run -> analyse -> tables and a page, in a run folder."""
