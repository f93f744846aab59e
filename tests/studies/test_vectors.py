# SPDX-License-Identifier: Apache-2.0
"""Vectors from prompt pairs, saved where the config says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sidechain.studies import common, vectors
from sidechain.vectors import PromptPairs, SteeringVector, caa
from sidechain.zoo.music.concepts import concept


@pytest.fixture
def config(tmp_path):
    # a folder that is not there yet, as the default of the command
    return vectors.VectorConfig(
        concept="vocals", out=tmp_path / "new" / "folder" / "v.safetensors", pairs=3, steps=2
    )


def test_run_saves_a_file_that_loads(model, config):
    made = vectors.run(config)
    again = SteeringVector.load(config.out, model.pipe)
    assert again.concept == "vocals"
    assert again.steps == 2
    assert again.branches == ["uncond", "cond"] or again.branches == ["cond", "uncond"]
    assert len(again.sites) == 3
    assert again.provenance.positive == 3
    for key, value in made.tensors.items():
        assert torch.equal(again.tensors[key], value)
    site = again.sites[0]
    assert bool(again[site].norm(dim=1).min() > 0)


def test_is_the_difference_of_the_concept_pairs(model, config):
    made = vectors.build(model.subject, config, progress=False)
    pairs = concept("vocals").pairs(3, common.VECTOR_PROMPTS)
    plain = caa(
        model.pipe,
        PromptPairs(
            [pair.clean for pair in pairs],
            [pair.corrupted for pair in pairs],
            seeds=[common.noise_seed(0, index) for index in range(3)],
        ),
        "cross:*",
        batch_size=1,
        normalise=False,
        progress=False,
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    for key, value in plain.tensors.items():
        torch.testing.assert_close(made.tensors[key], value, rtol=1e-3, atol=1e-6)


def test_keys_of_a_prompt_are_computed_once_a_run(model, config):
    """The test above holds the result against a run that computes them at every step."""
    attn = model.pipe.transformer.transformer_blocks[0].attn2
    calls = []
    hook = attn.to_k.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    try:
        vectors.build(model.subject, replace(config, steps=3), progress=False)
    finally:
        hook.remove()
    assert len(calls) == 1
    assert calls[0][0] <= 2 * config.pairs + 1  # one entry a text, not one a row


def test_without_text_there_is_no_difference(model, config):
    """The unconditional pass sees no prompt; at the first step it also sees equal latents."""
    made = vectors.build(model.subject, config, progress=False)
    for site in made.sites:
        assert float(made[site, "uncond"][0].abs().max()) < 1e-6
        assert float(made[site, "cond"][0].abs().max()) > 1e-4


def test_own_prompts_and_sites(model, tmp_path):
    made = vectors.run(
        vectors.VectorConfig(
            concept="mine",
            prompts=(["flute", "piano", "cello"], ["violin"] * 3),
            pairs=2,
            sites="cross:2,cross:0",
            normalise=True,
            steps=2,
            guidance=1.0,
        )
    )
    assert made.sites == ["transformer_blocks.0.attn2", "transformer_blocks.2.attn2"]
    assert made.branches == ["cond"]
    assert made.provenance.positive == 2
    for norms in made.norms().values():
        torch.testing.assert_close(norms, torch.ones(2))


def test_bad_input(model, tmp_path):
    out = tmp_path / "v.safetensors"
    with pytest.raises(ValueError, match=r"concept: expected one of .*, got 'oboe'"):
        vectors.run(vectors.VectorConfig(concept="oboe", out=out))
    with pytest.raises(ValueError, match=r"sites: expected one of .*, got 'cross:8'"):
        vectors.run(vectors.VectorConfig(concept="drums", sites="cross:8", out=out))
    assert not out.exists()
