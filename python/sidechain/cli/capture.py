# SPDX-License-Identifier: Apache-2.0
"""`sidechain capture`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..studies.capture.config import CaptureConfig
from .builder import Command


def run(config: CaptureConfig, given: Mapping[str, Any]) -> int:
    """Record and print what is in the store."""
    from ..io.run_folder import MANIFEST, write_settings
    from ..studies import capture

    manifest = config.out / MANIFEST
    fresh = not manifest.exists()
    try:
        stores = capture.run(config)
    except BaseException:
        if fresh and manifest.exists():  # the store was made with these settings
            write_settings(config.out, "capture", config)
        raise
    write_settings(config.out, "capture", config)
    for site, found in stores.items():
        print(f"{config.out} {site}: {len(found)} rows of {found.width}")
    return 0


COMMAND = Command(
    CaptureConfig,
    run,
    "Generate from prompts and stream every token that the chosen sites put out into checksummed "
    "shards, with step, branch, prompt and token of every row. The same command continues a run "
    "that was cut off, and adds prompts to one that was finished.",
    replays=True,
)
