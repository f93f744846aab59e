# SPDX-License-Identifier: Apache-2.0
"""Every family under adapters, offloading, compilation, other batches and errors on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sidechain
from pipelines.test_families import CASES, STEPS, Runs
from sidechain import Where
from sidechain.pipelines.adapter import find_denoiser
from sidechain.testing import call_tiny, tiny_pipeline
from sidechain.testing.tiny import PROMPTS

EVERY = Where("*", branches="all")


@pytest.fixture(params=CASES)
def runs(request: pytest.FixtureRequest) -> Runs:
    case = CASES[request.param]
    return Runs(case, tiny_pipeline(case.pipeline))


def attention_linears(denoiser: nn.Module) -> list[str]:
    names = ("to_q", "to_k", "to_v", "to_kv", "to_qkv")
    return [
        name
        for name, part in denoiser.named_modules()
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in names
    ]


def check_taps(runs: Runs) -> None:
    """A capture equals plain hooks, and steering equals a plain hook."""
    plain, outputs, _ = runs.seen()
    with sidechain.capture(runs.pipe, EVERY, reduce="tokens") as cap:
        assert torch.equal(runs.run(), plain)
    assert set(cap.branches) == set(runs.case.order)
    for site in runs.sites:
        expected = runs.by_branch(outputs[site.name])
        for place, branch in enumerate(cap.branches):
            assert torch.equal(cap[site][:, place], expected[branch]), (site, branch)
    site = runs.sites[len(runs.sites) - 1]
    direction = torch.randn(site.width, generator=torch.Generator().manual_seed(2))
    with sidechain.steer(runs.pipe, {site.name: direction}, strength=0.0) as tap:
        assert torch.equal(runs.run(), plain)
        tap.strength = 2.0
        assert not torch.equal(runs.run(), plain)


class TestMatrix:
    def test_under_adapters(self, runs: Runs) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        plain = runs.run()
        denoiser = find_denoiser(runs.pipe)[1]
        config = LoraConfig(
            r=2, target_modules=attention_linears(denoiser), init_lora_weights=False
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            inject_adapter_in_model(config, denoiser)
        runs.pipe.to("cpu")
        assert not torch.equal(runs.run(), plain), "the adapter does nothing"
        check_taps(runs)

    def test_under_offloading(self, runs: Runs) -> None:
        from diffusers.hooks import apply_group_offloading

        device = torch.device("cpu")
        denoiser = find_denoiser(runs.pipe)[1]
        apply_group_offloading(
            denoiser, onload_device=device, offload_device=device, offload_type="leaf_level"
        )
        check_taps(runs)

    def test_compiled_to_one_graph_that_stays(self, runs: Runs) -> None:
        denoiser = find_denoiser(runs.pipe)[1]
        site = runs.sites[len(runs.sites) - 1]
        directions = {s.name: torch.randn(s.width) for s in runs.sites}
        with torch.no_grad():
            torch._dynamo.reset()
            denoiser.compile(backend="eager", fullgraph=True)
            plain = runs.run()
            torch._dynamo.reset()
            with (
                sidechain.capture(runs.pipe, EVERY) as cap,
                sidechain.steer(runs.pipe, directions, strength=0.0) as tap,
            ):
                torch.testing.assert_close(runs.run(), plain, rtol=1e-4, atol=1e-5)
                graphs = counted()
                first = cap[site]
                cap.clear()
                tap.strength = 1.5
                with torch._dynamo.config.patch(error_on_recompile=True):
                    changed = runs.run()
                assert counted() == graphs
                assert not torch.allclose(changed, plain, atol=1e-4)
                assert torch.isfinite(first).all()
        torch._dynamo.reset()

    def test_a_second_batch_size(self, runs: Runs) -> None:
        call = {k: v[:1] if isinstance(v, list) else v for k, v in runs.case.call.items()}
        site = runs.sites[0]
        direction = torch.ones(site.width)
        with sidechain.steer(runs.pipe, {site.name: direction}) as tap:
            pair = runs.run()
            tap.strength = [1.0]
            alone = call_tiny(runs.pipe, PROMPTS[:1], steps=STEPS, seeds=(0,), **call)
            assert torch.equal(runs.run(), pair)
        error = (alone - pair[:1]).norm() / pair[:1].norm()
        assert float(error) < 1e-3

    def test_an_error_on_the_way_leaves_nothing(self, runs: Runs) -> None:
        plain = runs.run()
        processors = [site.module.processor for site in runs.sites]
        broken = runs.sites[len(runs.sites) - 1].module
        handle = broken.register_forward_hook(fail_at_second())
        with (
            pytest.raises(ZeroDivisionError),
            sidechain.capture(runs.pipe, EVERY),
            sidechain.steer(runs.pipe, {s.name: torch.ones(s.width) for s in runs.sites}),
        ):
            runs.run()
        handle.remove()
        assert all(s.module.processor is p for s, p in zip(runs.sites, processors, strict=True))
        assert torch.equal(runs.run(), plain)
        with sidechain.capture(runs.pipe, EVERY):
            assert torch.equal(runs.run(), plain)


def counted() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def fail_at_second() -> Any:
    calls = iter(range(10))

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        1 // (1 - next(calls))

    return hook
