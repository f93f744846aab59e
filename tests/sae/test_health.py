# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from sidechain.sae import Normaliser, Sae, SaeConfig
from sidechain.sae.features import evaluate
from sidechain.sae.features.evaluate import measure
from sidechain.sae.features.top import top_examples
from sidechain.store import ActivationStore, ActivationWriter, ArrayRows, Storage

D, F, STEPS, PROMPTS, TOKENS = 5, 12, (0, 3), 4, 7


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path):
    """Rows of two steps of very different size."""
    with ActivationWriter(tmp_path / "acts", {"cross:0": D}, Storage(torch.float32)) as writer:
        for step in STEPS:
            for prompt in range(PROMPTS):
                rows = draw(TOKENS, D, seed=100 * step + prompt) * (1 + step) + step
                writer.write({"cross:0": rows}, step=step, branch="cond", prompt=prompt)
    return ActivationStore(tmp_path / "acts", "cross:0")


def dictionary(architecture, **changes):
    normaliser = Normaliser(draw(2, D, seed=1), torch.tensor([0.7, 4.0]), torch.tensor(STEPS))
    k = 3 if architecture in ("topk", "batch_topk") else None
    config = SaeConfig(D, F, architecture, k=k, **changes)
    sae = Sae(config, normaliser=normaliser).eval()
    with torch.no_grad():
        sae.w_enc.copy_(draw(F, D, seed=2))
        sae.b_enc.copy_(0.3 * draw(F, seed=3))
        sae.b_enc[4] = -100  # never active
        sae.b_dec.copy_(0.2 * draw(D, seed=4))
        if architecture == "batch_topk":
            sae.threshold.fill_(0.8)
    return sae


def dense(sae, store):
    """Normalised rows, dense activations and steps, in float64, from the formulas."""
    rows = torch.arange(len(store))
    x, step = store.read(rows).double(), store.labels(rows).step
    place = torch.tensor([STEPS.index(int(s)) for s in step])
    scale = sae.normaliser.scale.double()[place, None]
    y = (x - sae.normaliser.mean.double()[place]) / scale
    z = (y - sae.b_pre.double()) @ sae.w_enc.double().T + sae.b_enc.double()
    if sae.config.architecture == "topk":
        kept = torch.zeros_like(z).scatter(1, z.topk(3).indices, 1.0) * z.clamp(min=0)
    else:
        kept = z * (z > 0.8)
    return y, kept.detach(), place, scale[:, 0]


@pytest.mark.parametrize("batch", [4096, 10])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_metrics_equal_the_dense_expressions(store, architecture, batch):
    sae = dictionary(architecture)
    found = measure(sae, store, batch=batch)
    y, kept, place, scale = dense(sae, store)
    error = (y - kept @ sae.w_dec.detach().double() - sae.b_dec.detach().double()).square().sum(1)
    centred = torch.stack([y[place == s].mean(0) for s in (0, 1)])[place]
    spread = (y - centred).square().sum(1)
    per_step = torch.stack([error[place == s].sum() / spread[place == s].sum() for s in (0, 1)])
    raw = (error * scale**2).sum() / (spread * scale**2).sum()
    assert found.rows == len(STEPS) * PROMPTS * TOKENS and found.steps.tolist() == list(STEPS)
    assert found.fvu == pytest.approx(float(error.sum() / spread.sum()), rel=1e-5)
    assert found.raw_fvu == pytest.approx(float(raw), rel=1e-5)
    assert found.raw_fvu != pytest.approx(found.fvu, rel=1e-3)  # or the test says nothing
    torch.testing.assert_close(found.step_fvu, per_step, rtol=1e-5, atol=0)
    active = (kept > 0).double()
    assert found.l0 == pytest.approx(float(active.sum(1).mean()))
    torch.testing.assert_close(found.density, active.mean(0))
    torch.testing.assert_close(found.mean_square, kept.square().mean(0), rtol=1e-5, atol=0)
    assert found.dead == float((active.sum(0) == 0).double().mean()) > 0


def test_a_perfect_dictionary_explains_everything(tmp_path):
    """Rows of one atom each, and a dictionary that has the atoms."""
    sae = Sae(SaeConfig(D, F, "topk", k=1, tied_bias=False)).eval()
    values = torch.rand(60, generator=torch.Generator().manual_seed(5)) + 0.5
    number = torch.arange(60) % F
    with ActivationWriter(tmp_path, {"s": D}, Storage(torch.float32)) as writer:
        writer.write({"s": values[:, None] * sae.w_dec.detach()[number]}, prompt=0)
    found = measure(sae, ActivationStore(tmp_path))
    assert found.fvu < 1e-10 and found.dead == 0 and found.l0 == 1


