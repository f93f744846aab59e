# SPDX-License-Identifier: Apache-2.0
"""Studies (floor 5): config -> run -> analyse -> tables, in a run folder that can be continued."""
