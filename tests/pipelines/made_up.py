# SPDX-License-Identifier: Apache-2.0
"""A pipeline of a user, and the family that a user writes for it: the example of the docs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sidechain.pipelines import (
    Adapter,
    CallShape,
    Site,
    block_places,
    call_shape,
    call_timestep,
    described,
)

WIDTH, TEXT, CHANNELS, TOKENS = 16, 12, 4, 6


# -- the family ---------------------------------------------------------------------------------


def tokens(site: Site, shape: CallShape) -> int:
    return 1 + shape.latent[0]  # one token of the time stands in front


MADE_UP = Adapter(
    family="made_up",
    components=("denoiser",),
    branches={1: ("cond",), 2: ("cond", "uncond")},
    shape=call_shape((0, "states"), (2, "context")),
    tokens=tokens,
    timestep=call_timestep(1, "time", scale=1000.0),
    describe=described("text", "added to the residual"),
    # A block puts out (context, states).
    places=block_places("layers", mlp="mlp", goes="added to the residual", element=1),
)


# -- the model ----------------------------------------------------------------------------------


class MadeUpLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = Attention(WIDTH, heads=2, dim_head=8)
        self.text = Attention(WIDTH, cross_attention_dim=TEXT, heads=2, dim_head=8)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, states: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        states = states + self.own(states)
        states = states + self.text(states, encoder_hidden_states=context)
        return context, states + self.mlp(states)


class OddAttention(nn.Module):
    """Attention without a processor."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, states: Tensor) -> Tensor:
        found = nn.functional.scaled_dot_product_attention(
            self.to_q(states), self.to_k(states), self.to_v(states)
        )
        return states + found


class MadeUpDenoiser(nn.Module):
    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.config = {"width": WIDTH}
        self.to_in, self.time_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(1, WIDTH)
        self.layers = nn.ModuleList([MadeUpLayer() for _ in range(2)])
        self.odd = OddAttention() if odd else None
        self.to_out = nn.Linear(WIDTH, CHANNELS)

    def forward(self, states: Tensor, time: Tensor, context: Tensor) -> Tensor:
        first = self.time_in(time.expand(len(states))[:, None, None].to(states.dtype))
        states = torch.cat([first, self.to_in(states)], 1)
        for layer in self.layers:
            _, states = layer(states, context=context)
        states = states if self.odd is None else self.odd(states)
        return self.to_out(states[:, 1:])


class MadeUpPipeline:
    """Guidance rows in the order cond, uncond; the denoiser gets timesteps in [0, 1]."""

    def __init__(self, seed: int = 0, odd: bool = False, divide: float = 1000.0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.denoiser = MadeUpDenoiser(odd).eval()
            self.words = nn.Embedding(512, TEXT)
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.divide = divide

    @property
    def components(self) -> dict[str, Any]:
        return {"denoiser": self.denoiser, "words": self.words, "scheduler": self.scheduler}

    def prepare_latents(self, samples: int) -> Tensor:
        each = [torch.Generator().manual_seed(i) for i in range(samples)]
        return torch.cat([torch.randn(1, TOKENS, CHANNELS, generator=g) for g in each])

    @torch.no_grad()
    def __call__(self, prompts: list[str], steps: int = 3, guidance: float = 4.0) -> Tensor:
        ids = torch.tensor([[ord(letter) for letter in prompt[:5]] for prompt in prompts])
        cond = self.words(ids)
        context = torch.cat([cond, torch.zeros_like(cond)]) if guidance != 1.0 else cond
        self.scheduler.set_timesteps(steps)
        states = self.prepare_latents(len(prompts))
        for time in self.scheduler.timesteps:
            doubled = torch.cat([states, states]) if guidance != 1.0 else states
            found = self.denoiser(doubled, time / self.divide, context)
            if guidance != 1.0:
                with_text, without = found.chunk(2)
                found = without + guidance * (with_text - without)
            states = self.scheduler.step(found, time, states).prev_sample
        return states
