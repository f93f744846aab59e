# SPDX-License-Identifier: Apache-2.0
"""What was seen to go wrong without a word: each gives the right value, or one clear line."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.testing import call_tiny, generate, tiny_pipeline

PROMPT = ["a happy song"]


def latents(pipe: Any, steps: int = 4, **call: Any) -> Tensor:
    return generate(pipe, PROMPT, steps=steps, **call)


def vectors(pipe: Any, *steps: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    sites = sidechain.sites(pipe, "cross:*")
    return {s.name: torch.randn(*steps, s.width, generator=g) for s in sites}


def denoise(pipe: Any, x: Tensor, timestep: Tensor, context: Tensor | None = None) -> Tensor:
    context = torch.zeros(1, 10, 12) if context is None else context
    found: Tensor = pipe.transformer(
        x, timestep, encoder_hidden_states=context, global_hidden_states=torch.ones(1, 1, 24),
        rotary_embedding=None, return_dict=False,
    )[0]  # fmt: skip
    return found


def cut(pipe: Any, first: int, *, index: bool, steps: int = 5) -> list[float]:
    """Denoise as image to image does: from a later timestep on; returns what the model saw."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    if index:
        scheduler.set_begin_index(first)
    x = pipe.prepare_latents(1, 3, 8, torch.float32, torch.device("cpu"), None)
    seen = []
    for t in scheduler.timesteps[first:]:
        denoise(pipe, x, t[None])
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
        seen.append(float(t))
    return seen


