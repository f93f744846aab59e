# SPDX-License-Identifier: Apache-2.0
"""Bench of taps against plain hooks: `python bench/bench_taps.py [--threads N] [--no-save]`.

One cross-attention module of the real class is called in eager mode. For the timing its processor
hands its input through, so that what is left is what a tap or a hand-written hook adds to a call.
Attaching is not timed: it happens once.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import harness
import sidechain

# name -> width, heads, tokens, context tokens, samples (rows are twice as many)
CASES = {
    "zoo-R16-T65-C160": (160, 5, 65, 24, 8),
    "zoo-R64-T65-C160": (160, 5, 65, 24, 32),
    "stable-audio-R2-T1025-C1536": (1536, 24, 1025, 130, 1),
    "stable-audio-R8-T1025-C1536": (1536, 24, 1025, 130, 4),
}


def build(width: int, heads: int, tokens: int) -> Any:
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
    transformer.eval().requires_grad_(False)
    return SimpleNamespace(transformer=transformer, scheduler=EDMDPMSolverMultistepScheduler())


def start(pipe: Any, tap: Any, samples: int, tokens: int, context: int) -> None:
    """Bind the taps to a run, as the first denoiser call of a pipeline does."""
    config = pipe.transformer.config
    tap.context.begin(samples, 1000)
    pipe.transformer(
        torch.zeros(2 * samples, config.in_channels, tokens - 1),
        torch.ones(1),
        encoder_hidden_states=torch.ones(2 * samples, context, config.cross_attention_input_dim),
        global_hidden_states=torch.zeros(2 * samples, 1, config.global_states_input_dim),
        return_dict=False,
    )


class Through:
    """A processor that costs nothing; its output is its input."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return hidden_states


@contextlib.contextmanager
def hooked(module: Any, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda m, a, out: function(out))
    try:
        yield
    finally:
        handle.remove()


def rows_of_case(name: str) -> list[harness.Row]:
    width, heads, tokens, context, samples = CASES[name]
    pipe = build(width, heads, tokens)
    module = sidechain.sites(pipe)["cross:0"].module
    x = torch.randn(2 * samples, tokens, width)
    text = torch.randn(2 * samples, context, width // 2)
    direction = torch.randn(width)
    seen: list[Tensor] = []
    cond = slice(samples, None)

    def call() -> Tensor:
        return module(x, encoder_hidden_states=text)

    def pool(out: Tensor) -> None:
        seen[:] = [out[cond].float().mean(1)]

    def add(out: Tensor) -> Tensor:
        out[cond] += 2.0 * direction
        return out

    def pool_and_add(out: Tensor) -> Tensor:
        pool(out)
        return add(out)

    def capture() -> Any:
        return sidechain.capture(pipe, "cross:0")

    def steer(**options: Any) -> Any:
        return sidechain.steer(pipe, {"cross:0": direction}, strength=2.0, **options)

    def check() -> None:
        """The same numbers, before anything is timed."""
        with hooked(module, pool_and_add):
            expected = call()
        with steer(), capture() as tap:
            start(pipe, tap, samples, tokens, context)
            before = tap["cross:0"][0, 0]
            torch.testing.assert_close(call(), expected)
            mean = 2 * tap["cross:0"][0, 0] - before  # both calls were in step 0
            torch.testing.assert_close(mean, seen[0], rtol=1e-4, atol=1e-5)

    check()
    module.set_processor(Through())
    rows: list[harness.Row] = []

    def time_(provider: str, *around: Any) -> None:
        with contextlib.ExitStack() as stack:
            tap = [stack.enter_context(a) for a in around]
            if tap and tap[-1] is not None:
                start(pipe, tap[-1], samples, tokens, context)
            (row,) = harness.compare(name, "float32", 2 * x.nbytes, x, {provider: call})
        base = rows[0].median_us if rows else row.median_us
        rows.append(harness.Row(**{**vars(row), "times_eager": round(base / row.median_us, 2)}))

    time_("bare")
    time_("hook: mean", hooked(module, pool))
    time_("tap: mean", capture())
    time_("hook: add", hooked(module, add))
    time_("tap: steer", steer())
    time_("hook: mean + add", hooked(module, pool_and_add))
    time_("tap: mean + steer", steer(), capture())
    time_("tap: steer, renorm", steer(renorm=True))
    time_("tap: context swap", sidechain.patch(pipe, "cross:0", context=text[cond].clone()))
    time_("bare again")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", default="")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = [r for name in CASES if options.case in name for r in rows_of_case(name)]
    print(harness.table(rows))
    if not options.no_save:
        print(harness.save("taps", rows, threads=options.threads))


if __name__ == "__main__":
    main()
