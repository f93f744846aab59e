# SPDX-License-Identifier: Apache-2.0
"""Where a concept enters: activation patching of every site, window and set of best sites."""

from __future__ import annotations

from .analyse import Localization
from .run import LocalizationConfig, check_equal, run

__all__ = ["Localization", "LocalizationConfig", "check_equal", "run"]
