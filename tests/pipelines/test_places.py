# SPDX-License-Identifier: Apache-2.0
"""Places beside attention: taps at blocks, MLPs, resnets and layers do what plain hooks do."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sidechain
from sidechain import Where
from sidechain.pipelines import Site, SiteList
from sidechain.testing import PIPELINES, call_tiny, tiny_pipeline
from sidechain.testing.tiny import PROMPTS

STEPS = 3


def tokens_of(site: Site, out: Any) -> Tensor:
    """Output of a module for the latents, as [R, T, C]."""
    if site.element is not None:
        out = out[site.element]
    elif isinstance(out, tuple):
        out = out[0]
    return out.flatten(2).transpose(1, 2) if out.dim() == 4 else out


def changed(site: Site, out: Any, edit: Callable[[Tensor], Tensor]) -> Any:
    """Output of a module with that for the latents exchanged."""
    if isinstance(out, tuple):
        place = site.element or 0
        return (*out[:place], edit(out[place]), *out[place + 1 :])
    return edit(out)


@contextmanager
def hooked(sites: SiteList, hook: Callable[[Site, Any], Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for site in sites:
            handle = site.module.register_forward_hook(lambda m, a, out, s=site: hook(s, out))
            stack.callback(handle.remove)
        yield


def direction(width: int) -> Tensor:
    """A vector that a layer norm does not take away, as it does with ones."""
    return torch.randn(width, generator=torch.Generator().manual_seed(5))


def places_of(pipe: Any) -> SiteList:
    """All places that the family lists."""
    known = []
    for kind in ("block", "mlp", "resnet"):
        try:
            sidechain.sites(pipe, kind=kind)
        except ValueError:
            continue
        known.append(f"{kind}:*")
    return sidechain.sites(pipe, known)


@dataclass
class Runs:
    name: str
    pipe: Any

    @property
    def calls(self) -> bool:
        """Whether each branch is a denoiser call of its own."""
        return self.name in ("longcat_audio", "wan")

    def run(self) -> Tensor:
        return call_tiny(self.pipe, PROMPTS[:2], steps=STEPS, seeds=(0, 1))

    @functools.cached_property
    def sites(self) -> SiteList:
        return places_of(self.pipe)

    @functools.cached_property
    def plain(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Result, and by site what it put out: [calls, R, T, C]."""
        outputs: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}

        def note(site: Site, out: Any) -> None:
            outputs[site.name].append(tokens_of(site, out).clone())

        with hooked(self.sites, note):
            result = self.run()
        return result, {name: torch.stack(found) for name, found in outputs.items()}

    @functools.cached_property
    def captured(self) -> Any:
        place = Where(self.sites, branches="all")
        with sidechain.capture(self.pipe, place, reduce="tokens") as cap:
            cap.result = self.run()
        return cap

    def directions(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        return {s.name: torch.randn(s.width, generator=generator) for s in self.sites}


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


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states) + 1.0


