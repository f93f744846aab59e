# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.ops import Steering
from sidechain.reference.tap import tap as reference_tap
from sidechain.testing import generate, tiny_pipeline
from sidechain.vectors import SteeringVector
from taps.support import PROMPTS, by_hook, placed

COND, UNCOND = slice(2, 4), slice(0, 2)
CROSS_1 = "transformer_blocks.1.attn2"


def added(
    rows: slice, what: Tensor, tokens: slice = slice(None)
) -> Callable[[Tensor, int], Tensor]:
    def edit(out: Tensor, step: int) -> Tensor:
        v = what[step] if what.dim() == 2 else what
        out[rows, tokens] += v.to(out.dtype)
        return out

    return edit


class TestNumerics:
    def test_equals_a_plain_hook(self, pipe: Any, direction: Tensor) -> None:
        expected = by_hook(pipe, added(COND, 3 * direction))
        with sidechain.steer(pipe, {"cross:1": direction}, strength=3.0):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    def test_a_vector_for_each_step(self, pipe: Any) -> None:
        table = torch.randn(4, 16)
        expected = by_hook(pipe, added(COND, 2 * table))
        with sidechain.steer(pipe, {"cross:1": table}, strength=2.0):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    @pytest.mark.parametrize("tokens", [slice(1, None), slice(2, 7, 2)])
    def test_token_slice(self, pipe: Any, direction: Tensor, tokens: slice) -> None:
        expected = by_hook(pipe, added(COND, direction, tokens))
        with sidechain.steer(pipe, {"cross:1": direction}, Where(tokens=tokens)):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)
        mask = torch.zeros(9, dtype=torch.bool)
        mask[tokens] = True
        with sidechain.steer(pipe, {"cross:1": direction}, Where(tokens=mask)):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)
        with sidechain.steer(pipe, {"cross:1": direction}, Where(tokens=torch.stack([mask, mask]))):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    @pytest.mark.parametrize(
        ("mode", "cond", "uncond"),
        [
            ("cond_only", "cond", None),
            ("uncond_only", None, "uncond"),
            ("both_cond", "cond", "cond"),
            ("both_uncond", "uncond", "uncond"),
            ("separate", "cond", "uncond"),
            ("uncond_for_cond", "uncond", None),
            ("cond", "cond", None),
            ("uncond", None, "uncond"),
            ("all", "cond", "uncond"),
        ],
    )
    def test_branch_modes(self, pipe: Any, mode: str, cond: str | None, uncond: str | None) -> None:
        vectors = {"cond": torch.randn(4, 16), "uncond": torch.randn(4, 16)}

        def edit(out: Tensor, step: int) -> Tensor:
            if cond:
                out[COND] += vectors[cond][step]
            if uncond:
                out[UNCOND] += vectors[uncond][step]
            return out

        expected = by_hook(pipe, edit)
        tensors = {("cross:1", branch): value for branch, value in vectors.items()}
        with sidechain.steer(pipe, tensors, Where(branches=mode)):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    @pytest.mark.parametrize("steps", [(1, 3), (0.25, 0.75)])
    def test_step_window(self, pipe: Any, direction: Tensor, steps: Any) -> None:
        def edit(out: Tensor, step: int) -> Tensor:
            return added(COND, direction)(out, step) if 1 <= step < 3 else out

        expected = by_hook(pipe, edit)
        with sidechain.steer(pipe, {"cross:1": direction}, Where(steps=steps)):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    def test_heun(self, direction: Tensor) -> None:
        pipe = tiny_pipeline(scheduler="heun")
        table = torch.randn(5, 16)
        expected = by_hook(pipe, added(COND, table), steps=3)
        with sidechain.steer(pipe, {"cross:1": table}):
            torch.testing.assert_close(generate(pipe, PROMPTS, steps=3), expected)

    def test_removal_and_renorm(self, pipe: Any, direction: Tensor) -> None:
        v = direction / direction.norm()

        def edit(out: Tensor, step: int) -> Tensor:
            x = out[COND]
            y = x + (0.5 - 2.0 * (x @ v).clamp(min=0)[..., None]) * v
            out[COND] = y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True))
            return out

        expected = by_hook(pipe, edit)
        with sidechain.steer(pipe, {"cross:1": v}, strength=0.5, removal=2.0, renorm=True):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    def test_two_steers_sum(self, pipe: Any, direction: Tensor) -> None:
        other = direction.flip(0)
        expected = by_hook(pipe, added(COND, 2 * direction - other))
        with (
            sidechain.steer(pipe, {"cross:1": direction}, strength=2.0),
            sidechain.steer(pipe, {"cross:1": other}, strength=-1.0),
        ):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    def test_later_steers_act_on_earlier_ones(self, pipe: Any, direction: Tensor) -> None:
        v = direction / direction.norm()

        def edit(out: Tensor, step: int) -> Tensor:
            y = out[COND] + 3 * v
            out[COND] = y - (y @ v).clamp(min=0)[..., None] * v
            return out

        expected = by_hook(pipe, edit)
        with (
            sidechain.steer(pipe, {"cross:1": v}, strength=3.0),
            sidechain.steer(pipe, {"cross:1": v}, strength=0.0, removal=1.0),
        ):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, direction: Tensor, dtype: torch.dtype) -> None:
        """Added in float32 and rounded once; a hook in the model's dtype rounds v as well."""
        pipe = tiny_pipeline(dtype=dtype)

        def edit(out: Tensor, step: int) -> Tensor:
            out[COND] = (out[COND].float() + direction).to(dtype)
            return out

        expected = by_hook(pipe, edit, steps=2)
        with sidechain.steer(pipe, {"cross:1": direction}):
            assert torch.equal(generate(pipe, PROMPTS, steps=2), expected)

    def test_with_a_capture_at_the_same_site_nothing_changes(
        self, pipe: Any, direction: Tensor
    ) -> None:
        with sidechain.steer(pipe, {"cross:1": direction}):
            expected = generate(pipe, PROMPTS)
        for branches in ("cond", "uncond", "all"):
            for mode in ("cond_only", "both_cond"):
                with (
                    sidechain.steer(pipe, {"cross:1": direction}, Where(branches=mode)),
                    sidechain.capture(
                        pipe, Where("cross:*", branches=branches, tokens=slice(1, None))
                    ),
                    # The last one attached shares its call with the steer.
                    sidechain.capture(pipe, Where("cross:1", branches=branches)),
                ):
                    out = generate(pipe, PROMPTS)
                if mode == "cond_only":
                    assert torch.equal(out, expected)


