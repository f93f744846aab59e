# SPDX-License-Identifier: Apache-2.0
"""Calls of `tap_` that its tests share, and the same written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ops.harness import CAPTURES, Harness
from sidechain.ops import tap_
from sidechain.testing.cases import structured


def _call(args: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    assert tap_(**structured(args), **more) is args["x"]
    return {name: args[name] for name in ("x", *CAPTURES) if name in args}


TAP = Harness("tap_", _call)


def plain(args: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Token by token in NumPy float64, written from the docstring and not from the reference."""
    x = args["x"].double().numpy()
    rows, tokens, _ = x.shape
    y = x.copy()
    out = {k: args[k].double().numpy().copy() for k in CAPTURES if k in args}
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
                if "ring" in out:
                    out["ring"][slot, r, t] = x[r, t]
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
