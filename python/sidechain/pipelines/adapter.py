# SPDX-License-Identifier: Apache-2.0
"""The protocol of a pipeline family: what differs between model families, as one entry each.

A family is known by the class name of its denoiser, so that the registry needs none of the
libraries that define those classes. The entries stand in `families`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn


@dataclass(frozen=True)
class CallShape:
    """Shapes, device and dtype of one denoiser call.

    Attributes:
        rows: R, the batch of the denoiser.
        tokens: T seen by the attention sites.
        context_tokens: S seen by the cross-attention sites, 0 where there is no context.
        device: where the denoiser computes.
        dtype: of its hidden states.
    """

    rows: int
    tokens: int
    context_tokens: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Adapter:
    """One model family.

    Attributes:
        family: name for messages and metadata.
        components: attributes of the pipeline that may hold the denoiser.
        branches: rows per sample -> the guidance branch of each block of rows, in batch order.
        shape: reads a `CallShape` from the positional and keyword arguments of the denoiser.
        verify: checks the first call of a generation against what is known of the branches
            (arguments: args, kwargs, samples, branches) and raises on contradiction.
    """

    family: str
    components: tuple[str, ...]
    branches: Mapping[int, tuple[str, ...]]
    shape: Callable[[tuple[Any, ...], Mapping[str, Any]], CallShape]
    verify: Callable[[tuple[Any, ...], Mapping[str, Any], int, tuple[str, ...]], None] | None = None


_REGISTRY: dict[str, Adapter] = {}


def register_adapter(denoiser_class: str, adapter: Adapter) -> None:
    """Register a model family.

    Args:
        denoiser_class: class name of the denoiser; subclasses inherit the entry.
        adapter: its properties.

    Raises:
        ValueError: another adapter already has that name.
    """
    known = _REGISTRY.get(denoiser_class)
    if known is not None and known != adapter:
        raise ValueError(
            f"register_adapter: expected a new class name, got {denoiser_class!r} [registered for "
            f"{known.family}]"
        )
    _REGISTRY[denoiser_class] = adapter


def unwrap(module: nn.Module) -> nn.Module:
    """Return the denoiser itself from under `torch.compile` and PEFT wrappers."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
            inner = cast(Any, module).get_base_model()
        if inner is None or inner is module:
            return module
        module = inner


def find_denoiser(pipe: Any) -> tuple[nn.Module, nn.Module, Adapter]:
    """Find the denoiser of a pipeline.

    Returns:
        The module the pipeline calls (perhaps a compiled wrapper), the denoiser, its adapter.

    Raises:
        TypeError: the pipeline holds no denoiser of a known family.
    """
    seen = {
        name: type(unwrap(part)).__name__
        for name, part in dict(getattr(pipe, "components", {})).items()
        if isinstance(part, nn.Module)
    }
    for component in dict.fromkeys(c for a in _REGISTRY.values() for c in a.components):
        called = getattr(pipe, component, None)
        if not isinstance(called, nn.Module):
            continue
        denoiser = unwrap(called)
        for cls in type(denoiser).__mro__:
            adapter = _REGISTRY.get(cls.__name__)
            if adapter is not None and component in adapter.components:
                return called, denoiser, adapter
        seen[component] = type(denoiser).__name__
    raise TypeError(
        f"sites: expected a pipeline with a denoiser of class {' | '.join(sorted(_REGISTRY))}, got "
        f"{type(pipe).__name__}({', '.join(f'{k}={v}' for k, v in seen.items())})"
    )


def execution_device(pipe: Any, denoiser: nn.Module) -> torch.device:
    """Return where the denoiser computes, also when offloading parks its weights elsewhere."""
    device = getattr(pipe, "_execution_device", None)
    return device if isinstance(device, torch.device) else next(denoiser.parameters()).device


def config_hash(pipe: Any) -> str:
    """Hash the configuration of the denoiser: equal for equal architectures, whatever the weights.

    Returns:
        Sixteen hexadecimal digits.
    """
    _, denoiser, _ = find_denoiser(pipe)
    config = {
        k: v for k, v in dict(getattr(denoiser, "config", {})).items() if not k.startswith("_")
    }
    text = json.dumps({"class": type(denoiser).__name__, **config}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def call_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    """Return an argument of a denoiser call, given by position or by name; None where absent."""
    return kwargs[name] if name in kwargs else args[place] if len(args) > place else None
