# SPDX-License-Identifier: Apache-2.0
"""Started by torchrun in tests: runs of two processes of which one meets trouble.

    mesh_folder_worker.py FOLDER

Every process leaves what it raised in FOLDER/TROUBLE.RANK.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sidechain.io.lock import Lock
from sidechain.sae import SaeConfig, TrainConfig, Trainer, from_environment
from sidechain.sae.training import checkpoint, folder
from sidechain.sae.training.streams import IterableSource

D, N = 6, 64


def main() -> None:
    torch.set_num_threads(1)
    mesh = from_environment(2)
    place = Path(sys.argv[1])

    def run(out: Path) -> None:
        x = torch.randn(N * 8, D, generator=torch.Generator().manual_seed(1))
        settings = TrainConfig(tokens=N * 8, batch=N, log_every=2, checkpoint_minutes=0.0)
        Trainer(
            SaeConfig(D, 16, "topk", k=2), settings, IterableSource([x]), out, mesh=mesh,
            progress=False,
        ).run()  # fmt: skip

    def leave(name: str, out: Path) -> None:
        try:
            run(out)
            text = "nothing"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        (place / f"{name}.{dist.get_rank()}").write_text(text)
        dist.barrier()

    held = None
    if mesh.first:
        (place / "locked").mkdir()
        held = Lock(place / "locked" / folder.LOCK, "test")
    leave("locked", place / "locked")
    if held is not None:
        held.release()
    leave("free", place / "locked")

    real = checkpoint.write_safetensors

    def full(path: Path, *rest: object) -> Path:
        if mesh.feature_rank == 1 and "step-000000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *rest)

    checkpoint.write_safetensors = full
    leave("full", place / "full")
    checkpoint.write_safetensors = real
    leave("goes-on", place / "full")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
