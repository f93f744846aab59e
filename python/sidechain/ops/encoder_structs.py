# SPDX-License-Identifier: Apache-2.0
"""Weights of an encoder, as the ops take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Encoder(NamedTuple):
    """What turns an activation x [d] into F features: relu(w_enc (x - b_pre) + b_enc).

    w_enc: [F, d], float32 | float16 | bfloat16, one row a feature, any strides.
    b_enc: [F], same dtypes. None = 0.
    b_pre: [d], same dtypes, subtracted from x. None = 0.
    """

    w_enc: Tensor
    b_enc: Tensor | None = None
    b_pre: Tensor | None = None
