# SPDX-License-Identifier: Apache-2.0
"""`sae_update_` against dense autograd: gradients, groups of losses, steps of AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops.sae_update_calls import STATE, UPDATE, square
from ops.support import DEVICE, upcast
from sidechain.ops import (
    AdamOptions,
    AdamState,
    CodeGroup,
    GradientInputs,
    SaeWeights,
    sae_gradient_square,
    sae_update_,
    sparse_decode,
    sparse_decode_loss,
)
from sidechain.ops.sae_structs import COLUMNS
from sidechain.testing.cases import UpdateCase
from sidechain.testing.tolerance import assert_close


class Dense:
    """A TopK autoencoder trained by plain dense torch: autograd, AdamW, projection, renorm."""

    def __init__(self, dtype: torch.dtype, d_in: int, d_out: int, features: int) -> None:
        g = torch.Generator().manual_seed(0)
        w_enc = torch.randn(features, d_in, generator=g) / d_in**0.5
        w_dec = torch.nn.functional.normalize(torch.randn(features, d_out, generator=g), dim=1)
        b_enc = 0.1 * torch.randn(features, generator=g)
        self.b_pre = torch.randn(d_in, generator=g).to(dtype).requires_grad_()
        self.b_dec = torch.randn(d_out, generator=g).to(dtype)
        self.parameters = [t.to(dtype).requires_grad_() for t in (w_enc, w_dec, b_enc)]

    def forward(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        w_enc, w_dec, b_enc = self.parameters
        z = torch.relu((x - self.b_pre) @ w_enc.mT + b_enc)
        top = z.topk(k, dim=1)
        codes = torch.zeros_like(z).scatter(1, top.indices, top.values)
        return codes, codes @ w_dec + self.b_dec


def zero_state(weights: SaeWeights) -> AdamState:
    """The state before the first step."""
    return AdamState(*(torch.zeros_like(t) for t in weights[:3] if t is not None for _ in range(2)))


@UPDATE.every_backend
class TestAgainstDenseTorch:
    """Equal to `torch.optim.AdamW` on dense autograd gradients, step for step."""

    STEPS, ROWS, D_IN, D_OUT, F, K = 6, 64, 24, 20, 50, 5

    def batches(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(1)
        shapes = ((self.ROWS, self.D_IN), (self.ROWS, self.D_OUT))
        return [
            tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)  # type: ignore[misc]
            for _ in range(self.STEPS)
        ]

    def dense(self, dtype: torch.dtype, clip: bool, decay: float) -> list[dict[str, Tensor]]:
        model = Dense(dtype, self.D_IN, self.D_OUT, self.F)
        adam = torch.optim.AdamW(model.parameters, lr=1e-2, weight_decay=decay, foreach=False)
        seen = []
        for x, target in self.batches(dtype):
            adam.zero_grad()
            model.b_pre.grad = None
            _, x_hat = model.forward(x, self.K)
            ((x_hat - target).square().sum(1) / self.ROWS).sum().div(2).backward()
            w_dec = model.parameters[1]
            with torch.no_grad():
                assert w_dec.grad is not None
                w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec
                norm = torch.stack([p.grad.norm() for p in model.parameters]).norm()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters, 0.05)
            adam.step()
            with torch.no_grad():
                w_dec /= w_dec.norm(dim=1, keepdim=True)
            names = ("w_enc", "w_dec", "b_enc")
            seen.append(
                {n: p.detach().clone() for n, p in zip(names, model.parameters, strict=True)}
                | {"b_pre_grad": model.b_pre.grad, "norm": norm[None]}
            )
        return seen

    def sparse(
        self, dtype: torch.dtype, clip: bool, decay: float, backend: str
    ) -> list[dict[str, Tensor]]:
        device = DEVICE[backend]
        model = Dense(dtype, self.D_IN, self.D_OUT, self.F)
        w_enc, w_dec, b_enc = (p.detach().clone().to(device) for p in model.parameters)
        b_pre, b_dec = model.b_pre.detach().to(device), model.b_dec.to(device)
        weights = SaeWeights(w_enc, w_dec, b_enc, b_pre)
        state = zero_state(weights)
        lr = torch.tensor([1e-2], dtype=dtype, device=device)
        step = torch.zeros(1, dtype=torch.int64, device=device)
        weight = torch.full((self.ROWS,), 1 / self.ROWS).to(w_enc)
        b_pre_grad = torch.zeros_like(b_pre)
        seen = []
        for x, target in self.batches(dtype):
            x, target = x.to(device), target.to(device)
            step += 1
            top = torch.relu((x - b_pre) @ w_enc.mT + b_enc).topk(self.K, dim=1)
            codes = (top.values, top.indices.int())
            loss = sparse_decode_loss(
                *codes, w_dec, b_dec, target, row_weight=weight, backend=backend
            )
            group = CodeGroup(*codes, loss.dvalues, loss.error, row_weight=weight)
            inputs = GradientInputs(x, [group])
            total = sae_gradient_square(weights, inputs, backend=backend)
            scale = (0.05 / (total.sqrt() + 1e-6)).clamp(max=1) if clip else None
            adam = AdamOptions(lr, step, weight_decay=decay, clip_scale=scale)
            sae_update_(weights, state, inputs, adam, b_pre_grad=b_pre_grad, backend=backend)
            found = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": b_enc, "b_pre_grad": b_pre_grad}
            seen.append({k: v.clone() for k, v in (found | {"norm": total.sqrt()}).items()})
        return seen

    @pytest.mark.parametrize(("clip", "decay"), [(False, 0.0), (True, 0.1)], ids=["adam", "clip"])
    def test_step_for_step(self, backend: str, clip: bool, decay: float) -> None:
        exact = self.dense(torch.float64, clip, decay)
        # Bias decay: AdamW decays b_enc as well, this op only the matrices.
        names = [n for n in exact[0] if decay == 0 or n == "norm" or n == "w_dec"]
        steps = 1 if decay else self.STEPS
        if backend == "reference":
            wide = self.sparse(torch.float64, clip, decay, backend)
            for got, want in zip(wide[:steps], exact, strict=False):
                for name in names:  # m / sqrt(s) magnifies rounding where gradients cancel
                    torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-7)
        eager = self.dense(torch.float32, clip, decay)
        got32 = self.sparse(torch.float32, clip, decay, backend)
        for i in range(steps):
            for name in names:
                assert_close(f"step {i} {name}", got32[i][name], exact[i][name], eager[i][name])


class TestGroups:
    """Several groups are the gradient of the sum of their losses."""

    def test_matryoshka(self) -> None:
        """Nested prefixes against autograd of the sum of the prefix losses."""
        case = UpdateCase(30, 16, 12, 40, 6, prefixes=(8, 20, 40), step=1)
        a = upcast(case.make(torch.float64))
        values, indices = a["values"][0], a["indices"][0]
        target = torch.randn(30, 12, dtype=torch.float64)
        weights = (0.5, 0.3, 0.2)
        table = a["w_dec"].clone().requires_grad_()
        leaf = values.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        error, dvalues = torch.zeros(3, 30, 12).double(), torch.zeros_like(values)
        for p, (bound, weight) in enumerate(zip(case.prefixes, weights, strict=True)):
            kept = torch.where(indices < bound, indices, -1)
            x_hat = sparse_decode(leaf, kept, table, backend="reference")
            total = total + weight * (x_hat - target).square().sum() / 2
            part = sparse_decode_loss(values, kept, a["w_dec"], None, target)
            error[: p + 1] += weight * part.error
            dvalues += weight * part.dvalues
        want = torch.autograd.grad(total, (table, leaf))
        torch.testing.assert_close(dvalues, want[1], rtol=1e-10, atol=1e-10)
        a["error"], a["dvalues"], a["project"] = [error], [dvalues], False
        for key in ("dec_mean", "dec_square"):
            a[key].zero_()
        got = UPDATE.run(a, backend="reference")
        torch.testing.assert_close(got["dec_mean"], 0.1 * want[0], rtol=1e-9, atol=1e-12)

    def test_aux_and_multi_topk(self) -> None:
        """TopK, 4 x TopK and AuxK on the residual against dense autograd of the weighted sum."""
        g = torch.Generator().manual_seed(0)
        shapes = ((30, 16), (40, 16), (40, 12), (40,), (30, 12))
        x, w_enc, w_dec, b_enc, target = (torch.randn(s, generator=g).double() for s in shapes)
        leaves = [t.clone().requires_grad_() for t in (w_enc, w_dec, b_enc)]
        dead = torch.arange(40) % 3 == 0
        z = torch.relu(x @ leaves[0].mT + leaves[2])

        def kept(z: Tensor, k: int) -> Tensor:
            top = z.topk(k, dim=1)
            return torch.zeros_like(z).scatter(1, top.indices, top.values)

        pre = (kept(z, 4), kept(z, 16), kept(torch.where(dead, z, 0.0), 3))
        decoded = [codes @ leaves[1] for codes in pre]
        residual = (target - decoded[0]).detach()
        scales = (1.0, 0.125, 1 / 32)
        total = torch.zeros((), dtype=torch.float64)
        for scale, x_hat, want in zip(scales, decoded, (target, target, residual), strict=True):
            total = total + scale * (x_hat - want).square().sum() / 2
        want_grads = torch.autograd.grad(total, leaves)

        groups = []
        for scale, codes, goal in zip(scales, pre, (target, target, residual), strict=True):
            values, indices = codes.detach().topk(16, dim=1)
            weight = torch.full((30,), scale, dtype=torch.float64)
            indices = torch.where(values > 0, indices, -1).int()
            loss = sparse_decode_loss(values, indices, w_dec, None, goal, row_weight=weight)
            groups.append(CodeGroup(values, indices, loss.dvalues, loss.error, row_weight=weight))
        weights, one = SaeWeights(w_enc, w_dec, b_enc), torch.ones(1, dtype=torch.float64)
        state, inputs = zero_state(weights), GradientInputs(x, groups, project=False)
        sae_update_(weights, state, inputs, AdamOptions(one, one.long()))
        means = (state.enc_mean, state.dec_mean, state.bias_mean)
        for got, want in zip(means, want_grads, strict=True):
            torch.testing.assert_close(got, 0.1 * want, rtol=1e-9, atol=1e-12)

    @UPDATE.every_backend
    def test_order_of_groups_does_not_matter_but_for_rounding(self, backend: str) -> None:
        args = UpdateCase(30, 16, 12, 40, 6, groups=2).make(torch.float32, device=DEVICE[backend])
        swapped = {k: v[::-1] if k in COLUMNS else v for k, v in args.items()}
        exact = UPDATE.run(upcast(args))
        a, b = UPDATE.run(args, backend=backend), UPDATE.run(swapped, backend=backend)
        for name in ("w_enc", "w_dec", "b_enc"):
            assert_close(name, b[name], exact[name], a[name])

    @UPDATE.every_backend
    def test_shards_make_the_whole(self, backend: str) -> None:
        whole = UpdateCase(30, 16, 12, 40, 6, groups=2, half_state=True, extras=True).make(
            torch.float32, device=DEVICE[backend]
        )
        rows = ("w_enc", "w_dec", "b_enc", *STATE, "last_fired")
        want, parts, total = UPDATE.run(whole, backend=backend), [], 0.0
        for first, last in ((0, 13), (13, 40)):
            shard = {k: v[first:last].clone() if k in rows else v for k, v in whole.items()}
            shard["first_feature"] = first
            parts.append(UPDATE.run(shard, backend=backend))
            total = total + square(shard, backend)
        for name in rows:
            assert torch.equal(torch.cat([p[name] for p in parts]), want[name]), name
        torch.testing.assert_close(total, square(whole, backend))
        total = sum(p["b_pre_grad"] for p in parts)
        torch.testing.assert_close(total, want["b_pre_grad"], rtol=1e-4, atol=1e-5)
