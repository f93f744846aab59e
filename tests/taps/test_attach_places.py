# SPDX-License-Identifier: Apache-2.0
"""How taps are put at blocks, MLPs and layers, and taken out: copies, wrappers, compiled code."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sidechain
from pipelines.plain_hooks import Runs, direction, hooked
from sidechain import Where
from sidechain.pipelines import Site
from sidechain.testing import call_tiny, tiny_pipeline


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


def test_maps_and_heads_are_of_attention() -> None:
    pipe = tiny_pipeline("stable_audio")
    with pytest.raises(ValueError, match=r"\[reduce='maps' .*, which is a block"):
        sidechain.capture(pipe, "block:0", reduce="maps")
    with pytest.raises(NotImplementedError, match="expected an output projection"):
        sidechain.capture(pipe, "block:0", reduce="heads")
