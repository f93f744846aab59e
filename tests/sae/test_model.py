# SPDX-License-Identifier: Apache-2.0
"""The model: what is active, folding, files."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from sidechain.sae import ARCHITECTURES, Normaliser, Provenance, Sae, SaeConfig

D, F, N = 12, 40, 30


def make(architecture="topk", *, normaliser=None, target_normaliser=None, **config):
    if architecture in ("topk", "batch_topk", "matryoshka"):
        config.setdefault("k", 4)
    config = SaeConfig(D, F, architecture, **config)
    sae = Sae(config, normaliser=normaliser, target_normaliser=target_normaliser, seed=1)
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec, sae.b_gate, sae.r_mag):
            if p is not None:
                p.copy_(0.3 * torch.randn_like(p))
        if not sae.config.tied_bias:
            sae.b_pre = torch.randn(D)
        if architecture in ("batch_topk", "matryoshka"):
            sae.threshold.fill_(0.7)
        elif architecture == "jumprelu":
            sae.threshold.copy_(torch.rand(F))
    return sae.eval()


def grid():
    return Normaliser(
        torch.randn(3, D),
        torch.tensor([0.5, 2.0, 8.0]),
        torch.tensor([0, 6, 12]),
        torch.tensor([900.0, 500.0, 100.0]),
    )


def dense(codes, width=F):
    rows = len(codes.values) if codes.offsets is None else len(codes.offsets) - 1
    z = torch.zeros(rows, width)
    for n in range(rows):
        span = n if codes.offsets is None else slice(codes.offsets[n], codes.offsets[n + 1])
        for value, index in zip(codes.values[span], codes.indices[span], strict=True):
            if index >= 0:
                z[n, index] = value
    return z


def expected_codes(sae, y):
    """The definition of each architecture, written out."""
    p = (y - sae.b_pre) @ sae.w_enc.T
    z = p + sae.b_enc
    name = sae.config.architecture
    if name == "topk":
        keep = torch.zeros_like(z, dtype=bool).scatter(1, z.topk(sae.config.k, 1).indices, True)
    elif name == "gated":
        keep = p + sae.b_gate > 0
        z = p * sae.r_mag.exp() + sae.b_enc
    elif name == "relu":
        keep = z > 0
    else:
        keep = z > sae.threshold
    return torch.where(keep & (z > 0), z, 0.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestArchitectures:
    def test_active_features_and_reconstruction(self, architecture):
        sae = make(architecture)
        x = torch.randn(N, D)
        with torch.no_grad():
            codes = sae.encode(x)
            z = expected_codes(sae, x)
            assert codes.values.dtype == torch.float32 and codes.indices.dtype == torch.int32
            torch.testing.assert_close(dense(codes), z)
            assert (z > 0).any() and (z == 0).any()
            torch.testing.assert_close(sae(x), z @ sae.w_dec + sae.b_dec)

    def test_folding_is_the_same_map_in_raw_units(self, architecture):
        sae = make(architecture, normaliser=grid())
        x = 3 * torch.randn(N, D)
        with torch.no_grad():
            for step, scale in ((0, 0.5), (12, 8.0)):
                folded = sae.folded(step)
                torch.testing.assert_close(folded(x), sae(x, step=step))
                raw, own = folded.encode(x), sae.encode(x, step=step)
                assert torch.equal(raw.indices, own.indices)
                torch.testing.assert_close(raw.values, own.values * scale)

    def test_file(self, architecture, tmp_path):
        sae = make(architecture, normaliser=grid())
        sae.provenance = Provenance(site="cross:3", branches=("cond",), metrics={"fvu": 0.25})
        again = Sae.load(sae.save(tmp_path / "sae.safetensors"))
        assert again.config == sae.config and again.provenance == sae.provenance
        assert not again.training
        own, read = sae.state_dict(), again.state_dict()
        assert own.keys() == read.keys()
        assert all(torch.equal(own[name], read[name]) for name in own)

    def test_decoder_norms_can_move_into_the_encoder(self, architecture):
        sae = make(architecture)
        x = torch.randn(N, D)
        with torch.no_grad():
            if architecture not in ("relu", "jumprelu", "gated"):
                return  # features are compared with each other: another scale is another model
            sae.w_dec *= torch.rand(F, 1) + 0.5
            before = sae(x)
            sae.normalise_decoder()
            torch.testing.assert_close(sae(x), before)
            torch.testing.assert_close(sae.w_dec.norm(dim=1), torch.ones(F))


class TestTranscoder:
    def test_widths_and_two_normalisers(self, tmp_path):
        target = Normaliser(torch.randn(1, 7), torch.tensor([3.0]))
        sae = make("topk", d_out=7, normaliser=grid(), target_normaliser=target)
        assert sae.config.transcoder and not sae.config.tied_bias
        x = torch.randn(2, 5, D)
        with torch.no_grad():
            out = sae(x, step=6)
            assert out.shape == (2, 5, 7)
            torch.testing.assert_close(sae.folded(6)(x), out)
            again = Sae.load(sae.save(tmp_path / "t.safetensors"))
            assert torch.equal(again(x, step=6), out)

    @torch.no_grad()
    @pytest.mark.parametrize("shared", ["the normaliser", "its memory"])
    def test_input_and_output_with_one_normaliser(self, tmp_path, shared):
        own = Normaliser(torch.randn(1, D), torch.tensor([3.0]))
        target = own if shared == "the normaliser" else Normaliser(own.mean, own.scale)
        sae = make("topk", transcoder=True, normaliser=own, target_normaliser=target)
        x = torch.randn(4, D)
        assert torch.equal(Sae.load(sae.save(tmp_path / "t.safetensors"))(x), sae(x))


class TestNormaliser:
    def test_steps_of_rows(self):
        table = grid()
        x = torch.randn(4, D)
        steps = torch.tensor([6, 0, 12, 6])
        got = table.normalise(x, steps)
        for row, entry in enumerate((1, 0, 2, 1)):
            torch.testing.assert_close(got[row], (x[row] - table.mean[entry]) / table.scale[entry])
        torch.testing.assert_close(table.restore(got, steps), x)

    def test_resampled_hits_the_known_steps(self):
        table = grid().resampled(torch.tensor([900.0, 700.0, 500.0, 100.0]))
        torch.testing.assert_close(table.scale, torch.tensor([0.5, 1.0, 2.0, 8.0]))
        torch.testing.assert_close(table.mean[1], table.mean[[0, 2]].mean(0))

    def test_bad_calls(self):
        with pytest.raises(ValueError, match=r"expected a step of \[0, 6, 12\].*got None"):
            make(normaliser=grid()).encode(torch.randn(2, D))
        with pytest.raises(ValueError, match=r"see resampled\), got 7"):
            grid().normalise(torch.randn(2, D), 7)
        with pytest.raises(ValueError, match="positive scales"):
            Normaliser(torch.zeros(1, D), torch.zeros(1))


BAD_CONFIGS = {
    "architecture": (dict(architecture="vae"), ValueError, "expected architecture to be one of"),
    "k missing": (dict(architecture="topk"), ValueError, "expected 1 <= k <= 40"),
    "k too large": (dict(architecture="topk", k=41), ValueError, "expected 1 <= k <= 40.*got 41"),
    "k with relu": (dict(architecture="relu", k=3), ValueError, "expected no k"),
    "k float": (dict(architecture="topk", k=3.0), TypeError, "expected k as int"),
    "prefixes": (
        dict(architecture="matryoshka", k=3, prefixes=(8, 4, 40)),
        ValueError,
        "ascending prefixes",
    ),
    "prefixes of topk": (dict(architecture="topk", k=3, prefixes=(40,)), ValueError, "no prefixes"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name):
    config, error, message = BAD_CONFIGS[name]
    with pytest.raises(error, match=message):
        SaeConfig(D, F, **config)


class TestBadCalls:
    def test_width(self):
        with pytest.raises(ValueError, match=r"expected x of shape \[..., 12\] \(d_in\)"):
            make().encode(torch.randn(2, 5))

    def test_untrained_threshold(self):
        sae = Sae(SaeConfig(D, F, "batch_topk", k=3)).eval()
        with pytest.raises(ValueError, match="expected a trained threshold"):
            sae.encode(torch.randn(2, D))
        assert int(sae.train().encode(torch.randn(9, D)).offsets[-1]) == 27

    def test_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a file"):
            Sae.load(tmp_path / "none")
        path = tmp_path / "x.safetensors"
        path.write_bytes(b"broken")
        with pytest.raises(ValueError, match="expected an intact safetensors file"):
            Sae.load(path)
        safetensors.torch.save_file({"w": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=r"expected a file of format 'sidechain\.sae'"):
            Sae.load(path)
        make().save(path)
        with safetensors.safe_open(path, framework="pt") as file:
            kept, header = {"w_enc": file.get_tensor("w_enc")}, file.metadata()
        safetensors.torch.save_file(kept, path, header)
        with pytest.raises(ValueError, match="expected a complete file"):
            Sae.load(path)
