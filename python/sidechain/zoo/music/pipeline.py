# SPDX-License-Identifier: Apache-2.0
"""Text-to-music pipeline of the zoo: a small diffusers pipeline with Stable Audio's denoiser."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableAudioDiTModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from .codec import LinearMelCodec

LATENT_STEPS = 64
OUTPUT_TYPES = ("audio", "pt", "mel", "latent")


def rotary_embedding(transformer: StableAudioDiTModel) -> tuple[Tensor, Tensor]:
    """Rotary position tables for the 64 latent steps and the prepended global token."""
    config: Any = transformer.config
    table: tuple[Tensor, Tensor] = get_1d_rotary_pos_embed(
        config.attention_head_dim // 2,
        LATENT_STEPS + 1,
        use_real=True,
        repeat_interleave_real=False,
    )
    return table


def _are_texts(prompt: object) -> bool:
    texts = [prompt] if isinstance(prompt, str) else prompt
    return isinstance(texts, list) and bool(texts) and all(t and isinstance(t, str) for t in texts)


class MusicPipeline(DiffusionPipeline):  # type: ignore[misc, unused-ignore]
    """5.12 seconds of 16 kHz music from a short description.

    Text reaches the denoiser only through its cross-attentions. With guidance, rows are batched
    [unconditional, conditional], as in `StableAudioPipeline`; without a negative prompt the
    unconditional context is zero.
    """

    model_cpu_offload_seq = "text_encoder->transformer->codec"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: T5EncoderModel,
        transformer: StableAudioDiTModel,
        scheduler: SchedulerMixin,
        codec: LinearMelCodec,
    ) -> None:
        """Assemble the pipeline from its parts."""
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            scheduler=scheduler,
            codec=codec,
        )

    def encode_prompt(self, prompt: str | list[str]) -> Tensor:
        """Encode prompts to text states [B, 20, 128], zero at padding.

        Warns of words that the model does not know, and of words past the end of its context.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._warn_of_lost_words(texts)
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self.text_encoder.device)
        mask = tokens.attention_mask.to(self.text_encoder.device)
        with torch.no_grad():
            states: Tensor = self.text_encoder(input_ids=ids, attention_mask=mask)[0]
        return states * mask[..., None].to(states.dtype)

    def _warn_of_lost_words(self, texts: list[str]) -> None:
        known = self.tokenizer.get_vocab()
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        rows = [normalizer.normalize_str(text).split() for text in texts]
        unknown = sorted({word for words in rows for word in words if word not in known})
        if unknown:
            warnings.warn(
                f"prompt: expected words of the model's vocabulary, got unknown {unknown}; "
                "they are ignored",
                stacklevel=3,
            )
        room = self.tokenizer.model_max_length - 1  # the end token takes one place
        cut = next((words for words in rows if len(words) > room), None)
        if cut is not None:
            warnings.warn(
                f"prompt: expected at most {room} words, got {len(cut)}; the end is cut off: "
                f"{' '.join(cut[room:])!r}",
                stacklevel=3,
            )

    def prepare_latents(
        self,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Draw start noise [batch_size, 64, 64], or return `latents` if their shape is right."""
        shape = (batch_size, self.transformer.config.in_channels, LATENT_STEPS)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator: expected {batch_size} generators [one a sample], got {len(generator)}"
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        num_inference_steps: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        negative_prompt: str | list[str] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_waveforms_per_prompt: int = 1,
    ) -> None:
        """Raise ValueError for a call that cannot be served."""
        if (prompt is None) == (prompt_embeds is None):
            got = "none" if prompt is None else "both"
            raise ValueError(f"prompt: expected exactly one of prompt and prompt_embeds, got {got}")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError(
                "negative_prompt: expected at most one of negative_prompt and "
                "negative_prompt_embeds, got both"
            )
        if prompt is not None and not _are_texts(prompt):
            raise ValueError(f"prompt: expected a text or a list of texts, got {prompt!r}")
        width = self.transformer.config.cross_attention_input_dim
        for name, embeds in (
            ("prompt_embeds", prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds),
        ):
            if embeds is not None and (embeds.ndim != 3 or embeds.shape[2] != width):
                raise ValueError(
                    f"{name}: expected shape [B, S, {width}] [width of the text encoder], got "
                    f"{list(embeds.shape)}"
                )
        for name, number in (
            ("num_inference_steps", num_inference_steps),
            ("num_waveforms_per_prompt", num_waveforms_per_prompt),
        ):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {OUTPUT_TYPES}, got {output_type!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                "callback_on_step_end_tensor_inputs: expected a subset of "
                f"{self._callback_tensor_inputs}, got {sorted(unknown)}"
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        num_waveforms_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "audio",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> AudioPipelineOutput | tuple[Any]:
        """Generate music.

        Args:
            prompt: one description or a list of them.
            negative_prompt: what to steer away from; zero context when omitted.
            num_inference_steps: denoiser calls.
            guidance_scale: weight of classifier-free guidance; at most 1 turns it off.
            num_waveforms_per_prompt: clips of each prompt.
            generator: one torch generator, or one for each clip.
            latents: start noise [B, 64, 64] instead of a generator.
            prompt_embeds: `encode_prompt` result instead of `prompt`.
            negative_prompt_embeds: the same for the negative prompt.
            output_type: "audio" (NumPy [B, 1, 81920], 16 kHz), "pt" (the same as a tensor),
                "mel" (tensor [B, 256, 64]) or "latent" (tensor [B, 64, 64]).
            return_dict: an `AudioPipelineOutput` rather than a tuple.
            callback_on_step_end: called as (pipe, step, timestep, tensors) after every step.
            callback_on_step_end_tensor_inputs: names of the tensors the callback gets.

        Returns:
            `AudioPipelineOutput` with `audios`, or a tuple of it.

        Raises:
            ValueError: unusable arguments.
        """
        self.check_inputs(
            prompt,
            prompt_embeds,
            num_inference_steps,
            output_type,
            callback_on_step_end_tensor_inputs,
            negative_prompt,
            negative_prompt_embeds,
            num_waveforms_per_prompt,
        )
        device, dtype = self._execution_device, self.transformer.dtype
        if prompt_embeds is None:
            assert prompt is not None
            prompt_embeds = self.encode_prompt(prompt)
        prompt_embeds = prompt_embeds.to(device, dtype)
        guided = guidance_scale > 1.0
        if guided:
            if negative_prompt is not None:
                negative_prompt_embeds = self.encode_prompt(negative_prompt)
            negative_prompt_embeds = self._match_negative(negative_prompt_embeds, prompt_embeds)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(
                num_waveforms_per_prompt, dim=0
            )
        prompt_embeds = prompt_embeds.repeat_interleave(num_waveforms_per_prompt, dim=0)
        batch = prompt_embeds.shape[0]
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self.prepare_latents(batch, dtype, device, generator, latents)
        rotary = tuple(table.to(device) for table in rotary_embedding(self.transformer))
        branches = 2 if guided else 1
        condition = latents.new_zeros(
            branches * batch, 1, self.transformer.config.global_states_input_dim
        )
        limit = self.scheduler.config.num_train_timesteps
        with self.progress_bar(total=num_inference_steps) as progress:
            for index, timestep in enumerate(self.scheduler.timesteps):
                context = prompt_embeds
                if guided and negative_prompt_embeds is not None:
                    context = torch.cat([negative_prompt_embeds, prompt_embeds])
                rows = self.scheduler.scale_model_input(torch.cat([latents] * branches), timestep)
                velocity = self.transformer(
                    rows,
                    (timestep / limit).to(dtype).expand(branches * batch),
                    encoder_hidden_states=context,
                    global_hidden_states=condition,
                    rotary_embedding=rotary,
                    return_dict=False,
                )[0]
                if guided:
                    uncond, cond = velocity.chunk(2)
                    velocity = uncond + guidance_scale * (cond - uncond)
                latents = self.scheduler.step(velocity, timestep, latents).prev_sample
                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    picked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, index, timestep, picked) or {}
                    latents = changed.pop("latents", latents)
                    prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = changed.pop(
                        "negative_prompt_embeds", negative_prompt_embeds
                    )
                progress.update()
        audios = self._output(latents, output_type)
        self.maybe_free_model_hooks()
        return AudioPipelineOutput(audios=audios) if return_dict else (audios,)

    @staticmethod
    def _match_negative(negative: Tensor | None, positive: Tensor) -> Tensor:
        """Zeros, or one negative prompt for all prompts or for each."""
        if negative is None:
            return torch.zeros_like(positive)
        count, *shape = positive.shape
        if negative.shape[0] not in (1, count) or list(negative.shape[1:]) != shape:
            raise ValueError(
                f"negative_prompt: expected 1 or {count} of shape {shape} [as prompt], got "
                f"{negative.shape[0]} of shape {list(negative.shape[1:])}"
            )
        return negative.to(positive.device, positive.dtype).expand(count, *shape)

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        mels = self.codec.decode(latents.to(self.codec.dtype))
        if output_type == "mel":
            return mels
        audio = self.codec.audio(mels)[:, None]
        return torch.from_numpy(audio) if output_type == "pt" else audio
