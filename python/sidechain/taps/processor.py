# SPDX-License-Identifier: Apache-2.0
"""The attention processor that stands in for the original one while taps are attached."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .layout import edit_output
from .masks import KEY_MASKS
from .operations import (
    Ablate,
    Add,
    Attend,
    Change,
    ContextRecord,
    Inside,
    Operation,
    Record,
    Replace,
    SplitAttention,
    Swap,
    TapCall,
    fits,
)


class Tapped:
    """Wraps an attention processor; made per inner class by `_tapped_class`."""

    _context_name: ClassVar[str]
    _context_place: ClassVar[int]

    def __init__(self, attn: Any, inner: Any) -> None:
        self._shadowed = attn._modules.get("processor") is inner  # an nn.Module lives there
        self._inner = inner
        self._attn = attn
        self._operations: list[Operation] = []
        self._records: list[ContextRecord] = []
        self._swaps: list[Swap] = []
        self._split: SplitAttention | None = None
        self._attend: Attend | None = None
        self._inside: list[Inside] = []
        self._outputs: list[Callable[[Tensor], Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_inner"], name)

    # Copies and pickles hold the model's own processor: what is attached here stays here.
    def __copy__(self) -> Any:
        return copy.copy(self._inner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._inner, memo)

    def __reduce__(self) -> Any:
        return _itself, (self._inner,)

    def _arrange(self) -> None:
        """Put the operations into the order in which a call runs them."""
        ops = self._operations
        self._records = [o for o in ops if isinstance(o, ContextRecord)]
        swaps = [o for o in ops if isinstance(o, Swap)]
        self._swaps = [s for s in swaps if s.key and s.value]
        split = [s for s in swaps if not (s.key and s.value)]
        self._split = SplitAttention(self._attn, split) if split else None
        self._attend = next((o for o in ops if isinstance(o, Attend)), None)
        outputs: list[Callable[[Tensor], Tensor]] = [
            o for o in ops if isinstance(o, Replace | Ablate)
        ]
        self._inside = [o for o in ops if isinstance(o, Inside)]
        records = [o for o in ops if isinstance(o, Record) and not isinstance(o, Inside)]
        changes = [o for o in ops if isinstance(o, Add | Change)]
        first = changes[0] if records and changes else None
        if isinstance(first, Add) and fits(records[-1], first):
            outputs += [TapCall(r, None) for r in records[:-1]]
            outputs.append(TapCall(records[-1], first))
            changes = changes[1:]
        else:
            outputs += [TapCall(r, None) for r in records]
        self._outputs = outputs + [TapCall(None, c) if isinstance(c, Add) else c for c in changes]

    def _run(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's own processor."""
        seen = self._attn if self._split is None else self._split
        if not self._inside:
            return self._inner(seen, hidden, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            for inside in self._inside:
                seen = inside.view(seen)
                watch = inside.watch()
                if watch is not None:
                    stack.enter_context(watch)
            return self._inner(seen, hidden, *args, **kwargs)

    def _edit_context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        name, place = self._context_name, self._context_place
        named = name in kwargs
        context = kwargs[name] if named else args[place]
        masks = [k for k in KEY_MASKS if kwargs.get(k) is not None]
        mask = kwargs[masks[0]] if masks else None
        for record in self._records:
            record(context, mask)
        if not self._swaps and self._split is None:
            return args
        if mask is not None and self._split is not None:
            raise NotImplementedError(
                "patch: expected cross-attention without a mask [keys and values of two contexts "
                f"have two], got {masks[0]}"
            )
        for swap in self._swaps:
            context, mask = swap(context), swap.of_mask(mask)
        if masks:
            kwargs[masks[0]] = mask
        if named:
            kwargs[name] = context
            return args
        return (*args[:place], context, *args[place + 1 :])


def _itself(processor: Any) -> Any:
    return processor


_TAPPED_CLASSES: dict[type, type[Tapped]] = {}


def _tapped_class(inner: type) -> type[Tapped]:
    """Return the wrapper class for a class of processors."""
    if inner not in _TAPPED_CLASSES:
        _TAPPED_CLASSES[inner] = _make_tapped_class(inner)
    return _TAPPED_CLASSES[inner]


def _make_tapped_class(inner: type) -> type[Tapped]:
    original: Callable[..., Any] = inner.__call__
    signature = inspect.signature(original)
    names = list(signature.parameters)

    # Attention.forward drops the keyword arguments its processor's signature does not name, so
    # the signature of the inner class must show through.
    @functools.wraps(original)
    def call(
        self: Tapped, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if attn is not self._attn:  # somebody has given the wrapper to another module
            return self._inner(attn, hidden_states, *args, **kwargs)
        if self._records or self._swaps or self._split is not None:
            args = self._edit_context(args, kwargs)
        attend = self._attend
        if attend is not None:
            attend.mark()
        # Keys and values of two different contexts are not one thing that could be kept.
        if attend is not None and self._split is None and not torch.is_grad_enabled():
            context = _context_alone(names[3:], args, kwargs)
            out = attend(hidden_states, context, self._inside)
        else:
            out = self._run(hidden_states, args, kwargs)
        return edit_output(out, self._outputs, self._operations) if self._outputs else out

    if not hasattr(inner, "_attention_backend"):
        # Attention asks for the signature at every call: kept, it costs a third. Not for processors
        # of diffusers' attention dispatcher: torch.compile cannot trace a kept one there (Flux).
        call.__signature__ = signature  # type: ignore[attr-defined]
    body: dict[str, Any] = {"__call__": call, "__doc__": inner.__doc__}
    for context in ("encoder_hidden_states", "context"):
        if context in names:
            body |= {"_context_name": context, "_context_place": names.index(context) - 3}
    for name in ("_attention_backend", "_parallel_config"):
        if hasattr(inner, name):
            body[name] = _forwarded(name)
    return type(f"Tapped{inner.__name__}", (Tapped,), body)


def _context_alone(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The context of a call that has no other argument."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    context: Tensor = given.pop("encoder_hidden_states")
    other = [name for name, value in given.items() if value is not None]
    if other:
        raise NotImplementedError(
            f"cache_context: expected cross-attention with a context alone, got {', '.join(other)}"
        )
    return context


def _forwarded(name: str) -> property:
    def read(self: Tapped) -> Any:
        return getattr(self._inner, name)

    def write(self: Tapped, value: Any) -> None:
        setattr(self._inner, name, value)

    return property(read, write)


def inner_processor(attn: Any) -> Any:
    """The model's own processor, whether it is wrapped or not."""
    found = attn.processor
    return found._inner if isinstance(found, Tapped) else found


def attach(attn: Any, operation: Operation) -> None:
    """Add an operation to an attention module, wrapping its processor if it is the first."""
    processor = attn.processor
    # A wrapper that was saved and put back after its taps had gone is the processor it wraps.
    while isinstance(processor, Tapped) and not (processor._operations and processor._attn is attn):
        processor = processor._inner
    if not isinstance(processor, Tapped):
        processor = _tapped_class(type(processor))(attn, processor)
        # Not set_processor: it would throw a processor that is a module out of the state dict.
        attn.__dict__["processor"] = processor
    processor._operations.append(operation)


def arrange(attn: nn.Module) -> None:
    """Recompute the order of the operations after their buffers have changed."""
    if isinstance(attn.processor, Tapped):
        attn.processor._arrange()


def detach(attn: Any, operation: Operation) -> None:
    """Take an operation out; the last one gives the module its own processor object back."""
    processor = attn.processor
    if not isinstance(processor, Tapped) or operation not in processor._operations:
        warnings.warn(
            f"taps: expected the wrapped processor on {type(attn).__name__}, got "
            f"{type(processor).__name__}: it was replaced while a tap was attached and stays",
            RuntimeWarning,
            stacklevel=4,
        )
        return
    processor._operations.remove(operation)
    # Also the last time: somebody may have kept the wrapper, which is plain from now on.
    processor._arrange()
    if processor._operations:
        return
    if processor._shadowed and "processor" in attn._modules:
        del attn.__dict__["processor"]
    else:
        attn.__dict__["processor"] = processor._inner
