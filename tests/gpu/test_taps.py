# SPDX-License-Identifier: Apache-2.0
"""Taps on a GPU: the numbers of the CPU, on any stream, in CUDA graphs, and nobody waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from gpu.support import capture_begun, captured, copied, on, side_stream
from gpu.waits import META, stand_in, waits_of
from sidechain import Where
from sidechain.taps import Capture
from sidechain.taps.base import Tap
from sidechain.taps.cache_context import CachedAttention
from sidechain.taps.processor import arrange
from sidechain.testing import generate, tiny_pipeline
from sidechain.testing.tolerance import assert_close

PROMPTS = ["piano", "violin song"]
STEPS, SAMPLES, TOKENS, WIDTH = 4, 2, 65, 16
Taps = Callable[[Any], list[Any]]


def drawn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _swapped(pipe: Any, **options: Any) -> Any:
    context = sidechain.contexts(pipe, PROMPTS[::-1])
    return sidechain.patch(pipe, "cross:*", context=context, **options)


TAPS: dict[str, Taps] = {
    "mean": lambda p: [sidechain.capture(p, Where("cross:*", branches="all"))],
    "mean square, mask": lambda p: [
        sidechain.capture(
            p, Where("cross:*", tokens=drawn(SAMPLES, TOKENS) > 0), reduce="mean_square"
        )
    ],
    "tokens": lambda p: [
        sidechain.capture(p, Where("cross:*", tokens=slice(1, 60, 3)), reduce="tokens")
    ],
    "context": lambda p: [sidechain.capture(p, "cross:*", reduce="context")],
    "patched context": lambda p: [_swapped(p, rows=[True, False])],
    "patched output": lambda p: [
        sidechain.patch(p, Where("cross:1", steps=(1, 3)),
                        output=on(_place(p), drawn(2, SAMPLES, TOKENS, WIDTH)))
    ],
    "ablated": lambda p: [sidechain.patch(p, Where("cross:2", steps=(0.5, 1.0)), ablate=True)],
    "steered": lambda p: [
        sidechain.steer(p, {"cross:1": drawn(STEPS, WIDTH)}, Where(tokens=drawn(TOKENS) > 0),
                        strength=[2.0, -1.0], removal=0.5, renorm=True)
    ],
    "shared": lambda p: [sidechain.cache_context(p)],
    "all": lambda p: [
        sidechain.cache_context(p), _swapped(p, rows=[False, True]),
        sidechain.steer(p, {"cross:1": drawn(WIDTH)}, strength=[0.0, 2.0]),
        sidechain.capture(p, "cross:*"),
    ],
}  # fmt: skip


def _place(pipe: Any) -> str:
    return str(pipe.transformer.device)


def outcome(taps: Taps, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Latents of a generation under taps, and what was captured."""
    pipe = tiny_pipeline("music", dtype=dtype).to(device)
    start = drawn(SAMPLES, 64, 64, seed=1).to(device, dtype)
    with contextlib.ExitStack() as stack:
        attached = [stack.enter_context(tap) for tap in taps(pipe)]
        found = {"latents": generate(pipe, PROMPTS, steps=STEPS, latents=start)}
        for tap in attached:
            if isinstance(tap, Capture):
                found |= {site.alias: tap[site] for site in tap.sites}
                if tap.reduce == "mean_square":
                    found["square"] = tap.mean_square("cross:1")
    return found


@pytest.mark.parametrize("stream", ["current", "side"])
@pytest.mark.parametrize("name", TAPS)
def test_equals_the_cpu(device: str, name: str, stream: str) -> None:
    exact, eager = outcome(TAPS[name], "cpu", torch.float64), outcome(TAPS[name], "cpu")
    with side_stream(device) if stream == "side" else contextlib.nullcontext():
        got = outcome(TAPS[name], device)
    for key, value in got.items():
        assert_close(key, value, exact[key], eager[key])


def test_strength_zero_changes_no_bit(device: str) -> None:
    plain = outcome(lambda p: [], device)["latents"]
    steered = outcome(
        lambda p: [sidechain.steer(p, {"cross:1": drawn(WIDTH)}, strength=0.0, renorm=True)], device
    )["latents"]
    assert torch.equal(steered, plain)


