"""What every model that says something at each visit must hold to, whoever wrote it: the same answer alone and in company, labels that do not depend on the layout, nothing from the future.

A new model is one line in `MODELS`."""
import numpy as np
import pytest
import torch

from ehr_sequencing.aggregation import assert_no_future_leakage
from ehr_sequencing.batches import make_batch
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.explain import attribute_codes
from ehr_sequencing.horizons import attach_labels, labelled_batches
from ehr_sequencing.landmarks import at_each_visit
from ehr_sequencing.lstm import LSTMBaseline, LSTMConfig, LSTMProgressionModel, SurvivalLSTM
from ehr_sequencing.objectives import Objective, loss_scales
from ehr_sequencing.outcomes import Outcome, feature_exclusions, label_visits
from ehr_sequencing.progression import BEHRTForProgression, Stages, attach_progression, label_progression
from ehr_sequencing.saved_models import SavedModel
from ehr_sequencing.sequences import build_store
from ehr_sequencing.splits import split_patients
from ehr_sequencing.survival import BEHRTForSurvival, landmark_outputs, risk_within
from ehr_sequencing.synthetic import CONDITIONS, OUTCOME_CODE, simulate_cohort
from ehr_sequencing.training import Trainer
from ehr_sequencing.transformers import HierarchicalConfig, SurvivalTransformer, TransformerProgressionModel
from ehr_sequencing.vocabulary import fit_vocabulary

HORIZONS, STAGES = (365, 1095, 1825), 3
MODELS = {  # name -> class, class of the configuration, changes of the configuration, other arguments
    "BEHRT, visit hazards": (BEHRTForSurvival, BEHRTConfig, {}, {}),
    "BEHRT, horizons": (BEHRTForSurvival, BEHRTConfig, {}, {"horizons": HORIZONS}),
    "BEHRT, packed, heads for visits, largest value": (BEHRTForSurvival, BEHRTConfig, {"packed": True, "visit_heads": 1}, {"horizons": HORIZONS, "pooling": "max"}),
    "BEHRT, attention pooling": (BEHRTForSurvival, BEHRTConfig, {}, {"horizons": HORIZONS, "pooling": "attention"}),
    "BEHRT, last token": (BEHRTForSurvival, BEHRTConfig, {}, {"n_bins": 3, "pooling": "last"}),
    "BEHRT, frozen": (BEHRTForSurvival, BEHRTConfig, {}, {"horizons": HORIZONS, "freeze_behrt": True}),
    "BEHRT, adapters": (BEHRTForSurvival, BEHRTConfig, {}, {"horizons": HORIZONS, "use_lora": True, "lora_rank": 4}),
    "BEHRT, learned places, no time": (BEHRTForSurvival, BEHRTConfig, {"position": "learned", "max_visits": 8, "use_time": False}, {"horizons": HORIZONS}),
    "LSTM, visit hazards": (SurvivalLSTM, LSTMConfig, {}, {}),
    "LSTM, horizons": (SurvivalLSTM, LSTMConfig, {"use_time": False}, {"horizons": HORIZONS}),
    "LSTM, two layers, LSTM over codes": (SurvivalLSTM, LSTMConfig, {"visit_encoder": "lstm", "num_layers": 2}, {"horizons": HORIZONS}),
    "LSTM, attention over codes": (SurvivalLSTM, LSTMConfig, {"visit_encoder": "attention"}, {"horizons": HORIZONS}),
    "LSTM, a label at each visit": (LSTMBaseline, LSTMConfig, {}, {"level": "visit"}),
    "hierarchical, visit hazards": (SurvivalTransformer, HierarchicalConfig, {}, {}),
    "hierarchical, horizons, attention over codes": (SurvivalTransformer, HierarchicalConfig, {"pooling": "attention"}, {"horizons": HORIZONS}),
    "hierarchical, learned places, no code layers": (SurvivalTransformer, HierarchicalConfig, {"position": "learned", "max_visits": 8, "code_layers": 0}, {"horizons": HORIZONS}),
    "BEHRT, progression": (BEHRTForProgression, BEHRTConfig, {}, {"n_stages": STAGES, "horizons": HORIZONS}),
    "LSTM, progression": (LSTMProgressionModel, LSTMConfig, {}, {"n_stages": STAGES, "horizons": HORIZONS, "stage_weight": 0.5}),
    "hierarchical, progression": (TransformerProgressionModel, HierarchicalConfig, {}, {"n_stages": STAGES, "horizons": HORIZONS}),
}
SMALL = {BEHRTConfig: {"embedding_dim": 16, "hidden_size": 32}, HierarchicalConfig: {"embedding_dim": 16, "hidden_size": 32}, LSTMConfig: {"embedding_dim": 16, "hidden_size": 32}}
BOTH_WAYS = {BEHRTConfig: {"attention": "bidirectional"}, HierarchicalConfig: {"attention": "bidirectional"}, LSTMConfig: {"bidirectional": True}}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def cohort():
    "Records of 300 people, with labels of an outcome and of the stages of a disease."
    records = simulate_cohort(300, seed=0, hazard_ratio=3)
    outcome = Outcome(OUTCOME_CODE)
    store = build_store(records.table, fit_vocabulary(records.table.events, exclude=feature_exclusions(outcome, records.table)))
    stages = Stages({code: i + 1 for i, code in enumerate(dict.fromkeys(CONDITIONS["kidney disease"].codes))})
    return records, store, label_visits(store, records.table, outcome), label_progression(store, records.table, stages, HORIZONS)


