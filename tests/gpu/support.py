# SPDX-License-Identifier: Apache-2.0
"""What the GPU tests share: streams, graphs and moves, which mean nothing on a CPU.

The same test bodies run on both devices. On the CPU they rehearse: a typing error must not wait for
a GPU to be found.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def on(device: str, value: T) -> T:
    """The same value with every tensor on a device."""
    moved: T = tree_map_only(Tensor, lambda t: t.to(device), value)
    return moved


def copied(value: T) -> T:
    """The same value with copies of the tensors."""
    made: T = tree_map_only(Tensor, lambda t: t.clone(), value)
    return made


@contextlib.contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Run the block on a stream of its own, ordered behind and before the current one."""
    if device == "cpu":
        yield
        return
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def captured(device: str, call: Callable[[], T]) -> Callable[[], T]:
    """Call once, then capture the call in a CUDA graph; returns its replay.

    The call changes its arguments twice before the first replay on no device: on the CPU, as on a
    GPU, it has run once when this returns.

    Returns:
        A function that replays and returns what the call returned: the same tensors every time.
    """
    if device == "cpu":
        call()
        return call
    with side_stream(device):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = call()

    def replay() -> T:
        graph.replay()
        return outcome

    return replay


@contextlib.contextmanager
def capture_begun(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand within a capture that is thrown away."""
    if device == "cpu":
        with monkeypatch.context() as patch:
            patch.setattr("sidechain._device.capturing", lambda: True)
            yield
        return
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        held = torch.zeros(1, device=device)  # a graph without any work is warned about
        yield
        del held


@contextlib.contextmanager
def memory(device: str, shared: Path, gigabytes: float) -> Iterator[None]:
    """Hold the memory of the GPU alone among the test processes, and give it back.

    Args:
        device: "cuda", or "cpu" for nothing.
        shared: folder that all the processes see.
        gigabytes: what the block takes at most; skipped where there is less.
    """
    if device == "cpu":
        yield
        return
    with open(shared / "gpu-memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"expected {gigabytes:.0f} GB of free GPU memory, got {free:.0f}")
        try:
            yield
        finally:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