class TestIdentity:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_strength_zero_is_bit_identical(self, direction: Tensor, dtype: torch.dtype) -> None:
        pipe = tiny_pipeline(dtype=dtype)
        plain = generate(pipe, PROMPTS, steps=2)
        vectors = {f"cross:{i}": direction for i in range(3)}
        with sidechain.steer(pipe, vectors, Where(branches="both_cond"), strength=0.0, renorm=True):
            assert torch.equal(generate(pipe, PROMPTS, steps=2), plain)
        with sidechain.steer(pipe, vectors, strength=5.0, which=[-1, -1]):
            assert torch.equal(generate(pipe, PROMPTS, steps=2), plain)

    def test_a_sample_at_strength_zero_is_bit_identical(self, pipe: Any, direction: Tensor) -> None:
        plain = generate(pipe, PROMPTS)
        with sidechain.steer(pipe, {"cross:0": direction}, strength=[0.0, 4.0]):
            out = generate(pipe, PROMPTS)
        assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], plain[1])


class TestPerSample:
    def test_a_sweep_in_one_batch_equals_one_run_each(self, pipe: Any, direction: Tensor) -> None:
        strengths = [-3.0, -1.0, 0.0, 2.0, 5.0]
        count = len(strengths)
        with sidechain.steer(pipe, {"cross:1": direction}, strength=strengths):
            batched = generate(pipe, ["piano song"] * count, seeds=[4] * count)
        for row, strength in zip(batched, strengths, strict=True):
            with sidechain.steer(pipe, {"cross:1": direction}, strength=strength):
                alone = generate(pipe, ["piano song"], seeds=[4])[0]
            assert (row - alone).norm() <= 2e-5 * alone.norm()

    def test_which_picks_vectors(self, pipe: Any, direction: Tensor) -> None:
        other = direction.flip(0)
        vectors = [{"cross:1": direction}, {"cross:1": other}]
        expected = []
        for vector in vectors:
            with sidechain.steer(pipe, vector, strength=2.0):
                expected.append(generate(pipe, PROMPTS))
        with sidechain.steer(pipe, vectors, strength=2.0, which=[1, 0]) as tap:
            out = generate(pipe, PROMPTS)
            assert torch.equal(out[0], expected[1][0]) and torch.equal(out[1], expected[0][1])
            tap.which = [0, -1]
            out = generate(pipe, PROMPTS)
            assert torch.equal(out[0], expected[0][0])
            assert torch.equal(out[1], generate_plain(pipe, tap)[1])

    def test_several_waveforms_are_ordered_by_prompt(self, pipe: Any, direction: Tensor) -> None:
        plain = generate(pipe, PROMPTS, num_waveforms_per_prompt=2)
        with sidechain.steer(pipe, {"cross:1": direction}, strength=[0, 2, 0, 0]):
            out = generate(pipe, PROMPTS, num_waveforms_per_prompt=2)
        assert [torch.equal(a, b) for a, b in zip(out, plain, strict=True)] == [
            True, False, True, True,
        ]  # fmt: skip


