# SPDX-License-Identifier: Apache-2.0
"""Calls of `tap_` that its tests share, and the same written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ops.support import backend_params, clone, upcast
from sidechain.ops import tap_
from sidechain.testing.cases import DTYPES
from sidechain.testing.tolerance import assert_close

BACKENDS = backend_params("tap_")
OUTPUTS = ("x", "sums", "squares", "counts", "ring")
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def run(args: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Call tap_ on copies and return the copies."""
    args = clone(args)
    assert tap_(**args, **more) is args["x"]
    return args


def check(args: dict[str, Any], got: dict[str, Any]) -> None:
    """Compare with the reference in float64, by what the reference errs in the dtype of x."""
    exact = upcast(args)
    tap_(**exact, backend="reference")
    eager = run(args, backend="reference")
    for name in OUTPUTS:
        if name in args:
            assert_close(name, got[name], exact[name], eager[name])


def plain(args: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Token by token in NumPy float64, written from the docstring and not from the reference."""
    x = args["x"].double().numpy()
    rows, tokens, _ = x.shape
    y = x.copy()
    out = {k: args[k].double().numpy().copy() for k in OUTPUTS[1:] if k in args}
    slot = int(args["capture_slot"][0]) if "capture_slot" in args else 0

    def on(mask: str, r: int, t: int) -> bool:
        return mask not in args or bool(args[mask][r if args[mask].shape[0] > 1 else 0, t])

    for r in range(rows):
        for t in range(tokens):
            if on("capture_mask", r, t):
                if "sums" in out:
                    out["sums"][slot, r] += x[r, t]
                if "squares" in out:
                    out["squares"][slot, r] += x[r, t] ** 2
                if "counts" in out:
                    out["counts"][slot, r] += 1
                if "ring" in out and t % args.get("ring_stride", 1) == 0:
                    out["ring"][slot, r, t // args.get("ring_stride", 1)] = x[r, t]
            a = float(args["strength"][r]) if "strength" in args else 0.0
            b = float(args["removal"][r]) if "removal" in args else 0.0
            which = int(args["index"][r]) if "index" in args else 0
            if "vectors" not in args or which < 0 or (a == 0 and b == 0):
                continue
            if on("steer_mask", r, t):
                v = args["vectors"][which, int(args["steer_slot"][0])].double().numpy()
                new = x[r, t] + (a - b * max(0.0, float(x[r, t] @ v))) * v
                if args.get("renorm", False) and np.linalg.norm(new) > 0:
                    new *= np.linalg.norm(x[r, t]) / np.linalg.norm(new)
                y[r, t] = new
    return torch.from_numpy(y), {k: torch.from_numpy(v) for k, v in out.items()}
