# SPDX-License-Identifier: Apache-2.0
"""Places beside attention: taps at blocks, MLPs, resnets and layers do what plain hooks do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from pipelines.plain_hooks import STEPS, Runs, changed, direction, hooked, tokens_of
from sidechain import Where
from sidechain.pipelines import Site
from sidechain.testing import PIPELINES, call_tiny, tiny_pipeline


@pytest.fixture(scope="module", params=[n for n in PIPELINES if n != "wan22"])
def runs(request: pytest.FixtureRequest) -> Runs:
    return Runs(request.param, tiny_pipeline(request.param))


class TestEveryFamily:
    def test_there_are_places_and_none_is_listed_by_default(self, runs: Runs) -> None:
        assert len(runs.sites) >= 4
        attention = sidechain.sites(runs.pipe)
        assert all(site.is_attention for site in attention)
        assert not set(attention.names) & set(runs.sites.names)

    def test_capture_equals_plain_hooks_and_is_taken_out(self, runs: Runs) -> None:
        result, outputs = runs.plain
        attributes = [set(vars(site.module)) for site in runs.sites]
        cap = runs.captured
        assert torch.equal(cap.result, result)
        assert [set(vars(site.module)) for site in runs.sites] == attributes
        for site in runs.sites:
            expected = outputs[site.name]  # branches are calls, or rows of one call
            expected = expected.reshape(len(cap.steps), len(cap.branches), 2, *expected.shape[2:])
            assert torch.equal(cap[site], expected), site
            assert site.width == expected.shape[-1]

    def test_sites_stand_in_the_order_in_which_they_put_out(self, runs: Runs) -> None:
        seen: list[str] = []
        both = sidechain.sites(runs.pipe, ["*", *runs.sites.names])
        with hooked(both, lambda site, out: seen.append(site.name)):
            runs.run()
        ran = seen[: len(both)]
        if runs.name in ("sd3", "flux"):  # the two MLPs of a block, or its two attentions
            assert sorted(ran) == sorted(both.names)
            return
        blocks = [n for n in both.names if both[n].kind == "block"]
        assert [n for n in ran if n in blocks] == blocks
        for name in blocks:
            inside = [n for n in both.names if n.startswith(f"{name}.")]
            assert max(both.names.index(n) for n in inside) < both.names.index(name)

    def test_pooled_means(self, runs: Runs) -> None:
        with sidechain.capture(
            runs.pipe, Where(runs.sites, branches="cond"), reduce="mean_square"
        ) as cap:
            runs.run()
        place = runs.captured.branches.index("cond")
        for site in runs.sites:
            tokens = runs.captured[site][:, place].double()
            torch.testing.assert_close(
                cap[site][:, 0].double(), tokens.mean(2), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                cap.mean_square(site)[:, 0].double(), tokens.square().mean(2), rtol=1e-4, atol=1e-5
            )

    def test_steering_equals_a_plain_hook(self, runs: Runs) -> None:
        directions = runs.directions()
        branches = runs.captured.branches
        cond, ran = branches.index("cond"), dict.fromkeys(directions, 0)
        rows = slice(None) if runs.calls else slice(2 * cond, 2 * cond + 2)

        def add(site: Site, out: Any) -> Any:
            ran[site.name] += 1
            if runs.calls and (ran[site.name] - 1) % len(branches) != cond:
                return None

            def edit(states: Tensor) -> Tensor:
                states = states.clone()
                vector = directions[site.name]
                vector = vector[:, None, None] if states.dim() == 4 else vector
                states[rows] += vector
                return states

            return changed(site, out, edit)

        with hooked(runs.sites, add):
            expected = runs.run()
        with sidechain.steer(runs.pipe, directions):
            found = runs.run()
        assert not torch.equal(found, runs.plain[0])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    def test_strength_zero_is_no_steering(self, runs: Runs) -> None:
        with sidechain.steer(runs.pipe, runs.directions(), strength=0.0):
            assert torch.equal(runs.run(), runs.plain[0])

    def test_patching_with_its_own_output_changes_nothing(self, runs: Runs) -> None:
        place = Where(runs.sites, branches="all")
        with sidechain.patch(runs.pipe, place, output=runs.captured):
            assert torch.equal(runs.run(), runs.plain[0])

    def test_zeros_in_place_of_an_mlp(self, runs: Runs) -> None:
        mlps = [s for s in runs.sites if s.kind == "mlp"]
        if not mlps:
            pytest.skip("the family has no MLP")
        chosen = sidechain.sites(runs.pipe, mlps)
        with hooked(chosen, lambda site, out: changed(site, out, torch.zeros_like)):
            expected = runs.run()
        with sidechain.patch(runs.pipe, Where(chosen, branches="all"), ablate=True):
            found = runs.run()
        assert not torch.equal(found, runs.plain[0])
        assert torch.equal(found, expected)

    def test_zeros_where_the_residual_is_inside(self, runs: Runs) -> None:
        site = next(s for s in runs.sites if s.kind in ("block", "resnet"))
        with pytest.raises(NotImplementedError, match="expected sites without a residual inside"):
            sidechain.patch(runs.pipe, site, ablate=True)

    def test_where_outputs_go(self, runs: Runs) -> None:
        """What is added to an output reaches the block's output whole, gated, or not at all."""
        both = sidechain.sites(runs.pipe, ["*", *runs.sites.names])
        for block in (s for s in both if s.kind == "block"):
            inside = [s for s in both if s.name.startswith(f"{block.name}.")]
            single = not any(s.kind == "mlp" for s in inside)  # one projection for all
            for site in inside:
                if single:
                    assert site.goes == "before the block's proj_out"
                    continue
                assert self.way_of(runs, block, site, inside) == site.goes, site

    def way_of(self, runs: Runs, block: Site, site: Site, inside: list[Site]) -> str:
        delta = torch.randn(site.width, generator=torch.Generator().manual_seed(3))

        def outcome(size: float) -> Tensor:
            found: list[Tensor] = []

            def edit(here: Site, out: Any) -> Any:
                if here.name == block.name:
                    found.append(tokens_of(block, out).clone())
                    return None
                first = not found  # of the first call alone
                value = size * delta if here.name == site.name and first else 0 * delta[:1]

                def fill(states: Tensor) -> Tensor:
                    spread = value[:, None, None] if states.dim() == 4 else value
                    return torch.zeros_like(states) + spread

                return changed(here, out, fill)

            chosen = sidechain.sites(runs.pipe, [block, *inside])
            with hooked(chosen, edit):
                call_tiny(runs.pipe, steps=STEPS if runs.name in SEVERAL else 1)
            return found[0]

        change = outcome(1.0) - outcome(0.0)
        if torch.allclose(change, delta.expand_as(change), atol=1e-4):
            return "added to the residual"
        gate = change / delta
        same = (gate - gate[:, :1]).abs().max() < 1e-3 * gate.abs().max()
        return "gated, then added to the residual" if same else "neither"