class Denoiser:
    """One denoiser call of a generation, over and over, on its own memory."""

    def __init__(self, device: str, prompts: list[str] | None = None) -> None:
        self.pipe = tiny_pipeline("music").to(device)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.see(prompts or PROMPTS)

    def see(self, prompts: list[str]) -> None:
        """Take over the arguments of the first call for these prompts."""

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            if not self.args and not self.kwargs:
                self.args, self.kwargs = copied((args, kwargs))
            else:
                mine = {**dict(enumerate(self.args)), **self.kwargs}
                for key, value in {**dict(enumerate(args)), **kwargs}.items():
                    if isinstance(value, Tensor):
                        mine[key].copy_(value)

        with self.pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True):
            generate(self.pipe, prompts, steps=1)

    def __call__(self) -> Tensor:
        for tap in sidechain.attached(self.pipe):
            tap.tracker.repeat()
        with torch.no_grad():
            out: Tensor = self.pipe.transformer(*self.args, **self.kwargs)[0]
        return out

    def begin(self, tap: Any) -> Tensor:
        """Announce a run and make its first call, which makes the buffers of the taps."""
        tap.tracker.begin(SAMPLES, STEPS)
        return self()


@contextlib.contextmanager
def attached(tap: Any) -> Any:
    tap.attach()
    try:
        yield tap
    finally:
        tap.remove()