def build(name, store, changes=None, **arguments):
    "A model whose weights all count: what starts at zero (adapters, queries, biases) is moved."
    kind, config, own, settings = MODELS[name]
    torch.manual_seed(0)
    model = kind(config.small(len(store.vocabulary), **SMALL[config] | own | (changes or {})), **settings, **arguments)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def tensors(outputs): return [outputs] if torch.is_tensor(outputs) else list(outputs)


def company(store, n=8):
    "Rows of very different lengths."
    order = np.argsort(store.n_visits, kind="stable")
    return order[np.linspace(0, len(order) - 1, n).astype(int)]


@every_model
@pytest.mark.parametrize("max_tokens", [512, 40])
def test_alone_as_in_company(cohort, name, max_tokens):
    "A patient's outputs are the same alone, beside longer records, in another order, and whichever layout the batch has besides the model's own."
    store, model = cohort[1], build(name, cohort[1])
    rows = company(store)
    batch = make_batch(store, rows, max_tokens=max_tokens)
    with torch.no_grad():
        whole = tensors(model(batch))
        order = np.random.default_rng(0).permutation(len(rows))
        for mine, theirs in zip(tensors(model(make_batch(store, rows[order], max_tokens=max_tokens))), whole, strict=True):
            real = batch["sequence_mask"][order]
            torch.testing.assert_close(mine[real], theirs[order][real], atol=1e-5, rtol=0)
        for b, row in enumerate(rows):
            own = int(batch["sequence_mask"][b].sum())
            alone = make_batch(store, [row], max_tokens=max_tokens, layout=getattr(model, "layout", "hierarchical"))
            for mine, theirs in zip(tensors(model(alone)), whole, strict=True): torch.testing.assert_close(mine[0], theirs[b, :own], atol=1e-5, rtol=0)
    assert all(x.isfinite().all() and x[batch["sequence_mask"]].std() > 1e-3 for x in whole)


@every_model
def test_no_output_sees_the_future(cohort, name):
    "In the flat, the hierarchical and both layouts, as far as the model reads them."
    store, model = cohort[1], build(name, cohort[1])
    layout = getattr(model, "layout", "hierarchical")
    for layout in (layout, "both"): assert_no_future_leakage(model, make_batch(store, company(store, 6), max_tokens=128, layout=layout))
    assert_no_future_leakage(model, make_batch(store, [int(store.n_visits.argmax())], max_tokens=100))


