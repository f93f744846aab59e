# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.pipelines import config_hash
from sidechain.sae import Normaliser, Provenance, Sae, SaeConfig
from sidechain.testing import generate, tiny_pipeline
from taps.support import PROMPTS, by_hook, placed

COND, UNCOND = slice(2, 4), slice(0, 2)
STEPS = 4
SITE = "cross:1"
VALUES = {7: ("scale", 4.0), 5: ("set", 0.7), 11: ("add", 0.3), 22: "zero"}
ARCHITECTURES = ("topk", "jumprelu", "batch_topk", "relu", "gated")


def dictionary(
    architecture: str = "topk", *, width: int = 16, seed: int = 0, **options: Any
) -> Sae:
    """A dictionary of random weights, of the size of what the tiny pipeline puts out."""
    k = 6 if architecture in ("topk", "batch_topk") else None
    sae = Sae(SaeConfig(width, 24, architecture, k=k, tied_bias=False), seed=seed, **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_pre = 0.1 * torch.randn(width, generator=g)
        sae.b_enc.copy_(0.2 * torch.randn(24, generator=g).abs())
        sae.b_dec.copy_(torch.randn(width, generator=g))
        if architecture == "batch_topk":
            sae.threshold.fill_(0.2)
        elif architecture == "jumprelu":
            sae.threshold.copy_(0.3 * torch.rand(24, generator=g))
        elif architecture == "gated":
            sae.b_gate.copy_(0.1 * torch.randn(24, generator=g))
    return sae.eval()


def normalised(architecture: str = "topk", **options: Any) -> Sae:
    """One that normalises each of the four steps by itself."""
    g = torch.Generator().manual_seed(5)
    normaliser = Normaliser(
        0.002 * torch.randn(STEPS, 16, generator=g), 0.002 + 0.004 * torch.rand(STEPS, generator=g),
        torch.arange(STEPS), **options,
    )  # fmt: skip
    return dictionary(architecture, normaliser=normaliser)


def dense(sae: Sae, x: Tensor, step: int) -> Tensor:
    """Return the features [N, F] that the dictionary itself reads."""
    codes = sae.encode(x, step=step)
    found = torch.zeros(len(x), sae.config.features)
    if codes.offsets is None:
        kept = codes.indices >= 0
        rows = torch.arange(len(x))[:, None].expand_as(codes.indices)[kept]
        found[rows, codes.indices[kept].long()] = codes.values[kept]
    else:
        rows = torch.repeat_interleave(codes.offsets.diff())
        found[rows, codes.indices.long()] = codes.values
    return found


def formula(sae: Sae, x: Tensor, step: int, values: dict[int, Any], strength: float) -> Tensor:
    """x + strength (decode(f') - decode(f)) for x [..., d], in float64."""
    flat = x.reshape(-1, x.shape[-1])
    f = dense(sae, flat, step).double()
    g = f.clone()
    for feature, value in values.items():
        word, number = (value, 0.0) if isinstance(value, str) else value
        g[:, feature] = {
            "scale": f[:, feature] * number, "add": f[:, feature] + number,
            "set": torch.full_like(f[:, feature], number), "zero": torch.zeros_like(f[:, feature]),
        }[word]  # fmt: skip
    scale = sae.normaliser.scale[sae.normaliser.entry(step)].double()
    moved = scale * ((g - f) @ sae.w_dec.detach().double())
    return (x.double() + strength * moved.view(x.shape)).to(x.dtype)


def edited(
    sae: Sae, rows: slice = COND, tokens: slice = slice(None), strength: float = 1.0,
    values: dict[int, Any] | None = None,
) -> Callable[[Tensor, int], Tensor]:  # fmt: skip
    def edit(out: Tensor, step: int) -> Tensor:
        out[rows, tokens] = formula(sae, out[rows, tokens], step, values or VALUES, strength)
        return out

    return edit


class TestNumerics:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_is_the_formula(self, pipe: Any, architecture: str) -> None:
        sae = normalised(architecture)
        expected = by_hook(pipe, edited(sae))
        with sidechain.edit(pipe, {SITE: sae}, VALUES), sidechain.capture(pipe, SITE) as cap:
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)
        assert not torch.equal(expected, generate(pipe, PROMPTS))
        assert bool(cap[SITE].any())

    def test_the_features_are_active_somewhere(self, pipe: Any) -> None:
        """Otherwise "scale" and "zero" would prove nothing above."""
        with sidechain.capture(pipe, SITE, reduce="tokens") as cap:
            generate(pipe, PROMPTS)
        for architecture in ARCHITECTURES:
            sae = normalised(architecture)
            rows = torch.cat([dense(sae, cap[SITE][s, 0].flatten(0, 1), s) for s in range(STEPS)])
            share = (rows[:, [7, 22]] > 0).float().mean(0)
            assert bool((share > 0.02).all()) and bool((share < 1).any()), (architecture, share)

    @pytest.mark.parametrize("values", [{11: ("add", 0.3)}, {11: ("add", -2.0), 7: ("add", 1.0)}])
    def test_adding_needs_no_encoder(self, pipe: Any, values: dict[int, Any]) -> None:
        sae = normalised()
        expected = by_hook(pipe, edited(sae, values=values))
        with sidechain.edit(pipe, {SITE: sae}, values) as tap:
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)
            (operation,) = tap._operations["transformer_blocks.1.attn2"]
            assert operation.reader is None

    @pytest.mark.parametrize(
        ("branches", "rows"), [("cond", COND), ("uncond", UNCOND), ("all", slice(0, 4))]
    )
    def test_branches(self, pipe: Any, branches: str, rows: slice) -> None:
        sae = normalised("jumprelu")
        expected = by_hook(pipe, edited(sae, rows))
        with sidechain.edit(pipe, {SITE: sae}, VALUES, Where(branches=branches)):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    @pytest.mark.parametrize("tokens", [slice(1, None), slice(2, 7, 2)])
    def test_tokens(self, pipe: Any, tokens: slice) -> None:
        sae = normalised("jumprelu")
        expected = by_hook(pipe, edited(sae, tokens=tokens))
        mask = torch.zeros(9, dtype=torch.bool)
        mask[tokens] = True
        for chosen in (tokens, mask, torch.stack([mask, mask])):
            with sidechain.edit(pipe, {SITE: sae}, VALUES, Where(tokens=chosen)):
                torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    def test_a_mask_for_each_sample(self, pipe: Any) -> None:
        sae, plain = normalised(), generate(pipe, PROMPTS)
        mask = torch.zeros(2, 9, dtype=torch.bool)
        mask[1] = True
        with sidechain.edit(pipe, {SITE: sae}, VALUES):
            whole = generate(pipe, PROMPTS)
        with sidechain.edit(pipe, {SITE: sae}, VALUES, Where(tokens=mask)):
            out = generate(pipe, PROMPTS)
        assert torch.equal(out[0], plain[0]) and torch.equal(out[1], whole[1])

    @pytest.mark.parametrize("steps", [(1, 3), (0.25, 0.75)])
    def test_window(self, pipe: Any, steps: Any) -> None:
        sae = normalised()
        inner = edited(sae)
        expected = by_hook(pipe, lambda out, step: inner(out, step) if 1 <= step < 3 else out)
        with sidechain.edit(pipe, {SITE: sae}, VALUES, Where(steps=steps)):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    def test_values_of_each_site(self, pipe: Any) -> None:
        saes = {"cross:0": normalised("jumprelu"), SITE: normalised()}
        values = {"cross:0": {7: ("scale", -2.0)}, SITE: {5: ("set", 1.0), 2: "zero"}}
        with (
            sidechain.edit(pipe, {"cross:0": saes["cross:0"]}, values["cross:0"]),
            sidechain.edit(pipe, {SITE: saes[SITE]}, values[SITE]),
        ):
            expected = generate(pipe, PROMPTS)
        with sidechain.edit(pipe, saes, values) as tap:
            assert torch.equal(generate(pipe, PROMPTS), expected)
            assert tap.values == values

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        """Computed in float32 and rounded once."""
        pipe, sae = tiny_pipeline(dtype=dtype), normalised()
        expected = by_hook(pipe, edited(sae), steps=STEPS)
        with sidechain.edit(pipe, {SITE: sae}, VALUES):
            found = generate(pipe, PROMPTS, steps=STEPS)
        torch.testing.assert_close(found, expected)

    def test_double_precision(self) -> None:
        pipe, sae = tiny_pipeline().to(torch.float64), dictionary("jumprelu")
        module = sidechain.sites(pipe)[SITE].module
        x, text = torch.randn(4, 9, 16).double(), torch.randn(4, 10, 12).double()
        plain = module(x, encoder_hidden_states=text)
        with sidechain.edit(pipe, {SITE: sae}, VALUES) as tap:
            tap.tracker.begin(2, 1)
            denoise(pipe, torch.randn(4, 3, 8).double(), text)
            found = module(x, encoder_hidden_states=text)
        torch.testing.assert_close(found[COND], formula(sae, plain[COND], 0, VALUES, 1.0))
        assert torch.equal(found[UNCOND], plain[UNCOND])

    def test_another_number_of_steps(self, pipe: Any) -> None:
        with sidechain.capture(pipe) as cap:
            generate(pipe, PROMPTS)
        sae = normalised(timesteps=cap.timesteps)
        with sidechain.capture(pipe) as cap:
            generate(pipe, PROMPTS, steps=6)
        moved = dictionary(normaliser=sae.normaliser.resampled(cap.timesteps))
        expected = by_hook(pipe, edited(moved), steps=6)
        with sidechain.edit(pipe, {SITE: sae}, VALUES):
            torch.testing.assert_close(generate(pipe, PROMPTS, steps=6), expected)


