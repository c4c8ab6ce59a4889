"Baselines under drawn follow-ups: ties, heavy censoring, empty years, unknown facts; person-periods against loops; Med2Vec's loss against loops."
import datetime
import math

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter, NelsonAalenFitter
from sklearn.linear_model import LogisticRegression

from ehr_sequencing.baselines import CoxBaseline, LandmarkFeatures, history_counts, landmark_ages
from ehr_sequencing.batches import make_batch
from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.horizons import horizon_targets, seen_shares
from ehr_sequencing.landmarks import Landmarks
from ehr_sequencing.losses import discrete_time_nll
from ehr_sequencing.med2vec import Med2Vec, Med2VecBaseline, Med2VecConfig, Med2VecFeatures, fit_med2vec, history_vectors, med2vec_codes, neighbour_counts
from ehr_sequencing.period_models import BoostedTreesBaseline, LogisticBaseline, period_rows, yearly_bins
from ehr_sequencing.sequences import build_store
from ehr_sequencing.vocabulary import fit_vocabulary

LETTERS = "ABCDEFGHIJ"


def made_store(n, seed, sexes=("GENDER//F", "GENDER//M"), births=True, unknown=0.0):
    "Patients of one to six visits of one to four codes; `unknown` is the share without a birth, and without a sex."
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        if births and rng.random() >= unknown: rows.append((i, datetime.datetime(1930 + int(rng.integers(0, 50)), 1, 1), "MEDS_BIRTH"))
        if sexes and rng.random() >= unknown: rows.append((i, None, sexes[int(rng.integers(0, len(sexes)))]))
        for v in range(rng.integers(1, 7)):
            rows += [(i, datetime.datetime(2010, 1, 1) + datetime.timedelta(days=int(90 * v)), c) for c in rng.choice(list(LETTERS), rng.integers(1, 5), replace=False)]
    events = event_table(pl.DataFrame(rows, schema=["subject_id", "time", "code"], orient="row"))
    return build_store(EventTable(events), fit_vocabulary(events, min_patients=1))


STORE = made_store(300, 0, unknown=0.2)


def landmarks_of(store, seed, rate=0.0004, censoring=1500, unit=1, n=None):
    "A landmark at a drawn visit of each patient; the event depends on code A; times are multiples of `unit` days."
    rng, rows = np.random.default_rng(seed), np.arange(len(store) if n is None else n)
    visits = (rng.random(len(rows)) * store.n_visits[rows]).astype(np.int64)
    marks = Landmarks(store, rows, visits, np.ones(len(rows)), np.zeros(len(rows), bool))
    with_a = history_counts(marks, store.vocabulary.encode(["A"])).toarray()[:, 0] > 0
    event, censored = (np.ceil(t / unit) * unit for t in (rng.exponential(1 / (rate * np.where(with_a, 3, 1))), rng.uniform(1, censoring, len(rows))))
    durations = np.minimum(np.minimum(event, censored), 1825)
    return Landmarks(store, rows, visits, durations, (event <= censored) & (event <= 1825))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=30), st.lists(st.integers(1, 45), min_size=1, max_size=6, unique=True).map(sorted))
def test_rows_against_a_loop(follow_up, bins):
    durations, events = (np.array(a) for a in zip(*follow_up))
    marks = Landmarks(STORE, np.arange(len(durations)), np.zeros(len(durations), int), durations.astype(float), events.astype(bool))
    rows = []
    for i, (d, e) in enumerate(follow_up):
        for k, (begin, end) in enumerate(zip([0, *bins], bins)):
            if d <= begin: break
            if d > end or (d == end and not e): rows.append((i, k, False, 1.0))
            elif e: rows.append((i, k, True, 1.0))
            else: rows.append((i, k, False, (d - begin) / (end - begin)))
    if {k for _, k, y, _ in rows if y} != set(range(len(bins))):
        with pytest.raises(ValueError, match="no event falls in bin"): period_rows(marks, bins)
        return
    for partial in (True, False):
        found = list(zip(*(a.tolist() for a in period_rows(marks, bins, partial))))
        expected = [r for r in rows if partial or r[3] == 1]
        assert [r[:3] for r in found] == [r[:3] for r in expected]
        np.testing.assert_allclose([r[3] for r in found], [r[3] for r in expected], rtol=1e-6)  # shares are float32


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 30, 180]), st.sampled_from([200, 800, 3000]))
def test_likelihood_of_rows_is_that_of_the_losses(seed, unit, censoring):
    marks = landmarks_of(STORE, seed, censoring=censoring, unit=unit)
    bins = (180, 400, 900, 1825)
    try: period_rows(marks, bins)
    except ValueError: return assume(False)
    hazards = np.random.default_rng(seed).uniform(0.01, 0.9, (len(marks), len(bins)))
    targets = [torch.from_numpy(a) for a in (*horizon_targets(marks.durations, marks.events, bins), seen_shares(marks.durations, marks.events, bins))]
    for partial in (True, False):
        who, step, outcome, weight = period_rows(marks, bins, partial)
        h = hazards[who, step]
        np.testing.assert_allclose(-(weight * np.where(outcome, np.log(h), np.log1p(-h))).sum(), discrete_time_nll(torch.logit(torch.from_numpy(hazards)), *targets[:2 + partial]).sum(), rtol=1e-6)
        assert partial or (weight == 1).all()


