# SPDX-License-Identifier: Apache-2.0
"""cache_context: keys and values of a text once a generation, for all rows that see that text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _device
from ..ops import attention_tap
from ..pipelines import Generation, Site, SitePattern, sites
from .base import Tap
from .heads import HeadRecord, Place
from .maps import MapRecord
from .operations import Attend, Inside, Operation
from .options import refuse_compiled, reuse
from .processor import inner_processor

#: Processors whose cross-attention is softmax(q k^T / sqrt(D)) v, with optional norms of q and k.
PLAIN_PROCESSORS = ("AttnProcessor2_0", "StableAudioAttnProcessor2_0")


class CachedAttention(Attend):
    """Cross-attention of one site over a bank of keys and values.

    The bank holds one entry for every different context among the rows, so rows of a sweep that
    see the same text share it, and it is kept for as long as the contexts stay the same. A context
    of zeros has zero values where `to_v` has no bias: such rows (the unconditional ones of many
    audio models) put out the bias of `to_out` and nothing is computed for them.
    """

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self._attn = attn
        self._made_with: tuple[tuple[int, int], ...] = ()
        self._seen: Tensor | None = None  # [R, S, C] that the bank was made from
        # Filled again by the next generation where sizes stay: a CUDA graph finds them in place.
        self._changed = torch.zeros(0)  # [1] bool on the device: `_seen` has gone stale
        self._context = torch.zeros(0)  # memory of `_seen`
        self._keys = torch.zeros(0)  # [M, S, Hkv, D]
        self._values = torch.zeros(0)
        self._entry = torch.zeros(0)  # [A] int32: entry of the bank for each active row
        self._active: slice | Tensor | None  # rows that see any text; None = all

    def reset(self) -> None:
        """Forget the bank: a new generation begins."""
        self._seen = None

    @property
    def stale(self) -> bool:
        """Tell whether the contexts of a generation changed unnoticed; reads one value back."""
        return self._seen is not None and bool(self._changed)

    def __call__(self, hidden: Tensor, context: Tensor, inside: list[Inside]) -> Tensor:
        """Attend from `hidden` [R, T, C] to the context [R, S, C]; returns [R, T, C]."""
        self._refresh(context)
        out_projection, dropout = self._attn.to_out
        if self._active is None:
            return dropout(out_projection(self._attend(hidden, inside)))
        bias = out_projection.bias
        out = hidden.new_zeros(hidden.shape) if bias is None else bias.expand(hidden.shape).clone()
        if self._entry.numel() or inside:
            out[self._active] = out_projection(self._attend(hidden, inside))
        return dropout(out)

    def _attend(self, hidden: Tensor, inside: list[Inside]) -> Tensor:
        """Return what the heads of the active rows put out, [A, T, H D]."""
        attn, place = self._attn, Place(self._active, hidden.shape[0])
        query = attn.to_q(hidden if self._active is None else hidden[self._active])
        query = query.unflatten(-1, (attn.heads, -1))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        heads = [o for o in inside if isinstance(o, HeadRecord)]
        # The first of them is fed by the kernel itself.
        captured = heads[0].buffers_at(place) if heads and heads[0].mark() else None
        out = attention_tap(
            query, self._keys, self._values, context_index=self._entry, capture=captured
        ).flatten(2)
        for record in heads:
            if record is not heads[0]:
                record(place.all_rows(out))
            elif captured is None:
                record.take(place.all_rows(out))
            else:
                record.count_silent(place, out)
        for seen in inside:
            if isinstance(seen, MapRecord):
                keys = self._keys.index_select(0, self._entry)
                # Keys of a silent row are all alike: zeros give the same even attention.
                seen.attended(place.all_rows(query), place.all_rows(keys))
        return out

    def _weights(self) -> tuple[tuple[int, int], ...]:
        """Return what tells whether the projections have changed.

        Raises:
            NotImplementedError: a projection that is not a plain linear layer (LoRA, quantised
                weights): what it computes may change from one step to the next.
        """
        attn, found = self._attn, []
        for name in ("to_k", "to_v"):
            layer = getattr(attn, name)
            if type(layer) is not torch.nn.Linear:
                raise NotImplementedError(
                    f"cache_context: expected a plain Linear as {name} [keys and values are kept "
                    f"over the steps], got {type(layer).__module__}.{type(layer).__name__}: fuse "
                    "adapters into the weights, or generate without"
                )
            found += [(id(p), p._version) for p in (layer.weight, layer.bias) if p is not None]
        return tuple(found)

    def _refresh(self, context: Tensor) -> None:
        """Keep the bank while contexts and weights stay as they were, else make it anew."""
        weights = self._weights()
        seen = self._seen if weights == self._made_with else None
        self._made_with = weights
        if seen is not None and seen.shape == context.shape:
            if seen.device.type == "cpu":
                if torch.equal(seen, context):
                    return
            else:
                # Nothing is read back here: the verdict is read once, when the generation is over.
                self._changed |= (seen != context).any()
                return
        if _device.capturing():
            raise RuntimeError(
                "cache_context: expected one eager call of the generation before a CUDA graph is "
                "captured [keys and values are made there], got it within the capture"
            )
        # Memory made in inference mode could not be filled outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            self._seen = self._context = reuse(self._context, context)
            unchanged = torch.zeros(1, dtype=torch.bool, device=context.device)
            self._changed = reuse(self._changed, unchanged)
            self._fill(self._seen)

    def _fill(self, context: Tensor) -> None:
        attn = self._attn
        entries, entry = torch.unique(context, dim=0, return_inverse=True)
        silent = (entries == 0).flatten(1).all(1)[entry] & (attn.to_v.bias is None)
        self._active = None
        if bool(silent.any()):
            rows = (~silent).nonzero()[:, 0]
            count = rows.numel()
            block = count > 0 and int(rows[-1]) - int(rows[0]) + 1 == count
            self._active = slice(int(rows[0]), int(rows[-1]) + 1) if block else rows
            entry = entry[rows]
        self._entry = reuse(self._entry, entry.int())
        width = attn.to_q.out_features // attn.heads
        keys = attn.to_k(entries).unflatten(-1, (-1, width))
        if attn.norm_k is not None:
            keys = attn.norm_k(keys)
        self._keys = reuse(self._keys, keys)
        self._values = reuse(self._values, attn.to_v(entries).unflatten(-1, (-1, width)))


class CachedContext(Tap):
    """Sites that share keys and values of the context; made by `cache_context`."""

    name = "cache_context"

    def __init__(self, pipe: Any, sites_: SitePattern) -> None:
        super().__init__(pipe, sites(pipe, sites_, kind="cross"), None)
        for site in self.sites:
            self._check(site)

    @staticmethod
    def _check(site: Site) -> None:
        attn: Any = site.module
        kind = type(inner_processor(attn)).__name__
        if kind not in PLAIN_PROCESSORS:
            raise NotImplementedError(
                f"cache_context: expected one of the processors {', '.join(PLAIN_PROCESSORS)} at "
                f"{site} [whose arithmetic is known], got {kind}"
            )
        odd = {
            "a context norm": attn.norm_cross is not None,
            "a group norm": attn.group_norm is not None,
            "a spatial norm": attn.spatial_norm is not None,
            "a residual connection": attn.residual_connection,
            "a rescaled output": attn.rescale_output_factor != 1.0,
            "fused projections": getattr(attn, "fused_projections", False),
            "heads wider than 128": attn.to_q.out_features // attn.heads > 128,
        }
        for what, present in odd.items():
            if present:
                raise NotImplementedError(
                    f"cache_context: expected plain attention at {site}, got {what}"
                )

    def _operations_at(self, site: Site) -> list[Operation]:
        return [CachedAttention(site.module)]

    def _bind(self, generation: Generation) -> tuple[str, ...]:
        refuse_compiled("cache_context", self.pipe, "which texts are equal is read on the host")
        for site in self.sites:
            for cached in self._cached_at(site):
                cached.reset()
        return generation.branches

    def _advance(self, step: int, call: int, inside: bool) -> None:
        pass

    def _finish(self) -> None:
        stale = [s.alias for s in self.sites for o in self._cached_at(s) if o.stale]
        if stale:
            raise RuntimeError(
                f"cache_context: expected the same context at every step of a generation [keys and "
                f"values are kept], got another one at {', '.join(stale)}"
            )

    def _cached_at(self, site: Site) -> list[CachedAttention]:
        return [o for o in self._operations[site.name] if isinstance(o, CachedAttention)]

    def _take_out(self) -> None:
        super()._take_out()
        self._finish()


def cache_context(pipe: Any, sites: SitePattern = "cross:*") -> CachedContext:
    """Compute keys and values of the text once a generation instead of once a step and row.

    Results equal those of the model's own processors up to the rounding of their matrix products.
    Rows of a batch that see the same context share one entry; rows whose context is zero are
    skipped where that makes their output constant. Combines with `patch`, `capture` and `steer`
    in any order: a patched row simply sees another entry.

    Args:
        pipe: diffusers pipeline.
        sites: cross-attention sites, see `SiteList.select`.

    Returns:
        A context manager (or handle: attach, remove).

    Raises:
        NotImplementedError: a processor whose arithmetic is not known, or an attention mask.
        RuntimeError: a context that changed during a generation on a device other than the CPU,
            where this is found out at the end; on the CPU the bank is made anew.

    Where gradients are wanted the model's own processors run.

    A CUDA graph captured after an eager call of the generation stays valid for later ones of the
    same shapes, with as many different texts and the same rows without text.
    """
    return CachedContext(pipe, sites)
