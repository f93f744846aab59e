# SPDX-License-Identifier: Apache-2.0
"""Where a concept enters: activation patching of every site, window and set of best sites."""

from typing import TYPE_CHECKING

from ..._lazy import lazy

if TYPE_CHECKING:
    from .analyse import Localization
    from .config import LocalizationConfig
    from .run import check_equal, run

__all__ = ["Localization", "LocalizationConfig", "check_equal", "run"]

lazy(
    __name__,
    {
        "Localization": ".analyse",
        "LocalizationConfig": ".config",
        **dict.fromkeys(("check_equal", "run"), ".run"),
    },
)
