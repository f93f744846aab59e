# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops.support import DEVICE, upcast
from ops.topk_encode_codes import FIXED, dtypes, every_backend, every_exact, modes
from sidechain.ops import Encoder, topk_encode
from sidechain.testing.cases import TopkEncodeCase, encode_case
from sidechain.testing.tolerance import assert_close


class TestGradients:
    @every_exact
    @modes
    def test_against_dense_autograd(
        self, case: TopkEncodeCase, precision: str, backend: str
    ) -> None:
        """Gradients of the dense encoder in float64 at the codes that were kept."""
        args = case.make(torch.float32, device=DEVICE[backend])
        names = ("x", "w_enc", "b_enc", "b_pre")
        for name in names:
            args[name].requires_grad_()
        got = encode_case(args, precision=precision, backend=backend)
        device = args["x"].device
        weight = torch.randn(got.values.shape, device=device)
        grads = torch.autograd.grad((got.values * weight).sum(), [args[n] for n in names])
        rows = torch.arange(case.rows, device=device)
        rows = rows[:, None].expand(-1, case.k) if got.offsets is None else (
            rows.repeat_interleave(got.offsets.diff()))  # fmt: skip
        active = got.indices >= 0

        def by_hand(dtype: torch.dtype) -> tuple[Tensor, ...]:
            leaves = {n: args[n].detach().to(dtype).requires_grad_() for n in names}
            x, w = leaves["x"] - leaves["b_pre"], leaves["w_enc"]
            if precision == "bf16":
                x32 = args["x"].detach() - args["b_pre"].detach()
                x = x + (x32.bfloat16().to(dtype) - x).detach()
                w = w + (w.bfloat16().to(dtype) - w).detach()
            z = (x @ w.T + leaves["b_enc"]).relu()
            picked = z[rows[active], got.indices[active].long()]
            loss = (picked * weight[active].to(dtype)).sum()
            return torch.autograd.grad(loss, [leaves[n] for n in names])

        for name, g, exact, eager in zip(
            names, grads, by_hand(torch.float64), by_hand(torch.float32), strict=True
        ):
            assert_close(name, g, exact, eager)

    @modes
    def test_gradcheck_of_the_reference(self, case: TopkEncodeCase) -> None:
        args = upcast(TopkEncodeCase(3, 4, 7, 2, mode=case.mode).make(torch.float32))
        tensors = [args.pop(n).requires_grad_() for n in ("x", "w_enc", "b_enc", "b_pre")]
        torch.autograd.gradcheck(
            lambda x, *w: topk_encode(x, Encoder(*w), **args, backend="reference").values, tensors
        )

    @every_backend
    def test_only_what_is_asked_for(self, backend: str) -> None:
        args = FIXED.make(torch.float32, device=DEVICE[backend])
        args["b_enc"].requires_grad_()
        encode_case(args, backend=backend).values.sum().backward()
        assert args["b_enc"].grad is not None
        assert args["b_enc"].grad.sum() == (encode_case(args).indices >= 0).sum()
        assert args["x"].grad is args["w_enc"].grad is args["b_pre"].grad is None

    @dtypes
    def test_dtypes_of_gradients(self, dtype: torch.dtype) -> None:
        args = FIXED.make(dtype)
        for name in ("x", "w_enc", "b_enc", "b_pre"):
            args[name].requires_grad_()
        encode_case(args).values.sum().backward()
        for name in ("x", "w_enc", "b_enc", "b_pre"):
            assert args[name].grad.dtype == args[name].dtype

    def test_second_gradient_is_refused(self) -> None:
        args = FIXED.make(torch.float32)
        args["x"].requires_grad_()
        value = encode_case(args).values.square().sum()
        (g,) = torch.autograd.grad(value, args["x"], create_graph=True)
        with pytest.raises(NotImplementedError, match="expected one backward pass"):
            g.sum().backward()
