# SPDX-License-Identifier: Apache-2.0
"""Capture of attention maps: how much each token of the latents reads from each token of a text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import _device
from ..ops import Capture as Buffers
from ..pipelines import Generation, Site, token_grid
from . import options
from .capture import Capture
from .layout import Expected
from .operations import Inside, Operation
from .options import Where
from .processor import inner_processor
from .recording import KeptCall, Labels, Recorded, gather

#: Where the text stands in the one sequence that joint attention runs over, by processor.
TEXT_PLACE = {"JointAttnProcessor2_0": "last", "FluxAttnProcessor": "first"}
#: Processors whose output is a sum of several attentions over the text, with their signs.
SIGNS = {"StableAudio3CrossAttnProcessor": (1.0, -1.0)}

# Scores held at once: 16 MiB in float32. One block of an SDXL site of 4096 tokens.
BLOCK = 1 << 22


class Scores(NamedTuple):
    """What one softmax attention computes its probabilities from.

    Attributes:
        query: [R, H, T, D].
        key: [R, Hkv, S, D].
        mask: True = may be read, or a number to add; broadcast to [R, H, T, S]. None = all.
        scale: of the scores; None = 1 / sqrt(D).
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None = None
    scale: float | None = None


_attention = F.scaled_dot_product_attention  # itself, whatever replaces it in the module later


