# SPDX-License-Identifier: Apache-2.0
"""The music pipeline, small and random: the diffusers contract, text, guidance and bad calls."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableAudioDiTModel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from sidechain.testing import tiny_pipeline
from sidechain.zoo.music.codec import LinearMelCodec
from sidechain.zoo.music.pipeline import MusicPipeline

PROMPTS = ["a happy violin melody with drums", "a slow piano song"]


@pytest.fixture(scope="module")
def shared():
    return tiny_pipeline("music", layers=2)


@pytest.fixture
def pipe(shared):
    shared.set_progress_bar_config(disable=True)
    return shared


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipe, prompt=PROMPTS[0], **call):
    call.setdefault("generator", torch.Generator().manual_seed(0))
    call.setdefault("num_inference_steps", 2)
    return pipe(prompt, output_type="latent", **call).audios


class TestSaving:
    def test_round_trip_is_bit_equal(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        again = MusicPipeline.from_pretrained(tmp_path, local_files_only=True)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(latents_of(again), latents_of(pipe))
        mels = pipe(PROMPTS[0], num_inference_steps=1, output_type="mel", generator=seeded(3))
        same = again(PROMPTS[0], num_inference_steps=1, output_type="mel", generator=seeded(3))
        assert torch.equal(mels.audios, same.audios)

    def test_parts_load_by_their_own_classes(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        parts = {
            "tokenizer": PreTrainedTokenizerFast,
            "text_encoder": T5EncoderModel,
            "transformer": StableAudioDiTModel,
            "scheduler": DPMSolverMultistepScheduler,
            "codec": LinearMelCodec,
        }
        loaded = {
            name: cls.from_pretrained(tmp_path / name, local_files_only=True)
            for name, cls in parts.items()
        }
        again = MusicPipeline(**loaded)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(latents_of(again), latents_of(pipe))


class TestCall:
    def test_shapes_of_every_output(self, pipe):
        shapes = {}
        for kind, count in (("latent", 2), ("mel", 2), ("pt", 1), ("audio", 1)):
            out = pipe(PROMPTS[:count], num_inference_steps=1, output_type=kind)
            shapes[kind] = (type(out.audios), tuple(out.audios.shape), str(out.audios.dtype))
        assert shapes == {
            "latent": (torch.Tensor, (2, 64, 64), "torch.float32"),
            "mel": (torch.Tensor, (2, 256, 64), "torch.float32"),
            "pt": (torch.Tensor, (1, 1, 81920), "torch.float32"),
            "audio": (np.ndarray, (1, 1, 81920), "float32"),
        }

    def test_mel_is_the_decoded_latent(self, pipe):
        latents = latents_of(pipe)
        mel = pipe(PROMPTS[0], num_inference_steps=2, output_type="mel", generator=seeded(0))
        assert torch.equal(mel.audios, pipe.codec.decode(latents))

    def test_tuple(self, pipe):
        (audios,) = pipe(
            PROMPTS[0],
            num_inference_steps=2,
            output_type="latent",
            generator=seeded(0),
            return_dict=False,
        )
        assert torch.equal(audios, latents_of(pipe))

    def test_a_generator_for_each_sample(self, pipe):
        both = latents_of(pipe, [PROMPTS[0]] * 2, generator=seeded(4, 5))
        single = [latents_of(pipe, generator=seeded(seed)) for seed in (4, 5)]
        assert not torch.equal(both[0], both[1])
        torch.testing.assert_close(both, torch.cat(single), rtol=1e-4, atol=1e-5)

    def test_latents_instead_of_a_generator(self, pipe):
        noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(latents_of(pipe, latents=noise, generator=None), latents_of(pipe))

    def test_embeddings_instead_of_a_prompt(self, pipe):
        embeds = pipe.encode_prompt(PROMPTS[0])
        assert embeds.shape == (1, 20, 128)
        assert torch.equal(latents_of(pipe, None, prompt_embeds=embeds), latents_of(pipe))

    def test_text_matters(self, pipe):
        assert not torch.equal(latents_of(pipe), latents_of(pipe, PROMPTS[1]))

    def test_clips_of_each_prompt_stand_together(self, pipe):
        found = latents_of(pipe, PROMPTS, num_waveforms_per_prompt=2, generator=seeded(0, 1, 2, 3))
        plain = latents_of(
            pipe, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], generator=seeded(0, 1, 2, 3)
        )
        assert torch.equal(found, plain)

    def test_padding_is_zero(self, pipe):
        embeds = pipe.encode_prompt(["violin", PROMPTS[0]])
        assert torch.count_nonzero(embeds[0, 2:]) == 0
        assert bool(embeds[0, :2].any(dim=-1).all())


class TestGuidance:
    def rows_seen(self, pipe, **call):
        seen = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]),
            with_kwargs=True,
        )
        try:
            latents_of(pipe, **call)
        finally:
            handle.remove()
        return seen

    def test_uncond_rows_first_and_zero(self, pipe):
        seen = self.rows_seen(pipe, prompt=PROMPTS)
        assert len(seen) == 2
        assert seen[0].shape[0] == 4
        assert torch.count_nonzero(seen[0][:2]) == 0
        assert torch.equal(seen[0][2:], pipe.encode_prompt(PROMPTS))

    @pytest.mark.parametrize("scale", [1.0, 0.0])
    def test_single_pass_without_guidance(self, pipe, scale):
        assert [rows.shape[0] for rows in self.rows_seen(pipe, guidance_scale=scale)] == [1, 1]

    def test_negative_prompt(self, pipe):
        plain = latents_of(pipe, PROMPTS)
        one = latents_of(pipe, PROMPTS, negative_prompt="drums")
        each = latents_of(pipe, PROMPTS, negative_prompt=["drums", "drums"])
        embeds = latents_of(
            pipe, PROMPTS, negative_prompt_embeds=pipe.encode_prompt(["drums", "drums"])
        )
        assert not torch.equal(plain, one)
        assert torch.equal(one, each)
        assert torch.equal(one, embeds)

    def test_negative_prompts_follow_their_prompts(self, pipe):
        rows = self.rows_seen(
            pipe,
            prompt=PROMPTS,
            negative_prompt=["drums", "vocals"],
            num_waveforms_per_prompt=2,
        )[0]
        negative = pipe.encode_prompt(["drums", "vocals"])
        assert torch.equal(rows[:4], negative[[0, 0, 1, 1]])

    def test_guidance_is_linear_in_its_scale(self, pipe):
        """One step of the sampler is linear in the velocity, so three scales lie on a line."""
        at = [
            latents_of(pipe, num_inference_steps=1, guidance_scale=scale).double()
            for scale in (2.0, 3.0, 4.0)
        ]
        torch.testing.assert_close(at[1], (at[0] + at[2]) / 2, rtol=1e-4, atol=1e-5)


class TestCallback:
    def test_sees_every_step(self, pipe):
        calls = []

        def note(pipeline, step, timestep, tensors):
            calls.append((pipeline is pipe, step, int(timestep), sorted(tensors)))
            return tensors

        latents_of(
            pipe,
            callback_on_step_end=note,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )
        assert [c[:2] for c in calls] == [(True, 0), (True, 1)]
        assert [c[2] for c in calls] == pipe.scheduler.timesteps.tolist()
        assert all(c[3] == ["latents", "prompt_embeds"] for c in calls)

    def test_doing_nothing_changes_nothing(self, pipe):
        watched = latents_of(pipe, callback_on_step_end=lambda *_: None)
        assert torch.equal(watched, latents_of(pipe))

    def test_changed_latents_are_used(self, pipe):
        def last_is_zero(pipeline, step, timestep, tensors):
            return {"latents": tensors["latents"] * (step == 0)}

        assert not latents_of(pipe, callback_on_step_end=last_is_zero).any()

    def test_changed_text_is_used(self, pipe):
        other = pipe.encode_prompt(PROMPTS[1])
        changed = latents_of(
            pipe,
            callback_on_step_end=lambda *_: {"prompt_embeds": other},
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
        assert not torch.equal(changed, latents_of(pipe))
        assert not torch.equal(changed, latents_of(pipe, PROMPTS[1]))


class TestWarnings:
    def test_unknown_words_are_named(self, pipe):
        with pytest.warns(UserWarning, match=r"got unknown \['bagpipe', 'zither'\]"):
            pipe.encode_prompt(["a zither melody", "piano, Bagpipe!"])

    def test_cut_off_prompts_are_told(self, pipe):
        text = " ".join(["happy"] * 19 + ["sad", "piano"])
        with pytest.warns(UserWarning, match=r"at most 19 words, got 21; .* 'sad piano'"):
            pipe.encode_prompt(text)

    def test_known_prompts_are_quiet(self, pipe):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.encode_prompt(["A Slow-Paced, sad PIANO solo; without drums.", "flute\nmusic"])

    def test_case_and_punctuation_do_not_matter(self, pipe):
        embeds = pipe.encode_prompt(["a happy violin melody", "A happy... violin,melody"])
        assert torch.equal(embeds[0], embeds[1])


BAD_CALLS = {
    "no steps": ({"num_inference_steps": 0}, r"num_inference_steps: expected at least 1, got 0"),
    "no clips": (
        {"num_waveforms_per_prompt": 0},
        r"num_waveforms_per_prompt: expected at least 1, got 0",
    ),
    "latents": ({"latents": torch.zeros(1, 64, 32)}, r"latents: expected shape \(1, 64, 64\)"),
    "generators": ({"generator": seeded(0, 1)}, r"generator: expected 1 generators .*, got 2"),
    "both": ({"prompt_embeds": torch.zeros(1, 20, 128)}, r"exactly one of .*, got both"),
    "none": ({"prompt": None}, r"prompt: expected exactly one of .*, got none"),
    "empty": ({"prompt": ""}, r"prompt: expected a text or a list of texts, got ''"),
    "no text": ({"prompt": []}, r"prompt: expected a text or a list of texts, got \[\]"),
    "number": ({"prompt": [3]}, r"prompt: expected a text or a list of texts, got \[3\]"),
    "output": ({"output_type": "wav"}, r"output_type: expected one of \('audio', .*, got 'wav'"),
    "callback": (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        r"expected a subset of .*, got \['noise'\]",
    ),
    "embeds": (
        {"prompt": None, "prompt_embeds": torch.zeros(20, 128)},
        r"prompt_embeds: expected shape \[B, S, 128\] .*, got \[20, 128\]",
    ),
    "negatives": (
        {"negative_prompt": ["a", "a"]},
        r"negative_prompt: expected 1 or 1 .*, got 2 of shape \[20, 128\]",
    ),
    "two negatives for four": (
        {"prompt": [PROMPTS[0]] * 4, "negative_prompt": ["a", "a"]},
        r"negative_prompt: expected 1 or 4 .*, got 2",
    ),
    "both negatives": (
        {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 20, 128)},
        r"at most one of negative_prompt and negative_prompt_embeds, got both",
    ),
    "negative embeds": (
        {"negative_prompt_embeds": torch.zeros(1, 10, 128)},
        r"negative_prompt: expected 1 or 1 of shape \[20, 128\] .*, got 1 of shape \[10, 128\]",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(pipe, changes, message):
    call = {"prompt": PROMPTS[0], "num_inference_steps": 1, "output_type": "latent", **changes}
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_progress_bar(pipe, capsys):
    latents_of(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="music")
    latents_of(pipe)
    assert "music: 100%" in capsys.readouterr().err
