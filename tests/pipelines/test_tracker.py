# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

import sidechain
from sidechain.pipelines import Generation, observe, release
from sidechain.testing import generate, tiny_pipeline


class Recorder:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.generations: list[Generation] = []
        self.steps: list[int] = []

    def bind(self, generation: Generation) -> None:
        self.generations.append(generation)

    def advance(self, step: int, call: int) -> None:
        self.steps.append(step)

    def before_call(self) -> None:
        pass

    def after_call(self, step: int) -> None:
        assert step == self.steps[-1]


@pytest.fixture
def watched(pipe: Any) -> Any:
    recorder = Recorder()
    tracker = observe(pipe, recorder)
    yield pipe, recorder, tracker
    release(pipe, recorder)


class TestGeneration:
    def test_steps_rows_and_branches_with_guidance(self, watched: Any) -> None:
        pipe, recorder, _ = watched
        generate(pipe, ["piano", "drums"], steps=5)
        (generation,) = recorder.generations
        assert recorder.steps == [0, 1, 2, 3, 4]
        assert (generation.samples, generation.steps, generation.branches) == (
            2,
            5,
            ("uncond", "cond"),
        )
        assert generation.sample_of_row.tolist() == [0, 1, 0, 1]
        assert generation.branch_of_row(0).tolist() == [0, 0, 1, 1]
        assert generation.rows_of("cond") == slice(2, 4)
        assert (
            generation.shape.rows,
            generation.shape.latent,
            generation.shape.contexts,
        ) == (4, (3, 8), (10,))
        cross = sidechain.sites(pipe)["cross:0"]
        assert (generation.tokens(cross), generation.context_tokens(cross)) == (9, 10)
        assert torch.equal(generation.timesteps, pipe.scheduler.timesteps.double())
        assert generation.sigmas is not None and len(generation.sigmas) == 5

    def test_guidance_off_is_one_branch(self, watched: Any) -> None:
        pipe, recorder, _ = watched
        generate(pipe, ["piano", "drums"], guidance_scale=1.0)
        assert recorder.generations[0].branches == ("cond",)
        assert recorder.generations[0].sample_of_row.tolist() == [0, 1]

    def test_several_waveforms_per_prompt(self, watched: Any) -> None:
        pipe, recorder, _ = watched
        generate(pipe, ["piano", "drums"], num_waveforms_per_prompt=3)
        assert recorder.generations[0].samples == 6
        assert recorder.generations[0].sample_of_row.tolist() == [*range(6), *range(6)]

    def test_several_calls_are_several_generations(self, watched: Any) -> None:
        pipe, recorder, _ = watched
        generate(pipe, ["piano"], steps=2)
        generate(pipe, ["piano", "drums"], steps=3, guidance_scale=1.0)
        assert [r.samples for r in recorder.generations] == [1, 2]
        assert recorder.generations[0].number != recorder.generations[1].number
        assert recorder.steps == [0, 1, 0, 1, 2]

    def test_second_order_schedulers_count_every_scheduler_step(self) -> None:
        pipe, recorder = tiny_pipeline(scheduler="heun"), Recorder()
        observe(pipe, recorder)
        generate(pipe, ["piano"], steps=3)
        release(pipe, recorder)
        assert recorder.steps == [0, 1, 2, 3, 4]
        assert recorder.generations[0].steps == 5

    def test_a_call_that_raised_leaves_nothing_behind(self, watched: Any) -> None:
        pipe, recorder, _ = watched

        def stop(step: int, timestep: int, latents: torch.Tensor) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate(pipe, ["piano"], callback=stop)
        generate(pipe, ["piano", "drums"], steps=2)
        assert recorder.steps == [0, 0, 1]
        assert recorder.generations[-1].samples == 2

    def test_by_hand(self, watched: Any) -> None:
        pipe, recorder, tracker = watched
        tracker.begin(samples=2, timesteps=3)
        inputs = dict(
            hidden_states=torch.randn(2, 3, 8),
            timestep=torch.ones(1),
            encoder_hidden_states=torch.randn(2, 10, 12),
            global_hidden_states=torch.randn(2, 1, 24),
        )
        with torch.no_grad():
            pipe.transformer(**inputs)
            tracker.next_step()
            pipe.transformer(**inputs)
        assert recorder.steps == [0, 1]
        assert recorder.generations[0].branches == ("cond",)


