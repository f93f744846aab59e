# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sidechain
from sidechain.pipelines import Adapter, config_hash, register_adapter
from sidechain.pipelines.adapter import _REGISTRY
from sidechain.testing import tiny_pipeline

PIPE = tiny_pipeline(layers=5)


class TestSites:
    def test_lists_every_attention_in_order(self) -> None:
        found = sidechain.sites(PIPE)
        assert found.aliases == [f"{kind}:{i}" for i in range(5) for kind in ("self", "cross")]
        site = found["cross:3"]
        assert site.name == "transformer_blocks.3.attn2"
        assert (site.kind, site.index, site.width, site.context_width, site.heads) == (
            "cross", 3, 16, 12, 4,
        )  # fmt: skip
        assert site.module is PIPE.transformer.transformer_blocks[3].attn2

    @pytest.mark.parametrize(
        ("pattern", "kind", "aliases"),
        [
            ("cross:*", None, [f"cross:{i}" for i in range(5)]),
            ("*", "self", [f"self:{i}" for i in range(5)]),
            ("cross:1-3", None, ["cross:1", "cross:2", "cross:3"]),
            ("*.attn2", None, [f"cross:{i}" for i in range(5)]),
            ("transformer_blocks.2.*", None, ["self:2", "cross:2"]),
            ("transformer_blocks.4.attn1", None, ["self:4"]),
            (["cross:4", "self:0"], None, ["self:0", "cross:4"]),
            (["cross:1", "cross:0-1"], None, ["cross:0", "cross:1"]),
        ],
    )
    def test_patterns(self, pattern: Any, kind: str | None, aliases: list[str]) -> None:
        assert sidechain.sites(PIPE, pattern, kind).aliases == aliases

    def test_a_site_selects_itself(self) -> None:
        found = sidechain.sites(PIPE)
        assert found.select(found["self:2"]).aliases == ["self:2"]
        assert found.select([found[3], "cross:4"]).aliases == ["cross:1", "cross:4"]
        assert found[1:3].aliases == ["cross:0", "self:1"]
        assert found["cross:0"] in found and "cross:9" not in found

    def test_table(self) -> None:
        lines = str(sidechain.sites(PIPE, "cross:0-1")).splitlines()
        assert lines[0].split() == ["alias", "name", "kind", "width", "heads", "reads", "output"]
        assert lines[2].split(maxsplit=5) == [
            "cross:1", "transformer_blocks.1.attn2", "cross", "16", "4",
            "text and durations  added to the residual",
        ]  # fmt: skip

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 4), st.integers(0, 4))
    def test_ranges_hold_both_ends(self, a: int, b: int) -> None:
        first, last = sorted((a, b))
        found = sidechain.sites(PIPE, f"cross:{first}-{last}")
        assert [s.index for s in found] == list(range(first, last + 1))

    def test_a_compiled_wrapper_is_seen_through(self) -> None:
        pipe = tiny_pipeline()
        plain = sidechain.sites(pipe).names
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        assert sidechain.sites(pipe).names == plain


class TestConfigHash:
    def test_depends_on_architecture_not_on_weights(self) -> None:
        assert config_hash(tiny_pipeline(seed=1)) == config_hash(tiny_pipeline(seed=2))
        assert config_hash(tiny_pipeline(layers=2)) != config_hash(tiny_pipeline(layers=3))


class TestContract:
    @pytest.mark.parametrize(
        ("pattern", "kind", "error", "match"),
        [
            ("cross:9", None, ValueError, "expected one of cross:0-4 .* got 'cross:9'"),
            ("cross:3-7", None, ValueError, "got 'cross:3-7'"),
            ("cross:4-2", None, ValueError, "got 'cross:4-2'"),
            ("nothing.*", None, ValueError, "got 'nothing"),
            (["cross:0", "cros:1"], None, ValueError, "got 'cros:1'"),
            ("", None, ValueError, "got ''"),
            (7, None, TypeError, "expected a pattern of type str"),
            ([7], None, TypeError, "expected str or Site, got int"),
            ("*", "temporal", ValueError, "expected kind"),
            ("self:*", "cross", ValueError, "expected at least one cross site"),
        ],
    )
    def test_bad_selection(
        self, pattern: Any, kind: str | None, error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            sidechain.sites(PIPE, pattern, kind)

    def test_unknown_pipeline(self) -> None:
        with pytest.raises(TypeError, match="expected a pipeline with a denoiser of class"):
            sidechain.sites(object())

    def test_indexing_an_unknown_site(self) -> None:
        with pytest.raises(ValueError, match="expected one of"):
            sidechain.sites(PIPE)["cross:7"]

    def test_a_family_cannot_be_redefined(self) -> None:
        other = Adapter(
            "other",
            ("transformer",),
            {1: ("cond",)},
            shape=lambda a, k: None,
            tokens=lambda s, c: 0,
        )  # type: ignore[arg-type,return-value]
        with pytest.raises(ValueError, match="expected a new class name"):
            register_adapter("StableAudioDiTModel", other)


def test_the_readme_names_every_family() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## Any pipeline")[1].split("## ")[0]
    named = set(re.findall(r"`(\w+)`", section.split("Each passes")[0]))
    ours = [a for a in _REGISTRY.values() if a.tokens.__module__.startswith("sidechain.")]
    assert named == {adapter.family for adapter in ours}
