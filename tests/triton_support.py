# SPDX-License-Identifier: Apache-2.0
"""What the Triton tests share: the calls of every kernel, and a compiler without a GPU.

A kernel joins by a row of `CALLS`: it is then interpreted, compiled for every architecture and,
where there is a GPU, run on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.support import upcast
from sidechain import _triton
from sidechain.ops import attention_tap
from sidechain.testing.cases import ATTENTION_BENCH, ATTENTION_CASES, AttentionCase
from sidechain.testing.tolerance import assert_close

CAPTURES = ("sums", "squares", "counts", "ring")
# How many (kernel, case) each kind of test went through; printed at the end of the run.
ran: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: stem of the op.
        name: id of the case.
        make: arguments in a dtype on a device.
        run: calls the op on a backend; may write into the arguments. Returns what to compare.
        config: what `launch_config` of the kernel returns for an element size.
        interpreted: small enough for the interpreter.
    """

    op: str
    name: str
    make: Callable[[torch.dtype, str], dict[str, Any]]
    run: Callable[[dict[str, Any], str], dict[str, Tensor]]
    config: Callable[[int], Any]
    interpreted: bool

    def check(self, dtype: torch.dtype, device: str) -> None:
        """Compare the kernel with the reference in float64, under the one tolerance policy."""
        exact = self.run(upcast(self.make(dtype, device)), "reference")
        eager = self.run(self.make(dtype, device), "reference")
        for name, value in self.run(self.make(dtype, device), "triton").items():
            assert_close(name, value, exact[name], eager[name])


def _attention(case: AttentionCase) -> Call:
    def run(args: dict[str, Any], backend: str) -> dict[str, Tensor]:
        out = attention_tap(**args, backend=backend)
        return {"out": out} | {name: args[name] for name in CAPTURES if name in args}

    def config(size: int) -> Any:
        from sidechain.triton_kernels.attention_tap import launch_config

        return launch_config(case.tokens, case.context, case.width, size, case.context_mask)

    work = case.rows * case.heads * case.tokens * case.context
    return Call(
        "attention_tap",
        case.name,
        lambda dtype, device: case.make(dtype, device=device),
        run,
        config,
        work < 3 * 10**5,
    )


CALLS = tuple(_attention(case) for case in (*ATTENTION_CASES, *ATTENTION_BENCH))


@dataclass
class Built:
    """Every kernel compiled while it was active: hash -> (kernel name, compiled kernel)."""

    kernels: dict[str, tuple[str, Any]] = field(default_factory=dict)


@contextmanager
def compiling_for(capability: int) -> Iterator[Built]:
    """Let launches on CPU tensors compile for a GPU that need not exist, and run nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    built = Built()
    compile_or_run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = compile_or_run(self, *args, grid=grid, warmup=True, **kwargs)
        built.kernels[compiled.hash] = (self.fn.__name__, compiled)

    machine = SimpleNamespace(
        get_current_device=lambda: capability,  # one cache of kernels per capability
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", machine)
        patch.setattr(JITFunction, "run", only_compile)
        patch.setattr(_triton, "absent", lambda: None)
        patch.setattr(_triton, "interpreting", lambda: True)
        yield built
