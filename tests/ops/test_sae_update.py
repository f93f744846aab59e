# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.support import DEVICE, backend_params
from sidechain.ops import (
    SaeCodes,
    SaeMoments,
    sae_gradient_square,
    sae_update_,
    sparse_decode,
    sparse_decode_loss,
)
from sidechain.reference.sae_update import round_stochastically, rounding_noise
from sidechain.testing.cases import DTYPES, UPDATE_CASES, UpdateCase
from sidechain.testing.tolerance import assert_close

BACKENDS = backend_params("sae_update_")
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", UPDATE_CASES, ids=lambda c: c.name)
MOMENTS = SaeMoments._fields
WRITTEN = (
    "w_enc", "w_dec", "b_enc", *MOMENTS, "last_fired", "fire_count", "row_step", "enc_copy",
    "dec_copy", "b_pre_grad", "grad_square",
)  # fmt: skip
COLUMNS = ("values", "indices", "offsets", "dvalues", "error", "row_weight")


def copy(value: Any) -> Any:
    if isinstance(value, list):
        return [copy(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value


def wide(value: Any) -> Any:
    if isinstance(value, list):
        return [wide(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def upcast(args: dict[str, Any]) -> dict[str, Any]:
    """Everything in float64 but the copies, whose dtype is their purpose."""
    keep = ("enc_copy", "dec_copy")
    return {k: copy(v) if k in keep else wide(v) for k, v in args.items()}


def public(args: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public function from those of the schema."""
    args = dict(args)
    codes = [
        SaeCodes(values=v, indices=i, offsets=o, dvalues=d, error=e, row_weight=w)
        for v, i, o, d, e, w in zip(*(args.pop(k) for k in COLUMNS), strict=True)
    ]
    moments = SaeMoments(**{k: args.pop(k) for k in MOMENTS})
    weights = (args.pop("w_enc"), args.pop("w_dec"), args.pop("b_enc"))
    args["betas"] = (args.pop("beta1"), args.pop("beta2"))
    return (*weights, moments, args.pop("x"), codes), args


def run(args: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Call sae_update_ on copies and return the copies."""
    args = {k: copy(v) for k, v in args.items()}
    positional, keyword = public(args)
    sae_update_(*positional, **keyword, **more)
    return args


def square(args: dict[str, Any], backend: str = "auto") -> Tensor:
    (w_enc, w_dec, b_enc, _, x, codes), keyword = public(args)
    keep = {k: keyword[k] for k in ("b_pre", "project", "prefixes", "first_feature")}
    bias = b_enc is not None
    return sae_gradient_square(w_enc, w_dec, x, codes, bias=bias, **keep, backend=backend)


def check(args: dict[str, Any], backend: str) -> None:
    exact, eager = run(upcast(args)), run(args, backend="reference")
    got = run(args, backend=backend)
    for name in WRITTEN:
        if args[name] is None:
            continue
        if args[name].is_floating_point():
            assert_close(name, got[name], exact[name], eager[name])
        else:
            assert torch.equal(got[name], exact[name]), name
    total = square(args, backend)
    assert_close("square", total, square(upcast(args)), square(args, "reference"))


def plain(args: dict[str, Any]) -> dict[str, Tensor]:
    """Entry by entry and row by row in float64, written from the docstring."""
    a = upcast(args)
    features, first = a["w_dec"].shape[0], a["first_feature"]
    n, bounds = a["x"].shape[0], a["prefixes"]
    g_enc, g_dec = torch.zeros_like(a["w_enc"]), torch.zeros_like(a["w_dec"])
    g_b, seen = torch.zeros(features).double(), torch.zeros(features, dtype=torch.int64)
    fired = seen.clone()
    x = a["x"] if a["b_pre"] is None else a["x"] - a["b_pre"]
    for g, (values, indices, offsets, dvalues, error, weight) in enumerate(
        zip(*(a[k] for k in COLUMNS), strict=True)
    ):
        width = values.shape[-1]
        starts = offsets.tolist() if offsets is not None else [i * width for i in range(n + 1)]
        flat = (values.reshape(-1), indices.reshape(-1), dvalues.reshape(-1))
        for row in range(n):
            for place in range(starts[row], starts[row + 1]):
                v, f, dv = (float(flat[0][place]), int(flat[1][place]), float(flat[2][place]))
                local = f - first
                if v == 0 or not 0 <= local < features:
                    continue
                e = error[next(p for p, b in enumerate(bounds) if f < b)] if bounds else error
                g_dec[local] += v * (1.0 if weight is None else weight[row]) * e[row]
                g_enc[local] += dv * x[row]
                g_b[local] += dv
                seen[local] += 1
                fired[local] += g == 0
    if a["project"]:
        unit = torch.nn.functional.normalize(a["w_dec"], dim=1)
        g_dec -= (g_dec * unit).sum(1, keepdim=True) * unit
    out: dict[str, Tensor] = {}
    if a["b_pre_grad"] is not None:
        out["b_pre_grad"] = -(g_b[:, None] * a["w_enc"]).sum(0)
        total = (g_enc**2).sum() + (g_dec**2).sum() + (g_b**2).sum() * (a["b_enc"] is not None)
        out["grad_square"] = total[None]
        out["last_fired"] = torch.where(fired > 0, a["step"], a["last_fired"])
        out["fire_count"] = a["fire_count"] + fired
    scale = 1.0 if a["clip_scale"] is None else float(a["clip_scale"])
    t, lr, wd = int(a["step"]), float(a["lr"]), a["weight_decay"]
    b1, b2 = a["beta1"], a["beta2"]
    names = (("w_enc", "enc", g_enc, wd), ("w_dec", "dec", g_dec, wd), ("b_enc", "bias", g_b, 0.0))
    for name, short, grad, decay in names:
        if a[name] is None:
            continue
        w, m, s = a[name].clone(), a[f"{short}_mean"].clone(), a[f"{short}_square"].clone()
        for f in range(features):
            waited = 1
            if a["row_step"] is not None:
                waited = t - int(a["row_step"][f])
                if not seen[f]:
                    continue
            m[f] = b1**waited * m[f] + (1 - b1) * scale * grad[f]
            s[f] = b2**waited * s[f] + (1 - b2) * (scale * grad[f]) ** 2
            w[f] *= (1 - lr * decay) ** waited
            w[f] -= lr / (1 - b1**t) * m[f] / ((s[f] / (1 - b2**t)).sqrt() + a["eps"])
            if name == "w_dec" and a["unit_norm"]:
                w[f] /= w[f].norm()
        out |= {name: w, f"{short}_mean": m, f"{short}_square": s}
    if a["row_step"] is not None:
        out["row_step"] = torch.where(seen > 0, t, a["row_step"])
    return out


class TestNumerics:
    @every_backend
    @dtypes
    @every_case
    def test_against_float64(self, case: UpdateCase, dtype: torch.dtype, backend: str) -> None:
        check(case.make(dtype, device=DEVICE[backend]), backend)

    @every_case
    def test_reference_against_plain(self, case: UpdateCase) -> None:
        if case.d_in > 1000:
            case = replace(case, d_in=50, d_out=21)
        args = case.make(torch.float64)
        got = run(upcast(args), backend="reference")
        for name, value in plain(args).items():
            torch.testing.assert_close(
                got[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(
        rows=st.integers(0, 40),
        d_in=st.integers(8, 90),  # a root mean square of few numbers says little
        d_out=st.integers(8, 90),
        features=st.integers(8, 60),
        k=st.integers(0, 12),
        groups=st.integers(1, 3),
        flags=st.tuples(*[st.booleans()] * 9),
        dtype=st.sampled_from(list(DTYPES.values())),
        seed=st.integers(0, 99),
    )
    def test_any_combination(
        self, rows: int, d_in: int, d_out: int, features: int, k: int, groups: int,
        flags: tuple[bool, ...], dtype: torch.dtype, seed: int,
    ) -> None:  # fmt: skip
        case = UpdateCase(
            rows, d_in, d_out, features, min(k, features), csr=flags[0], groups=groups,
            bias=flags[1], b_pre=flags[2], lazy=flags[3], clip=flags[4], unit_norm=flags[5],
            project=flags[6], extras=flags[7],
            prefixes=((features + 1) // 2, features + 1) if flags[8] else (),
        )  # fmt: skip
        check(case.make(dtype, seed), "auto")


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


@pytest.mark.parametrize("backend", BACKENDS)
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
        moments = SaeMoments(
            *(torch.zeros_like(t) for t in (w_enc, w_enc, w_dec, w_dec, b_enc, b_enc))
        )
        lr = torch.tensor([1e-2], dtype=dtype, device=device)
        step = torch.zeros(1, dtype=torch.int64, device=device)
        weight = torch.full((self.ROWS,), 1 / self.ROWS).to(w_enc)
        b_pre_grad, grad_square = torch.zeros_like(b_pre), torch.zeros_like(lr)
        seen = []
        for x, target in self.batches(dtype):
            x, target = x.to(device), target.to(device)
            step += 1
            top = torch.relu((x - b_pre) @ w_enc.mT + b_enc).topk(self.K, dim=1)
            codes = (top.values, top.indices.int())
            loss = sparse_decode_loss(
                *codes, w_dec, b_dec, target, row_weight=weight, backend=backend
            )
            group = SaeCodes(*codes, loss.dvalues, loss.error, row_weight=weight)
            total = sae_gradient_square(w_enc, w_dec, x, group, b_pre=b_pre, backend=backend)
            sae_update_(
                w_enc, w_dec, b_enc, moments, x, group, lr=lr, step=step, b_pre=b_pre,
                weight_decay=decay, b_pre_grad=b_pre_grad, grad_square=grad_square,
                clip_scale=(0.05 / (total.sqrt() + 1e-6)).clamp(max=1) if clip else None,
                backend=backend,
            )  # fmt: skip
            assert torch.equal(total, grad_square)
            state = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": b_enc, "b_pre_grad": b_pre_grad}
            seen.append({k: v.clone() for k, v in (state | {"norm": total.sqrt()}).items()})
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
        got = run(a, backend="reference")
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
            groups.append(SaeCodes(values, indices, loss.dvalues, loss.error, row_weight=weight))
        moments = SaeMoments(*(torch.zeros_like(t) for t in (w_enc, w_enc, w_dec, w_dec,
                                                             b_enc, b_enc)))  # fmt: skip
        one = torch.ones(1, dtype=torch.float64)
        sae_update_(w_enc, w_dec, b_enc, moments, x, groups, lr=one, step=one.long(), project=False)
        means = (moments.enc_mean, moments.dec_mean, moments.bias_mean)
        for got, want in zip(means, want_grads, strict=True):
            torch.testing.assert_close(got, 0.1 * want, rtol=1e-9, atol=1e-12)

    @every_backend
    def test_order_of_groups_does_not_matter_but_for_rounding(self, backend: str) -> None:
        args = UpdateCase(30, 16, 12, 40, 6, groups=2).make(torch.float32, device=DEVICE[backend])
        swapped = {k: v[::-1] if k in COLUMNS else v for k, v in args.items()}
        exact = run(upcast(args))
        a, b = run(args, backend=backend), run(swapped, backend=backend)
        for name in ("w_enc", "w_dec", "b_enc"):
            assert_close(name, b[name], exact[name], a[name])

    @every_backend
    def test_shards_make_the_whole(self, backend: str) -> None:
        whole = UpdateCase(30, 16, 12, 40, 6, groups=2, half_moments=True, extras=True).make(
            torch.float32, device=DEVICE[backend]
        )
        rows = ("w_enc", "w_dec", "b_enc", *MOMENTS, "last_fired", "fire_count")
        want, parts = run(whole, backend=backend), []
        for first, last in ((0, 13), (13, 40)):
            shard = {k: v[first:last].clone() if k in rows else v for k, v in whole.items()}
            shard |= {"first_feature": first, "enc_copy": None, "dec_copy": None}
            parts.append(run(shard, backend=backend))
        for name in rows:
            assert torch.equal(torch.cat([p[name] for p in parts]), want[name]), name
        total = sum(p["grad_square"] for p in parts)
        torch.testing.assert_close(total, want["grad_square"])
        total = sum(p["b_pre_grad"] for p in parts)
        torch.testing.assert_close(total, want["b_pre_grad"], rtol=1e-4, atol=1e-5)


class TestRounding:
    def test_unbiased_and_to_a_neighbour(self) -> None:
        value = torch.randn(200).repeat(4000, 1)
        noise = rounding_noise(torch.tensor([3]), torch.arange(4000), 200) & 0xFFFF
        got = round_stochastically(value, noise).float()
        step = torch.finfo(torch.bfloat16).eps * value.abs()
        assert ((got - value).abs() <= step).all()
        # Four standard deviations of the mean of 4000 uniform rounding errors.
        bias = (got - value).mean(0)
        assert (bias.abs() <= 4 * step[0] / 4000**0.5).all()
        exact = value[0].to(torch.bfloat16)
        assert torch.equal(round_stochastically(exact.float(), noise[:1])[0], exact)

    def test_noise_is_fresh_and_uniform(self) -> None:
        key = torch.arange(64)
        a, b = (rounding_noise(torch.tensor([s]), key, 512) for s in (1, 2))
        assert (a != b).float().mean() > 0.999
        for half in (a & 0xFFFF, a >> 16):
            counts = torch.bincount((half >> 12).flatten(), minlength=16).double()
            expected = half.numel() / 16
            assert ((counts - expected).square() / expected).sum() < 45  # chi^2, 15 d.o.f.
        halves = torch.stack([(a & 0xFFFF).flatten(), (a >> 16).flatten()]).double()
        assert torch.corrcoef(halves)[0, 1].abs() < 0.03

    def test_not_finite_values_stay(self) -> None:
        value = torch.tensor([[float("inf"), -float("inf"), float("nan"), 0.0]])
        got = round_stochastically(value, torch.full((1, 4), 0xFFFF))[0]
        assert got[:2].tolist() == [float("inf"), -float("inf")]
        assert got[2].isnan()
        assert got[3].abs() < 1e-38

    @every_backend
    def test_kernels_draw_the_bits_of_the_reference(self, backend: str) -> None:
        """Exact where the arithmetic is: m = beta1 m needs no gradient, only rounding."""
        args = replace(UPDATE_CASES[0], half_moments=True, k=0, d_in=77).make(
            torch.float32, device=DEVICE[backend]
        )
        args["beta1"] = args["beta2"] = 0.5
        for key in ("enc_mean", "enc_square", "dec_mean", "dec_square"):
            # Halving bfloat16 is exact, so a low bit is added that the rounding has to act on.
            args[key] = args[key].float().abs().add(1e-3).to(torch.bfloat16)
        args["beta1"], args["beta2"] = 0.75, 0.625
        got, want = run(args, backend=backend), run(args, backend="reference")
        for key in ("enc_mean", "enc_square", "dec_mean", "dec_square"):
            assert torch.equal(got[key], want[key]), key


class TestLayout:
    def test_determinism_over_threads(self) -> None:
        case = UpdateCase(
            300, 96, 64, 700, 16, groups=2, extras=True, half_moments=True, lazy=True
        )  # fmt: skip
        args = case.make(torch.bfloat16)
        before, seen = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                seen.append((run(args), square(args)))
        finally:
            torch.set_num_threads(before)
        for other, total in seen[1:]:
            assert torch.equal(total, seen[0][1])
            for name in WRITTEN:
                if args[name] is not None:
                    assert torch.equal(seen[0][0][name], other[name]), name

    @every_backend
    @dtypes
    def test_strided_inputs(self, dtype: torch.dtype, backend: str) -> None:
        args = replace(UPDATE_CASES[0], groups=2).make(dtype, device=DEVICE[backend])
        for name in ("x", "values", "indices", "dvalues", "error"):
            lists = args[name] if isinstance(args[name], list) else [args[name]]
            views = []
            for t in lists:
                whole = t.new_zeros(2 * t.shape[0], t.shape[1] + 3)
                views.append(whole[::2, 1 : 1 + t.shape[1]].copy_(t))
            args[name] = views if isinstance(args[name], list) else views[0]
        check(args, backend)


class TestEdges:
    @every_backend
    def test_sleeping_rows_are_not_touched(self, backend: str) -> None:
        case = UpdateCase(4, 16, 12, 200, 3, lazy=True, extras=True, weight_decay=0.1)
        args = case.make(torch.float32, device=DEVICE[backend])
        got = run(args, backend=backend)
        codes = args["indices"][0][args["values"][0] != 0].long()
        asleep = torch.ones(200, dtype=torch.bool)
        asleep[codes.cpu()] = False
        assert asleep.sum() > 150
        for name in ("w_enc", "w_dec", "b_enc", *MOMENTS, "row_step", "enc_copy", "dec_copy"):
            changed = (got[name] != args[name]).reshape(200, -1).any(1).cpu()
            assert not changed[asleep].any(), name
            assert changed[~asleep].all(), name

    @every_backend
    def test_zero_rows_stay_zero(self, backend: str) -> None:
        """A decoder row of zeros without momentum has no direction to be scaled to."""
        args = replace(UPDATE_CASES[0], k=0).make(torch.float32, device=DEVICE[backend])
        for name in ("w_dec", "dec_mean"):
            args[name][3] = 0.0
        got = run(args, backend=backend)["w_dec"]
        assert torch.equal(got[3], torch.zeros_like(got[3]))
        norms = got.norm(dim=1)
        others = torch.arange(len(norms), device=norms.device) != 3
        torch.testing.assert_close(norms[others], torch.ones_like(norms[others]))

    @every_backend
    def test_projection_leaves_no_component(self, backend: str) -> None:
        args = UPDATE_CASES[0].make(torch.float32, device=DEVICE[backend])
        args["dec_mean"].zero_()
        got = run(args, backend=backend)
        along = (got["dec_mean"] * args["w_dec"]).sum(1)
        assert (along.abs() <= 1e-6 * got["dec_mean"].norm(dim=1) + 1e-9).all()

    @every_backend
    def test_nan_stays_with_its_feature(self, backend: str) -> None:
        args = UPDATE_CASES[0].make(torch.float32, device=DEVICE[backend])
        args["dvalues"][0][2, 0] = float("nan")
        feature = int(args["indices"][0][2, 0])
        got = run(args, backend=backend)
        bad = got["w_enc"].isnan().any(1)
        assert bad.nonzero().flatten().tolist() == [feature]
        assert not got["w_dec"].isnan().any()


class TestTorch:
    @pytest.mark.parametrize("case", [UPDATE_CASES[i] for i in (1, 4, 5)], ids=lambda c: c.name)
    def test_opcheck(self, case: UpdateCase) -> None:
        args = case.make(torch.bfloat16)
        torch.library.opcheck(torch.ops.sidechain.sae_update_.default, tuple(args.values()))
        names = ("w_enc", "w_dec", "x", "b_pre", *COLUMNS)
        more = (True, args["project"], args["prefixes"], args["first_feature"])
        torch.library.opcheck(
            torch.ops.sidechain.sae_gradient_square.default, (*(args[k] for k in names), *more)
        )

    def test_autograd_notices_the_write(self) -> None:
        args = UPDATE_CASES[0].make(torch.float32)
        factor = torch.ones(1, requires_grad=True)
        loss = (args["w_dec"] * factor).sum()
        positional, keyword = public(args)
        sae_update_(*positional, **keyword)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("name", ["w_enc", "w_dec", "b_enc", "x"])
    def test_gradient_is_refused(self, name: str) -> None:
        args = UPDATE_CASES[0].make(torch.float32)
        args[name].requires_grad_()
        positional, keyword = public(args)
        with pytest.raises(NotImplementedError, match="sparse_decode is differentiable"):
            sae_update_(*positional, **keyword)
        with torch.no_grad():
            sae_update_(*positional, **keyword)


F64 = torch.zeros(1).double()
BAD = [
    ({"w_dec": 3}, TypeError, "expected w_dec to be a tensor, got int"),
    ({"w_enc": torch.zeros(69, 48)}, ValueError, r"w_enc of shape \[70, d_in\] \(F of w_dec\)"),
    ({"w_enc": torch.zeros(70, 48).half()}, TypeError, "w_enc of float32, got float16"),
    ({"w_enc": torch.zeros(140, 48)[::2]}, ValueError, "expected w_enc to be contiguous"),
    ({"enc_mean": torch.zeros(70, 48).half()}, TypeError, "enc_mean of float32 | bfloat16"),
    ({"dec_mean": torch.zeros(70, 48).bfloat16()}, TypeError, "dec_mean of float32, got bfloat16"),
    ({"dec_square": torch.zeros(70, 47)}, ValueError, r"dec_square of shape \[70, 48\]"),
    ({"bias_mean": None}, ValueError, "bias_mean to be given exactly when b_enc is, got None"),
    ({"b_enc": None}, ValueError, "exactly when b_enc is, got a tensor"),
    ({"x": torch.zeros(24, 47)}, ValueError, r"x of shape \[N, 48\] \(d_in of w_enc\)"),
    ({"b_pre": torch.zeros(49)}, ValueError, r"b_pre of shape \[48\]"),
    ({"values": [torch.zeros(24, 6).double()]}, TypeError, r"codes\[0\].values of float32"),
    ({"values": [torch.zeros(23, 6)]}, ValueError, r"codes\[0\].values of shape \[24, K\]"),
    ({"indices": [torch.zeros(24, 5).int()]}, ValueError, r"codes\[0\].indices of shape"),
    ({"dvalues": [torch.zeros(24, 5)]}, ValueError, r"codes\[0\].dvalues of shape \[24, 6\]"),
    ({"error": [torch.zeros(2, 24, 48)]}, ValueError, r"codes\[0\].error of shape \[24, 48\]"),
    ({"row_weight": [torch.zeros(23)]}, ValueError, r"codes\[0\].row_weight of shape \[24\]"),
    ({"prefixes": [10, 70]}, ValueError, r"codes\[0\].error of shape \[2, 24, 48\]"),
    ({"prefixes": [10, 10, 70]}, ValueError, "expected ascending prefixes that end at 70"),
    ({"prefixes": [10, 69]}, ValueError, "expected ascending prefixes that end at 70"),
    ({"prefixes": list(range(60, 77))}, ValueError, "expected at most 16 prefixes, got 17"),
    ({"first_feature": -1}, ValueError, "expected first_feature >= 0, got -1"),
    ({"lr": torch.tensor(0.1)}, ValueError, r"lr of shape \[1\] .*got \[\]"),
    ({"lr": F64}, TypeError, "lr of float32, got float64"),
    ({"step": torch.ones(1)}, TypeError, "step of int64, got float32"),
    ({"beta2": 1.0}, ValueError, r"expected 0 <= betas\[1\] < 1, got 1.0"),
    ({"eps": -1.0}, ValueError, "expected 0 <= eps < inf, got -1.0"),
    ({"weight_decay": float("nan")}, ValueError, "expected 0 <= weight_decay < inf, got nan"),
    ({"clip_scale": torch.ones(2)}, ValueError, r"clip_scale of shape \[1\]"),
    ({"last_fired": torch.zeros(70)}, TypeError, "last_fired of int64, got float32"),
    ({"row_step": torch.zeros(71).long()}, ValueError, r"row_step of shape \[70\]"),
    ({"enc_copy": torch.zeros(70, 48)}, TypeError, "enc_copy of bfloat16 | float16"),
    ({"b_pre_grad": torch.zeros(47)}, ValueError, r"b_pre_grad of shape \[48\]"),
    ({"grad_square": torch.zeros(1, device="meta")}, RuntimeError, "expected grad_square on cpu"),
]


class TestContract:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[b[2][:40] for b in BAD])
    def test_bad_calls(
        self, change: dict[str, Any], error: type[Exception], match: str, backend: str
    ) -> None:
        args = UPDATE_CASES[0].make(torch.float32)
        before = {k: copy(v) for k, v in args.items()}
        positional, keyword = public(args | change)
        with pytest.raises(error, match="^sae_update_: .*" + match):
            sae_update_(*positional, **keyword, backend=backend)
        for name in WRITTEN:
            if args[name] is not None:
                assert torch.equal(args[name], before[name]), f"{name} was written"

    def test_no_codes(self) -> None:
        (*weights, moments, x, codes), keyword = public(UPDATE_CASES[0].make(torch.float32))
        with pytest.raises(ValueError, match="sae_update_: expected at least one SaeCodes"):
            sae_update_(*weights, moments, x, [], **keyword)
        with pytest.raises(ValueError, match="expected at most 4 groups of codes, got 5"):
            sae_update_(*weights, moments, x, codes * 5, **keyword)
        with pytest.raises(TypeError, match="expected codes of SaeCodes, got Tensor"):
            sae_update_(*weights, moments, x, [x], **keyword)
        with pytest.raises(TypeError, match="expected moments to be SaeMoments, got tuple"):
            sae_update_(*weights, (), x, codes, **keyword)

    def test_absent_backend(self) -> None:
        positional, keyword = public(UPDATE_CASES[0].make(torch.float32))
        with pytest.raises(RuntimeError, match="expected backend 'triton' to be available, got:"):
            sae_update_(*positional, **keyword, backend="triton")
