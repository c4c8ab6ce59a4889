"""Attributions against plain sums of gradients and linear models, attention between visits against loops, hidden codes in both layouts and in any company,
figures of all kinds of models, and that nothing of a patient is written anywhere."""
import logging
import math
import sys

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import example, HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ehr_sequencing.batches import make_batch
from ehr_sequencing.behrt import BEHRT, BEHRTConfig, visit_attention_mask
from ehr_sequencing.classification import BEHRTForSequenceClassification, prepend_cls
from ehr_sequencing.explain import (HideCodes, attention_between_visits, attention_rollout, attribute_codes, code_layer, code_summary, explained_score, history_until, patient_effects, plot_patient, risk_path,
                                    visit_attention)
from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
from ehr_sequencing.sequences import build_store
from ehr_sequencing.survival import BEHRTForSurvival
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.vocabulary import CLS, MASK, PAD, SEP, fit_vocabulary

matplotlib.use("Agg")
many = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
few = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def store():
    cohort = simulate_cohort(60, seed=3)
    return build_store(cohort.table, fit_vocabulary(cohort.table.events, exclude=[OUTCOME_CODE], n_value_bins=3))


class Classifier(nn.Module):
    "Logits (B, 3) from the mean of a bidirectional BEHRT, with or without [CLS] in front."
    def __init__(self, vocab_size, problem, cls=False):
        super().__init__()
        self.behrt, self.head, self.problem, self.cls = BEHRT(BEHRTConfig(vocab_size, 16, 32, 1, 2, attention="bidirectional")), nn.Linear(32, 3), problem, cls

    def forward(self, batch):
        if self.cls: batch = prepend_cls(batch)
        hidden = self.behrt(batch["codes"], batch["ages"], batch["visit_ids"], batch["attention_mask"], batch["times"])
        return self.head((hidden * batch["attention_mask"].unsqueeze(-1)).sum(1) / batch["attention_mask"].sum(1, keepdim=True))


def models(n):
    "One model of each kind, with the options that explain it."
    torch.manual_seed(1)
    config = BEHRTConfig(n, 16, 32, 2, 2)
    return {"behrt": (BEHRTForSurvival(config, (365, 1825)), {"horizon": 700}), "visit hazards": (BEHRTForSurvival(config), {"scale": "log_odds"}), "lstm": (SurvivalLSTM(LSTMConfig(n, 16, 16), (365, 1825)), {}),
            "multilabel": (Classifier(n, "multilabel"), {"label": 2, "scale": "log_odds"}), "multiclass": (Classifier(n, "multiclass"), {"label": 1, "scale": "risk"}),
            "[CLS] in front": (Classifier(n, "binary", True), {"scale": "log_odds"})}


def gradient_sum(model, one, options, n=300):
    "Midpoint rule, one point at a time."
    layer, key = code_layer(model)
    fixed = (one[key] == PAD) | (one[key] == CLS) | (one[key] == SEP)
    to, start = (layer(c).detach() for c in (one[key], torch.where(fixed, one[key], MASK)))
    total = torch.zeros_like(to)
    for k in range(n):
        point = (start + (k + 0.5) / n * (to - start)).requires_grad_()
        hook = layer.register_forward_hook(lambda module, inputs, output, point=point: torch.cat([output[:, :output.shape[1] - point.shape[1]], point], 1))
        try: total += torch.autograd.grad(explained_score(model, one, **options).sum(), point)[0]
        finally: hook.remove()
    return ((to - start) * total / n).sum(-1)[:, -fixed.shape[1]:][~fixed]


