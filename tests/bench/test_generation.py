# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidechain.bench import generation
from sidechain.bench.machine import Machine


class Case:
    """Generations that return what they are told to."""

    name = "case"

    def __init__(self, **latents: float) -> None:
        self.latents = {name.replace("_", ", "): value for name, value in latents.items()}
        self.way = ""

    def make(self) -> Tensor:
        return torch.tensor([1.0, self.latents[self.way]])

    def ways(self) -> dict[str, Any]:
        return {way: lambda way=way: self.inside(way) for way in self.latents}

    def inside(self, way: str) -> Any:
        self.way = way
        return generation.contextlib.nullcontext()


class TestMeasured:
    def measure(self, **latents: float) -> list[Any]:
        return generation.measured(Case(**latents), Machine("cpu"), 0.0)  # type: ignore[arg-type]

    def test_rows_are_beside_their_own_plain_way(self) -> None:
        rows = self.measure(plain=2.0, plain_graph=2.0, taps=3.0, taps_graph=3.0)
        assert [row.provider for row in rows] == ["plain", "plain, graph", "taps", "taps, graph"]
        assert [row.kind for row in rows] == ["plain", "plain", "ours", "ours"]
        eager, graph = rows[2].facts["x plain"], rows[3].facts["x plain"]
        assert eager == pytest.approx(rows[2].median_us / rows[0].median_us, abs=1e-3)
        assert graph == pytest.approx(rows[3].median_us / rows[1].median_us, abs=1e-3)

    def test_a_graph_that_makes_something_else_is_refused(self) -> None:
        with pytest.raises(AssertionError, match="case, taps: expected the same latents"):
            self.measure(plain=2.0, plain_graph=2.0, taps=3.0, taps_graph=2.0)

    def test_taps_that_do_nothing_are_refused(self) -> None:
        with pytest.raises(AssertionError, match="expected taps that steer"):
            self.measure(plain=2.0, plain_graph=2.0, taps=2.0, taps_graph=2.0)


class TestGraph:
    def test_the_module_is_put_back(self) -> None:
        module = nn.Linear(3, 3)
        x = torch.randn(2, 3)
        expected = module(x)
        with generation.Graph(module):
            assert "forward" in vars(module)
            assert torch.equal(module(x), expected)
        assert "forward" not in vars(module)

    def test_structures_are_walked(self) -> None:
        made = {"a": (torch.ones(1), 3), "b": [torch.zeros(1), None]}
        double = generation._map(made, lambda t: t + 1)
        assert [float(t) for t in generation._tensors(double)] == [2.0, 1.0]
        assert double["a"][1] == 3

    @pytest.mark.gpu
    def test_a_replay_sees_new_arguments_and_buffers(self) -> None:
        class Module(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.strength = torch.ones(1, device="cuda")

            def forward(self, x: Tensor, *, rest: tuple[Tensor, ...]) -> tuple[Tensor]:
                return (x * self.strength + rest[0],)

        module, one = Module(), torch.ones(4, device="cuda")
        with generation.Graph(module):
            assert module(one, rest=(one,))[0].tolist() == [2.0] * 4
            module.strength.fill_(3.0)
            first = module(2 * one, rest=(one,))[0]
            assert first.tolist() == [7.0] * 4
            module(one, rest=(one,))
            assert first.tolist() == [7.0] * 4, "a later replay wrote over an earlier result"


def test_unknown_case() -> None:
    with pytest.raises(ValueError, match=r"part of the name of a case \[music-B1-steps2\]"):
        next(generation.rows(Machine("cpu"), only="x9", quick=True))


def test_quick_rows_agree() -> None:
    (rows,) = generation.rows(Machine("cpu", quick=True), seconds=0.0, quick=True)
    assert {row.case for row in rows} == {"music-B1-steps2"}
    assert all(row.median_us for row in rows)
