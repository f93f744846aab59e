# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.pipelines import config_hash
from sidechain.testing import generate, tiny_pipeline
from sidechain.vectors import Provenance, SteeringVector

A, B = "transformer_blocks.0.attn2", "transformer_blocks.1.attn2"


def vector(steps: int = 4, width: int = 16, seed: int = 0, **provenance: Any) -> SteeringVector:
    g = torch.Generator().manual_seed(seed)
    tensors = {
        (name, branch): torch.randn(steps, width, generator=g)
        for name in (A, B)
        for branch in ("uncond", "cond")
    }
    return SteeringVector(
        tensors,
        timesteps=torch.linspace(1.0, 0.0, steps),
        sigmas=torch.linspace(80.0, 0.1, steps),
        provenance=Provenance(**{"concept": "piano", "method": "test", **provenance}),
    )


def equal(a: SteeringVector, b: SteeringVector) -> bool:
    return list(a.tensors) == list(b.tensors) and all(
        torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors
    )


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        made = vector(seeds=(1, 2), call={"guidance_scale": 7.0}, positive=50, normalised=True)
        path = made.save(tmp_path / "piano.safetensors")
        read = SteeringVector.load(path)
        assert equal(read, made) and read.provenance == made.provenance
        assert torch.equal(read.timesteps, made.timesteps)
        assert torch.equal(read.sigmas, made.sigmas)
        assert [p.name for p in tmp_path.iterdir()] == ["piano.safetensors"]

    def test_metadata_can_be_read_by_others(self, tmp_path: Path) -> None:
        path = vector().save(tmp_path / "v.safetensors")
        with safetensors.safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["sidechain"])
            assert f"{A}/cond" in file.keys()  # noqa: SIM118
        assert metadata["format_version"] == 1
        assert metadata["semantics"] == "module output before residual"

    def test_a_failed_write_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = vector().save(tmp_path / "v.safetensors")
        before = path.read_bytes()

        def full(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space"):
            vector(seed=1).save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OSError):
            vector().save(tmp_path / "nowhere" / "v.safetensors")

    @pytest.mark.parametrize("damage", ["cut", "flip header", "text", "empty"])
    def test_damaged_files(self, tmp_path: Path, damage: str) -> None:
        path = vector().save(tmp_path / "v.safetensors")
        data = path.read_bytes()
        path.write_bytes(
            {
                "cut": data[: len(data) // 2],
                "flip header": data[:8] + bytes([data[8] ^ 0xFF]) + data[9:],
                "text": b"not a tensor file",
                "empty": b"",
            }[damage]
        )
        with pytest.raises(ValueError, match="expected an intact safetensors file"):
            SteeringVector.load(path)

    def test_other_files(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file({"x": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match=r"expected a file of format 'sidechain.vector'"):
            SteeringVector.load(path)
        header = {"format": "sidechain.vector", "format_version": 2, "order": []}
        safetensors.torch.save_file({"x": torch.zeros(2)}, path, {"sidechain": json.dumps(header)})
        with pytest.raises(ValueError, match="expected format version 1, got 2"):
            SteeringVector.load(path)
        header = {"format": "sidechain.vector", "format_version": 1, "order": [["a", "cond"]]}
        safetensors.torch.save_file({"x": torch.zeros(2)}, path, {"sidechain": json.dumps(header)})
        with pytest.raises(ValueError, match="expected tensors for"):
            SteeringVector.load(path)
        with pytest.raises(FileNotFoundError, match="expected a file"):
            SteeringVector.load(tmp_path / "absent.safetensors")

    def test_loading_for_a_pipeline(self, tmp_path: Path) -> None:
        pipe = tiny_pipeline()
        path = vector(config_hash=config_hash(pipe)).save(tmp_path / "v.safetensors")
        SteeringVector.load(path, pipe)
        with pytest.raises(ValueError, match="expected a denoiser with config hash"):
            SteeringVector.load(path, tiny_pipeline(layers=2))
        path = vector(width=12).save(tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"expected width 12 .* got 16"):
            SteeringVector.load(path, pipe)


class TestAlgebra:
    def test_sum_difference_scale(self) -> None:
        a, b = vector(seed=1), vector(seed=2, concept="jazz")
        total = a + b
        assert torch.equal(total[A], a[A] + b[A]) and total.concept == "piano + jazz"
        assert torch.equal((a - b)[A, "uncond"], a[A, "uncond"] - b[A, "uncond"])
        assert torch.equal(a.scaled(2.5)[B], 2.5 * a[B])
        negative = -a
        assert equal(-negative, a)

    def test_normalised(self) -> None:
        made = vector().normalised()
        assert all(torch.allclose(n, torch.ones(4)) for n in made.norms().values())
        assert made.provenance.normalised and not made.scaled(2).provenance.normalised
        zero = SteeringVector({(A, "cond"): torch.zeros(1, 16)}).normalised()
        assert not zero[A].any()

    def test_restricted_and_mean(self) -> None:
        pipe = tiny_pipeline()
        made = vector()
        assert made.restricted(pipe, "cross:1").sites == [B]
        assert torch.equal(made.mean_over_steps()[A], made[A].mean(0, keepdim=True))
        with pytest.raises(ValueError, match="expected sites of"):
            made.restricted(pipe, "cross:1-2")

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10_000), st.booleans(), st.floats(0.01, 100))
    def test_random_like_has_the_same_norms(self, seed: int, per_step: bool, scale: float) -> None:
        made = vector(seed=seed).scaled(scale)
        random = made.random_like(seed, per_step=per_step)
        for key, norm in made.norms().items():
            torch.testing.assert_close(random.norms()[key], norm)
            cosine = torch.nn.functional.cosine_similarity(random[key], made[key])
            assert (cosine.abs() < 0.999).all()
        assert equal(random, made.random_like(seed, per_step=per_step))
        first = random[A] / random[A].norm(dim=1, keepdim=True)
        assert torch.allclose(first[0], first[1], atol=1e-5) != per_step

    def test_resampling_keeps_its_own_grid_and_lines(self) -> None:
        made = vector(steps=5)
        assert made.timesteps is not None
        same = made.resampled(made.timesteps)
        assert all(torch.equal(same[k], made[k]) for k in made.tensors)
        slope = torch.linspace(3.0, 1.0, 5)[:, None].expand(5, 16)
        line = SteeringVector({(A, "cond"): slope}, timesteps=torch.linspace(1.0, 0.0, 5))
        fine = line.resampled(torch.linspace(1.0, 0.0, 9))
        torch.testing.assert_close(fine[A][:, 0], torch.linspace(3.0, 1.0, 9))
        outside = line.resampled(torch.tensor([2.0, -1.0]))
        assert outside[A][:, 0].tolist() == [3.0, 1.0]

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.floats(0, 1000), min_size=1, max_size=8, unique=True), st.data())
    def test_resampling_stays_within_neighbours(self, times: list[float], data: Any) -> None:
        times = sorted(times, reverse=True)
        table = torch.randn(len(times), 3, generator=torch.Generator().manual_seed(1))
        made = SteeringVector({(A, "cond"): table}, timesteps=torch.tensor(times))
        target = data.draw(st.floats(-10, 1010))
        row = made.resampled(torch.tensor([target]))[A][0]
        assert (row <= table.amax(0) + 1e-5).all() and (row >= table.amin(0) - 1e-5).all()

    def test_repeated_timesteps_of_second_order_schedulers(self) -> None:
        made = SteeringVector(
            {(A, "cond"): torch.arange(5.0)[:, None].expand(5, 3)},
            timesteps=torch.tensor([9.0, 5.0, 5.0, 1.0, 1.0]),
        )
        assert made.resampled(torch.tensor([9.0, 7.0, 0.0]))[A].isfinite().all()


