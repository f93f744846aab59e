# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.taps import options
from sidechain.testing import generate, tiny_pipeline
from taps.support import placed

PROMPTS = ["piano song", "drums loop"]
Hook = Callable[[Any, str, Callable[[Tensor], Tensor | None]], Any]


def outputs(pipe: Any, hooked: Hook, site: str, **call: Any) -> Tensor:
    """What a plain forward hook sees, [steps, R, T, C]."""
    seen: list[Tensor] = []
    handle = hooked(pipe, site, lambda out: seen.append(out.clone()))
    generate(pipe, PROMPTS, **call)
    handle.remove()
    return torch.stack(seen)


class TestNumerics:
    @pytest.mark.parametrize("branches", ["cond", "uncond", "all"])
    def test_mean_equals_a_plain_hook(self, pipe: Any, hooked: Hook, branches: str) -> None:
        plain = outputs(pipe, hooked, "cross:1").unflatten(1, (2, 2))  # [steps, branches, B, T, C]
        with sidechain.capture(pipe, Where("cross:*", branches=branches)) as cap:
            generate(pipe, PROMPTS)
        chosen = {"uncond": slice(0, 1), "cond": slice(1, 2), "all": slice(0, 2)}[branches]
        torch.testing.assert_close(cap["cross:1"], plain[:, chosen].mean(3))
        assert cap.branches == ("uncond", "cond")[chosen]

    def test_moments(self, pipe: Any, hooked: Hook) -> None:
        plain = outputs(pipe, hooked, "self:2")[:, None, 2:]
        with sidechain.capture(pipe, "self:2", reduce="mean_square") as cap:
            generate(pipe, PROMPTS)
        torch.testing.assert_close(cap["self:2"], plain.mean(3))
        torch.testing.assert_close(cap.mean_square("self:2"), plain.square().mean(3))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("tokens", [None, slice(1, None), slice(1, 8, 3)])
    def test_tokens_are_exact_copies(
        self, pipe: Any, hooked: Hook, tokens: slice | None, dtype: torch.dtype
    ) -> None:
        plain = outputs(pipe, hooked, "cross:0")[:, None, 2:]
        with sidechain.capture(
            pipe, Where("cross:0", tokens=tokens), reduce="tokens", dtype=dtype
        ) as cap:
            generate(pipe, PROMPTS)
        assert torch.equal(cap["cross:0"], plain[:, :, :, tokens or slice(None)].to(dtype))

    def test_token_slice_and_equal_mask_agree(self, pipe: Any, hooked: Hook) -> None:
        plain = outputs(pipe, hooked, "cross:0")[:, None, 2:]
        mask = torch.arange(9) >= 1
        per_sample = torch.stack([mask, torch.arange(9) < 4])
        with (
            sidechain.capture(pipe, Where("cross:0", tokens=slice(1, None))) as by_slice,
            sidechain.capture(pipe, Where("cross:0", tokens=mask)) as by_mask,
            sidechain.capture(pipe, Where("cross:0", tokens=per_sample)) as by_sample,
        ):
            generate(pipe, PROMPTS)
        torch.testing.assert_close(by_slice["cross:0"], plain[:, :, :, 1:].mean(3))
        torch.testing.assert_close(by_mask["cross:0"], by_slice["cross:0"])
        torch.testing.assert_close(by_sample["cross:0"][:, :, 0], by_slice["cross:0"][:, :, 0])
        torch.testing.assert_close(by_sample["cross:0"][:, 0, 1], plain[:, 0, 1, :4].mean(1))

    def test_step_window(self, pipe: Any) -> None:
        with (
            sidechain.capture(pipe, "cross:0") as every,
            sidechain.capture(pipe, Where("cross:0", steps=(1, 3))) as some,
            sidechain.capture(pipe, Where("cross:0", steps=(0.5, 1.0))) as late,
        ):
            generate(pipe, PROMPTS)
        assert torch.equal(some["cross:0"], every["cross:0"][1:3])
        assert torch.equal(late["cross:0"], every["cross:0"][2:])
        assert some.steps == (1, 2)
        assert torch.equal(some.timesteps, every.timesteps[1:3])
        assert some.sigmas is not None and every.sigmas is not None
        assert torch.equal(some.sigmas, every.sigmas[1:3])

    def test_guidance_off(self, pipe: Any, hooked: Hook) -> None:
        plain = outputs(pipe, hooked, "cross:1", guidance_scale=1.0)
        with sidechain.capture(pipe, Where("cross:1", branches="all")) as cap:
            generate(pipe, PROMPTS, guidance_scale=1.0)
        assert cap.branches == ("cond",)
        torch.testing.assert_close(cap["cross:1"], plain.mean(2)[:, None])

    def test_uncond_rows_are_zero_without_a_negative_prompt(self, pipe: Any) -> None:
        with sidechain.capture(pipe, Where("cross:*", branches="all")) as cap:
            generate(pipe, PROMPTS)
        assert not cap["cross:0"][:, 0].any() and cap["cross:0"][:, 1].any()

    def test_heun_has_an_entry_for_every_scheduler_step(self, hooked: Hook) -> None:
        pipe = tiny_pipeline(scheduler="heun")
        plain = outputs(pipe, hooked, "cross:1", steps=3)[:, None, 2:]
        with sidechain.capture(pipe, "cross:1") as cap:
            generate(pipe, PROMPTS, steps=3)
        assert cap["cross:1"].shape[0] == 5
        torch.testing.assert_close(cap["cross:1"], plain.mean(3))

    def test_several_waveforms_are_ordered_by_prompt(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:1") as cap:
            generate(pipe, PROMPTS, num_waveforms_per_prompt=2, seeds=[0, 1, 2, 3])
        for sample, (prompt, seed) in enumerate(
            [(PROMPTS[0], 0), (PROMPTS[0], 1), (PROMPTS[1], 2), (PROMPTS[1], 3)]
        ):
            with sidechain.capture(pipe, "cross:1") as alone:
                generate(pipe, [prompt], seeds=[seed])
            torch.testing.assert_close(
                cap["cross:1"][:, :, sample], alone["cross:1"][:, :, 0], rtol=2e-5, atol=2e-6
            )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_models(self, hooked: Hook, dtype: torch.dtype) -> None:
        pipe = tiny_pipeline(dtype=dtype)
        plain = outputs(pipe, hooked, "cross:1", steps=2)[:, None, 2:]
        with sidechain.capture(pipe, "cross:1") as cap:
            generate(pipe, PROMPTS, steps=2)
        torch.testing.assert_close(cap["cross:1"], plain.float().mean(3))

    def test_capture_reads_before_steering(self, pipe: Any, direction: Tensor) -> None:
        for outer_first in (True, False):
            cap = sidechain.capture(pipe, "cross:2")
            tap = sidechain.steer(pipe, {"cross:2": direction}, Where(steps=(0, 1)), strength=5.0)
            first, second = (cap, tap) if outer_first else (tap, cap)
            with first, second:
                generate(pipe, PROMPTS)
            with sidechain.capture(pipe, "cross:2") as plain:
                generate(pipe, PROMPTS)
            assert torch.equal(cap["cross:2"][0], plain["cross:2"][0])
            assert not torch.allclose(cap["cross:2"][1], plain["cross:2"][1])


class TestSeveralRuns:
    def test_runs_join_along_samples(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:0") as cap:
            generate(pipe, PROMPTS)
            first = cap["cross:0"]
            generate(pipe, ["flute"], seeds=[5])
        assert cap["cross:0"].shape == (4, 1, 3, 16)
        assert cap.labels.samples == 3
        assert torch.equal(cap["cross:0"][:, :, :2], first)

    def test_clear_forgets(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:0") as cap:
            generate(pipe, PROMPTS)
            first = cap["cross:0"]
            cap.clear()
            with pytest.raises(RuntimeError, match="expected at least one pipeline call"):
                cap["cross:0"]
            generate(pipe, PROMPTS)
        assert torch.equal(cap["cross:0"], first)

    def test_different_grids_do_not_join(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:0") as cap:
            generate(pipe, PROMPTS, steps=2)
            generate(pipe, PROMPTS, steps=3)
        with pytest.raises(ValueError, match="expected generations with equal steps"):
            cap["cross:0"]

    def test_a_run_that_raised_is_dropped_with_a_warning(self, pipe: Any) -> None:
        def stop(step: int, timestep: int, latents: Tensor) -> None:
            raise KeyboardInterrupt

        with sidechain.capture(pipe, "cross:0") as cap:
            with pytest.raises(KeyboardInterrupt):
                generate(pipe, PROMPTS, callback=stop)
            assert cap["cross:0"].shape[0] == 1
            with pytest.warns(RuntimeWarning, match="stopped after 1 of 4 steps"):
                generate(pipe, PROMPTS)
        assert cap["cross:0"].shape == (4, 1, 2, 16)

    def test_means_do_not_keep_tokens(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:*") as cap:
            generate(pipe, PROMPTS)
        assert cap.nbytes == 3 * 4 * 2 * (16 + 1) * 4


class TestContext:
    def test_context_is_what_the_projection_gives(self, pipe: Any) -> None:
        with sidechain.capture(pipe, Where("cross:*", branches="all"), reduce="context") as cap:
            generate(pipe, PROMPTS)
        assert cap["cross:0"].shape == (2, 2, 10, 12)
        assert not cap["cross:0"][0].any()
        assert torch.equal(cap["cross:0"], cap["cross:2"])

    def test_contexts_needs_no_full_run_and_no_global_randomness(self, pipe: Any) -> None:
        state = torch.get_rng_state()
        with sidechain.capture(pipe, "cross:0", reduce="context") as cap:
            generate(pipe, PROMPTS)
        text = sidechain.contexts(pipe, PROMPTS)
        assert torch.equal(text, cap["cross:0"][0])
        assert torch.equal(torch.get_rng_state(), state)
        assert sidechain.contexts(pipe, "piano song").shape == (1, 10, 12)
        torch.testing.assert_close(sidechain.contexts(pipe, "piano song")[0], text[0])


class TestWindow:
    @settings(max_examples=200, deadline=None)
    @given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
    def test_neighbouring_fractions_tile_the_run(self, steps: int, a: float, b: float) -> None:
        cuts = sorted({0.0, a, b, 1.0})
        covered: list[int] = []
        for start, stop in itertools.pairwise(cuts):
            window = options.Window.parse("x", (start, stop))
            try:
                covered += range(*window.resolve("x", steps))
            except ValueError as error:  # a window narrower than a step holds none
                assert "at least one" in str(error)
        assert covered == list(range(steps))


class TestContract:
    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"sites": "cross:8"}, ValueError, "sites: expected one of"),
            ({"reduce": "median"}, ValueError, "expected reduce"),
            ({"branches": "both"}, ValueError, "expected branches"),
            ({"dtype": torch.int32}, TypeError, "expected dtype"),
            ({"steps": (3, 1)}, ValueError, "expected 0 <= start < stop"),
            ({"steps": (0.5, 1.5)}, ValueError, "expected fractions"),
            ({"steps": 3}, TypeError, "expected steps as a pair"),
            ({"steps": ("0", 2)}, TypeError, "expected steps of int or float"),
            ({"tokens": slice(None, None, -1)}, ValueError, "step >= 1"),
            ({"tokens": 3}, TypeError, "expected tokens"),
            ({"tokens": torch.ones(9)}, TypeError, "expected tokens .* got torch.float32"),
            ({"reduce": "context", "sites": "self:0"}, ValueError, "expected cross-attention"),
            ({"reduce": "context", "steps": (0, 1)}, ValueError, "expected neither"),
            ({"reduce": "tokens", "tokens": torch.ones(9) > 0}, NotImplementedError, "a mask"),
        ],
    )
    def test_bad_options(
        self, pipe: Any, arguments: dict[str, Any], error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            sidechain.capture(pipe, **placed(arguments))

    @pytest.mark.parametrize(
        ("arguments", "call", "match"),
        [
            ({"steps": (7, 9)}, {}, "expected a window that holds at least one of 4 steps"),
            (
                {"branches": "uncond"},
                {"guidance_scale": 1.0},
                "expected a generation with the uncond",
            ),
            ({"tokens": slice(20, None)}, {}, r"expected tokens within \[0, 9\)"),
            ({"tokens": torch.ones(5) > 0}, {}, "expected a token mask of shape"),
        ],
    )
    def test_options_that_do_not_fit_the_run(
        self, pipe: Any, arguments: dict[str, Any], call: dict[str, Any], match: str
    ) -> None:
        before = [s.module.processor for s in sidechain.sites(pipe)]
        with pytest.raises(ValueError, match=match), sidechain.capture(pipe, **placed(arguments)):
            generate(pipe, PROMPTS, **call)
        assert all(
            s.module.processor is b for s, b in zip(sidechain.sites(pipe), before, strict=True)
        )

    def test_no_run(self, pipe: Any) -> None:
        with (
            pytest.raises(RuntimeError, match=r"got no call at transformer_blocks.1.attn2"),
            sidechain.capture(pipe, "cross:1"),
        ):
            pass

    def test_mean_square_needs_its_reduction(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:1") as cap:
            generate(pipe, PROMPTS)
        with pytest.raises(ValueError, match="expected reduce='mean_square'"):
            cap.mean_square("cross:1")
        with pytest.raises(ValueError, match="sites: expected one of"):
            cap["cross:0"]
