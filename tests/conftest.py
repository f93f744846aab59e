# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Generator
from typing import Any

import pytest
import torch

import shown
from pipelines import matrix

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# cuBLAS refuses deterministic mode without it; read when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# What a GPU host may lack: there torch, Triton and pytest are all that has to be.
MAY_LACK = (
    "diffusers", "transformers", "tokenizers", "peft", "librosa", "soundfile", "matplotlib",
    "tqdm", "pandas", "scipy", "jinja2", "hypothesis", "torchsde",
)  # fmt: skip


with contextlib.suppress(ModuleNotFoundError):
    import hypothesis

    # The same examples every time; `HYPOTHESIS_PROFILE=explore` draws others.
    hypothesis.settings.register_profile("fixed", derandomize=True)
    hypothesis.settings.register_profile("explore", derandomize=False)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure() -> None:
    # Several test processes share the cores; each with all of them would make them wait.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_sessionfinish(session: pytest.Session) -> None:
    sent = getattr(session.config, "workeroutput", None)  # of a process of xdist
    if sent is not None:
        sent["shown"] = shown.pack()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    shown.add(getattr(node, "workeroutput", {}).get("shown"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in [*matrix.lines(terminalreporter.stats), *shown.lines()]:
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(reason)


def _lacking(error: BaseException | None) -> str | None:
    """Why a module or a test cannot run on this host; None if the error is one to be seen."""
    while error is not None:
        package = (getattr(error, "name", None) or "").split(".")[0]
        known = isinstance(error, ModuleNotFoundError) and package in MAY_LACK
        if known and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    call: Any = getattr(report, "call", None)
    if report.failed and call is not None and call.excinfo is not None:
        reason = _lacking(call.excinfo.value)
        if reason is not None:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo is not None:
        reason = _lacking(call.excinfo.value)
        if reason is not None:
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"Skipped: {reason}")
    return report
