# SPDX-License-Identifier: Apache-2.0
"""probe: look into a pipeline of no known family with one call of its denoiser."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import unwrap
from .probed import Argument, Probe, Probed, form_of
from .watch import Hook, Override

_CONTEXTS = ("encoder_hidden_states", "context")
_MLPS = ("feedforward", "mlp", "ffn")  # in the name of a class
_MLP_NAMES = ("ff", "ffn", "mlp", "feed_forward")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Enough(Exception):
    """Ends a pipeline call at its first scheduler step."""


def probe(pipe: Any, *args: Any, **call: Any) -> Probe:
    """Run a pipeline up to its first scheduler step and say what its denoiser did.

    Blocks and attention of a denoiser are found by what ran: attention by its class, its processor
    or its projections, blocks as members of a list that hold attention, MLPs by their class.
    Whether an output holds its input is seen by computing the module once more with every linear
    and convolution layer at zero.

    Args:
        pipe: diffusers pipeline; its denoiser may belong to no family.
        *args: of the pipeline call.
        **call: of the pipeline call, as small as possible: only the first step runs.

    Returns:
        A report: `str()` is a table, `adapter(branches=...)` an adapter to register.

    Raises:
        TypeError: the pipeline has no scheduler or no model.
        RuntimeError: no scheduler step, no denoiser call before it, a compiled denoiser, or an
            argument that could hold the latents was not found.
    """
    parts = dict(getattr(pipe, "components", None) or getattr(pipe, "__dict__", {}))
    models = {n: p for n, p in parts.items() if isinstance(p, nn.Module)}
    scheduler = getattr(pipe, "scheduler", None)
    if not models or not hasattr(scheduler, "step"):
        raise TypeError(
            f"probe: expected a pipeline with models and a scheduler, got {type(pipe).__name__}"
        )
    recordings = {name: _Recording(model) for name, model in models.items()}
    latest: list[str] = []
    steps: list[tuple[Any, Tensor]] = []

    def around(inner: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            steps.append((timestep, kwargs["sample"] if "sample" in kwargs else args[2]))
            raise _Enough

        return step

    with contextlib.ExitStack() as stack:
        override = Override(scheduler, "step", around)
        stack.callback(override.restore)
        for name, recording in recordings.items():
            stack.enter_context(recording.opened(functools.partial(latest.append, name)))
        with contextlib.suppress(_Enough):
            pipe(*args, **call)
    if not steps or not latest:
        raise RuntimeError(
            "probe: expected a denoiser call and then pipe.scheduler.step, got "
            f"{'no model call' if steps else 'no step'} in this call of {type(pipe).__name__}"
        )
    return recordings[latest[-1]].report(latest[-1], *steps[0])


@dataclass
class _Seen:
    """What is noted of a module in its first call."""

    calls: int = 0
    output: Any = None
    context: tuple[int, int] | None = None
    residual: str = "not known"


class _Recording:
    """Notes what the modules of one model do, from its first call on."""

    def __init__(self, model: nn.Module) -> None:
        self.called, self.model = model, unwrap(model)
        self.calls = 0
        self.arguments: dict[str, tuple[int, Tensor]] = {}
        self.seen: dict[str, _Seen] = {}
        self._replays = False
        self._roles: dict[str, str] = {}
        self._last_axis: set[str] = set()  # linear layers and layer norms

    @contextlib.contextmanager
    def opened(self, note: Callable[[], None]) -> Iterator[None]:
        """Watch the model; `note` is called before each of its calls."""
        hooks: list[Hook] = []
        handles: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note()
            self.calls += 1
            if self.calls == 1:
                self.arguments = self._tensors(args, kwargs)
                self._roles = _roles(self.model)
                handles.extend(self._watch())

        hooks.append(Hook(self.called, before))
        try:
            yield
        finally:
            for handle in (*hooks, *handles):
                (handle.restore if isinstance(handle, Hook) else handle.remove)()

    def _watch(self) -> Iterator[Any]:
        for name, module in self.model.named_modules():
            if name and "_orig_mod" not in module._modules:
                plain = ".".join(part for part in name.split(".") if part != "_orig_mod")
                yield module.register_forward_hook(self._after(plain), with_kwargs=True)

    def _after(self, name: str) -> Callable[..., Any]:
        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> Any:
            if self._replays:
                return torch.zeros_like(out) if isinstance(module, _LAYERS) else None
            seen = self.seen.setdefault(name, _Seen())
            if isinstance(module, nn.Linear | nn.LayerNorm):
                self._last_axis.add(name)
            if self.calls > 1:
                return None
            seen.calls += 1
            if seen.calls == 1:
                seen.output = form_of(out)
                seen.context = _context(module, args, kwargs)
                if self._roles.get(name):
                    seen.residual = self._residual(module, args, kwargs)
            return None

        return after

    def _residual(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Compute the module with all its layers at zero: what is left came past them."""
        self._replays = True
        try:
            left = module.forward(*args, **kwargs)
        except Exception:  # of the user's model; what it does then is not known
            return "not known"
        finally:
            self._replays = False
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 2]
        outputs = [v for v in (left if isinstance(left, tuple) else (left,)) if v is not None]
        if not all(isinstance(v, Tensor) for v in outputs):
            return "not known"
        alike = [g for g in given if any(v.shape == g.shape for v in outputs)]
        if not all(bool(g.any()) for g in alike):
            return "not known"  # zeros that came past the layers look like none
        if not any(bool(v.any()) for v in outputs):
            return "no"
        same = [any(v.shape == g.shape and torch.equal(v, g) for g in given) for v in outputs]
        return "yes" if all(same) else "not known"

    def _tensors(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, tuple[int, Tensor]]:
        names = list(inspect.signature(self.model.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return {
            name: (names.index(name) if name in names else len(names), value.detach())
            for name, value in given.items()
            if isinstance(value, Tensor)
        }

    def report(self, component: str, timestep: Any, sample: Tensor) -> Probe:
        """Make the report of the denoiser."""
        if not self.seen:
            raise RuntimeError(
                "probe: expected a denoiser that is not compiled [hooks inside of compiled code do "
                f"not run], got {component} of {type(self.called).__name__}"
            )
        latents = next(
            (n for n, (_, v) in self.arguments.items() if v.shape[1:] == sample.shape[1:]), None
        )
        if latents is None or sample.dim() < 3:
            raise RuntimeError(
                f"probe: expected an argument of {component} with the shape of the sample that "
                f"scheduler.step gets, {list(sample.shape)}, got "
                f"{ {n: list(v.shape) for n, (_, v) in self.arguments.items()} }"
            )
        rows = self.arguments[latents][1].shape[0]
        contexts = [
            name
            for name, (_, value) in self.arguments.items()
            if name != latents and value.dim() == 3 and value.shape[0] == rows
            if value.dtype.is_floating_point
        ]
        times = [n for n, (_, v) in self.arguments.items() if _is_time(v, timestep)]
        modules = dict(self.model.named_modules())
        modules = {n.replace("_orig_mod.", "").removesuffix("._orig_mod"): m
                   for n, m in modules.items()}  # fmt: skip
        return Probe(
            component=component,
            denoiser_class=type(self.model).__name__,
            latents=self._argument(latents),
            contexts=tuple(map(self._argument, contexts)),
            timestep=self._argument(times[0]) if len(times) == 1 else None,
            samples=sample.shape[0],
            calls=self.calls,
            modules=tuple(
                self._probed(name, modules[name], self.seen.get(name, _Seen()))
                for name in modules
                if name and not isinstance(modules[name], nn.ModuleList | nn.ModuleDict)
            ),
        )

    def _argument(self, name: str) -> Argument:
        place, value = self.arguments[name]
        return Argument(place, name, tuple(value.shape))

    def _probed(self, name: str, module: nn.Module, seen: _Seen) -> Probed:
        # These work on the last axis: what they put out says what stands there.
        forms = [
            found.output
            for inner, found in self.seen.items()
            if inner.startswith(f"{name}.") and inner in self._last_axis
        ]
        return Probed(
            name=name,
            class_name=type(module).__name__,
            role=self._roles.get(name, ""),
            calls=seen.calls,
            output=seen.output,
            context=seen.context,
            residual=seen.residual,
            layers=frozenset((f[1], f[2]) for f in forms if len(f) == 3),
            processor=hasattr(module, "set_processor"),
        )


def _roles(model: nn.Module) -> dict[str, str]:
    """Tell attention, MLPs, and the blocks that hold them from other modules."""
    roles: dict[str, str] = {}
    blocks: list[str] = []
    for full, module in model.named_modules():
        name = ".".join(part for part in full.split(".") if part != "_orig_mod")
        kind = type(module).__name__.lower()
        if not name or "_orig_mod" in module._modules or isinstance(module, nn.ModuleList):
            continue
        projections = all(hasattr(module, n) for n in ("to_q", "to_k", "to_v"))
        holds = any(hasattr(m, "set_processor") for m in module.modules() if m is not module)
        named = kind.endswith(("attention", "attn")) and not holds
        if hasattr(module, "set_processor") or projections or named:
            roles[name] = "attention"
        elif any(word in kind for word in _MLPS) or name.rpartition(".")[2] in _MLP_NAMES:
            roles[name] = "mlp"
        elif name.rpartition(".")[2].isdigit():
            blocks.append(name)
    for name in blocks:
        if any(inner.startswith(f"{name}.") for inner, role in roles.items() if role != "mlp"):
            roles[name] = "block"
    return roles


def _context(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int] | None:
    names = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    found = next((given[n] for n in _CONTEXTS if isinstance(given.get(n), Tensor)), None)
    return (found.shape[1], found.shape[2]) if found is not None and found.dim() == 3 else None


def _is_time(value: Tensor, timestep: Any) -> bool:
    """Tell whether an argument holds the timestep of the scheduler, once or for each row."""
    if value.dim() > 1 or value.numel() == 0 or value.is_complex():
        return False
    time = float(timestep if not isinstance(timestep, Tensor) else timestep.reshape(-1)[0])
    return bool((value.double() == time).all())
