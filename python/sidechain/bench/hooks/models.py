# SPDX-License-Identifier: Apache-2.0
"""Denoisers whose sites are called: the zoo's music model, and random weights of real shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., Any]


@dataclass
class Model:
    """A pipeline, or just enough of one, with the arguments of a denoiser call.

    Attributes:
        pipe: holds `denoiser` and `scheduler`.
        denoiser: of the pipeline.
        samples: B; the rows of a call are twice as many, first uncond, then cond.
        latents: [B, ...].
        context: [2B, S, width].
        keywords: further ones of the denoiser.
        divisor: the denoiser gets the timestep divided by this.
        spread: it gets one timestep for each row.
    """

    pipe: Any
    denoiser: Any
    samples: int
    latents: Tensor
    context: Tensor
    keywords: dict[str, Any] = field(default_factory=dict)
    divisor: float = 1.0
    spread: bool = False

    def call(self, timestep: Tensor, forward: Forward | None = None) -> Tensor:
        """Call the denoiser once, as its pipeline does; `forward` may stand in for the call."""
        rows = torch.cat([self.latents, self.latents])
        rows = self.pipe.scheduler.scale_model_input(rows, timestep)
        time = timestep / self.divisor if self.divisor != 1.0 else timestep
        time = time.expand(len(rows)) if self.spread else time.reshape(1)
        named = {
            "encoder_hidden_states": self.context, "return_dict": False, **self.keywords
        }  # fmt: skip
        out: Tensor = (forward or self.denoiser)(rows, time, **named)[0]
        return out

    def step(self, timestep: Tensor, forward: Forward | None = None) -> Tensor:
        """Do a whole step: denoiser, guidance, scheduler. The latents stay as they are."""
        uncond, cond = self.call(timestep, forward).chunk(2)
        guided = uncond + 3.0 * (cond - uncond)
        self.pipe.scheduler.step(guided, timestep, self.latents)
        return guided


def stable_audio(
    width: int, heads: int, tokens: int, context: int, samples: int, device: str, *, layers: int = 1
) -> Model:
    """Stable Audio with random weights.

    Args:
        width: of a block.
        heads: of its attention.
        tokens: T; one of them is the global token.
        context: S.
        samples: B.
        device: where.
        layers: blocks.
    """
    from diffusers import EDMDPMSolverMultistepScheduler, StableAudioDiTModel
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    denoiser = StableAudioDiTModel(
        sample_size=tokens - 1,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        num_key_value_attention_heads=heads,
        cross_attention_dim=width // 2,
        cross_attention_input_dim=width // 2,
        global_states_input_dim=width,
        time_proj_dim=32,
    )
    denoiser.eval().requires_grad_(False).to(device)
    pipe = SimpleNamespace(transformer=denoiser, scheduler=EDMDPMSolverMultistepScheduler())
    rotary = get_1d_rotary_pos_embed(
        denoiser.config.attention_head_dim // 2, tokens, use_real=True,
        repeat_interleave_real=False,
    )  # fmt: skip
    return Model(
        pipe,
        denoiser,
        samples,
        torch.randn(samples, 8, tokens - 1, device=device),
        torch.randn(2 * samples, context, width // 2, device=device),
        {
            "global_hidden_states": torch.zeros(2 * samples, 1, width, device=device),
            "rotary_embedding": tuple(part.to(device) for part in rotary),
        },
    )


def sdxl(width: int, side: int, samples: int, device: str) -> Model:
    """One level of the U-Net of SDXL, with random weights.

    Args:
        width: of the level: 640 at 64 x 64, 1280 at 32 x 32.
        side: height and width of the latents there.
        samples: B.
        device: where.
    """
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    denoiser = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=(width,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=2048,
        attention_head_dim=width // 64,
        use_linear_projection=True,
    )
    denoiser.eval().requires_grad_(False).to(device)
    pipe = SimpleNamespace(unet=denoiser, scheduler=EulerDiscreteScheduler())
    latents = torch.randn(samples, 4, side, side, device=device)
    return Model(
        pipe, denoiser, samples, latents, torch.randn(2 * samples, 77, 2048, device=device)
    )


def music(samples: int, device: str, *, tiny: bool = False) -> Model:
    """The music model of the zoo.

    Args:
        samples: B.
        device: where.
        tiny: a random one of the same class with fewer blocks.
    """
    from sidechain.testing import tiny_pipeline
    from sidechain.zoo.music.pipeline import rotary_embedding

    if tiny:
        pipe: Any = tiny_pipeline("music")
    else:
        from sidechain import zoo

        pipe = zoo.music(device)
    pipe.to(device)
    denoiser = pipe.transformer
    denoiser.eval().requires_grad_(False)
    config = denoiser.config
    text = pipe.encode_prompt(["jazz with drums"] * samples)
    return Model(
        pipe,
        denoiser,
        samples,
        torch.randn(samples, config.in_channels, config.sample_size, device=device),
        torch.cat([torch.zeros_like(text), text]),
        {
            "global_hidden_states": torch.zeros(
                2 * samples, 1, config.global_states_input_dim, device=device
            ),
            "rotary_embedding": tuple(part.to(device) for part in rotary_embedding(denoiser)),
        },
        divisor=1000.0,
        spread=True,
    )
