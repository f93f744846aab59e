# SPDX-License-Identifier: Apache-2.0
"""The look-out itself: it sees each way to wait for a device, and nothing that does not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.support import on
from gpu.waits import HostWait, stand_in, waits_of

WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "float": lambda x: float(x[0, 0]),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "write behind a mask of rows": lambda x: x.__setitem__(x[:, 0] > 0, x[:1]),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: torch.unique(x, dim=0),
    "repeat of unknown length": lambda x: torch.repeat_interleave(x[0].long()),
    "numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "one number": lambda x: torch.tensor(1.0, device=x.device),
    "rows of the host": lambda x: torch.ones(4, 4).to(x.device),
    "rows of the host into place": lambda x: x.copy_(torch.ones(4, 4)),
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "fill": lambda x: torch.full((), 3.0, device=x.device),
    "scalar": lambda x: x.masked_fill_(x > 0, 2.0).add_(1.5),
    "one element": lambda x: x.__setitem__((0, 1), 2.0),
    "rows by number": lambda x: x[torch.arange(2, device=x.device)],
    "choice": lambda x: torch.where(x > 0, x, 0.0),
    "repeat of known length": lambda x: torch.repeat_interleave(
        torch.ones(4, dtype=torch.int64, device=x.device), output_size=4
    ),
}


@pytest.mark.parametrize("what", WAITING)
def test_sees(device: str, what: str) -> None:
    x = stand_in(device, on(device, torch.ones(4, 4)))
    expected: Any = HostWait if device == "cpu" else RuntimeError
    with pytest.raises(expected, match=r"waits|synchroni"), waits_of(device):
        WAITING[what](x)


@pytest.mark.parametrize("what", FREE)
def test_passes(device: str, what: str) -> None:
    x = stand_in(device, on(device, torch.ones(4, 4)))
    with waits_of(device) as found:
        FREE[what](x)
    assert found == []


def test_counts_what_is_allowed(device: str) -> None:
    x = stand_in(device, on(device, torch.ones(4, 4)))
    expected: Any = HostWait if device == "cpu" else AssertionError
    with pytest.raises(expected), waits_of(device, 1):
        for _ in range(2):
            torch.ones(4, 4).to(x.device)
    with waits_of(device, 1) as found:
        torch.ones(4, 4).to(x.device)
    assert len(found) == 1
