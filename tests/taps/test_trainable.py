# SPDX-License-Identifier: Apache-2.0
"""Gradients of what is attached, against a plain hook in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.testing import call_tiny, generate, tiny_pipeline

SITE = "cross:1"
PROMPTS = ["piano song", "drums loop"]
COND, UNCOND = slice(2, 4), slice(0, 2)
STEPS = 2


@pytest.fixture
def wide() -> Any:
    return tiny_pipeline().to(torch.float64)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, tap: Any = None) -> Tensor:
    """Two steps of the denoiser with gradients; each step starts from what the last put out."""
    if tap is not None:
        tap.tracker.begin(2, STEPS)
    x, text, extra = drawn(4, 3, 8), 3 * drawn(4, 10, 12, seed=2), drawn(4, 1, 24, seed=3)
    for step in range(STEPS):
        time = torch.full((1,), 1.0 - 0.4 * step, dtype=x.dtype)
        (out,) = pipe.transformer(
            x, time, encoder_hidden_states=text, global_hidden_states=extra, return_dict=False
        )
        x = x + out
        if tap is not None:
            tap.tracker.next_step()
    return x.pow(3).sum()


def by_hook(pipe: Any, edit: Callable[[Tensor, int], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradients of the run with a plain hook: edit(output [R, T, C], step)."""
    step = iter(range(99))
    module = sidechain.sites(pipe)[SITE].module
    handle = module.register_forward_hook(lambda m, a, out: edit(out.clone(), next(step)))
    try:
        return list(torch.autograd.grad(run(pipe), leaves))
    finally:
        handle.remove()


