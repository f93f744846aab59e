# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: runs the CUDA tests of an op on emulated kernels.

Inside, backend "cuda" means the kernels of csrc/cuda compiled as host C++ and called through their
own torch bindings with CPU tensors. Selected are the tests that take a backend, with "cuda"; those
that also take a case run once for every seed of the schedule and have to write the same bits each
time. The first seed stands for a GPU of sm_80, the others for sm_90, which has more shared memory.

    pytest -p emulated --emulation=LIBRARY --emulated-op=OP --seeds=3 tests/ops/test_OP*.py
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sidechain.ops
from ops import support
from sidechain.ops import _library

EMULATED: dict[str, str | None] = {}  # op -> why it is not
# Emulated threads above which a case runs at the first seed only.
LARGE = 20_000


class Emulation:
    """The loaded library, and what has run in it."""

    def __init__(self, path: str) -> None:
        torch.ops.load_library(path)
        self.library = ctypes.CDLL(path)
        self.library.emulation_report.restype = ctypes.c_char_p
        self.library.emulation_launches.restype = ctypes.c_char_p
        self.library.emulation_seed.argtypes = [ctypes.c_uint64]
        self.library.emulation_capability.argtypes = [ctypes.c_int]
        self.digests: dict[str, list[str]] = {}
        self.large: set[str] = set()
        self.runs: defaultdict[str, int] = defaultdict(int)

    def seed(self, seed: int) -> None:
        """Choose the schedule of threads, and the GPU that stands behind it."""
        self.library.emulation_seed(seed)
        self.library.emulation_capability(80 if seed == 1 else 90)

    def launches(self, call: Callable[[], object]) -> list[tuple[int, int, int, str]]:
        """(blocks, threads, dynamic shared bytes, kernel) of what a call launches; none runs."""
        self.library.emulation_dry(1)
        try:
            call()
            lines = self.library.emulation_launches().decode().splitlines()
        finally:
            self.library.emulation_dry(0)
        rows = [line.split(" ", 3) for line in lines]
        return [(int(b), int(t), int(shared), name) for b, t, shared, name in rows]

    def report(self) -> tuple[list[int], list[str]]:
        """[kernels, launches, blocks, threads], one line per kernel."""
        first, *lines = self.library.emulation_report().decode().splitlines()
        return [int(n) for n in first.split()], lines


class Digests(TorchDispatchMode):
    """Hashes what every call of an op of ours leaves in its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "sidechain":
            digest = hashlib.sha256(str(func).encode())
            for leaf in tree_leaves((args, kwargs, out)):
                if isinstance(leaf, torch.Tensor):
                    whole = leaf.detach().contiguous().view(-1).view(torch.uint8)
                    digest.update(whole.numpy().tobytes())
            self.found.append(digest.hexdigest())
        return out


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulation", required=True, help="library of emulated kernels")
    parser.addoption("--emulated-op", required=True, help="file stem of the op")
    parser.addoption("--seeds", type=int, default=3, help="schedules of each case")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.emulation = emulation = emulate(config.getoption("--emulation"))  # type: ignore[attr-defined]
    assert emulation.report()[0] == [0, 0, 0, 0]
    support.DEVICE["cuda"] = "cpu"


def emulate(path: str) -> Emulation:
    """Let backend "cuda" mean the emulated kernels of a library, in this process."""
    emulation = Emulation(path)
    for op in sidechain.ops.backends():
        implemented = torch._C._dispatch_has_kernel_for_dispatch_key(f"sidechain::{op}", "CPU")
        EMULATED[op] = None if implemented else f"{op} has no emulated kernel"
    _library.unavailable = unavailable
    _library.require = require
    return emulation


def unavailable(op: str, backend: str) -> str | None:
    if backend == "reference":
        return None
    return EMULATED[op] if backend == "cuda" else "only CUDA is emulated"


def require(op: str, backend: str, device: torch.device) -> None:
    reason = unavailable(op, backend)
    if reason is not None:
        raise RuntimeError(f"{op}: expected backend {backend!r} to be available, got: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "backend"} <= set(metafunc.fixturenames):
        metafunc.fixturenames.append("schedule")
        seeds = range(1, metafunc.config.getoption("--seeds") + 1)
        metafunc.parametrize("schedule", seeds, indirect=True, ids="seed{}".format)


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    def wanted(item: Any) -> bool:
        return hasattr(item, "callspec") and item.callspec.params.get("backend") == "cuda"

    config.hook.pytest_deselected(items=[i for i in items if not wanted(i)])
    kept = [i for i in items if wanted(i)]
    for item in kept:
        # pytest has dropped the name again: no function asks for it.
        if "schedule" in item.callspec.params and "schedule" not in item.fixturenames:
            item.fixturenames.insert(0, "schedule")
    # All cases at the first seed first: it decides which are large.
    items[:] = sorted(kept, key=lambda i: i.callspec.params.get("schedule", 1))


@pytest.fixture
def schedule(request: pytest.FixtureRequest) -> Iterator[None]:
    emulation: Emulation = request.config.emulation  # type: ignore[attr-defined]
    seed = request.param
    test = request.node.nodeid.replace(f"seed{seed}", "")
    if test in emulation.large:
        pytest.skip("large: runs at the first seed only")
    emulation.seed(seed)
    threads = emulation.report()[0][3]
    with Digests() as digests:
        yield
    emulation.runs[test] += 1
    if emulation.report()[0][3] - threads > LARGE:
        emulation.large.add(test)
    known = emulation.digests.setdefault(test, digests.found)
    assert known == digests.found, f"seed {seed} wrote other bits than seed 1"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    emulation: Emulation = config.emulation  # type: ignore[attr-defined]
    (kernels, launches, blocks, threads), lines = emulation.report()
    seeds = config.getoption("--seeds")
    all_seeds = sum(n == seeds for n in emulation.runs.values())
    op = config.getoption("--emulated-op")
    terminalreporter.write_line(
        f"emulation: {op}: {kernels} kernels x {len(emulation.runs)} cases x {seeds} seeds "
        f"({len(emulation.runs) - all_seeds} large ones at 1 seed): "
        f"{launches} launches, {blocks} blocks, {threads} threads"
    )
    for line in lines:
        terminalreporter.write_line(f"emulation: {op}: launches {line}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    emulation: Emulation = session.config.emulation  # type: ignore[attr-defined]
    if exitstatus == 0 and (emulation.report()[0][1] == 0 or not emulation.runs):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
