# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.testing import generate, tiny_pipeline
from taps.support import placed

CLEAN = ["violin song", "flute loop"]
CORRUPTED = ["piano song", "drums loop"]


@pytest.fixture
def clean(pipe: Any) -> Tensor:
    return sidechain.contexts(pipe, CLEAN)


class TestContext:
    @pytest.mark.parametrize("scheduler", ["edm", "heun"])
    def test_all_sites_equal_the_clean_run(self, scheduler: str) -> None:
        pipe = tiny_pipeline(scheduler=scheduler)
        expected = generate(pipe, CLEAN)
        assert not torch.equal(expected, generate(pipe, CORRUPTED))
        context = sidechain.contexts(pipe, CLEAN)
        with sidechain.patch(pipe, "cross:*", context=context):
            assert torch.equal(generate(pipe, CORRUPTED), expected)

    def test_no_row_equals_the_corrupted_run(self, pipe: Any, clean: Tensor) -> None:
        expected = generate(pipe, CORRUPTED)
        with sidechain.patch(pipe, "cross:*", context=clean, rows=[False, False]):
            assert torch.equal(generate(pipe, CORRUPTED), expected)

    def test_some_rows(self, pipe: Any, clean: Tensor) -> None:
        corrupted = generate(pipe, CORRUPTED)
        with sidechain.patch(pipe, "cross:1", context=clean, rows=[False, True]):
            out = generate(pipe, CORRUPTED)
        assert torch.equal(out[0], corrupted[0]) and not torch.equal(out[1], corrupted[1])

    def test_every_single_site_in_one_batch(self, pipe: Any) -> None:
        """Row l patched at layer l only = one run for each layer, up to the batched GEMMs."""
        layers = 3
        context = sidechain.contexts(pipe, CLEAN[0])
        rows = {f"cross:{i}": [i == r for r in range(layers)] for i in range(layers)}
        with sidechain.patch(pipe, "cross:*", context=context, rows=rows):
            batched = generate(pipe, [CORRUPTED[0]] * layers, seeds=[3] * layers)
        for layer in range(layers):
            with sidechain.patch(pipe, f"cross:{layer}", context=context):
                alone = generate(pipe, [CORRUPTED[0]], seeds=[3])
            error = (batched[layer] - alone[0]).norm() / alone.norm()
            assert error <= 2e-5, f"layer {layer}: {error}"

    def test_step_window(self, pipe: Any, clean: Tensor) -> None:
        seen: list[Tensor] = []
        expected: list[Tensor] = []

        def keep(into: list[Tensor]) -> Any:
            return lambda step, timestep, latents: into.append(latents.clone())

        generate(pipe, CORRUPTED, callback=keep(expected))
        with sidechain.patch(pipe, Where("cross:*", steps=(2, 3)), context=clean):
            generate(pipe, CORRUPTED, callback=keep(seen))
        same = [torch.equal(a, b) for a, b in zip(seen, expected, strict=True)]
        assert same == [True, True, False, False]

    def test_several_runs_in_one_context(self, pipe: Any, clean: Tensor) -> None:
        first, second = generate(pipe, CLEAN[:1] * 2), generate(pipe, CLEAN[:1] * 3)
        with sidechain.patch(pipe, "cross:*", context=clean[:1]):
            torch.testing.assert_close(generate(pipe, CORRUPTED), first)
            torch.testing.assert_close(generate(pipe, CORRUPTED[:1] * 3), second)

    def test_branches(self, pipe: Any, clean: Tensor) -> None:
        negative = ["rock", "jazz"]
        with sidechain.patch(pipe, Where("cross:*", branches="uncond"), context=clean):
            out = generate(pipe, CORRUPTED, negative_prompt=negative)
        assert torch.equal(out, generate(pipe, CORRUPTED, negative_prompt=CLEAN))
        with sidechain.patch(pipe, Where("cross:*", branches="all"), context=clean):
            out = generate(pipe, CORRUPTED, negative_prompt=negative)
        assert torch.equal(out, generate(pipe, CLEAN, negative_prompt=CLEAN))

    def test_guidance_off(self, pipe: Any) -> None:
        # Products of fewer rows may round otherwise, those of the text encoder too (AVX-512).
        clean = sidechain.contexts(pipe, CLEAN, guidance_scale=1.0)
        with sidechain.patch(pipe, "cross:*", context=clean):
            out = generate(pipe, CORRUPTED, guidance_scale=1.0)
        assert torch.equal(out, generate(pipe, CLEAN, guidance_scale=1.0))

    def test_a_processor_called_with_positions(self, pipe: Any, clean: Tensor) -> None:
        module = sidechain.sites(pipe)["cross:1"].module
        x, text = torch.randn(4, 9, 16), torch.randn(4, 10, 12)
        with sidechain.patch(pipe, "cross:1", context=clean):
            generate(pipe, CORRUPTED)
            by_name = module(x, encoder_hidden_states=text)
            assert torch.equal(module.processor(module, x, text, None), by_name)
        assert not torch.equal(module(x, encoder_hidden_states=text), by_name)

    @pytest.mark.parametrize("option", ["context", "key", "value"])
    def test_a_mask_is_refused(self, pipe: Any, clean: Tensor, option: str) -> None:
        module = sidechain.sites(pipe)["cross:1"].module
        x, text = torch.randn(4, 9, 16), torch.randn(4, 10, 12)
        with sidechain.patch(pipe, "cross:1", **{option: clean}):
            generate(pipe, CORRUPTED)
            with pytest.raises(
                (NotImplementedError, ValueError),
                match=r"expected (cross-attention without a mask|a context with its mask)",
            ):
                module(x, encoder_hidden_states=text, attention_mask=torch.ones(4, 10))


