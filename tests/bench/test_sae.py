# SPDX-License-Identifier: Apache-2.0
"""The race of training steps on a small shape: everybody learns the same, rows say who counts."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sidechain.bench import results
from sidechain.bench import run as command
from sidechain.bench.cases import Row
from sidechain.bench.config import BenchSettings
from sidechain.bench.machine import Machine
from sidechain.bench.sae import common, encode, memory, peers, race
from sidechain.bench.sae.common import Batches
from sidechain.bench.sae.ours import OurTrainer
from sidechain.bench.sae.plain import DenseTrainer
from sidechain.bench.sae.race import Entry
from sidechain.bench.shape import Shape

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


class Lazy:
    """A trainer that never learns."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def step(self, x: torch.Tensor) -> None:
        self.tokens.append(len(x))

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


REFERENCE = Entry(race.REFERENCE, "plain", DenseTrainer)


def entry(name: str, trainer: Any, *, kind: str = "plain", bf16: bool = False) -> Entry:
    return Entry(name, kind, lambda shape, start: trainer, bf16=bf16)


def slower(lr: float) -> Entry:
    def make(shape: Shape, begin: common.Start) -> DenseTrainer:
        trainer = DenseTrainer(shape, begin)
        trainer.adam.param_groups[0]["lr"] = lr
        return trainer

    return Entry(f"lr {lr:g}", "plain", make)


@pytest.fixture(autouse=True)
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "SHAPES", {"cpu": (SHAPE,)})
    rates = {"f32": 2.0, "bf16": 1.0}
    monkeypatch.setattr(Machine, "matrix_rates", rates)


def measure(*everybody: Entry, kept: Any = None, seconds: float = 0.0) -> list[Row]:
    tables = race.rows(
        Machine("cpu"),
        shapes=race.SHAPES["cpu"],
        seconds=seconds,
        kept=kept,
        everybody=list(everybody),
    )
    return [row for rows in tables for row in rows]


