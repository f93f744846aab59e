# SPDX-License-Identifier: Apache-2.0
"""Host synchronisation found without a GPU: meta tensors stand for tensors on one.

A meta tensor has no values, so whatever wants one back shows itself. `waits_of` refuses, beside
that, the copies that would wait: from pageable memory, and to the host.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

META = torch.device("meta")
# Their result, or its size, has to come back to the host.
READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim",
    "aten::_unique2", "aten::unique_consecutive", "aten::bincount", "aten::equal",
    "aten::is_nonzero",
}  # fmt: skip
LISTS = "sidechain::topk_encode_ragged"  # its sizes depend on the data: it waits by contract


class HostWait(AssertionError):
    """Something would make the host wait for the device."""


class _Copies(TorchDispatchMode):
    def __init__(self, found: list[str], allowed: int) -> None:
        super().__init__()
        self.found, self.allowed = found, allowed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors) or kwargs.get("device") == META:
            if name == LISTS:
                return self._lists(args)
            if _waits(name, args, kwargs):
                self._refuse(name)
            if name == "aten::copy_" and not args[0].is_meta and args[1].is_meta:
                return args[0]  # to the host, not waited for
        return func(*args, **kwargs)

    def _refuse(self, name: str) -> None:
        self.found.append(name)
        if len(self.found) > self.allowed:
            raise HostWait(f"{name} waits for the device: {self.found}")

    def _lists(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Codes of as many entries as a full batch has."""
        self._refuse(LISTS)
        x, k = args[0], args[4]
        values = torch.empty(len(x) * k, device=META)
        offsets = torch.empty(len(x) + 1, dtype=torch.int64, device=META)
        return values, values.int(), offsets, offsets[:1]


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in READS:
        return True
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        found = [i for i in args[1] if i is not None]
        # A mask is turned into a list of unknown length, numbers on the host are copied.
        return any(i.dtype in (torch.bool, torch.uint8) or not i.is_meta for i in found)
    if name == "aten::copy_":
        free = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        return args[0].is_meta != args[1].is_meta and not free
    if name == "aten::_to_copy":
        to = torch.device(kwargs.get("device") or args[0].device)
        # What comes back is looked at: only a copy into memory that is there may be left alone.
        to_host = args[0].is_meta and to != META
        return to_host or (not args[0].is_meta and not kwargs.get("non_blocking", False))
    return False


class _Factories(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)` is a copy that no dispatched op shows."""

    def __init__(self, copies: _Copies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        place = kwargs.get("device")
        given = isinstance(args[0] if args else None, Tensor)
        makes = func in (torch.tensor, torch.as_tensor) and not given
        if makes and place is not None and torch.device(place) == META:
            self.copies._refuse(func.__name__)
        return func(*args, **kwargs)


@contextmanager
def waits_of(device: str, allowed: int = 0) -> Iterator[list[str]]:
    """Fail at what would make the host wait; more than `allowed` times, for what has to.

    Args:
        device: "cuda": torch's own look-out, on real tensors. "cpu": the same on meta tensors,
            which `stand_in` makes.
        allowed: waits that are counted in the list instead.
    """
    found: list[str] = []
    if device == "cpu":
        copies = _Copies(found, allowed)
        with _Factories(copies), copies:
            yield found
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn" if allowed else "error")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [str(w.message) for w in seen if "synchronizing" in str(w.message)]
    assert len(found) <= allowed, found


def stand_in(device: str, value: Any, done: dict[int, Any] | None = None) -> Any:
    """The value itself on a GPU; else the same with meta tensors, on which `waits_of` looks.

    Args:
        device: "cuda" or "cpu".
        value: tensors in any nest of containers.
        done: what was made for which object, where several calls share tensors.
    """
    return value if device == "cuda" else _to_meta(value, {} if done is None else done)


def _to_meta(value: Any, done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    made: Any = value
    if isinstance(value, Tensor):
        made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)
    elif isinstance(value, torch.device):
        made = META
    elif isinstance(value, nn.Module):
        made = copy.deepcopy(value).to(META)
    elif isinstance(value, dict):
        made = {k: _to_meta(v, done) for k, v in value.items()}
    elif isinstance(value, set):
        made = {_to_meta(v, done) for v in value}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        made = type(value)(*(_to_meta(v, done) for v in value))
    elif isinstance(value, list | tuple):
        made = type(value)(_to_meta(v, done) for v in value)
    elif type(value).__name__ in ("TrainState", "Metrics", "L0Control"):
        made = done[id(value)] = copy.copy(value)
        made.__dict__.update({k: _to_meta(v, done) for k, v in vars(value).items()})
    done[id(value)] = made
    return made
