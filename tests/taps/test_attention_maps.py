# SPDX-License-Identifier: Apache-2.0
"""capture(reduce="maps"): attention probabilities of the text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sidechain
from sidechain import Where
from sidechain.taps.maps import Scores, add_attention_
from sidechain.testing import call_tiny, tiny_pipeline
from taps.attention_reference import PROMPTS, run, seen_at

# Sites, and the guidance branches of the rows in order.
FAMILIES = {
    "sd": ("cross:*", ("uncond", "cond")),
    "sdxl": ("cross:*", ("uncond", "cond")),
    "stable_audio": ("cross:*", ("uncond", "cond")),
    "audioldm2": ("cross:*", ("uncond", "cond")),  # T5 with a mask, GPT-2 without
    "ace_step": ("cross:*", ("cond", "uncond")),  # fewer key heads than query heads
    "pixart": ("cross:*", ("uncond", "cond")),  # mask
    "sana": ("cross:*", ("uncond", "cond")),  # mask
    "flux": ("joint:*", ("cond",)),  # text first, rotary embeddings
    "sd3": ("joint:*", ("uncond", "cond")),  # text last
}


def maps(pipe: Any, where: Any, **changes: Any) -> Any:
    with sidechain.capture(pipe, where, reduce="maps") as cap:
        cap.result = run(pipe, **changes)
    return cap


@functools.cache
def pipeline(name: str) -> Any:
    return tiny_pipeline(name)


class TestNumerics:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_equals_attention_in_float64(self, name: str) -> None:
        pattern, order = FAMILIES[name]
        pipe = pipeline(name)
        with seen_at(pipe, pattern) as seen:
            plain = run(pipe)
        cap = maps(pipe, Where(pattern, branches="all"))
        assert torch.equal(cap.result, plain)
        assert cap.branches == order
        for site in cap.sites:
            expected = seen[site.name].maps().mean(0).unflatten(0, (len(order), 2))
            found = cap[site]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
            if site.kind == "cross":
                torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:3]))
            else:
                assert (found.sum(-1) < 1).all()

    @pytest.mark.parametrize("name", ["longcat_audio", "wan"])
    def test_one_call_for_each_branch(self, name: str) -> None:
        """LongCat turns queries and keys of its cross-attention, and Wan norms all heads at once:
        what counts is what reaches the softmax."""
        pipe = pipeline(name)
        sdpa, given = F.scaled_dot_product_attention, []

        def note(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if query.shape[2] != key.shape[2]:
                mask = kwargs.get("attn_mask")
                scores = query.double() @ key.double().transpose(2, 3) / query.shape[-1] ** 0.5
                if mask is not None:
                    scores = scores.masked_fill(~mask, -torch.inf)
                given.append(scores.softmax(-1).mean(1))
            return sdpa(query, key, value, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", note)
            plain = run(pipe)
        cap = maps(pipe, Where("cross:*", branches="all"))
        assert torch.equal(cap.result, plain)
        assert cap.branches == ("cond", "uncond")
        by_call = torch.stack(given).unflatten(0, (3, 2, len(cap.sites)))  # steps, calls, sites
        for number, site in enumerate(cap.sites):
            expected = by_call[:, :, number].mean(0)
            torch.testing.assert_close(cap[site].double(), expected, rtol=1e-4, atol=1e-6)
        alone = maps(pipe, "cross:0")
        assert torch.equal(alone["cross:0"], cap["cross:0"][:1]) and alone.branches == ("cond",)

    def test_guidance_in_some_of_the_steps(self) -> None:
        pipe = pipeline("ace_step")
        call = {"cfg_interval_start": 0.3}
        with seen_at(pipe, "cross:0") as seen:
            plain = run(pipe, **call)
        name = sidechain.sites(pipe)["cross:0"].name
        every: list[Tensor] = []
        for one in seen[name].calls:
            seen[name].calls = [one]
            every.append(seen[name].maps()[0])
        assert {len(rows) for rows in every} == {2, 4}
        cap = maps(pipe, Where("cross:0", branches="all"), **call)
        assert torch.equal(cap.result, plain) and cap.branches == ("cond", "uncond")
        cond = torch.stack([rows[:2] for rows in every]).mean(0)
        uncond = torch.stack([rows[2:] for rows in every if len(rows) == 4]).mean(0)
        expected = torch.stack([cond, uncond])
        torch.testing.assert_close(cap["cross:0"].double(), expected, rtol=1e-4, atol=1e-6)

    def test_masks_are_seen(self) -> None:
        """The references above would agree without masks if no token was ever masked."""
        for name in ("audioldm2", "pixart", "sana"):
            pipe = pipeline(name)
            with sidechain.capture(pipe, "cross:*", reduce="maps") as cap:
                call_tiny(pipe, ["song", PROMPTS[1]], seeds=(0, 1))
            short = [cap[site][0, 0].amax(0) for site in cap.sites]  # [S] of the short prompt
            assert any((largest < 1e-6).any() for largest in short), name

    def test_differential_attention_is_the_weight_of_the_values(self) -> None:
        """Stable Audio 3 subtracts two softmaxes: what comes out is the map times the values."""
        pipe = tiny_pipeline("stable_audio3")
        site = sidechain.sites(pipe, "cross:0")[0]
        attn: Any = site.module
        notes: dict[str, Tensor] = {}

        def kv(module: Any, args: Any, out: Tensor) -> None:
            notes["v"] = out.chunk(3, -1)[2].double()

        def out(module: Any, args: Any) -> None:
            notes["out"] = args[0].double()

        handles = [attn.to_kv.register_forward_hook(kv)]
        handles.append(attn.to_out.register_forward_pre_hook(out))
        cap = maps(pipe, "cross:0", steps=1, guidance_scale=1.0)
        for handle in handles:
            handle.remove()
        found = cap["cross:0"][0].double()
        assert (found.sum(-1).abs() < 1e-5).all() and (found < 0).any()
        # Mean over heads: only where all heads have the same values do both agree.
        v = notes["v"].unflatten(-1, (attn.heads, -1))
        assert v.shape[2] == attn.heads
        alike = v.mean(2, keepdim=True).expand_as(v).flatten(2)
        handle = attn.to_kv.register_forward_hook(
            lambda m, a, o: torch.cat([*o.chunk(3, -1)[:2], alike.float()], -1)
        )
        handles = [handle, attn.to_out.register_forward_pre_hook(out)]
        cap = maps(pipe, "cross:0", steps=1, guidance_scale=1.0)
        for handle in handles:
            handle.remove()
        heads = notes["out"].unflatten(-1, (attn.heads, -1)).mean(2)
        expected = cap["cross:0"][0].double() @ v.mean(2)
        torch.testing.assert_close(heads, expected, rtol=1e-4, atol=1e-6)

    def test_window_branches_and_tokens(self) -> None:
        pipe = pipeline("sd")
        with seen_at(pipe, "cross:1") as seen:
            run(pipe)
        every = seen[sidechain.sites(pipe)["cross:1"].name].maps()
        cap = maps(pipe, Where("cross:1", steps=(1, 3), tokens=slice(2, 9, 3)))
        assert cap.steps == (1, 2) and cap.branches == ("cond",)
        expected = every[1:3, 2:, 2:9:3].mean(0)[None]
        torch.testing.assert_close(cap["cross:1"].double(), expected, rtol=1e-4, atol=1e-6)

    def test_a_patched_context_is_what_is_looked_at(self) -> None:
        pipe = pipeline("sd")
        context = sidechain.contexts(pipe, PROMPTS[::-1])
        with sidechain.patch(pipe, "cross:*", context=context):
            patched = maps(pipe, "cross:0", steps=1)["cross:0"]
        other = call_tiny  # the first step sees the same latents, whatever the prompts
        with sidechain.capture(pipe, "cross:0", reduce="maps") as cap:
            other(pipe, PROMPTS[::-1], seeds=(0, 1), steps=1)
        torch.testing.assert_close(patched, cap["cross:0"], rtol=1e-4, atol=1e-6)
        plain = maps(pipe, "cross:0", steps=1)["cross:0"]
        assert not torch.allclose(patched, plain, rtol=1e-3)

    @pytest.mark.parametrize("name", ["sd", "music"])  # music: rows of a silent context too
    def test_under_cached_contexts(self, name: str) -> None:
        pipe = pipeline(name)
        where = Where("cross:*", branches="all")
        plain = maps(pipe, where)
        with sidechain.cache_context(pipe):
            alone = run(pipe)
            cached = maps(pipe, where)
        assert torch.equal(cached.result, alone)
        for site in plain.sites:
            torch.testing.assert_close(cached[site], plain[site], rtol=1e-4, atol=1e-5)

    def test_two_generations_are_joined(self) -> None:
        pipe = pipeline("sd")
        with sidechain.capture(pipe, "cross:0", reduce="maps") as cap:
            run(pipe)
            one = cap["cross:0"].clone()
            bytes_of_one = cap.nbytes
            call_tiny(pipe, PROMPTS[::-1], seeds=(4, 5))
        both = cap["cross:0"]
        assert both.shape[1] == 4 and cap.labels.samples == 4
        assert torch.equal(both[:, :2], one) and not torch.allclose(both[:, 2:], one)
        assert cap.nbytes == 2 * bytes_of_one

    def test_half_precision_is_summed_in_float32(self) -> None:
        pipe = tiny_pipeline("sd", dtype=torch.bfloat16)
        plain = run(pipe)
        cap = maps(pipe, "cross:*")
        assert torch.equal(cap.result, plain)
        torch.testing.assert_close(cap["cross:0"].sum(-1), torch.ones(1, 2, 64))

    def test_gradients_flow_as_without(self) -> None:
        pipe = pipeline("stable_audio")
        attn = sidechain.sites(pipe)["cross:0"].module
        hidden = torch.randn(4, 9, 16, requires_grad=True)
        context = torch.randn(4, 10, attn.to_k.in_features)
        plain = torch.autograd.grad(attn(hidden, context).square().sum(), hidden)[0]
        with sidechain.capture(pipe, Where("cross:0", branches="all"), reduce="maps"):
            run(pipe)
            seen = torch.autograd.grad(attn(hidden, context).square().sum(), hidden)[0]
            with pytest.raises(RuntimeError, match=r"attention of 4 rows at .* got 1"):
                attn(hidden[:1], context[:1])
        assert torch.equal(seen, plain)


class Largest(TorchDispatchMode):
    """Largest tensor that any operator puts out."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