@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 10**6), st.sampled_from([1, 60]), st.sampled_from([600, 3000]), st.booleans())
def test_risks_of_every_model(seed, unit, censoring, partial):
    "Monotone, inside (0, 1), calibrated in the large, the same for one landmark alone."
    train, validation, test = (landmarks_of(STORE, seed + i, censoring=censoring, unit=unit) for i in range(3))
    last = train.durations.max()
    bins = tuple(np.quantile(train.durations[train.events], [0.5, 1])) if train.events.sum() > 5 else (last,)
    assume(len(set(bins)) == len(bins))
    for model in (CoxBaseline(penalties=(0.1,)), LogisticBaseline(penalties=(0.01,), bins=bins, partial=partial), BoostedTreesBaseline(sizes=((4, 10),), bins=bins, partial=partial)):
        model.fit(train, validation)
        days = np.linspace(1, model.last_day, 9)
        risks = model.predict_risk(test, days)
        assert risks.shape == (len(test), 9) and np.isfinite(risks).all() and (risks >= 0).all() and (risks < 1).all() and (np.diff(risks) >= -1e-12).all()
        np.testing.assert_allclose(model.predict_risk(test.take([7]), days)[0], risks[7], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(model.predict_risk(test, days[::-1])[:, ::-1], risks, rtol=1e-12)
        with pytest.raises(ValueError, match="expected days in"): model.predict_risk(test, model.last_day + 1)
    logistic = LogisticBaseline(penalties=(0.01,), bins=bins, partial=partial).fit(train, validation)
    who, step, outcome, weight = period_rows(train, bins, partial)
    expected = np.bincount(step, weight * logistic.predict_hazards(train)[who, step])
    np.testing.assert_allclose(expected, np.bincount(step, outcome), rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 45]))
def test_life_table_is_events_by_exposure(seed, unit):
    marks = landmarks_of(STORE, seed, unit=unit)
    bins = yearly_bins(730)
    try: who, step, outcome, weight = period_rows(marks, bins)
    except ValueError: return assume(False)
    model = LogisticBaseline((), bins=bins).fit(marks, marks)
    np.testing.assert_allclose(model.predict_hazards(marks)[0], np.bincount(step, outcome) / np.bincount(step, weight), rtol=1e-5)


def test_a_day_more_than_years_of_follow_up_is_no_bin_of_its_own():
    "Without being told, the bins are years; a last one of a day would hold no event."
    marks = landmarks_of(STORE, 1, censoring=1000)
    marks.durations[0], marks.events[0] = 1096.25, False
    model = LogisticBaseline(penalties=(0.1,)).fit(marks, marks)
    assert model.edges == (365, 730, 1096.25) and yearly_bins(930) == (365, 730, 930) and yearly_bins(100) == (100,)
    assert np.isfinite(model.predict_risk(marks, [365, 1096])).all()


@pytest.mark.parametrize("penalty", [1e-8, 0.05, 1.0])
def test_logistic_against_dense_rows(penalty):
    "scikit-learn on rows written out with a dummy for each bin; the dummies scaled so that the penalty leaves them alone."
    train, bins = landmarks_of(STORE, 3), (400, 800, 1500)
    model = LogisticBaseline(penalties=(penalty,), bins=bins).fit(train, train)
    who, step, outcome, weight = period_rows(train, bins)
    x = model.features.transform(train).toarray()
    design = np.column_stack([3000.0 * np.eye(3)[step], x[who]])
    theirs = LogisticRegression(C=1 / (penalty * len(train)), fit_intercept=False, tol=1e-12, max_iter=10_000, solver="newton-cg").fit(design, outcome, weight)
    logits = np.stack([3000.0 * theirs.coef_[0, k] + x @ theirs.coef_[0, 3:] for k in range(3)], 1)
    np.testing.assert_allclose(model._logits(model.model, model.features.transform(train)), logits, atol=2e-3)


