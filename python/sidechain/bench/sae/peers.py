# SPDX-License-Identifier: Apache-2.0
"""Trainers of other packages at their best settings, each on the same start with fused Adam.

None of them is a dependency: what is not installed is an ImportError, and a named row.
`make peers` installs the versions that pyproject.toml pins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..shape import Shape
from .common import LR, Start


def _adam(parameters: Iterable[Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam(list(parameters), lr=LR, fused=True)


class Sparsify:
    """eai-sparsify: fused encoder backward, embedding_bag decode; projection and unit norm."""

    def __init__(self, shape: Shape, start: Start) -> None:
        if start.w_enc.device.type == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels are for GPUs; read at import
        # A large package for text data sets, which nothing here reads and a GPU host lacks.
        with _without("datasets"):
            from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=shape.features, k=shape.k)
        self.sae = SparseCoder(shape.width, config, device=start.w_enc.device)
        with torch.no_grad():
            self.sae.encoder.weight.copy_(start.w_enc)
            self.sae.W_dec.copy_(start.w_dec)
        self.adam = _adam(self.sae.parameters())

    def step(self, x: Tensor) -> None:
        """Train on one batch, in the order of its trainer."""
        self.sae.set_decoder_norm_to_unit_norm()
        self.sae(x).fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction."""
        with torch.no_grad():
            out: Tensor = self.sae(x).sae_out
        return out


class SaeLens:
    """SAELens' TopK; `sparse` is its COO decoder, which wants float32."""

    def __init__(self, shape: Shape, start: Start, *, sparse: bool, precision: str) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

        self.device, self.precision, self.input = start.w_enc.device.type, precision, TrainStepInput
        config = TopKTrainingSAEConfig(
            d_in=shape.width, d_sae=shape.features, k=shape.k, use_sparse_activations=sparse,
            apply_b_dec_to_input=True, device=str(start.w_enc.device), dtype="float32",
            # torch cannot scale the columns of a sparse tensor on a CPU.
            rescale_acts_by_decoder_norm=not sparse,
        )  # fmt: skip
        self.sae = TopKTrainingSAE(config)
        with torch.no_grad():
            self.sae.W_enc.copy_(start.w_enc.T)
            self.sae.W_dec.copy_(start.w_dec)
        self.adam = _adam(self.sae.parameters())
        self.steps = 0

    def step(self, x: Tensor) -> None:
        """Train on one batch; no auxiliary loss, no clipping, no logging."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            given = self.input(
                sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=self.steps,
                is_logging_step=False,
            )  # fmt: skip
            loss = self.sae.training_forward_pass(given).loss
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction."""
        with torch.no_grad():
            out: Tensor = self.sae(x)
        return out


class Overcomplete:
    """overcomplete's TopKSAE: linear and batch norm as encoder, rows normalised in each forward."""

    def __init__(self, shape: Shape, start: Start) -> None:
        # Vision models and plots, which need other versions of packages.
        with _without("torchvision", "torchvision.transforms", "overcomplete.visualization"):
            from overcomplete.sae import TopKSAE

        device = str(start.w_enc.device)
        self.sae = TopKSAE(shape.width, shape.features, top_k=shape.k, device=device)
        with torch.no_grad():
            self.sae.encoder.final_block[0].weight.copy_(start.w_enc)
            self.sae.encoder.final_block[0].bias.zero_()
            self.sae.dictionary._weights.copy_(start.w_dec)
        self.adam = _adam(self.sae.parameters())

    def step(self, x: Tensor) -> None:
        """Train on one batch; no monitoring, no clipping."""
        self.sae.train()
        self.adam.zero_grad()
        _, _, found = self.sae(x)
        (found - x).square().sum(-1).mean().backward()
        self.adam.step()

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction with the batch norm of this batch, as in training."""
        with torch.no_grad():
            out: Tensor = self.sae(x)[2]
        return out


class Llamascopium:
    """llamascopium's TopK SAE, dense: its Triton decode cannot serve an SAE."""

    def __init__(self, shape: Shape, start: Start) -> None:
        from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

        config = SAEConfig(
            hook_point_in="x", hook_point_out="x", d_model=shape.width,
            expansion_factor=shape.features / shape.width, act_fn="topk", top_k=shape.k,
            norm_activation="inference", dtype=torch.float32, device=start.w_enc.device.type,
        )  # fmt: skip
        self.sae = SparseAutoEncoder(config)
        with torch.no_grad():
            self.sae.W_E.copy_(start.w_enc.T)
            self.sae.W_D.copy_(start.w_dec)
            self.sae.b_E.zero_()
            self.sae.b_D.zero_()
        self.sae.set_current_k(shape.k)
        self.adam = _adam(self.sae.parameters())

    def step(self, x: Tensor) -> None:
        """Train on one batch."""
        self.adam.zero_grad()
        self.sae.compute_loss({"x": x}, return_aux_data=False).mean().backward()
        self.adam.step()

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction."""
        with torch.no_grad():
            out: Tensor = self.sae.decode(self.sae.encode(x))
        return out


class _Hollow(ModuleType):
    """A module in which every name is None, for functions that are never called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Import a package without some of its own imports, which the part used here never calls."""
    stubs: dict[str, Any] = {}
    for name in names:
        if name not in sys.modules:
            stub = _Hollow(name)
            stub.__spec__ = ModuleSpec(name, None)
            stubs[name] = stub
            parent, _, child = name.rpartition(".")
            if parent in stubs:
                setattr(stubs[parent], child, stub)
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            sys.modules.pop(name, None)


# Row -> trainer; the first word is the distribution.
CANDIDATES: dict[str, Callable[[Shape, Start], Any]] = {
    "eai-sparsify": Sparsify,
    "sae-lens": lambda shape, start: SaeLens(shape, start, sparse=False, precision="fp32"),
    "sae-lens sparse": lambda shape, start: SaeLens(shape, start, sparse=True, precision="fp32"),
    "sae-lens bf16": lambda shape, start: SaeLens(shape, start, sparse=False, precision="bf16"),
    "overcomplete": Overcomplete,
    "llamascopium": Llamascopium,
}


def version(row: str) -> str | None:
    """Version of the package of a row; None if it is not a row of a package, or not installed."""
    try:
        return metadata.version(row.split()[0]) if row in CANDIDATES else None
    except metadata.PackageNotFoundError:
        return None