class TestBlocks:
    @pytest.mark.parametrize("block", [1, 60, 200, 10**9])
    @pytest.mark.parametrize("mask", [None, "bool", "added"])
    def test_blocks_add_up(self, block: int, mask: str | None) -> None:
        rows, heads, tokens, keys = 3, 4, 11, 7
        q, k = torch.randn(rows, heads, tokens, 5), torch.randn(rows, 2, keys, 5)
        allowed = None
        if mask is not None:
            allowed = torch.rand(rows, 1, tokens, keys) > 0.3
            allowed[1, :, 4] = False  # a query that may read nothing
        given = allowed if mask != "added" else torch.zeros(allowed.shape).masked_fill(
            ~allowed, -torch.inf
        )  # fmt: skip
        total = add_attention_(torch.ones(rows, tokens, 3), Scores(q, k, given, 0.3),
                               slice(2, 5), -2.0, block=block)  # fmt: skip
        scores = 0.3 * torch.einsum("rhtd,rhsd->rhts", q.double(), k.double()[:, [0, 0, 1, 1]])
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        p = scores.softmax(-1).nan_to_num().mean(1)
        torch.testing.assert_close(total.double(), 1 - 2 * p[..., 2:5])

    def test_scores_are_never_held_at_once(self) -> None:
        rows, heads, tokens, keys, block = 2, 8, 500, 77, 1 << 14
        q, k = torch.randn(rows, heads, tokens, 4), torch.randn(rows, heads, keys, 4)
        with Largest() as seen:
            add_attention_(torch.zeros(rows, tokens, keys), Scores(q, k), block=block)
        # The maps themselves, here larger than a block, and not the scores of all heads.
        assert seen.numel <= rows * tokens * keys < rows * heads * tokens * keys

    def test_autocast_does_not_round_the_scores(self) -> None:
        q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
        plain = add_attention_(torch.zeros(1, 5, 6), Scores(q, k))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(add_attention_(torch.zeros(1, 5, 6), Scores(q, k)), plain)


