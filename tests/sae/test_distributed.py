# SPDX-License-Identifier: Apache-2.0
"""Two and four processes under torchrun against one.

Rows split: bit for bit the same where nothing but the order of gathering could differ (fused path).
Features split: x_hat is a sum over slices, so the rule of every other comparison holds: at most
twice the error of plain dense float32, against dense float64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae.cases import batches, has_fused, make
from sae.oracle import DenseTrainer
from sidechain.sae import Codes, Mesh, Sae
from sidechain.sae.training import checkpoint
from sidechain.sae.training.step import train_step
from sidechain.testing.tolerance import assert_close

MESHES = {"2 x 1": (2, 1), "1 x 2": (1, 2), "2 x 2": (2, 2)}
SHARED = (
    "topk, aux",
    "multi_topk, aux, clipped",
    "batch_topk, aux",
    "transcoder, batch_topk",
    "matryoshka, aux",
    "relu, free norm",
    "gated, free norm, clipped",
    "gated, controlled",
    "jumprelu, tanh",
)
RUNS = [(case, path) for case in SHARED for path in ("autograd", "fused")]
RUNS = [(case, path) for case, path in RUNS if path == "autograd" or has_fused(case)]


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Everything the processes left, by mesh."""
    worker = Path(__file__).with_name("mesh_worker.py")
    out = tmp_path_factory.mktemp("meshes")
    for processes, slices in ((2, "1,2"), (4, "2")):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(processes), str(worker), str(out), slices, "|".join(SHARED),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-4000:]
    return {name: out / name for name in MESHES}


@pytest.fixture(scope="module")
def alone():
    """One process, dense float64 and dense float32, by case and path."""
    found = {}
    for case, path in RUNS:
        state = make(case, path)
        exact, eager = DenseTrainer(state), DenseTrainer(state, torch.float32)
        for rows in batches(state.config.transcoder):
            train_step(state, rows)
            for oracle in (exact, eager):
                dtype = oracle.b_pre.dtype
                target = None if rows.target is None else rows.target.to(dtype)
                oracle.step(rows.x.to(dtype), target)
        found[case, path] = state, exact.weights(), eager.weights()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("case", "path"), RUNS)
def test_equal_to_one_process(mesh, case, path, meshes, alone):
    state, exact, eager = alone[case, path]
    got = torch.load(meshes[mesh] / f"{case}-{path}.pt")
    assert torch.equal(got["last_fired"], state.last_fired)
    assert got["dead"] == state.dead_total
    for name, value in exact.items():
        if mesh == "2 x 1" and path == "fused":
            assert torch.equal(got["weights"][name], state.weights[name]), name
        assert_close(name, got["weights"][name], value, eager[name])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_checkpoint_continues_at_another_world_size(mesh, meshes):
    """Written by several processes, read by one that trains on; against one that did all of it."""
    state, whole = (make("batch_topk, aux", "fused") for _ in range(2))
    found = checkpoint.latest(meshes[mesh] / "checkpoints")
    assert len(found.manifest["files"]) == MESHES[mesh][1]
    checkpoint.load(found, state)
    exact, eager = DenseTrainer(whole), DenseTrainer(whole, torch.float32)
    for number, rows in enumerate(batches(False)):
        train_step(whole, rows)
        exact.step(rows.x.double())
        eager.step(rows.x)
        if number >= found.step:
            train_step(state, rows)
    assert torch.equal(state.last_fired, whole.last_fired)
    for name, value in exact.weights().items():
        assert_close(name, state.weights[name], value, eager.weights()[name])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_run_in_a_mesh(mesh, meshes):
    folder = meshes[mesh] / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(line["l0"] == pytest.approx(4.0) for line in lines)
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    other = meshes["2 x 1"] / "run"
    ours, theirs = (Sae.load(f / "sae.safetensors") for f in (folder, other))
    torch.testing.assert_close(ours.w_dec, theirs.w_dec)


def test_slices():
    with pytest.raises(ValueError, match=r"expected data x features = 1 .*got 2 x 1"):
        Mesh(2, 1)


def test_exact_batch_selection_with_ties(monkeypatch):
    """keep_batch_largest over slices played one after the other: the histograms are sums."""
    from sidechain.sae.architectures import select

    generator = torch.Generator().manual_seed(0)
    rows, features, total = 8, 40, 60
    # few different values: most of the selection is decided by ties
    z = torch.randint(0, 5, (rows, features), generator=generator).float().relu()
    order = torch.sort(z.flatten(), descending=True, stable=True).indices[:total]
    expected = torch.zeros(rows * features, dtype=bool)
    expected[order[z.flatten()[order] > 0]] = True
    parts = [(a, b) for a in range(2) for b in range(4)]
    kept = play(select, z, parts, total, monkeypatch)
    assert torch.equal(kept, expected.view(rows, features))


def play(select, z, parts, total, monkeypatch):
    """Run all slices in lockstep in threads; `sum_all` waits for every one of them."""
    import threading

    barrier = threading.Barrier(len(parts))
    sums, kept = {}, torch.zeros(z.shape, dtype=bool)

    class Slice:
        data, features, world = 2, 4, 8

        def __init__(self, a, b):
            self.data_rank, self.feature_rank = a, b

        def shard(self, features):
            return self.feature_rank * 10, self.feature_rank * 10 + 10

        def sum_all(self, t):
            barrier.wait()
            sums[self.data_rank, self.feature_rank] = t.clone()
            barrier.wait()
            return t.copy_(sum(sums[p] for p in parts))

    def work(a, b):
        own = z[a * 4 : a * 4 + 4, b * 10 : b * 10 + 10]
        place = (own > 0).flatten().nonzero()[:, 0]
        counts = (own > 0).sum(1)
        codes = Codes(
            own.flatten()[place],
            (place % 10).int(),
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        )
        got = select.keep_batch_largest(codes, total, Slice(a, b), z.shape[1])
        mine = torch.zeros(own.numel(), dtype=bool)
        mine[place] = got.indices >= 0
        kept[a * 4 : a * 4 + 4, b * 10 : b * 10 + 10] = mine.view(own.shape)

    threads = [threading.Thread(target=work, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return kept
