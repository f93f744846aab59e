# SPDX-License-Identifier: Apache-2.0
"""Cases of `sae_update_` and `sae_gradient_square`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ops.sae_structs import COLUMNS, update_structs
from .sparse_decode import random_codes


@dataclass(frozen=True)
class UpdateCase:
    """One call of `sae_update_`; every flag adds the argument of that name."""

    rows: int
    d_in: int
    d_out: int
    features: int
    k: int
    csr: bool = False
    groups: int = 1  # the second has fixed width, other codes and a row weight
    prefixes: tuple[int, ...] = ()
    bias: bool = True
    b_pre: bool = True
    half_state: bool = False
    clip: bool = False
    weight_decay: float = 0.0
    unit_norm: bool = True
    project: bool = True
    first_feature: int = 0
    extras: bool = False  # last_fired, b_pre_grad
    step: int = 7
    what: str = "topk"

    @property
    def name(self) -> str:
        """Readable id."""
        return f"{self.what}-N{self.rows}-d{self.d_in}x{self.d_out}-F{self.features}-k{self.k}"

    def make(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Random arguments in the names of the schema; x has the dtype."""
        g = torch.Generator().manual_seed(seed + 2)
        enc, dec = (self.features, self.d_in), (self.features, self.d_out)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        w_dec = normal(*dec)
        args: dict[str, Any] = {
            "w_enc": 0.1 * normal(*enc),
            "w_dec": w_dec / w_dec.norm(dim=-1, keepdim=True).clamp(min=1e-9),
            "b_enc": 0.1 * normal(self.features) if self.bias else None,
            "b_pre": None,
            "enc_mean": 0.01 * normal(*enc),
            "enc_square": 1e-4 * normal(*enc).square(),
            "dec_mean": 0.01 * normal(*dec),
            "dec_square": 1e-4 * normal(*dec).square(),
            "bias_mean": 0.01 * normal(self.features) if self.bias else None,
            "bias_square": 1e-4 * normal(self.features).square() if self.bias else None,
            # A common offset per channel, as real activations have.
            "x": (normal(self.rows, self.d_in) + 2.0 * normal(self.d_in)).to(dtype),
        }
        if self.b_pre:
            args["b_pre"] = normal(self.d_in)
        if self.half_state:
            for key in ("enc_mean", "enc_square", "dec_mean", "dec_square"):
                args[key] = args[key].to(torch.bfloat16)
        args |= self._groups(g, seed)
        features = torch.arange(self.features)
        args |= {
            "project": self.project,
            "prefixes": list(self.prefixes),
            "first_feature": self.first_feature,
            "lr": torch.tensor([1e-3]),
            "step": torch.tensor([self.step]),
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": self.weight_decay,
            "clip_scale": torch.tensor([0.25]) if self.clip else None,
            "unit_norm": self.unit_norm,
            "last_fired": features % 3 if self.extras else None,
            "b_pre_grad": torch.full((self.d_in,), 7.0) if self.extras else None,
        }
        return {k: _to(v, device) for k, v in args.items()}

    def _groups(self, g: torch.Generator, seed: int) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {key: [] for key in COLUMNS}
        total = self.features + self.first_feature + (5 if self.first_feature else 0)
        error_shape: tuple[int, ...] = (self.rows, self.d_out)
        if self.prefixes:
            error_shape = (len(self.prefixes), *error_shape)
        for i in range(self.groups):
            codes = random_codes(
                self.rows,
                total,
                min(self.k + i, total),
                csr=self.csr and i == 0,
                seed=seed + 10 * i,
            )
            columns["values"].append(codes["values"])
            columns["indices"].append(codes["indices"])
            columns["offsets"].append(codes.get("offsets"))
            columns["dvalues"].append(torch.randn(codes["values"].shape, generator=g))
            columns["error"].append(torch.randn(error_shape, generator=g))
            columns["row_weight"].append(torch.rand(self.rows, generator=g) if i else None)
        return columns


def update_call(args: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of `sae_update_` for those of its schema."""
    *structs, unit_norm, last_fired, b_pre_grad = update_structs([*args.values()])
    keywords = {"unit_norm": unit_norm, "last_fired": last_fired, "b_pre_grad": b_pre_grad}
    return tuple(structs), keywords


def square_args(args: dict[str, Any]) -> list[Any]:
    """Return the arguments of the schema of `sae_gradient_square` for those of `sae_update_`."""
    names = ("w_enc", "w_dec", "b_enc", "b_pre", "x", *COLUMNS)
    return [args[name] for name in (*names, "project", "prefixes", "first_feature")]


def _to(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


_case = UpdateCase(24, 48, 48, 70, 6)
UPDATE_CASES = (
    _case,
    replace(_case, extras=True, clip=True, weight_decay=0.01, what="extras"),
    replace(_case, csr=True, d_out=35, extras=True, what="csr-transcoder"),
    replace(_case, groups=2, extras=True, b_pre=False, what="aux"),
    replace(_case, groups=3, csr=True, extras=True, weight_decay=0.1, what="three-groups"),
    replace(_case, prefixes=(10, 33, 70), groups=2, what="matryoshka"),
    replace(_case, half_state=True, extras=True, what="bf16-moments"),
    replace(_case, half_state=True, features=333, d_out=17, what="bf16-uneven"),
    replace(_case, first_feature=20, prefixes=(30, 95), extras=True, what="shard"),
    replace(_case, bias=False, unit_norm=False, project=False, step=1, what="plain"),
    replace(_case, unit_norm=False, rows=130, features=9, k=4, what="dense-lists"),
    replace(_case, d_in=1, d_out=1, features=3, k=2, unit_norm=False, project=False, what="narrow"),
    replace(_case, d_in=1030, d_out=513, rows=40, features=130, extras=True, what="wide"),
    UpdateCase(1300, 8, 12, 3, 2, groups=2, extras=True, what="hot"),
    # The CUDA kernels: strips of 256 channels with a rest, eight rows under way.
    UpdateCase(60, 520, 268, 12, 4, groups=2, csr=True, extras=True, what="strips"),
    UpdateCase(1100, 264, 260, 3, 2, extras=True, what="hot-strips"),
    UpdateCase(6, 16, 24600, 3, 2, extras=True, what="rows-in-workspace"),
    UpdateCase(50, 16, 16, 2100, 6, extras=True, what="features-in-turn"),
    replace(_case, rows=0, extras=True, what="no-rows"),
    replace(_case, k=0, extras=True, what="no-codes"),
)
UPDATE_BENCH = (
    UpdateCase(1024, 768, 768, 12288, 32),
    # Named as in the measurements that are kept.
    UpdateCase(1024, 768, 768, 12288, 32, half_state=True, what="bf16-moments"),
    UpdateCase(1024, 1280, 1280, 5120, 10),
    UpdateCase(1024, 2560, 2560, 10240, 64),
)