class TestGraph:
    def test_strength_and_step_are_data(self, device: str) -> None:
        call = Denoiser(device)
        plain, table = call(), drawn(STEPS, WIDTH)
        with attached(sidechain.steer(call.pipe, {"cross:1": table}, strength=1.0)) as tap:
            call.begin(tap)
            replay = captured(device, call)
            seen = []
            for strength, step in ((1.0, 0), ([2.0, -3.0], 0), (2.0, 2), (0.0, 1)):
                tap.strength = strength
                tap.advance(step, 0)
                got = replay().clone()
                torch.testing.assert_close(got, call())
                assert all(not torch.equal(got, other) for other in seen)
                seen.append(got)
            assert torch.equal(seen[-1], plain)

    def test_a_mask_keeps_its_memory_over_runs(self, device: str) -> None:
        call = Denoiser(device)
        tokens = drawn(SAMPLES, TOKENS) > 0
        steer = sidechain.steer(call.pipe, {"cross:1": drawn(WIDTH)}, Where(tokens=tokens))
        capture = sidechain.capture(call.pipe, Where("cross:1", tokens=tokens))
        with attached(steer), attached(capture):
            first = call.begin(steer).clone()
            replay = captured(device, call)
            masks = steer._mask, capture._kept_mask
            held = [mask.data_ptr() for mask in masks]
            call.begin(steer)
            taken = [torch.ones_like(mask) for mask in masks]  # memory let go of would be here
            assert [m.data_ptr() for m in (steer._mask, capture._kept_mask)] == held
            torch.testing.assert_close(replay(), first)
            assert all(bool(t.all()) for t in taken)

    def test_capture_fills_the_slot_of_the_step(self, device: str) -> None:
        call = Denoiser(device)
        with attached(sidechain.capture(call.pipe, "cross:*", reduce="mean_square")) as tap:
            call.begin(tap)
            replay = captured(device, call)
            tap.clear()
            for step in range(STEPS):
                tap.advance(step, 0)
                for _ in range(step + 1):
                    replay()
            (layout,) = tap._layouts.values()
            counts = layout.buffers[tap.sites[0].name].counts[:, 0].cpu()
            assert torch.equal(counts, TOKENS * torch.arange(1.0, STEPS + 1))
            for site in tap.sites:
                mean = tap[site]
                torch.testing.assert_close(mean, mean[:1].expand_as(mean))
                assert mean[0].any()

    def test_a_patched_output_follows_the_step(self, device: str) -> None:
        call = Denoiser(device)
        bank = on(device, drawn(STEPS, SAMPLES, TOKENS, WIDTH))
        with attached(sidechain.patch(call.pipe, "cross:1", output=bank)) as tap:
            call.begin(tap)
            replay = captured(device, call)
            seen = []
            for step in (2, 0, 3):
                tap.advance(step, 0)
                seen.append(replay().clone())
                torch.testing.assert_close(seen[-1], call())
            assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])

    def test_a_shared_context_is_filled_anew_in_place(self, device: str) -> None:
        """The graph of one run serves the next, with other texts."""
        call = Denoiser(device)
        plain = call().clone()
        with attached(sidechain.cache_context(call.pipe)) as tap:
            call.begin(tap)
            with side_stream(device):
                replay = captured(device, call)
            error = (replay() - plain).norm() / plain.norm()
            assert error <= 2e-5
            shared = tap._cached_at(tap.sites[0])[0]
            held = [shared._keys, shared._values, shared._entry, shared._seen]
            addresses = [t.data_ptr() for t in held]
            call.see(["drums loop", "flute"])
            other = call.begin(tap).clone()
            now = [shared._keys, shared._values, shared._entry, shared._seen]
            assert [t.data_ptr() for t in now] == addresses
            assert (other - plain).norm() / plain.norm() > 1e-3
            torch.testing.assert_close(replay(), other)

    def test_a_changed_context_is_found_out(self, device: str) -> None:
        if device == "cpu":
            pytest.skip("on the CPU the bank is made anew at once")
        call = Denoiser(device)
        tap = sidechain.cache_context(call.pipe).attach()
        call.begin(tap)
        replay = captured(device, call)
        call.see(["drums loop", "flute"])
        replay()
        with pytest.raises(RuntimeError, match="expected the same context at every step"):
            tap.remove()

    @pytest.mark.parametrize("name", ["mean", "steered", "patched output", "shared"])
    def test_the_first_call_is_refused(
        self, device: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Buffers made within a capture belong to the graph and would be filled by each replay."""
        call = Denoiser(device)
        tap = TAPS[name](call.pipe)[0].attach()
        tap.tracker.begin(SAMPLES, STEPS)
        match = "expected an eager denoiser call of these shapes at this step before a CUDA graph"
        with capture_begun(device, monkeypatch), pytest.raises(RuntimeError, match=match):
            call()
        call()
        tap.tracker.next_step()
        with capture_begun(device, monkeypatch), pytest.raises(RuntimeError, match=match):
            call()
        call()
        with capture_begun(device, monkeypatch):
            call()
        with contextlib.suppress(RuntimeWarning):
            tap._take_out()


@pytest.mark.parametrize("name", [n for n in TAPS if n not in ("all", "context")])
def test_a_call_waits_for_nothing(device: str, name: str) -> None:
    """From the second call of a run on; what changes is filled without waiting, too."""
    call = Denoiser(device)
    tap = TAPS[name](call.pipe)[0].attach()
    call.begin(tap)
    if device == "cpu":
        _to_meta(call, tap)
    with waits_of(device) as waits:
        for step in range(1, STEPS):
            tap.tracker.next_step()
            if name == "steered":
                tap.strength = [float(step), 0.5]
                tap.removal = 1.0
            call()
    assert waits == []
    Tap._take_out(tap)  # without the look at the context, which waits by contract


def _to_meta(call: Denoiser, tap: Any) -> None:
    """Put the denoiser and every buffer of a tap where `waits_of` looks."""
    done: dict[int, Any] = {}
    call.pipe.transformer.to(META)
    call.args, call.kwargs = stand_in("cpu", (call.args, call.kwargs), done)
    run = tap.tracker.generation
    object.__setattr__(run, "shape", replace(run.shape, device=META))
    _place_in(run, done)
    _place_in(tap, done)
    for operations in tap._operations.values():
        for operation in operations:
            _place_in(operation, done)
            if isinstance(operation, CachedAttention):
                operation._made_with = operation._weights()
    for site in tap.sites:
        arrange(site.module)


def _place_in(owner: Any, done: dict[int, Any]) -> None:
    for name, value in vars(owner).items():
        held = isinstance(value, Tensor | dict) or hasattr(value, "_fields")
        if held and name not in ("_operations", "timesteps", "sigmas"):
            object.__setattr__(owner, name, stand_in("cpu", value, done))
