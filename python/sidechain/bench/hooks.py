# SPDX-License-Identifier: Apache-2.0
"""What a tap or a hand-written hook adds to one call of an attention module.

One cross-attention module of the real class is called in eager mode. While it is timed its
processor returns its input, so that only the added work remains. Attaching is not timed, because it
happens once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import sidechain

from .cases import Row
from .machine import Machine
from .timing import sampler, side_by_side

# name -> width, heads, tokens, context tokens, samples (rows are twice as many)
CASES = {
    "zoo-R16-T65-C160": (160, 5, 65, 24, 8),
    "zoo-R64-T65-C160": (160, 5, 65, 24, 32),
    "stable-audio-R2-T1025-C1536": (1536, 24, 1025, 130, 1),
    "stable-audio-R8-T1025-C1536": (1536, 24, 1025, 130, 4),
}


def build(width: int, heads: int, tokens: int, device: str) -> Any:
    """A denoiser with one block, and just enough of a pipeline around it."""
    from diffusers import EDMDPMSolverMultistepScheduler, StableAudioDiTModel

    transformer = StableAudioDiTModel(
        sample_size=tokens - 1,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        num_key_value_attention_heads=heads,
        cross_attention_dim=width // 2,
        cross_attention_input_dim=width // 2,
        global_states_input_dim=width,
        time_proj_dim=32,
    )
    transformer.eval().requires_grad_(False).to(device)
    return SimpleNamespace(transformer=transformer, scheduler=EDMDPMSolverMultistepScheduler())


def start(pipe: Any, tap: Any, samples: int, tokens: int, context: int) -> None:
    """Bind the taps to a generation, as the first denoiser call of a pipeline does."""
    config, device = pipe.transformer.config, pipe.transformer.device
    width = config.cross_attention_input_dim
    tap.tracker.begin(samples, 1000)
    pipe.transformer(
        torch.zeros(2 * samples, config.in_channels, tokens - 1, device=device),
        torch.ones(1, device=device),
        encoder_hidden_states=torch.ones(2 * samples, context, width, device=device),
        global_hidden_states=torch.zeros(
            2 * samples, 1, config.global_states_input_dim, device=device
        ),
        return_dict=False,
    )


class Through:
    """A processor without cost, which returns its input."""

    def __call__(  # noqa: D102
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return hidden_states


@contextlib.contextmanager
def hooked(module: Any, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Attach a plain forward hook for the duration of the block."""
    handle = module.register_forward_hook(lambda m, a, out: function(out))
    try:
        yield
    finally:
        handle.remove()


def rows(
    machine: Machine, *, only: str = "", seconds: float = 0.6, quick: bool = False
) -> Iterator[list[Row]]:
    """Time every case whose name contains `only`; one list of rows for each. `quick`: the first.

    Raises:
        AssertionError: a tap and the hook beside it give different numbers.
    """
    for name in list(CASES)[: 1 if quick else None]:
        if only in name:
            with torch.inference_mode():
                measured = Site(name, machine).rows(seconds)
            yield measured


class Site:
    """One attention module with what can be put around its calls.

    Args:
        name: of the case.
        machine: where it is timed.
    """

    def __init__(self, name: str, machine: Machine) -> None:
        width, heads, tokens, context, samples = CASES[name]
        self.name, self.machine = name, machine
        self.samples, self.tokens, self.context = samples, tokens, context
        self.pipe = build(width, heads, tokens, machine.device)
        self.module: Any = sidechain.sites(self.pipe)["cross:0"].module
        self.x = torch.randn(2 * samples, tokens, width, device=machine.device)
        self.text = torch.randn(2 * samples, context, width // 2, device=machine.device)
        self.direction = torch.randn(width, device=machine.device)
        self.cond = slice(samples, None)
        self.seen: list[Tensor] = []

    def call(self) -> Tensor:
        """One call of the module."""
        out: Tensor = self.module(self.x, encoder_hidden_states=self.text)
        return out

    def pool(self, out: Tensor) -> None:
        """The hook that keeps a mean."""
        self.seen[:] = [out[self.cond].float().mean(1)]

    def add(self, out: Tensor) -> Tensor:
        """The hook that adds a direction."""
        out[self.cond] += 2.0 * self.direction
        return out

    def pool_and_add(self, out: Tensor) -> Tensor:
        """Both hooks in one."""
        self.pool(out)
        return self.add(out)

    def capture(self) -> Any:
        """The tap that keeps a mean."""
        return sidechain.capture(self.pipe, "cross:0")

    def steer(self, **options: Any) -> Any:
        """The tap that adds the direction."""
        return sidechain.steer(self.pipe, {"cross:0": self.direction}, strength=2.0, **options)

    def swap(self) -> Any:
        """The tap that gives half the rows another context."""
        text = self.text[self.cond].clone()
        return sidechain.patch(self.pipe, "cross:0", context=text)

    def check(self) -> None:
        """Check that taps and hooks give the same numbers."""
        with hooked(self.module, self.pool_and_add):
            expected = self.call()
        with self.steer(), self.capture() as tap:
            start(self.pipe, tap, self.samples, self.tokens, self.context)
            before = tap["cross:0"][0, 0]
            torch.testing.assert_close(self.call(), expected)
            mean = 2 * tap["cross:0"][0, 0] - before  # both calls were in step 0
            torch.testing.assert_close(mean, self.seen[0], rtol=1e-4, atol=1e-5)

    def rows(self, seconds: float) -> list[Row]:
        """Check hooks and taps, then time them in turns."""
        self.check()
        self.module.set_processor(Through())
        around: list[tuple[str, str, Callable[[], list[Any]]]] = [
            ("bare", "bare", lambda: []),
            ("hook: mean", "plain", lambda: [hooked(self.module, self.pool)]),
            ("tap: mean", "ours", lambda: [self.capture()]),
            ("hook: add", "plain", lambda: [hooked(self.module, self.add)]),
            ("tap: steer", "ours", lambda: [self.steer()]),
            ("hook: mean + add", "plain", lambda: [hooked(self.module, self.pool_and_add)]),
            ("tap: mean + steer", "ours", lambda: [self.steer(), self.capture()]),
            ("tap: steer, renorm", "ours", lambda: [self.steer(renorm=True)]),
            ("tap: context swap", "ours", lambda: [self.swap()]),
            ("bare again", "bare", lambda: []),
        ]
        timed = [self._timed(name, kind, make(), seconds) for name, kind, make in around]
        bare = min(row.median_us or 0.0 for row in timed if row.kind == "bare")
        for row in timed:
            row.facts = {"added_us": round((row.median_us or 0.0) - bare, 2)}
        return timed

    def _timed(self, provider: str, kind: str, around: list[Any], seconds: float) -> Row:
        with contextlib.ExitStack() as stack:
            tap = [stack.enter_context(each) for each in around]
            if tap and tap[-1] is not None:
                start(self.pipe, tap[-1], self.samples, self.tokens, self.context)
            timing = side_by_side({"": sampler([self.call], self.machine.device)}, seconds)[""]
        row = Row(self.name, "f32", provider, kind, 0, 0, method=timing.method)
        row.median_us, row.p20_us, row.p80_us = (
            round(1e6 * t, 2) for t in (timing.median, timing.p20, timing.p80)
        )
        return row