def denoise(pipe: Any, latents: Tensor, text: Tensor) -> Tensor:
    extra = torch.ones(len(latents), 1, 24, dtype=latents.dtype)
    found: Tensor = pipe.transformer(
        latents, torch.ones(1, dtype=latents.dtype), encoder_hidden_states=text,
        global_hidden_states=extra,
    ).sample  # fmt: skip
    return found


class TestStrength:
    def test_zero_is_bit_identical(self, pipe: Any) -> None:
        plain = generate(pipe, PROMPTS)
        with sidechain.edit(pipe, {SITE: normalised()}, VALUES, strength=0.0):
            assert torch.equal(generate(pipe, PROMPTS), plain)
        with sidechain.edit(pipe, {SITE: normalised()}, {7: ("scale", 1.0)}):
            assert torch.equal(generate(pipe, PROMPTS), plain)

    def test_linear_and_for_each_sample(self, pipe: Any) -> None:
        sae, plain = normalised("jumprelu"), generate(pipe, PROMPTS)
        expected = by_hook(pipe, edited(sae, strength=-1.5))
        with sidechain.edit(pipe, {SITE: sae}, VALUES, strength=-1.5):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)
        with sidechain.edit(pipe, {SITE: sae}, VALUES, strength=[0.0, -1.5]):
            out = generate(pipe, PROMPTS)
        assert torch.equal(out[0], plain[0])
        torch.testing.assert_close(out[1], expected[1])

    def test_numbers_for_each_sample(self, pipe: Any) -> None:
        sae = normalised()
        each = []
        for number in (3.0, -1.0):
            with sidechain.edit(pipe, {SITE: sae}, {7: ("scale", number), 5: "zero"}):
                each.append(generate(pipe, PROMPTS))
        with sidechain.edit(pipe, {SITE: sae}, {7: ("scale", [3.0, -1.0]), 5: "zero"}):
            out = generate(pipe, PROMPTS)
        assert torch.equal(out[0], each[0][0]) and torch.equal(out[1], each[1][1])

    def test_changes_between_and_within_generations(self, pipe: Any) -> None:
        sae = normalised()
        other = {**VALUES, 5: ("set", -3.0)}

        def edit(out: Tensor, step: int) -> Tensor:
            late = step >= 2
            strength = 0.5 if late else 1.0
            return edited(sae, strength=strength, values=other if late else VALUES)(out, step)

        expected = by_hook(pipe, edit)
        tap = sidechain.edit(pipe, {SITE: sae}, VALUES)

        def change(step: int, timestep: int, latents: Tensor) -> None:
            if step == 1:
                tap.strength, tap.values = 0.5, {5: ("set", -3.0)}

        with tap:
            torch.testing.assert_close(generate(pipe, PROMPTS, callback=change), expected)
            assert tap.values == {SITE: other} and float(tap.strength) == 0.5
            after = by_hook_free(pipe, sae, other)
            torch.testing.assert_close(generate(pipe, PROMPTS), after)

    def test_from_adding_to_scaling(self, pipe: Any) -> None:
        sae = normalised()
        with sidechain.edit(pipe, {SITE: sae}, {7: ("scale", 3.0)}):
            expected = generate(pipe, PROMPTS)
        with sidechain.edit(pipe, {SITE: sae}, {7: ("add", 1.0)}) as tap:
            generate(pipe, PROMPTS)
            tap.values = {SITE: {7: ("scale", 3.0)}}
            assert torch.equal(generate(pipe, PROMPTS), expected)

    def test_buffers_stay_where_they_are(self, pipe: Any) -> None:
        with sidechain.edit(pipe, {SITE: normalised("jumprelu")}, VALUES) as tap:
            (operation,) = tap._operations["transformer_blocks.1.attn2"]
            seen = []
            for strength in (1.0, 0.5):
                tap.strength, tap.values = strength, {5: ("set", strength)}
                generate(pipe, PROMPTS)
                held = [operation.w_dec, operation.slot, operation.strength, operation.gain]
                held += [operation.shift, operation.columns, *operation.units]
                held += [operation.reader.threshold, operation.reader.place]
                seen.append([t.data_ptr() for t in held])
        assert seen[0] == seen[1]


