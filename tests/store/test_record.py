# SPDX-License-Identifier: Apache-2.0
"""What `record` writes against what `capture` sees."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.store import ActivationStore, Sampling, Storage, record
from sidechain.taps.stream import StreamTap
from sidechain.testing import tiny_pipeline
from sidechain.testing.tiny import generate

PROMPTS = ["a sad piano song", "happy drums", "techno loop with bass"]
STEPS = 4


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


def recorded(pipe: Any, folder: Path, **options: Any) -> dict[str, ActivationStore]:
    options = {"dtype": torch.float32, "num_inference_steps": STEPS, "batch_size": 3, **options}
    prompts = options.pop("prompts", PROMPTS)
    place = {name: options.pop(name) for name in ("branches", "steps", "tokens") if name in options}
    where = Where(options.pop("sites", "cross:*"), **place)
    groups = {"sampling": Sampling, "storage": Storage}
    for group, kind in groups.items():
        known = options.keys() & {field.name for field in fields(kind)}
        options[group] = kind(**{name: options.pop(name) for name in known})
    return record(pipe, where, prompts, folder, progress=False, **options)


def captured(
    pipe: Any, dtype: torch.dtype = torch.float32, **place: Any
) -> tuple[dict[str, Tensor], Any]:
    where = Where("cross:*", **place)
    with sidechain.capture(pipe, where, reduce="tokens", dtype=dtype) as cap:
        generate(pipe, PROMPTS, steps=STEPS)
    return {alias: cap[alias] for alias in cap.sites.aliases}, cap.labels


class TestContent:
    @pytest.mark.parametrize("name", ["stable_audio", "music"])
    @pytest.mark.parametrize("branches", ["cond", "uncond", "all"])
    def test_is_what_capture_sees(self, tmp_path: Path, name: str, branches: str) -> None:
        pipe = tiny_pipeline(name)
        stores = recorded(pipe, tmp_path / "s", branches=branches)
        wanted, axes = captured(pipe, branches=branches)
        assert list(stores) == list(wanted)
        for alias, store in stores.items():
            found, labels = store.read(range(len(store))), store.labels(range(len(store)))
            assert len(store) == wanted[alias].flatten(0, 3).shape[0]
            for step in range(STEPS):
                for place, branch in enumerate(axes.branches):
                    for prompt in range(3):
                        here = (
                            (labels.step == step)
                            & (labels.branch == store.branches.index(branch))
                            & (labels.prompt == prompt)
                        )
                        assert torch.equal(found[here], wanted[alias][step, place, prompt])
                        assert torch.equal(labels.token[here], torch.arange(int(here.sum())))
            torch.testing.assert_close(store.timesteps, axes.timesteps)
            assert store.prompts() == PROMPTS

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, pipe: Any, tmp_path: Path, dtype: torch.dtype) -> None:
        store = recorded(pipe, tmp_path / "s", dtype=dtype)["cross:1"]
        wanted, _ = captured(pipe, dtype=dtype)
        assert torch.equal(store.read(range(len(store))), wanted["cross:1"].flatten(0, 3))

    def test_int8(self, pipe: Any, tmp_path: Path) -> None:
        store = recorded(pipe, tmp_path / "s", dtype=torch.int8)["cross:1"]
        wanted = captured(pipe)[0]["cross:1"].flatten(0, 3)
        bound = wanted.abs().amax(1, keepdim=True) / 127 * (0.5 + 1e-4)
        assert bool(((store.read(range(len(store))) - wanted).abs() <= bound).all())

    def test_a_selection(self, pipe: Any, tmp_path: Path) -> None:
        options = {"steps": (1, 4), "tokens": slice(1, None, 3)}
        store = recorded(pipe, tmp_path / "s", every=2, **options)["cross:0"]
        wanted, axes = captured(pipe, **options)
        assert axes.steps == (1, 2, 3)
        labels = store.labels(range(len(store)))
        assert labels.step.unique().tolist() == [1, 3]
        assert labels.token.unique().tolist() == list(range(1, 9, 3))
        kept = wanted["cross:0"][::2].flatten(0, 3)
        assert torch.equal(store.read(range(len(store))), kept)

    def test_batches_do_not_change_the_rows(self, pipe: Any, tmp_path: Path) -> None:
        one = recorded(pipe, tmp_path / "a", batch_size=1)["cross:2"]
        all_at_once = recorded(pipe, tmp_path / "b")["cross:2"]

        def by_label(store: ActivationStore) -> Tensor:
            labels = store.labels(range(len(store)))
            key = (labels.prompt * 100 + labels.step) * 1000 + labels.token
            return store.read(key.argsort())

        torch.testing.assert_close(by_label(one), by_label(all_at_once))

    def test_device_memory_does_not_grow_with_steps(self, pipe: Any) -> None:
        seen = []
        where = Where("cross:*", "all")
        tap = StreamTap(pipe, where, 1, torch.float16, lambda rows: seen.append(rows.step))
        for steps in (2, 9):
            with tap:
                generate(pipe, PROMPTS, steps=steps)
                tap.end()
            assert {tuple(ring.shape[:2]) for ring in tap._rings.values()} == {(2, 6)}
        assert seen == [0, 1, *range(9)]


class TestContinuing:
    def count_calls(self, pipe: Any) -> list[int]:
        calls: list[int] = []
        pipe.transformer.register_forward_pre_hook(lambda m, a: calls.append(1))
        return calls

    def test_what_is_there_is_not_run_again(self, pipe: Any, tmp_path: Path) -> None:
        recorded(pipe, tmp_path / "s")
        calls = self.count_calls(pipe)
        store = recorded(pipe, tmp_path / "s")["cross:0"]
        assert not calls and len(store) == 3 * STEPS * 9

    def test_more_prompts_extend_a_store(self, pipe: Any, tmp_path: Path) -> None:
        recorded(pipe, tmp_path / "s")
        calls = self.count_calls(pipe)
        longer = [*PROMPTS, "jazz", "rock"]
        store = recorded(pipe, tmp_path / "s", prompts=longer)["cross:0"]
        assert len(calls) == STEPS and store.prompts() == longer
        assert store.labels(range(len(store))).prompt.unique().tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"branches": "all"}, "expected passes='cond' .*got 'all'"),
            ({"num_inference_steps": 5}, "expected call="),
            ({"every": 2}, "expected every=1 .*got 2"),
            ({"sites": "cross:1"}, "expected sites="),
            ({"steps": (0, 2)}, "expected steps=None"),
            ({"prompts": ["x", *PROMPTS]}, "expected prompts that begin with the 3 of"),
            ({"prompts": PROMPTS[:2]}, "expected prompts that begin with the 3 of"),
            ({"seeds": [5]}, "expected seeds that begin with the 3 of"),
            ({"dtype": torch.float16}, "expected dtype float32"),
        ],
    )
    def test_another_recording_is_refused(
        self, pipe: Any, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        rows = len(recorded(pipe, tmp_path / "s")["cross:0"])
        with pytest.raises(ValueError, match=message):
            recorded(pipe, tmp_path / "s", **change)
        store = ActivationStore(tmp_path / "s", "cross:0")
        store.verify()
        assert len(store) == rows


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompts": "one"}, TypeError, "expected prompts as a list of str"),
    ({"prompts": []}, ValueError, "expected at least one prompt"),
    ({"sites": "cross:9"}, ValueError, "expected one of"),
    ({"batch_size": 0}, ValueError, "expected batch_size >= 1, got 0"),
    ({"every": 0}, ValueError, "expected every >= 1, got 0"),
    ({"branches": "both"}, ValueError, "record: expected branches to be one of cond, uncond, all"),
    ({"steps": (3, 1)}, ValueError, "record: expected 0 <= start < stop"),
    ({"tokens": torch.ones(9, dtype=torch.bool)}, NotImplementedError, "got a mask"),
    ({"generator": 1}, ValueError, r"expected no generator \[set by record\]"),
    ({"seeds": []}, ValueError, "expected at least one seed"),
    ({"dtype": torch.float64}, TypeError, "expected dtype float32"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input_leaves_nothing_behind(
    pipe: Any, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        recorded(pipe, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_an_error_of_the_writer_stops_the_run_and_detaches(pipe: Any, tmp_path: Path) -> None:
    before = sidechain.sites(pipe)["cross:0"].module.processor
    with torch.no_grad():
        module = sidechain.sites(pipe)["cross:0"].module
        module.to_out[0].weight.fill_(1e30)
    with pytest.raises(ValueError, match="expected finite rows in float16"):
        recorded(pipe, tmp_path / "s", dtype=torch.float16, sites="cross:0", batch_size=1)
    assert sidechain.sites(pipe)["cross:0"].module.processor is before
