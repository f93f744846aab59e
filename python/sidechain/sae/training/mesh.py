# SPDX-License-Identifier: Apache-2.0
"""Grid of processes: rows are split over one of its axes, features over the other."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh


class Mesh:
    """A grid of processes, `data` x `features`; one process without torch.distributed is 1 x 1.

    The process at (a, b) reads slice a of every batch and owns slice b of the features.
    Processes with equal b hold equal weights, bit for bit, without ever exchanging them.

    Args:
        data: parts of a batch.
        features: parts of the dictionary; data * features is the number of processes.

    Raises:
        ValueError: another number of processes.
    """

    def __init__(self, data: int = 1, features: int = 1) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if data < 1 or features < 1 or data * features != world:
            raise ValueError(
                f"Mesh: expected data x features = {world} [number of processes], got {data} x "
                f"{features}"
            )
        self.data, self.features = data, features
        self.data_rank = self.feature_rank = 0
        self._data_group: Any = None
        self._feature_group: Any = None
        if world > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            grid = init_device_mesh(device, (data, features), mesh_dim_names=("data", "features"))
            self.data_rank, self.feature_rank = grid.get_coordinate() or (0, 0)
            self._data_group = grid.get_group("data")
            self._feature_group = grid.get_group("features")

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.data * self.features

    @property
    def first(self) -> bool:
        """Whether this process writes logs and manifests."""
        return self.data_rank == 0 and self.feature_rank == 0

    def shard(self, features: int) -> tuple[int, int]:
        """Return the range of features this process owns."""
        return cut(features, self.features, self.feature_rank)

    def rows(self, count: int) -> tuple[int, int]:
        """Return the range of rows of a batch this process reads."""
        return cut(count, self.data, self.data_rank)

    def sum_features(self, t: Tensor) -> Tensor:
        """Sum a tensor over the slices of the features, in place."""
        if self.features > 1:
            dist.all_reduce(t, group=self._feature_group)
        return t

    def sum_data(self, t: Tensor) -> Tensor:
        """Sum a tensor over the slices of the rows, in place."""
        if self.data > 1:
            dist.all_reduce(t, group=self._data_group)
        return t

    def sum_all(self, t: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def minimum(self, t: Tensor) -> Tensor:
        """Reduce a number to its minimum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.MIN)
        return t

    def sum_features_once(self, t: Tensor) -> Tensor:
        """Sum over the slices of the features, for autograd.

        Every process goes on with the whole sum and the same loss, so the gradient of its own part
        is the gradient it has.
        """
        if self.features == 1:
            return t
        whole: Tensor = _SumOnce.apply(t, self)  # type: ignore[no-untyped-call]
        return whole

    def gather_rows(self, t: Tensor) -> Tensor:
        """Join the row slices of a tensor (dim 0; equal sizes) in order."""
        return self._gather(t, self.data, self._data_group)

    def gather_features(self, t: Tensor) -> Tensor:
        """Join the feature slices of a tensor (dim 0; equal sizes) in order."""
        return self._gather(t, self.features, self._feature_group)

    def gather_rows_ragged(self, *tensors: Tensor) -> list[Tensor]:
        """Join tensors of one common length that differs from process to process."""
        if self.data == 1:
            return list(tensors)
        mine = torch.tensor([len(tensors[0])], device=tensors[0].device)
        sizes = self.gather_rows(mine).tolist()
        joined = []
        for t in tensors:
            padded = t.new_zeros((max(sizes), *t.shape[1:]))
            padded[: len(t)] = t
            parts = self.gather_rows(padded).split(max(sizes))
            joined.append(torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)]))
        return joined

    def agree(self, choice: bool) -> bool:
        """Return what the first process chose."""
        if self.world == 1:
            return choice
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([int(choice)], device=device)
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    def any(self, choice: bool) -> bool:
        """Return whether one of the processes chose it."""
        if self.world == 1:
            return choice
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([int(choice)], device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def _gather(self, t: Tensor, size: int, group: Any) -> Tensor:
        if size == 1:
            return t
        out = t.new_empty((size * len(t), *t.shape[1:]))
        dist.all_gather(list(out.split(len(t))), t.contiguous(), group=group)
        return out


def from_environment(features: int = 1) -> Mesh:
    """Return the mesh of the processes that `torchrun` started; 1 x 1 outside of it.

    Args:
        features: slices of the dictionary; the other axis takes the rest of the processes.

    Raises:
        ValueError: the processes cannot be divided like that.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % features:
        raise ValueError(
            f"Mesh: expected feature slices that divide {world} processes, got {features}"
        )
    if world > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Mesh(world // features, features)


class _SumOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, mesh: Mesh) -> Tensor:
        return mesh.sum_features(t.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def cut(count: int, parts: int, part: int) -> tuple[int, int]:
    """Return the range of slice `part` of `count` things in `parts` equal slices.

    Raises:
        ValueError: they cannot be equal.
    """
    if count % parts:
        raise ValueError(f"Mesh: expected {count} to be a multiple of {parts} [processes]")
    size = count // parts
    return part * size, (part + 1) * size
