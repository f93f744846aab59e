# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.pipelines import config_hash
from sidechain.testing import generate, tiny_pipeline
from sidechain.vectors import PromptPairs, SteeringVector, caa

POSITIVE = ["piano song", "slow piano", "piano and bass", "happy piano loop", "jazz piano"]
NEGATIVE = ["violin song", "slow violin", "violin and bass", "happy violin loop", "jazz violin"]
SEEDS = [3, 1, 4, 1, 5]
PAIRS = PromptPairs(POSITIVE, NEGATIVE, seeds=SEEDS)


def naive(pipe: Any, site: str, **call: Any) -> Tensor:
    """mean a(x+) - mean a(x-) by plain hooks, one generation at a time; [steps, branches, C]."""
    module = sidechain.sites(pipe)[site].module
    means: dict[bool, list[Tensor]] = {True: [], False: []}
    for is_positive, prompts in ((True, POSITIVE), (False, NEGATIVE)):
        for prompt, seed in zip(prompts, SEEDS, strict=True):
            seen: list[Tensor] = []
            handle = module.register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(out.double().mean(1))
            )
            generate(pipe, [prompt], seeds=[seed], **call)
            handle.remove()
            means[is_positive].append(torch.stack(seen))
    return torch.stack(means[True]).mean(0) - torch.stack(means[False]).mean(0)


class TestNumerics:
    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_equals_the_formula(self, pipe: Any, batch_size: int) -> None:
        expected = naive(pipe, "cross:1")
        made = caa(
            pipe, PAIRS, "cross:1", batch_size=batch_size,
            normalise=False, progress=False, num_inference_steps=4,
        )  # fmt: skip
        for place, branch in enumerate(("uncond", "cond")):
            got = made["transformer_blocks.1.attn2", branch].double()
            want = expected[:, place]
            assert (got - want).norm() <= 2e-5 * expected.norm()

    def test_unit_norm(self, pipe: Any) -> None:
        raw, unit = (
            caa(
                pipe, PAIRS, Where("cross:*", "cond"), normalise=normalise,
                progress=False, num_inference_steps=3,
            )
            for normalise in (False, True)
        )  # fmt: skip
        for key, value in unit.tensors.items():
            torch.testing.assert_close(value.norm(dim=1), torch.ones(3))
            expected = raw.tensors[key] / raw.tensors[key].norm(dim=1, keepdim=True)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)

    def test_zero_context_gives_zero_not_nan(self, pipe: Any) -> None:
        made = caa(pipe, PAIRS, "cross:0", progress=False, num_inference_steps=2)
        assert not made["transformer_blocks.0.attn2", "uncond"].any()

    def test_a_planted_direction_is_recovered(self, pipe: Any) -> None:
        """The output moves along d exactly for positive prompts; CAA finds d."""
        d = torch.nn.functional.normalize(torch.randn(16), dim=0)
        module = sidechain.sites(pipe)["cross:2"].module

        def plant(m: Any, a: Any, out: Tensor) -> Tensor:
            # Rows are [uncond, cond] x [positive, negative]; positives are the first half.
            pairs = out.shape[0] // 4
            out = out.clone()
            out[2 * pairs : 3 * pairs] += 50.0 * d
            return out

        # Inside the module, so that the tap sees it too.
        inner = type(module.processor).__call__
        own = module.processor

        class Planted(type(own)):  # type: ignore[misc]
            def __call__(
                self,
                attn: Any,
                hidden_states: Tensor,
                encoder_hidden_states: Tensor | None = None,
                attention_mask: Tensor | None = None,
                rotary_emb: Any = None,
            ) -> Tensor:
                return plant(attn, None, inner(self, attn, hidden_states, encoder_hidden_states))

        module.set_processor(Planted())
        made = caa(
            pipe, PAIRS, Where("cross:2", "cond"), progress=False, num_inference_steps=2,
        )  # fmt: skip
        assert (made["transformer_blocks.2.attn2"] @ d > 0.99).all()

    def test_negative_prompt_and_guidance_off(self, pipe: Any) -> None:
        made = caa(
            pipe, PAIRS, "cross:0", progress=False, num_inference_steps=2,
            negative_prompt="rock",
        )  # fmt: skip
        assert made.branches == ["uncond", "cond"]
        made = caa(
            pipe, PAIRS, "cross:0", progress=False, num_inference_steps=2,
            guidance_scale=1.0,
        )  # fmt: skip
        assert made.branches == ["cond"]

    def test_heun(self) -> None:
        made = caa(
            tiny_pipeline(scheduler="heun"), PAIRS, "cross:0", progress=False,
            num_inference_steps=3,
        )  # fmt: skip
        assert made.steps == 5


class TestProvenance:
    def test_what_is_kept(self, pipe: Any) -> None:
        made = caa(
            pipe, PromptPairs(POSITIVE, NEGATIVE, "piano", 7), "cross:0-1", progress=False,
            num_inference_steps=2, guidance_scale=5.0,
        )  # fmt: skip
        known = made.provenance
        assert (known.concept, known.method, known.positive, known.negative) == (
            "piano", "caa", 5, 5,
        )  # fmt: skip
        assert known.seeds == (7, 8, 9, 10, 11) and known.normalised
        assert known.call == {"num_inference_steps": 2, "guidance_scale": 5.0}
        assert made.config_hash == config_hash(pipe)
        pipe.scheduler.set_timesteps(2)
        assert torch.equal(made.timesteps, pipe.scheduler.timesteps.double())
        assert isinstance(made, SteeringVector)

    def test_progress_bar(self, pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
        caa(pipe, PromptPairs(POSITIVE, NEGATIVE, "piano"), "cross:0", num_inference_steps=2)
        assert "caa piano" in capsys.readouterr().err
        assert pipe._progress_bar_config == {"disable": True}  # as tiny_pipeline left it


class TestContract:
    @pytest.mark.parametrize(
        ("sides", "options", "error", "match"),
        [
            (([], []), {}, ValueError, "at least one, got 0"),
            ((["a"], ["a", "b"]), {}, ValueError, "got 1 positive and 2 negative"),
            (("piano", "drums"), {}, TypeError, "expected positive as a list"),
            ((["a"], [1]), {}, TypeError, "expected negative as a list"),
            ((["a"], ["b"]), {"seeds": []}, ValueError, "at least one seed"),
        ],
    )
    def test_bad_pairs(
        self, sides: Any, options: dict[str, Any], error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            PromptPairs(*sides, **options)

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"batch_size": 0}, ValueError, "expected batch_size >= 1"),
            ({"where": "cross:9"}, ValueError, "sites: expected one of"),
            ({"where": Where(steps=(0, 1))}, ValueError, "caa: expected all steps"),
            ({"generator": None}, ValueError, "expected no generator"),
            ({"where": Where(branches="none")}, ValueError, "expected branches"),
            ({"passes": "cond"}, TypeError, "caa: expected its own arguments .*got passes"),
        ],
    )
    def test_bad_calls(
        self, pipe: Any, arguments: dict[str, Any], error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            caa(pipe, PromptPairs(["a"], ["b"]), progress=False, **arguments)
