# SPDX-License-Identifier: Apache-2.0
"""capture(reduce="heads"): what each head puts out before the output projection."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.taps.heads import output_projection
from sidechain.testing import tiny_pipeline
from taps.attention_reference import PROMPTS, run, seen_at

cached = importlib.import_module("sidechain.taps.cache_context")  # not the function

# Sites whose heads the reference computes, and the branches of the rows in order.
KNOWN = {
    "sd": ("*", ("uncond", "cond")),
    "sdxl": ("*", ("uncond", "cond")),
    "stable_audio": ("cross:*", ("uncond", "cond")),
    "audioldm2": ("*", ("uncond", "cond")),
    "ace_step": ("cross:*", ("cond", "uncond")),
    "pixart": ("*", ("uncond", "cond")),
    "flux": ("joint:*", ("cond",)),
    "sd3": ("*", ("uncond", "cond")),
}
# Arguments of the call of every family, of which the projection says what its output is.
OTHERS: dict[str, dict[str, Any]] = {
    "stable_audio": {}, "stable_audio3": {}, "audioldm": {}, "audioldm2": {}, "ace_step": {},
    "flux_true": {"true_cfg_scale": 3.0, "negative_prompt": ["a slow song"] * 2},
    "longcat_audio": {}, "sdxl": {}, "sd3": {}, "flux": {}, "pixart": {},
    "sana": {}, "wan": {}, "dit": {}, "music": {},
}  # fmt: skip


def heads(pipe: Any, where: Any, **changes: Any) -> Any:
    with sidechain.capture(pipe, where, reduce="heads") as cap:
        cap.result = run(pipe, **changes)
    return cap


class TestNumerics:
    @pytest.mark.parametrize("name", KNOWN)
    def test_equals_attention_in_float64(self, name: str) -> None:
        pattern, order = KNOWN[name]
        pipe = tiny_pipeline(name)
        with seen_at(pipe, pattern) as seen:
            plain = run(pipe)
        found_sites = sidechain.sites(pipe, pattern)
        chosen = [s for s in found_sites if output_projection(s.module) is not None]
        cap = heads(pipe, Where(chosen, branches="all"))
        assert torch.equal(cap.result, plain)
        assert cap.branches == order
        for site in chosen:
            expected = seen[site.name].heads().mean(3).unflatten(1, (len(order), 2))
            assert cap[site].shape[3] == site.heads
            size = float(expected.abs().max())
            torch.testing.assert_close(cap[site].double(), expected, rtol=1e-4, atol=1e-5 * size)

    @pytest.mark.parametrize("name", OTHERS)
    def test_the_projection_of_the_mean_is_the_mean_of_the_output(self, name: str) -> None:
        pipe = tiny_pipeline(name.partition("_true")[0])
        found = sidechain.sites(pipe)
        chosen = [s for s in found if output_projection(s.module) is not None]
        assert len(chosen) == len(found) or name.startswith("flux")
        plain = run(pipe, **OTHERS[name])
        place = Where(chosen, branches="all")
        with sidechain.capture(pipe, place) as outputs:
            cap = heads(pipe, place, **OTHERS[name])
        assert torch.equal(cap.result, plain)
        for site in chosen:
            layer = output_projection(site.module)
            projected = torch.nn.functional.linear(cap[site].flatten(-2), layer.weight, layer.bias)
            size = float(outputs[site].abs().max())
            torch.testing.assert_close(projected, outputs[site], rtol=1e-4, atol=1e-5 * size)

    def test_the_residual_of_a_module_is_not_within(self) -> None:
        """DDPM adds it inside of the attention module, whose maps are 4-D."""
        pipe = tiny_pipeline("ddpm")
        attn: Any = sidechain.sites(pipe)[0].module
        seen: list[Tensor] = []
        handle = attn.to_out[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        cap = heads(pipe, "self:0")
        handle.remove()
        expected = torch.stack(seen).mean(2)[:, None].unflatten(-1, (attn.heads, -1))
        torch.testing.assert_close(cap[0], expected)

    def test_window_tokens_and_mask(self) -> None:
        pipe = tiny_pipeline("sd")
        with seen_at(pipe, "cross:0") as seen:
            run(pipe)
        name = sidechain.sites(pipe)["cross:0"].name
        every = seen[name].heads()[:, 2:].transpose(2, 3).float()  # [steps, B, T, H, D] of cond
        mask = torch.rand(2, 64) > 0.5
        with sidechain.capture(pipe, Where("cross:0", tokens=mask), reduce="heads") as by_mask:
            cap = heads(pipe, Where("cross:0", steps=(1, 3), tokens=slice(3, None, 2)))
        assert cap.steps == (1, 2)
        torch.testing.assert_close(cap["cross:0"][:, 0], every[1:3, :, 3::2].mean(2))
        expected = torch.stack([every[:, b, mask[b]].mean(1) for b in range(2)], 1)
        torch.testing.assert_close(by_mask["cross:0"][:, 0], expected)

    def test_a_head_that_is_switched_off_is_the_one_that_is_zero(self) -> None:
        pipe = tiny_pipeline("sd")
        attn: Any = sidechain.sites(pipe)["cross:2"].module
        width = attn.to_v.out_features // attn.heads
        attn.to_v.weight.data[width : 2 * width] = 0
        found = heads(pipe, "cross:2")["cross:2"].abs().amax((0, 1, 2, 4))
        assert [i for i, value in enumerate(found) if value == 0] == [1]

    def test_gradients_are_those_without(self) -> None:
        pipe = tiny_pipeline("stable_audio")
        attn = sidechain.sites(pipe)["cross:0"].module
        hidden = torch.randn(4, 9, 16, requires_grad=True)
        context = torch.randn(4, 10, attn.to_k.in_features)
        plain = torch.autograd.grad(attn(hidden, context).square().sum(), hidden)[0]
        with sidechain.capture(pipe, "cross:0", reduce="heads"):
            run(pipe)
            seen = torch.autograd.grad(attn(hidden, context).square().sum(), hidden)[0]
        assert torch.equal(seen, plain)

    def test_under_a_patch_of_keys_alone(self) -> None:
        pipe = tiny_pipeline("sd")
        context = sidechain.contexts(pipe, PROMPTS[::-1])
        with sidechain.patch(pipe, "cross:0", key=context), seen_at(pipe, "cross:0") as seen:
            run(pipe)
        name = sidechain.sites(pipe)["cross:0"].name
        with sidechain.patch(pipe, "cross:0", key=context):
            cap = heads(pipe, "cross:0")
        expected = seen[name].heads()[:, 2:].mean(3)[:, None]
        torch.testing.assert_close(cap["cross:0"].double(), expected, rtol=1e-4, atol=1e-6)

    def test_under_lora_on_the_output_projection(self) -> None:
        from peft import LoraConfig

        pipe = tiny_pipeline("sd")
        config = LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights=False)
        plain = heads(pipe, "cross:0", steps=1)["cross:0"]
        pipe.unet.add_adapter(config)
        with torch.no_grad():
            expected = run(pipe)
            cap = heads(pipe, "cross:0")
        assert torch.equal(cap.result, expected)
        assert cap["cross:0"].shape[3:] == plain.shape[3:]

    @pytest.mark.slow
    def test_compiled(self) -> None:
        pipe = tiny_pipeline("stable_audio")
        eager = heads(pipe, Where("*", branches="all"))
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="aot_eager")
        compiled = heads(pipe, Where("*", branches="all"))
        for site in eager.sites:
            torch.testing.assert_close(compiled[site], eager[site], rtol=1e-4, atol=1e-6)


class TestCachedContexts:
    """One attention for both; as exact as `cache_context` itself (2e-5 of the result's norm)."""

    @pytest.mark.parametrize(
        ("name", "where"),
        [
            ("sd", Where("cross:*", branches="all")),  # every row is computed
            ("sd", Where("cross:*", branches="cond")),  # rows are computed that are not kept
            ("music", Where("cross:*", branches="cond")),  # the rows that are computed
            ("music", Where("cross:*", branches="all")),  # silent rows in front
            ("music", Where("cross:*", branches="all", tokens=slice(1, None, 2))),
            ("stable_audio", Where("cross:*", branches="all", tokens=torch.arange(9) > 3)),
        ],
    )
    @pytest.mark.parametrize("outside", [True, False])
    def test_equal_results_of_one_attention(
        self, monkeypatch: pytest.MonkeyPatch, name: str, where: Where, outside: bool
    ) -> None:
        pipe = tiny_pipeline(name)
        plain = heads(pipe, where)
        calls: list[bool] = []
        attend = cached.attention_tap

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(kwargs["capture"] is not None)
            # Where no kernel is built, the op itself is made of torch's attention.
            with monkeypatch.context() as inside:
                inside.setattr(torch.nn.functional, "scaled_dot_product_attention", _sdpa)
                return attend(*args, **kwargs)

        with sidechain.cache_context(pipe):
            alone = run(pipe)
        monkeypatch.setattr(cached, "attention_tap", counted)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _only_self)
        if outside:
            with sidechain.cache_context(pipe), sidechain.capture(
                pipe, where, reduce="heads"
            ) as cap:  # fmt: skip
                result = run(pipe)
        else:
            with sidechain.capture(pipe, where, reduce="heads") as cap, sidechain.cache_context(
                pipe
            ):  # fmt: skip
                result = run(pipe)
        assert torch.equal(result, alone)
        assert len(calls) == 3 * len(cap.sites)
        fed = where.tokens is None or isinstance(where.tokens, Tensor)
        fed = fed and not (name == "sd" and where.branches == "cond")
        assert set(calls) == {fed}
        for site in cap.sites:
            found, expected = cap[site], plain[site]
            assert float((found - expected).norm()) <= 2e-5 * float(expected.norm())
            if name != "sd" and where.branches == "all":
                assert not found[:, 0].any() and found[:, 1].any()

    def test_no_row_with_a_text(self) -> None:
        pipe = tiny_pipeline("music")
        silent = torch.zeros_like(sidechain.contexts(pipe, PROMPTS))
        place = Where("cross:*", branches="all")
        with sidechain.patch(pipe, "cross:*", context=silent), sidechain.cache_context(pipe):
            cap = heads(pipe, place)
        assert not cap["cross:1"].any()  # NaN would be some

    def test_scattered_silent_rows(self) -> None:
        pipe = tiny_pipeline("music")
        context = sidechain.contexts(pipe, PROMPTS)
        with sidechain.patch(
            pipe, Where("cross:*", branches="all"), context=context.flip(0), rows=[True, False]
        ):
            plain = heads(pipe, Where("cross:*", branches="all"))
            with sidechain.cache_context(pipe):
                cap = heads(pipe, Where("cross:*", branches="all"))
        for site in cap.sites:
            torch.testing.assert_close(cap[site], plain[site], rtol=1e-4, atol=1e-6)

    def test_two_captures_at_one_site(self) -> None:
        pipe = tiny_pipeline("music")
        with sidechain.cache_context(pipe), sidechain.capture(
            pipe, "cross:0", reduce="heads"
        ) as one:  # fmt: skip
            two = heads(pipe, Where("cross:0", steps=(1, 2)))
        torch.testing.assert_close(one["cross:0"][1:2], two["cross:0"], rtol=1e-5, atol=1e-7)


