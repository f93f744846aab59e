# SPDX-License-Identifier: Apache-2.0
"""An architecture is one file and one row of the registry: nothing else tests its name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sidechain
from sidechain.sae import Normaliser, Sae, SaeConfig, TrainConfig
from sidechain.sae.architectures import registry
from sidechain.sae.architectures.base import SaeLensLayout
from sidechain.sae.architectures.registry import ARCHITECTURES, Architecture, implementation
from sidechain.sae.architectures.relu import Relu
from sidechain.sae.training.rows import Rows
from sidechain.sae.training.state import TrainState
from sidechain.sae.training.step import train_step

ROOT = Path(sidechain.__file__).parent
#: Rooms in which the same words name something else: modes of an op, cases of its tests.
OTHERS = ("ops", "reference", "testing", "bench", "triton_kernels")
D, F, N = 8, 24, 16


def named_tests(source: str) -> list[int]:
    """Return the lines that compare with, or look up, the name of an architecture."""

    def is_name(node: ast.expr) -> bool:
        if isinstance(node, ast.Attribute | ast.Name):
            return (node.attr if isinstance(node, ast.Attribute) else node.id) == "architecture"
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(is_name(one) for one in node.elts)
        return isinstance(node, ast.Constant) and node.value in ARCHITECTURES

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            # Names are compared with the registry alone: `architecture in ARCHITECTURES`.
            known = any(isinstance(s, ast.Name) and s.id == "ARCHITECTURES" for s in sides)
            if any(is_name(side) for side in sides) and not known:
                found.append(node.lineno)
        elif isinstance(node, ast.Subscript | ast.Call):
            table = node.value if isinstance(node, ast.Subscript) else node.func
            if isinstance(table, ast.Attribute) and table.attr in ("get", "startswith", "endswith"):
                table, keys = table.value, node.args[:1] if isinstance(node, ast.Call) else []
            else:
                keys = [node.slice] if isinstance(node, ast.Subscript) else []
            whole = isinstance(table, ast.Name) and table.id == "ARCHITECTURES"
            if not whole and any(is_name(key) or is_name(table) for key in keys):
                found.append(node.lineno)
        elif isinstance(node, ast.Match) and is_name(node.subject):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('config.architecture == "own"', 1),
        ('architecture in ("own", "other")', 1),
        ('name != "batch_topk"', 1),
        ('name in {"jumprelu", "x"}', 1),
        ("{1: 2}[config.architecture]", 1),
        ('table.get("gated", 3)', 1),
        ('config.architecture.endswith("topk")', 1),
        ("match config.architecture:\n  case _: pass", 1),
        ("config.architecture not in ARCHITECTURES", 0),
        ("ARCHITECTURES[architecture].takes(k)", 0),
        ('kind.threshold == "batch"', 0),
    ],
)
def test_the_search_finds_tests_of_a_name(source, lines):
    assert len(named_tests(source)) == lines


def test_no_name_is_tested_outside_its_file():
    files = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in OTHERS]
    assert len(files) > 100
    found = {
        str(path.relative_to(ROOT)): lines
        for path in files
        if "architectures" not in path.parts and (lines := named_tests(path.read_text()))
    }
    assert not found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_traits_and_file_agree(name):
    kind, made = ARCHITECTURES[name], implementation(name)
    own = made.own(F, 0.25)
    assert tuple(own) == kind.tensors
    assert all(own[parameter].shape == (F,) for parameter in kind.parameters)
    if kind.threshold:
        assert own["threshold"].shape == ((F,) if kind.threshold == "feature" else ())
    assert kind.fused == bool(kind.selects) == kind.takes("k")
    assert ("sparsify" in kind.formats) == bool(made.sparsify)
    assert ("dictionary_learning" in kind.formats) == bool(made.classes)
    assert ("saelens" in kind.formats) == hasattr(made, "saelens")


class Shifted(Relu):
    """An architecture that nobody else has heard of: relu(z - own[f])."""

    saelens = SaeLensLayout("shifted", read="shifted")
    classes = ()

    def own(self, features, threshold):
        return {"own": torch.full((features,), 0.1)}

    def thresholded(self, sae):
        return sae.w_enc, sae.b_enc - sae.own, 0.0

    def loss(self, state, weights, x, target):
        return super().loss(
            state, {**weights, "b_enc": weights["b_enc"] - weights["own"]}, x, target
        )


def test_one_file_and_one_row_make_an_architecture(monkeypatch, tmp_path):
    row = Architecture("here", options=frozenset({"sparsity"}), parameters=("own",))
    monkeypatch.setitem(registry.ARCHITECTURES, "shifted", row)
    module = SimpleNamespace(IMPLEMENTATION=Shifted())
    monkeypatch.setitem(sys.modules, "sidechain.sae.architectures.shifted", module)
    config = SaeConfig(D, F, "shifted")
    train = TrainConfig(
        tokens=N * 30, batch=N, lr=1e-2, sparsity=0.1, resample=0.1, dead_tokens=2 * N
    )
    state = TrainState(config, train, Normaliser.identity(D))
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    losses = [float(train_step(state, Rows(x)).row_loss.sum()) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(state.weights["own"], torch.full((F,), 0.1))  # it is trained
    sae = state.to_sae()
    again = Sae.load(sae.save(tmp_path / "sae.safetensors"))
    assert torch.equal(again.own, state.weights["own"])
    assert torch.equal(again(x), sae(x))
    torch.testing.assert_close(again.folded()(x), sae(x))


def test_settings_need_no_torch():
    code = (
        "import sys; from sidechain.sae.config import SaeConfig; "
        "from sidechain.sae.training.train_config import TrainConfig; "
        "SaeConfig(8, 16, k=2); TrainConfig(tokens=4096); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
