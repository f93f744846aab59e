# SPDX-License-Identifier: Apache-2.0
"""Dictionaries by hub id, from a cache that the test fills as the hub's client does."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from sae.formats.test_refusals import dictionary
from sidechain.sae import formats, starting
from sidechain.sae.formats import hub

COMMIT, OTHER = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, with the client switched off line."""
    place = tmp_path / "hub"
    place.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return place


def snapshot(cache, *, commit=COMMIT, ref="main"):
    folder = cache / "models--owner--some.name" / "snapshots" / commit
    folder.mkdir(parents=True)
    refs = cache / "models--owner--some.name" / "refs"
    refs.mkdir(exist_ok=True)
    (refs / ref).write_text(commit)
    return folder


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_at_the_root_and_in_a_subfolder(cache, name):
    folder = snapshot(cache)
    for inside in ("", "layers.3/mlp"):
        sae = dictionary()
        with torch.no_grad():
            sae.b_enc += len(inside)
        target = folder / inside
        target.mkdir(parents=True, exist_ok=True)
        formats.save(sae, target / "sae.safetensors" if name == "sidechain" else target, name)
        start = "/".join(filter(None, ("owner/some.name", inside)))
        assert formats.detect(start) == name
        found = formats.load(start)
        torch.testing.assert_close(found.b_enc, sae.b_enc)
        facts = starting.opened(start)[1]
        assert (facts["place"], facts["format"]) == (start, name)


def test_a_revision_and_a_file(cache):
    formats.save(dictionary(), snapshot(cache) / "sae.safetensors")
    later = dictionary()
    with torch.no_grad():
        later.b_enc += 1
    folder = snapshot(cache, commit=OTHER, ref="v2")
    (folder / "deep").mkdir()
    formats.save(later, folder / "deep" / "mine.safetensors")
    formats.save(later, folder / "sae.safetensors")
    assert torch.equal(formats.load("owner/some.name").b_enc, dictionary().b_enc)
    for start in (
        "owner/some.name@v2",
        f"owner/some.name@{OTHER}",
        "owner/some.name/deep/mine.safetensors@v2",
    ):
        assert torch.equal(formats.load(start).b_enc, later.b_enc), start


def test_what_exists_here_is_a_path(cache):
    mine = dictionary()
    with torch.no_grad():
        mine.b_enc += 2
    formats.save(dictionary(), snapshot(cache) / "sae.safetensors")
    formats.save(mine, Path("owner/some.name"), "sparsify")
    torch.testing.assert_close(formats.load("owner/some.name").b_enc, mine.b_enc)


@pytest.mark.parametrize("start", ["owner/none", "owner/none/sub", "owner/none@v3"])
def test_offline_and_not_in_the_cache(cache, start):
    with pytest.raises(FileNotFoundError) as caught:
        formats.load(start)
    text = str(caught.value)
    assert f"got nothing at {start} here and no repository owner/none" in text
    assert f"[offline by HF_HUB_OFFLINE: only the cache {cache} is looked at]" in text
    assert "\n" not in text


def test_a_repository_without_a_dictionary(cache):
    (snapshot(cache) / "README.md").write_text("")
    for start in ("owner/some.name", "owner/some.name/layers.3"):
        with pytest.raises(FileNotFoundError, match=r"expected one of cfg\.json, .*got none \[off"):
            formats.load(start)


@pytest.mark.parametrize(
    "start",
    ["no-slash", "/owner/name", "./owner/name", "../a", "a//b", "a b/c", "owner/name/", "o/n/../x"],
)
def test_what_is_no_hub_id(cache, monkeypatch, start):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    with pytest.raises(FileNotFoundError, match="expected a dictionary, got nothing at"):
        formats.load(start)


def test_only_the_files_of_a_dictionary_are_fetched(cache, monkeypatch):
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, sorted(allow_patterns)))
        return str(snapshot(cache, commit=str(len(asked)) * 40))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for start in ("owner/name", "owner/name/a/b@v1", "owner/name/x.safetensors"):
        with pytest.raises(FileNotFoundError):
            formats.load(start)
    every = sorted(hub.FILES)
    assert asked == [
        ("owner/name", None, every),
        ("owner/name", "v1", [f"a/b/{name}" for name in every]),
        ("owner/name", None, ["x.safetensors"]),
    ]


@pytest.mark.parametrize("error", [OSError("line one\nline two"), ConnectionError("no\nroute")])
def test_a_hub_that_cannot_be_reached(cache, monkeypatch, error):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"on the hub: (line one line two|no route)$"):
        formats.load("owner/name")