def test_partial_rows_find_the_hazard_and_whole_rows_do_not():
    rng, n = np.random.default_rng(0), 100_000
    event, censored = rng.exponential(-365 / math.log(0.95), n), rng.uniform(0, 3 * 365, n)
    marks = Landmarks(STORE, np.zeros(n, int), np.zeros(n, int), np.minimum(event, censored), event <= censored)
    rates = {partial: [np.bincount(s, w * y)[k] / np.bincount(s, w)[k] for k in range(3)] for partial in (True, False) for _, s, y, w in [period_rows(marks, (365, 730, 1095), partial)]}
    np.testing.assert_allclose(rates[True], 0.05, atol=0.006)  # four standard errors in the last year
    assert min(rates[False]) > 0.058


def test_cox_without_differences_is_nelson_aalen():
    "A penalty that leaves no coefficient: all have the risk of the Nelson-Aalen estimate."
    train = landmarks_of(STORE, 5, unit=20)
    model = CoxBaseline(penalties=(1e6,)).fit(train, train)
    days = np.unique(train.durations[train.events])[[2, 10, -1]]
    estimate = NelsonAalenFitter(nelson_aalen_smoothing=False).fit(train.durations, train.events).predict(days).to_numpy()
    np.testing.assert_allclose(model.predict_risk(train, days), np.tile(-np.expm1(-estimate), (len(train), 1)), rtol=2e-2)


@pytest.mark.parametrize("unit", [1, 50])
def test_cox_is_lifelines_on_event_days(unit):
    train, test = landmarks_of(STORE, 11, unit=unit), landmarks_of(STORE, 12)
    model = CoxBaseline(penalties=(0.05,)).fit(train, train)
    frame = {name: pl.DataFrame(model.features.transform(m).toarray()).to_pandas() for name, m in (("train", train), ("test", test))}
    direct = CoxPHFitter(penalizer=0.05).fit(frame["train"].assign(d=train.durations, e=train.events), "d", "e")
    days = np.unique(train.durations[train.events])
    np.testing.assert_allclose(model.predict_risk(test, days), 1 - direct.predict_survival_function(frame["test"], times=days).to_numpy().T, atol=1e-9)


def test_a_model_keeps_no_patient():
    import pickle
    train = landmarks_of(STORE, 1)
    for model in (CoxBaseline(), LogisticBaseline(bins=(900, 1825)), BoostedTreesBaseline(sizes=((4, 10),), bins=(900, 1825))):
        model.fit(train, train)
        model.features.vocabulary = None
        held = []
        def walk(o, depth=0):
            if isinstance(o, np.ndarray): held.append(o.shape[:1])
            elif isinstance(o, (list, tuple)): [walk(x, depth + 1) for x in o]
            elif isinstance(o, dict): [walk(x, depth + 1) for x in o.values()]
            elif hasattr(o, "__dict__") and depth < 6: walk(vars(o), depth + 1)
        walk(model)
        assert (len(train),) not in held and len(pickle.dumps(model)) < 300_000


def test_models_may_be_given_the_same_features():
    "Fitting the second on other landmarks does not move the first."
    asked, config = landmarks_of(STORE, 3), Med2VecConfig(len(STORE.vocabulary), 8, 8)
    for features in (LandmarkFeatures(), Med2VecFeatures(config=config, epochs=1)):
        first = CoxBaseline(features).fit(landmarks_of(STORE, 1), landmarks_of(STORE, 2))
        before = first.predict_risk(asked, 300)
        second = CoxBaseline(features).fit(landmarks_of(STORE, 7, n=150), landmarks_of(STORE, 2))
        np.testing.assert_array_equal(first.predict_risk(asked, 300), before)
        assert abs(second.predict_risk(asked, 300) - before).max() > 1e-3 and not hasattr(features, "mean")


@pytest.mark.parametrize("seed", range(5))
def test_counts_against_a_loop(seed):
    store = made_store(40, seed, unknown=0.3)
    marks = landmarks_of(store, seed)
    counts, names = history_counts(marks, block=7).toarray(), store.vocabulary.tokens
    for i, (row, visit) in enumerate(zip(marks.rows, marks.visits)):
        visits = [codes for _, codes in store[row]][:visit + 1]
        expected = [sum(name in codes for codes in visits) for name in names]
        for token in store.static_tokens[store.static_offsets[row]:store.static_offsets[row + 1]]: expected[token] += 1
        assert counts[i].tolist() == expected
    np.testing.assert_array_equal(history_counts(marks, [9, 6]).toarray(), counts[:, [9, 6]])