class TestWhereAWordLooks:
    def test_map_is_the_share_of_the_word_on_the_grid(self) -> None:
        pipe = pipeline("sd")
        places = sidechain.token_places(pipe, PROMPTS[0], "piano song")
        assert places == [3, 4]  # behind <s> a slow
        cap = maps(pipe, "cross:*")
        for site, size in zip(cap.sites, (8, 4, 8, 8), strict=True):
            heat = cap.map(site, places)
            assert heat.shape == (2, size, size)
            flat = cap[site][0, :, :, 3] + cap[site][0, :, :, 4]
            torch.testing.assert_close(heat.flatten(1), flat)
        assert cap.map("cross:0", 3, grid=(4, 16)).shape == (2, 4, 16)

    @pytest.mark.parametrize("name", ["sd", "sdxl", "stable_audio", "pixart", "flux"])
    def test_places_are_where_the_context_changes(self, name: str) -> None:
        """Another word changes token numbers at its place and nowhere else."""
        pipe = pipeline(name)
        encoder = pipe.text_encoder_2 if name == "flux" else pipe.text_encoder
        seen: list[Tensor] = []

        def note(module: Any, args: Any, kwargs: Any) -> None:
            seen.append(args[0] if args else kwargs["input_ids"])

        handle = encoder.register_forward_pre_hook(note, with_kwargs=True)
        for prompt in ("slow PIANO song", "slow violin song"):
            call_tiny(pipe, [prompt], steps=2, seeds=(0,))
        handle.remove()
        one, other = seen[0][0], seen[len(seen) // 2][0]
        changed = (one != other).nonzero()[:, 0].tolist()
        assert len(changed) == 1
        assert sidechain.token_places(pipe, "slow PIANO song", "piano") == changed

    def test_every_occurrence_counts_and_parts_of_words_do_not(self) -> None:
        pipe = pipeline("stable_audio")
        assert sidechain.token_places(pipe, "rock song rock", "rock") == [0, 2]
        with pytest.raises(ValueError, match="expected a word of 'rock song', got 'son'"):
            sidechain.token_places(pipe, "rock song", "son")

    def test_two_contexts(self) -> None:
        pipe = pipeline("audioldm2")
        found = sidechain.sites(pipe, kind="cross")
        t5 = next(s for s in found if s.source == 1)
        assert sidechain.token_places(pipe, "slow piano", "piano", site=t5) == [1]
        with pytest.raises(ValueError, match="audioldm2 has 2 contexts"):
            sidechain.token_places(pipe, "slow piano", "piano")
        gpt = next(s for s in found if s.source == 0)
        with pytest.raises(NotImplementedError, match="got context 0 of audioldm2"):
            sidechain.token_places(pipe, "slow piano", "piano", site=gpt)
        with pytest.raises(ValueError, match="expected a site that reads a text"):
            sidechain.token_places(pipe, "slow piano", "piano", site="self:0")

    def test_contexts_that_are_no_tokens(self) -> None:
        for name in ("ace_step", "sd3", "dit"):
            with pytest.raises(NotImplementedError, match="a context that is the tokens"):
                sidechain.token_places(pipeline(name), "slow piano", "piano")

    def test_bad_words(self) -> None:
        with pytest.raises(TypeError, match="expected one prompt and one word as str, got list"):
            sidechain.token_places(pipeline("sd"), PROMPTS, "piano")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="got ''"):
            sidechain.token_places(pipeline("sd"), "piano", "")


