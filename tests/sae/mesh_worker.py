# SPDX-License-Identifier: Apache-2.0
"""Started by torchrun in tests: trains cases in a mesh and leaves what came out in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sae.cases import D, F, N, batches, has_fused, make
from sae.oracle import planted
from sidechain.sae import Rows, SaeConfig, TrainConfig, Trainer, from_environment
from sidechain.sae.training import checkpoint
from sidechain.sae.training.step import train_step
from sidechain.sae.training.streams import IterableSource


def main() -> None:
    torch.set_num_threads(1)
    for slices in map(int, sys.argv[2].split(",")):
        mesh = from_environment(slices)
        out = Path(sys.argv[1]) / f"{mesh.data} x {mesh.features}"
        out.mkdir(exist_ok=True)
        work(mesh, out, sys.argv[3].split("|"))
    dist.destroy_process_group()


def work(mesh, out, cases) -> None:
    for case in cases:
        for path in ("autograd", "fused") if has_fused(case) else ("autograd",):
            state = make(case, path, mesh=mesh)
            for rows in batches(state.config.transcoder):
                first, last = mesh.rows(N)
                own = Rows(*(None if t is None else t[first:last] for t in rows))
                train_step(state, own)
            leave(state, out / f"{case}-{path}.pt")
    saved = make("batch_topk, aux", "fused", mesh=mesh)
    for rows in list(batches(False))[:10]:
        train_step(saved, Rows(rows.x[slice(*mesh.rows(N))]))
    checkpoint.save(out / "checkpoints", saved, {})
    run(mesh, out / "run")


def leave(state, path) -> None:
    sae = state.to_sae()
    fired = state.mesh.gather_features(state.last_fired)
    if state.mesh.first:
        weights = {n: t.detach() for n, t in sae.named_parameters()}
        if sae.threshold is not None:
            weights["threshold"] = sae.threshold.detach()
        torch.save({"weights": weights, "last_fired": fired, "dead": state.dead_total}, path)


def run(mesh, out) -> None:
    x, _ = planted(N * 12, D, seed=3)
    config = SaeConfig(D, F, "batch_topk", k=4)
    settings = TrainConfig(tokens=N * 12, batch=N, lr=3e-3, log_every=4, checkpoint_minutes=0.0)
    Trainer(config, settings, IterableSource([x]), out, mesh=mesh, progress=False).run()


if __name__ == "__main__":
    main()
