# SPDX-License-Identifier: Apache-2.0
"""Arguments of the ops that train and edit dictionaries, and the flat form of their schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class SaeWeights(NamedTuple):
    """Weights of a sparse autoencoder, float32; the matrices contiguous, one row a feature."""

    w_enc: Tensor  # [F, d_in]
    w_dec: Tensor  # [F, d_out]
    b_enc: Tensor | None = None  # [F]
    b_pre: Tensor | None = None  # [d_in], subtracted from x; only read. None = 0


class AdamState(NamedTuple):
    """Running statistics of Adam.

    The mean of the gradient and the mean of its square for each weight: those of the matrices
    float32 or bfloat16 (all four alike) and contiguous, those of the bias float32.
    """

    enc_mean: Tensor  # [F, d_in]
    enc_square: Tensor  # [F, d_in]
    dec_mean: Tensor  # [F, d_out]
    dec_square: Tensor  # [F, d_out]
    bias_mean: Tensor | None = None  # [F], with b_enc
    bias_square: Tensor | None = None  # [F], with b_enc


class CodeGroup(NamedTuple):
    """Sparse codes with the error of their reconstruction and the gradient of their values."""

    values: Tensor  # [N, K] float32, or [nnz] with offsets
    indices: Tensor  # int32, shape of values
    dvalues: Tensor  # float32, shape of values
    error: Tensor  # [N, d_out] float32, or [P, N, d_out] with prefixes
    offsets: Tensor | None = None  # row starts [N + 1] int64 of codes in CSR form
    row_weight: Tensor | None = None  # [N] float32, already in dvalues


class GradientInputs(NamedTuple):
    """Everything the gradients are made of beside the weights; formulas in `sae_update_`."""

    x: Tensor  # input of the encoder [N, d_in], float32 | float16 | bfloat16
    codes: Sequence[CodeGroup]  # 1 to 4 groups, all of N rows
    project: bool = True  # remove the gradient along the decoder rows
    # Up to 16 ascending feature counts of Matryoshka groups, the last >= all features.
    prefixes: Sequence[int] = ()
    # Id of the first row of the weights, for feature shards. Other ids are ignored.
    first_feature: int = 0


class AdamOptions(NamedTuple):
    """Numbers of one step of AdamW; those that change from step to step lie on the device."""

    lr: Tensor  # [1] float32
    step: Tensor  # [1] int64, the number of this step, 1 for the first
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of both matrices
    clip_scale: Tensor | None = None  # [1] float32, factor of all gradients. None = 1


class CodeEdit(NamedTuple):
    """Features of each row whose values change; not both values may be None."""

    values_old: Tensor | None  # [N, K] float32, or [nnz] with offsets. None = 0
    values_new: Tensor | None  # shape of values_old. None = 0
    indices: Tensor  # int32, shape of the values. Outside [0, F) stands for nothing
    offsets: Tensor | None = None  # row starts [N + 1] int64 of codes in CSR form


# Columns of the groups in the schemas.
COLUMNS = ("values", "indices", "offsets", "dvalues", "error", "row_weight")
# Arguments there that stand for `GradientInputs`, whose codes become the columns.
_INPUTS = len(GradientInputs._fields) - 1 + len(COLUMNS)
GROUPS_SCHEMA = (
    "Tensor[] values, Tensor[] indices, Tensor?[] offsets, Tensor[] dvalues, Tensor[] error, "
    "Tensor?[] row_weight"
)


def to_schema(*parts: Any) -> tuple[Any, ...]:
    """Return the arguments of a schema, which knows no structs: the fields of all parts in order.

    The groups of codes become one list for each column.
    """
    flat: list[Any] = []
    for part in parts:
        if isinstance(part, GradientInputs):
            columns = ([getattr(group, name) for group in part.codes] for name in COLUMNS)
            flat += [part.x, *columns, part.project, list(part.prefixes), part.first_feature]
        elif isinstance(part, tuple):
            flat += part
        else:
            flat.append(part)
    return tuple(flat)


def edit_structs(flat: Sequence[Any]) -> tuple[Any, ...]:
    """Return x, `CodeEdit`, w_dec, strength and mask for the schema of `sae_edit_`."""
    x, rest, fields = flat[0], flat[1:], len(CodeEdit._fields)
    return (x, CodeEdit(*rest[:fields]), *rest[fields:])


def square_structs(flat: Sequence[Any]) -> tuple[SaeWeights, GradientInputs]:
    """Return the same for `sae_gradient_square`: `SaeWeights` and `GradientInputs`."""
    weights = len(SaeWeights._fields)
    return SaeWeights(*flat[:weights]), _inputs(flat[weights:])


def update_structs(flat: Sequence[Any]) -> tuple[Any, ...]:
    """Return the same for `sae_update_`.

    Returns:
        `SaeWeights`, `AdamState`, `GradientInputs`, `AdamOptions`, unit_norm, last_fired,
        b_pre_grad.
    """
    rest, parts = list(flat), []
    for kind in (SaeWeights, AdamState):
        parts.append(kind(*rest[: len(kind._fields)]))
        rest = rest[len(kind._fields) :]
    inputs, rest = _inputs(rest[:_INPUTS]), rest[_INPUTS:]
    adam = len(AdamOptions._fields)
    return (*parts, inputs, AdamOptions(*rest[:adam]), *rest[adam:])


def _inputs(flat: Sequence[Any]) -> GradientInputs:
    x, *columns, project, prefixes, first_feature = flat
    groups = [
        CodeGroup(**dict(zip(COLUMNS, group, strict=True)))
        for group in zip(*columns, strict=True)
    ]  # fmt: skip
    return GradientInputs(x, groups, project, prefixes, first_feature)
