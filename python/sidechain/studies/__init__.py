# SPDX-License-Identifier: Apache-2.0
"""Studies: config -> run -> analyse -> tables and a page, in a run folder."""