@pytest.mark.parametrize("kind", ["behrt", "visit hazards", "lstm", "multilabel", "multiclass", "[CLS] in front"])
def test_attributions_are_the_path_integral_and_complete(store, kind):
    model, options = models(len(store.vocabulary))[kind]
    batch, row = make_batch(store, range(6), max_tokens=60), 4
    found = attribute_codes(model, batch, store.vocabulary, [row], n_steps=64, **options)
    model.eval()
    mine = gradient_sum(model, history_until(batch, row), options).numpy()
    theirs = found.tokens["attribution"].to_numpy()
    np.testing.assert_allclose(theirs, mine, atol=6e-3 * np.abs(mine).sum())
    check = found.patients.iloc[0]
    hidden = {name: tensor.clone() for name, tensor in batch.items()}
    key = code_layer(model)[1]
    hidden[key][hidden[key] > SEP] = MASK
    hidden[key][hidden[key] == 1] = MASK
    with torch.no_grad(): ends = [explained_score(model, b, **options)[row].item() for b in (batch, hidden)]
    assert np.allclose([check["score"], check["baseline"]], ends, atol=1e-4)  # of the whole batch, with padding
    assert abs(theirs.sum() - (ends[0] - ends[1])) < 0.011 * np.abs(theirs).sum() + 1e-5
    assert len(found.tokens) == int(batch["attention_mask"][row].sum()) and found.tokens["code"].tolist() == store.vocabulary.decode(batch["codes"][row][batch["attention_mask"][row]])
    assert found.tokens["visit"].tolist() == batch["visit_ids"][row][batch["attention_mask"][row]].tolist()
    assert (found.tokens["days"] - batch["times"][row][batch["attention_mask"][row]].round().numpy()).abs().max() <= 1
    assert found.tokens["age"].tolist() == batch["ages"][row][batch["attention_mask"][row]].tolist()


class Linear(nn.Module):
    "Log odds of visit hazards, linear in the embeddings so far."
    def __init__(self, n, d, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.horizons, self.visit_encoder, self.weight = None, nn.Module(), nn.Parameter(torch.randn(d) * 0.02)  # a few hundred codes must not drive a risk to 1
        self.visit_encoder.code = nn.Embedding(n, d, padding_idx=PAD)

    def forward(self, batch): return ((self.visit_encoder.code(batch["visit_codes"]) * batch["visit_mask"].unsqueeze(-1)).sum(2) @ self.weight).cumsum(1) - 1


@few
@example(4, 1, 1, "[MASK]")
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([1, 4, 16]), st.sampled_from(["[MASK]", "[PAD]", "[UNK]"]))
def test_linear_models_get_weight_times_difference(store, seed, dim, steps, baseline):
    generator = np.random.default_rng(seed)
    model, rows = Linear(len(store.vocabulary), dim, seed), generator.choice(len(store), 3, replace=False)
    batch = make_batch(store, rows, max_tokens=40)
    landmarks = [int(generator.integers(0, n)) for n in batch["sequence_mask"].sum(1)]
    found = attribute_codes(model, batch, store.vocabulary, landmarks=landmarks, scale="log_odds", n_steps=steps, baseline=baseline)
    vectors = model.visit_encoder.code.weight.detach()
    exact = (vectors[store.vocabulary.encode(found.tokens["code"])] - vectors[store.vocabulary.index[baseline]]) @ model.weight.detach()
    np.testing.assert_allclose(found.tokens["attribution"], exact, atol=1e-5)
    assert (found.tokens.groupby("row")["visit"].max() <= np.array(landmarks)).all() and (found.patients["n_steps"] == steps).all()
    summary = code_summary(found)
    assert summary["n"].sum() == len(found.tokens) and math.isclose(summary["total"].sum(), found.tokens["attribution"].sum(), abs_tol=1e-9)


