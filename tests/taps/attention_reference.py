# SPDX-License-Identifier: Apache-2.0
"""Attention in float64 from what hooks see of a model's own projections: the oracle of maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import sidechain
from sidechain.testing import call_tiny

PROMPTS = ["a slow piano song", "fast rock with drums"]


def run(pipe: Any, **changes: Any) -> Tensor:
    """Two samples of a tiny pipeline."""
    return call_tiny(pipe, PROMPTS, seeds=(0, 1), **changes)


def split(x: Tensor, heads: int) -> Tensor:
    """[R, T, H D] to [R, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Give every query head its key head, [R, Hkv, S, D] to [R, H, S, D]."""
    return torch.stack([x[:, h // (heads // x.shape[1])] for h in range(heads)], 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbours (2i, 2i + 1) of [R, H, T, D] as complex numbers by angles of [T, D]."""
    turned = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.complex(cos, sin)[..., 0::2]
    return torch.view_as_real(turned).flatten(-2)


class Seen:
    """What went through the projections of one attention module, call by call, in float64."""

    def __init__(self, attn: Any) -> None:
        self.attn = attn
        self.calls: list[dict[str, Tensor]] = []

    def _normed(self, call: dict[str, Tensor], name: str, norm: str, heads: int) -> Tensor:
        x = split(call[name], heads)
        layer = getattr(self.attn, norm, None)
        if layer is None:
            return x
        weight = layer.weight.double()  # RMS norm over the width of a head
        return x * (x.square().mean(-1, keepdim=True) + layer.eps).rsqrt() * weight

    def queries_keys_values(self, call: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.attn.heads
        width = call["to_q"].shape[-1] // heads
        q = self._normed(call, "to_q", "norm_q", heads)
        k = self._normed(call, "to_k", "norm_k", call["to_k"].shape[-1] // width)
        v = split(call["to_v"], call["to_v"].shape[-1] // width)
        if "add_q_proj" in call:
            q = self._joined(q, self._normed(call, "add_q_proj", "norm_added_q", heads))
            k = self._joined(k, self._normed(call, "add_k_proj", "norm_added_k", heads))
            v = self._joined(v, split(call["add_v_proj"], heads))
        if "cos" in call:
            q, k = (rotated(x, call["cos"], call["sin"]) for x in (q, k))
        return q, repeated(k, heads), repeated(v, heads)

    def _joined(self, image: Tensor, text: Tensor) -> Tensor:
        first = type(self.attn).__name__ == "FluxAttention"
        return torch.cat([text, image] if first else [image, text], 2)

    def probabilities(self, call: dict[str, Tensor]) -> Tensor:
        """[R, H, T, S] over all that this call attended to."""
        q, k, _ = self.queries_keys_values(call)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if "mask" in call:
            scores = scores + call["mask"][:, None]  # [R, 1, S], added
        return scores.softmax(-1)

    def maps(self) -> Tensor:
        """Of each call the map from latents to text, mean over heads, [calls, R, T, S]."""
        found = []
        for call in self.calls:
            p = self.probabilities(call).mean(1)
            if "add_q_proj" in call:
                text, image = call["add_q_proj"].shape[1], call["to_q"].shape[1]
                first = type(self.attn).__name__ == "FluxAttention"
                p = p[:, text:, :text] if first else p[:, :image, image:]
            found.append(p)
        return torch.stack(found)

    def heads(self) -> Tensor:
        """Of each call what each head puts out for the latents, [calls, R, H, T, D]."""
        found = []
        for call in self.calls:
            out = self.probabilities(call) @ self.queries_keys_values(call)[2]
            if "add_q_proj" in call:
                text, image = call["add_q_proj"].shape[1], call["to_q"].shape[1]
                first = type(self.attn).__name__ == "FluxAttention"
                out = out[:, :, text:] if first else out[:, :, :image]
            found.append(out)
        return torch.stack(found)


PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


@contextmanager
def seen_at(pipe: Any, pattern: str) -> Iterator[dict[str, Seen]]:
    """Watch sites with plain hooks."""
    found: dict[str, Seen] = {}
    handles = []

    def begin(seen: Seen) -> Any:
        def call(module: Any, args: Any, kwargs: Any) -> None:
            new: dict[str, Tensor] = {}
            if kwargs.get("attention_mask") is not None:
                new["mask"] = kwargs["attention_mask"].double()
            if kwargs.get("image_rotary_emb") is not None and hasattr(module, "add_q_proj"):
                new["cos"], new["sin"] = (x.double() for x in kwargs["image_rotary_emb"])
            seen.calls.append(new)

        return call

    def note(seen: Seen, name: str) -> Any:
        return lambda module, args, out: seen.calls[-1].__setitem__(name, out.double())

    for site in sidechain.sites(pipe, pattern):
        seen = found[site.name] = Seen(site.module)
        handles.append(site.module.register_forward_pre_hook(begin(seen), with_kwargs=True))
        for name in PROJECTIONS:
            layer = getattr(site.module, name, None)
            if layer is not None:
                handles.append(layer.register_forward_hook(note(seen, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