class TestRace:
    def test_everybody_counts_or_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # At the width of the other tests rounding to bfloat16 alone is 10 % of the way.
        monkeypatch.setattr(race, "SHAPES", {"cpu": (Shape(256, 128, 1024, 8),)})
        entries = [e for e in race.entries("cpu") if e.kind != "compiled"]
        rows = measure(*entries)
        by_name = {row.provider: row for row in rows}
        assert by_name["dense fp32"].facts["counts"] == "yes"
        assert by_name["ours fp32"].times_plain is not None
        for row in rows:
            if row.kind != "peer":
                assert row.failed == "", row
                assert row.facts["counts"] == "yes", row
                assert row.facts["steps"] == race.PARITY_STEPS
            elif row.failed:
                assert row.failed.startswith(("ModuleNotFoundError", "ImportError")), row
        assert {"eai-sparsify", "sae-lens", "overcomplete", "llamascopium"} <= set(by_name)

    def test_rows_come_one_by_one(self) -> None:
        lazy = Lazy()
        everybody = [REFERENCE, entry("z", lazy)]
        tables = race.rows(Machine("cpu"), shapes=[SHAPE], seconds=0.0, everybody=everybody)
        assert [row.provider for row in next(tables)] == [race.REFERENCE]
        assert lazy.tokens == []

    def test_a_worse_loss_does_not_count(self) -> None:
        rows = measure(REFERENCE, entry("lazy", Lazy()), slower(0.8 * common.LR))
        assert [r.facts["counts"] for r in rows] == ["yes", "no", "no"]
        assert rows[1].times_plain is not None
        assert rows[1].times_plain > 1
        assert rows[0].times_plain == 1.0, "the lazy one is no baseline"

    def test_without_the_reference_nobody_counts(self) -> None:
        (row,) = measure(entry("lazy", Lazy()))
        assert (row.facts["counts"], row.times_plain) == ("unknown", None)

    def test_all_train_on_the_same_tokens_before_they_are_judged(self) -> None:
        judged: list[int] = []

        class Watched(Lazy):
            def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
                judged.append(sum(self.tokens))
                return super().reconstruct(x)

        slow, fast = Watched(), Watched()
        measure(entry("slow", slow))
        measure(entry("fast", fast), seconds=60.0)
        assert judged == 2 * [0, race.PARITY_STEPS * SHAPE.tokens]
        assert len(slow.tokens) == race.PARITY_STEPS
        assert len(fast.tokens) == race.WARM + race.MOST

    def test_ratios_are_of_the_steps_in_between(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine twice as slow for a while changes times, not ratios."""
        speed = {"now": 1.0}

        def timed(self: race.Race, trainer: Any, x: torch.Tensor) -> float:
            trainer.step(x)
            speed["now"] += 0.0 if isinstance(trainer, OurTrainer) else 0.25
            ours = isinstance(trainer, OurTrainer)
            return (1.0 if ours else trainer.lasts) * speed["now"]

        monkeypatch.setattr(race.Race, "_timed", timed)
        first, second = Lazy(), Lazy()
        first.lasts = second.lasts = 3.0  # type: ignore[attr-defined]
        a, b = measure(entry("a", first), entry("b", second))
        assert a.median_us is not None
        assert b.median_us is not None
        assert b.median_us > 1.3 * a.median_us
        assert b.facts["x ours"] == pytest.approx(a.facts["x ours"], rel=0.1)

    def test_a_breaking_trainer_keeps_its_row(self) -> None:
        class Broken:
            def step(self, x: torch.Tensor) -> None:
                raise ValueError("no such shape")

            def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
                return x

        rows = measure(REFERENCE, entry("b", Broken()))
        assert rows[1].failed == "ValueError: no such shape"
        assert rows[0].median_us


class TestGoingOn:
    def test_what_is_there_is_not_measured_again(self) -> None:
        first = measure(REFERENCE, entry("a", Lazy()))
        kept = {(row.case, row.dtype, row.provider): Row(**asdict(row)) for row in first}
        again, late = Lazy(), Lazy()
        rows = measure(REFERENCE, entry("a", again), entry("b", late), kept=kept)
        assert (again.tokens, len(late.tokens)) == ([], race.PARITY_STEPS)
        assert [r.median_us for r in rows[:2]] == [r.median_us for r in first]
        assert rows[2].facts["counts"] == "no", "judged by the reference of before"

    def test_what_failed_is_tried_again(self) -> None:
        kept = {
            (SHAPE.name, "f32", "a"): Row(SHAPE.name, "f32", "a", "peer", 0, 0, failed="absent")
        }
        (row,) = measure(entry("a", Lazy()), kept=kept)
        assert row.median_us

    def test_the_command_keeps_rows_of_its_commit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lazy, path = Lazy(), tmp_path / "r.json"
        monkeypatch.setattr(race, "entries", lambda device, compiled: [REFERENCE, entry("a", lazy)])
        monkeypatch.setattr(results, "commit", lambda: "abc1234")
        monkeypatch.setattr(Machine, "facts", lambda self: {
            "device": "cpu", "name": "here", "threads": 1, "limits": {}, "versions": {"torch": "2"},
        })  # fmt: skip
        steps = race.PARITY_STEPS
        calls = [({}, steps), ({}, steps), ({"fresh": True}, 2 * steps)]
        for options, wanted in calls:
            (run,) = command.run(
                BenchSettings(section="sae", only="steps", seconds=0.0, json=path, **options)
            )
            assert len(lazy.tokens) == wanted, options
            assert [row["provider"] for row in run["rows"]] == [race.REFERENCE, "a"]
        monkeypatch.setattr(results, "commit", lambda: "abc1234-dirty")
        for count in (3, 4):
            command.run(BenchSettings(section="sae", only="steps", seconds=0.0, json=path))
            assert len(lazy.tokens) == count * steps, "nobody knows what differs from the commit"
        assert f"{SHAPE.name}  a: " in capsys.readouterr().out

    def test_a_cut_keeps_every_row_so_far(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Cut(Lazy):
            def step(self, x: torch.Tensor) -> None:
                raise KeyboardInterrupt

        path = tmp_path / "r.json"
        monkeypatch.setattr(
            race, "entries", lambda device, compiled: [REFERENCE, entry("a", Cut())]
        )
        with pytest.raises(KeyboardInterrupt):
            command.run(BenchSettings(section="sae", only="steps", seconds=0.0, json=path))
        (run,) = results.read(path)
        assert (run["status"], len(run["rows"])) == ("cut off", 1)

    def test_unknown_part(self) -> None:
        with pytest.raises(ValueError, match=r"expected a part or a shape of sae \[steps, .*'no'"):
            command.run(BenchSettings(section="sae", only="no"))


class TestEmulated:
    """bfloat16 on a machine that has no such instructions."""

    @pytest.fixture(autouse=True)
    def emulated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Machine, "matrix_rates", {"f32": 60.0, "bf16": 1.0})

    def test_a_straight_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def timed(self: race.Race, trainer: Any, x: torch.Tensor) -> float:
            trainer.step(x)
            return 0.5 + 0.01 * len(x)

        monkeypatch.setattr(race.Race, "_timed", timed)
        trainer = Lazy()
        (row,) = measure(entry("dense bf16", trainer, bf16=True))
        assert max(trainer.tokens) == 2 * race.LEAST_TOKENS < SHAPE.tokens
        assert row.median_us == pytest.approx(1e6 * (0.5 + 0.01 * SHAPE.tokens))
        assert row.method == "extrapolated from 8 and 16 tokens"
        assert row.facts["counts"] == "unknown"

    def test_a_package_does_not_run(self) -> None:
        trainer = Lazy()
        (row,) = measure(entry("sae-lens bf16", trainer, kind="peer", bf16=True))
        assert row.failed == "bfloat16 is emulated here, 60 times slower"
        assert trainer.tokens == []


class TestEncode:
    def test_rows_of_a_shape(self) -> None:
        tables = list(encode.rows(Machine("cpu", seconds=0.0), [SHAPE], seconds=0.0))
        (rows,) = tables
        ours = [row for row in rows if row.kind == "ours"]
        assert rows[0].kind == "plain"
        assert {"recall", "equal sets", "in full"} <= set(ours[0].facts)
        assert ours[0].facts["equal sets"] == 1.0
        assert {row.provider: row.kind for row in rows}["product bf16"] == "part"
        kept = {(row.case, row.dtype, row.provider): row for row in rows}
        (again,) = encode.rows(Machine("cpu"), [SHAPE], seconds=0.0, kept=kept)
        assert again == rows


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
    SMALL = Shape(2048, 64, 8192, 16)

    def rows(self, shape: Shape) -> list[Row]:
        return [row for rows in memory.rows("cpu", shape) for row in rows]

    def test_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "CANDIDATES", ("dense fp32", "embedding_bag"))
        dense, bag = self.rows(self.SMALL)
        held = 2048 * 8192 * 4 / 2**20  # the pre-activations
        assert 1.5 * held < dense.facts["extra_mib"] < memory.DENSE_MATRICES * held
        assert dense.method == "peak"
        assert bag.facts["of dense"] < 1.0

    def test_what_does_not_fit_is_a_straight_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "CANDIDATES", ("dense fp32",))
        monkeypatch.setattr(
            memory, "_of_process", lambda name, shape, device: (5 * shape.tokens + 77) << 20
        )
        monkeypatch.setattr(memory, "_free", lambda device: 0)
        (line,) = self.rows(self.SMALL)
        assert line.method == "extrapolated from N=256 and 512"
        assert line.facts["extra_mib"] == 5 * self.SMALL.tokens + 77

    def test_kept_rows_are_the_base_of_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "CANDIDATES", ("dense fp32", "a"))
        monkeypatch.setattr(memory, "_of_process", lambda name, shape, device: 3 << 20)
        row = Row(SHAPE.name, "f32", "dense fp32", "memory", 0, 0, facts={"extra_mib": 30.0})
        kept = {(SHAPE.name, "f32", "dense fp32"): row}
        *_, (ours,) = memory.rows("cpu", SHAPE, kept)
        assert ours.facts == {"extra_mib": 3.0, "of dense": 0.1}

    def test_a_dying_process_is_a_failed_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "CANDIDATES", ("nobody",))
        (row,) = self.rows(SHAPE)
        assert "expected an entry of the race, got 'nobody'" in row.failed
