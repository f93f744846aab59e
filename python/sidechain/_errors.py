# SPDX-License-Identifier: Apache-2.0
"""Tell bad input from bugs: `InputError`, and what else the command line answers in one line."""

from __future__ import annotations

import dis
from pathlib import Path

_PACKAGE = Path(__file__).parent
#: Types of the contracts of public functions (see CONTRIBUTING, "House rules").
_CONTRACT = (ValueError, TypeError, NotImplementedError, RuntimeError)
_RAISE = dis.opmap["RAISE_VARARGS"]


class InputError(ValueError):
    """Report an option, a file or a setting that cannot be used; the message names it."""


def is_bad_input(error: BaseException) -> bool:
    """Return whether an error answers bad input; anything else is a bug of this package.

    Bad input is `InputError`, `OSError`, and an error of a contract that a `raise` statement of
    this package raised. What Python, NumPy or torch raise inside a call of ours (`int("x")`, shapes
    that do not fit) never was a check of input.
    """
    if isinstance(error, InputError | OSError):
        return True
    return isinstance(error, _CONTRACT) and _raised_by_us(error)


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    if _PACKAGE not in Path(code.co_filename).parents:
        return False
    return code.co_code[trace.tb_lasti] == _RAISE