_sdpa = torch.nn.functional.scaled_dot_product_attention


def _only_self(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if query.shape[-2] != key.shape[-2]:
        raise AssertionError("cross-attention was computed a second time")
    return _sdpa(query, key, *args, **kwargs)


class TestBadInput:
    def test_no_output_projection(self) -> None:
        pipe = tiny_pipeline("flux")
        single = sidechain.sites(pipe, "self:0")[0]
        with pytest.raises(NotImplementedError, match=r"an output projection .* got FluxAttention"):
            sidechain.capture(pipe, single, reduce="heads")

    def test_a_processor_that_leaves_the_projection_out(self) -> None:
        pipe = tiny_pipeline("sd")
        attn: Any = sidechain.sites(pipe)["self:0"].module

        class Mine:
            def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
                return hidden_states

        attn.set_processor(Mine())
        with pytest.raises(RuntimeError, match=r"expected one call of self:0 .* got 0"):
            heads(pipe, "self:0")

    def test_another_shape_in_front_of_the_projection(self) -> None:
        pipe = tiny_pipeline("sd")
        attn: Any = sidechain.sites(pipe)["self:0"].module

        class Mine:
            def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
                return attn.to_out[0](hidden_states[:, :5])

        attn.set_processor(Mine())
        with pytest.raises(RuntimeError, match=r"expected \[rows, 64, 8\] in front of the output"):
            heads(pipe, "self:0")

    def test_a_site_that_never_ran(self) -> None:
        with (
            pytest.raises(RuntimeError, match="expected every tapped site to run"),
            sidechain.capture(tiny_pipeline("sd"), "cross:0", reduce="heads"),
        ):
            pass
