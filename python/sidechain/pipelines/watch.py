# SPDX-License-Identifier: Apache-2.0
"""Methods watched on one object, in a way that never travels with copies of it.

A method that is replaced on an instance stands in its `__dict__`, so `copy`, `deepcopy` and pickle
would take it along and the copy would drive the original. Objects watched here give their state
without what watches them.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

_STATE = "__getstate__"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Override:
    """A method of one object, replaced until `restore`.

    A wrapper that somebody put around it in between stays; it then calls the plain method.
    """

    def __init__(
        self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        attributes = vars(owner)
        self.owner, self.name = owner, name
        self.had = name in attributes
        self.plain = getattr(owner, name)
        self._call = around(self.plain)
        # Pipelines inspect the signature of scheduler.step. What a wrapper of another Override took
        # over from it with `functools.wraps` must not come here.
        functools.update_wrapper(self, self.plain, updated=())
        attributes[name] = self
        _PlainState.of(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what stands for the method."""
        return self._call(*args, **kwargs)

    def restore(self) -> None:
        """Put the plain method back, unless somebody else has replaced this one."""
        self._call = self.plain
        attributes = vars(self.owner)
        if attributes.get(self.name) is self:
            if self.had:
                attributes[self.name] = self.plain
            else:
                del attributes[self.name]
        _PlainState.leave(self.owner)


class Hook:
    """A forward hook, or pre-hook, of one module, until `restore`."""

    def __init__(
        self, module: nn.Module, call: Callable[..., None], *, after: bool = False
    ) -> None:
        self.module, self._call = module, call
        if after:
            self._handle = module.register_forward_hook(self)
        else:
            self._handle = module.register_forward_pre_hook(self, with_kwargs=True)
        _PlainState.of(module)

    def __call__(self, *args: Any) -> None:
        """Call the hook."""
        self._call(*args)

    def restore(self) -> None:
        """Take the hook away."""
        self._handle.remove()
        _PlainState.leave(self.module)


class _PlainState:
    """Stands for `__getstate__` of a watched object; counts who watches it."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.watchers = owner, 0
        self.plain = owner.__getstate__

    @classmethod
    def of(cls, owner: Any) -> None:
        """Begin to give the plain state of an object."""
        found = vars(owner).get(_STATE)
        if not isinstance(found, cls):
            found = vars(owner)[_STATE] = cls(owner)
        found.watchers += 1

    @classmethod
    def leave(cls, owner: Any) -> None:
        """Stop with the last watcher."""
        found = vars(owner).get(_STATE)
        if isinstance(found, cls):
            found.watchers -= 1
            if found.watchers == 0:
                del vars(owner)[_STATE]

    def __call__(self) -> Any:
        """Return the state of the object as if nobody watched it."""
        state = self.plain()
        if not isinstance(state, dict):
            return state
        state = {k: v for k, v in state.items() if k != _STATE}
        for name, value in list(state.items()):
            if isinstance(value, Override):
                if value.had:
                    state[name] = value.plain
                else:
                    del state[name]
            elif name in _HOOKS and isinstance(value, dict):
                state[name] = OrderedDict(
                    (k, hook) for k, hook in value.items() if not isinstance(hook, Hook)
                )
        return state
