# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from sidechain.testing import (
    PIPELINES,
    call_tiny,
    latents_of,
    tiny_call,
    tiny_clap,
    tiny_clip,
    tiny_pipeline,
)
from sidechain.testing.tiny import PROMPTS, SCHEDULERS
from sidechain.testing.tiny.build import FAMILIES

# Their weights are as torch draws them; other tests were written on these.
SIGNALS = {"stable_audio": 0.001, "music": 0.001}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module", params=PIPELINES)
def family(request: pytest.FixtureRequest) -> SimpleNamespace:
    name: str = request.param
    pipe = tiny_pipeline(name)
    return SimpleNamespace(name=name, pipe=pipe, latents=call_tiny(pipe))


class TestEveryFamily:
    def test_built_and_called_again_gives_the_same_bits(self, family: SimpleNamespace) -> None:
        torch.manual_seed(5)
        state = torch.get_rng_state()
        again = call_tiny(tiny_pipeline(family.name))
        assert torch.equal(again, family.latents)
        assert family.latents.isfinite().all()
        assert family.latents.std() > 0.05
        assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
        assert not torch.equal(call_tiny(tiny_pipeline(family.name, seed=1)), again)

    def test_rows_are_what_each_is_alone(self, family: SimpleNamespace) -> None:
        both = call_tiny(family.pipe, PROMPTS[:2], seeds=(0, 1))
        second = call_tiny(family.pipe, PROMPTS[1], seeds=(1,))
        assert distance(both[:1], family.latents) < 2e-5
        assert distance(both[1:], second) < 2e-5
        assert distance(both[1:], both[:1]) > 0.1

    def test_prompt_shows(self, family: SimpleNamespace) -> None:
        other = call_tiny(family.pipe, PROMPTS[1])
        if family.name == "ddpm":
            assert torch.equal(other, family.latents)
        else:
            assert distance(other, family.latents) > 0.02

    def test_attention_is_heard(self, family: SimpleNamespace) -> None:
        signals: dict[str, float] = {}

        def listen(name: str) -> Any:
            def hook(module: Any, inputs: Any, keywords: Any, output: Any) -> None:
                states = inputs[0] if inputs else keywords["hidden_states"]
                for part in output if isinstance(output, tuple) else (output,):
                    # A residual that is added inside is no signal of the attention.
                    residual = getattr(module, "residual_connection", False)
                    own = part - states if residual else part
                    signals[name] = min(signals.get(name, 1.0), float(own.std()))

            return hook

        modules = attentions(family.pipe)
        handles = [
            module.register_forward_hook(listen(name), with_kwargs=True)
            for name, module in modules.items()
        ]
        try:
            call_tiny(family.pipe)
        finally:
            for handle in handles:
                handle.remove()
        assert modules
        assert set(signals) == set(modules), "an attention that never runs"
        assert min(signals.values()) > SIGNALS.get(family.name, 0.01), signals

    def test_half_precision(self, family: SimpleNamespace) -> None:
        assert call_tiny(tiny_pipeline(family.name, dtype=torch.bfloat16)).isfinite().all()

    def test_several_samples_of_a_prompt(self, family: SimpleNamespace) -> None:
        argument = FAMILIES[family.name].per_prompt
        if argument is None:
            pytest.skip("the pipeline has no such argument")
        # The samples of a prompt stand together.
        four = call_tiny(family.pipe, PROMPTS[:2], seeds=(0, 5, 1, 6), **{argument: 2})
        assert len(four) == 4
        assert distance(four[:1], family.latents) < 2e-5
        if family.name != "sd_inpaint":  # masked images are encoded once for all samples
            second = call_tiny(family.pipe, PROMPTS[1], seeds=(1,))
            assert distance(four[2:3], second) < 2e-5


def attentions(pipe: Any) -> dict[str, torch.nn.Module]:
    """Attention modules of the denoisers by name."""
    names = ("unet", "transformer", "transformer_2", "controlnet")
    return {
        f"{part}.{name}": module
        for part in names
        if getattr(pipe, part, None) is not None
        for name, module in getattr(pipe, part).named_modules()
        if name and hasattr(module, "set_processor")
    }