def generate_plain(pipe: Any, tap: Any) -> Tensor:
    strength = tap.strength
    tap.strength = 0
    out = generate(pipe, PROMPTS)
    tap.strength = strength
    return out


class TestLiveChange:
    def test_strength_between_runs(self, pipe: Any, direction: Tensor) -> None:
        expected = {}
        for strength in (1.0, 4.0):
            with sidechain.steer(pipe, {"cross:1": direction}, strength=strength):
                expected[strength] = generate(pipe, PROMPTS)
        with sidechain.steer(pipe, {"cross:1": direction}, strength=1.0) as tap:
            assert torch.equal(generate(pipe, PROMPTS), expected[1.0])
            tap.strength = 4.0
            assert torch.equal(generate(pipe, PROMPTS), expected[4.0])
            tap.strength = torch.tensor([1.0, 4.0])
            out = generate(pipe, PROMPTS)
            assert torch.equal(out[0], expected[1.0][0]) and torch.equal(out[1], expected[4.0][1])
            tap.strength = [1.0, 2.0, 3.0]
            assert len(generate(pipe, ["piano"] * 3)) == 3

    def test_within_a_run(self, pipe: Any, direction: Tensor) -> None:
        def edit(out: Tensor, step: int) -> Tensor:
            out[COND] += (1.0 if step < 2 else -2.0) * direction
            return out

        expected = by_hook(pipe, edit)
        tap = sidechain.steer(pipe, {"cross:1": direction}, strength=1.0)

        def change(step: int, timestep: int, latents: Tensor) -> None:
            if step == 1:
                tap.strength = -2.0

        with tap:
            out = generate(pipe, PROMPTS, callback=change)
        torch.testing.assert_close(out, expected)

    def test_removal_can_be_turned_on(self, pipe: Any, direction: Tensor) -> None:
        with sidechain.steer(pipe, {"cross:1": direction}, strength=0.0, removal=0.1):
            expected = generate(pipe, PROMPTS)
        with sidechain.steer(pipe, {"cross:1": direction}, strength=0.0) as tap:
            generate(pipe, PROMPTS)
            tap.removal = 0.1
            assert torch.equal(generate(pipe, PROMPTS), expected)

    def test_buffers_stay_where_they_are(self, pipe: Any, direction: Tensor) -> None:
        with sidechain.steer(pipe, {"cross:1": direction}) as tap:
            generate(pipe, PROMPTS)
            (operation,) = tap._operations[CROSS_1]
            before = [t.data_ptr() for t in operation.buffers if isinstance(t, Tensor)]
            tap.strength = [1.0, 2.0]
            generate(pipe, PROMPTS)
            after = [t.data_ptr() for t in operation.buffers if isinstance(t, Tensor)]
        assert before == after

    def test_inference_mode(self, pipe: Any, direction: Tensor) -> None:
        with sidechain.steer(pipe, {"cross:1": direction}) as tap:
            with torch.inference_mode():
                first = generate(pipe, PROMPTS)
            tap.strength = 1.0
            torch.testing.assert_close(generate(pipe, PROMPTS), first)


