# SPDX-License-Identifier: Apache-2.0
"""What the launchers launch for the shapes of the bench: blocks, threads, dynamic shared memory.

The emulation library holds the launchers themselves, so no size is written down twice. Its launches
are only noted, and arguments have the shapes of the case tables but no content: nothing is
computed, whatever the size. Run as a script in a process of its own, because the emulated kernels
take the place of the CPU's: `python tests/build/launches.py LIBRARY` prints JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from build.resources import short
from sidechain.bench import ops
from sidechain.ops import _library
from sidechain.testing.cases import square_args

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "cmake" / "emulation_order.abi3.so"
# Arguments that may have another dtype than the bench gives them, together.
CASTS = {
    "sae_update": (("x",),),
    "sae_edit": (("x",), ("w_dec",), ("x", "w_dec")),
    "sparse_decode": (("w_dec", "target"),),
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; `what` says whether arguments are aligned, "bench" if as measured."""

    kernel: str
    op: str
    case: str
    dtype: str
    what: str
    blocks: int
    threads: int
    shared: int


@dataclass(frozen=True)
class Call:
    """One call of an op in the bench; `launches` 0 = not counted."""

    op: str
    case: str
    dtype: str
    moved: int
    flops: int
    launches: int


def record() -> tuple[list[Launch], list[Call]]:
    """Every launch of the shapes below, and what the bench says of its calls.

    Raises:
        RuntimeError: the emulation library has not been built.
    """
    if not LIBRARY.exists():
        raise RuntimeError(
            f"launches: expected {LIBRARY} [cmake --build build/cmake --target emulation_order], "
            "got none"
        )
    paths = (ROOT / "python", ROOT / "tests", ROOT / "tests" / "native" / "emulation")
    env = os.environ | {
        "SIDECHAIN_NATIVE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(LIBRARY)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"launches: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [Launch(**row) for row in found["launches"]], [Call(**row) for row in found["calls"]]


def _recorded(library: str) -> dict[str, list[dict[str, Any]]]:
    from emulated import emulate  # found where the script is run by `record`

    emulation = emulate(library)
    launches: dict[Launch, None] = {}
    calls = []
    for op, case, dtype, what, sizes, call in _calls():
        found = emulation.launches(call)
        for blocks, threads, shared, name in found:
            row = Launch(short(name), op, case, dtype, what, blocks, threads, shared)
            launches[row] = None
        if sizes is not None:
            calls.append(Call(op, case, dtype, *sizes, len(found)))
    calls += _others()
    return {
        "launches": [asdict(row) for row in launches],
        "calls": [asdict(row) for row in calls],
    }


Shaped = tuple[str, str, str, str, tuple[int, int] | None, Callable[[], object]]


def _calls() -> Iterator[Shaped]:
    """Bench cases, then the same in other dtypes, shifted by an element, and of related ops.

    Last the small cases, which reach every instance.
    """
    for module in filter(_emulated, ops.modules()):
        stem = module.__name__.rpartition(".")[2]
        for case in module.small("cpu"):
            run = _bind(module.WORK.run, case.make(0))
            yield module.OP, case.name, case.dtype, "small", None, run
        for case in module.cases("cpu"):
            args = _shapes(case.make)
            variants = [(case.dtype, "bench", args)]
            for names in CASTS.get(stem, ()):
                for dtype in (torch.float16, torch.bfloat16):
                    cast = {k: v.to(dtype) if k in names else v for k, v in args.items()}
                    variants.append((str(dtype).removeprefix("torch."), "cast", cast))
            variants += [(d, f"{w} shifted", _shifted(a)) for d, w, a in variants]
            for dtype, what, given in variants:
                sizes = (case.moved, case.flops) if what == "bench" else None
                run = _bind(module.WORK.run, given)
                yield module.OP, case.name, dtype, what, sizes, run
                for op, other in _related(stem, given):
                    yield op, case.name, dtype, what, None, other


def _others() -> Iterator[Call]:
    """Calls of the ops whose kernels are not CUDA C++; what they launch is not counted."""
    for module in itertools.filterfalse(_emulated, ops.modules()):
        for case in module.cases("cpu"):
            yield Call(module.OP, case.name, case.dtype, case.moved, case.flops, 0)


def _emulated(module: ModuleType) -> bool:
    return _library.unavailable(module.OP, "cuda") is None


def _bind(run: Callable[[Any, str], object], args: Any) -> Callable[[], object]:
    return lambda: run(args, "cuda")


def _shapes(make: Callable[[int], Any]) -> Any:
    """Arguments as `make` makes them, with memory that nothing has touched."""

    class WithoutNoise(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__name__", "") == "exponential_":
                return args[0]  # fake tensors take no generator there
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), WithoutNoise():
        made = make(0)
    return tree_map_only(
        torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), made
    )


def _shifted(args: Any) -> Any:
    """Floating arguments that begin one element behind an aligned address."""

    def shift(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point() or t.numel() < 2:
            return t
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)

    return tree_map_only(torch.Tensor, shift, args)


def _related(stem: str, args: dict[str, Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ops that the bench does not time by themselves, on the same arguments."""
    ours = torch.ops.sidechain
    if stem == "sparse_decode":
        codes = (args["values"], args["indices"], args["w_dec"])
        grad = torch.empty_like(args["target"], dtype=torch.float32)
        if args["target"].storage_offset():
            grad = _shifted(grad)
        yield "sparse_decode", lambda: ours.sparse_decode(*codes, args["b_dec"], None)
        yield (
            "sparse_decode_backward",
            lambda: ours.sparse_decode_backward(grad, *codes, None, True, True),
        )
    if stem == "sae_update":
        yield "sae_gradient_square", lambda: ours.sae_gradient_square(*square_args(args))


if __name__ == "__main__":
    print(json.dumps(_recorded(sys.argv[1])))
