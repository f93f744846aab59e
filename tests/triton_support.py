# SPDX-License-Identifier: Apache-2.0
"""What the Triton tests share: the calls of every kernel, and a compiler without a GPU.

A kernel joins by a row of `CALLS`: it is then interpreted, compiled for every architecture and,
where there is a GPU, run on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.harness import CAPTURES
from ops.support import upcast
from sidechain import _triton
from sidechain.ops import _library, attention_tap
from sidechain.reference import topk_encode as topk_reference
from sidechain.testing.cases import (
    ATTENTION_BENCH,
    ATTENTION_CASES,
    TOPK_ENCODE_BENCH,
    TOPK_ENCODE_CASES,
    AttentionCase,
    TopkEncodeCase,
    encode_case,
    structured,
)
from sidechain.testing.tolerance import assert_close

PRECISIONS = ("bf16", "int8")  # beside fp32, which every case has


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
            if value.is_floating_point():
                assert_close(name, value, exact[name], eager[name])
            else:
                assert torch.equal(value, exact[name]), name


def _attention(case: AttentionCase) -> Call:
    def run(args: dict[str, Any], backend: str) -> dict[str, Tensor]:
        out = attention_tap(**structured(args), backend=backend)
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


def _topk(case: TopkEncodeCase, precision: str = "fp32") -> Call:
    def run(args: dict[str, Any], backend: str) -> dict[str, Tensor]:
        if args["x"].dtype == torch.float64:
            args.pop("guess", None)  # float32 by contract, and without influence on the result
        codes = encode_case(args, precision=precision, backend=backend)
        return {k: v for k, v in codes._asdict().items() if v is not None}

    def config(size: int) -> Any:
        from sidechain.triton_kernels.topk_encode import launch_config

        return launch_config(case.features, case.width, case.k, size), case.mode, precision

    return Call(
        "topk_encode" if case.mode == "topk" else "topk_encode_ragged",
        f"{case.name}-{precision}",
        lambda dtype, device: case.make(dtype, device=device),
        run,
        config,
        case.rows * case.features < 20_000,
    )


def _topk_backward(case: TopkEncodeCase, precision: str) -> Call:
    def make(dtype: torch.dtype, device: str) -> dict[str, Any]:
        args = case.make(dtype)
        g = torch.Generator().manual_seed(1)
        indices = torch.rand(case.rows, case.features, generator=g).argsort(1)[:, : case.k].int()
        indices[torch.rand(indices.shape, generator=g) < 0.2] = -1
        offsets = None
        if case.mode != "topk":
            used = indices >= 0
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), used.sum(1).cumsum(0)])
            indices = indices[used]
        given = {
            "grad": torch.randn(indices.shape, generator=g), "indices": indices, "offsets": offsets,
            "x": args["x"], "w_enc": args["w_enc"], "b_pre": args.get("b_pre"),
        }  # fmt: skip
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}

    def run(args: dict[str, Any], backend: str) -> dict[str, Tensor]:
        if backend == "reference":
            found = topk_reference.topk_encode_backward(**args, bf16=precision == "bf16")
        else:
            rest = (("fp32", "bf16").index(precision), True, True)
            call = (*args.values(), *rest)
            found = _library.run("topk_encode_backward", backend, args["x"].device, call)
        return dict(zip(("dx", "dw", "db"), found, strict=True))

    flags = (case.mode, case.width, precision, case.b_pre)
    name = f"{case.name}-{precision}"
    return Call("topk_encode_backward", name, make, run, lambda size: (size, *flags), True)


_SMALL = TopkEncodeCase(6, 20, 50, 4)
_MODES = ("topk", "batch_topk", "threshold")
CALLS = (
    *(_attention(case) for case in (*ATTENTION_CASES, *ATTENTION_BENCH)),
    *(_topk(case) for case in TOPK_ENCODE_CASES),
    *(_topk(replace(_SMALL, mode=mode), precision) for mode in _MODES for precision in PRECISIONS),
    # What the bench times, with as many rows as a compiler or the float64 reference can stand.
    *(_topk(replace(case, rows=16, guess=None)) for case in TOPK_ENCODE_BENCH),
    # Enough groups of features for every width of the filter.
    *(_topk(TopkEncodeCase(3, 32, 8192, k, what="many")) for k in (100, 200, 500)),
    *(
        _topk_backward(replace(_SMALL, mode=mode, width=width, b_pre=b_pre), precision)
        for mode, width, b_pre in (("topk", 20, True), ("batch_topk", 300, False))
        for precision in ("fp32", "bf16")
    ),
)


@dataclass
class Built:
    """Every kernel compiled while it was active: hash -> (kernel name, compiled kernel)."""

    kernels: dict[str, tuple[str, Any]] = field(default_factory=dict)


@contextmanager
def compiling_for(capability: int) -> Iterator[Built]:
    """Let launches on CPU tensors compile for a GPU that need not exist, and run nothing.

    A launch that leaves the fusion of products and sums to Triton gets what Triton 3.10 gives it.
    """
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
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
        patch.setattr(driver, "_active", machine)
        patch.setattr(JITFunction, "run", only_compile)
        patch.setattr(_triton, "absent", lambda: None)
        patch.setattr(_triton, "interpreting", lambda: True)
        yield built
