# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that the ops share; `op` opens every message."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.tap_structs import Capture

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ANY_FLOAT = (*FLOATS, torch.float64)
SINGLE = (torch.float32,)
DOUBLES = (torch.float32, torch.float64)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
BOOL = (torch.bool,)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Write dtypes as a message names them."""
    return " | ".join(str(d).removeprefix("torch.") for d in dtypes)


def is_tensor(op: str, name: str, t: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check type and dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        raise TypeError(f"{op}: expected {name} of {names(dtypes)}, got {names((t.dtype,))}")


def tensor(
    op: str,
    name: str,
    t: Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | str, ...],
    why: str,
    *,
    like: str = "x",
) -> None:
    """Check type, dtype, device and shape; a letter in `shape` stands for any size.

    Args:
        op: op that is called.
        name: argument that is checked.
        t: its value.
        device: where it must lie.
        dtypes: what it may hold.
        shape: sizes and letters; letters stand in front of or between the numbers.
        why: where the sizes come from.
        like: argument that sets the device.
    """
    is_tensor(op, name, t, dtypes)
    if t.device != device:
        raise RuntimeError(f"{op}: expected {name} on {device} [device of {like}], got {t.device}")
    got = t.shape
    # From the back: the letters stand in front, and the first number that differs decides.
    fits = len(got) == len(shape)
    n = len(shape) - 1
    while fits and n >= 0:
        want = shape[n]
        fits = want == got[n] or isinstance(want, str)
        n -= 1
    if not fits:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{op}: expected {name} of shape [{expected}] ({why}), got {list(got)}")


def token_mask(
    op: str,
    name: str,
    t: Tensor,
    device: torch.device,
    rows: int,
    tokens: int,
    *,
    like: str = "x",
) -> None:
    """Check a mask [R | 1, T] of bool."""
    first = 1 if isinstance(t, Tensor) and t.dim() == 2 and t.shape[0] == 1 else rows
    tensor(op, name, t, device, BOOL, (first, tokens), f"R or 1, T of {like}", like=like)


def last_contiguous(op: str, name: str, t: Tensor) -> None:
    """Check that the elements of the last dim are neighbours."""
    if not t.is_contiguous() and t.stride(-1) != 1 and t.shape[-1] > 1:
        raise ValueError(
            f"{op}: expected {name} with a contiguous last dim, got strides {list(t.stride())}"
        )


def struct(op: str, name: str, value: object, kind: type) -> None:
    """Check that an argument is None or a struct of the kind it must be."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(
            f"{op}: expected {name} to be a {kind.__name__} or None, got {type(value).__name__}"
        )


def captures(
    op: str,
    capture: Capture,
    device: torch.device,
    sizes: tuple[int, int, int],
    wide: bool,
    *,
    like: str = "x",
    channels_of: str = "R, C of x",
) -> None:
    """Check the capture buffers of rows, tokens, channels = `sizes`; float64 ones where `wide`."""
    rows, tokens, channels = sizes
    sums, squares, counts, ring, slot, mask = capture
    table = DOUBLES if wide else SINGLE
    for name, buffer, dtypes, shape in (
        ("capture.sums", sums, table, ("S", rows, channels)),
        ("capture.squares", squares, table, ("S", rows, channels)),
        ("capture.ring", ring, ANY_FLOAT if wide else FLOATS, ("S", rows, tokens, channels)),
    ):
        if buffer is not None:
            tensor(op, name, buffer, device, dtypes, shape, channels_of, like=like)
            last_contiguous(op, name, buffer)
    if counts is not None:
        why = f"R={like}.size(0)"
        tensor(op, "capture.counts", counts, device, table, ("S", rows), why, like=like)
    if slot is not None:
        tensor(op, "capture.slot", slot, device, INT64, (1,), "one S index", like=like)
    if mask is not None:
        token_mask(op, "capture.mask", mask, device, rows, tokens, like=like)


def count_writes(*tensors: Tensor | None) -> None:
    """Let autograd notice if it had saved one of the tensors written."""
    written = [t for t in tensors if t is not None and not t.is_inference()]
    torch.autograd.graph.increment_version(written)
