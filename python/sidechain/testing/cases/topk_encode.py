# SPDX-License-Identifier: Apache-2.0
"""Cases of ``topk_encode``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ops import Codes, Encoder, topk_encode


@dataclass(frozen=True)
class TopkEncodeCase:
    """One call of `topk_encode`: N rows of width d, F features, k kept."""

    rows: int
    width: int
    features: int
    k: int
    mode: str = "topk"
    threshold: str = "number"  # or "tensor", threshold mode only
    b_enc: bool = True
    b_pre: bool = True
    guess: int | None = None  # rows of the guess: 1 or N
    data: str = "random"  # or "planted", "ties", "outliers", "negative"
    what: str = "topk"

    @property
    def name(self) -> str:
        """Readable id: what-N-d-F-k."""
        return f"{self.what}-N{self.rows}-d{self.width}-F{self.features}-k{self.k}"

    def make(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Random arguments of `topk_encode`; the weights have the dtype of x, the biases float32.

        "planted": rows are sums of k dictionary rows and noise; "ties": small integers, so that
        many values are equal; "outliers": a few dimensions are 30 times larger; "negative": few
        or no positive activations.
        """
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(self.features, self.width, generator=g)
        w /= w.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        x = torch.randn(self.rows, self.width, generator=g)
        if self.data == "planted":
            code = torch.zeros(self.rows, self.features)
            active = torch.rand(self.rows, self.features, generator=g).topk(self.k).indices
            code.scatter_(1, active, 2.0 + torch.randn(active.shape, generator=g).abs())
            x = code @ w + 0.1 * x
        elif self.data == "ties":
            x, w = x.round(), (2.0 * w * self.width**0.5).round()
        elif self.data == "outliers":
            x[:, : max(1, self.width // 100)] *= 30.0
        args: dict[str, Any] = {"x": x.to(dtype), "w_enc": w.to(dtype), "mode": self.mode}
        shift = 4.0 if self.data == "negative" else 0.0
        if self.b_enc or shift:
            args["b_enc"] = 0.1 * torch.randn(self.features, generator=g) - shift
        if self.data == "ties" and self.b_enc:
            args["b_enc"] = args["b_enc"].round()
        if self.b_pre:
            b_pre = torch.randn(self.width, generator=g)
            args["b_pre"] = b_pre.round() if self.data == "ties" else b_pre
        if self.mode == "threshold":
            high = torch.linspace(-0.5, 2.0, self.features)
            args["threshold"] = 1.5 if self.threshold == "number" else high
        else:
            args["k"] = self.k
        if self.guess is not None:
            args["guess"] = torch.linspace(0.0, 4.0, self.guess)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


def encode_case(args: dict[str, Any], **options: Any) -> Codes:
    """Call `topk_encode` with the arguments that `TopkEncodeCase.make` returns, and more."""
    encoder = Encoder(args["w_enc"], args.get("b_enc"), args.get("b_pre"))
    rest = {name: value for name, value in args.items() if name not in Encoder._fields}
    return topk_encode(encoder=encoder, **rest, **options)


_plain = TopkEncodeCase(33, 64, 300, 8)
_wide = TopkEncodeCase(130, 160, 1000, 16)

TOPK_ENCODE_CASES = (
    _plain,
    replace(_plain, b_enc=False, b_pre=False, what="no-bias"),
    replace(_plain, width=37, features=251, k=5, what="odd"),
    replace(_plain, rows=1, width=1, features=1, k=1, what="one"),
    replace(_plain, rows=0, what="no-rows"),
    replace(_plain, rows=5, features=19, k=19, what="all-features"),
    replace(_plain, data="ties", features=500, what="ties"),
    replace(_plain, data="negative", what="few-positive"),
    replace(_wide, data="outliers", what="outliers"),
    replace(_wide, data="planted", width=96, what="planted"),
    replace(_wide, guess=1, what="one-guess"),
    replace(_wide, guess=130, what="row-guesses"),
    replace(_plain, mode="batch_topk", what="batch"),
    replace(_wide, mode="batch_topk", data="planted", what="batch-planted"),
    replace(_plain, mode="batch_topk", data="ties", what="batch-ties"),
    replace(_plain, mode="batch_topk", data="negative", what="batch-few-positive"),
    replace(_wide, mode="batch_topk", guess=1, what="batch-guess"),
    replace(_plain, mode="threshold", what="threshold"),
    replace(_wide, mode="threshold", threshold="tensor", what="thresholds"),
    replace(_plain, mode="threshold", data="ties", what="threshold-ties"),
    replace(_plain, mode="threshold", rows=0, what="threshold-no-rows"),
)

# Dictionaries of the language and image models that the trainers in the field are timed on.
TOPK_ENCODE_BENCH = (
    TopkEncodeCase(1024, 768, 12288, 32),
    TopkEncodeCase(1024, 1280, 5120, 10),
    TopkEncodeCase(1024, 2560, 10240, 64),
    TopkEncodeCase(1024, 768, 12288, 32, data="planted", what="planted"),
    TopkEncodeCase(1024, 768, 12288, 32, mode="batch_topk", what="batch"),
    TopkEncodeCase(16, 768, 12288, 32, what="few-rows"),
)
