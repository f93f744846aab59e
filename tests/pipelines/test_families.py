# SPDX-License-Identifier: Apache-2.0
"""The contract of every pipeline family: taps see and change what plain hooks see and change."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.pipelines import adapter
from sidechain.pipelines.adapter import find_denoiser
from sidechain.testing import PIPELINES, call_tiny, contract, tiny_pipeline
from sidechain.testing.tiny import PROMPTS
from sidechain.testing.tiny.build import FAMILIES


@dataclass(frozen=True)
class Case:
    """A family and how it is called.

    Attributes:
        pipeline: name of the tiny pipeline.
        order: guidance branches in the order in which rows or calls come.
        calls: whether each branch is a call of its own.
        call: arguments of the pipeline that make it so.
        off: arguments that leave the cond branch alone; None = it has no guidance.
    """

    pipeline: str
    order: tuple[str, ...] = ("uncond", "cond")
    calls: bool = False
    call: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] | None = field(default_factory=lambda: {"guidance_scale": 1.0})


_NULL = ("cond", "uncond")
_ALONE: dict[str, Any] = {"order": ("cond",), "off": None}
_OTHER: dict[str, dict[str, Any]] = {
    "ace_step": {"order": _NULL},
    "longcat_audio": {"order": _NULL, "calls": True},
    "flux": _ALONE,
    "dit": {"order": _NULL},
    "ddpm": _ALONE,
    "wan": {"order": _NULL, "calls": True},
}
CASES = {name: Case(name, **_OTHER.get(name, {})) for name in PIPELINES if name != "wan22"}
CASES["stable_audio3_distilled"] = Case("stable_audio3", call={"guidance_scale": 1.0}, **_ALONE)
CASES["flux_true_guidance"] = Case(
    "flux",
    order=_NULL,
    calls=True,
    call={"true_cfg_scale": 3.0, "negative_prompt": ["a slow song"] * 2},
    off={"true_cfg_scale": 1.0},
)
STEPS = 3


class Runs(contract.Runs):
    """A tiny pipeline of a family, and what plain hooks saw of it."""

    def __init__(self, case: Case, pipe: Any) -> None:
        self.case = case
        super().__init__(pipe, self._run, case.order, case.calls, case.off)

    def _run(self, **changes: Any) -> Tensor:
        changes = {**self.case.call, **changes}
        return call_tiny(self.pipe, PROMPTS[:2], steps=STEPS, seeds=(0, 1), **changes)


@pytest.fixture(scope="module", params=CASES)
def runs(request: pytest.FixtureRequest) -> Runs:
    case = CASES[request.param]
    found = Runs(case, tiny_pipeline(case.pipeline))
    assert found.plain[1]  # run now, not first within a tap
    return found


class TestEveryFamily:
    def test_capture_changes_nothing_and_is_taken_out(self, runs: Runs) -> None:
        contract.capture_changes_nothing(runs)

    def test_capture_equals_plain_hooks(self, runs: Runs) -> None:
        contract.capture_equals_plain_hooks(runs)
        assert all(runs.captured[s].shape[2] == 2 for s in runs.sites)

    def test_steps_are_those_of_the_schedule(self, runs: Runs) -> None:
        contract.steps_are_those_of_the_schedule(runs)

    def test_cond_rows_are_those_of_a_run_without_guidance(self, runs: Runs) -> None:
        if runs.case.off is None:
            pytest.skip("the family has no guidance")
        contract.cond_rows_are_those_without_guidance(runs)

    def test_context_is_the_one_of_the_source(self, runs: Runs) -> None:
        contract.contexts_are_those_of_the_sources(runs)

    def test_strength_zero_is_no_steering(self, runs: Runs) -> None:
        contract.strength_zero_is_no_steering(runs)

    def test_steering_equals_a_plain_hook(self, runs: Runs) -> None:
        contract.steering_equals_a_plain_hook(runs)

    def test_patching_with_its_own_output_changes_nothing(self, runs: Runs) -> None:
        contract.patching_with_its_own_output_changes_nothing(runs)

    def test_patching_with_another_output_is_seen(self, runs: Runs) -> None:
        contract.patching_with_another_output_is_seen(runs)

    def test_patching_a_context_equals_a_plain_hook(self, runs: Runs) -> None:
        masked = runs.plain and runs.masked
        if all(s.kind != "cross" or s.name in masked for s in runs.sites):
            pytest.skip("no cross-attention, or only with masks")
        contract.patching_a_context_equals_a_plain_hook(runs)

    def test_a_masked_context_comes_with_its_mask(self, runs: Runs) -> None:
        if not (runs.plain and runs.masked):
            pytest.skip("no masks")
        name = min(runs.masked)
        with sidechain.capture(runs.pipe, name, reduce="context") as cap:
            runs.run()
        context, mask = cap[name][0].flip(0), cap.mask(name)
        assert mask is not None and mask.any(2).all()
        with (
            pytest.raises(ValueError, match="expected a context with its mask"),
            sidechain.patch(runs.pipe, name, context=context),
        ):
            runs.run()
        chosen = mask[0].flip(0).clone()
        chosen[0, 0] = False  # the samples may have masks alike, and theirs must not be exchanged
        number = itertools.count()

        def swap(module: Any, args: Any, kwargs: Any) -> Any:
            place = next(number)
            text, masks = (
                kwargs[name].clone() for name in ("encoder_hidden_states", "attention_mask")
            )
            rows = runs.cond_rows(place, text)
            rows.copy_(rows.flip(0))
            rows = runs.cond_rows(place, masks)
            if masks.dtype == torch.bool:
                rows.copy_(chosen[: len(rows)].view_as(rows))
            else:
                rows.copy_(torch.where(chosen[: len(rows)].view_as(rows), 0.0, -10_000.0))
            return args, {**kwargs, "encoder_hidden_states": text, "attention_mask": masks}

        module = sidechain.sites(runs.pipe)[name].module
        handle = module.register_forward_pre_hook(swap, with_kwargs=True)
        try:
            expected = runs.run()
        finally:
            handle.remove()
        with sidechain.patch(runs.pipe, name, context=(context, chosen)):
            found = runs.run()
        assert not torch.equal(found, runs.plain[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_half_precision(self, runs: Runs) -> None:
        half = Runs(runs.case, tiny_pipeline(runs.case.pipeline, dtype=torch.bfloat16))
        plain, outputs, _ = half.seen()
        place = Where("*", branches="all")
        with sidechain.capture(half.pipe, place, reduce="tokens", dtype=torch.bfloat16) as cap:
            assert torch.equal(half.run(), plain)
        contract.equals_hooks(half, cap, outputs)
        with sidechain.patch(half.pipe, place, output=cap):
            assert torch.equal(half.run(), plain)
        with sidechain.steer(half.pipe, half.directions(), strength=0.0):
            assert torch.equal(half.run(), plain)

    def test_timesteps_are_in_the_units_of_the_scheduler(self, runs: Runs) -> None:
        if find_denoiser(runs.pipe)[2].timestep is None:
            pytest.skip("the family cannot tell")
        contract.timesteps_are_in_the_units_of_the_scheduler(runs)

    def test_rows_of_a_batch_are_those_of_single_runs(self, runs: Runs) -> None:
        call = {k: v[:1] if isinstance(v, list) else v for k, v in runs.case.call.items()}
        with sidechain.capture(runs.pipe, "*", reduce="tokens") as alone:
            call_tiny(runs.pipe, PROMPTS[1], steps=STEPS, seeds=(1,), **call)
        place = runs.captured.branches.index("cond")
        for site in runs.sites:
            found, single = runs.captured[site][:, place, 1:], alone[site][:, 0]
            assert float((found - single).norm() / single.norm()) < 1e-3, site

    def test_several_samples_of_a_prompt(self, runs: Runs) -> None:
        argument = FAMILIES[runs.case.pipeline].per_prompt
        if argument is None or runs.case.pipeline == "sd_inpaint":
            pytest.skip("no such argument, or masked images that differ by the sample's number")
        with sidechain.capture(runs.pipe, "*") as cap:
            call_tiny(
                runs.pipe,
                PROMPTS[:2],
                steps=STEPS,
                seeds=(0, 5, 1, 6),
                **{**runs.case.call, argument: 2},
            )
        assert cap.labels.samples == 4
        place = runs.captured.branches.index("cond")
        for site in runs.sites:
            pair = runs.captured[site][:, place].mean(2)
            found = cap[site][:, 0, ::2]  # the samples that start from the noise of the pair
            assert float((found - pair).norm() / pair.norm()) < 1e-3, site


class TestSites:
    def test_audioldm2_reads_two_encoders_and_itself(self) -> None:
        found = sidechain.sites(tiny_pipeline("audioldm2"), "mid_block.*.attn2")
        assert [(s.kind, s.source, s.context_width) for s in found] == [
            ("self", None, 16), ("cross", 0, 16), ("cross", 1, 32), ("self", None, 16),
        ]  # fmt: skip

    def test_audioldm_reads_no_context(self) -> None:
        assert {s.kind for s in sidechain.sites(tiny_pipeline("audioldm"))} == {"self"}

    def test_unet_sites_come_in_the_order_in_which_they_run(self) -> None:
        parts = [s.name.partition("_")[0] for s in sidechain.sites(tiny_pipeline("sd"))]
        assert parts == ["down"] * 2 + ["mid"] * 2 + ["up"] * 4

    def test_joint_sites_have_ranges(self) -> None:
        pipe = tiny_pipeline("flux")
        assert sidechain.sites(pipe, "joint:0-1").aliases == ["joint:0", "joint:1"]
        assert sidechain.sites(pipe, kind="joint").aliases == ["joint:0", "joint:1"]
        assert "before the block's proj_out" in str(sidechain.sites(pipe))

    def test_two_denoisers_that_share_the_steps(self) -> None:
        with pytest.raises(NotImplementedError, match="got transformer and transformer_2"):
            sidechain.sites(tiny_pipeline("wan22"))

    def test_a_module_that_is_no_site_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = tiny_pipeline("sd")
        attn = sidechain.sites(pipe)["cross:3"]
        monkeypatch.setattr(attn.module, "added_kv_proj_dim", 8)
        assert f"no site: {attn.name} (its keys and values" in str(sidechain.sites(pipe))
        with pytest.raises(ValueError, match="an attention module, but no site: its keys"):
            sidechain.sites(pipe, attn.name)

    def test_one_context_for_sites_of_two_encoders(self) -> None:
        pipe = tiny_pipeline("audioldm2")
        with pytest.raises(ValueError, match=r"cross:0 \(source 0\) and cross:1 \(source 1\)"):
            sidechain.patch(pipe, "cross:*", context=torch.zeros(1, 3, 16))

    def test_keys_alone_where_keys_and_values_are_one_projection(self) -> None:
        pipe = tiny_pipeline("stable_audio3")
        with pytest.raises(NotImplementedError, match="expected separate, un-normed key and value"):
            sidechain.patch(pipe, "cross:0", key=torch.zeros(1, 4, 32))


class TestTokens:
    def test_one_mask_for_sites_of_unequal_tokens(self) -> None:
        pipe = tiny_pipeline("sd")
        mask = torch.ones(64, dtype=torch.bool)
        for tap in (
            sidechain.capture(pipe, Where("self:*", tokens=mask)),
            sidechain.steer(pipe, {"self:0": torch.ones(8), "self:1": torch.ones(16)},
                            Where(tokens=mask)),
        ):  # fmt: skip
            with (
                pytest.raises(ValueError, match=r"down_blocks.* with 64 and mid_block.* with 16"),
                tap,
            ):
                call_tiny(pipe)

    def test_a_slice_past_the_tokens_of_one_site(self) -> None:
        pipe = tiny_pipeline("sd")
        with (
            pytest.raises(ValueError, match=r"within \[0, 16\) \[tokens of mid_block"),
            sidechain.capture(pipe, Where("self:*", tokens=slice(20, 30))),
        ):
            call_tiny(pipe)

    def test_a_wrong_count_names_the_site(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = tiny_pipeline("sd")
        wrong = dataclasses.replace(find_denoiser(pipe)[2], tokens=lambda site, shape: 7)
        monkeypatch.setitem(adapter._REGISTRY, ("UNet2DConditionModel", None), wrong)
        with (
            pytest.raises(
                RuntimeError, match=r"expected an output of \[rows, 7, 16\] at mid_block"
            ),
            sidechain.capture(pipe, "mid_block.*.attn2"),
        ):
            call_tiny(pipe)

    def test_zeros_where_the_residual_is_inside(self) -> None:
        pipe = tiny_pipeline("ddpm")
        with pytest.raises(NotImplementedError, match="expected sites without a residual inside"):
            sidechain.patch(pipe, "self:0", ablate=True)

    def test_a_context_where_the_family_has_none(self) -> None:
        pipe = tiny_pipeline("audioldm")
        pipe.unet.register_forward_pre_hook(
            lambda m, args, kwargs: (
                args,
                {**kwargs, "encoder_hidden_states": torch.ones(2, 3, 8)},
            ),
            with_kwargs=True,
        )
        with (
            pytest.raises(RuntimeError, match="expected no encoder_hidden_states"),
            sidechain.capture(pipe, "*"),
        ):
            call_tiny(pipe)