class TestSteps:
    @pytest.mark.parametrize("index", [True, False])
    @pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler"])
    def test_a_schedule_cut_at_the_front(self, scheduler: str, index: bool) -> None:
        if index and scheduler == "DDIMScheduler":
            pytest.skip("has no begin index")
        pipe = tiny_pipeline(scheduler=getattr(diffusers, scheduler)())
        with sidechain.capture(pipe) as cap:
            seen = cut(pipe, 2, index=index)
            assert cut(pipe, 2, index=index) == seen
        assert cap.steps == (2, 3, 4)
        assert cap.timesteps.tolist() == pytest.approx(seen)
        found = cap["cross:0"]
        assert found.shape[:3] == (3, 1, 2)  # both generations
        assert bool(found.isfinite().all())

    def test_windows_and_vectors_count_from_the_whole_schedule(self) -> None:
        pipe = tiny_pipeline(scheduler=diffusers.EulerDiscreteScheduler())
        vector = vectors(pipe, 5)
        with sidechain.steer(pipe, vector, Where(steps=(2, 3))) as tap:
            slots: list[int] = []
            tap._advance, plain = (
                lambda s, c, i: (plain(s, c, i), slots.append(int(tap._slot)))[0],
                tap._advance,
            )  # type: ignore
            cut(pipe, 2, index=True)
        assert slots == [2, -1, -1]

    def test_a_context_is_recorded_wherever_the_schedule_begins(self) -> None:
        pipe = tiny_pipeline(scheduler=diffusers.EulerDiscreteScheduler())
        found = []
        for first in (0, 1):
            with sidechain.capture(pipe, reduce="context") as cap:
                scheduler = pipe.scheduler
                scheduler.set_timesteps(3)
                pipe.prepare_latents(1, 3, 8, torch.float32, torch.device("cpu"), None)
                timestep = scheduler.timesteps[first : first + 1]
                denoise(pipe, torch.ones(1, 3, 8), timestep, torch.ones(1, 10, 12))
            found.append(cap["cross:0"])
        assert bool(found[0].any()) and torch.equal(*found)

    def test_a_scheduler_step_elsewhere_is_refused(self) -> None:
        pipe = tiny_pipeline(scheduler=diffusers.DDIMScheduler())
        scheduler = pipe.scheduler
        with sidechain.capture(pipe), pytest.raises(RuntimeError, match="of step 3"):
            scheduler.set_timesteps(5)
            x = pipe.prepare_latents(1, 3, 8, torch.float32, torch.device("cpu"), None)
            denoise(pipe, x, torch.ones(1))
            scheduler.step(torch.zeros_like(x), scheduler.timesteps[3], x)

    def test_two_calls_in_one_step(self) -> None:
        pipe = tiny_pipeline()
        with sidechain.steer(pipe, vectors(pipe), strength=3.0) as tap:
            tap.tracker.begin(1, 1)
            denoise(pipe, torch.ones(1, 3, 8), torch.ones(1))
            with pytest.raises(RuntimeError, match=r"expected one denoiser call .*another one at"):
                denoise(pipe, torch.ones(1, 3, 8), torch.ones(1))

    def test_another_scheduler_is_another_grid(self) -> None:
        made = sidechain.vectors.caa(
            tiny_pipeline(), sidechain.vectors.PromptPairs(PROMPT, ["a sad song"]), "cross:0",
            num_inference_steps=6, progress=False,
        )  # fmt: skip
        own = made.tensors["transformer_blocks.0.attn2", "cond"]
        scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction")
        pipe = tiny_pipeline(scheduler=scheduler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with sidechain.steer(pipe, made) as tap:
                latents(pipe, 6)
        (table,) = tap._vectors["transformer_blocks.0.attn2"]
        order = made.sigmas.flip(0), pipe.scheduler.sigmas[:6].double()
        wanted = [
            int((made.sigmas - s).abs().argmin()) for s in order[1].clamp(order[0][0], order[0][-1])
        ]
        assert [int((own - row).norm(dim=1).argmin()) for row in table] == wanted
        assert len(set(wanted)) > 1

    def test_grids_that_do_not_meet_are_refused(self) -> None:
        pipe = tiny_pipeline()
        vector = sidechain.SteeringVector(
            {(s.name, "cond"): torch.ones(2, s.width) for s in sidechain.sites(pipe, "cross:*")},
            timesteps=torch.tensor([9e3, 8e3]), sigmas=torch.tensor([9e3, 8e3]),
        )  # fmt: skip
        message = "steer: expected a vector whose sigmas overlap"
        with pytest.raises(ValueError, match=message), sidechain.steer(pipe, vector):
            latents(pipe)


class TestCopies:
    def test_saved_processors_are_plain_afterwards(self) -> None:
        pipe = tiny_pipeline()
        plain = latents(pipe)
        with sidechain.steer(pipe, vectors(pipe), strength=3.0):
            saved = dict(pipe.transformer.attn_processors)
            latents(pipe)
        pipe.transformer.set_attn_processor(saved)
        assert torch.equal(latents(pipe), plain)
        with sidechain.steer(pipe, vectors(pipe), strength=3.0):  # and can be tapped again
            assert not torch.equal(latents(pipe), plain)
        assert torch.equal(latents(pipe), plain)

    def test_processors_of_a_tapped_pipeline_in_another(self) -> None:
        pipe, other = tiny_pipeline(), tiny_pipeline()
        plain = latents(other)
        with sidechain.steer(pipe, vectors(pipe), strength=3.0):
            other.transformer.set_attn_processor(dict(pipe.transformer.attn_processors))
            assert torch.equal(latents(other), plain)
            assert not torch.equal(latents(pipe), plain)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))],
        ids=["deepcopy", "copy", "pickle"],
    )  # fmt: skip
    def test_schedulers(self, copied: Callable[[Any], Any]) -> None:
        pipe, other = tiny_pipeline(), tiny_pipeline()
        plain = latents(tiny_pipeline(), 6)
        with sidechain.steer(pipe, vectors(pipe)):
            latents(pipe)
            other.scheduler = copied(pipe.scheduler)
            assert torch.equal(latents(other, 6), plain)
            assert len(pipe.scheduler.timesteps) == 4
        assert torch.equal(latents(other, 6), plain)
        assert "__getstate__" not in vars(pipe.scheduler)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
        ids=["deepcopy", "pickle"],
    )  # fmt: skip
    def test_denoisers(self, copied: Callable[[Any], Any]) -> None:
        pipe, other = tiny_pipeline(), tiny_pipeline()
        plain = latents(other)
        with sidechain.steer(pipe, vectors(pipe), strength=3.0):
            latents(pipe)
            other.transformer = copied(pipe.transformer)
            assert torch.equal(latents(other), plain)
            assert not torch.equal(latents(pipe), plain)
        assert torch.equal(latents(other), plain)

    def test_a_wrapper_of_the_user_stays(self) -> None:
        pipe, calls = tiny_pipeline(), []
        with sidechain.steer(pipe, vectors(pipe)):
            inner = pipe.scheduler.step

            def step(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return inner(*args, **kwargs)

            pipe.scheduler.step = step
            latents(pipe)
        assert len(calls) == 4
        latents(pipe)
        assert len(calls) == 8


class TestSites:
    def test_a_site_that_is_left_out(self) -> None:
        from diffusers.hooks import (
            PyramidAttentionBroadcastConfig,
            apply_pyramid_attention_broadcast,
        )

        pipe = tiny_pipeline()
        config = PyramidAttentionBroadcastConfig(
            cross_attention_block_skip_range=2, cross_attention_timestep_skip_range=(0, 1000),
            cross_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        )  # fmt: skip
        apply_pyramid_attention_broadcast(pipe.transformer, config)
        message = r"capture: expected one call of cross:0 .* of step \d, got 0"
        with pytest.raises(RuntimeError, match=message), sidechain.capture(pipe, "cross:0"):
            latents(pipe)

    def test_processors_replaced_after_a_generation(self) -> None:
        from diffusers.models.attention_processor import StableAudioAttnProcessor2_0

        pipe = tiny_pipeline()
        tap = sidechain.steer(pipe, vectors(pipe), strength=3.0)
        with pytest.warns(RuntimeWarning, match="was replaced while a tap was attached"), tap:
            latents(pipe)
            pipe.transformer.set_attn_processor(StableAudioAttnProcessor2_0())
            with pytest.raises(RuntimeError, match="steer: expected one call of cross:0"):
                latents(pipe)

    def test_a_site_that_runs_twice(self) -> None:
        pipe = tiny_pipeline()
        blocks = pipe.transformer.transformer_blocks
        plain = blocks[0].forward
        blocks[0].forward = lambda *a, **k: (plain(*a, **k), plain(*a, **k))[1]
        with pytest.raises(RuntimeError, match="got 2"), sidechain.capture(pipe, "cross:0"):
            latents(pipe)

    def test_compiled_blocks_keep_the_names_of_their_modules(self) -> None:
        pipe = tiny_pipeline()
        vector, blocks = vectors(pipe), pipe.transformer.transformer_blocks
        with sidechain.steer(pipe, vector, strength=3.0):
            wanted = latents(pipe)
        for i in range(len(blocks)):
            blocks[i] = torch.compile(blocks[i], backend="eager")
        with sidechain.steer(pipe, vector, strength=3.0):
            torch.testing.assert_close(latents(pipe), wanted)

    def test_an_unknown_denoiser_is_named(self) -> None:
        pipe = tiny_pipeline()
        pipe.transformer = torch.nn.Linear(1, 1)
        with pytest.raises(TypeError, match="transformer=Linear"):
            sidechain.sites(pipe)

    def test_a_lost_handle(self) -> None:
        pipe = tiny_pipeline()
        plain = latents(pipe)
        sidechain.steer(pipe, vectors(pipe)).attach()
        with pytest.warns(RuntimeWarning, match=r"steer: expected no other .*detach_all"):
            sidechain.steer(pipe, vectors(pipe)).attach()
        assert "steer at cross:0" in repr(sidechain.attached(pipe)[0])
        assert len(sidechain.detach_all(pipe)) == 2 and sidechain.attached(pipe) == []
        assert torch.equal(latents(pipe), plain)


class TestGradients:
    @pytest.mark.parametrize("steps", [1, 4])
    def test_checkpoints_see_the_step_of_their_forward_pass(self, steps: int) -> None:
        def gradients(checkpoints: bool) -> Tensor:
            pipe = tiny_pipeline()
            model = pipe.transformer.requires_grad_(True).train()
            if checkpoints:
                model.enable_gradient_checkpointing()
            with sidechain.steer(pipe, vectors(pipe), Where(steps=(0, 2)), strength=3.0) as tap:
                tap.tracker.begin(1, 4)
                loss = torch.zeros(())
                for _ in range(steps):
                    loss = loss + denoise(pipe, torch.ones(1, 3, 8), torch.ones(1)).pow(2).mean()
                    if steps > 1:
                        tap.tracker.next_step()
                loss.backward()
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            return torch.cat(grads)

        if steps == 1:
            torch.testing.assert_close(gradients(True), gradients(False))
        else:
            with pytest.raises(RuntimeError, match="expected backward before the next step"):
                gradients(True)

    def test_captures_leave_what_backward_has_saved(self) -> None:
        # Single blocks of Flux project what attention puts out, so its output is saved.
        pipe = tiny_pipeline("flux")
        calls: list[Any] = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda m, a, k: calls.append(k), with_kwargs=True
        )
        call_tiny(pipe, seeds=(0,), steps=1)
        handle.remove()
        pipe.transformer.requires_grad_(True)
        gradients = []
        for _ in range(2):
            pipe.transformer.zero_grad()
            cap = sidechain.capture(pipe, "*")
            with cap if gradients else contextlib.nullcontext():
                if gradients:
                    cap.tracker.begin(1, 1)
                pipe.transformer(**calls[0])[0].square().sum().backward()
            gradients.append([p.grad.clone() for p in pipe.transformer.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    def test_captures_count_a_recomputed_part_once(self) -> None:
        pipe = tiny_pipeline()
        pipe.transformer.requires_grad_(True).train().enable_gradient_checkpointing()
        with sidechain.capture(pipe, "cross:0") as cap:
            cap.tracker.begin(1, 1)
            denoise(pipe, torch.ones(1, 3, 8), torch.ones(1)).sum().backward()
        (layout,) = cap._layouts.values()
        assert bool((layout.buffers["transformer_blocks.0.attn2"].counts == 9).all())


class TestCachedContext:
    @pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=["plain", "bias"])
    def test_adapters_are_refused(self, options: dict[str, Any]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        pipe = tiny_pipeline()
        config = LoraConfig(target_modules=["to_v"], init_lora_weights=False, **options)
        inject_adapter_in_model(config, pipe.transformer)
        message = "cache_context: expected a plain Linear"
        with pytest.raises(NotImplementedError, match=message), sidechain.cache_context(pipe):
            latents(pipe)

    def test_weights_that_change_are_followed(self) -> None:
        def run(pipe: Any) -> Tensor:
            layer = pipe.transformer.transformer_blocks[0].attn2.to_v
            weight = layer.weight.detach().clone()

            def scaled(i: int, *ignored: Any) -> None:
                with torch.no_grad():
                    layer.weight.copy_(weight * (1 + i))

            found = latents(pipe, callback=scaled)
            scaled(0)
            return found

        pipe = tiny_pipeline()
        wanted = run(pipe)
        with sidechain.cache_context(pipe):
            torch.testing.assert_close(run(pipe), wanted, rtol=1e-4, atol=1e-5)

    def test_a_compiled_denoiser_is_refused(self) -> None:
        pipe = tiny_pipeline()
        pipe.transformer.compile(fullgraph=True, backend="eager")
        message = "expected a denoiser that is not compiled"
        with pytest.raises(NotImplementedError, match=message), sidechain.cache_context(pipe):
            latents(pipe)