class TestRestore:
    def test_nothing_is_left(self, pipe: Any) -> None:
        generate(pipe, ["piano"], steps=2)
        before = [set(vars(o)) for o in (pipe, pipe.scheduler, pipe.transformer)]
        hooks = len(pipe.transformer._forward_pre_hooks)
        recorder, second = Recorder(), Recorder()
        observe(pipe, recorder)
        observe(pipe, second)
        release(pipe, recorder)
        generate(pipe, ["piano"], steps=2)
        release(pipe, second)
        assert [set(vars(o)) for o in (pipe, pipe.scheduler, pipe.transformer)] == before
        assert len(pipe.transformer._forward_pre_hooks) == hooks
        assert recorder.steps == [] and second.steps == [0, 1]

    def test_an_override_of_the_users_is_kept(self, pipe: Any) -> None:
        own = pipe.scheduler.step
        pipe.scheduler.step = own
        recorder = Recorder()
        observe(pipe, recorder)
        release(pipe, recorder)
        assert vars(pipe.scheduler)["step"] is own

    def test_signatures_show_through(self, watched: Any) -> None:
        import inspect

        pipe, _, _ = watched
        fresh = tiny_pipeline()
        for name in ("step", "set_timesteps"):
            assert inspect.signature(getattr(pipe.scheduler, name)) == inspect.signature(
                getattr(fresh.scheduler, name)
            )


class TestContradictions:
    def test_rows_that_are_no_multiple_of_the_samples(self, watched: Any) -> None:
        pipe, _, tracker = watched
        tracker.begin(samples=3)
        with pytest.raises(RuntimeError, match=r"expected 3 \(cond\) or 6 \(uncond \+ cond\) rows"):
            _call(pipe, rows=4)

    def test_a_zero_context_where_cond_should_be(self, watched: Any) -> None:
        pipe, _, tracker = watched
        tracker.begin(samples=1)
        text = torch.randn(2, 10, 12)
        text[1] = 0
        with pytest.raises(RuntimeError, match="stacks its branches differently"):
            _call(pipe, rows=2, context=text)

    def test_a_call_outside_of_a_run(self, watched: Any) -> None:
        with pytest.raises(RuntimeError, match="outside of one"):
            _call(watched[0], rows=2)

    def test_a_call_after_the_last_step(self, watched: Any) -> None:
        pipe, _, _ = watched
        generate(pipe, ["piano"], steps=2)
        with pytest.raises(RuntimeError, match="expected at most 2 scheduler steps"):
            _call(pipe, rows=2)

    def test_another_batch_in_scheduler_step(self, watched: Any) -> None:
        pipe, _, tracker = watched
        pipe.scheduler.set_timesteps(2)
        tracker.begin(samples=3, timesteps=2)
        sample = torch.randn(2, 3, 8)
        with pytest.raises(RuntimeError, match=r"expected 3 samples in scheduler.step"):
            pipe.scheduler.step(sample, pipe.scheduler.timesteps[0], sample)

    def test_no_steps(self, watched: Any) -> None:
        with pytest.raises(ValueError, match="expected at least one step"):
            generate(watched[0], ["piano"], steps=0)

    def test_a_new_scheduler(self, watched: Any) -> None:
        pipe, _, _ = watched
        pipe.scheduler = tiny_pipeline(scheduler="heun").scheduler
        with pytest.raises(RuntimeError, match="got a new one"):
            generate(pipe, ["piano"], steps=2)

    def test_two_pipelines_on_one_denoiser(self, watched: Any) -> None:
        other = tiny_pipeline()
        other.transformer = watched[0].transformer
        with pytest.raises(ValueError, match="expected one pipeline per denoiser"):
            observe(other, Recorder())


def _call(pipe: Any, rows: int, context: torch.Tensor | None = None) -> None:
    with torch.no_grad():
        pipe.transformer(
            torch.randn(rows, 3, 8),
            torch.ones(1),
            encoder_hidden_states=torch.randn(rows, 10, 12) if context is None else context,
            global_hidden_states=torch.randn(rows, 1, 24),
        )