def test_audioldm2_has_the_published_topology() -> None:
    blocks = tiny_pipeline("audioldm2").unet.mid_block.attentions
    second = [block.transformer_blocks[0].attn2 for block in blocks]
    widths = [a.cross_attention_dim if a.is_cross_attention else None for a in second]
    assert widths == [None, 16, 32, None]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_by_name(scheduler: str) -> None:
    pipe = tiny_pipeline(scheduler=scheduler)
    assert type(pipe.scheduler).__name__ == SCHEDULERS[scheduler][0]


def test_layers() -> None:
    for name, blocks in (("stable_audio", "transformer_blocks"), ("wan", "blocks")):
        assert len(getattr(tiny_pipeline(name, layers=4).transformer, blocks)) == 4


@pytest.mark.parametrize("name", ["audioldm2", "sdxl"])
def test_saved_pipeline_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipe)
    assert torch.equal(call_tiny(loaded), call_tiny(pipe))


class TestScorers:
    def test_clap_hears_sounds_and_words(self, tmp_path: Path) -> None:
        folder = tiny_clap(tmp_path / "clap")
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        noise = np.random.default_rng(0).standard_normal(16000)
        tone = np.sin(np.arange(8000) * 0.3)
        inputs = processor(
            text=["piano", "violin music"],
            audio=[noise, tone],
            sampling_rate=16000,
            padding=True,
            return_tensors="pt",
        )
        self.check(model(**inputs).logits_per_audio)

    def test_clip_sees_images_and_words(self, tmp_path: Path) -> None:
        from PIL import Image

        folder = tiny_clip(tmp_path / "clip")
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        noise = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        inputs = processor(
            text=["piano", "violin music"],
            images=[Image.fromarray(noise), Image.new("RGB", (16, 16), "red")],
            padding=True,
            return_tensors="pt",
        )
        self.check(model(**inputs).logits_per_image)

    def check(self, scores: Tensor) -> None:
        assert scores.shape == (2, 2)
        assert (scores[0] - scores[1]).abs().min() > 1e-3, "two samples, one score"
        assert (scores[:, 0] - scores[:, 1]).abs().min() > 1e-3, "two texts, one score"

    @pytest.mark.parametrize("make", [tiny_clap, tiny_clip])
    def test_seed_decides(self, make: Any, tmp_path: Path) -> None:
        first, again, other = (
            AutoModel.from_pretrained(make(tmp_path / str(i), seed=seed)).state_dict()
            for i, seed in enumerate((0, 0, 1))
        )
        name = "text_projection.weight" if make is tiny_clip else "text_projection.linear1.weight"
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


class TestCalls:
    def test_latents_of_what_pipelines_return(self) -> None:
        latents = torch.ones(2, 3)
        for result in (
            latents,
            (latents, None),
            SimpleNamespace(audios=latents),
            SimpleNamespace(images=latents.numpy()),
            SimpleNamespace(frames=latents),
        ):
            assert torch.equal(latents_of(result), latents)

    def test_changes_replace_what_the_family_gives(self) -> None:
        call = tiny_call(tiny_pipeline("sd"), steps=5, seeds=(3, 4), height=8)
        assert call["height"] == 8
        assert call["prompt"] == list(PROMPTS[:2])
        assert call["num_inference_steps"] == 5
        assert [generator.initial_seed() for generator in call["generator"]] == [3, 4]

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        {
            "name": (lambda: tiny_pipeline("sd9"), ValueError, "expected one of .*, got 'sd9'"),
            "scheduler": (
                lambda: tiny_pipeline(scheduler="x"),
                ValueError,
                "expected scheduler 'edm', .* or an object, got 'x'",
            ),
            "pipeline": (lambda: call_tiny(3), ValueError, "expected one of .*, got int"),
            "prompts": (
                lambda: call_tiny(tiny_pipeline(), ["a", "b"], seeds=(0,)),
                ValueError,
                "expected 2 prompts x 1 = 2 seeds, got 1",
            ),
            "result": (
                lambda: latents_of("x"),
                TypeError,
                "expected a pipeline's output with audios, images, frames, got str",
            ),
        }.values(),
    )
    def test_errors(self, call: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            call()