@every_model
def test_who_reads_both_ways_says_so(cohort, name, tmp_path):
    "A model that looks ahead is refused unless asked for by name; then it warns, also when it is loaded, and the leak check finds it."
    store, changes = cohort[1], BOTH_WAYS[MODELS[name][1]]
    with pytest.raises(ValueError, match="allow_future_leakage=True"): build(name, store, changes)
    with pytest.warns(UserWarning, match="leaks the future"): leaking = build(name, store, changes, allow_future_leakage=True)
    leaking.save_pretrained(tmp_path / "leaking")
    with pytest.warns(UserWarning, match="leaks the future"): assert SavedModel.from_pretrained(tmp_path / "leaking").settings == leaking.settings
    with pytest.raises(AssertionError, match="Future leakage"): assert_no_future_leakage(leaking, make_batch(store, company(store, 6), max_tokens=128))


@every_model
def test_patients_without_a_visit_are_refused(cohort, name):
    "By how many and in which rows."
    store, model = cohort[1], build(name, cohort[1])
    batch = make_batch(store, company(store))
    empty = {"sequence_mask": False, "attention_mask": False, "visit_mask": False, "visit_ids": -1, "codes": 0, "visit_codes": 0}
    for key, value in empty.items():
        batch[key] = batch[key].clone()
        batch[key][[1, 4]] = value
    with pytest.raises(ValueError, match=r"2 of 8 patients have no visit, in rows \[1, 4\]"): model(batch)


