# SPDX-License-Identifier: Apache-2.0
"""Calls of `sae_update_` that its tests share, and the same written out entry by entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.harness import Harness
from ops.support import upcast
from sidechain.ops import AdamState, sae_gradient_square, sae_update_
from sidechain.ops.sae_structs import COLUMNS
from sidechain.testing.cases import update_call

STATE = AdamState._fields
WRITTEN = ("w_enc", "w_dec", "b_enc", *STATE, "last_fired", "b_pre_grad")


def call(args: dict[str, Any], **more: Any) -> None:
    """Call sae_update_ with arguments in the names of its schema."""
    structs, keywords = update_call(args)
    sae_update_(*structs, **keywords, **more)


def square(args: dict[str, Any], backend: str = "auto") -> Tensor:
    (weights, _, inputs, _), _ = update_call(args)
    return sae_gradient_square(weights, inputs, backend=backend)


def _both(args: dict[str, Any], backend: str = "auto") -> dict[str, Tensor]:
    total = square(args, backend)  # of the weights before they are written
    call(args, backend=backend)
    return {"square": total} | {name: args[name] for name in WRITTEN if args[name] is not None}


UPDATE = Harness("sae_update_", _both)


def plain(args: dict[str, Any]) -> dict[str, Tensor]:
    """Entry by entry and row by row in float64, written from the docstring."""
    a = upcast(args)
    features, first = a["w_dec"].shape[0], a["first_feature"]
    n, bounds = a["x"].shape[0], a["prefixes"]
    g_enc, g_dec = torch.zeros_like(a["w_enc"]), torch.zeros_like(a["w_dec"])
    g_b, fired = torch.zeros(features).double(), torch.zeros(features, dtype=torch.bool)
    x = a["x"] if a["b_pre"] is None else a["x"] - a["b_pre"]
    for g, (values, indices, offsets, dvalues, error, weight) in enumerate(
        zip(*(a[k] for k in COLUMNS), strict=True)
    ):
        width = values.shape[-1]
        starts = offsets.tolist() if offsets is not None else [i * width for i in range(n + 1)]
        flat = (values.reshape(-1), indices.reshape(-1), dvalues.reshape(-1))
        for row in range(n):
            for place in range(starts[row], starts[row + 1]):
                v, f, dv = (float(flat[0][place]), int(flat[1][place]), float(flat[2][place]))
                local = f - first
                if v == 0 or not 0 <= local < features:
                    continue
                e = error[next(p for p, b in enumerate(bounds) if f < b)] if bounds else error
                g_dec[local] += v * (1.0 if weight is None else weight[row]) * e[row]
                g_enc[local] += dv * x[row]
                g_b[local] += dv
                fired[local] |= g == 0
    if a["project"]:
        unit = torch.nn.functional.normalize(a["w_dec"], dim=1)
        g_dec -= (g_dec * unit).sum(1, keepdim=True) * unit
    total = (g_enc**2).sum() + (g_dec**2).sum() + (g_b**2).sum() * (a["b_enc"] is not None)
    out = {"square": total[None]}
    if a["b_pre_grad"] is not None:
        out["b_pre_grad"] = -(g_b[:, None] * a["w_enc"]).sum(0)
        out["last_fired"] = torch.where(fired, a["step"], a["last_fired"])
    scale = 1.0 if a["clip_scale"] is None else float(a["clip_scale"])
    t, lr, wd = int(a["step"]), float(a["lr"]), a["weight_decay"]
    b1, b2 = a["beta1"], a["beta2"]
    names = (("w_enc", "enc", g_enc, wd), ("w_dec", "dec", g_dec, wd), ("b_enc", "bias", g_b, 0.0))
    for name, short, grad, decay in names:
        if a[name] is None:
            continue
        w, m, s = a[name].clone(), a[f"{short}_mean"].clone(), a[f"{short}_square"].clone()
        for f in range(features):
            m[f] = b1 * m[f] + (1 - b1) * scale * grad[f]
            s[f] = b2 * s[f] + (1 - b2) * (scale * grad[f]) ** 2
            w[f] *= 1 - lr * decay
            w[f] -= lr / (1 - b1**t) * m[f] / ((s[f] / (1 - b2**t)).sqrt() + a["eps"])
            if name == "w_dec" and a["unit_norm"]:
                w[f] /= w[f].norm()
        out |= {name: w, f"{short}_mean": m, f"{short}_square": s}
    return out