class _Calls(TorchFunctionMode):
    """Notes what `scaled_dot_product_attention` is given; every call runs as it would."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Scores] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _attention:
            self._note(*args, **kwargs)
        return func(*args, **kwargs)

    def _note(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        if is_causal:
            raise NotImplementedError(
                "capture: expected attention that is not causal [reduce='maps'], got is_causal=True"
            )
        self.found.append(Scores(query, key, attn_mask, scale))


def add_attention_(
    total: Tensor, scores: Scores, text: slice = slice(None), sign: float = 1.0, block: int = BLOCK
) -> Tensor:
    """Add attention probabilities, mean over heads, without holding [R, H, T, S] at once.

    total[r, t, s] += sign / H sum_h p[r, h, t, text][s], with
    p[r, h, t] = softmax_s(scale <query[r, h, t], key[r, h // (H / Hkv), s]> + mask[r, h, t, s]) in
    float32 (float64 for such queries); a query that may read no token gives zeros.

    Args:
        total: [R, T, S] of `text`, float32. Written in place.
        scores: queries, keys, mask and scale.
        text: the keys that are added up; the softmax runs over all of them.
        sign: factor of what is added.
        block: scores held at once, at least those of one query in all heads.

    Returns:
        total.
    """
    query, key, mask, scale = scores
    rows, heads, tokens, width = query.shape
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    if mask is not None:
        mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    fit = max(1, block // (heads * key.shape[2]))  # queries
    high, wide = max(1, fit // max(tokens, 1)), min(fit, tokens)  # rows and tokens of a block
    with torch.autocast(query.device.type, enabled=False):
        for row in range(0, rows, high):
            there = slice(row, row + high)
            keys = key[there].detach().to(dtype)
            keys = keys.repeat_interleave(heads // keys.shape[1], 1).transpose(2, 3)
            for token in range(0, tokens, wide):
                here = slice(token, token + wide)
                p = (query[there, :, here].detach().to(dtype) * scale) @ keys
                p = _softmax(p, None if mask is None else _part(mask, there, here))
                total[there, here].add_(p[..., text].mean(1), alpha=sign)
    return total


def _part(mask: Tensor, rows: slice, tokens: slice) -> Tensor:
    mask = mask if mask.shape[0] == 1 else mask[rows]
    return mask if mask.shape[2] == 1 else mask[:, :, tokens]


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    else:
        scores = scores + mask.detach()
    unreadable = scores.amax(-1, keepdim=True) == -math.inf
    return scores.softmax(-1).masked_fill(unreadable, 0.0)


class MapRecord(Inside):
    """Adds up the attention probabilities of one site.

    Attributes:
        recording: whether the step is one of the window.
        context: S, the tokens of the text.
        slot: place of the denoiser call in the buffers.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        processor = type(inner_processor(site.module)).__name__
        self.recording = False
        self.context = 0
        self.slot = 0
        self._processor = processor
        several = getattr(site.module, "use_differential", False)
        self._signs = SIGNS.get(processor, (1.0,)) if several else (1.0,)
        self._text = TEXT_PLACE[processor] if site.kind == "joint" else None

    def watch(self) -> contextlib.AbstractContextManager[Any] | None:
        """Return what notes the attention of a call."""
        return self._watching() if self.mark() and self.recording else None

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        with _Calls() as calls:
            yield
        self._add(calls.found)

    def attended(self, query: Tensor, key: Tensor) -> None:
        """Add the attention of queries [R, T, H, D] to keys [R, S, Hkv, D]."""
        if self.mark() and self.recording:
            self._add([Scores(query.transpose(1, 2), key.transpose(1, 2))])

    def _add(self, calls: list[Scores]) -> None:
        expected, sums, counts = self.expected, self.buffers.sums, self.buffers.counts
        if expected is None or sums is None or counts is None:
            return  # before the first denoiser call of a generation
        if _device.capturing():
            raise NotImplementedError(
                "capture: expected an eager denoiser call [reduce='maps' decides on the host which "
                "steps are added], got one that is captured into a CUDA graph"
            )
        if len(calls) != len(self._signs):
            raise RuntimeError(
                f"capture: expected {len(self._signs)} scaled_dot_product_attention in "
                f"{self._processor} at {expected.site} [reduce='maps' reads queries and keys "
                f"there], got {len(calls)}: maps need processors and attention backends of PyTorch"
            )
        for call in calls:
            self._check(call, expected.site, expected.tokens)
        with torch.no_grad():
            for call, sign in zip(calls, self._signs, strict=True):
                self._add_one(call, sums[self.slot], expected, sign)
            counts[self.slot] += 1

    def _add_one(self, call: Scores, total: Tensor, expected: Expected, sign: float) -> None:
        site, tokens = expected.site, expected.tokens
        start = {"first": self.context, "last": 0, None: 0}[self._text]
        queries = range(start, start + tokens)[self.tokens or slice(None)]
        here = slice(queries.start, queries.stop, queries.step)
        rows = slice(None) if self.rows is None else self.rows
        mask = call.mask
        if mask is not None:
            mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
            mask = _part(mask, rows, here)
        first = tokens if self._text == "last" else 0
        text = slice(first, first + self.context)
        cut = Scores(call.query[rows, :, here], call.key[rows], mask, call.scale)
        if len(cut.query) != len(total):
            raise RuntimeError(
                f"capture: expected attention of {len(total)} rows at {site} [captured in this "
                f"generation], got {len(cut.query)}"
            )
        add_attention_(total, cut, text, sign)

    def _check(self, call: Scores, site: str, tokens: int) -> None:
        extra = self.context if self._text else 0
        keys = self.context + (tokens if self._text else 0)
        found = (call.query.shape[2], call.key.shape[2])
        if call.query.dim() != 4 or found != (tokens + extra, keys):
            raise RuntimeError(
                f"capture: expected attention of {tokens + extra} tokens to {keys} at {site} [what "
                f"its family says of this generation], got {found[0]} to {found[1]}"
            )


class MapCapture(Capture):
    """Attention to each token of the text, mean over heads and over the steps of the window.

    `cap[site]` is [branches, B, T, S], float32 unless asked otherwise. Queries and keys are those
    that the model gives to its attention (after norms and rotary embeddings, with its mask), and
    the probabilities are computed again from them in float32, in blocks over tokens. Over the
    tokens of a cross-attention context they sum to one; in joint attention they are the part of
    the softmax over text and image that goes to the text. Differential attention (Stable Audio 3)
    gives the difference of its two softmaxes, which may be negative.

    The result of the pipeline does not change by a bit.
    """

    def __init__(self, pipe: Any, where: Where, reduce: str, dtype: torch.dtype) -> None:
        super().__init__(pipe, where, reduce, dtype)
        if isinstance(self._tokens, Tensor):
            raise NotImplementedError(
                "capture: expected a slice of tokens with reduce='maps', got a mask"
            )
        for site in self.sites:
            if not site.is_attention or site.kind == "self":
                what = "self-attention" if site.is_attention else f"a {site.kind}"
                raise ValueError(
                    f"capture: expected cross-attention or joint attention [reduce='maps' shows "
                    f"where a text is read], got {site}, which is {what}"
                )
            processor = type(inner_processor(site.module)).__name__
            if site.kind == "joint" and processor not in TEXT_PLACE:
                raise NotImplementedError(
                    f"capture: expected one of the processors {', '.join(TEXT_PLACE)} at {site} "
                    f"[which say where the text stands in joint attention], got {processor}"
                )

    def map(
        self,
        site: str | Site | int,
        token: int | Sequence[int],
        *,
        branch: str = "cond",
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Return where some tokens of the text are looked at from.

        Args:
            site: of the map.
            token: place in the context, or several (`token_places`), whose shares are added up.
            branch: guidance branch.
            grid: (h, w) of the tokens of the site. None = as the shape of the latents says, where
                it does.

        Returns:
            [B, h, w], or [B, T] where the tokens are no grid or only some were captured.

        Raises:
            ValueError: a token, branch or grid that the map has not.
        """
        found, chosen = self[site], self.sites[site]
        if branch not in self.branches:
            raise ValueError(
                f"capture: expected branch to be one of {', '.join(self.branches)} [captured], got "
                f"{branch!r}"
            )
        length = found.shape[-1]
        places = [token] if isinstance(token, int) else list(token)
        if not places or not all(0 <= place < length for place in places):
            raise ValueError(
                f"capture: expected tokens within [0, {length}) [of the context of {chosen}], got "
                f"{token}"
            )
        read = found[self.branches.index(branch)][..., places].sum(-1)
        if grid is None and self._tokens is None and self._generation is not None:
            grid = token_grid(chosen, self._generation.shape, read.shape[1])
        if grid is None:
            return read
        if math.prod(grid) != read.shape[1]:
            raise ValueError(
                f"capture: expected a grid of {read.shape[1]} tokens [of {chosen}], got {grid}"
            )
        return read.unflatten(1, grid)

    @property
    def _per_step(self) -> bool:
        return False

    def _mean(self, found: Buffers) -> Tensor:
        if found.sums is None or found.counts is None:
            raise RuntimeError("capture: expected sums and counts of maps, got none")
        return found.sums / found.counts[..., None, None]

    def _operations_at(self, site: Site) -> list[Operation]:
        return [MapRecord(site)]

    def _shapes(
        self, site: Site, generation: Generation, rows: int, calls: int
    ) -> dict[str, tuple[int, ...]]:
        tokens = None if isinstance(self._tokens, Tensor) else self._tokens
        kept = options.count_tokens("capture", tokens, site, generation)
        # One sum for each denoiser call of a step.
        sums = (calls, rows, kept, generation.context_tokens(site))
        return {"sums": sums, "counts": (calls, rows)}

    def _current(self) -> Recorded:
        if self._generation is None:
            raise RuntimeError("capture: expected at least one pipeline call, got none")
        kept = self._calls_kept()
        # The labels alone: buffers of maps have no steps.
        bare = {id(call.layout): replace(call.layout, buffers={}) for call in kept}
        ran = [replace(call, layout=bare[id(call.layout)]) for call in kept]
        labels, _ = gather(ran, self._generation, self._span, False)
        calls = list({(id(call.layout), call.call): call for call in kept}.values())
        return labels, {site.name: self._added_up(site, labels, calls) for site in self.sites}

    @staticmethod
    def _added_up(site: Site, labels: Labels, calls: Sequence[KeptCall]) -> Buffers:
        """Gather what the calls of a step, and calls of other shapes, have added up at a site."""
        total: dict[str, Tensor] = {}
        for kept in calls:
            slot, found = kept.layout.slot(0, kept.call), kept.layout.buffers[site.name]
            for branch in kept.branches:
                place = labels.branches.index(branch) * labels.samples
                for name in ("sums", "counts"):
                    part = getattr(found, name)[slot, kept.layout.rows(kept.call, branch)]
                    if name not in total:
                        rows = len(labels.branches) * labels.samples
                        total[name] = part.new_zeros(1, rows, *part.shape[1:])
                    total[name][0, place : place + labels.samples] += part
        return Buffers(**total)

    def _bind(self, generation: Generation) -> tuple[str, ...]:
        options.refuse_compiled("capture", self.pipe, "reduce='maps' decides on the host")
        branches = super()._bind(generation)
        for site, record in self._maps():
            record.context = generation.context_tokens(site)
        return branches

    def _advance(self, step: int, call: int, inside: bool) -> None:
        super()._advance(step, call, inside)
        if self._generation is None:
            return
        slot = self._layouts[self._generation.shape].slot(0, call)
        for _, record in self._maps():
            record.recording, record.slot = inside and slot >= 0, slot

    def _maps(self) -> Iterator[tuple[Site, MapRecord]]:
        for site in self.sites:
            for operation in self._operations[site.name]:
                if isinstance(operation, MapRecord):
                    yield site, operation


Capture.reductions["maps"] = MapCapture
