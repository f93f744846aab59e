# SPDX-License-Identifier: Apache-2.0
"""Arguments that the cases of several ops share: capture buffers, and structs of all of them."""

from __future__ import annotations

from typing import Any

import torch

from sidechain.ops import Capture, Steering


def capture_arguments(case: Any, slots: int, channels: int, g: torch.Generator) -> dict[str, Any]:
    """Make the buffers of a case, with a known content, and the slot that is written."""
    rows, tokens = case.rows, case.tokens
    args: dict[str, Any] = {}
    if case.sums:
        args["sums"] = torch.randn(slots, rows, channels, generator=g)
    if case.squares:
        args["squares"] = torch.rand(slots, rows, channels, generator=g)
    if case.counts:
        args["counts"] = torch.full((slots, rows), 3.0)
    if case.ring is not None:
        args["ring"] = torch.full((slots, rows, tokens, channels), 7.0, dtype=case.ring)
    if case.sums or case.squares or case.counts or case.ring is not None:
        args["capture_slot"] = torch.tensor([1])
        if case.capture_mask:
            args["capture_mask"] = torch.rand(case.capture_mask, tokens, generator=g) < 0.6
    return args


def structured(args: dict[str, Any]) -> dict[str, Any]:
    """Gather arguments named as in a schema into the structs that a public function takes."""
    args, structs = dict(args), {}
    for name, kind in (("capture", Capture), ("steering", Steering)):
        # `steer_slot` of the schema is `slot` of Steering.
        prefix = {"slot": name.removesuffix("ing") + "_", "mask": name.removesuffix("ing") + "_"}
        fields = {prefix.get(field, "") + field: field for field in kind._fields}
        given = {fields[key]: args.pop(key) for key in list(args) if key in fields}
        if given:
            structs[name] = kind(**({"vectors": None} if name == "steering" else {}) | given)
    return args | structs
