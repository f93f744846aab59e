# SPDX-License-Identifier: Apache-2.0
"""Cases from the call of an op and what one writes instead, all checked the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from sidechain.ops import backends
from sidechain.testing.tolerance import assert_close

from ..cases import Candidate, Case

Args = dict[str, Any]
# How much more than the reference a plain expression may err: Inductor adds one after the other.
OTHERS = 50.0


@dataclass(frozen=True)
class Work:
    """One op on the arguments that its case table makes.

    Attributes:
        op: name in `sidechain.ops.backends()`.
        run: (arguments, backend) -> result.
        eager: the same in plain torch, as a person would write it.
        outputs: (arguments, result) -> what has been computed, by name.
        plain: further plain expressions, by name.
        parts: less than the whole work, by name: (arguments) -> the last rows of the first output.
        narrow: arguments whose dtype is their purpose: they stay as they are in the exact run.
    """

    op: str
    run: Callable[[Args, str], Any]
    eager: Callable[[Args], Any]
    outputs: Callable[[Args, Any], Mapping[str, Tensor]]
    plain: Mapping[str, Callable[[Args], Any]] = field(default_factory=dict)
    parts: Mapping[str, Callable[[Args], Tensor]] = field(default_factory=dict)
    narrow: tuple[str, ...] = ()

    def backends(self, device: str) -> list[str]:
        """The backends that run on a device, the reference last."""
        reasons = backends()[self.op]
        names = ("cpu",) if device == "cpu" else ("cuda", "triton")
        return [*(name for name in names if reasons[name] is None), "reference"]

    def ours(self, device: str) -> list[Candidate]:
        """A candidate for each backend."""

        def call(args: Args, backend: str) -> Any:
            return self.run(args, backend)

        return [Candidate(b, partial(call, backend=b), "ours") for b in self.backends(device)]

    def candidates(self, device: str, *, quick: bool = False) -> list[Candidate]:
        """Plain expressions, the compiled one, then ours. With `quick` nothing is compiled."""
        compiled = []
        if not quick:
            torch.compiler.reset()
            compiled = [torch.compile(self.eager, dynamic=False)]
        return [
            Candidate("eager", self.eager, "plain"),
            *(Candidate(name, call, "plain") for name, call in self.plain.items()),
            *(Candidate(name, call, "part") for name, call in self.parts.items()),
            *(Candidate("compile", call, "compiled") for call in compiled),
            *self.ours(device),
        ]

    def case(
        self,
        name: str,
        dtype: str,
        make: Callable[[int], Args],
        candidates: list[Candidate],
        *,
        moved: int,
        flops: int = 0,
        rotations: int | None = None,
    ) -> Case:
        """Put a case together."""
        make = buffers(make)
        check = partial(self._check, make=make)
        return Case(name, dtype, make, tuple(candidates), check, moved, flops, rotations=rotations)

    def _check(self, candidate: Candidate, *, make: Callable[[int], Args]) -> dict[str, Any] | None:
        """Compare with the reference in float64, within the error of the reference in the dtype."""
        args = make(0)
        own, got = copy(args), copy(args)
        wide = upcast(args) | {name: copy(args[name]) for name in self.narrow if name in args}
        exact = self.outputs(wide, self.run(wide, "reference"))
        plain = self.outputs(own, self.run(own, "reference"))
        result: Any = candidate.call(got)
        found: Mapping[str, Tensor]
        if candidate.kind == "part":
            name = next(iter(exact))
            found, rows = {name: result}, result.shape[0]
            exact, plain = {name: exact[name][-rows:]}, {name: plain[name][-rows:]}
        else:
            found = self.outputs(got, result)
        times = 2.0 if candidate.kind == "ours" else OTHERS
        for name, value in found.items():
            what = f"{candidate.name} {name}"
            if value.is_floating_point():
                assert_close(what, value, exact[name], plain[name], times=times)
            elif not torch.equal(value, exact[name]):
                raise AssertionError(f"{what}: differs from the reference")
        return None


def buffers(make: Callable[[int], Args]) -> Callable[[int], Args]:
    """Copy the arguments for a rotation: the same numbers in separate buffers.

    Drawing them on the host once more for each buffer would take longer than the measurement.
    """
    first = cache(lambda: make(0))
    return lambda seed: copy(first())


def copy(value: Any) -> Any:
    """Copy all tensors, in lists and structs too."""
    if isinstance(value, dict):
        return {name: copy(v) for name, v in value.items()}
    if isinstance(value, list):
        return [copy(v) for v in value]
    if hasattr(value, "_make"):
        return value._make(copy(v) for v in value)
    return value.clone() if isinstance(value, Tensor) else value


def upcast(value: Any) -> Any:
    """Copies with all floating-point tensors in float64."""
    if isinstance(value, dict):
        return {name: upcast(v) for name, v in value.items()}
    if isinstance(value, list):
        return [upcast(v) for v in value]
    if hasattr(value, "_make"):
        return value._make(upcast(v) for v in value)
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    return value
