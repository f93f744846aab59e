# SPDX-License-Identifier: Apache-2.0
"""How taps come and go, and what they meet in real pipelines."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidechain
from sidechain import Where
from sidechain.testing import generate, tiny_pipeline

PROMPTS = ["piano song", "drums loop"]


def processors(pipe: Any) -> list[Any]:
    return [site.module.processor for site in sidechain.sites(pipe)]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


class TestRestore:
    def test_the_same_objects_come_back(self, pipe: Any, direction: Tensor) -> None:
        before = processors(pipe)
        with sidechain.capture(pipe, "*"), sidechain.steer(pipe, {"cross:1": direction}):
            assert not same(processors(pipe), before)
            generate(pipe, PROMPTS)
        assert same(processors(pipe), before)

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_in_any_order(self, pipe: Any, direction: Tensor, order: tuple[int, ...]) -> None:
        before, plain = processors(pipe), generate(pipe, PROMPTS)
        taps = [
            sidechain.capture(pipe, "cross:1"),
            sidechain.steer(pipe, {"cross:1": direction}, strength=0.0),
            sidechain.patch(pipe, "cross:*", ablate=True, rows=[False, False]),
        ]
        for tap in taps:
            tap.attach()
        assert torch.equal(generate(pipe, PROMPTS), plain)
        for i in order:
            taps[i].remove()
            assert torch.equal(generate(pipe, PROMPTS), plain)
        assert same(processors(pipe), before)

    def test_after_a_pipeline_that_raises(self, pipe: Any, direction: Tensor) -> None:
        before, plain = processors(pipe), generate(pipe, PROMPTS)

        def stop(step: int, timestep: int, latents: Tensor) -> None:
            raise OSError("disk full")

        with (
            pytest.raises(OSError, match="disk full"),
            sidechain.capture(pipe),
            sidechain.steer(pipe, {"cross:1": direction}),
        ):
            generate(pipe, PROMPTS, callback=stop)
        assert same(processors(pipe), before)
        assert torch.equal(generate(pipe, PROMPTS), plain)

    def test_state_dict_never_changes(self, pipe: Any, direction: Tensor) -> None:
        before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
        with sidechain.capture(pipe, "*"), sidechain.steer(pipe, {"cross:1": direction}):
            generate(pipe, PROMPTS)
            during = pipe.transformer.state_dict()
            assert list(during) == list(before)
        after = pipe.transformer.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], before[k]) for k in before)

    def test_a_processor_that_is_a_module_stays_in_the_state_dict(self, pipe: Any) -> None:
        class Scaled(nn.Module):
            def __init__(self, inner: Any) -> None:
                super().__init__()
                self.inner, self.scale = inner, nn.Parameter(torch.ones(1))

            def __call__(
                self,
                attn: Any,
                hidden_states: Tensor,
                encoder_hidden_states: Tensor | None = None,
                attention_mask: Tensor | None = None,
                rotary_emb: Any = None,
            ) -> Tensor:
                return self.scale * self.inner(
                    attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
                )

        module = sidechain.sites(pipe)["cross:1"].module
        module.set_processor(Scaled(module.processor))
        keys, own = list(pipe.transformer.state_dict()), module.processor
        plain = generate(pipe, PROMPTS)
        with sidechain.capture(pipe, "cross:1"):
            assert list(pipe.transformer.state_dict()) == keys
            assert torch.equal(generate(pipe, PROMPTS), plain)
        assert module.processor is own and list(pipe.transformer.state_dict()) == keys

    def test_a_processor_replaced_meanwhile_stays(self, pipe: Any) -> None:
        module = sidechain.sites(pipe)["cross:1"].module
        mine = type(module.processor)()
        with (
            pytest.warns(RuntimeWarning, match="was replaced while a tap was attached"),
            sidechain.capture(pipe, "cross:1"),
        ):
            generate(pipe, PROMPTS)
            module.set_processor(mine)
        assert module.processor is mine


class TestHandles:
    def test_attach_and_remove(self, pipe: Any) -> None:
        tap = sidechain.capture(pipe, "cross:0").attach()
        assert tap.attached
        generate(pipe, PROMPTS)
        tap.remove()
        tap.remove()
        assert not tap.attached and tap["cross:0"].shape == (4, 1, 2, 16)

    def test_attaching_twice(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:0") as tap:
            with pytest.raises(RuntimeError, match="got an attached"):
                tap.attach()
            generate(pipe, PROMPTS)

    def test_using_a_tap_again_starts_afresh(self, pipe: Any) -> None:
        tap = sidechain.capture(pipe, "cross:0")
        for _ in range(2):
            with tap:
                generate(pipe, PROMPTS)
            assert tap["cross:0"].shape == (4, 1, 2, 16)

    def test_a_handle_that_never_fired_warns(self, pipe: Any) -> None:
        tap = sidechain.capture(pipe, "cross:0-1").attach()
        with pytest.warns(RuntimeWarning, match=r"blocks.0.attn2, transformer_blocks.1.attn2"):
            tap.remove()

    def test_a_context_that_never_fired_raises(self, pipe: Any, direction: Tensor) -> None:
        with (
            pytest.raises(RuntimeError, match=r"got no call at transformer_blocks.2.attn2"),
            sidechain.steer(pipe, {"cross:2": direction}),
        ):
            pass

    def test_but_not_over_another_error(self, pipe: Any, direction: Tensor) -> None:
        with pytest.raises(KeyError), sidechain.steer(pipe, {"cross:2": direction}):
            raise KeyError

    def test_context_of_a_loose_tap(self, pipe: Any) -> None:
        with pytest.raises(RuntimeError, match="expected an attached tap"):
            _ = sidechain.capture(pipe).tracker


class TestWrapper:
    def test_signature_of_the_inner_processor_shows_through(self, pipe: Any) -> None:
        """Without it Attention.forward drops the rotary embedding, with one log line."""
        module = sidechain.sites(pipe)["self:0"].module
        expected = inspect.signature(module.processor.__call__)
        with sidechain.capture(pipe, "self:0"):
            assert inspect.signature(module.processor.__call__) == expected
            generate(pipe, PROMPTS)

    def test_rotary_embedding_is_kept(self, pipe: Any) -> None:
        plain = generate(pipe, PROMPTS)
        rotary = []
        with sidechain.capture(pipe, "self:*"):
            for site in sidechain.sites(pipe, "self:*"):
                inner = site.module.processor._inner

                class Spy:
                    def __init__(self, inner: Any) -> None:
                        self.inner = inner

                    def __call__(self, *args: Any, **kwargs: Any) -> Any:
                        rotary.append(kwargs.get("rotary_emb"))
                        return self.inner(*args, **kwargs)

                site.module.processor._inner = Spy(inner)
            assert torch.equal(generate(pipe, PROMPTS), plain)
            for site in sidechain.sites(pipe, "self:*"):
                site.module.processor._inner = site.module.processor._inner.inner
        assert rotary and all(r is not None for r in rotary)

    def test_attributes_reach_the_inner_processor(self, pipe: Any) -> None:
        module = sidechain.sites(pipe)["cross:0"].module

        class Backed(type(module.processor)):  # type: ignore[misc]
            _attention_backend = None
            _parallel_config = None
            note = "mine"

        own = Backed()
        module.set_processor(own)
        with sidechain.capture(pipe, "cross:0"):
            module.processor._attention_backend = "native"
            assert own._attention_backend == "native" and module.processor.note == "mine"
            assert not hasattr(module.processor, "nothing")
            generate(pipe, PROMPTS)
        assert module.processor is own

    def test_processors_are_listed_and_set_by_diffusers(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:0"):
            assert len(pipe.transformer.attn_processors) == 6
            generate(pipe, PROMPTS)


class TestLora:
    def test_adapters_on_the_output_projection(self, direction: Tensor) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        pipe = tiny_pipeline()
        plain = generate(pipe, PROMPTS)
        with sidechain.steer(pipe, {"cross:1": direction}):
            steered = generate(pipe, PROMPTS)
        config = LoraConfig(
            r=2, target_modules=["to_out.0", "to_k", "to_v"], init_lora_weights=False
        )
        inject_adapter_in_model(config, pipe.transformer)
        adapted = generate(pipe, PROMPTS)
        assert not torch.equal(adapted, plain)
        context = sidechain.contexts(pipe, PROMPTS)
        seen: list[Tensor] = []
        handle = sidechain.sites(pipe)["cross:1"].module.register_forward_hook(
            lambda m, a, out: seen.append(out[2:].mean(1))
        )
        with (
            sidechain.capture(pipe, "cross:1") as cap,
            sidechain.patch(pipe, "cross:*", key=context),
        ):
            assert torch.equal(generate(pipe, PROMPTS), adapted)
        handle.remove()
        torch.testing.assert_close(cap["cross:1"][:, 0], torch.stack(seen))
        for module in pipe.transformer.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(False)
        with sidechain.steer(pipe, {"cross:1": direction}):
            torch.testing.assert_close(generate(pipe, PROMPTS), steered)

    def test_adapter_added_while_attached(self, direction: Tensor) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        pipe = tiny_pipeline()
        before = processors(pipe)
        with sidechain.steer(pipe, {"cross:1": direction}):
            config = LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights=False)
            inject_adapter_in_model(config, pipe.transformer)
            inside = generate(pipe, PROMPTS)
        assert same(processors(pipe), before)
        with sidechain.steer(pipe, {"cross:1": direction}):
            assert torch.equal(generate(pipe, PROMPTS), inside)

    def test_wrapped_by_peft(self, direction: Tensor) -> None:
        from peft import LoraConfig, get_peft_model

        pipe = tiny_pipeline()
        names = sidechain.sites(pipe).names
        with sidechain.steer(pipe, {"cross:1": direction}):
            expected = generate(pipe, PROMPTS)
        pipe.transformer = get_peft_model(
            pipe.transformer, LoraConfig(r=2, target_modules=["to_out.0"])
        )
        assert sidechain.sites(pipe).names == names
        with sidechain.steer(pipe, {"cross:1": direction}):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)


class TestGenerators:
    def test_one_generator_for_several_rows(self, pipe: Any, direction: Tensor) -> None:
        """Rows then differ in their noise; taps still address them right."""
        plain = generate(pipe, PROMPTS, generator=torch.Generator().manual_seed(3))
        with sidechain.steer(pipe, {"cross:1": direction}, strength=[0.0, 2.0]):
            out = generate(pipe, PROMPTS, generator=torch.Generator().manual_seed(3))
        assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], plain[1])

    @pytest.mark.filterwarnings("ignore::UserWarning:torchsde.*")
    def test_stochastic_scheduler(self, direction: Tensor) -> None:
        pytest.importorskip("torchsde")
        pipe = tiny_pipeline(scheduler="cosine")
        plain = generate(pipe, PROMPTS)
        with (
            sidechain.capture(pipe) as cap,
            sidechain.steer(pipe, {"cross:1": direction}, strength=0.0),
        ):
            assert torch.equal(generate(pipe, PROMPTS), plain)
        assert cap["cross:0"].shape == (4, 1, 2, 16)


class TestCompile:
    """One graph for a set of taps; changes of strength, step and window only fill buffers."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> Any:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()

    @staticmethod
    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    @staticmethod
    def compile(pipe: Any, how: str, **options: Any) -> None:
        options = {"backend": "eager", "fullgraph": True, **options}
        if how == "module":
            pipe.transformer = torch.compile(pipe.transformer, **options)
        elif how == "in place":
            pipe.transformer.compile(**options)
        else:
            for block in pipe.transformer.transformer_blocks:
                block.compile(**options)

    @pytest.mark.parametrize("how", ["module", "in place", "blocks"])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_tap_attached_before_or_after(self, direction: Tensor, how: str, when: str) -> None:
        eager, pipe = tiny_pipeline(), tiny_pipeline()
        plain = generate(eager, PROMPTS)
        with (
            sidechain.steer(eager, {"cross:1": direction}, strength=[2.0, 0.0]),
            sidechain.capture(eager) as expected_capture,
        ):
            expected = generate(eager, PROMPTS)
        if when == "after":
            self.compile(pipe, how)
            torch.testing.assert_close(generate(pipe, PROMPTS), plain)
        tap = sidechain.steer(pipe, {"cross:1": direction}, strength=[2.0, 0.0])
        with tap, sidechain.capture(pipe) as cap:
            if when == "before":
                self.compile(pipe, how)
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)
            torch.testing.assert_close(cap["cross:2"], expected_capture["cross:2"])
            count = self.graphs()
            tap.strength = 0.0
            torch.testing.assert_close(generate(pipe, PROMPTS), plain)
            tap.strength = [2.0, 0.0]
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)
            assert self.graphs() == count
        torch.testing.assert_close(generate(pipe, PROMPTS), plain)

    def test_patch(self) -> None:
        pipe = tiny_pipeline()
        context = sidechain.contexts(pipe, ["violin", "flute"])
        with (
            sidechain.patch(pipe, Where("cross:0-1", steps=(1, 3)), context=context),
            sidechain.patch(pipe, "cross:2", value=context, rows=[True, False]),
        ):
            expected = generate(pipe, PROMPTS)
        self.compile(pipe, "in place")
        with (
            sidechain.patch(pipe, Where("cross:0-1", steps=(1, 3)), context=context),
            sidechain.patch(pipe, "cross:2", value=context, rows=[True, False]),
        ):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)
            assert self.graphs() == 1

    @pytest.mark.slow
    def test_inductor(self, direction: Tensor) -> None:
        pipe = tiny_pipeline(layers=1)
        with sidechain.steer(pipe, {"cross:0": direction}), sidechain.capture(pipe) as eager:
            expected = generate(pipe, PROMPTS)
        self.compile(pipe, "in place", backend="inductor")
        with sidechain.steer(pipe, {"cross:0": direction}), sidechain.capture(pipe) as cap:
            torch.testing.assert_close(generate(pipe, PROMPTS), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(cap["cross:0"], eager["cross:0"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda p: sidechain.capture(p, passes="all"),
            r"^capture: .*=Where\(branches=\.\.\.\), got p",
        ),
        (
            lambda p: sidechain.patch(p, "*", ablate=True, steps=(0, 1)),
            r"^patch: .*Where\(steps=\.\.\.\)",
        ),
        (
            lambda p: sidechain.steer(p, {}, sites="*", tokens=None),
            r"^steer: .*\(sites=.*, tokens=",
        ),
    ],
)
def test_keywords_of_earlier_versions(pipe: Any, call: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        call(pipe)


def test_one_place_for_several_taps(pipe: Any, direction: torch.Tensor) -> None:
    """What was captured somewhere can be put back there."""
    where = Where("cross:1", "all", steps=(1, 3))
    with sidechain.capture(pipe, where, reduce="tokens") as cap:
        expected = generate(pipe, PROMPTS)
    with sidechain.patch(pipe, where, output=cap):
        assert torch.equal(generate(pipe, PROMPTS), expected)
    with (
        sidechain.steer(pipe, {"cross:1": direction}, where) as tap,
        sidechain.patch(pipe, where, output=cap),
    ):
        assert tap.mode == "separate"
        assert not torch.equal(generate(pipe, PROMPTS), expected)
