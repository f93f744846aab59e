# SPDX-License-Identifier: Apache-2.0
"""Calls of `sae_update_` that its tests share, and the same written out entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.support import backend_params
from sidechain.ops import SaeCodes, SaeMoments, sae_gradient_square, sae_update_
from sidechain.testing.tolerance import assert_close

BACKENDS = backend_params("sae_update_")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
MOMENTS = SaeMoments._fields
WRITTEN = (
    "w_enc", "w_dec", "b_enc", *MOMENTS, "last_fired", "fire_count", "row_step", "enc_copy",
    "dec_copy", "b_pre_grad", "grad_square",
)  # fmt: skip
COLUMNS = ("values", "indices", "offsets", "dvalues", "error", "row_weight")


def copy(value: Any) -> Any:
    if isinstance(value, list):
        return [copy(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value


def wide(value: Any) -> Any:
    if isinstance(value, list):
        return [wide(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def upcast(args: dict[str, Any]) -> dict[str, Any]:
    """Everything in float64 but the copies, whose dtype is their purpose."""
    keep = ("enc_copy", "dec_copy")
    return {k: copy(v) if k in keep else wide(v) for k, v in args.items()}


def public(args: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public function from those of the schema."""
    args = dict(args)
    codes = [
        SaeCodes(values=v, indices=i, offsets=o, dvalues=d, error=e, row_weight=w)
        for v, i, o, d, e, w in zip(*(args.pop(k) for k in COLUMNS), strict=True)
    ]
    moments = SaeMoments(**{k: args.pop(k) for k in MOMENTS})
    weights = (args.pop("w_enc"), args.pop("w_dec"), args.pop("b_enc"))
    args["betas"] = (args.pop("beta1"), args.pop("beta2"))
    return (*weights, moments, args.pop("x"), codes), args


def run(args: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Call sae_update_ on copies and return the copies."""
    args = {k: copy(v) for k, v in args.items()}
    positional, keyword = public(args)
    sae_update_(*positional, **keyword, **more)
    return args


def square(args: dict[str, Any], backend: str = "auto") -> Tensor:
    (w_enc, w_dec, b_enc, _, x, codes), keyword = public(args)
    keep = {k: keyword[k] for k in ("b_pre", "project", "prefixes", "first_feature")}
    bias = b_enc is not None
    return sae_gradient_square(w_enc, w_dec, x, codes, bias=bias, **keep, backend=backend)


def check(args: dict[str, Any], backend: str) -> None:
    exact, eager = run(upcast(args)), run(args, backend="reference")
    got = run(args, backend=backend)
    for name in WRITTEN:
        if args[name] is None:
            continue
        if args[name].is_floating_point():
            assert_close(name, got[name], exact[name], eager[name])
        else:
            assert torch.equal(got[name], exact[name]), name
    total = square(args, backend)
    assert_close("square", total, square(upcast(args)), square(args, "reference"))


def plain(args: dict[str, Any]) -> dict[str, Tensor]:
    """Entry by entry and row by row in float64, written from the docstring."""
    a = upcast(args)
    features, first = a["w_dec"].shape[0], a["first_feature"]
    n, bounds = a["x"].shape[0], a["prefixes"]
    g_enc, g_dec = torch.zeros_like(a["w_enc"]), torch.zeros_like(a["w_dec"])
    g_b, seen = torch.zeros(features).double(), torch.zeros(features, dtype=torch.int64)
    fired = seen.clone()
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
                seen[local] += 1
                fired[local] += g == 0
    if a["project"]:
        unit = torch.nn.functional.normalize(a["w_dec"], dim=1)
        g_dec -= (g_dec * unit).sum(1, keepdim=True) * unit
    out: dict[str, Tensor] = {}
    if a["b_pre_grad"] is not None:
        out["b_pre_grad"] = -(g_b[:, None] * a["w_enc"]).sum(0)
        total = (g_enc**2).sum() + (g_dec**2).sum() + (g_b**2).sum() * (a["b_enc"] is not None)
        out["grad_square"] = total[None]
        out["last_fired"] = torch.where(fired > 0, a["step"], a["last_fired"])
        out["fire_count"] = a["fire_count"] + fired
    scale = 1.0 if a["clip_scale"] is None else float(a["clip_scale"])
    t, lr, wd = int(a["step"]), float(a["lr"]), a["weight_decay"]
    b1, b2 = a["beta1"], a["beta2"]
    names = (("w_enc", "enc", g_enc, wd), ("w_dec", "dec", g_dec, wd), ("b_enc", "bias", g_b, 0.0))
    for name, short, grad, decay in names:
        if a[name] is None:
            continue
        w, m, s = a[name].clone(), a[f"{short}_mean"].clone(), a[f"{short}_square"].clone()
        for f in range(features):
            waited = 1
            if a["row_step"] is not None:
                waited = t - int(a["row_step"][f])
                if not seen[f]:
                    continue
            m[f] = b1**waited * m[f] + (1 - b1) * scale * grad[f]
            s[f] = b2**waited * s[f] + (1 - b2) * (scale * grad[f]) ** 2
            w[f] *= (1 - lr * decay) ** waited
            w[f] -= lr / (1 - b1**t) * m[f] / ((s[f] / (1 - b2**t)).sqrt() + a["eps"])
            if name == "w_dec" and a["unit_norm"]:
                w[f] /= w[f].norm()
        out |= {name: w, f"{short}_mean": m, f"{short}_square": s}
    if a["row_step"] is not None:
        out["row_step"] = torch.where(seen > 0, t, a["row_step"])
    return out
