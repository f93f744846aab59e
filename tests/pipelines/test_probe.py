# SPDX-License-Identifier: Apache-2.0
"""probe: what it finds in pipelines whose families we know, and in one of no family."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidechain
from pipelines.made_up import MadeUpPipeline
from sidechain import Where
from sidechain.pipelines import adapter, register_adapter
from sidechain.pipelines.probed import Probed
from sidechain.testing import contract, tiny_call, tiny_pipeline

ORDER = {1: ("cond",), 2: ("cond", "uncond")}
PROMPTS = ["piano", "drums"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    known = dict(adapter._REGISTRY)
    monkeypatch.setattr(adapter, "_REGISTRY", known)
    return known


def probed(name: str, **changes: Any) -> tuple[Any, Any]:
    pipe = tiny_pipeline(name)
    steps = 3 if name in ("ace_step", "pixart", "sd_img2img") else 1
    return pipe, sidechain.probe(pipe, **tiny_call(pipe, steps=steps, seeds=(0, 1), **changes))


class TestKnownFamilies:
    """What our families say is the answer that a probe has to find, or not to know."""

    @pytest.mark.parametrize(
        "name", ["stable_audio", "stable_audio3", "audioldm2", "sd", "sdxl", "sd3", "flux",
                 "pixart", "sana", "ddpm", "ace_step", "music"],
    )  # fmt: skip
    def test_modules(self, name: str) -> None:
        pipe, found = probed(name)
        component = "unet" if hasattr(pipe, "unet") else "transformer"
        assert (found.component, found.samples, found.calls) == (component, 2, 1)
        modules = {module.name: module for module in found.modules}
        rows = found.rows
        listed = list(sidechain.sites(pipe))
        for kind in ("block", "mlp"):
            if name != "ddpm":
                listed += sidechain.sites(pipe, kind=kind)
        for site in listed:
            module = modules[site.name]
            assert module.role == ("attention" if site.is_attention else site.kind), site
            assert module.calls == 1
            element = 0 if site.kind == "joint" else site.element
            answer = module.latents(rows, element)
            assert isinstance(answer, tuple) and answer[1] == site.width, (site, answer)
            if site.is_attention:
                assert (module.context is not None) == (site.kind != "self"), site
            holds = site.goes == "holds the residual"
            assert module.residual in ("not known", "yes" if holds else "no"), site

    def test_residuals_are_found(self) -> None:
        for name in ("stable_audio", "ddpm", "flux", "ace_step"):
            _, found = probed(name)
            roles = {m.name: m.residual for m in found.modules if m.role and "block" not in m.name}
            assert "not known" not in roles.values(), (name, roles)

    def test_arguments(self) -> None:
        _, found = probed("stable_audio")
        assert (found.latents.name, found.latents.place) == ("hidden_states", 0)
        assert "encoder_hidden_states" in {c.name for c in found.contexts}
        assert (found.timestep.name, found.timestep.place) == ("timestep", 1)
        _, found = probed("flux")
        assert found.timestep is None  # given in thousandths

    def test_a_tuple_is_not_guessed(self) -> None:
        _, found = probed("flux")
        block = next(m for m in found.modules if m.name == "transformer_blocks.0")
        assert "say which with elements" in block.latents(found.rows, None)
        assert "transformer_blocks.0 " in str(found) and "say which with elements" in str(found)

    def test_channels_in_front_are_not_taken_for_tokens(self) -> None:
        class Convolutions(nn.Module):  # [R, C, T], and a linear layer as wide as there are tokens
            def __init__(self) -> None:
                super().__init__()
                self.attention, self.time = nn.Conv1d(7, 7, 1), nn.Linear(16, 16)
                self.to_q = self.to_k = self.to_v = self.attention

            def forward(self, states: Tensor) -> Tensor:
                return self.attention(states) + self.time(torch.ones(len(states), 1, 16))

        pipe = MadeUpPipeline(odd=True)
        pipe.denoiser.odd = Convolutions()
        found = sidechain.probe(pipe, PROMPTS)
        odd = next(m for m in found.modules if m.name == "odd")
        assert odd.role == "attention"
        assert "[R, T, C] or [R, C, T] is not known" in odd.latents(found.rows, None)

    def test_a_residual_of_zeros_is_not_taken_for_none(self) -> None:
        pipe = MadeUpPipeline(odd=True)
        pipe.denoiser.layers[1].register_forward_hook(lambda m, a, out: (out[0], out[1] * 0))
        found = sidechain.probe(pipe, PROMPTS)
        assert {m.name: m.residual for m in found.modules}["odd"] == "not known"

    def test_two_denoiser_calls_in_a_step(self) -> None:
        _, found = probed("longcat_audio")
        assert found.calls == 2
        with pytest.raises(ValueError, match="expected the branch of each of 2 denoiser calls"):
            found.adapter({1: ("cond",)})
        with pytest.raises(ValueError, match="expected 2 different names of cond, uncond"):
            found.adapter({}, calls=("cond", "cond"))
        with pytest.raises(ValueError, match="expected the branch of each of 1 denoiser calls"):
            probed("sd")[1].adapter({}, calls=("cond", "uncond"))

    def test_calls_are_followed(self, registry: dict[Any, Any]) -> None:
        pipe, found = probed("longcat_audio")
        call = functools.partial(tiny_call, pipe, steps=2, seeds=(0, 1))
        place = Where("block:*", branches="all")
        with sidechain.capture(pipe, place, reduce="tokens") as family:
            pipe(**call())
        del registry["LongCatAudioDiTTransformer", None]
        made = found.adapter({}, calls=("cond", "uncond"))
        register_adapter(found.denoiser_class, made)
        with sidechain.capture(pipe, place, reduce="tokens") as cap:
            pipe(**call())
        assert cap.branches == family.branches == ("cond", "uncond")
        assert all(torch.equal(cap[site], family[site.name]) for site in cap.sites)

    def test_an_adapter_does_what_the_family_does(self, registry: dict[Any, Any]) -> None:
        pipe, found = probed("stable_audio")
        call = functools.partial(tiny_call, pipe, steps=2, seeds=(0, 1))
        place = Where(["*", "block:*", "mlp:*"], branches="all")
        with sidechain.capture(pipe, place, reduce="tokens") as family:
            pipe(**call())
        for key in [k for k in registry if k[0] == "StableAudioDiTModel"]:
            del registry[key]
        with pytest.raises(TypeError, match=r"sidechain\.probe"):
            sidechain.sites(pipe)
        branches = {1: ("cond",), 2: ("uncond", "cond")}
        made = found.adapter(branches, contexts=("encoder_hidden_states",))
        register_adapter(found.denoiser_class, made)
        with sidechain.capture(pipe, place, reduce="tokens") as cap:
            pipe(**call())
        assert cap.sites.names == family.sites.names and cap.branches == family.branches
        assert [s.kind for s in cap.sites] == [s.kind for s in family.sites]
        for site in cap.sites:
            assert torch.equal(cap[site], family[site.name])


class TestWhatIsNoSite:
    @pytest.mark.parametrize(
        ("changes", "element", "why"),
        [
            ({}, None, (6, 8)),
            ({"output": (4, 8, 2, 3)}, None, (6, 8)),
            ({"output": [(4, 3, 8), (4, 6, 8)]}, 1, (6, 8)),
            ({"output": [(4, 2, 8), (4, 4, 8)]}, 1, (4, 8)),  # parts of one sequence of 6
            ({"output": [(4, 3, 8), (4, 6, 8)]}, None, "it puts out 2 values: say which"),
            ({"output": [(4, 3, 8), (4, 6, 8)]}, 2, "it puts out 2 values, and elements says 2"),
            ({"output": [(4, 3, 8), "NoneType"]}, 1, "it puts out NoneType, no"),
            ({"output": (4, 8)}, None, r"it puts out [4, 8], no [R, T, C] or"),
            ({"output": (2, 6, 8)}, None, "it puts out 2 rows of 4"),
            ({"calls": 0}, None, "it runs 0 times in a denoiser call"),
            ({"calls": 2}, None, "it runs 2 times in a denoiser call"),
            ({"output": (4, 8, 6)}, None, "whether [4, 8, 6] is [R, T, C] or [R, C, T]"),
            ({"output": (4, 5, 8)}, None, "whether [4, 5, 8] is [R, T, C] or [R, C, T]"),
        ],
    )
    def test_reasons(self, changes: Any, element: int | None, why: Any) -> None:
        module = Probed(
            name="layers.0", class_name="Layer", role="block", calls=1, output=(4, 6, 8),
            context=None, residual="no", layers=frozenset({(6, 8)}), processor=False,
        )  # fmt: skip
        found = dataclasses.replace(module, **changes).latents(4, element)
        assert found.startswith(why) if isinstance(found, str) else found == why

    def test_attention_that_may_read_either_of_two_contexts(self, registry: dict[Any, Any]) -> None:
        pipe = MadeUpPipeline()
        found = sidechain.probe(pipe, PROMPTS, steps=2)
        (context,) = found.contexts
        other = dataclasses.replace(context, name="other", place=3)
        both = dataclasses.replace(found, contexts=(context, other))
        register_adapter("MadeUpDenoiser", both.adapter(ORDER))
        with pytest.raises(ValueError, match="which context it reads is not known: name one"):
            sidechain.sites(pipe, "layers.0.text")
        registry["MadeUpDenoiser", None] = both.adapter(ORDER, contexts=("context",))
        assert sidechain.sites(pipe, "layers.0.text")[0].reads == "context"


class TestUnknown:
    def found(self, pipe: Any) -> Any:
        return sidechain.probe(pipe, PROMPTS, steps=2)

    def test_it_is_left_as_it_was(self) -> None:
        pipe = MadeUpPipeline()
        before, state = pipe(PROMPTS), copy.copy(vars(pipe.scheduler))
        self.found(pipe)
        assert set(vars(pipe.scheduler)) == set(state)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.denoiser.modules())
        assert torch.equal(pipe(PROMPTS), before)

    @pytest.mark.parametrize("divide", [1000.0, 1.0])
    def test_the_contract(self, registry: dict[Any, Any], divide: float) -> None:
        pipe = MadeUpPipeline(divide=divide)
        found = self.found(pipe)
        assert (found.timestep is None) == (divide != 1.0)
        register_adapter("MadeUpDenoiser", found.adapter(ORDER))
        runs = contract.Runs(
            pipe, functools.partial(pipe, PROMPTS), ("cond", "uncond"), off={"guidance": 1.0}
        )
        for check in contract.CHECKS:
            check(runs)

    def test_places(self, registry: dict[Any, Any]) -> None:
        pipe = MadeUpPipeline(odd=True)
        made = self.found(pipe).adapter(ORDER, elements={"layers.*": 1})
        register_adapter("MadeUpDenoiser", made)
        found = sidechain.sites(pipe, ["layers.1", "odd"])
        assert [(s.kind, s.element, s.goes) for s in found] == [
            ("block", 1, "holds the residual"), ("module", None, "holds the residual"),
        ]  # fmt: skip
        seen: list[Tensor] = []
        handle = pipe.denoiser.odd.register_forward_hook(lambda m, a, out: seen.append(out))
        with sidechain.capture(pipe, Where("odd", branches="all"), reduce="tokens") as cap:
            pipe(PROMPTS)
        handle.remove()
        assert torch.equal(cap["odd"].flatten(1, 2), torch.stack(seen))
        with pytest.raises(NotImplementedError, match="without a residual inside"):
            sidechain.patch(pipe, "odd", ablate=True)

    def test_a_block_whose_element_is_not_told(self, registry: dict[Any, Any]) -> None:
        pipe = MadeUpPipeline()
        register_adapter("MadeUpDenoiser", self.found(pipe).adapter(ORDER))
        with pytest.raises(ValueError, match="it puts out 2 values: say which with elements"):
            sidechain.sites(pipe, "layers.0")

    def test_other_latents_than_probed(
        self, registry: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe = MadeUpPipeline()
        register_adapter("MadeUpDenoiser", self.found(pipe).adapter(ORDER))
        monkeypatch.setattr(pipe, "prepare_latents", lambda samples: torch.ones(samples, 9, 4))
        with (
            pytest.raises(RuntimeError, match=r"expected latents of \[6, 4\] .* got \[9, 4\]"),
            sidechain.capture(pipe, "cross:0"),
        ):
            pipe(PROMPTS)

    @pytest.mark.parametrize(
        ("branches", "options", "match"),
        [
            ({1: ("cond",)}, {}, r"expected branches for 4 rows of 2 samples, got those of \[1\]"),
            ({2: ("cond", "cond")}, {}, "expected 2 different names of cond, uncond"),
            ({2: ("cond",)}, {}, "expected 2 different names of cond, uncond"),
            ({2: ("cond", "null")}, {}, "expected 2 different names of cond, uncond"),
            (ORDER, {"elements": {"layers.*.mlp": 1}}, "expected elements of modules that put out"),
            (ORDER, {"contexts": ("text",)}, r"expected contexts of \['context'\], got \['text'\]"),
        ],
    )
    def test_bad_adapters(self, branches: Any, options: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            self.found(MadeUpPipeline()).adapter(branches, **options)

    def test_no_pipeline(self) -> None:
        with pytest.raises(TypeError, match="expected a pipeline with models and a scheduler"):
            sidechain.probe(object())

    def test_a_pipeline_without_a_step(self) -> None:
        class Lazy(MadeUpPipeline):
            def __call__(self, prompts: list[str], **call: Any) -> Any:
                return self.denoiser(torch.ones(2, 6, 4), torch.ones(1), torch.ones(2, 5, 12))

        with pytest.raises(RuntimeError, match="got no step in this call of Lazy"):
            sidechain.probe(Lazy(), PROMPTS)

    def test_a_compiled_denoiser(self) -> None:
        pipe = MadeUpPipeline()
        pipe.denoiser = torch.compile(pipe.denoiser, backend="eager")
        pipe(PROMPTS)
        with pytest.raises(RuntimeError, match="expected a denoiser that is not compiled"):
            sidechain.probe(pipe, PROMPTS)

    def test_an_error_of_the_pipeline_comes_through(self) -> None:
        pipe = MadeUpPipeline()
        pipe.denoiser.to_out = nn.Identity()
        pipe.denoiser.layers[0].mlp = nn.Linear(3, 3)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            sidechain.probe(pipe, PROMPTS)
        assert not any(m._forward_hooks for m in pipe.denoiser.modules())