class TestAttachment:
    def test_the_order_is_that_of_attachment(self) -> None:
        pipe = tiny_pipeline()
        generator = torch.Generator().manual_seed(1)
        first, second = torch.randn(2, 16, generator=generator)
        options: dict[str, Any] = {"removal": 1.0, "strength": 0.5}
        with (
            sidechain.steer(pipe, {"block:0": first}, **options),
            sidechain.steer(pipe, {"block:0": second}, **options),
        ):
            found = call_tiny(pipe)

        def edit(site: Site, out: Tensor) -> Tensor:
            out = out.clone()
            for vector in (first, second):
                projection = (out[1:] @ vector).clamp(min=0)[..., None]
                out[1:] += (0.5 - projection) * vector
            return out

        with hooked(sidechain.sites(pipe, "block:0"), edit):
            expected = call_tiny(pipe)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
    )
    def test_copies_are_plain(self, copied: Callable[[Any], Any]) -> None:
        pipe = tiny_pipeline()
        wanted = call_tiny(pipe)
        state = set(pipe.transformer.state_dict())
        with sidechain.steer(pipe, {"block:1": direction(16), "mlp:0": direction(16)}):
            call_tiny(pipe)
            assert set(pipe.transformer.state_dict()) == state
            other = tiny_pipeline()
            other.transformer = copied(pipe.transformer)
        assert "forward" not in vars(other.transformer.transformer_blocks[1])
        assert torch.equal(call_tiny(other), wanted)

    def test_a_wrapper_of_the_user_stays(self) -> None:
        pipe = tiny_pipeline()
        block = pipe.transformer.transformer_blocks[0]
        calls: list[int] = []
        with sidechain.steer(pipe, {"block:0": direction(16)}):
            tapped = block.forward

            def counted(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return tapped(*args, **kwargs)

            block.forward = counted
            steered = call_tiny(pipe)
        assert block.forward is counted
        plain = call_tiny(pipe)
        del block.forward
        assert len(calls) == 6 and not torch.equal(plain, steered)
        assert torch.equal(plain, call_tiny(pipe))

    @pytest.mark.parametrize("first", ["tap", "hook"])
    def test_forward_hooks_that_replace_forward(self, first: str) -> None:
        """Offloading puts a `forward` of its own on the instance, before or after."""
        hooks = pytest.importorskip("accelerate.hooks")
        pipe = tiny_pipeline()
        block = pipe.transformer.transformer_blocks[1]
        tap = sidechain.steer(pipe, {"block:1": direction(16)})
        plain = call_tiny(pipe)
        with tap:
            wanted = call_tiny(pipe)
        if first == "hook":
            hooks.add_hook_to_module(block, hooks.ModelHook())
        with tap:
            if first == "tap":
                hooks.add_hook_to_module(block, hooks.ModelHook())
            assert torch.equal(call_tiny(pipe), wanted)
        assert torch.equal(call_tiny(pipe), plain)
        hooks.remove_hook_from_module(block)
        assert torch.equal(call_tiny(pipe), plain)
        with tap:
            assert torch.equal(call_tiny(pipe), wanted)

    def test_a_block_that_is_left_out(self) -> None:
        pipe = tiny_pipeline()
        blocks = pipe.transformer.transformer_blocks
        with (
            pytest.raises(RuntimeError, match=r"expected one call of block:1 .* got 0"),
            sidechain.capture(pipe, "block:1"),
        ):
            blocks[1].forward = lambda hidden_states, **kwargs: hidden_states
            call_tiny(pipe)

    def test_a_module_that_runs_twice(self) -> None:
        pipe = tiny_pipeline()
        mlp = pipe.transformer.transformer_blocks[0].ff
        mlp.register_forward_hook(lambda m, a, out: m.forward(*a))
        with (
            pytest.raises(RuntimeError, match=r"expected one call of mlp:0 .* got 2"),
            sidechain.capture(pipe, "mlp:0"),
        ):
            call_tiny(pipe)

    @pytest.mark.parametrize(
        ("name", "path", "match"),
        [
            # [R, S, C] of the text, [R, C] of the time, [R, H, T, D] of a head
            ("stable_audio", "cross_attention_proj.0", r"expected an output of \[rows, 9, 12\]"),
            ("stable_audio", "timestep_proj.0", r"expected \[2, T, C\] or \[2, C, h, w\]"),
        ],
    )
    def test_a_layer_whose_output_is_another(self, name: str, path: str, match: str) -> None:
        pipe = tiny_pipeline(name)
        with pytest.raises(RuntimeError, match=match), sidechain.capture(pipe, path):
            call_tiny(pipe)

    def test_rows_that_broadcasting_would_make_up(self) -> None:
        pipe = tiny_pipeline()
        mlp = pipe.transformer.transformer_blocks[0].ff
        plain = mlp.forward
        mlp.forward = lambda states: plain(states)[:1]
        with (
            pytest.raises(RuntimeError, match=r"expected \[2, T, C\] or .* got \[1, 9, 16\]"),
            sidechain.patch(pipe, Where("mlp:0"), output=torch.zeros(3, 1, 9, 16)),
        ):
            call_tiny(pipe)

    def test_an_adapter_that_comes_around_a_layer(self) -> None:
        pipe = tiny_pipeline()
        net = pipe.transformer.transformer_blocks[0].ff.net
        with (
            pytest.raises(RuntimeError, match="that was there when the tap was made, got a Around"),
            sidechain.capture(pipe, "transformer_blocks.0.ff.net.2"),
        ):
            net[2] = Around(net[2])
            call_tiny(pipe)

    def test_an_element_that_is_not_there(self) -> None:
        pipe = tiny_pipeline("sd3")
        pipe.transformer.transformer_blocks[0].forward = lambda **kwargs: kwargs["hidden_states"]
        with (
            pytest.raises(RuntimeError, match="expected a tuple with the latents at 1 at transf"),
            sidechain.capture(pipe, "block:0"),
        ):
            call_tiny(pipe)

    def test_an_output_that_is_the_input_is_not_edited_in_place(self) -> None:
        pipe = tiny_pipeline()
        mlp = pipe.transformer.transformer_blocks[1].ff
        mlp.forward = lambda states: states
        before: list[Tensor] = []
        handle = pipe.transformer.transformer_blocks[1].norm3.register_forward_hook(
            lambda m, a, out: before.append(out)
        )
        with sidechain.steer(pipe, {"mlp:1": torch.full((16,), 50.0)}):
            call_tiny(pipe, steps=1)
        handle.remove()
        assert float(before[0].abs().max()) < 40

    def test_gradients_flow(self) -> None:
        pipe = tiny_pipeline()
        mlp = pipe.transformer.transformer_blocks[0].ff
        weights = mlp.net[-1].weight.requires_grad_()
        tap = sidechain.steer(pipe, {"mlp:0": direction(16), "block:1": direction(16)})

        def gradient() -> Tensor:
            tracker = tap.tracker if tap.attached else None
            if tracker is not None:
                tracker.begin(1)
            states = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
            out = pipe.transformer(
                states[:, : pipe.transformer.config.in_channels],
                torch.ones(1),
                encoder_hidden_states=torch.ones(2, 4, 12),
                global_hidden_states=torch.ones(
                    2, 1, pipe.transformer.config.global_states_input_dim
                ),
                return_dict=False,
            )[0]
            (found,) = torch.autograd.grad(out.square().sum(), weights)
            return found

        with tap:
            found = gradient()
        edit = {"transformer_blocks.0.ff": 1.0, "transformer_blocks.1": 1.0}

        def add(site: Site, out: Tensor) -> Tensor:
            return out + torch.tensor([0.0, edit[site.name]])[:, None, None] * direction(16)

        with hooked(sidechain.sites(pipe, list(edit)), add):
            expected = gradient()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class TestHalfPrecision:
    @pytest.mark.parametrize("name", ["sd", "sd3", "sana"])
    def test_values_are_those_of_the_modules(self, name: str) -> None:
        runs = Runs(name, tiny_pipeline(name, dtype=torch.bfloat16))
        result, outputs = runs.plain
        place = Where(runs.sites, branches="all")
        with sidechain.capture(runs.pipe, place, reduce="tokens", dtype=torch.bfloat16) as cap:
            assert torch.equal(runs.run(), result)
        for site in runs.sites:
            assert torch.equal(cap[site].flatten(1, 2), outputs[site.name]), site
        with sidechain.patch(runs.pipe, place, output=cap):
            assert torch.equal(runs.run(), result)


class TestCompile:
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("how", ["wrapper", "in place", "blocks"])
    def test_attached_before_or_after_the_first_call(self, how: str, when: str) -> None:
        torch._dynamo.reset()
        pipe = tiny_pipeline()
        vector = {"block:1": direction(16), "mlp:0": direction(16), "cross:2": direction(16)}
        plain = call_tiny(pipe)
        with sidechain.steer(pipe, vector):
            wanted = call_tiny(pipe)
        assert not torch.allclose(plain, wanted)
        counter = CompileCounter()
        if how == "wrapper":
            pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
        elif how == "in place":
            pipe.transformer.compile(backend=counter, fullgraph=True)
        else:
            blocks: nn.ModuleList = pipe.transformer.transformer_blocks
            for i in range(len(blocks)):
                blocks[i] = torch.compile(blocks[i], backend=counter, fullgraph=True)
        if when == "after":
            torch.testing.assert_close(call_tiny(pipe), plain)
        with sidechain.steer(pipe, vector) as tap, sidechain.capture(pipe, "block:*") as cap:
            torch.testing.assert_close(call_tiny(pipe), wanted)
            graphs = counter.frame_count
            tap.strength = 0.0
            torch.testing.assert_close(call_tiny(pipe), plain)
            assert counter.frame_count == graphs  # another strength is no other graph
        assert bool(cap["block:2"].any())
        torch.testing.assert_close(call_tiny(pipe), plain)

    @pytest.mark.parametrize("name", ["flux", "sd"])
    def test_tuples_and_maps(self, name: str) -> None:
        torch._dynamo.reset()
        pipe = tiny_pipeline(name)
        component = "unet" if name == "sd" else "transformer"
        place = {"flux": "block:1-2", "sd": "resnet:mid"}[name]
        vector = {s.name: direction(s.width) for s in sidechain.sites(pipe, place)}
        with sidechain.steer(pipe, vector):
            wanted = call_tiny(pipe)
        counter = CompileCounter()
        setattr(pipe, component, torch.compile(getattr(pipe, component), backend=counter))
        plain = call_tiny(pipe)
        assert not torch.allclose(plain, wanted)
        with sidechain.steer(pipe, vector), sidechain.capture(pipe, place) as cap:
            torch.testing.assert_close(call_tiny(pipe), wanted, rtol=1e-4, atol=1e-5)
        assert all(bool(cap[site].any()) for site in cap.sites)