@pytest.mark.parametrize("batch", [4096, 5])
def test_top_examples_are_the_largest_of_each_prompt(store, batch):
    sae = dictionary("topk")
    _, kept, _, _ = dense(sae, store)
    labels = store.labels(torch.arange(len(store)))
    found = top_examples(sae, store, [2, 4, 9], 3, batch=batch)
    assert list(found) == [2, 4, 9] and found[4] == []
    for feature in (2, 9):
        peaks = {
            prompt: float(kept[labels.prompt == prompt, feature].max()) for prompt in range(PROMPTS)
        }
        expected = sorted((v for v in peaks.values() if v > 0), reverse=True)[:3]
        assert [m.value for m in found[feature]] == pytest.approx(expected, rel=1e-5)
        for moment in found[feature]:
            row = (
                (labels.prompt == moment.prompt)
                & (labels.step == moment.step)
                & (labels.token == moment.token)
            )
            assert float(kept[row, feature]) == pytest.approx(moment.value, rel=1e-5)


def test_bad_input(store, tmp_path):
    with pytest.raises(ValueError, match=r"features within \[0, 12\), got 12"):
        top_examples(dictionary("topk"), store, [12], 1)
    with ActivationWriter(tmp_path / "some", {"s": D}) as writer:
        writer.write({"s": torch.zeros(3, D)})
        writer.write({"s": torch.zeros(3, D)}, prompt=0)
    some = ActivationStore(tmp_path / "some")
    with pytest.raises(ValueError, match="all know their prompts, or none"):
        top_examples(dictionary("topk"), some, [1], 1)
    with pytest.raises(ValueError, match="expected a store with rows, got an empty one"):
        measure(dictionary("topk"), ActivationStore(tmp_path / "some", prompts=[5]))
    with pytest.raises(ValueError, match="expected rows of width 5, got 6"):
        measure(dictionary("topk"), ArrayRows(torch.ones(3, D + 1)))
    with pytest.raises(ValueError, match="expected an autoencoder"):
        measure(Sae(SaeConfig(D, F, "topk", k=1, transcoder=True)), ArrayRows(torch.ones(3, D)))
    with pytest.raises(ValueError, match=r"expected finite rows .*got row 1"):
        measure(dictionary("topk"), ArrayRows(torch.tensor([[1.0], [torch.nan]]).expand(2, D)))


@pytest.mark.parametrize("batch", [4096, 5])
def test_rows_without_prompts_stand_for_themselves(store, batch):
    """An array says no prompts; its rows know their steps here, as those of the store."""
    sae = dictionary("topk")
    rows = torch.arange(len(store))
    array = ArrayRows(store.read(rows), steps=store.labels(rows).step)
    assert measure(sae, array, batch=batch).fvu == measure(sae, store).fvu
    _, kept, _, _ = dense(sae, store)
    found = top_examples(sae, array, [2, 4, 9], 5, batch=batch)
    assert found[4] == []
    for feature in (2, 9):
        values, order = kept[:, feature].sort(descending=True, stable=True)
        assert [example.row for example in found[feature]] == order[:5].tolist()
        assert [e.value for e in found[feature]] == pytest.approx(values[:5].tolist(), rel=1e-5)
        assert all(e.prompt == -1 and e.token == e.row for e in found[feature])


def test_labels_are_read_in_parts(store, monkeypatch):
    """Those of all rows at once need more memory than the rows of a batch."""
    sae = dictionary("topk")
    whole = measure(sae, store), top_examples(sae, store, [2, 9], 3)
    held, asked = evaluate.LABELS, []
    monkeypatch.setattr(evaluate, "LABELS", 10)
    real = type(store).labels
    monkeypatch.setattr(
        type(store), "labels", lambda self, rows: (asked.append(len(rows)), real(self, rows))[1]
    )
    found = measure(sae, store, batch=7)
    assert found.steps.tolist() == list(STEPS) and found.fvu == pytest.approx(whole[0].fvu)
    assert top_examples(sae, store, [2, 9], 3, batch=7) == whole[1]
    assert max(asked) <= 10 < len(store) < held


def test_equal_activations_give_the_lower_rows(store):
    sae = dictionary("topk")
    x = store.read(torch.arange(8))
    twice = ArrayRows(torch.cat([x, x, x]), steps=torch.zeros(24, dtype=torch.int64))
    once = top_examples(sae, twice, [2], 24, batch=7)[2]
    assert [e.row for e in once] == sorted((e.row for e in once), key=lambda n: (
        -next(e.value for e in once if e.row == n), n))  # fmt: skip
    assert once[0].row < 8 and once[1].row == once[0].row + 8