def by_tap(pipe: Any, tap: Any, leaves: list[Tensor]) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    with tap:
        run(pipe, tap).backward()
    found = [leaf.grad for leaf in leaves]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert bool(b.any())
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class TestSteer:
    @pytest.mark.parametrize("shape", [(16,), (1, 16), (STEPS, 16)])
    def test_vectors(self, wide: Any, shape: tuple[int, ...]) -> None:
        v = drawn(*shape).requires_grad_()

        def edit(out: Tensor, step: int) -> Tensor:
            table = v.view(-1, 16)
            out[COND] = out[COND] + 2 * table[min(step, len(table) - 1)]
            return out

        agree(by_tap(wide, sidechain.steer(wide, {SITE: v}, strength=2.0), [v]),
              by_hook(wide, edit, [v]))  # fmt: skip

    @pytest.mark.parametrize("start", [0.0, 1.5])
    @pytest.mark.parametrize("shape", [(), (1,), (2,)])
    def test_strength_also_at_0(self, wide: Any, shape: tuple[int, ...], start: float) -> None:
        a = torch.full(shape, start, dtype=torch.float64, requires_grad=True)
        v = drawn(16).float()

        def edit(out: Tensor, step: int) -> Tensor:
            out[COND] = out[COND] + a.reshape(-1, 1, 1) * v
            return out

        tap = sidechain.steer(wide, {SITE: v}, strength=a)
        assert tap.strength is a
        agree(by_tap(wide, tap, [a]), by_hook(wide, edit, [a]))

    def test_branches_with_their_own_vectors(self, wide: Any) -> None:
        both = {"cond": drawn(STEPS, 16).requires_grad_(),
                "uncond": drawn(STEPS, 16, seed=5).requires_grad_()}  # fmt: skip

        def edit(out: Tensor, step: int) -> Tensor:
            out[COND] = out[COND] + both["cond"][step]
            out[UNCOND] = out[UNCOND] + both["uncond"][step]
            return out

        tap = sidechain.steer(wide, {(SITE, b): v for b, v in both.items()}, Where(branches="all"))
        agree(by_tap(wide, tap, list(both.values())), by_hook(wide, edit, list(both.values())))

    def test_which(self, wide: Any) -> None:
        v, w, a = drawn(16).requires_grad_(), drawn(16, seed=5).requires_grad_(), drawn(2)
        a.requires_grad_()

        def edit(out: Tensor, step: int) -> Tensor:
            out[2], out[3] = out[2] + a[0] * w, out[3] + a[1] * v
            return out

        tap = sidechain.steer(wide, [{SITE: v}, {SITE: w}], strength=a, which=[1, 0])
        agree(by_tap(wide, tap, [v, w, a]), by_hook(wide, edit, [v, w, a]))

    @pytest.mark.parametrize("start", [0.0, 0.7])
    @pytest.mark.parametrize("tokens", [slice(None), slice(1, None), slice(2, 7, 2), "mask"])
    def test_removal_renorm_and_tokens(self, wide: Any, tokens: Any, start: float) -> None:
        v, a = drawn(16).requires_grad_(), torch.tensor(0.4, dtype=torch.float64).requires_grad_()
        b = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        cut, mask = tokens, torch.zeros(9, dtype=torch.bool)
        mask[3:6] = True
        if tokens == "mask":
            cut, tokens = slice(3, 6), mask

        def edit(out: Tensor, step: int) -> Tensor:
            x = out[COND, cut].clone()
            y = x + (a - b * (x @ v).clamp(min=0)[..., None]) * v
            out[COND, cut] = y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True))
            return out

        tap = sidechain.steer(
            wide, {SITE: v}, Where(tokens=tokens), strength=a, removal=b, renorm=True
        )
        agree(by_tap(wide, tap, [v, a, b]), by_hook(wide, edit, [v, a, b]))

    def test_window_and_a_capture_in_the_same_call(self, wide: Any) -> None:
        v = drawn(16).requires_grad_()

        def edit(out: Tensor, step: int) -> Tensor:
            if step == 1:
                out[COND] = out[COND] + v
            return out

        with sidechain.capture(wide, SITE):
            found = by_tap(wide, sidechain.steer(wide, {SITE: v}, Where(steps=(1, 2))), [v])
        agree(found, by_hook(wide, edit, [v]))

    def test_a_strength_that_changes_between_the_steps(self, wide: Any) -> None:
        v = drawn(16).requires_grad_()

        def edit(out: Tensor, step: int) -> Tensor:
            out[COND] = out[COND] + (1.0, -3.0)[step] * v
            return out

        tap = sidechain.steer(wide, {SITE: v})
        plain = tap._advance

        def advance(step: int, call: int, inside: bool) -> None:
            plain(step, call, inside)
            tap.strength = (1.0, -3.0)[step]

        tap._advance = advance  # type: ignore[method-assign]
        agree(by_tap(wide, tap, [v]), by_hook(wide, edit, [v]))

    def test_another_number_of_steps(self, wide: Any) -> None:
        v = drawn(3, 16).requires_grad_()

        timed = SimpleNamespace(
            tensors={("transformer_blocks.1.attn2", "cond"): v}, sigmas=None, config_hash="",
            timesteps=torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64),
        )  # fmt: skip

        def edit(out: Tensor, step: int) -> Tensor:
            out[COND] = out[COND] + v[0 if step == 0 else 2]
            return out

        with pytest.warns(RuntimeWarning, match="is interpolated"):
            found = by_tap(wide, sidechain.steer(wide, timed), [v])
        v.grad = None
        (expected,) = by_hook(wide, edit, [v])
        torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)

    def test_checkpoints_give_the_same_gradients(self, wide: Any) -> None:
        grads = []
        for checkpoints in (False, True):
            model = wide.transformer.train().requires_grad_(False)
            v, a = drawn(16).requires_grad_(), torch.ones(2).double().requires_grad_()
            if checkpoints:
                model.enable_gradient_checkpointing()
            with sidechain.steer(wide, {SITE: v}, strength=a) as tap:
                tap.tracker.begin(2, 1)
                wide.transformer(
                    drawn(4, 3, 8).requires_grad_(), torch.ones(1).double(),
                    encoder_hidden_states=drawn(4, 10, 12), global_hidden_states=drawn(4, 1, 24),
                ).sample.pow(2).sum().backward()  # fmt: skip
            grads.append([v.grad, a.grad])
        agree(grads[1], grads[0])

    def test_checkpoints_over_several_steps_raise(self, wide: Any) -> None:
        wide.transformer.train().enable_gradient_checkpointing()
        v = drawn(16).requires_grad_()
        with sidechain.steer(wide, {SITE: v}) as tap:
            loss = run(wide, tap)
            with pytest.raises(RuntimeError, match="expected backward before the next step"):
                loss.backward()

    def test_an_optimiser_step_is_seen_with_and_without_gradients(self, wide: Any) -> None:
        v, a = drawn(16).requires_grad_(), torch.tensor(1.0).double().requires_grad_()
        with sidechain.steer(wide, {SITE: v}, strength=a) as tap:
            run(wide, tap).backward()
            torch.optim.SGD([v, a], lr=0.05).step()
            with torch.no_grad():
                plain = run(wide, tap)
            trained = run(wide, tap)
        torch.testing.assert_close(plain, trained.detach(), rtol=1e-6, atol=0)  # buffers: float32
        fixed = sidechain.steer(wide, {SITE: v.detach().clone()}, strength=a.detach())
        with fixed as tap, torch.no_grad():
            torch.testing.assert_close(run(wide, tap), plain, rtol=1e-12, atol=0)
            tap.strength = 1.0
            assert abs(run(wide, tap) - plain) > 1e-3 * abs(plain)

    def test_given_while_in_place(self, wide: Any) -> None:
        a = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        v = drawn(16).float()
        with sidechain.steer(wide, {SITE: v}) as tap:
            run(wide, tap)
            tap.removal = a
            run(wide, tap).backward()
            assert a.grad is not None and bool(a.grad)
            tap.removal = 0.0
            assert not run(wide, tap).requires_grad and tap.removal is not a

    def test_training_through_a_pipeline(self) -> None:
        """Strengths are learnt that reach a target; `__call__` itself disables gradients."""
        pipe, v = tiny_pipeline(), drawn(16).float()
        pipe.transformer.requires_grad_(False)
        with sidechain.steer(pipe, {SITE: v}, strength=2.0):
            target = generate(pipe, PROMPTS, steps=2)
        strength = torch.zeros(2, requires_grad=True)
        call = type(pipe).__call__.__wrapped__
        optimiser = torch.optim.Adam([strength], lr=0.3)
        pipe.set_progress_bar_config(disable=True)
        losses = []
        with sidechain.steer(pipe, {SITE: v}, strength=strength):
            for _ in range(25):
                generators = [torch.Generator().manual_seed(i) for i in range(2)]
                found = call(
                    pipe, PROMPTS, num_inference_steps=2, generator=generators, output_type="latent"
                )[0]
                loss = (found - target).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
        assert losses[-1] < 0.05 * losses[0], losses

    def test_a_record_of_vectors_is_not_trained(self) -> None:
        v = torch.ones(1, 16, requires_grad=True)
        with pytest.raises(NotImplementedError, match="expected tensors without gradient"):
            sidechain.SteeringVector({("transformer_blocks.1.attn2", "cond"): v})