@pytest.mark.parametrize("sexes,births,expected", [((), True, []), (("GENDER//F",), True, []), (("GENDER//F", "GENDER//M", "GENDER//X"), False, 2), (("GENDER//F", "GENDER//M"), True, 1)])
def test_sex_and_age_where_they_are_not_recorded(sexes, births, expected):
    store = made_store(200, 4, sexes, births)
    marks = landmarks_of(store, 2)
    features = LandmarkFeatures().fit(marks)
    columns = [n for n in features.names if n.startswith("GENDER")]
    assert len(columns) == (expected or 0) and "sex not recorded" not in features.names and ("age" in features.names) == births and np.isnan(landmark_ages(marks)).all() != births
    assert np.isfinite(features.transform(marks).data).all()
    unknown = made_store(60, 5, sexes, births, unknown=0.5)  # at prediction some are not known, in training all were
    asked = Landmarks(build_store_like(unknown, store), *(getattr(landmarks_of(unknown, 1), n) for n in ("rows", "visits", "durations", "events")))
    assert np.isfinite(CoxBaseline(penalties=(0.1,)).fit(marks, marks).predict_risk(asked, 100)).all()


def build_store_like(store, like):
    "The same patients, tokenised with another store's vocabulary."
    rows = []
    for i in range(len(store)):
        if not np.isnat(store.births[i]): rows.append((i, store.births[i].astype("datetime64[us]").item(), "MEDS_BIRTH"))
        rows += [(i, None, store.vocabulary.tokens[t]) for t in store.static_tokens[store.static_offsets[i]:store.static_offsets[i + 1]]]
        rows += [(i, when.astype("datetime64[us]").item(), code) for when, codes in store[i] for code in codes]
    return build_store(EventTable(event_table(pl.DataFrame(rows, schema=["subject_id", "time", "code"], orient="row"))), like.vocabulary)


def test_errors():
    train = landmarks_of(STORE, 1)
    other = landmarks_of(made_store(50, 9, sexes=("GENDER//M",)), 1)
    for model in (CoxBaseline(), LogisticBaseline(), BoostedTreesBaseline(), Med2VecBaseline()):
        with pytest.raises(ValueError, match="not fitted yet; call fit"): model.predict_risk(train, 365)
        with pytest.raises(ValueError, match="not fitted yet"): model.n_parameters
        with pytest.raises(ValueError, match="train: none of the"): model.fit(train.take(~train.events), train)
        with pytest.raises(ValueError, match="validation: none of the"): model.fit(train, train.take([]))
    fitted = CoxBaseline().fit(train, train)
    with pytest.raises(ValueError, match="another vocabulary"): fitted.predict_risk(other, 100)
    with pytest.raises(ValueError, match="another vocabulary"): CoxBaseline().fit(train, other)
    for wrong in (0, -1, [365, float("nan")], float("inf"), [[100]]):
        with pytest.raises(ValueError, match="expected days in"): fitted.predict_risk(train, wrong)
    with pytest.raises(ValueError, match="which ends on day 1825"): LogisticBaseline(bins=(365, 1824.5, 1825)).fit(train, train)
    for model in (fitted, BoostedTreesBaseline(sizes=((4, 10),), bins=(900, 1825)).fit(train, train)):
        with pytest.raises(ValueError, match="landmarks: expected at least one moment"): model.predict_risk(train.take([]), 365)
    for wrong in (0, -3, 2.0, True):
        with pytest.raises(ValueError, match="max_codes: expected a positive integer"): LogisticBaseline(max_codes=wrong)
    with pytest.raises(ValueError, match="nothing of visits varies"): CoxBaseline("visits").fit(Landmarks(STORE, train.rows, np.zeros_like(train.visits), train.durations, train.events), train)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_med2vec_loss_against_loops(seed, window):
    store = made_store(5, seed)
    torch.manual_seed(seed)
    model = Med2Vec(Med2VecConfig(len(store.vocabulary), 5, 4, window)).eval()
    with torch.no_grad():
        model.code.weight[5:].normal_()
        batch = make_batch(store, range(5), layout="hierarchical")
        loss, n = model.loss(model(batch), batch)
        w, total = torch.relu(model.code.weight)[5:].double(), 0.0
        for row in range(5):
            y = F.softmax(model(make_batch(store, [row], layout="hierarchical")).logits[0].double(), -1)
            visits = [set(store.vocabulary.encode(codes)) for _, codes in store[row]]
            visits[0] |= set(store.static_tokens[store.static_offsets[row]:store.static_offsets[row + 1]].tolist())
            for t, here in enumerate(visits):
                for i in range(max(0, t - window), min(len(visits), t + window + 1)):
                    if i != t: total -= sum(math.log(y[t, c]) if c in visits[i] else math.log(1 - y[t, c]) for c in range(5, y.shape[1]))
                for a in here:
                    for b in here - {a}: total -= F.log_softmax(w @ w[a - 5], 0)[b - 5].item()
    assert n == store.n_visits.sum()
    assert math.isclose(loss.item(), total / n, rel_tol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5))
