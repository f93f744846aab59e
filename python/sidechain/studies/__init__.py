# SPDX-License-Identifier: Apache-2.0
"""Studies: config -> run -> analyse -> tables, in a run folder that can be continued."""