class TestContract:
    @pytest.mark.parametrize(
        ("tensors", "grid", "error", "match"),
        [
            ({}, None, ValueError, "at least one direction"),
            ({(A, "cond"): torch.ones(16)}, None, ValueError, r"expected \[S, C\]"),
            ({(A, "cond"): torch.ones(0, 16)}, None, ValueError, r"expected \[S, C\]"),
            ({(A, "cond"): torch.ones(2, 16).int()}, None, TypeError, "expected float tensors"),
            ({(A, "cond"): [1.0]}, None, TypeError, "got list"),
            (
                {(A, "cond"): torch.ones(2, 16), (B, "cond"): torch.ones(3, 16)},
                None, ValueError, "one number of steps",
            ),
            ({(A, "cond"): torch.ones(2, 16)}, torch.ones(3), ValueError, "expected timesteps"),
        ],
    )  # fmt: skip
    def test_bad_tensors(
        self, tensors: Any, grid: Tensor | None, error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            SteeringVector(tensors, timesteps=grid)

    def test_bad_sums(self) -> None:
        with pytest.raises(ValueError, match="expected equal sites"):
            vector() + SteeringVector({(A, "cond"): torch.ones(4, 16)})
        with pytest.raises(ValueError, match="expected equal sites"):
            vector(steps=4) + vector(steps=5)
        with pytest.raises(ValueError, match="one model"):
            vector(config_hash="a") + vector(config_hash="b")
        other = vector()
        other.timesteps = torch.linspace(5.0, 0.0, 4).double()
        with pytest.raises(ValueError, match="expected equal timesteps"):
            vector() + other
        with pytest.raises(TypeError):
            vector() + 1  # type: ignore[operator]

    def test_no_grid_no_resampling(self) -> None:
        made = SteeringVector({(A, "cond"): torch.ones(3, 16)})
        with pytest.raises(ValueError, match="expected a vector with timesteps"):
            made.resampled(torch.zeros(2))
        constant = SteeringVector({(A, "cond"): torch.ones(1, 16)})
        assert constant.resampled(torch.zeros(2))[A].shape == (2, 16)

    def test_unknown_site(self) -> None:
        with pytest.raises(ValueError, match="expected a site of"):
            vector()["cross:0"]


class TestSteering:
    def test_a_vector_steers_like_its_tensors(self) -> None:
        pipe = tiny_pipeline()
        prompts = ["piano song", "drums loop"]
        with sidechain.capture(pipe, "cross:0") as cap:
            generate(pipe, prompts)
        table = torch.randn(4, 16)
        made = SteeringVector({(A, "cond"): table}, timesteps=cap.timesteps)
        with sidechain.steer(pipe, {"cross:0": table}, strength=2.0):
            expected = generate(pipe, prompts)
        with sidechain.steer(pipe, made, strength=2.0):
            assert torch.equal(generate(pipe, prompts), expected)
        with pytest.raises(ValueError, match=r"expected a vector for .* the uncond branch"):
            sidechain.steer(pipe, made, Where(branches="uncond_only"))
