# SPDX-License-Identifier: Apache-2.0
"""Dictionaries in half precision and in float64, rows of other dtypes than the weights."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from sidechain.sae import ARCHITECTURES, Normaliser, Sae, SaeConfig, formats
from sidechain.testing.tolerance import assert_close

D, OUT, F, N = 16, 10, 48, 40
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32, torch.float64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(architecture, *, stepped=True, **config):
    """A dictionary behind means that are large beside the spread, as those of activations are."""
    k = 4 if ARCHITECTURES[architecture].takes("k") else None
    config = SaeConfig(D, F, architecture, k=k, **config)
    steps = (torch.tensor([0, 5]), torch.tensor([999.0, 501.0])) if stepped else ()
    entries = 2 if stepped else 1
    own = Normaliser(200 + draw(entries, D), torch.tensor([0.7, 3.0])[:entries], *steps)
    out = None
    if config.transcoder:
        out = Normaliser(-90 + draw(entries, OUT), torch.tensor([2.0, 5.0])[:entries], *steps)
    sae = Sae(config, normaliser=own, target_normaliser=out, seed=2).eval()
    with torch.no_grad():
        for index, (name, tensor) in enumerate(sorted(sae.weights().items())):
            if name == "threshold":
                tensor.copy_(0.3 + 0.1 * draw(*tensor.shape, seed=index))
            elif name in ("b_enc", "b_gate", "r_mag", "b_dec"):
                tensor.copy_(0.3 * draw(*tensor.shape, seed=index))
    return sae


def rows(seed=7):
    return 200 + 2 * draw(N, D, seed=seed)


def same(codes, other):
    assert torch.equal(codes.indices, other.indices)
    torch.testing.assert_close(codes.values, other.values, rtol=1e-6, atol=1e-6)


SHAPES = [{}, {"tied_bias": False}, {"transcoder": True, "d_out": OUT}]


@torch.no_grad()
@pytest.mark.parametrize("of_rows", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=["tied", "untied", "transcoder"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_weights_give_what_float32_gives_with_the_same_weights(
    architecture, shape, dtype, of_rows
):
    sae = make(architecture, **shape).to(dtype)
    assert sae.w_enc.dtype == dtype
    exact = deepcopy(sae).float()
    x = rows().to(of_rows)
    for step in (0, 5, torch.arange(N) % 2 * 5):
        codes = sae.encode(x, step=step)
        same(codes, exact.encode(x.float(), step=step))
        assert len(codes.values)
        found, wanted = sae(x, step=step), exact(x.float(), step=step)
        assert found.dtype == of_rows
        assert_close("x_hat", found, wanted, wanted.to(of_rows))
        torch.testing.assert_close(
            sae.preactivations(x, step=step), exact.preactivations(x.float(), step=step)
        )


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_forms_of_half_weights(architecture, dtype, tmp_path):
    sae = make(architecture).to(dtype)
    exact = deepcopy(sae).float()
    x = rows()
    folded = sae.folded(5)
    assert folded.w_enc.dtype == torch.float32
    for name, tensor in exact.folded(5).state_dict().items():
        assert torch.equal(folded.state_dict()[name], tensor), name
    again = Sae.load(sae.save(tmp_path / "own.safetensors"))
    assert torch.equal(again(x, step=0), exact(x, step=0))
    for name in formats.FORMATS[1:]:
        if name not in ("sparsify", "tada") or architecture == "topk":
            formats.save(sae, tmp_path / name, name, step=5)
            read = formats.load(tmp_path / name)
            torch.testing.assert_close(read(x), exact.folded(5)(x), rtol=1e-4, atol=1e-3)
    if not sae.config.kind.selects:
        before = sae(x, step=0)
        sae.normalise_decoder()
        torch.testing.assert_close(sae(x, step=0), before, rtol=1e-2, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_half_transcoder_is_folded_in_float32(architecture, dtype):
    sae = make(architecture, transcoder=True, d_out=OUT).to(dtype)
    folded, exact = sae.folded(5), deepcopy(sae).float().folded(5)
    for name, tensor in exact.state_dict().items():
        assert torch.equal(folded.state_dict()[name], tensor), name
    assert not torch.equal(exact.w_enc, sae.w_enc.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_export_without_a_normaliser_is_float32(dtype, tmp_path):
    sae = Sae(SaeConfig(D, F, "topk", k=4)).to(dtype)
    formats.save(sae, tmp_path / "s", "sparsify")
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / "s" / "sae.safetensors").values()} == {
        torch.float32
    }
    assert sae.w_enc.dtype == dtype  # what was given stays as it was


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_a_normaliser_keeps_its_precision(dtype):
    sae = make("topk")
    kept = {name: t.clone() for name, t in sae.normaliser.tensors("n").items()}
    for name, tensor in sae.to(dtype).normaliser.tensors("n").items():
        assert tensor.dtype == kept[name].dtype and torch.equal(tensor, kept[name]), name
    assert sae.double().normaliser.mean.dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("of_rows", FLOATS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float64(architecture, of_rows):
    sae = make(architecture)
    wide = deepcopy(sae).double()
    x = rows().to(of_rows)
    codes, out = wide.encode(x, step=5), wide(x, step=5)
    assert codes.values.dtype == torch.float64 and out.dtype == of_rows
    torch.testing.assert_close(out, sae(x, step=5), rtol=1e-4, atol=1e-3)
    folded = wide.folded(5)
    assert folded.w_enc.dtype == torch.float64
    torch.testing.assert_close(folded(x.double()), wide(x.double(), step=5))
    assert torch.equal(wide.preactivations(x.double(), step=5).relu() > 1e9, torch.zeros(N, F) > 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_the_rows(architecture, dtype):
    sae = make(architecture, stepped=False).to(dtype)
    exact = deepcopy(sae).double()
    x = rows().to(dtype).requires_grad_()
    other = x.detach().double().requires_grad_()
    pull = draw(N, D, seed=11)
    for model, given in ((sae, x), (exact, other)):
        (model(given) * pull.to(given.dtype)).sum().backward()
    assert x.grad.dtype == dtype and bool(other.grad.abs().sum())
    error = (x.grad.double() - other.grad).norm() / other.grad.norm()
    assert float(error) < 4 * torch.finfo(dtype).eps + 1e-6
    named = dict(exact.named_parameters())
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None:
            wanted = named[name].grad
            error = (parameter.grad.double() - wanted).norm() / wanted.norm()
            assert parameter.grad.dtype == dtype
            assert float(error) < 8 * torch.finfo(dtype).eps + 1e-5, name


BAD = {
    "integers": (torch.zeros(2, D, dtype=torch.int64), TypeError, "of a float dtype, got int64$"),
    "booleans": (torch.zeros(2, D, dtype=torch.bool), TypeError, "of a float dtype, got bool$"),
    "an array": (torch.zeros(2, D).numpy(), TypeError, "as a tensor .*, got ndarray$"),
    "no rows": (torch.tensor(1.0), ValueError, r"\[\.\.\., 16\] \(d_in\), got \[\]$"),
    "elsewhere": (
        torch.zeros(2, D, device="meta"),
        RuntimeError,
        r"\[device of the weights\], got meta$",
    ),
}


@pytest.mark.parametrize("call", ["__call__", "encode", "preactivations"])
@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_refused(name, call):
    x, error, message = BAD[name]
    with pytest.raises(error, match=r"^Sae: expected x .*" + message):
        getattr(make("topk"), call)(x, step=0)
