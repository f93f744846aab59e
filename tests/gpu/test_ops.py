# SPDX-License-Identifier: Apache-2.0
"""Every op as torch sees it on a GPU: registered right, traced whole, captured in a graph."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from gpu.calls import CALLS, Call, decode_gradient, encode_gradient
from gpu.support import capture_begun, captured, copied, side_stream
from gpu.waits import waits_of
from ops.sae_update_calls import upcast
from ops.support import need_kernel
from sidechain.ops import topk_encode_fallbacks
from sidechain.ops.topk_encode import _fallbacks
from sidechain.testing.cases import TopkEncodeCase, encode_case
from sidechain.testing.tolerance import assert_close

every_call = pytest.mark.parametrize("call", CALLS, ids=lambda c: c.name)
graphed = pytest.mark.parametrize("call", [c for c in CALLS if c.graph], ids=lambda c: c.name)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler"
)


def fill(args: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Write new numbers into the memory of the arguments."""
    places: list[Tensor] = []
    tree_map_only(Tensor, places.append, args)
    values: list[Tensor] = []
    tree_map_only(Tensor, values.append, fresh)
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@every_call
def test_opcheck(device: str, call: Call) -> None:
    for op, args in call.schemas(call.make(0, device)):
        torch.library.opcheck(getattr(torch.ops.sidechain, op).default, args)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("call", [c for c in CALLS if c.traced], ids=lambda c: c.name)
def test_compiles_as_one_graph(device: str, call: Call) -> None:
    args = call.make(0, device)
    exact, eager = call.run(upcast(copied(args))), call.run(copied(args), "reference")
    torch._dynamo.reset()
    got = torch.compile(call.run, fullgraph=True, dynamic=False)(copied(args))
    for name, value in got.items():
        if value.is_floating_point():
            assert_close(name, value, exact[name], eager[name])
        else:
            assert torch.equal(value, exact[name]), name


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("gradient", [encode_gradient, decode_gradient])
def test_compiled_gradients(device: str, gradient: Callable[..., dict[str, Tensor]]) -> None:
    call = next(c for c in CALLS if c.run is gradient)
    args = call.make(0, device)
    torch._dynamo.reset()
    got = gradient(args, through=partial(torch.compile, fullgraph=True, dynamic=False))
    exact, eager = gradient(upcast(args)), gradient(args, "reference")
    for name, value in got.items():
        assert_close(name, value, exact[name], eager[name])


@graphed
def test_graph_follows_its_inputs(device: str, call: Call) -> None:
    """Three replays on changed numbers, each the same bits as an eager call on them."""
    args = call.make(0, device)
    replay = captured(device, lambda: call.run(args))
    for seed in (1, 2, 3):
        fresh = call.make(seed, device)
        fill(args, fresh)
        got = copied(replay())
        assert_same(got, call.run(fresh))


@pytest.mark.gpu
@graphed
def test_a_call_waits_for_nothing(call: Call) -> None:
    """A GPU alone shows what its kernels' launchers do."""
    args = call.make(0, "cuda")
    call.run(copied(args))
    with waits_of("cuda") as waits:
        call.run(args)
    assert waits == []


@every_call
def test_a_side_stream_changes_no_bit(device: str, call: Call) -> None:
    want = call.run(call.make(0, device))
    with side_stream(device):
        got = call.run(call.make(0, device))
    assert_same(got, want)


@pytest.mark.parametrize("call", [c for c in CALLS if c.traced], ids=lambda c: c.name)
def test_shapes_on_a_gpu_that_is_not_there(call: Call) -> None:
    """What tracing sees: sizes, dtypes and devices of the outputs, from fake CUDA tensors."""
    args = call.make(0, "cpu")
    want = call.run(copied(args))
    with FakeTensorMode():
        fake = tree_map_only(
            Tensor,
            lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cuda"),
            args,
        )
        counted = dict(_fallbacks)
        got = call.run(fake)
    assert counted == _fallbacks and got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].device.type == "cuda", name
        assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name


class TestFallbacks:
    def undecided(self, device: str) -> dict[str, Any]:
        """Rows of which two are beyond every bound of the kernels."""
        need_kernel("topk_encode", device)
        args = TopkEncodeCase(20, 20, 50, 4).make(torch.float32, device=device)
        args["x"][3, 0], args["x"][5, 0] = 1e30, math.nan
        return args

    def test_are_counted_at_every_replay(self, device: str) -> None:
        args = self.undecided(device)
        replay = captured(device, lambda: encode_case(args))
        topk_encode_fallbacks(reset=True)
        assert topk_encode_fallbacks() == 0
        for number in range(1, 4):
            replay()
            assert topk_encode_fallbacks() == 2 * number

    def test_counter_is_made_once(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        args = self.undecided(device)
        encode_case(args)
        address = _fallbacks[args["x"].device].data_ptr()
        topk_encode_fallbacks(reset=True)
        if device == "cpu":  # a GPU's launcher makes scratch of its own
            monkeypatch.setattr(torch, "zeros", None)
        encode_case(args)
        monkeypatch.undo()
        assert _fallbacks[args["x"].device].data_ptr() == address
        assert topk_encode_fallbacks() == 2

    def test_first_call_in_a_capture_is_refused(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args = self.undecided(device)
        encode_case(args)
        kept = _fallbacks.pop(args["x"].device)
        match = r"topk_encode: expected a first call on .* before a CUDA graph is captured"
        try:
            with capture_begun(device, monkeypatch), pytest.raises(RuntimeError, match=match):
                encode_case(args)
            assert args["x"].device not in _fallbacks
        finally:
            _fallbacks[args["x"].device] = kept
