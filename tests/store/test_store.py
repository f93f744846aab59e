# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sidechain.store import ActivationStore, ActivationWriter, RunningStatistics, Storage

from .conftest import UNIT_ROWS, UNITS, WIDTH, rows_of, write_unit

ROWS = UNITS * UNIT_ROWS
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype(
        self, make: Callable[..., Path], expected: Callable[..., Tensor], dtype: torch.dtype
    ) -> None:
        store = ActivationStore(make(dtype=dtype))
        found, wanted = store.read(range(len(store))), expected()
        if dtype == torch.int8:
            # Half a quantum of every row, and the rounding of the scale and the product.
            bound = wanted.abs().amax(1, keepdim=True) / 127 * (0.5 + 1e-4)
            assert found.dtype == torch.float32
            assert bool(((found - wanted).abs() <= bound).all())
        else:
            assert torch.equal(found, wanted.to(dtype))

    def test_int8_keeps_a_row_of_zeros(self, tmp_path: Path) -> None:
        with ActivationWriter(tmp_path / "s", {"a": 5}, Storage(torch.int8)) as writer:
            writer.write({"a": torch.zeros(3, 5)})
        assert torch.equal(ActivationStore(tmp_path / "s").read([0, 1, 2]), torch.zeros(3, 5))

    def test_plain_memory_map_reads_a_shard(
        self, make: Callable[..., Path], expected: Callable[..., Tensor]
    ) -> None:
        folder = make(shard_bytes=1 << 30)
        raw = np.memmap(folder / "cross-3/00000.rows", np.float32, "r", shape=(ROWS, WIDTH))
        assert np.array_equal(raw, expected().numpy())

    def test_labels(self, whole: Path) -> None:
        some = torch.randperm(ROWS)[:300]
        labels = ActivationStore(whole, "bcd").labels(some)
        unit = some // UNIT_ROWS
        assert torch.equal(labels.prompt, unit)
        assert torch.equal(labels.step, unit % 4)
        assert torch.equal(labels.branch, 1 - unit % 2)
        assert torch.equal(labels.token, some % UNIT_ROWS)

    @pytest.mark.parametrize("site", ["cross:3", "bcd"])
    def test_several_sites_share_rows(
        self, whole: Path, expected: Callable[..., Tensor], site: str
    ) -> None:
        store = ActivationStore(whole, site)
        assert torch.equal(store.read(range(ROWS)), expected(site=site))
        assert store.sites == ("cross:3", "bcd")

    def test_shards_are_many_and_sealed(self, whole: Path) -> None:
        names = sorted(p.name for p in (whole / "cross-3").iterdir())
        assert len(names) > 5
        assert names == [f"{i:05d}.rows" for i in range(len(names))]

    def test_grid_and_prompts(self, tmp_path: Path) -> None:
        with ActivationWriter(tmp_path / "s", {"a": 2}) as writer:
            writer.set_grid([0.9, 0.5], [80.0, 0.1])
            writer.set_prompts(["x", "y"], [0, 1])
            writer.write({"a": torch.ones(1, 2)})
            with pytest.raises(ValueError, match=r"expected the time grid of .*2 steps from 0\.9"):
                writer.set_grid([0.9, 0.5, 0.1])
            writer.write({"a": torch.ones(1, 2)})
        store = ActivationStore(tmp_path / "s")
        assert len(store) == 2
        assert store.timesteps is not None and store.timesteps.tolist() == [0.9, 0.5]
        assert store.sigmas is not None and store.sigmas.tolist() == [80.0, 0.1]
        assert store.prompts() == ["x", "y"]


