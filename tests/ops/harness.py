# SPDX-License-Identifier: Apache-2.0
"""One harness for the tests of an op: what they ask of every op is written once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.support import backend_params, clone, guarded, guards_intact, need_kernel, upcast
from sidechain.ops import Capture
from sidechain.testing.cases import DTYPES
from sidechain.testing.tolerance import assert_close

Args = dict[str, Any]
CAPTURES = Capture._fields[:4]
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def positional(op: str, args: Args) -> tuple[Any, ...]:
    """Put arguments by name into the order of the schema; what is left out is None or False."""
    schema = getattr(torch.ops.sidechain, op).default._schema
    empty = {a.name: False if str(a.type) == "bool" else None for a in schema.arguments}
    return tuple((empty | args)[name] for name in empty)


def strided(name: str, value: Any) -> Any:
    """Spread a tensor; the last dim of floats stays contiguous, as the contracts ask for."""
    if not isinstance(value, Tensor):
        return value
    inner = value.is_floating_point() and value.dim() > 1 and name != "counts"
    spread = value.dim() - inner
    wide = value.new_zeros([n * 2 if d < spread else n for d, n in enumerate(value.shape)])
    steps = [slice(None, None, 2 if d < spread else None) for d in range(value.dim())]
    return wide[tuple(steps)].copy_(value)


@dataclass(frozen=True)
class Harness:
    """An op as its tests call it.

    Attributes:
        op: name in the library.
        call: (arguments by name, backend=...) -> outputs by name. Writes where the op writes.
    """

    op: str
    call: Callable[..., dict[str, Tensor]]

    def every_backend(self, test: Callable[..., Any]) -> Any:
        """Run a test on every backend the op is meant to have."""
        return pytest.mark.parametrize("backend", backend_params(self.op))(test)

    def run(self, args: Args, **more: Any) -> dict[str, Tensor]:
        """Call the op on copies."""
        return self.call(clone(args), **more)

    def check(self, args: Args, got: dict[str, Tensor], *, times: float = 2.0) -> None:
        """Compare with the reference in float64, by what the reference errs in the dtypes given."""
        exact = self.run(upcast(args), backend="reference")
        eager = self.run(args, backend="reference")
        for name, value in exact.items():
            if value.is_floating_point():
                assert_close(name, got[name], value, eager[name], times=times)
            else:
                assert torch.equal(got[name], value), name

    def check_guarded(self, args: Args, names: Iterable[str], offset: int, **more: Any) -> None:
        """Check a call whose tensors `names` lie at an odd offset between sentinels."""
        moved, wholes = clone(args), {}
        for name in names:
            moved[name], wholes[name] = guarded(args[name], offset)
        self.check(args, self.call(moved, **more))
        for name, whole in wholes.items():
            assert guards_intact(whole, moved[name], offset), name

    def check_strided(self, args: Args, **more: Any) -> None:
        """Check a call whose tensors have steps of 2 in every dim that may have them."""
        self.check(args, self.call({n: strided(n, v) for n, v in args.items()}, **more))

    def check_threads(self, args: Args, counts: Iterable[int] = (1, 2, 3, 7)) -> None:
        """Check that any number of threads gives the same bits, which kernels promise."""
        need_kernel(self.op)
        before, seen = torch.get_num_threads(), []
        try:
            for threads in counts:
                torch.set_num_threads(threads)
                seen.append(self.run(args))
        finally:
            torch.set_num_threads(before)
        for other in seen[1:]:
            for name, value in seen[0].items():
                assert torch.equal(value, other[name]), name

    def check_backends(self, args: Args, absent: str) -> None:
        """Check that a backend that is unknown, or that the op will never have, is refused."""
        for unknown in ("fast", "", None):
            with pytest.raises(ValueError, match="expected backend to be one of auto, reference"):
                self.run(args, backend=unknown)
        with pytest.raises(RuntimeError, match=f"backend '{absent}' to be available, got:"):
            self.run(args, backend=absent)

    def opcheck(self, args: Args) -> None:
        """Let torch check schema, fake and autograd registration on one call."""
        op = getattr(torch.ops.sidechain, self.op).default
        torch.library.opcheck(op, positional(self.op, args))

    def check_refused(self, args: Args, change: Args, error: type[Exception], match: str,
                      **more: Any) -> None:  # fmt: skip
        """Check that a bad call raises the error of the op and writes nothing."""
        before = clone(args)
        with pytest.raises(error, match=f"^{self.op}: .*{match}"):
            self.call(args | change, **more)
        for name, value in before.items():
            if isinstance(value, Tensor):
                assert torch.equal(args[name], value), f"{name} was written"


def capture_refusals(
    rows: int, tokens: int, channels: int
) -> list[tuple[Args, type[Exception], str]]:
    """Bad capture buffers of an op on [rows, tokens, channels]: change, error, message."""
    slots = (4, rows, tokens, channels)
    ring = rf"capture\.ring of shape \[S, {rows}, {tokens}, {channels}\]"
    return [
        ({"sums": torch.zeros(4, rows + 1, channels)}, ValueError,
         rf"capture\.sums of shape \[S, {rows}, {channels}\]"),
        ({"squares": torch.zeros(4, rows, channels).double()}, TypeError,
         r"capture\.squares of float32, got float64"),
        ({"squares": torch.zeros(4, channels, rows).mT}, ValueError,
         r"capture\.squares with a contiguous last dim"),
        ({"counts": torch.zeros(4, rows, 1)}, ValueError,
         rf"capture\.counts of shape \[S, {rows}\]"),
        ({"ring": torch.zeros(4, rows, tokens + 1, channels)}, ValueError, ring),
        ({"ring": torch.zeros(slots).int()}, TypeError, r"expected capture\.ring of .*, got int32"),
        ({"capture_slot": torch.zeros(2).long()}, ValueError, r"capture\.slot of shape \[1\]"),
        ({"capture_slot": torch.zeros(1, device="meta").long()}, RuntimeError,
         r"capture\.slot on cpu"),
        ({"capture_mask": torch.ones(rows + 1, tokens).bool()}, ValueError,
         rf"capture\.mask of shape \[{rows}, {tokens}\]"),
    ]  # fmt: skip