class TestPatch:
    @pytest.mark.parametrize("steps", [None, (0, 1)])
    def test_context(self, wide: Any, steps: Any) -> None:
        c = drawn(2, 10, 12, seed=7).requires_grad_()
        module = sidechain.sites(wide)[SITE].module
        step = iter(range(99))

        def swap(m: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            text = kwargs["encoder_hidden_states"]
            if steps is None or next(step) < 1:
                text = torch.cat([text[UNCOND], text[2:3], c[1:]])
            return args, {**kwargs, "encoder_hidden_states": text}

        handle = module.register_forward_pre_hook(swap, with_kwargs=True)
        expected = list(torch.autograd.grad(run(wide), [c]))
        handle.remove()
        place = Where(SITE, steps=steps)
        tap = sidechain.patch(wide, place, context=c, rows=[False, True])
        agree(by_tap(wide, tap, [c]), expected)

    @pytest.mark.parametrize("option", ["key", "value"])
    def test_keys_and_values(self, wide: Any, option: str) -> None:
        c = drawn(2, 10, 12, seed=7).requires_grad_()
        projection = getattr(sidechain.sites(wide)[SITE].module, f"to_{option[0]}")
        handle = projection.register_forward_pre_hook(
            lambda m, args: (torch.cat([args[0][UNCOND], c]),)
        )
        expected = list(torch.autograd.grad(run(wide), [c]))
        handle.remove()
        agree(by_tap(wide, sidechain.patch(wide, SITE, **{option: c}), [c]), expected)

    @pytest.mark.parametrize("branches", ["cond", "all"])
    def test_output(self, wide: Any, branches: str) -> None:
        count = 2 if branches == "all" else 1
        y = drawn(STEPS, count, 2, 9, 16, seed=7).requires_grad_()

        def edit(out: Tensor, step: int) -> Tensor:
            out[2] = y[step, 0, 0]  # the families of these tests put uncond first
            if branches == "all":
                out[0], out[2] = y[step, 0, 0], y[step, 1, 0]
            return out

        place = Where(SITE, branches)
        tap = sidechain.patch(wide, place, output=y, rows=[True, False])
        agree(by_tap(wide, tap, [y]), by_hook(wide, edit, [y]))

    def test_an_optimiser_step_is_seen_without_gradients(self, wide: Any) -> None:
        c = drawn(2, 10, 12, seed=7).requires_grad_()
        y = drawn(STEPS, 2, 9, 16, seed=8).requires_grad_()
        with (
            sidechain.patch(wide, "cross:0", context=c) as tap,
            sidechain.patch(wide, SITE, output=y),
        ):
            run(wide, tap).backward()
            torch.optim.SGD([c, y], lr=0.5).step()
            with torch.no_grad():
                found = run(wide, tap)
        with (
            sidechain.patch(wide, "cross:0", context=c.detach().clone()) as tap,
            sidechain.patch(wide, SITE, output=y.detach().clone()),
            torch.no_grad(),
        ):
            assert torch.equal(run(wide, tap), found)

    def test_values_are_those_at_the_beginning_of_a_step(self, wide: Any) -> None:
        y = drawn(STEPS, 2, 9, 16, seed=8)
        c = drawn(2, 10, 12, seed=7)
        both = [y.clone().requires_grad_(), c.clone().requires_grad_()]

        def found(output: Tensor, context: Tensor, between: Callable[[], None]) -> Tensor:
            with (
                sidechain.patch(wide, "cross:0", context=context) as tap,
                sidechain.patch(wide, SITE, output=output),
                torch.no_grad(),
            ):
                plain, tap.tracker.next_step = tap.tracker.next_step, lambda: (between(), plain())
                return run(wide, tap)

        def change() -> None:
            both[0].mul_(2.0)  # the entry of the step that is over does not matter
            both[1].add_(1.0)

        late = y.clone()
        late[1] *= 2.0
        unchanged = found(late, c, lambda: None)
        assert not torch.equal(found(*both, change), unchanged)
        both[0].data.copy_(y)
        both[1].data.copy_(c)
        only = found(both[0], c, lambda: both[0].mul_(2.0))
        assert torch.equal(only, unchanged)

    def test_ablation_in_a_window_keeps_the_gradient_of_the_rest(self, wide: Any) -> None:
        v = drawn(16).requires_grad_()

        def edit(out: Tensor, step: int) -> Tensor:
            if step == 0:
                out[COND] = 0
            out[COND] = out[COND] + v
            return out

        with sidechain.patch(wide, Where(SITE, steps=(0, 1)), ablate=True):
            found = by_tap(wide, sidechain.steer(wide, {SITE: v}), [v])
        agree(found, by_hook(wide, edit, [v]))


def test_two_calls_in_a_step() -> None:
    """The buffers of the cond call are written again for the uncond call before backward."""
    pipe = tiny_pipeline("wan")
    calls: list[Any] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: calls.append(k), with_kwargs=True
    )
    call_tiny(pipe, seeds=(0,), steps=1)
    handle.remove()
    site = sidechain.sites(pipe)["cross:0"]
    v = torch.ones(site.width, requires_grad=True)

    def loss() -> Tensor:
        found = [pipe.transformer(**k)[0].square().sum() for k in calls]
        return found[0] + 2 * found[1]

    number = iter(range(99))

    def add(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + (1.5 * v if next(number) == 0 else 0 * v)

    handle = site.module.register_forward_hook(add)
    (expected,) = torch.autograd.grad(loss(), [v])
    handle.remove()
    with sidechain.steer(pipe, {"cross:0": v}, strength=1.5) as tap:
        tap.tracker.begin(1, 1)
        loss().backward()
    torch.testing.assert_close(v.grad, expected, rtol=1e-4, atol=1e-6)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_vectors_and_context(self, wide: Any) -> None:
        v, c = drawn(16).requires_grad_(), drawn(2, 10, 12).requires_grad_()
        grads = []
        for compiled in (False, True):
            if compiled:
                wide.transformer.compile(fullgraph=True, backend="aot_eager")
            v.grad = c.grad = None
            with sidechain.patch(wide, "cross:0", context=c):
                grads.append(by_tap(wide, sidechain.steer(wide, {SITE: v}), [v, c]))
        agree(grads[1], grads[0])