class TestFilters:
    @pytest.mark.parametrize(
        ("options", "keep"),
        [
            ({"steps": [1]}, lambda u: u % 4 == 1),
            ({"steps": (1, 3)}, lambda u: u % 4 in (1, 2)),
            ({"branches": "cond"}, lambda u: u % 2 == 1),
            ({"branches": ["cond", "uncond"]}, lambda u: True),
            ({"prompts": range(5, 9)}, lambda u: 5 <= u < 9),
            ({"steps": [0, 3], "branches": "uncond"}, lambda u: u % 4 == 0),
            ({"steps": [7]}, lambda u: False),
        ],
    )
    def test_keep_rows(self, whole: Path, options: dict, keep: Callable[[int], bool]) -> None:
        store = ActivationStore(whole, "cross:3", **options)
        units = [u for u in range(UNITS) if keep(u)]
        assert len(store) == UNIT_ROWS * len(units)
        if units:
            wanted = torch.cat([rows_of(u) for u in units])
            assert torch.equal(store.read(range(len(store))), wanted)
            some = torch.randperm(len(store))[:50]
            assert torch.equal(store.labels(some).prompt, torch.tensor(units)[some // UNIT_ROWS])


class TestStatistics:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_against_float64(self, make: Callable[..., Path], dtype: torch.dtype) -> None:
        store = ActivationStore(make(dtype=dtype))
        rows = store.read(range(ROWS)).double()
        labels = store.labels(range(ROWS))
        for steps, branches in ((None, None), ([2], None), ([1, 3], [0]), (None, [1])):
            keep = torch.ones(ROWS, dtype=torch.bool)
            if steps is not None:
                keep &= torch.isin(labels.step, torch.tensor(steps))
            if branches is not None:
                keep &= torch.isin(labels.branch, torch.tensor(branches))
            found, wanted = store.statistics.total(steps, branches), rows[keep].numpy()
            norms = np.linalg.norm(wanted, axis=1)
            assert found.count == len(wanted)
            np.testing.assert_allclose(found.mean, wanted.mean(0), rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(found.variance, wanted.var(0), rtol=1e-11)
            np.testing.assert_allclose(found.mean_norm, norms.mean(), rtol=1e-12)
            np.testing.assert_allclose(found.norm_max, norms.max(), rtol=1e-12)
            np.testing.assert_allclose(found.norm_squares, (norms**2).sum(), rtol=1e-12)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_show_what_is_not_finite(self, bad: float) -> None:
        rows = torch.ones(300, 20)
        rows[7, 3] = bad
        statistics = RunningStatistics.empty(20)
        statistics.add(rows)
        assert not statistics.finite()

    def test_of_no_rows(self) -> None:
        statistics = RunningStatistics.empty(20)
        statistics.add(torch.empty(0, 20))
        assert statistics.count == 0 and statistics.finite()

    @pytest.mark.parametrize("shape", [(1, 1), (9, 2560), (2, 200_000)])
    def test_of_any_shape(self, shape: tuple[int, int]) -> None:
        rows = 30.0 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
        statistics = RunningStatistics.empty(shape[1])
        for part in rows.split(max(1, shape[0] // 2)):
            statistics.add(part)
        wanted = rows.double().numpy()
        np.testing.assert_allclose(statistics.mean, wanted.mean(0), rtol=1e-13)
        np.testing.assert_allclose(statistics.variance, wanted.var(0), rtol=1e-10, atol=1e-12)

    def test_large_mean_loses_nothing(self, tmp_path: Path) -> None:
        rows = 1e4 + torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
        with ActivationWriter(tmp_path / "s", {"a": 4}, Storage(torch.float32)) as writer:
            for part in rows.split(7):
                writer.write({"a": part})
        found = ActivationStore(tmp_path / "s").statistics.total()
        np.testing.assert_allclose(found.variance, rows.double().numpy().var(0), rtol=1e-10)

    def test_survive_a_resume(self, make: Callable[..., Path], tmp_path: Path) -> None:
        folder = make(units=10)
        storage = Storage(torch.float32)
        with ActivationWriter(folder, {"cross:3": WIDTH}, storage, mode="append") as writer:
            for unit in range(10, 20):
                write_unit(writer, unit)
        wanted = torch.cat([rows_of(u) for u in range(20)]).double().numpy()
        found = ActivationStore(folder).statistics.total()
        np.testing.assert_allclose(found.mean, wanted.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.variance, wanted.var(0), rtol=1e-11)
        assert len(list(folder.glob("statistics-*"))) == 1


BAD_STORES = [
    ({"site": None}, "expected a site of .'cross:3', 'bcd'., got None"),
    ({"site": "b"}, "expected a site of .'cross:3', 'bcd'., got 'b'"),
    ({"branches": "both"}, "expected branches of cond, uncond, or all, got 'both'"),
    ({"steps": (3, 1)}, "expected steps as"),
]


class TestErrors:
    @pytest.mark.parametrize(("options", "message"), BAD_STORES)
    def test_reader(self, whole: Path, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ActivationStore(whole, **{"site": "cross:3", **options})

    def test_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"expected manifest\.json in"):
            ActivationStore(tmp_path)

    def test_rows_out_of_range(self, whole: Path) -> None:
        store = ActivationStore(whole, "bcd")
        with pytest.raises(IndexError, match=r"expected rows within \[0, 1000\), got 0 to 1000"):
            store.read([0, ROWS])
