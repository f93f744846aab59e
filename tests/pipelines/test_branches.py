# SPDX-License-Identifier: Apache-2.0
"""Guidance branches that come as calls of their own, or at some of the steps only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.pipelines import PromptPairs
from sidechain.pipelines.adapter import find_denoiser
from sidechain.pipelines.schedule import Schedule
from sidechain.sae import Sae, SaeConfig
from sidechain.store import Sampling, record
from sidechain.testing import call_tiny, tiny_pipeline
from sidechain.testing.tiny import PROMPTS
from sidechain.vectors import caa

INTERVAL = {"cfg_interval_start": 0.3, "cfg_interval_end": 0.9, "guidance_scale": 3.0}
STEPS = 6


def run(pipe: Any, **call: Any) -> Tensor:
    return call_tiny(pipe, PROMPTS[:2], steps=STEPS, seeds=(0, 1), **call)


@contextmanager
def hooked(site: sidechain.Site) -> Iterator[list[Tensor]]:
    """Outputs of a site, one for each call."""
    found: list[Tensor] = []
    handle = site.module.register_forward_hook(lambda m, a, out: found.append(out.clone()))
    try:
        yield found
    finally:
        handle.remove()


def denoiser_calls(pipe: Any) -> list[tuple[Any, Any]]:
    """Arguments of the denoiser calls of a run."""
    calls: list[tuple[Any, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: calls.append((a, k)), with_kwargs=True
    )
    run(pipe)
    handle.remove()
    return calls


@pytest.fixture(scope="module")
def ace() -> Any:
    return tiny_pipeline("ace_step")


class TestGuidanceInterval:
    def test_rows_of_an_absent_branch_are_not_a_number(self, ace: Any) -> None:
        site = sidechain.sites(ace)["cross:1"]
        with hooked(site) as outputs:
            plain = run(ace, **INTERVAL)
        rows = [len(out) for out in outputs]
        assert set(rows) == {2, 4}
        assert rows[0] == 2  # a generation begins without guidance
        with sidechain.capture(ace, Where(site, branches="all"), reduce="tokens") as cap:
            assert torch.equal(run(ace, **INTERVAL), plain)
        assert cap.branches == ("cond", "uncond")
        assert cap.labels.present.tolist() == [[True, n == 4] for n in rows]
        for step, out in enumerate(outputs):
            assert torch.equal(cap[site][step, 0], out[:2])
            if len(out) == 4:
                assert torch.equal(cap[site][step, 1], out[2:])
            else:
                assert cap[site][step, 1].isnan().all()

    @pytest.mark.parametrize("branch", ["cond", "uncond"])
    def test_steering_acts_on_the_rows_of_its_branch(self, ace: Any, branch: str) -> None:
        site = sidechain.sites(ace)["cross:1"]
        direction = torch.randn(site.width, generator=torch.Generator().manual_seed(3))

        def add(module: Any, args: Any, out: Tensor) -> None:
            rows = out[:2] if branch == "cond" else out[2:]
            rows += direction

        handle = site.module.register_forward_hook(add)
        try:
            expected = run(ace, **INTERVAL)
        finally:
            handle.remove()
        with sidechain.steer(ace, {site.name: direction}, Where(site, f"{branch}_only")):
            found = run(ace, **INTERVAL)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(found, run(ace, **INTERVAL))

    def test_replaying_what_was_recorded_changes_nothing(self, ace: Any) -> None:
        place = Where("*", branches="all")
        with sidechain.capture(ace, place, reduce="tokens") as cap:
            plain = run(ace, **INTERVAL)
        with sidechain.patch(ace, place, output=cap):
            assert torch.equal(run(ace, **INTERVAL), plain)

    def test_two_generations_join(self, ace: Any) -> None:
        with sidechain.capture(ace, Where("cross:0", branches="all")) as cap:
            run(ace, **INTERVAL)
            run(ace, **INTERVAL)
        assert cap["cross:0"].shape[:3] == (STEPS, 2, 4)
        assert torch.equal(
            cap["cross:0"][:, :, :2].nan_to_num(), cap["cross:0"][:, :, 2:].nan_to_num()
        )

    def test_the_context_of_a_branch_that_comes_late(self, ace: Any) -> None:
        with sidechain.capture(ace, Where("cross:0", branches="all"), reduce="context") as cap:
            run(ace, **INTERVAL)
        with sidechain.capture(ace, Where("cross:0", branches="all"), reduce="context") as full:
            run(ace, guidance_scale=3.0)
        assert torch.equal(cap["cross:0"], full["cross:0"])

    def test_guidance_that_never_comes(self, ace: Any) -> None:
        with (
            pytest.raises(RuntimeError, match=r"branch to act on, got those of cond"),
            sidechain.capture(ace, Where("cross:0", branches="uncond")),
        ):
            run(ace, guidance_scale=1.0)

    def test_vectors_have_the_branches_that_all_steps_have(self, ace: Any) -> None:
        pairs = PromptPairs(list(PROMPTS[:2]), list(PROMPTS[2:]), "tempo")
        call = {
            "lyrics": ["la"] * 4, "audio_duration": 6.0, "max_text_length": 64,
            "num_inference_steps": STEPS, **INTERVAL,
        }  # fmt: skip
        with pytest.warns(RuntimeWarning, match=r"uncond branch for each of 6 steps, got"):
            vector = caa(ace, pairs, "cross:0", progress=False, **call)
        assert list(vector.branches) == ["cond"]
        assert vector["layers.0.cross_attn", "cond"].isfinite().all()
        with pytest.raises(ValueError, match=r"caa: expected a direction of the uncond branch"):
            caa(ace, pairs, Where("cross:0", branches="all"), progress=False, **call)

    def test_stores_hold_the_rows_there_were(self, ace: Any, tmp_path: Any) -> None:
        call = {
            "lyrics": ["la"] * 2, "audio_duration": 6.0, "max_text_length": 64,
            "num_inference_steps": STEPS, **INTERVAL,
        }  # fmt: skip
        place = Where("cross:0", branches="all")
        stores = record(
            ace, place, PROMPTS[:2], tmp_path, sampling=Sampling(batch_size=2), progress=False,
            **call,
        )  # fmt: skip
        with sidechain.capture(ace, place, reduce="tokens") as cap:
            run(ace, **INTERVAL)
        tokens = cap["cross:0"].shape[3]
        assert len(stores["cross:0"]) == int(cap.labels.present.sum()) * 2 * tokens


class TestCalls:
    @pytest.mark.parametrize("name", ["longcat_audio", "wan"])
    def test_guidance_off_is_the_cond_branch(self, name: str) -> None:
        pipe = tiny_pipeline(name)
        with sidechain.capture(pipe, Where("cross:0", branches="all"), reduce="tokens") as cap:
            run(pipe, guidance_scale=1.0)
        assert cap.branches == ("cond",)
        with (
            pytest.raises(RuntimeError, match=r"branch to act on, got those of cond"),
            sidechain.steer(
                pipe,
                {"cross:0": torch.ones(sidechain.sites(pipe)["cross:0"].width)},
                Where(branches="uncond_only"),
            ),
        ):
            run(pipe, guidance_scale=1.0)

    def test_edits_act_on_the_call_of_their_branch(self) -> None:
        pipe = tiny_pipeline("wan")
        site = sidechain.sites(pipe)["cross:0"]
        sae = Sae(SaeConfig(site.width, 8, "topk", k=8)).eval()
        row = 3.0 * sae.w_dec.detach()[2]
        number = iter(range(99))

        def add(module: Any, args: Any, out: Tensor) -> Tensor:
            return out + row if next(number) % 2 == 0 else out

        handle = site.module.register_forward_hook(add)
        expected = run(pipe)
        handle.remove()
        with sidechain.edit(pipe, {"cross:0": sae}, {2: ("add", 3.0)}):
            torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-5)

    def test_an_output_of_cond_is_not_given_to_uncond(self) -> None:
        pipe = tiny_pipeline("wan")
        with sidechain.capture(pipe, "cross:0", reduce="tokens") as cap:
            run(pipe)
        with (
            pytest.raises(ValueError, match=r"output for the uncond branch, got those of \['cond"),
            sidechain.patch(pipe, Where("cross:0", branches="all"), output=cap),
        ):
            run(pipe)

    def test_a_third_call(self) -> None:
        pipe = tiny_pipeline("longcat_audio")
        denoiser, (args, kwargs) = pipe.transformer, denoiser_calls(pipe)[0]
        with (
            pytest.raises(RuntimeError, match=r"expected 2 denoiser calls .*cond and uncond"),
            sidechain.capture(pipe, "cross:0") as cap,
        ):
            cap.tracker.begin(2, STEPS)
            for _ in range(3):
                denoiser(*args, **kwargs)

    def test_calls_are_taken_by_their_names(self) -> None:
        # The pipeline says which call it makes; the number of the call does not decide.
        pipe = tiny_pipeline("wan")
        denoiser, (args, kwargs) = pipe.transformer, denoiser_calls(pipe)[1]
        with sidechain.capture(pipe, Where("cross:0", branches="all")) as cap:
            cap.tracker.begin(2, 1)
            with torch.no_grad(), denoiser.cache_context("uncond"):
                denoiser(*args, **kwargs)
            assert cap.branches == ("uncond",)

    def test_samples_of_a_pipeline_without_latents_to_prepare(self) -> None:
        pipe = tiny_pipeline("dit")
        with sidechain.capture(pipe, Where("self:0", branches="all")) as cap:
            run(pipe)
        assert (cap.branches, cap.labels.samples) == (("cond", "uncond"), 2)


def test_the_first_step_is_read_where_nothing_else_says_it() -> None:
    # Flux divides its timesteps, so a schedule that was cut at the front is known by value only.
    pipe = tiny_pipeline("flux")
    adapter = find_denoiser(pipe)[2]
    schedule = Schedule()
    grid = torch.linspace(1000.0, 40.0, 25)
    schedule.start(grid)
    given = {"timestep": (grid[7].expand(2) / 1000).to(torch.bfloat16)}
    schedule.locate(adapter, None, (), given)
    assert schedule.step == 7
    schedule.start(grid)
    schedule.locate(adapter, None, (), {"timestep": torch.full((2,), 5.0)})  # other units
    assert schedule.step == 0