def test_neighbours_and_histories_against_loops(seed, V, window, C):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, V + 1, 3)
    mask = np.arange(V) < lengths[:, None]
    x = (rng.random((3, V, C)) < 0.4) * mask[..., None]
    counts, n = neighbour_counts(torch.from_numpy(x).float(), torch.from_numpy(mask), window)
    visits, days, half = rng.random((3, V, C)), np.cumsum(rng.integers(0, 300, (3, V)), 1).astype(float), 200.0
    found = history_vectors(torch.from_numpy(visits), torch.from_numpy(days), torch.from_numpy(mask), half).numpy()
    for b in range(3):
        for t in range(lengths[b]):
            near = [i for i in range(lengths[b]) if i != t and abs(i - t) <= window]
            np.testing.assert_array_equal(counts[b, t], x[b, near].sum(0)); assert n[b, t] == len(near)
            weights = 2 ** (-(days[b, t] - days[b, :t + 1]) / half)
            expected = np.concatenate([visits[b, t], weights @ visits[b, :t + 1] / weights.sum(), np.log1p(visits[b, :t + 1].sum(0))])
            np.testing.assert_allclose(found[b, t], expected, rtol=1e-6)


def test_med2vec_sees_only_the_rows_given_and_draws_from_its_seed():
    "Other patients of the store, and torch's own state, change nothing."
    config = Med2VecConfig(len(STORE.vocabulary), 8, 8)
    state = torch.random.get_rng_state()
    first = fit_med2vec(STORE, np.arange(40), config, epochs=2, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    second = fit_med2vec(STORE.take(np.arange(40)), np.arange(40), config, epochs=2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.code.weight, fit_med2vec(STORE, np.arange(40), config, epochs=2, seed=4).code.weight)
    assert (med2vec_codes(first).vectors >= 0).all()


def test_med2vec_features_are_learned_from_the_patients_of_the_landmarks():
    config = Med2VecConfig(len(STORE.vocabulary), 8, 8)
    marks = landmarks_of(STORE, 3, n=40)
    learned = Med2VecFeatures(config=config, epochs=1, seed=3).fit(marks).model
    assert all(torch.equal(a, b) for a, b in zip(learned.parameters(), fit_med2vec(STORE, np.arange(40), config, epochs=1, seed=3).parameters(), strict=True))
    given = Med2VecFeatures(learned)
    before = {n: t.clone() for n, t in learned.state_dict().items()}
    given.fit(landmarks_of(STORE, 4))  # a model that is given is not trained
    assert given.model is learned and all(torch.equal(t, before[n]) for n, t in learned.state_dict().items())


def test_med2vec_risk_is_blind_to_what_follows():
    "A landmark in a record that ends there has the same risk."
    store = made_store(200, 8)
    marks = landmarks_of(store, 3)
    model = Med2VecBaseline(config=Med2VecConfig(len(store.vocabulary), 8, 8), epochs=2, bins=(900, 1825)).fit(marks, marks)
    rows = []
    for i, (row, visit) in enumerate(zip(marks.rows[:60], marks.visits[:60])):
        rows.append((i, store.births[row].astype("datetime64[us]").item(), "MEDS_BIRTH"))
        rows += [(i, None, store.vocabulary.tokens[t]) for t in store.static_tokens[store.static_offsets[row]:store.static_offsets[row + 1]]]
        rows += [(i, when.astype("datetime64[us]").item(), code) for when, codes in store[row][:visit + 1] for code in codes]
    cut = build_store(EventTable(event_table(pl.DataFrame(rows, schema=["subject_id", "time", "code"], orient="row"))), store.vocabulary)
    ends = Landmarks(cut, np.arange(60), marks.visits[:60], marks.durations[:60], marks.events[:60])
    np.testing.assert_allclose(model.predict_risk(ends, [365, 1825]), model.predict_risk(marks.take(np.arange(60)), [365, 1825]), rtol=1e-5)
    counted = CoxBaseline().fit(marks, marks)
    np.testing.assert_allclose(counted.predict_risk(ends, 365), counted.predict_risk(marks.take(np.arange(60)), 365), rtol=1e-9)
    assert len(Med2VecFeatures(model.features.model).fit(marks).names) == model.features.transform(marks).shape[1]