class TestKeyAndValue:
    def test_both_are_the_context(self, pipe: Any, clean: Tensor) -> None:
        expected = generate(pipe, CLEAN)
        with sidechain.patch(pipe, "cross:*", key=clean, value=clean):
            assert torch.equal(generate(pipe, CORRUPTED), expected)

    def test_each_alone_is_something_else(self, pipe: Any, clean: Tensor) -> None:
        results = []
        for arguments in ({}, {"key": clean}, {"value": clean}, {"context": clean}):
            if not arguments:
                results.append(generate(pipe, CORRUPTED))
                continue
            with sidechain.patch(pipe, "cross:1", **arguments):
                results.append(generate(pipe, CORRUPTED))
        for i, a in enumerate(results):
            for b in results[:i]:
                assert not torch.equal(a, b)

    def test_equals_swapping_the_projections(self, pipe: Any, clean: Tensor) -> None:
        module = sidechain.sites(pipe)["cross:1"].module
        forward = module.to_k.forward
        bank = torch.cat([torch.zeros_like(clean), clean])
        module.to_k.forward = lambda context: forward(bank)
        try:
            expected = generate(pipe, CORRUPTED)
        finally:
            del module.to_k.forward
        with sidechain.patch(pipe, "cross:1", key=clean):
            assert torch.equal(generate(pipe, CORRUPTED), expected)


class TestOutput:
    def test_substituting_what_was_there_changes_nothing(self, pipe: Any) -> None:
        expected = generate(pipe, CORRUPTED)
        with sidechain.capture(pipe, "cross:*", reduce="tokens") as cap:
            generate(pipe, CORRUPTED)
        with sidechain.patch(pipe, "cross:*", output=cap):
            assert torch.equal(generate(pipe, CORRUPTED), expected)
        with sidechain.patch(pipe, "cross:0", output=cap["cross:0"][:, 0]):
            assert torch.equal(generate(pipe, CORRUPTED), expected)

    def test_clean_outputs_everywhere_give_the_clean_run(self, pipe: Any) -> None:
        expected = generate(pipe, CLEAN)
        with sidechain.capture(pipe, Where("*", branches="all"), reduce="tokens") as cap:
            generate(pipe, CLEAN)
        with sidechain.patch(pipe, Where("*", branches="all"), output=cap):
            assert torch.equal(generate(pipe, CORRUPTED), expected)

    def test_rows_and_window(self, pipe: Any) -> None:
        with sidechain.capture(pipe, Where("cross:1", steps=(0, 2)), reduce="tokens") as cap:
            generate(pipe, CLEAN)
        corrupted = generate(pipe, CORRUPTED)
        outputs = {"cross:1": cap["cross:1"]}
        with sidechain.patch(
            pipe, Where("cross:1", steps=(0, 2)), output=outputs, rows=[True, False]
        ):
            out = generate(pipe, CORRUPTED)
        assert torch.equal(out[1], corrupted[1]) and not torch.equal(out[0], corrupted[0])

    def test_ablation_is_a_zero_output(self, pipe: Any, hooked: Any) -> None:
        handle = hooked(
            pipe, "cross:1", lambda out: torch.cat([out[:2], torch.zeros_like(out[2:])])
        )
        expected = generate(pipe, CORRUPTED)
        handle.remove()
        with sidechain.patch(pipe, "cross:1", ablate=True):
            assert torch.equal(generate(pipe, CORRUPTED), expected)

    def test_capture_sees_the_patched_output(self, pipe: Any) -> None:
        with (
            sidechain.capture(pipe, "cross:1") as cap,
            sidechain.patch(pipe, "cross:1", ablate=True),
        ):
            generate(pipe, CORRUPTED)
        assert not cap["cross:1"].any()


