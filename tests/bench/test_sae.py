# SPDX-License-Identifier: Apache-2.0
"""The race of training steps on a small shape: everybody learns the same, rows say who counts."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from sidechain.bench.machine import Machine
from sidechain.bench.sae import common, memory, peers, race
from sidechain.bench.sae.common import Batches, Shape
from sidechain.bench.sae.ours import OurTrainer
from sidechain.bench.sae.plain import DenseTrainer

SHAPE = Shape(64, 32, 128, 4)


class TestBatches:
    def test_the_same_number_is_the_same_batch(self) -> None:
        a, b = Batches(SHAPE, "cpu"), Batches(SHAPE, "cpu")
        assert torch.equal(a[3], b[3])
        assert not torch.equal(a[3], a[4])
        assert torch.equal(next(iter(a)), a[0])

    def test_mean_is_small(self) -> None:
        x = Batches(Shape(20000, 32, 128, 4), "cpu")[0]
        assert x.mean(0).norm() < 0.05 * x.std() * 32**0.5

    def test_fvu(self) -> None:
        class Mean:
            def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
                return x.mean(0).expand_as(x)

        x = Batches(SHAPE, "cpu")[0]
        assert common.fvu(Mean(), x) == pytest.approx(1.0)  # type: ignore[arg-type]


class TestTrainers:
    """Each trainer's step against one written out in float64 by autograd."""

    def expected(self, steps: int) -> dict[str, torch.Tensor]:
        begin = common.start(SHAPE, "cpu")
        w = {
            "w_enc": begin.w_enc.double().requires_grad_(),
            "w_dec": begin.w_dec.double().requires_grad_(),
            "b_enc": torch.zeros(SHAPE.features, dtype=torch.float64, requires_grad=True),
            "b_dec": torch.zeros(SHAPE.width, dtype=torch.float64, requires_grad=True),
        }
        adam = torch.optim.Adam(w.values(), lr=common.LR)
        for number in range(steps):
            x = Batches(SHAPE, "cpu")[number].double()
            z = ((x - w["b_dec"]) @ w["w_enc"].T + w["b_enc"]).relu()
            kept = z * (z >= z.topk(SHAPE.k, dim=1).values[:, -1:])
            adam.zero_grad()
            (kept @ w["w_dec"] + w["b_dec"] - x).square().sum(1).mean().backward()
            with torch.no_grad():
                rows, grad = w["w_dec"], w["w_dec"].grad
                assert grad is not None
                grad -= (grad * rows).sum(1, keepdim=True) * rows
                adam.step()
                rows /= rows.norm(dim=1, keepdim=True)
        return {name: t.detach() for name, t in w.items()}

    @pytest.mark.parametrize("way", ["dense", "bag", "ours", "ours autograd"])
    def test_weights_after_three_steps(self, way: str) -> None:
        begin = common.start(SHAPE, "cpu")
        trainer: Any
        if way.startswith("ours"):
            trainer = OurTrainer(SHAPE, begin, path="autograd" if "autograd" in way else "fused")
        else:
            trainer = DenseTrainer(SHAPE, begin, bag=way == "bag")
        for number in range(3):
            trainer.step(Batches(SHAPE, "cpu")[number])
        expected = self.expected(3)
        got = trainer.state.weights if way.startswith("ours") else vars(trainer)
        for name, wanted in expected.items():
            # Adam turns the sign of a tiny gradient into a whole step: few elements may differ.
            apart = (got[name].double() - wanted).abs() > 0.05 * common.LR
            assert apart.double().mean() < 0.005, name


class TestRace:
    def test_everybody_counts_or_says_why(self) -> None:
        entries = [e for e in race.entries("cpu") if e.kind != "compiled"]
        machine = Machine("cpu", seconds=0.0)
        rows = race.race(SHAPE, machine, entries, steps=6, limit=60.0)
        by_name = {row.provider: row for row in rows}
        assert by_name["dense fp32"].facts["counts"] == "yes"
        assert by_name["dense fp32"].times_plain is not None
        for row in rows:
            if row.kind != "peer":
                assert row.failed == "", row
                assert row.facts["counts"] == "yes", row
            elif row.failed:
                assert row.failed.startswith(("ModuleNotFoundError", "ImportError")), row
        assert {"eai-sparsify", "sae-lens", "overcomplete", "llamascopium"} <= set(by_name)

    def entry(self, name: str, trainer: Any) -> race.Entry:
        return race.Entry(name, "plain", lambda shape, start: trainer)

    def test_a_worse_loss_does_not_count(self) -> None:
        class Lazy:
            def step(self, x: torch.Tensor) -> None: ...

            def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
                return torch.zeros_like(x)

        entries = [race.Entry("dense fp32", "plain", DenseTrainer), self.entry("lazy", Lazy())]
        rows = race.race(SHAPE, Machine("cpu"), entries, steps=3, limit=60.0)
        assert [r.facts["counts"] for r in rows] == ["yes", "no"]
        assert rows[1].times_plain is not None
        assert rows[1].times_plain > 1
        assert rows[0].times_plain == 1.0, "the lazy one is no baseline"

    def test_a_slow_trainer_stops_early(self) -> None:
        class Slow:
            steps = 0

            def step(self, x: torch.Tensor) -> None:
                self.steps += 1

        slow = Slow()
        entries = [self.entry("slow", slow)]
        (row,) = race.race(SHAPE, Machine("cpu"), entries, steps=9, limit=0.0)
        assert slow.steps == race.WARM + race.LEAST == row.facts["steps"]
        assert row.facts["counts"] == "unknown"

    def test_the_reference_does_all_its_steps(self) -> None:
        entries = [race.Entry(race.REFERENCE, "plain", DenseTrainer)]
        (row,) = race.race(SHAPE, Machine("cpu"), entries, steps=9, limit=0.0)
        assert (row.facts["steps"], row.facts["counts"]) == (9, "yes")

    def test_a_breaking_trainer_keeps_its_row(self) -> None:
        class Broken:
            def step(self, x: torch.Tensor) -> None:
                raise ValueError("no such shape")

        entries = [race.Entry("dense fp32", "plain", DenseTrainer), self.entry("b", Broken())]
        rows = race.race(SHAPE, Machine("cpu"), entries, steps=3, limit=60.0)
        assert rows[1].failed == "ValueError: no such shape"
        assert rows[0].median_us


class TestPeers:
    def test_hollow_modules_are_gone_again(self) -> None:
        with peers._without("surely_absent", "surely_absent.part"):
            import surely_absent.part  # type: ignore[import-not-found]

            assert surely_absent.part.anything is None
        assert "surely_absent" not in sys.modules
        assert "surely_absent.part" not in sys.modules

    def test_modules_that_exist_are_left_alone(self) -> None:
        with peers._without("json"):
            import json

            assert json.loads("1") == 1
        assert "json" in sys.modules


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
class TestMemory:
    def test_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "CANDIDATES", ("dense fp32", "embedding_bag"))
        dense, bag = memory.rows("cpu", Shape(2048, 64, 8192, 16))
        held = 2048 * 8192 * 4 / 2**20  # the pre-activations
        assert dense.facts["extra_mib"] > 1.5 * held
        assert bag.facts["of dense"] < 1.0

    def test_a_dying_process_is_a_failed_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "CANDIDATES", ("nobody",))
        (row,) = memory.rows("cpu", SHAPE)
        assert "expected an entry of the race, got 'nobody'" in row.failed
