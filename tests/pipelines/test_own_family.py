# SPDX-License-Identifier: Apache-2.0
"""A family of a user's own: it keeps the contract, and each check of the contract can fail."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from pipelines.made_up import MADE_UP, MadeUpPipeline
from sidechain.pipelines import adapter, call_timestep, read_attention, register_adapter
from sidechain.taps import Steer, base, processor
from sidechain.testing import contract

NAME = ("MadeUpDenoiser", None)
_SWAPPED = {1: ("cond",), 2: ("uncond", "cond")}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_adapter("MadeUpDenoiser", MADE_UP)
    yield
    del adapter._REGISTRY[NAME]


@pytest.fixture
def runs() -> contract.Runs:
    pipe = MadeUpPipeline()
    run = functools.partial(pipe, ["piano", "drums"])
    return contract.Runs(pipe, run, ("cond", "uncond"), off={"guidance": 1.0})


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(runs: contract.Runs, check: Any) -> None:
    check(runs)


def test_its_places() -> None:
    found = sidechain.sites(MadeUpPipeline(), ["block:*", "mlp:*"])
    assert [(s.alias, s.name, s.element) for s in found] == [
        ("mlp:0", "layers.0.mlp", None), ("block:0", "layers.0", 1),
        ("mlp:1", "layers.1.mlp", None), ("block:1", "layers.1", 1),
    ]  # fmt: skip


# -- faults -------------------------------------------------------------------------------------


def family(**changes: Any) -> Any:
    """Plant a fault in the family."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = dataclasses.replace(MADE_UP, **changes)
        monkeypatch.setitem(adapter._REGISTRY, NAME, wrong)

    return plant


def attribute(owner: Any, name: str, value: Any) -> Any:
    """Plant a fault in the taps."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def _itself(self: Any, out: Tensor) -> Tensor:
    self.mark()
    return out


def _zeros(self: Any, out: Tensor) -> Tensor:
    self.mark()
    return out * 0


def _added(self: Any, out: Tensor) -> Tensor:
    for part in self.parts:
        part.mark()
    return out + 1.0


@pytest.mark.parametrize(
    ("check", "plant"),
    [
        (contract.capture_changes_nothing, attribute(base, "detach", lambda site, op: None)),
        (contract.capture_changes_nothing, attribute(processor.TapCall, "__call__", _added)),
        (contract.capture_equals_plain_hooks, family(branches=_SWAPPED)),
        (contract.steps_are_those_of_the_schedule,
         attribute(sidechain.taps.Capture, "timesteps", torch.zeros(3, dtype=torch.float64))),
        (contract.cond_rows_are_those_without_guidance, family(branches=_SWAPPED)),
        (contract.contexts_are_those_of_the_sources,
         family(describe=lambda name, module, denoiser: read_attention(module, "self"))),
        (contract.strength_zero_is_no_steering, attribute(processor.TapCall, "__call__", _added)),
        (contract.steering_equals_a_plain_hook, family(branches=_SWAPPED)),
        (contract.steering_equals_a_plain_hook,
         attribute(Steer, "_advance", lambda self, step, inside, call=0: None)),
        (contract.patching_with_its_own_output_changes_nothing,
         attribute(processor.Replace, "__call__", _zeros)),
        (contract.patching_with_another_output_is_seen,
         attribute(processor.Replace, "__call__", _itself)),
        (contract.patching_a_context_equals_a_plain_hook, family(branches=_SWAPPED)),
        (contract.patching_a_context_equals_a_plain_hook,
         attribute(processor.Swap, "__call__", _itself)),
        (contract.timesteps_are_in_the_units_of_the_scheduler,
         family(timestep=call_timestep(1, "time"))),
    ],
)  # fmt: skip
def test_a_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, runs: contract.Runs, check: Any, plant: Any
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(runs)
    sidechain.detach_all(runs.pipe)


def test_every_check_has_a_fault() -> None:
    (mark,) = test_a_fault_is_found.pytestmark  # type: ignore[attr-defined]
    assert {check for check, _ in mark.args[1]} == set(contract.CHECKS)