class TestBadInput:
    def test_self_attention(self) -> None:
        with pytest.raises(ValueError, match=r"cross-attention or joint attention .*got .*attn1"):
            sidechain.capture(pipeline("sd"), "self:0", reduce="maps")

    def test_a_mask_of_tokens(self) -> None:
        with pytest.raises(NotImplementedError, match="a slice of tokens with reduce='maps'"):
            place = Where("cross:0", tokens=torch.ones(64, dtype=torch.bool))
            sidechain.capture(pipeline("sd"), place, reduce="maps")

    def test_joint_attention_of_another_processor(self) -> None:
        pipe = tiny_pipeline("sd3")
        attn: Any = sidechain.sites(pipe)["joint:0"].module

        class Mine(type(attn.processor)):  # type: ignore[misc]
            pass

        attn.set_processor(Mine())
        with pytest.raises(NotImplementedError, match=r"where the text stands .* got Mine"):
            sidechain.capture(pipe, "joint:0", reduce="maps")

    def test_a_processor_that_attends_by_other_means(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        pipe = tiny_pipeline("sd")
        sidechain.sites(pipe)["cross:0"].module.set_processor(AttnProcessor())  # type: ignore[operator]
        with pytest.raises(RuntimeError, match="expected 1 scaled_dot_product_attention in AttnPr"):
            maps(pipe, "cross:0")

    def test_attention_over_something_else(self) -> None:
        pipe = tiny_pipeline("sd")
        attn: Any = sidechain.sites(pipe)["cross:0"].module
        inner = type(attn.processor)

        class Short(inner):  # type: ignore[misc,valid-type]
            def __call__(
                self, attn: Any, x: Tensor, encoder_hidden_states: Any, attention_mask: Any = None
            ) -> Any:
                return super().__call__(attn, x, encoder_hidden_states[:, :5])

        attn.set_processor(Short())
        with pytest.raises(RuntimeError, match=r"attention of 64 tokens to \d+ at .* got 64 to 5"):
            maps(pipe, "cross:0")

    def test_a_compiled_denoiser(self) -> None:
        pipe = tiny_pipeline("sd")
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        with pytest.raises(NotImplementedError, match="a denoiser that is not compiled"):
            maps(pipe, "cross:0")

    def test_what_a_map_has_not(self) -> None:
        cap = maps(pipeline("sd"), "cross:0", steps=1)
        for token in (-1, 77, [], [3, 500]):
            with pytest.raises(ValueError, match=r"expected tokens within \[0, "):
                cap.map("cross:0", token)
        with pytest.raises(ValueError, match=r"one of cond \[captured\], got 'uncond'"):
            cap.map("cross:0", 0, branch="uncond")
        with pytest.raises(ValueError, match=r"expected a grid of 64 tokens .* got \(3, 3\)"):
            cap.map("cross:0", 0, grid=(3, 3))

    def test_an_unknown_reduction(self) -> None:
        with pytest.raises(ValueError, match="tokens, context, heads, maps, got 'map'"):
            sidechain.capture(pipeline("sd"), reduce="map")

    def test_the_function_that_is_listened_to_is_put_back(self) -> None:
        before = F.scaled_dot_product_attention
        maps(pipeline("sd"), "cross:0", steps=1)
        assert F.scaled_dot_product_attention is before
