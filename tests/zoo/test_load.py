# SPDX-License-Identifier: Apache-2.0
"""Weight folders are verified before they are loaded; scorers read latents only."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from sidechain import zoo
from sidechain.testing import tiny_pipeline
from sidechain.zoo import checksums, load
from sidechain.zoo.music.attributes import ATTRIBUTES
from sidechain.zoo.music.scorer import LatentScorer, MelScorer


@pytest.fixture(scope="module")
def scorers():
    torch.manual_seed(0)
    return {
        "latent": LatentScorer(width=16).eval(),
        "mel": MelScorer(channels=(4, 8, 8), width=16).eval(),
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights.bin").write_bytes(bytes(range(256)))
    (tmp_path / "config.json").write_text("{}")
    checksums.write_checksums(tmp_path)
    return tmp_path


class TestVerify:
    def test_whole(self, folder):
        checksums.verify(folder)
        sums = json.loads((folder / "checksums.json").read_text())
        assert sorted(sums) == ["config.json", "part/weights.bin"]

    def test_flipped_byte(self, folder):
        path = folder / "part" / "weights.bin"
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"zoo: expected part/weights\.bin with SHA-256 .*got"):
            checksums.verify(folder)

    def test_missing_file(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"zoo: expected the file .*config\.json"):
            checksums.verify(folder)

    @pytest.mark.parametrize("function", [checksums.verify, load.music, load.scorers])
    def test_missing_folder(self, tmp_path, function):
        call = {} if function is checksums.verify else {"folder": tmp_path / "none"}
        with pytest.raises(FileNotFoundError, match=r"zoo: expected weights .*got none"):
            function(*([] if call else [tmp_path / "none"]), **call)


class TestMusic:
    def test_loads_quietly_and_in_any_dtype(self, tmp_path, capfd, caplog):
        tiny_pipeline("music", layers=1).save_pretrained(tmp_path)
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = zoo.music(folder=tmp_path, dtype=torch.bfloat16)
        assert capfd.readouterr() == ("", "")
        assert not caplog.records
        parts = (pipe.transformer, pipe.text_encoder, pipe.codec)
        assert [part.dtype for part in parts] == [torch.bfloat16] * 3
        out = pipe("flute", num_inference_steps=1, output_type="latent").audios
        assert out.dtype == torch.bfloat16

    def test_own_folder(self, tmp_path):
        pipe = tiny_pipeline("music", layers=2)
        pipe.save_pretrained(tmp_path)
        for listed in (False, True):
            if listed:
                checksums.write_checksums(tmp_path)
            again = zoo.music(folder=tmp_path)
            again.set_progress_bar_config(disable=True)
            found, expected = (
                p(
                    "flute",
                    num_inference_steps=1,
                    output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                ).audios
                for p in (again, pipe)
            )
            assert torch.equal(found, expected)
        path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="the file is damaged"):
            zoo.music(folder=tmp_path)


class TestScorers:
    @pytest.mark.parametrize("name", ["latent", "mel"])
    def test_probabilities(self, scorers, name):
        latents = torch.randn(5, 64, 64)
        found = scorers[name].probabilities(latents)
        assert list(found) == list(ATTRIBUTES) == list(scorers[name].attributes)
        for attribute, values in found.items():
            assert values.shape == (5, len(ATTRIBUTES[attribute]))
            torch.testing.assert_close(values.sum(1), torch.ones(5))
        pieces = scorers[name].probabilities(latents, chunk=2)
        for attribute, values in found.items():
            torch.testing.assert_close(pieces[attribute], values)

    def test_stages(self, scorers):
        latents = torch.randn(2, 64, 64)
        with torch.no_grad():
            fine = [tuple(stage.shape) for stage in scorers["latent"].stages(latents)]
            planes = [tuple(stage.shape) for stage in scorers["mel"].stages(latents)]
        assert fine == [(2, 16, 64)] * 5
        assert planes == [
            (2, 4, 256, 32),
            (2, 8, 128, 16),
            (2, 8, 64, 8),
            *[(2, 16, 64)] * 3,
        ]

    def test_mel_scorer_hears_the_decoded_latents(self, scorers):
        latents = torch.randn(2, 64, 64)
        scorer = scorers["mel"]
        with torch.no_grad():
            mels = scorer.codec.decode(latents)
            for a, b in zip(scorer.stages(latents), scorer.mel_stages(mels), strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("name", ["latent", "mel"])
    @pytest.mark.parametrize("shape", [(64, 64), (1, 64, 32), (1, 1, 64, 64)])
    def test_wrong_shape(self, scorers, name, shape):
        with pytest.raises(ValueError, match=r"scorer: expected latents of shape \[B, 64, 64\]"):
            scorers[name].probabilities(torch.zeros(shape))

    def test_saved_and_loaded(self, scorers, tmp_path):
        for name, scorer in scorers.items():
            scorer.save_pretrained(tmp_path / name)
        again = zoo.scorers(folder=tmp_path)
        latents = torch.randn(2, 64, 64)
        for name, scorer in scorers.items():
            assert not again[name].training
            for attribute, values in again[name].probabilities(latents).items():
                expected = scorer.probabilities(latents)[attribute]
                assert np.array_equal(values.numpy(), expected.numpy())