def by_hook_free(pipe: Any, sae: Sae, values: dict[int, Any]) -> Tensor:
    other = tiny_pipeline()
    return by_hook(other, edited(sae, strength=0.5, values=values))


class TestOthers:
    def test_captures_see_what_was_there(self, pipe: Any) -> None:
        with sidechain.capture(pipe, Where(SITE, steps=(0, 1)), reduce="tokens") as cap:
            generate(pipe, PROMPTS)
        with (
            sidechain.edit(pipe, {SITE: normalised()}, VALUES),
            sidechain.capture(pipe, Where(SITE, steps=(0, 1)), reduce="tokens") as with_edit,
        ):
            generate(pipe, PROMPTS)
        assert torch.equal(cap[SITE], with_edit[SITE])

    @pytest.mark.parametrize("first", ["edit", "steer"])
    def test_in_the_order_of_attachment(self, pipe: Any, direction: Tensor, first: str) -> None:
        sae = normalised("jumprelu")

        def edit(out: Tensor, step: int) -> Tensor:
            if first == "steer":
                out[COND] += direction
            out = edited(sae)(out, step)
            if first == "edit":
                out[COND] += direction
            return out

        expected = by_hook(pipe, edit)
        taps = [
            sidechain.edit(pipe, {SITE: sae}, VALUES),
            sidechain.steer(pipe, {SITE: direction}),
        ]
        taps = taps if first == "edit" else taps[::-1]
        with taps[0], taps[1], sidechain.capture(pipe, SITE):
            torch.testing.assert_close(generate(pipe, PROMPTS), expected)

    def test_gradient_of_the_activations(self, pipe: Any) -> None:
        sae, text = normalised(), torch.randn(2, 10, 12)
        module = sidechain.sites(pipe)[SITE].module

        def hook(m: Any, a: Any, x: Tensor) -> Tensor:
            y = (x - sae.normaliser.mean[0]) / sae.normaliser.scale[0]
            z = ((y - sae.b_pre) @ sae.w_enc.T + sae.b_enc).relu()
            f = torch.where(z >= z.topk(6, dim=-1).values[..., -1:], z, 0.0)
            change = [3 * f[..., 7], 0.7 - f[..., 5], torch.full_like(f[..., 0], 0.3), -f[..., 22]]
            moved = torch.stack(change, -1) @ sae.w_dec[[7, 5, 11, 22]]
            return x + 2 * sae.normaliser.scale[0] * moved

        handle = module.register_forward_hook(hook)
        leaf = torch.randn(2, 3, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(denoise(pipe, leaf, text).square().sum(), leaf)
        handle.remove()
        with sidechain.edit(pipe, {SITE: sae}, VALUES, strength=2.0) as tap:
            tap.tracker.begin(2, STEPS)
            (found,) = torch.autograd.grad(denoise(pipe, leaf, text).square().sum(), leaf)
        torch.testing.assert_close(found, expected)

    def test_the_model_of_the_zoo(self) -> None:
        pipe, sae = sidechain.zoo.music(), sidechain.zoo.dictionary("cross:6")
        call = {"num_inference_steps": 3, "output_type": "latent"}

        def latents() -> Tensor:
            generators = [torch.Generator().manual_seed(i) for i in range(2)]
            return pipe(["a happy violin melody", "slow sad piano"], generator=generators,
                        **call)[0]  # fmt: skip

        pipe.set_progress_bar_config(disable=True)
        with sidechain.capture(pipe, "cross:6", reduce="tokens") as cap:
            plain = latents()
        moved = sae.normaliser
        if moved.timesteps is not None:
            moved = moved.resampled(cap.timesteps)
        here = Sae(sae.config, normaliser=moved, provenance=sae.provenance).eval()
        here.fill({k: v for k, v in sae.state_dict().items() if k in
                   ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")})  # fmt: skip
        features = dense(here, cap["cross:6"][1, 0].flatten(0, 1), 1).sum(0).topk(3).indices
        values = {int(j): v for j, v in zip(features, (("scale", 4.0), "zero", ("set", 2.0)),
                                            strict=True)}  # fmt: skip
        steps = iter(range(99))

        def hook(m: Any, a: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[COND] = formula(here, out[COND], next(steps), values, 1.0)
            return out

        handle = sidechain.sites(pipe)["cross:6"].module.register_forward_hook(hook)
        expected = latents()
        handle.remove()
        with sidechain.edit(pipe, {"cross:6": sae}, values):
            found = latents()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - plain).norm() > 100 * (found - expected).norm()


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
    def test_one_graph(self, architecture: str) -> None:
        sae = normalised(architecture)
        pipe, eager = tiny_pipeline(), tiny_pipeline()
        pipe.transformer.compile(fullgraph=True, backend="eager")
        place = Where(steps=(1, 4))
        with (
            sidechain.edit(eager, {SITE: sae}, VALUES, place) as wanted,
            sidechain.edit(pipe, {SITE: sae}, VALUES, place) as tap,
        ):
            for strength, number in ((1.0, 0.7), (0.0, 0.7), ([2.0, -1.0], -1.0)):
                for one in (wanted, tap):
                    one.strength, one.values = strength, {5: ("set", number)}
                expected = generate(eager, PROMPTS)
                torch.testing.assert_close(generate(pipe, PROMPTS), expected)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class TestContract:
    @pytest.mark.parametrize(
        ("saes", "values", "options", "error", "match"),
        [
            (None, {24: "zero"}, {}, ValueError, r"features within \[0, 24\) .* got 24"),
            (None, {-1: "zero"}, {}, ValueError, r"got -1"),
            (None, {True: "zero"}, {}, TypeError, "feature numbers .* got True"),
            (None, {3: ("clamp", 1.0)}, {}, ValueError, "one of scale, set, add, zero .* 'clamp'"),
            (None, {3: "scale"}, {}, ValueError, r"expected \('scale', number\) .* got 'scale'"),
            (None, {3: ("zero", 1.0)}, {}, ValueError, "expected 'zero' for feature 3"),
            (None, {3: ("set", 1.0, 2.0)}, {}, ValueError, r"expected \('set', number\)"),
            (None, {3: 4.0}, {}, TypeError, r"expected \(scale \| set \| add, number\)"),
            (None, {3: ("set", float("nan"))}, {}, ValueError, "finite number of feature 3"),
            (None, {3: ("set", "much")}, {}, TypeError, "number of feature 3 as a number"),
            (None, {}, {}, TypeError, "got none"),
            (None, [3], {}, TypeError, "got list"),
            (None, {3: "zero", SITE: {3: "zero"}}, {}, TypeError, "features or sites as keys"),
            (None, {SITE: "zero"}, {}, TypeError, r"for cross:1, got 'zero'"),
            (None, {"cross:0": {3: "zero"}}, {}, ValueError, r"a dictionary for every site.*ss:0"),
            (None, {3: "zero"}, {"strength": float("inf")}, ValueError, "finite strength"),
            (None, {3: "zero"}, {"branches": "both"}, ValueError, "expected branches"),
            (None, {3: "zero"}, {"sites": "cross:0"}, ValueError, "dictionary for every site"),
            (None, {3: "zero"}, {"tokens": 3}, TypeError, "expected tokens"),
            ({}, {3: "zero"}, {}, TypeError, r"expected \{site: Sae\}"),
            (3, {3: "zero"}, {}, TypeError, r"expected \{site: Sae\}"),
            ({SITE: 3}, {3: "zero"}, {}, TypeError, "expected a Sae .* got int"),
            ({"cross:9": 3}, {3: "zero"}, {}, ValueError, "got 'cross:9'"),
        ],
    )  # fmt: skip
    def test_bad_options(
        self, pipe: Any, saes: Any, values: Any, options: dict[str, Any], error: type[Exception],
        match: str,
    ) -> None:  # fmt: skip
        saes = {SITE: dictionary()} if saes is None else saes
        with pytest.raises(error, match=match):
            sidechain.edit(pipe, saes, values, **placed(options, options.get("sites")))

    def test_dictionaries_that_do_not_fit(self, pipe: Any) -> None:
        values = {3: "zero"}
        with pytest.raises(ValueError, match=r"of width 16 .* got 12"):
            sidechain.edit(pipe, {SITE: dictionary(width=12)}, values)
        made = Provenance(config_hash=config_hash(tiny_pipeline(layers=2)))
        with pytest.raises(ValueError, match="made for a denoiser with config hash"):
            sidechain.edit(pipe, {SITE: dictionary(provenance=made)}, values)
        with pytest.raises(NotImplementedError, match="expected an autoencoder"):
            sae = Sae(SaeConfig(16, 24, "topk", k=4, transcoder=True))
            sidechain.edit(pipe, {SITE: sae}, values)
        with pytest.raises(ValueError, match="expected a trained threshold"):
            sidechain.edit(pipe, {SITE: Sae(SaeConfig(16, 24, "batch_topk", k=4))}, values)
        with pytest.raises(ValueError, match=r"on cpu or cpu .* got meta"):
            sidechain.edit(pipe, {SITE: dictionary().to("meta")}, values)
        made = Provenance(site="transformer_blocks.0.attn2")
        with pytest.warns(RuntimeWarning, match="was trained at transformer_blocks.0.attn2"):
            sidechain.edit(pipe, {SITE: dictionary(provenance=made)}, values)

    def test_a_generation_that_does_not_fit(self, pipe: Any) -> None:
        sae, three = normalised(), [1.0, 2.0, 3.0]
        for options, call, match in (
            ({"strength": three}, {}, "strength of length 1 or 2"),
            ({"values": {3: ("set", three)}}, {}, "number of feature 3 at cross:1 of length 1 or"),
            ({}, {"steps": 6}, r"a dictionary of steps 0 to 5 .* got steps \[0, 1, 2, 3\]"),
            ({"where": Where(branches="uncond")}, {"guidance_scale": 1.0}, "the uncond branch"),
        ):
            options = {"values": {3: "zero"}, **options}
            with pytest.raises(ValueError, match=match), sidechain.edit(
                pipe, {SITE: sae}, **options
            ):  # fmt: skip
                generate(pipe, PROMPTS, **call)
        far = torch.tensor([9e5, 8e5, 7e5, 6e5])
        with (
            pytest.raises(ValueError, match="a dictionary whose timesteps overlap"),
            sidechain.edit(pipe, {SITE: normalised(timesteps=far)}, {3: "zero"}),
        ):
            generate(pipe, PROMPTS)

    def test_a_live_change_that_does_not_fit_changes_nothing(self, pipe: Any) -> None:
        with sidechain.edit(pipe, {SITE: normalised()}, VALUES) as tap:
            expected, before = generate(pipe, PROMPTS), tap.values

            def change(step: int, timestep: int, latents: Tensor) -> None:
                for name, value in () if step == STEPS - 1 else (
                    ("strength", [1.0, 2.0, 3.0]), ("values", {7: ("set", [1.0, 2.0, 3.0])}),
                    ("values", {4: "zero"}),
                ):  # fmt: skip
                    with pytest.raises(ValueError, match="edit: expected"):
                        setattr(tap, name, value)

            assert torch.equal(generate(pipe, PROMPTS, callback=change), expected)
            assert tap.values == before
