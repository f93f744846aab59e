# SPDX-License-Identifier: Apache-2.0
"""The file with the scheduler step of each row, as several commands read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._errors import InputError


def read_steps(name: str, file: Path | None) -> Any:
    """Return the steps [N] in a .npy file, mapped; None without a file.

    Raises:
        InputError: no .npy file; `name` is the option that says where it is.
        OSError: it cannot be read.
    """
    if file is None:
        return None
    import numpy as np

    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: expected a .npy file of steps, got {file}: {reason}") from None
    if not isinstance(found, np.ndarray):
        raise InputError(f"{name}: expected a .npy file of steps, got {file} [several arrays]")
    return found