def test_nothing_of_a_patient_is_left_behind(store, capsys, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    model, options = models(len(store.vocabulary))["behrt"]
    batch = make_batch(store, range(3), max_tokens=40)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    model.behrt.embedding.code.weight.requires_grad_(False)  # a frozen embedding is explained all the same
    assert model.training
    found = attribute_codes(model, batch, store.vocabulary, **options)
    visit_attention(model, batch)
    risk_path(model, history_until(batch, 0))
    assert model.training and all(p.grad is None for p in model.parameters()) and not found.tokens["attribution"].isna().any()
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert not model.behrt.embedding.code._forward_hooks and not any(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "") and not [r for r in caplog.records if r.name.startswith("ehr_sequencing")]
    with pytest.raises(ValueError, match="landmark"): attribute_codes(model, batch, store.vocabulary, [0], landmarks=[-1])
    assert model.training  # put back after an error too


def test_without_captum_the_extra_is_named(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    model, _ = models(len(store.vocabulary))["behrt"]
    with pytest.raises(ImportError, match=r"pip install 'ehr_sequencing\[explain\]'"): attribute_codes(model, make_batch(store, [0]), store.vocabulary)


def test_models_and_batches_that_do_not_fit(store):
    made, vocabulary = models(len(store.vocabulary)), store.vocabulary
    with pytest.raises(ValueError, match="reads visit_codes"): attribute_codes(made["lstm"][0], make_batch(store, [0], layout="flat"), vocabulary)
    with pytest.raises(ValueError, match="reads codes"): attribute_codes(made["behrt"][0], make_batch(store, [0], layout="hierarchical"), vocabulary)
    with pytest.raises(ValueError, match="no calendar"): attribute_codes(made["visit hazards"][0], make_batch(store, [0]), vocabulary, horizon=365)
    with pytest.raises(ValueError, match=r"expected days in \(0, 1825\]"): attribute_codes(made["behrt"][0], make_batch(store, [0]), vocabulary, horizon=4000)
    with pytest.raises(ValueError, match="expected one of log_hazard"): attribute_codes(made["behrt"][0], make_batch(store, [0]), vocabulary, scale="odds")


@st.composite
def attentions(draw):
    "Attention weights of some layers, visit-causal or not, and the visits of the tokens: -1 for [CLS] in front and padding at the end."
    seed, B, V, layers, heads = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator, cls = np.random.default_rng(seed), draw(st.booleans())
    rows = [[-1] * cls + sorted(generator.integers(0, V, generator.integers(1, 9)).tolist()) for _ in range(B)]
    L = max(map(len, rows)) + draw(st.integers(0, 2))
    visit_ids = torch.tensor([r + [-1] * (L - len(r)) for r in rows])
    real = torch.tensor([[True] * len(r) + [False] * (L - len(r)) for r in rows])
    kind = draw(st.sampled_from(["visit_causal", "bidirectional"]))
    allowed = visit_attention_mask(visit_ids, real, kind)
    weights = [torch.tensor(generator.normal(size=(B, heads, L, L))).masked_fill(~allowed.unsqueeze(1), -math.inf).softmax(-1) for _ in range(layers)]
    return weights, visit_ids, real, V, cls, kind


@many
@given(attentions())
def test_attention_between_visits_is_the_loop(drawn):
    weights, visit_ids, real, V, cls, kind = drawn
    flow = attention_rollout(weights)
    for b in range(len(visit_ids)):
        by_hand = np.eye(visit_ids.shape[1])
        for layer in weights: by_hand = (0.5 * layer[b].mean(0).numpy() + 0.5 * np.eye(len(by_hand))) @ by_hand
        np.testing.assert_allclose(flow[b], by_hand, atol=1e-12)
    np.testing.assert_allclose(flow.sum(-1), 1, atol=1e-12)
    for w in (*weights, flow.unsqueeze(1)):
        between = attention_between_visits(w, visit_ids, V)
        for b in range(len(visit_ids)):
            for s in range(V):
                of = [i for i in range(visit_ids.shape[1]) if visit_ids[b, i] == s]
                for t in range(V):
                    to = [j for j in range(visit_ids.shape[1]) if visit_ids[b, j] == t]
                    expected = w[b][:, of][:, :, to].sum(-1).mean(1) if of else torch.zeros(w.shape[1], dtype=w.dtype)
                    np.testing.assert_allclose(between[b, :, s, t], expected, atol=1e-12)
                total = between[b, :, s].sum(-1)
                if of and not cls: np.testing.assert_allclose(total, 1, atol=1e-12)
                assert (total <= 1 + 1e-9).all()
        if kind == "visit_causal": assert not between.triu(1).any()


def test_attention_of_a_model_knows_nothing_of_later_visits(store):
    model, _ = models(len(store.vocabulary))["behrt"]
    batch = make_batch(store, range(5), max_tokens=60)
    for how in ("mean", "rollout"):
        whole = visit_attention(model, batch, how)
        one = history_until(batch, 2, 1)
        torch.testing.assert_close(visit_attention(model, one, how)[0], whole[2, :2, :2], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole.sum(-1), batch["sequence_mask"].float(), atol=1e-5, rtol=0)


@few
@given(st.integers(0, 2**31), st.integers(0, 50), st.floats(0, 1))
def test_hidden_codes_are_the_same_in_both_layouts_and_in_any_company(store, seed, epoch, share):
    hide = HideCodes(share, seed)
    hide.set_epoch(epoch)
    whole = make_batch(store, range(20), max_tokens=60)
    hidden = hide(whole)
    mask, nested = whole["attention_mask"], whole["visit_mask"]
    assert torch.equal(hidden["codes"][mask], hidden["visit_codes"][nested]) and torch.equal(hidden["codes"][~mask], whole["codes"][~mask])
    assert torch.isin(hidden["codes"][mask & (hidden["codes"] != whole["codes"])], torch.tensor([MASK])).all()
    for layout in ("flat", "hierarchical"):
        part = hide(make_batch(store, [13, 4], max_tokens=60, layout=layout))
        for i, row in enumerate((13, 4)):
            key, real = ("codes", "attention_mask") if layout == "flat" else ("visit_codes", "visit_mask")
            assert part[key][i][part[real][i]].tolist() == hidden[key][row][whole[real][row]].tolist()
    assert all(torch.equal(hidden[k], whole[k]) for k in whole if k not in ("codes", "visit_codes"))


def test_how_much_is_hidden():
    "Rates of 400 patients with 200 codes: half have none hidden, of the others one in six all; the rates between are spread evenly."
    batch = {"codes": torch.full((400, 200), 9), "attention_mask": torch.ones(400, 200, dtype=torch.bool), "rows": torch.arange(400)}
    batch["codes"][:, 0] = CLS
    rates = [(HideCodes(0.5, seed)(batch)["codes"] == MASK).float().mean(1) for seed in range(8)]
    assert all((HideCodes(1.0, seed)(batch)["codes"][:, 0] == CLS).all() for seed in range(3))
    rate = torch.cat(rates) * 200 / 199
    n = len(rate)
    for share, expected in (((rate == 0).float().mean(), 0.5), ((rate > 0.9999).float().mean(), 0.5 / 6), (((rate > 0.25) & (rate < 0.75)).float().mean(), 0.5 * 0.5 / 1.2)):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n) + 0.004
    at_places = (HideCodes(1.0)(batch)["codes"][:, 1:] == MASK).float().mean(0)  # no place is hidden in everybody
    assert at_places.std() < 0.06 and abs(at_places.mean() - (0.5 / 1.2 + 1 / 6)) < 0.08
    with pytest.raises(ValueError, match=r"share: expected a number in \[0, 1\]"): HideCodes(1.5)


@pytest.mark.parametrize("kind", ["behrt", "visit hazards", "lstm"])
def test_figures_of_patients(store, kind):
    import matplotlib.pyplot as plt
    model, _ = models(len(store.vocabulary))[kind]
    model.eval()
    batch = make_batch(store, range(8), max_tokens=60)
    row = int(batch["sequence_mask"].sum(1).argmax())
    found = attribute_codes(model, batch, store.vocabulary, [row], landmarks=[2])
    top, below = plot_patient(model, batch, store.vocabulary, row, landmark=2, n_codes=3)
    assert len(top.lines[0].get_xdata()) == 3
    effects = patient_effects(found, 3)
    assert [t.get_text() for t in below.get_yticklabels()] == [n if len(n) <= 30 else n[:29] + "\u2026" for n in effects["name"]]
    assert math.isclose(effects["effect"].sum(), found.tokens["attribution"].sum(), abs_tol=1e-9)
    path = risk_path(model, history_until(batch, row))
    for v in range(3):  # each risk knows the visits so far only
        cut = make_batch(store, [int(batch["rows"][row])], [int(batch["first_visits"][row]) + v], max_tokens=60)
        if cut["first_visits"][0] == batch["first_visits"][row]: assert math.isclose(path[v], explained_score(model, cut, scale="risk").item(), rel_tol=1e-4)
    plt.close("all")


@pytest.mark.parametrize("problem, n_labels, weights", [("binary", 1, 5.0), ("multiclass", 3, [1.0, 4.0, 0.5]), ("multilabel", 2, [2.0, 7.0])])
def test_what_is_explained_is_what_is_predicted(store, problem, n_labels, weights):
    "A classifier that was trained with weights for its classes is explained with the weights divided out, as it predicts."
    model = BEHRTForSequenceClassification(BEHRTConfig(len(store.vocabulary), 16, 32, 1, 2, attention="bidirectional"), n_labels, problem, class_weights=weights).eval()
    batch = make_batch(store, range(6))
    predicted = model.predict_probabilities(batch).reshape(6, -1)
    for label in range(predicted.shape[1]):
        with torch.no_grad(): torch.testing.assert_close(explained_score(model, batch, label=label, scale="risk"), predicted[:, label])
