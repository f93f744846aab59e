# SPDX-License-Identifier: Apache-2.0
"""Edits of outputs that are no single [R, T, C]."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sidechain.taps.layout import Expected, edit_output
from sidechain.taps.operations import Ablate


def add(direction: Tensor) -> list[object]:
    return [lambda tokens: tokens.add_(direction)]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(4, 5), (1, 1)])  # one token: its map is its row already
def test_a_map_keeps_its_strides(size: tuple[int, int], memory: torch.memory_format) -> None:
    out = torch.randn(2, 3, *size).contiguous(memory_format=memory)
    direction = torch.randn(3)
    expected, strides = out + direction[:, None, None], out.stride()
    edited = edit_output(out, add(direction), [])  # type: ignore[arg-type]
    assert torch.equal(edited, expected)
    assert edited.stride() == strides


def test_gradients_flow_through_a_map() -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    weight = torch.randn(2, 3, 4, 5)
    # Twice the tokens of an even place, so that an exchange of places shows.
    scale = (torch.arange(20) % 2 == 0).float()[:, None] + 1
    edited = edit_output(x * 1, [lambda tokens: tokens * scale], [])
    (edited * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight * scale.reshape(4, 5))


def test_only_the_first_of_a_tuple_is_edited() -> None:
    image, text = torch.zeros(1, 4, 2), torch.zeros(1, 3, 2)
    edited = edit_output((image, text), add(torch.ones(2)), [])  # type: ignore[arg-type]
    assert edited[1] is text and not text.any()
    assert edited[0].eq(1).all()


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 5, 2), (1, 4, 3)])
def test_another_output_than_expected(shape: tuple[int, ...]) -> None:
    operation = Ablate()
    operation.expected = Expected("blocks.0.attn", tokens=4, width=2)
    with pytest.raises(RuntimeError, match=r"\[rows, 4, 2\] at blocks.0.attn"):
        edit_output(torch.zeros(shape), [], [operation])