class TestContract:
    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({}, ValueError, "exactly one of .* got none"),
            ({"context": torch.zeros(2, 10, 12), "ablate": True}, ValueError, "got context, abl"),
            ({"context": torch.zeros(2, 10, 11)}, ValueError, r"expected context .* 12\]"),
            ({"context": torch.zeros(12)}, ValueError, "expected context of shape"),
            ({"context": torch.zeros(2, 10, 12).int()}, TypeError, "got torch.int32"),
            ({"context": "piano"}, TypeError, "got str"),
            ({"context": torch.zeros(2, 10, 12, device="meta")}, ValueError, "got meta"),
            ({"output": torch.zeros(4, 2, 9, 15)}, ValueError, "expected output of shape"),
            ({"output": torch.zeros(4, 2, 9, 16, device="meta")}, ValueError, "got meta"),
            ({"output": 3}, TypeError, "expected output as a tensor"),
            ({"output": {"cross:0": torch.zeros(4, 2, 9, 16)}}, ValueError, "for every site"),
            ({"ablate": True, "rows": [1, 0]}, TypeError, "expected True or False in rows"),
            ({"ablate": True, "rows": {"cross:0": [True]}}, ValueError, "expected rows for every"),
            ({"ablate": True, "rows": {"cross:9": [True]}}, ValueError, "got 'cross:9'"),
            ({"ablate": True, "branches": "none"}, ValueError, "expected branches"),
            ({"ablate": True, "tokens": slice(1)}, NotImplementedError, "expected no tokens"),
            ({"ablate": True, "steps": (2, 2)}, ValueError, "expected 0 <= start < stop"),
        ],
    )
    def test_bad_options(
        self, pipe: Any, arguments: dict[str, Any], error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            sidechain.patch(pipe, **placed(arguments, "cross:*"))

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"context": torch.zeros(3, 10, 12)}, r"expected context of shape \[2, 10, 12\]"),
            ({"context": torch.zeros(2, 7, 12)}, r"expected context of shape \[2, 10, 12\]"),
            ({"output": torch.zeros(9, 2, 9, 16)}, r"expected output of shape \[4, 2, 9, 16\]"),
            ({"output": torch.zeros(4, 5, 2, 9, 16)}, "expected output with 1 or 1 branches"),
            ({"ablate": True, "rows": [True] * 3}, "expected rows .* length 1 or 2"),
            ({"ablate": True, "steps": (8, 9)}, "expected a window"),
        ],
    )
    def test_options_that_do_not_fit_the_run(
        self, pipe: Any, arguments: dict[str, Any], match: str
    ) -> None:
        with (
            pytest.raises(ValueError, match=match),
            sidechain.patch(pipe, **placed(arguments, "cross:*")),
        ):
            generate(pipe, CORRUPTED)

    def test_self_attention_has_no_context(self, pipe: Any, clean: Tensor) -> None:
        with pytest.raises(ValueError, match="expected cross-attention sites"):
            sidechain.patch(pipe, "self:1", context=clean)

    def test_pooled_captures_are_no_outputs(self, pipe: Any) -> None:
        with sidechain.capture(pipe, "cross:1") as cap:
            generate(pipe, CORRUPTED)
        with pytest.raises(ValueError, match="expected a capture with reduce='tokens'"):
            sidechain.patch(pipe, "cross:1", output=cap)