# Pipelines that need several steps, or whose schedule is cut.
SEVERAL = ("sd_img2img", "sdxl_img2img", "ace_step", "pixart")


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("block:1", ["transformer_blocks.1"]),
            ("block:0-1", ["transformer_blocks.0", "transformer_blocks.1"]),
            (["mlp:2", "cross:0", "block:0"],
             ["transformer_blocks.0.attn2", "transformer_blocks.0", "transformer_blocks.2.ff"]),
            ("*.ff", [f"transformer_blocks.{i}.ff" for i in range(3)]),
            ("transformer_blocks.1.ff", ["transformer_blocks.1.ff"]),
            ("transformer_blocks.2.norm1", ["transformer_blocks.2.norm1"]),
            ("transformer_blocks.0.attn1.to_v", ["transformer_blocks.0.attn1.to_v"]),
        ],
    )  # fmt: skip
    def test_names(self, pattern: Any, names: list[str]) -> None:
        found = sidechain.sites(tiny_pipeline(), pattern)
        assert found.names == names
        assert sidechain.sites(tiny_pipeline(), list(found)).names == names

    @pytest.mark.parametrize(
        ("name", "pattern", "match"),
        [
            ("stable_audio", "block:1-7", "block:0-2 .* got 'block:1-7'"),
            ("stable_audio", "resnet:mid", "got 'resnet:mid'"),
            ("stable_audio", "transformer_blocks.0.ff.net",
             "a module, but no site: its family does not say what a ModuleList puts out"),
            ("stable_audio", "transformer_blocks.9", "got 'transformer_blocks.9'$"),
            ("flux", "transformer_blocks.0.ff_context", "it works on the tokens of the context"),
            ("sd", "mid_block.attentions.0", "not say what a Transformer2DModel puts out"),
            ("sd", "text_encoder.text_model", "text encoders run outside of denoiser calls"),
        ],
    )  # fmt: skip
    def test_bad_names(self, name: str, pattern: str, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            sidechain.sites(tiny_pipeline(name), pattern)

    def test_h_space(self) -> None:
        pipe = tiny_pipeline("sd")
        (site,) = sidechain.sites(pipe, "resnet:mid")
        assert site.name == "mid_block.resnets.1" and site.alias in str(sidechain.sites(pipe, site))
        seen: list[Tensor] = []
        handle = pipe.unet.mid_block.register_forward_hook(lambda m, a, out: seen.append(out))
        with sidechain.capture(pipe, Where("resnet:mid", branches="all"), reduce="tokens") as cap:
            call_tiny(pipe)
        handle.remove()
        expected = torch.stack(seen).flatten(3).transpose(2, 3)
        assert torch.equal(cap["resnet:mid"].flatten(1, 2), expected)

    def test_a_captured_list_holds_no_other_places(self) -> None:
        pipe = tiny_pipeline()
        with sidechain.capture(pipe, "block:0") as cap:
            call_tiny(pipe)
        with pytest.raises(ValueError, match="got 'block:1'"):
            cap["block:1"]

    def test_no_context_beside_cross_attention(self) -> None:
        pipe = tiny_pipeline()
        with pytest.raises(ValueError, match="expected cross-attention sites"):
            sidechain.patch(pipe, "block:0", context=torch.zeros(1, 3, 12))
        with pytest.raises(ValueError, match="expected cross-attention sites"):
            sidechain.capture(pipe, "mlp:0", reduce="context")

    def test_vectors_of_blocks(self) -> None:
        pipe = tiny_pipeline()
        vector = sidechain.SteeringVector({("transformer_blocks.1", "cond"): direction(16)[None]})
        vector.check(pipe)
        with sidechain.capture(pipe, "block:1") as before:
            call_tiny(pipe, steps=1)
        with (
            sidechain.steer(pipe, vector, Where("block:1"), strength=2.0),
            sidechain.capture(pipe, "block:1") as within,
            sidechain.capture(pipe, "mlp:2") as after,
        ):
            call_tiny(pipe, steps=1)
        assert torch.equal(within["block:1"], before["block:1"])  # what the module put out
        assert bool(after["mlp:2"].any())
