# SPDX-License-Identifier: Apache-2.0
"""Training of every architecture written out densely: plain autograd and `torch.optim.AdamW`.

Nothing of the package's training code is used; only its settings are read.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def planted(rows, d=24, features=48, active=3, *, seed=0, noise=0.01):
    """Rows that are sparse positive sums of unit directions; returns rows and directions."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(features, d, generator=g)
    directions /= directions.norm(dim=1, keepdim=True)
    scores = torch.rand(rows, features, generator=g)
    chosen = scores.topk(active, 1).indices
    weight = torch.zeros(rows, features).scatter(
        1, chosen, 1 + torch.rand(rows, active, generator=g)
    )
    x = weight @ directions
    return x + noise * torch.randn(rows, d, generator=g), directions


class DenseTrainer:
    """Trains the weights of a `TrainState` in dense float64 (or float32, as the eager form)."""

    def __init__(self, state, dtype=torch.float64):
        self.config, self.train = state.config, state.train
        self.p = {
            n: nn.Parameter(t.to(dtype, copy=True))
            for n, t in state.weights.items()
            if n != "threshold"
        }
        self.threshold = None
        if self.config.architecture == "jumprelu":
            self.p["log_threshold"] = nn.Parameter(state.weights["threshold"].to(dtype).log())
        self.b_pre = torch.zeros(self.config.d_in, dtype=dtype)
        self.d_out = self.p["b_dec"].shape[0]
        special = ("w_enc", "w_dec", "log_threshold")
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [self.p["w_enc"], self.p["w_dec"]]},
                {
                    "params": [v for n, v in self.p.items() if n not in special],
                    "weight_decay": 0.0,
                },
                {
                    "params": [v for n, v in self.p.items() if n == "log_threshold"],
                    "weight_decay": 0.0,
                },
            ],
            betas=self.train.betas,
            eps=self.train.eps,
            weight_decay=self.train.weight_decay,
        )
        self.steps = 0
        self.integral = self.logarithm = None
        self.last_fired = torch.zeros(self.config.features, dtype=torch.int64)
        self.dead = torch.zeros(self.config.features, dtype=bool)

    def lr(self):
        t, total = self.steps, self.train.tokens // self.train.batch
        base, warm = self.train.lr, round(self.train.warmup * total)
        if t < warm:
            return base * (t + 1) / warm
        return base * min(1.0, (total - t) / (self.train.decay_share * total))

    def k(self):
        start, total = self.train.k_start, self.train.tokens // self.train.batch
        if start is None:
            return self.config.k
        share = min(1.0, self.steps / (self.train.k_anneal * total))
        return round(start + (self.config.k - start) * share)

    def sparsity(self):
        total = self.train.tokens // self.train.batch
        if self.train.l0:
            if self.integral is None:
                value = self.d_out / self.train.l0
                jump = 0.06 if self.train.penalty == "tanh" else 0.2
                named = self.config.architecture == "jumprelu"
                self.integral = self.logarithm = math.log(jump * value if named else value**0.5)
            return math.exp(self.logarithm)
        return self.train.sparsity * min(
            1.0, (self.steps + 1) / (self.train.sparsity_warmup * total)
        )

    def pre(self):
        return self.p["b_dec"] if self.config.tied_bias else self.b_pre

    def loss(self, x, target):
        n, d = x.shape[0], target.shape[1]
        name = self.config.architecture
        z = (x - self.pre()) @ self.p["w_enc"].T + self.p["b_enc"]
        extra = 0.0
        if name in ("topk", "batch_topk", "matryoshka"):
            v = self.selected(z, self.k())
        elif name == "relu":
            v = z.relu()
            extra = self.sparsity() * (v * self.p["w_dec"].norm(dim=1)).sum()
        elif name == "jumprelu":
            v, extra = self.jumprelu(z)
        else:
            v, extra = self.gated(x, target)
        x_hat = v @ self.p["w_dec"] + self.p["b_dec"]
        squares = (x_hat - target).square().sum()
        if name == "matryoshka":
            nested = [
                (v[:, :m] @ self.p["w_dec"][:m] + self.p["b_dec"] - target).square().sum()
                for m in self.config.prefixes
            ]
            squares = sum(nested) / len(nested)
        if self.train.multi_k:
            wide = self.selected(z, self.train.multi_k) @ self.p["w_dec"] + self.p["b_dec"]
            squares = squares + self.train.multi_weight * (wide - target).square().sum()
        squares = squares + self.auxiliary(z, (target - x_hat).detach())
        return (squares + extra) / (n * d), v.detach()

    def selected(self, z, k):
        if self.config.architecture == "topk":
            keep = torch.zeros_like(z).scatter(1, z.topk(k, 1).indices, 1.0)
        else:
            keep = torch.zeros_like(z).flatten()
            keep[z.flatten().topk(k * len(z)).indices] = 1.0
            keep = keep.view_as(z)
        v = z.relu() * keep
        if self.config.architecture != "topk":
            self.smallest = v[v > 0].min().detach()
        return v

    def auxiliary(self, z, residual):
        k, count = self.train.aux_k, int(self.dead.sum())
        if not k or not count:
            return 0.0
        masked = torch.where(self.dead, z, -math.inf)
        keep = torch.zeros_like(z).scatter(1, masked.topk(min(k, count), 1).indices, 1.0)
        x_hat = (torch.where(self.dead, z, 0.0).relu() * keep) @ self.p["w_dec"]
        weight = self.train.aux_weight * min(1.0, count / k)
        return weight * (x_hat - residual).square().sum()

    def jumprelu(self, z):
        threshold, width = self.p["log_threshold"].exp(), self.train.bandwidth
        v = Rectangle.apply(z, threshold, width, "value")
        if self.train.penalty == "l0":
            return v, self.sparsity() * Rectangle.apply(z, threshold, width, "count").sum()
        lengths = self.p["w_dec"].norm(dim=1)
        extra = self.sparsity() * torch.tanh(4 * v * lengths).sum()
        return v, extra + self.train.pre_act * ((threshold - z).relu() * lengths).sum()

    def gated(self, x, target):
        projected = (x - self.pre()) @ self.p["w_enc"].T
        gate = projected + self.p["b_gate"]
        v = (gate > 0) * (self.p["r_mag"].exp() * projected + self.p["b_enc"]).relu()
        frozen = gate.relu() @ self.p["w_dec"].detach() + self.p["b_dec"].detach()
        extra = self.sparsity() * (gate.relu() * self.p["w_dec"].norm(dim=1)).sum()
        return v, extra + (frozen - target).square().sum()

    def step(self, x, target=None):
        target = x if target is None else target
        total = self.train.dead_every
        if self.steps and self.steps % total == 0:
            rows = (self.steps - self.last_fired) * self.train.batch
            self.dead = rows >= self.train.dead_tokens
        self.optimiser.zero_grad()
        loss, v = self.loss(x, target)
        loss.backward()
        w = self.p["w_dec"]
        if self.config.unit_norm:
            along = (w.grad * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
            w.grad -= (along * w).detach()
        if self.train.clip:
            norm = torch.cat([p.grad.flatten() for p in self.p.values()]).norm()
            for p in self.p.values():
                p.grad *= (self.train.clip / norm).clamp(max=1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr()
        self.optimiser.param_groups[-1]["lr"] *= (self.train.threshold_lr or 1) / self.train.lr
        self.optimiser.step()
        with torch.no_grad():
            if self.config.unit_norm:
                w /= w.norm(dim=1, keepdim=True)
            if self.config.architecture in ("batch_topk", "matryoshka"):
                decay = min(self.train.threshold_decay, (1 + self.steps) / (10 + self.steps))
                before = self.smallest if self.threshold is None else self.threshold
                self.threshold = decay * before + (1 - decay) * self.smallest
        if self.train.l0:
            error = math.log(float((v > 0).sum()) / len(x) / self.train.l0)
            error = min(1.0, max(-1.0, error))
            self.integral += min(0.05, 20 * self.train.batch / self.train.tokens) * error
            self.logarithm = self.integral + 2 * error
        self.steps += 1
        self.last_fired[(v > 0).any(0)] = self.steps
        return float(loss.detach())

    def weights(self):
        found = {n: p.detach() for n, p in self.p.items()}
        if "log_threshold" in found:
            found["threshold"] = found.pop("log_threshold").exp()
        if self.threshold is not None:
            found["threshold"] = self.threshold
        return found


class Rectangle(torch.autograd.Function):
    """JumpReLU or the count of active features, with the kernel estimate for the threshold."""

    @staticmethod
    def forward(ctx, z, threshold, width, kind):
        ctx.save_for_backward(z, threshold)
        ctx.width, ctx.kind = width, kind
        active = (z > threshold).to(z.dtype)
        return z * active if kind == "value" else active

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        kernel = (((z - threshold) / ctx.width).abs() < 0.5).to(z.dtype) / ctx.width
        factor = threshold if ctx.kind == "value" else 1.0
        dz = grad * (z > threshold) if ctx.kind == "value" else None
        return dz, (-factor * kernel * grad).sum(0), None, None
