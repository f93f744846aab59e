# SPDX-License-Identifier: Apache-2.0
"""The one tolerance policy of tests and benches."""

from __future__ import annotations

import torch
from torch import Tensor


def rms(t: Tensor) -> float:
    """Root mean square in float64; 0 for an empty tensor."""
    return float(t.double().square().mean().sqrt()) if t.numel() else 0.0


def assert_close(
    name: str, got: Tensor, exact: Tensor, eager: Tensor, *, times: float = 2.0
) -> None:
    """Require `got` to err at most `times` as much as plain torch does in the same dtype.

    RMS(got - exact) <= times RMS(eager - exact) + eps(dtype of got) RMS(exact): the rule of
    flash-attention's tests in the root mean square, with a floor of one unit in the last place.

    Args:
        name: what is compared, for the message.
        got: result under test.
        exact: the reference on inputs upcast to float64.
        eager: the plain torch expression in the dtype of `got`.
        times: 2 for our own kernels; a bench allows other packages more.

    Raises:
        AssertionError: the shapes, the NaN or infinity masks differ, or the error is too large.
    """
    if got.shape != exact.shape:
        raise AssertionError(f"{name}: expected shape {list(exact.shape)}, got {list(got.shape)}")
    eps = torch.finfo(got.dtype).eps
    g, e, p = got.double().cpu(), exact.double().cpu(), eager.double().cpu()
    # A value that only float64 can hold is an infinity in the narrow dtype.
    e_narrow = exact.to(got.dtype).double().cpu()
    for kind, mask in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        if not torch.equal(mask(g), mask(e_narrow)):
            where = (mask(g) != mask(e_narrow)).nonzero()[0].tolist()
            raise AssertionError(f"{name}: {kind} mask differs from the reference at {where}")
    finite = torch.isfinite(e_narrow) & torch.isfinite(p)
    g, e, p = (torch.where(finite, t, 0.0) for t in (g, e, p))
    error, allowed = rms(g - e), times * rms(p - e) + eps * rms(e)
    if error > allowed:
        flat = int((g - e).abs().argmax())
        where = [int(i) for i in torch.unravel_index(torch.tensor(flat), g.shape)]
        raise AssertionError(
            f"{name}: RMS error {error:.3e} exceeds {allowed:.3e} "
            f"({times:g} x eager {rms(p - e):.3e} + floor); worst at {where}: "
            f"expected {e.flatten()[flat]:.9g}, got {g.flatten()[flat]:.9g}"
        )
