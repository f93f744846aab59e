# SPDX-License-Identifier: Apache-2.0
"""Arrays of more than 2^31 elements, rows of d = 4096 and F = 65,536 features and more.

What lies behind the 2^31st element is compared with the reference on that part alone. The CPU
rehearses the same bodies on small shapes. Test processes take turns with the memory of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.support import memory
from ops.support import need_kernel
from sidechain import ops
from sidechain.ops import (
    AdamOptions,
    AdamState,
    CodeEdit,
    CodeGroup,
    CodeSums,
    GradientInputs,
    SaeWeights,
)
from sidechain.reference import attention_tap as attention_reference
from sidechain.reference import sparse_decode as decode_reference
from sidechain.reference import topk_encode as topk_reference
from sidechain.testing.tolerance import assert_close

BF16 = torch.bfloat16
LAST = 40  # rows or features at the end that are looked at
WIDTH = {"cuda": 4096, "cpu": 32}
MANY = {"cuda": (1 << 19) + LAST, "cpu": 3 * LAST}  # times WIDTH: more than 2^31 on a GPU


@pytest.fixture(autouse=True)
def alone(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    shared = tmp_path_factory.getbasetemp()
    if shared.name.startswith("popen-"):  # of one of several processes
        shared = shared.parent
    torch.manual_seed(0)
    with memory(device, Path(shared), 45):
        yield


def big(device: str) -> tuple[int, int]:
    """Rows and columns of an array behind whose end no 32-bit number reaches."""
    rows, width = MANY[device], WIDTH[device]
    assert device == "cpu" or (rows - LAST) * width >= 1 << 31
    return rows, width


def drawn(device: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_()


def last_codes(device: str, rows: int, features: int, k: int) -> tuple[Tensor, Tensor]:
    """Codes of features at the end of the table, each once a row."""
    spread = torch.rand(rows, LAST, device=device).argsort(1)[:, :k]
    values = torch.rand(rows, k, device=device) + 0.05
    return values, (features - LAST + spread).int()


def check(
    name: str, got: Tensor, reference: Callable[..., Tensor], args: tuple[Any, ...], *at: Any
) -> None:
    """Compare with the reference in float64, by what it errs in the dtypes given."""
    exact, eager = reference(*(_wide(a) for a in args)), reference(*args)
    assert_close(name, got, *(t[at] if at else t for t in (exact, eager)))


def _wide(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def test_tap_(device: str) -> None:
    """More than 2^31 elements in x and in the ring, steered and pooled; the last row is read."""
    rows, width = big(device)
    x = drawn(device, 2, rows // 2, width)
    tokens = x.shape[1]
    vectors = torch.nn.functional.normalize(drawn(device, 1, 1, width, dtype=torch.float32), dim=-1)
    strength = torch.tensor([0.0, 3.0], device=device)
    sums = torch.zeros(1, 2, width, device=device)
    ring = torch.zeros(1, 2, tokens, width, dtype=BF16, device=device)
    before = x[1].clone()
    ops.tap_(x, ops.Capture(sums, ring=ring), ops.Steering(vectors, strength=strength))
    assert torch.equal(ring[0, 1, -LAST:], before[-LAST:])
    assert torch.equal(ring[0, 0, -LAST:], x[0, -LAST:])
    steered = before[-LAST:].double() + 3.0 * vectors[0, 0].double()
    plain = (before[-LAST:].float() + 3.0 * vectors[0, 0]).to(BF16)
    assert_close("x", x[1, -LAST:], steered, plain)
    parts = before.split(1 << 14)
    exact = torch.stack([p.double().sum(0) for p in parts]).sum(0)
    assert_close("sums", sums[0, 1], exact, torch.stack([p.float().sum(0) for p in parts]).sum(0))


def test_attention_tap(device: str) -> None:
    """More than 2^31 elements in q, the output and the ring."""
    rows, width = big(device)
    heads = 32 if device == "cuda" else 4
    q = drawn(device, 1, rows, heads, width // heads)
    banks = [drawn(device, 2, 77, heads, width // heads) for _ in range(2)]
    index = torch.ones(1, dtype=torch.int32, device=device)
    ring = torch.zeros(1, 1, rows, width, dtype=BF16, device=device)
    out = ops.attention_tap(q, *banks, context_index=index, capture=ops.Capture(ring=ring))
    assert torch.equal(out.flatten(2)[:, -LAST:], ring[0, :, -LAST:])
    check("out", out[:, -LAST:], _attend, (q[:, -LAST:], *banks, index))


def test_attention_tap_bank(device: str) -> None:
    """More than 2^31 elements in each bank; a row reads its last context."""
    heads, contexts = (32, 4097) if device == "cuda" else (4, 9)
    width, length = WIDTH[device] // heads, 128
    assert device == "cpu" or contexts * length * heads * width > 1 << 31
    banks = [drawn(device, contexts, length, heads, width) for _ in range(2)]
    q = drawn(device, 2, 70, heads, width)
    index = torch.tensor([0, contexts - 1], dtype=torch.int32, device=device)
    out = ops.attention_tap(q, *banks, context_index=index)
    ends = [torch.stack([bank[0], bank[-1]]) for bank in banks]
    check("out", out, _attend, (q, *ends, index.clamp(max=1)))


def _attend(q: Tensor, k_bank: Tensor, v_bank: Tensor, index: Tensor) -> Tensor:
    return attention_reference.attend(q, k_bank, v_bank, index)


def test_sparse_decode_rows(device: str) -> None:
    """More than 2^31 elements in x_hat, the target and the error."""
    rows, width = big(device)
    features = 65_536 if device == "cuda" else 100
    values, indices = last_codes(device, rows, features, 8)
    table, bias = drawn(device, features, width), drawn(device, width, dtype=torch.float32)
    end, shifted = slice(-LAST, None), indices[-LAST:] - (features - LAST)
    args = (values[end], shifted, table[end], bias)
    x_hat = ops.sparse_decode(values, indices, table, bias)
    check("x_hat", x_hat[end], decode_reference.sparse_decode, (*args, None))
    del x_hat
    target = drawn(device, rows, width)
    found = ops.sparse_decode_loss(values, indices, table, bias, target)
    for place, name in enumerate(("error", "loss", "dvalues")):
        check(
            name, found[place][end],
            lambda *a, place=place: decode_reference.sparse_decode_loss(*a)[place],
            (*args, target[end], None, None),
        )  # fmt: skip


def test_sparse_decode_table(device: str) -> None:
    """More than 2^31 elements in the table and its gradient."""
    features, width = big(device)
    values, indices = last_codes(device, 64, features, 8)
    table = drawn(device, features, width)
    shifted, end = indices - (features - LAST), slice(-LAST, None)
    x_hat = ops.sparse_decode(values, indices, table)
    check("x_hat", x_hat, decode_reference.sparse_decode, (values, shifted, table[end], None, None))
    grad = drawn(device, 64, width, dtype=torch.float32)
    call = torch.ops.sidechain.sparse_decode_backward.default
    found = call(grad, values, indices, table, None, True, True)
    for place, name in enumerate(("dvalues", "dtable")):
        check(
            name, found[place] if place == 0 else found[place][end],
            lambda *a, place=place: decode_reference.sparse_decode_backward(*a)[place],
            (grad, values, shifted, table[end], None, True, True),
        )  # fmt: skip
    assert not found[1][:-LAST:997].any()


def test_codes_beyond_32_bits_are_refused(device: str) -> None:
    """No kernel counts so many; the views hold no memory."""
    need_kernel("sparse_decode", device)
    values = torch.zeros(1, 1024, device=device).expand(1 << 21, 1024)
    indices = torch.zeros(1, 1024, dtype=torch.int32, device=device).expand(1 << 21, 1024)
    table = torch.zeros(4, 8, device=device)
    with pytest.raises(RuntimeError, match=r"expected fewer than 2\^31 codes"):
        ops.sparse_decode(values, indices, table)


def test_sae_update_(device: str) -> None:
    """More than 2^31 elements in every matrix; the last features as a shard of their own."""
    features, width = big(device)
    dtypes = (torch.float32, torch.float32, BF16, BF16, BF16, BF16)
    matrices = [torch.full((features, width), 0.01, dtype=dtype, device=device) for dtype in dtypes]
    for matrix in matrices:
        matrix[-LAST:] = drawn(device, LAST, width, dtype=torch.float32).abs_().mul_(0.01)
    bias = drawn(device, 3, features, dtype=torch.float32).abs_().unbind()
    values, indices = last_codes(device, 64, features, 8)
    x = drawn(device, 64, width)
    error = drawn(device, 64, width, dtype=torch.float32)
    codes = CodeGroup(values, indices, drawn(device, 64, 8, dtype=torch.float32), error)
    lr, step = torch.full((1,), 1e-3, device=device), torch.full((1,), 7, device=device)
    held = [m[-LAST:].clone() for m in matrices], [b[-LAST:].clone() for b in bias]
    untouched = [m[:-LAST:997].clone() for m in matrices]

    def update(matrices: Any, bias: Any, wide: bool, first: int = 0, **more: Any) -> list[Tensor]:
        cast = _wide if wide else lambda t: t
        w_enc, w_dec, *statistics = (cast(m) for m in matrices)
        b_enc, *of_bias = (cast(b) for b in bias)
        mine = CodeGroup(*(cast(c) for c in codes))
        inputs = GradientInputs(cast(x), [mine], first_feature=first)
        weights, state = SaeWeights(w_enc, w_dec, b_enc), AdamState(*statistics, *of_bias)
        square = ops.sae_gradient_square(weights, inputs, **more)
        ops.sae_update_(weights, state, inputs, AdamOptions(cast(lr), step), **more)
        return [square, w_enc, w_dec, b_enc, *state]

    shard = {"first": features - LAST, "backend": "reference"}
    exact = update([h.clone() for h in held[0]], [h.clone() for h in held[1]], True, **shard)
    eager = update([h.clone() for h in held[0]], [h.clone() for h in held[1]], False, **shard)
    got = update(matrices, bias, False)
    names = ("square", "w_enc", "w_dec", "b_enc", *AdamState._fields)
    for name, mine, e, p in zip(names, got, exact, eager, strict=True):
        assert_close(name, mine[-LAST:], e, p)
    for matrix, before in zip(matrices, untouched, strict=True):  # these move by momentum alone
        moved = matrix[:-LAST:997].double() - before.double()
        torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=0.05, atol=1e-4)


def test_sae_edit_(device: str) -> None:
    """More than 2^31 elements in x; every second row is left alone."""
    rows, width = big(device)
    features = 65_536 if device == "cuda" else 100
    values, indices = last_codes(device, rows, features, 4)
    x, table = drawn(device, rows, width), drawn(device, features, width)
    mask = torch.arange(rows, device=device) % 2 == 1
    end = slice(-LAST, None)
    before, shifted = x[end].clone(), indices[end] - (features - LAST)
    ops.sae_edit_(x, CodeEdit(None, values, indices), table, mask=mask)
    assert torch.equal(x[end][::2], before[::2])
    change = decode_reference.sparse_decode
    exact = before.double() + change(
        values[end].double(), shifted, table[end].double(), None, None
    ) * mask[end].unsqueeze(1)
    eager = (
        before.float()
        + change(values[end], shifted, table[end].float(), None, None) * mask[end].unsqueeze(1)
    ).to(BF16)
    assert_close("x", x[end], exact, eager)


def test_code_sums_(device: str) -> None:
    """Sums just below 2^31, whose bytes lie beyond; one more is refused."""
    features = 65_536 if device == "cuda" else 100
    labels = (1 << 31) // features - 1 if device == "cuda" else 50
    out = CodeSums.zeros(labels, features, device)
    values, indices = last_codes(device, 300, features, 8)
    label = labels - 1 - torch.arange(300, device=device) % 3
    ops.code_sums_(out, values, indices, label=label)
    small = CodeSums.zeros(3, LAST, device)
    moved = (indices - (features - LAST), label - (labels - 3))
    ops.code_sums_(small, values, moved[0], label=moved[1], backend="reference")
    for name, part in small._asdict().items():
        found = getattr(out, name)[-3:]
        found = found if name == "rows" else found[:, -LAST:]
        torch.testing.assert_close(found, part)
    if device == "cuda":
        del out, found
        torch.cuda.empty_cache()
        wide = [torch.empty(labels + 1, features, device=device) for _ in range(2)]
        counts = torch.empty(labels + 1, features, dtype=torch.int64, device=device)
        more = CodeSums(*wide, counts, torch.zeros_like(counts[:, 0]))
        with pytest.raises(RuntimeError, match=r"expected fewer than 2\^31 sums"):
            ops.code_sums_(more, values, indices, label=label)


@pytest.mark.parametrize("part", ["rows", "features"])
@pytest.mark.parametrize("mode", ["topk", "batch_topk", "threshold"])
def test_topk_encode(device: str, mode: str, part: str) -> None:
    """More than 2^31 elements in x, or in the dictionary; the last rows against plain torch."""
    many, width = big(device)
    rows, features = (many, 64) if part == "rows" else (LAST, many)
    x, table = drawn(device, rows, width), drawn(device, features, width)
    table /= width**0.5
    k = 8
    options: dict[str, Any] = {"threshold": 2.0} if mode == "threshold" else {"k": k}
    if mode == "batch_topk":  # so that every row keeps its k largest: none outdoes another
        options["k"] = features if part == "rows" else k
    codes = ops.topk_encode(x, ops.Encoder(table), mode=mode, **options)
    last = x[-LAST:].double()
    z = torch.cat([last @ t.double().T for t in table.split(1 << 14)], 1).relu()
    rounded = z.float()  # what is compared to choose
    dense = torch.zeros(LAST, features + 1, device=device)
    if codes.offsets is None:
        at = torch.where(codes.indices[-LAST:] < 0, features, codes.indices[-LAST:]).long()
        dense.scatter_(1, at, codes.values[-LAST:])
        kept = rounded >= rounded.topk(k).values[:, -1:]
    else:
        starts = codes.offsets[-LAST - 1 :]
        row = torch.repeat_interleave(torch.arange(LAST, device=device), starts.diff())
        mine = slice(int(starts[0]), int(starts[-1]))
        dense[row, codes.indices[mine].long()] = codes.values[mine]
        kept = rounded > 2.0
        if mode == "batch_topk":
            least = 1e-30 if part == "rows" else rounded.flatten().topk(LAST * k).values[-1]
            kept = rounded >= least
    exact = torch.where(kept, z, 0.0)
    assert_close("codes", dense[:, :-1], exact, torch.where(kept, rounded, 0.0))
    assert int((dense > 0).sum()) == int((exact > 0).sum()) > 0


def test_topk_encode_backward(device: str) -> None:
    """More than 2^31 elements in the dictionary and its gradient."""
    features, width = big(device)
    x, table = drawn(device, 64, width), drawn(device, features, width)
    grad, indices = last_codes(device, 64, features, 8)
    call = torch.ops.sidechain.topk_encode_backward.default
    found = call(grad, indices, None, x, table, None, 0, True, True)
    args = (grad, indices - (features - LAST), None, x, table[-LAST:], None)
    for place, name in enumerate(("dx", "dw", "db")):
        check(
            name, found[place] if place == 0 else found[place][-LAST:],
            lambda *a, place=place: topk_reference.topk_encode_backward(*a, bf16=False)[place],
            args,
        )  # fmt: skip
    assert not found[1][:-LAST:997].any()