class TestTimeGrid:
    def test_another_number_of_steps_interpolates_and_says_so(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:1") as cap:
            generate(pipe, PROMPTS, steps=4)
        vector = SteeringVector({(CROSS_1, "cond"): torch.randn(4, 16)}, timesteps=cap.timesteps)
        pipe.scheduler.set_timesteps(6)
        moved = vector.resampled(pipe.scheduler.timesteps)
        with sidechain.steer(pipe, moved):
            expected = generate(pipe, PROMPTS, steps=6)
        with sidechain.steer(pipe, vector) as tap:
            with pytest.warns(RuntimeWarning, match=r"4 steps is interpolated .* 6 steps"):
                assert torch.equal(generate(pipe, PROMPTS, steps=6), expected)
            assert tap._steps_of_table == 6

    def test_without_timesteps_the_number_must_fit(self, pipe: Any) -> None:
        with (
            pytest.raises(ValueError, match=r"expected a vector of 1 or 4 steps .* got 3"),
            sidechain.steer(pipe, {"cross:1": torch.randn(3, 16)}),
        ):
            generate(pipe, PROMPTS)


class TestGradients:
    def test_gradient_is_that_of_the_reference(self, pipe: Any, direction: Tensor) -> None:
        text, extra = torch.randn(2, 10, 12), torch.randn(2, 1, 24)

        def run(latents: Tensor) -> Tensor:
            return (
                pipe.transformer(
                    latents, torch.ones(1), encoder_hidden_states=text, global_hidden_states=extra
                )
                .sample.square()
                .sum()
            )

        latents = torch.randn(2, 3, 8)
        v = direction / direction.norm()
        steering = Steering(v[None, None], strength=torch.tensor([2.0, 2.0]), renorm=True)
        module = sidechain.sites(pipe)["cross:1"].module
        handle = module.register_forward_hook(
            lambda m, a, out: reference_tap(out, steering=steering)[0]
        )
        plain = latents.clone().requires_grad_()
        (expected,) = torch.autograd.grad(run(plain), plain)
        handle.remove()
        leaf = latents.clone().requires_grad_()
        with (
            sidechain.steer(pipe, {"cross:1": v}, strength=2.0, renorm=True) as tap,
            sidechain.capture(pipe, "cross:1") as cap,
        ):
            tap.tracker.begin(samples=2)
            (got,) = torch.autograd.grad(run(leaf), leaf)
        torch.testing.assert_close(got, expected)
        assert cap["cross:1"].shape == (1, 1, 2, 16) and not cap["cross:1"].requires_grad


class TestContract:
    @pytest.mark.parametrize(
        ("vector", "arguments", "error", "match"),
        [
            ({"cross:9": torch.ones(16)}, {}, ValueError, "got 'cross:9'"),
            ({"cross:1": torch.ones(15)}, {}, ValueError, r"shape \[S, 16\] .* got \[15\]"),
            ({"cross:1": torch.ones(1, 1, 16)}, {}, ValueError, r"shape \[S, 16\]"),
            ({"cross:1": torch.ones(16).int()}, {}, TypeError, "got torch.int32"),
            ({"cross:1": [1.0] * 16}, {}, TypeError, "got list"),
            ({"cross:1": torch.full((16,), torch.nan)}, {}, ValueError, "expected a finite vec"),
            ({"cross:1": torch.ones(16, device="meta")}, {}, ValueError, "got meta"),
            ("piano.safetensors", {}, TypeError, "expected a SteeringVector"),
            ([], {}, ValueError, "expected at least one vector"),
            ({}, {}, ValueError, "expected"),
            ([{"cross:1": torch.ones(16)}] * 2, {}, ValueError, "expected which"),
            ([{"cross:1": torch.ones(16)}] * 2, {"which": [0, 2]}, ValueError, r"\[-1, 2\)"),
            (None, {"which": [0.5, 1]}, TypeError, "expected integers in which"),
            (None, {"strength": float("nan")}, ValueError, "expected finite strength, got nan"),
            (None, {"strength": [1.0, float("inf")]}, ValueError, "got inf"),
            (None, {"strength": "much"}, TypeError, "got 'much'"),
            (None, {"strength": True}, TypeError, "expected numbers in strength"),
            (None, {"strength": []}, ValueError, "expected strength"),
            (None, {"removal": float("nan")}, ValueError, "expected finite removal"),
            (None, {"branches": "both"}, ValueError, "expected branches to be one of"),
            (None, {"sites": "cross:0"}, ValueError, "expected a vector for transformer_blocks.0"),
            (None, {"steps": (1.0, 0.5)}, ValueError, "expected fractions"),
            (None, {"tokens": "all"}, TypeError, "expected tokens"),
        ],
    )
    def test_bad_options(
        self,
        pipe: Any,
        vector: Any,
        arguments: dict[str, Any],
        error: type[Exception],
        match: str,
    ) -> None:
        vector = {"cross:1": torch.ones(16)} if vector is None else vector
        with pytest.raises(error, match=match):
            sidechain.steer(pipe, vector, **placed(arguments))

    @pytest.mark.parametrize(
        ("arguments", "call", "match"),
        [
            ({"strength": [1.0, 2.0, 3.0]}, {}, "strength of length 1 or 2 .* got 3"),
            ({"which": [0, 0, 0]}, {}, "which of length 1 or 2"),
            ({"branches": "uncond_only"}, {"guidance_scale": 1.0}, "with the uncond branch"),
            ({"steps": (4, 5)}, {}, "at least one of 4 steps"),
            ({"tokens": slice(9, None)}, {}, r"within \[0, 9\)"),
        ],
    )
    def test_options_that_do_not_fit_the_run(
        self, pipe: Any, arguments: dict[str, Any], call: dict[str, Any], match: str
    ) -> None:
        calls: list[int] = []
        handle = sidechain.sites(pipe)["self:0"].module.register_forward_hook(
            lambda *_: calls.append(1)
        )
        with (
            pytest.raises(ValueError, match=match),
            sidechain.steer(pipe, {"cross:1": torch.ones(16)}, **placed(arguments)),
        ):
            generate(pipe, PROMPTS, **call)
        handle.remove()
        assert not calls

    def test_a_live_change_of_wrong_length(self, pipe: Any, direction: Tensor) -> None:
        tap = sidechain.steer(pipe, {"cross:1": direction})

        def change(step: int, timestep: int, latents: Tensor) -> None:
            tap.strength = [1.0, 2.0, 3.0]

        with pytest.raises(ValueError, match="strength of length 1 or 2"), tap:
            generate(pipe, PROMPTS, callback=change)

    def test_a_vector_of_another_model(self, direction: Tensor) -> None:
        from sidechain.pipelines import config_hash
        from sidechain.vectors import Provenance

        other = tiny_pipeline(layers=2)
        vector = SteeringVector(
            {(CROSS_1, "cond"): direction[None]},
            provenance=Provenance(config_hash=config_hash(other)),
        )
        with pytest.raises(ValueError, match="made for a denoiser with config hash"):
            sidechain.steer(tiny_pipeline(layers=3), vector)
