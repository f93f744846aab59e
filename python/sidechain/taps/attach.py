# SPDX-License-Identifier: Apache-2.0
"""How operations are put at a site: on the processor of attention, on `forward` of other modules.

`forward` is replaced on the instance. Unlike forward hooks, which are ignored when they come after
the first compiled call, that has compiled graphs made anew. Copies and pickles are plain.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..pipelines import Site
from ..pipelines.adapter import unwrap
from ..pipelines.watch import Override
from . import processor
from .layout import edit_output
from .operations import Operation
from .processor import Tapped


class TappedModule(Tapped):
    """The operations at a module that is no attention."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.module, site.module.forward)
        self._name, self._element = site.name, site.element
        self._rows: int | None = None
        self._override = Override(site.module, "forward", lambda plain: self._run)

    def _arrange(self) -> None:
        super()._arrange()
        # Rows that a module does not have would be made up by broadcasting.
        known = [o.expected.rows for o in self._operations if o.expected is not None]
        self._rows = known[0] if known else None

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        out = self._inner(*args, **kwargs)
        if not self._outputs:
            return out
        if self._element is None:
            return self._edit(out, args, kwargs)
        if not isinstance(out, tuple) or len(out) <= self._element:
            self._refuse(f"a tuple with the latents at {self._element}", type(out).__name__)
        edited = self._edit(out[self._element], args, kwargs)
        return (*out[: self._element], edited, *out[self._element + 1 :])

    def _edit(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not isinstance(out, Tensor):
            self._refuse("one tensor", type(out).__name__)
        if out.dim() not in (3, 4) or self._rows not in (None, out.shape[0]):
            rows = "rows" if self._rows is None else self._rows
            self._refuse(f"[{rows}, T, C] or [{rows}, C, h, w]", str(list(out.shape)))
        if any(out is value for value in (*args, *kwargs.values())):
            out = out.clone()  # the edits work in place, and its input is not its own
        edited: Tensor = edit_output(out, self._outputs, self._operations)
        return edited

    def _refuse(self, expected: str, got: str) -> None:
        raise RuntimeError(f"taps: expected {expected} at {self._name}, got {got}")

    def restore(self) -> None:
        """Give the module its own `forward` back."""
        self._override.restore()


_TAPPED: WeakKeyDictionary[nn.Module, TappedModule] = WeakKeyDictionary()


def attach(site: Site, operation: Operation) -> None:
    """Add an operation at a site."""
    if site.is_attention:
        processor.attach(site.module, operation)
        return
    tapped = _TAPPED.get(site.module)
    if tapped is None:
        tapped = _TAPPED[site.module] = TappedModule(site)
    tapped._operations.append(operation)


def arrange(site: Site) -> None:
    """Recompute the order of the operations after their buffers have changed."""
    if site.is_attention:
        processor.arrange(site.module)
        return
    found = unwrap(site.denoiser.get_submodule(site.name))
    if found is not site.module:  # an adapter around it would not be seen
        raise RuntimeError(
            f"taps: expected the {type(site.module).__name__} at {site.name} that was there when "
            f"the tap was made, got a {type(found).__name__}"
        )
    _TAPPED[site.module]._arrange()


def detach(site: Site, operation: Operation) -> None:
    """Take an operation out; the last one leaves the module as it was."""
    if site.is_attention:
        processor.detach(site.module, operation)
        return
    tapped = _TAPPED[site.module]
    tapped._operations.remove(operation)
    tapped._arrange()
    if not tapped._operations:
        del _TAPPED[site.module]
        tapped.restore()