@every_model
def test_every_trained_tensor_receives_a_gradient(cohort, name):
    "Of the model's own loss; adapters and queries are among them. What is frozen receives none."
    _, store, labels, stages = cohort
    model = build(name, store)
    rows = np.flatnonzero((stages.last_at_risk if "n_stages" in MODELS[name][3] else labels.last_at_risk) >= 0)[:16]
    batch = make_batch(store, rows)
    batch = attach_progression(batch, store, stages) if "n_stages" in MODELS[name][3] else attach_labels(batch, store, labels)
    if MODELS[name][0] is LSTMBaseline: batch["labels"] = batch["at_risk"].float()
    elif "n_stages" not in MODELS[name][3] and model.horizons not in (None, labels.horizons): batch = attach_labels(make_batch(store, rows), store, label_visits(store, cohort[0].table, Outcome(OUTCOME_CODE), horizons=model.horizons))
    loss, n = model.loss(model(batch), batch)
    assert loss.isfinite() and n > 0
    loss.backward()
    silent = [tensor for tensor, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent and all(p.grad is None for p in model.parameters() if not p.requires_grad)
    if "freeze_behrt" in MODELS[name][3]: assert not any(p.requires_grad for p in model.behrt.parameters())
    if "use_lora" in MODELS[name][3]: assert sum("lora_" in tensor for tensor, p in model.named_parameters() if p.requires_grad) >= 8


LABELS = {"event_times", "event_indicators", "at_risk", "horizon_bins", "horizon_events", "horizon_shares", "visit_weights"}
OF_LAYOUTS = {"codes", "ages", "visit_ids", "times", "attention_mask", "visit_codes", "visit_mask", "rows"}


def by_patient(batches):
    "Row -> what its batch says of its visits, cut to its own."
    found = {}
    for batch in batches:
        for b, row in enumerate(batch["rows"].tolist()):
            n = int(batch["sequence_mask"][b].sum())
            found[row] = {name: x[b, :n] if x.ndim > 1 else x[b] for name, x in batch.items() if name not in OF_LAYOUTS}
    return found


@pytest.mark.parametrize("max_tokens", [512, 60])
def test_labels_do_not_depend_on_the_layout(cohort, max_tokens):
    "What BEHRT's flat batches and the LSTM's hierarchical ones say about the same patients: the same visits, the same labels, whoever shares the batch."
    _, store, labels, _ = cohort
    assert (BEHRTForSurvival.layout, SurvivalLSTM.layout) == ("flat", "hierarchical")
    rows = split_patients(labels)["train"]
    flat, nested = (by_patient(labelled_batches(store, labels, rows, layout=layout, token_budget=budget, max_tokens=max_tokens, tile=False)) for layout, budget in (("flat", 2000), ("hierarchical", 3000)))
    assert flat.keys() == nested.keys() and len(flat) == (labels.last_at_risk[rows] >= 0).sum() > 100
    for row, mine in flat.items():
        assert mine.keys() == nested[row].keys() >= LABELS
        for name, x in mine.items(): assert x.equal(nested[row][name]), (row, name)


@pytest.mark.parametrize("pair", [("BEHRT, horizons", "LSTM, horizons"), ("BEHRT, visit hazards", "hierarchical, visit hazards")])
def test_one_batch_for_both_layouts_is_two_batches_of_one(cohort, pair):
    "The loss of a model on a batch of both layouts is that on a batch of its own, so models can be compared on either."
    _, store, labels, _ = cohort
    rows = np.flatnonzero(labels.last_at_risk >= 0)[:12]
    for name in pair:
        model = build(name, store)
        own_labels = labels if model.horizons is None else label_visits(store, cohort[0].table, Outcome(OUTCOME_CODE), horizons=model.horizons)
        losses = [model.loss(model(batch), batch) for batch in (attach_labels(make_batch(store, rows, layout=layout), store, own_labels) for layout in ("both", model.layout))]
        torch.testing.assert_close(losses[0][0], losses[1][0], atol=0, rtol=0)
        assert losses[0][1] == losses[1][1] == len(rows)


OF_HAZARDS = [name for name, (kind, *_) in MODELS.items() if kind is not LSTMBaseline]
ON_A_CALENDAR = [name for name in OF_HAZARDS if "visit hazards" not in name]


def labelled(cohort, name, model, rows):
    "The batch that a model of hazards is trained on."
    records, store, _, stages = cohort
    batch = make_batch(store, rows)
    if "n_stages" in MODELS[name][3]: return attach_progression(batch, store, stages)
    return attach_labels(batch, store, label_visits(store, records.table, Outcome(OUTCOME_CODE), horizons=model.horizons or HORIZONS))


@pytest.mark.parametrize("name", OF_HAZARDS)
def test_the_loss_counts_those_at_risk(cohort, name):
    "The mean of a step over several batches is that of all their patients, also if some are never at risk."
    model = build(name, cohort[1])
    rows = [int(r) for r in np.argsort(cohort[3].last_at_risk)[[0, 1, -1, -2, -3, -4, -5]]]
    never = [0, 3]
    def batch_of(rows, whom):
        batch = labelled(cohort, name, model, rows)
        batch["at_risk"] = batch["at_risk"].clone().index_fill(0, torch.tensor(whom, dtype=torch.long), False)
        return batch | {"event_times": batch["event_times"].index_fill(0, torch.tensor(whom, dtype=torch.long), -1)}
    with torch.no_grad(): (first, n), (second, m), (both, total) = (model.loss(model(b), b) for b in (batch_of(rows[:4], never), batch_of(rows[4:], []), batch_of(rows, never)))
    assert n < 4 and n + m == total
    torch.testing.assert_close((first * n + second * m) / total, both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ON_A_CALENDAR)
def test_risk_is_asked_at_real_visits(cohort, name):
    "One visit a row; padding has no risk to give."
    store, model = cohort[1], build(name, cohort[1])
    batch = make_batch(store, company(store, 4))
    last = batch["sequence_mask"].sum(1) - 1
    assert model.predict_risk(batch, 365, visits=last).equal(model.predict_risk(batch, 365))
    for wrong in (last + 1, last - last.max() - 1, last[:1]):
        with pytest.raises(ValueError, match="visits: expected for each of the 4 rows one of its real visits"): model.predict_risk(batch, 365, visits=wrong)


@pytest.mark.parametrize("name", ON_A_CALENDAR)
def test_half_precision_has_risks_in_single_precision(cohort, name):
    "The network's rounding stays; that of the sum over bins is not added."
    store, model = cohort[1], build(name, cohort[1])
    batch = make_batch(store, company(store, 4))
    whole = model.predict_risk(batch)
    half = model.to(torch.bfloat16).predict_risk(batch)
    assert half.dtype == whole.dtype == torch.float32
    torch.testing.assert_close(half, whole, atol=0.02, rtol=0)
    outputs = model._logits(batch)[torch.arange(4), batch["sequence_mask"].sum(1) - 1]
    torch.testing.assert_close(half, 1 - (1 - outputs.double().sigmoid()).cumprod(-1).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", OF_HAZARDS)
def test_codes_are_explained_whatever_is_trained(cohort, name):
    "Integrated gradients add up to the difference of the scores; a frozen encoder lets them through."
    store, model = cohort[1], build(name, cohort[1])
    row = int(np.argsort(store.n_visits)[len(store) // 4])
    found = attribute_codes(model, make_batch(store, [row]), store.vocabulary, tolerance=0.05)
    assert found.tokens["attribution"].abs().max() > 0 and not any(p.grad is not None for p in model.parameters())
    assert abs(found.tokens["attribution"].sum() - found.patients["score"][0] + found.patients["baseline"][0]) <= 0.05 * found.tokens["attribution"].abs().sum() + 1e-6


@pytest.mark.parametrize("name", ON_A_CALENDAR)
def test_landmarks_in_any_order_with_repeats_and_between_visits(cohort, name):
    "Each moment has the risk of its own history, of those who got that far; whoever is asked beside it."
    _, store, labels, _ = cohort
    model, marks = build(name, store), at_each_visit(labels, store)
    longest = np.flatnonzero(marks.rows == np.bincount(marks.rows).argmax())[[-1, 2, -9]]  # windows that begin at different visits
    marks = marks.take(np.concatenate([np.random.default_rng(0).permutation(len(marks))[:12][[0, 3, 3, *range(12), 0]], longest]))
    marks.elapsed = marks.elapsed.copy()
    marks.elapsed[[1, 5, 15]] = (300, 30, 700)  # 300 + 200 days reach into the second bin
    alone = [risk_within(model._logits(make_batch(store, [row], [visit], max_tokens=60))[:, -1].double(), model.horizons, [200, 1000], [days])[0] for row, visit, days in zip(marks.rows, marks.visits, marks.elapsed)]
    said = model.train().predict_risk(marks, [200, 1000], token_budget=300, max_tokens=60)
    np.testing.assert_allclose(said, torch.stack(alone), atol=1e-5)
    assert model.training and np.abs(said[1] - said[2]).min() > 1e-4 and (said[:, 0] < said[:, 1]).all()


@every_model
def test_a_saved_model_keeps_what_it_is(cohort, name, tmp_path):
    "Its settings, its answers and what is trained, also when it is found by its name."
    store, model = cohort[1], build(name, cohort[1])
    batch = make_batch(store, company(store, 4))
    model.save_pretrained(tmp_path / "model", store.vocabulary)
    again = SavedModel.from_pretrained(tmp_path / "model")
    assert type(again) is type(model) and again.settings == model.settings and again.vocabulary.tokens == store.vocabulary.tokens
    for argument, value in MODELS[name][3].items():
        if argument != "n_bins": np.testing.assert_array_equal(again.settings[argument], value)  # these become horizons
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [n for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for mine, theirs in zip(tensors(model(batch)), tensors(again(batch)), strict=True): assert mine.equal(theirs)


def test_a_frozen_encoder_has_no_dropout(cohort):
    "Nor has it once `train` is called after it was frozen by hand; thawed, it has."
    store = cohort[1]
    batch, model = make_batch(store, company(store, 4)), build("BEHRT, frozen", store)
    noisy = lambda: not model.encode_visits(batch).equal(model.encode_visits(batch))
    assert not model.train().behrt.training and model.head.training and not noisy()
    model.behrt.requires_grad_(True)
    assert not model.frozen and model.train().behrt.training and noisy()
    model.behrt.requires_grad_(False)
    assert model.train().frozen and not noisy()


def answer(model, landmarks, causal, max_tokens):
    "What a model says at landmarks, and how many rows it read."
    rows = []
    def read(batch):
        rows.append(len(batch["rows"]))
        with torch.no_grad(): said = model(batch)
        return said if torch.is_tensor(said) else torch.cat(said, -1)
    return landmark_outputs(read, landmarks, layout=model.layout, token_budget=2000, max_tokens=max_tokens, causal=causal), sum(rows)


def moments(cohort, n=400):
    "Landmarks at visits, in no order, some of them several times, some days after the visit."
    draw = np.random.default_rng(0)
    marks = at_each_visit(cohort[2], cohort[1])
    marks = marks.take(draw.integers(0, len(marks), n))
    marks.elapsed = draw.choice([0, 0, 90, 2000], n)
    return marks


@every_model
@pytest.mark.parametrize("max_tokens", [10**6, 100, 30, 5])
def test_one_pass_answers_for_every_landmark(cohort, name, max_tokens):
    "As one row a landmark does: of histories that fit, of those that are cut, and of visits that alone are too long."
    marks, model = moments(cohort), build(name, cohort[1])
    (cut, n_cut), (whole, n_whole) = (answer(model, marks, causal, max_tokens) for causal in (False, True))
    torch.testing.assert_close(whole, cut, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.sigmoid(), cut.sigmoid(), atol=1e-6, rtol=0)
    different = len(np.unique(np.stack([marks.rows, marks.visits]), axis=1).T)
    assert n_cut == different < len(marks) and (n_whole == len(np.unique(marks.rows)) if max_tokens == 10**6 else len(np.unique(marks.rows)) <= n_whole < n_cut + (max_tokens == 5))
    some = np.random.default_rng(1).choice(len(marks), 12, replace=False)
    for i in some:
        said = tensors(model(make_batch(cohort[1], [marks.rows[i]], [marks.visits[i]], max_tokens)))
        torch.testing.assert_close(whole[i], (said[0] if len(said) == 1 else torch.cat(said, -1))[0, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ON_A_CALENDAR)
def test_risks_come_from_one_pass(cohort, name, monkeypatch):
    "`predict_risk` of a model that looks back only, with days that have passed; and they are those of histories that were cut."
    marks, model = moments(cohort), build(name, cohort[1])
    assert model.causal
    fast, rows, run = model.predict_risk(marks, [365, 1095], max_tokens=10**6), [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, batch: (rows.append(len(batch["rows"])), run(self, batch))[1])
    assert (model.predict_risk(marks, [365, 1095], max_tokens=10**6) == fast).all() and sum(rows) == len(np.unique(marks.rows))
    monkeypatch.setattr(type(model), "causal", False)
    rows.clear()
    np.testing.assert_allclose(model.predict_risk(marks, [365, 1095], max_tokens=10**6), fast, atol=1e-6, rtol=0)
    assert sum(rows) > 2 * len(np.unique(marks.rows))
    with pytest.raises(ValueError, match="are not in 0..visits-1 of their patient"): model.predict_risk(bad_visit(marks), 365)


def bad_visit(marks):
    "The same moments, one of them at a visit that its patient does not have."
    marks = marks.take(np.arange(len(marks)))
    marks.visits = marks.visits.copy(); marks.visits[3] = marks.store.n_visits[marks.rows[3]]
    return marks


@every_model
def test_who_reads_both_ways_is_not_answered_in_one_pass(cohort, name):
    "Histories are cut, so that a leaking model is told nothing of later visits when it is asked; in one pass it would be."
    marks = moments(cohort, 60)
    with pytest.warns(UserWarning, match="leaks the future"): leaking = build(name, cohort[1], BOTH_WAYS[MODELS[name][1]], allow_future_leakage=True)
    assert not leaking.causal
    (cut, _), (whole, _) = (answer(leaking, marks, causal, 512) for causal in (False, True))
    assert (cut - whole).abs().max() > 1e-3
    if name in ON_A_CALENDAR:
        one_by_one = np.concatenate([leaking.predict_risk(make_batch(cohort[1], [r], [v]), 365) for r, v in zip(marks.rows, marks.visits)])
        marks.elapsed = np.zeros(len(marks), dtype=int)
        np.testing.assert_allclose(leaking.predict_risk(marks, 365), one_by_one, atol=1e-6, rtol=0)


def test_a_subclass_makes_no_promise_for_its_own_code(cohort):
    "Who writes another `encode_visits` or `forward` says anew whether it looks ahead; until then histories are cut."
    class Turned(BEHRTForSurvival):
        def encode_visits(self, batch): return super().encode_visits(batch).flip(1)
    class Named(BEHRTForSurvival): pass
    class Said(BEHRTForSurvival):
        causal = True
        def forward(self, batch): return super().forward(batch) * 1
    config = BEHRTConfig.small(len(cohort[1].vocabulary), **SMALL[BEHRTConfig])
    assert [kind(config, HORIZONS).causal for kind in (Turned, Named, Said)] == [False, True, True]


WITH_OBJECTIVE = [name for name in OF_HAZARDS if "n_stages" not in MODELS[name][3]]


@pytest.mark.parametrize("name", WITH_OBJECTIVE)
def test_objectives(cohort, name, tmp_path):
    "The hybrid is the likelihood plus the weighted ranking, gradients included, the likelihood itself without weight; outputs and their direction do not change; saved models remember."
    store = cohort[1]
    rows = np.flatnonzero(cohort[2].last_at_risk >= 0)[:24]
    scales = loss_scales(store, cohort[2], rows, visit_hazards="visit hazards" in name)
    asked = {"nll": "nll", "ranking": "ranking", "hybrid": Objective("hybrid", 0.5, scales), "no weight": Objective("hybrid", 0, scales)}
    models = {o: build(name, store, objective=objective) for o, objective in asked.items()}
    batch, found = labelled(cohort, name, models["nll"], rows), {}
    for o, model in models.items():
        outputs = model(batch)
        loss, n = model.loss(outputs, batch)
        loss.backward()
        found[o] = outputs, loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), n
        assert_no_future_leakage(model, make_batch(store, rows[:6], max_tokens=128))
    weight = 0.5 * scales[0] / scales[1]
    for o in models: assert found[o][0].equal(found["nll"][0]) and found[o][3] == len(rows)
    for i in (1, 2):
        assert found["no weight"][i].equal(found["nll"][i]) and not found["ranking"][i].equal(found["nll"][i])
        torch.testing.assert_close(found["hybrid"][i], found["nll"][i] + weight * found["ranking"][i], atol=1e-4 * found["hybrid"][i].abs().max().item(), rtol=0)
    assert found["ranking"][2].abs().sum() > 0
    models["hybrid"].save_pretrained(tmp_path / "hybrid")
    again = SavedModel.from_pretrained(tmp_path / "hybrid")
    assert again.objective == asked["hybrid"] and again.loss(again(batch), batch)[0].equal(found["hybrid"][1])
    assert type(again).from_pretrained(tmp_path / "hybrid", objective="nll").settings == models["nll"].settings and "objective" not in models["nll"].settings


@pytest.mark.parametrize("objective", ["ranking", Objective("hybrid", 0.5, (4.0, 0.7))])
def test_the_validation_loss_is_that_of_the_objective(cohort, objective):
    "A training reports, and stops by, what it minimises; batches without a pair count nothing in a ranking."
    store, labels, split = cohort[1], cohort[2], split_patients(cohort[2])
    torch.manual_seed(0)
    model = SurvivalLSTM(LSTMConfig.small(len(store.vocabulary), **SMALL[LSTMConfig]), labels.horizons, objective=objective)
    loaders = [labelled_batches(store, labels, split[part], part == "train", layout="hierarchical", token_budget=1500) for part in ("train", "validation")]
    trainer = Trainer(model, *loaders, epochs=2, device="cpu", show_progress=False)
    trainer.fit()
    with torch.no_grad():
        model.eval()
        parts = [model.loss(model(b), b) for b in loaders[1]]
    best = min(row["validation_loss"] for row in trainer.history)
    assert sum(loss.item() * n for loss, n in parts) / sum(n for _, n in parts) == pytest.approx(best, rel=1e-6)


def test_a_batch_without_pairs(cohort):
    "Asks nothing of a model that ranks, and the likelihood of one that does both."
    store, name = cohort[1], "LSTM, horizons"
    batch = labelled(cohort, name, build(name, store), np.flatnonzero(cohort[2].last_at_risk >= 0)[:1])
    losses = {o: model.loss(model(batch), batch) for o, model in ((o, build(name, store, objective=o)) for o in ("nll", "ranking", "hybrid"))}
    assert [n for _, n in losses.values()] == [1, 0, 1] and losses["ranking"][0] == 0 and losses["hybrid"][0] == losses["nll"][0] > 0
    losses["ranking"][0].backward()
