# SPDX-License-Identifier: Apache-2.0
"""The protocol of a pipeline family: what differs between model families, as one entry each.

A family is known by the class name of its denoiser, so that the registry needs none of the
libraries that define those classes. The entries stand in `families`; one of your own is made the
same way::

    register_adapter(
        "MyTransformer",
        Adapter(
            family="mine",
            components=("transformer",),
            branches={1: ("cond",), 2: ("uncond", "cond")},
            shape=call_shape((0, "hidden_states"), (1, "encoder_hidden_states")),
            tokens=lambda site, shape: shape.latent[0],
            timestep=call_timestep(2),
        ),
    )
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .attention import Attention, describe_attention

if TYPE_CHECKING:
    from .sites import Site

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]


@dataclass(frozen=True)
class CallShape:
    """Shapes, device and dtype of one denoiser call.

    Attributes:
        rows: R, the batch of the denoiser.
        latent: shape of the latents after the batch dimension.
        contexts: tokens S of each context source, in order; empty where there is no context.
        device: where the denoiser computes.
        dtype: of its latents.
    """

    rows: int
    latent: tuple[int, ...]
    contexts: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype


def source_tokens(site: Site, shape: CallShape) -> int:
    """Return the tokens of the context that a site reads: the usual `Adapter.context_tokens`."""
    return 0 if site.source is None else shape.contexts[site.source]


@dataclass(frozen=True)
class Adapter:
    """One model family.

    Attributes:
        family: name for messages and metadata.
        components: attributes of the pipeline that may hold the denoiser.
        branches: rows per sample -> the guidance branch of each block of rows, in batch order.
        shape: reads a `CallShape` from the positional and keyword arguments of the denoiser; run
            at every call.
        tokens: T of the output of a site in calls of a shape.
        context_tokens: S of the context of a site in calls of a shape, 0 where it reads none.
        calls: guidance branch of the k-th denoiser call of a step, for families that call the
            denoiser once for each branch; `branches` is not used then. Pipelines that name their
            calls with `cache_context` are taken at their word.
        late_guidance: whether a generation may begin without the other branches and get them at a
            later step.
        samples: reads B from the arguments of a denoiser call, for pipelines without
            `prepare_latents`. None = `prepare_latents` tells, or every row is a sample.
        timestep: reads from the arguments of the denoiser the timestep in the units of
            `scheduler.timesteps`, as exact as the dtype that it arrived in. None = it cannot be
            read from them.
        verify: checks the first call of a generation against what is known of the branches
            (arguments: args, kwargs, samples, branches) and raises on contradiction.
        describe: says of an attention module (its name, itself, the denoiser) what kind of site it
            is, or, as a text, why it is none.
        excludes: attributes of the pipeline that must be None: they hold a second denoiser, so
            that each of both sees only a part of the steps.
    """

    family: str
    components: tuple[str, ...]
    branches: Mapping[int, tuple[str, ...]]
    shape: Callable[[Arguments, Keywords], CallShape]
    tokens: Callable[[Site, CallShape], int]
    context_tokens: Callable[[Site, CallShape], int] = source_tokens
    calls: tuple[str, ...] = ()
    late_guidance: bool = False
    samples: Callable[[Arguments, Keywords], int] | None = None
    timestep: Callable[[Arguments, Keywords], Tensor | None] | None = None
    verify: Callable[[Arguments, Keywords, int, tuple[str, ...]], None] | None = None
    describe: Callable[[str, nn.Module, nn.Module], Attention | str] = describe_attention
    excludes: tuple[str, ...] = ()


_REGISTRY: dict[tuple[str, str | None], Adapter] = {}  # by class of the denoiser, of the pipeline


def register_adapter(denoiser_class: str, adapter: Adapter, pipeline: str | None = None) -> None:
    """Register a model family.

    Args:
        denoiser_class: class name of the denoiser; subclasses inherit the entry.
        adapter: its properties.
        pipeline: class name of the only pipelines that the entry is for; it goes before an entry
            for all of them. None = all.

    Raises:
        ValueError: another adapter already has that name.
    """
    known = _REGISTRY.get((denoiser_class, pipeline))
    if known is not None and known != adapter:
        raise ValueError(
            f"register_adapter: expected a new class name, got {denoiser_class!r} [registered for "
            f"{known.family}]"
        )
    _REGISTRY[denoiser_class, pipeline] = adapter


def _registered(denoiser: nn.Module, pipe: Any) -> Adapter | None:
    pipelines = [*(cls.__name__ for cls in type(pipe).__mro__), None]
    for cls in type(denoiser).__mro__:
        for pipeline in pipelines:
            adapter = _REGISTRY.get((cls.__name__, pipeline))
            if adapter is not None:
                return adapter
    return None


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
        NotImplementedError: it holds two denoisers that share the steps.
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
        adapter = _registered(denoiser, pipe)
        if adapter is not None and component in adapter.components:
            for other in adapter.excludes:
                if getattr(pipe, other, None) is not None:
                    raise NotImplementedError(
                        f"sites: expected a pipeline with one denoiser, got {component} and "
                        f"{other} [each of them sees only a part of the steps]"
                    )
            return called, denoiser, adapter
        seen[component] = type(denoiser).__name__
    known = sorted({name for name, _ in _REGISTRY})
    raise TypeError(
        f"sites: expected a pipeline with a denoiser of class {' | '.join(known)}, got "
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


def call_argument(args: Arguments, kwargs: Keywords, place: int, name: str) -> Any:
    """Return an argument of a denoiser call, given by position or by name; None where absent."""
    return kwargs[name] if name in kwargs else args[place] if len(args) > place else None


def call_shape(
    latents: tuple[int, str], *contexts: tuple[int, str]
) -> Callable[[Arguments, Keywords], CallShape]:
    """Make an `Adapter.shape` from where the denoiser takes its latents and contexts.

    Args:
        latents: position and name of the argument that holds the latents [R, ...].
        *contexts: the same of each context [R, S, C], in the order of the sources; one that is
            None in a call is left out.
    """

    def shape(args: Arguments, kwargs: Keywords) -> CallShape:
        states: Tensor = call_argument(args, kwargs, *latents)
        found = (call_argument(args, kwargs, *place) for place in contexts)
        size = states.shape
        return CallShape(
            rows=size[0],
            latent=tuple(size[1:]),
            contexts=tuple(context.shape[1] for context in found if context is not None),
            device=states.device,
            dtype=states.dtype,
        )

    return shape


def call_timestep(
    place: int, name: str = "timestep", scale: float = 1.0
) -> Callable[[Arguments, Keywords], Tensor | None]:
    """Make an `Adapter.timestep` from where the denoiser takes it and what it was divided by."""

    def timestep(args: Arguments, kwargs: Keywords) -> Tensor | None:
        found = call_argument(args, kwargs, place, name)
        if not isinstance(found, Tensor):
            return None
        return found if scale == 1.0 else found.double() * scale

    return timestep
