# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidechain
from sidechain.testing import generate, tiny_pipeline

PROMPTS = ["violin song", "flute loop", "violin song"]


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[int]]:
    """Rows of every call of a module."""
    rows: list[int] = []
    handle = module.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    yield rows
    handle.remove()


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class TestEqualResults:
    @pytest.mark.parametrize("name", ["stable_audio", "music"])
    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_generation(self, name: str, guidance: float) -> None:
        pipe = tiny_pipeline(name)
        plain = generate(pipe, PROMPTS, guidance_scale=guidance)
        with sidechain.cache_context(pipe):
            shared = generate(pipe, PROMPTS, guidance_scale=guidance)
        assert error(shared, plain) <= 2e-5

    def test_with_a_negative_prompt(self) -> None:
        pipe = tiny_pipeline("music")
        plain = generate(pipe, PROMPTS, negative_prompt="drums")
        with sidechain.cache_context(pipe):
            shared = generate(pipe, PROMPTS, negative_prompt="drums")
        assert error(shared, plain) <= 2e-5

    def test_under_patch_capture_and_steer(self, direction: Tensor) -> None:
        pipe = tiny_pipeline("music")
        context = sidechain.contexts(pipe, PROMPTS[::-1])
        rows = {f"cross:{i}": [i == r for r in range(3)] for i in range(3)}

        def run() -> tuple[Tensor, Tensor]:
            with (
                sidechain.patch(pipe, "cross:*", context=context, rows=rows),
                sidechain.steer(pipe, {"cross:1": direction}, strength=[0.0, 1.0, 2.0]),
                sidechain.capture(pipe, "cross:*") as cap,
            ):
                return generate(pipe, PROMPTS), cap["cross:2"]

        plain, seen = run()
        with sidechain.cache_context(pipe):
            shared, seen_shared = run()
        assert error(shared, plain) <= 2e-5 and error(seen_shared, seen) <= 2e-5
        with sidechain.patch(pipe, "cross:*", context=context), sidechain.cache_context(pipe):
            inner = generate(pipe, PROMPTS)
        assert error(inner, generate(pipe, PROMPTS[::-1], seeds=[0, 1, 2])) <= 2e-5

    def test_a_context_that_changes_within_a_run(self) -> None:
        pipe = tiny_pipeline("music")
        other = pipe.encode_prompt(["drums"] * len(PROMPTS))

        def swap(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
            return {"prompt_embeds": other} if step == 1 else {}

        plain = generate(pipe, PROMPTS, callback_on_step_end=swap)
        with sidechain.cache_context(pipe):
            shared = generate(pipe, PROMPTS, callback_on_step_end=swap)
        assert error(shared, plain) <= 2e-5
        assert error(shared, generate(pipe, PROMPTS)) > 1e-3

    def test_split_contexts_take_the_models_own_path(self) -> None:
        pipe = tiny_pipeline("music")
        context = sidechain.contexts(pipe, PROMPTS[::-1])
        with sidechain.patch(pipe, "cross:*", key=context):
            plain = generate(pipe, PROMPTS)
            with sidechain.cache_context(pipe):
                shared = generate(pipe, PROMPTS)
        assert torch.equal(shared, plain)

    def test_gradients_take_the_models_own_path(self) -> None:
        pipe = tiny_pipeline("music")
        attn = sidechain.sites(pipe)["cross:0"].module
        hidden = torch.randn(2, 5, 16, requires_grad=True)
        context = torch.randn(2, 4, attn.to_k.in_features)
        plain = torch.autograd.grad(attn(hidden, context).sum(), hidden)[0]
        tap = sidechain.cache_context(pipe, "cross:0").attach()
        shared = torch.autograd.grad(attn(hidden, context).sum(), hidden)[0]
        with pytest.warns(RuntimeWarning, match="cache_context: expected every tapped site to run"):
            tap.remove()
        assert torch.equal(shared, plain)


class TestWorkSaved:
    def test_keys_once_a_run_and_text_queries_of_conditional_rows_alone(self) -> None:
        pipe = tiny_pipeline("music")
        attn = sidechain.sites(pipe)["cross:1"].module
        with (
            sidechain.cache_context(pipe),
            calls_of(attn.to_k) as keys,
            calls_of(attn.to_q) as queries,
        ):
            generate(pipe, PROMPTS, steps=4)
            generate(pipe, PROMPTS, steps=4)
        assert keys == [3, 3]  # two texts and zero, in each run
        assert queries == [3] * 8  # half of the six rows of guidance

    def test_processors_are_put_back(self, pipe: Any) -> None:
        before = [site.module.processor for site in sidechain.sites(pipe)]
        with sidechain.cache_context(pipe):
            generate(pipe, PROMPTS)
        assert all(
            site.module.processor is old
            for site, old in zip(sidechain.sites(pipe), before, strict=True)
        )


class TestBadInput:
    def test_self_attention(self, pipe: Any) -> None:
        with pytest.raises(ValueError, match="cross"):
            sidechain.cache_context(pipe, "self:*")

    def test_unknown_processor(self, pipe: Any) -> None:
        class Mine(type(sidechain.sites(pipe)["cross:1"].module.processor)):  # type: ignore[misc]
            pass

        sidechain.sites(pipe)["cross:1"].module.set_processor(Mine())
        with pytest.raises(NotImplementedError, match=r"cache_context: .* one of .* got Mine"):
            sidechain.cache_context(pipe)

    def test_rescaled_output(self, pipe: Any) -> None:
        sidechain.sites(pipe)["cross:0"].module.rescale_output_factor = 2.0
        with pytest.raises(NotImplementedError, match=r"plain attention at .*rescaled output"):
            sidechain.cache_context(pipe)

    def test_attention_mask(self, pipe: Any) -> None:
        attn = sidechain.sites(pipe)["cross:0"].module
        with sidechain.cache_context(pipe):
            generate(pipe, PROMPTS)
            with (
                pytest.raises(NotImplementedError, match="context alone, got attention_mask"),
                torch.no_grad(),
            ):
                attn(
                    torch.randn(1, 4, 16),
                    torch.randn(1, 10, attn.to_k.in_features),
                    attention_mask=torch.zeros(1, 1, 10),
                )
