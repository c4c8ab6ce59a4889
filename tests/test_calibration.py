"Calibration against references and brute force on drawn data with ties and heavy censoring; nothing undefined passes for a number."
import collections

import numpy as np
import pytest
from conftest import numbers_or_errors, peak_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter
from sklearn.linear_model import LogisticRegression
from SurvivalEVAL import d_calibration as reference_d_calibration
from SurvivalEVAL import integrated_calibration_index as reference_index

from ehr_sequencing.calibration import _cox_influence, _fit_cox, _RiskSets, calibration_curve, calibration_groups, calibration_slope, d_calibration, integrated_calibration_index, survival_at

relaxed = settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], derandomize=True)
RISK = st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.05, 0.2, 0.5, 0.9]))
PATIENT = st.tuples(st.one_of(st.integers(1, 8), st.floats(0.5, 9)), st.sampled_from([0, 0, 0, 1, 1]), RISK)  # tied and untied times, mostly censored
PATIENTS = st.lists(PATIENT, min_size=30, max_size=90)


def arrays(patients):
    "Durations, events, risks."
    durations, events, risks = map(np.array, zip(*patients))
    return durations.astype(float), events.astype(bool), risks.astype(float)


def observable(durations, events, horizon): return durations.max() >= horizon and (events & (durations <= horizon)).any()


def weights_by_hand(durations, events, horizon, case_weights):
    "Event by the horizon and inverse probability of censoring weights, by loops, each patient counting `case_weights` times."
    weights = np.zeros(len(durations))
    for i, (t, e) in enumerate(zip(durations, events)):
        if not e and t < horizon: continue
        G = 1.0
        for u in np.unique(durations[durations < min(t, horizon)]):
            leaving = case_weights[(durations == u) & ~events].sum()
            if leaving: G *= 1 - leaving / (case_weights[durations >= u].sum() - case_weights[(durations == u) & events].sum())
        weights[i] = 1 / G
    return (events & (durations <= horizon)).astype(float), weights


@relaxed
@given(PATIENTS, st.sampled_from([2.0, 3.5, 5.0]), st.integers(1, 4))
def test_groups_are_kaplan_meier(patients, horizon, n_groups):
    durations, events, risks = arrays(patients)
    if not observable(durations, events, horizon): return
    try: table = calibration_groups(durations, events, risks, horizon, n_groups)
    except ValueError as error:
        assert "nobody is followed to" in str(error)
        return
    assert table["n"].sum() == len(durations) and np.isfinite(table.to_numpy()).all() and ((table.low <= table.observed + 1e-12) & (table.observed <= table.high + 1e-12)).all()
    assert (table.high[table.observed < 1] > table.observed[table.observed < 1]).all() and (table.low[table.observed > 1e-9] < table.observed[table.observed > 1e-9]).all()
    if len(table) > 1: return
    km = KaplanMeierFitter().fit(durations, events)
    assert abs(table.observed.iloc[0] - 1 + km.predict(horizon)) < 1e-10
    if 0 < km.predict(horizon) < 1:
        assert np.allclose(table[["high", "low"]].iloc[0], 1 - km.confidence_interval_.loc[:horizon].iloc[-1], rtol=0, atol=1e-8)


@relaxed
@given(PATIENTS, st.sampled_from([2.0, 3.5, 5.0]))
def test_slope_is_a_weighted_logistic_regression(patients, horizon):
    durations, events, risks = arrays(patients)
    outcomes, weights = weights_by_hand(durations, events, horizon, np.ones(len(durations)))
    try: table = calibration_slope(durations, events, risks, horizon)
    except ValueError: return
    assert np.isfinite(table.to_numpy()).all() and (table.low <= table.estimate).all() and (table.estimate <= table.high).all()
    assert abs(table.estimate["observed/expected"] - (weights * outcomes).mean() / risks.mean()) < 1e-10
    for name, row in table.iterrows():  # symmetric about the estimate, the ratio's about its logarithm
        ends = np.log(row[["low", "estimate", "high"]].astype(float)) if name == "observed/expected" else row[["low", "estimate", "high"]]
        assert np.allclose(np.diff(ends), 1.959963984540054 * row.se, rtol=1e-6, atol=1e-9)
    log_odds = np.log(risks / (1 - risks))
    if abs(table.estimate["slope"]) > 5: return  # nearly separated: their optimiser stops early
    fitted = LogisticRegression(C=np.inf, tol=1e-12, max_iter=5000, solver="newton-cholesky").fit(log_odds[:, None], outcomes, sample_weight=weights)
    assert abs(table.estimate["slope"] - fitted.coef_[0, 0]) < 1e-6
    p = 1 / (1 + np.exp(-(log_odds + table.estimate["intercept"])))
    assert abs((weights * (outcomes - p)).sum()) < 1e-6  # the intercept's own equation


@settings(relaxed, max_examples=20)
@given(st.lists(PATIENT, min_size=30, max_size=40), st.sampled_from([3.5, 5.0]))
def test_standard_errors_are_the_jackknife(patients, horizon):
    "Derivatives by the weight of each patient, by finite differences of an estimate that is made by hand."
    durations, events, risks = arrays(patients)
    try: table = calibration_slope(durations, events, risks, horizon)
    except ValueError: return
    if table.se["slope"] > 3: return
    n, x = len(durations), np.stack([np.ones(len(risks)), np.log(risks / (1 - risks))], axis=1)

    def estimates(case_weights):
        outcomes, weights = weights_by_hand(durations, events, horizon, case_weights)
        weights = weights * case_weights
        found = []
        for columns, offset in ((x, 0), (x[:, :1], x[:, 1])):
            beta = np.array([table.estimate["intercept"]]) if columns.shape[1] == 1 else np.array([0, table.estimate["slope"]])
            for _ in range(50):
                p = 1 / (1 + np.exp(-(offset + columns @ beta)))
                beta = beta + np.clip(np.linalg.solve((columns.T * (weights * p * (1 - p))) @ columns, columns.T @ (weights * (outcomes - p))), -1, 1)
            found.append(beta[-1])
        return np.array([*found, np.log((weights * outcomes).sum() / (case_weights * risks).sum())])

    step = 1e-5
    changes = np.array([(estimates(1 + step * np.eye(n)[i]) - estimates(1 - step * np.eye(n)[i])) / (2 * step) for i in range(n)])
    assert np.allclose(np.sqrt((changes**2).sum(0)), table.se, rtol=2e-4)


compared = collections.Counter()


@relaxed
@given(PATIENTS, st.sampled_from([2.0, 3.5, 5.0]), st.integers(3, 5))
def test_index_is_that_of_the_reference(patients, horizon, knots):
    durations, events, risks = arrays(patients)
    if not observable(durations, events, horizon): return
    try: theirs = reference_index(risks, durations, events, horizon, knots=knots)
    except ValueError: return  # ties of risks that it refuses
    try: ours = integrated_calibration_index(durations, events, risks, horizon, knots, "cox")
    except ValueError as error:
        assert "no finite fit" in str(error)
        compared["refused"] += 1
        return
    compared["agree"] += 1
    for a, b in (("ici", "ICI"), ("e50", "E50"), ("e90", "E90"), ("e_max", "E_max")): assert abs(ours[a] - theirs[b]) < 1e-6


def test_hundreds_were_compared():
    if compared: assert compared["agree"] >= 100 and compared["refused"] <= 0.05 * compared["agree"], compared


@relaxed
@given(PATIENTS, st.integers(2, 12), st.integers(1, 5))
def test_d_calibration_is_that_of_the_reference(patients, n_bins, n_horizons):
    durations, events, risks = arrays(patients)
    if not events.any(): return
    horizons = np.linspace(1, 7, n_horizons)
    F = 1 - (1 - risks[:, None]) ** (horizons / 3) if n_horizons > 1 else risks[:, None]
    cut, seen = np.minimum(durations, horizons[-1]), events & (durations <= horizons[-1])
    survival = survival_at(cut, F, horizons)
    by_hand = [np.exp(np.interp(t, np.append(0, horizons), np.append(0, np.log(1 - f)))) for t, f in zip(cut, F)]
    assert np.allclose(survival, by_hand, rtol=0, atol=1e-12)
    ours, theirs = d_calibration(durations, events, F, horizons, n_bins), reference_d_calibration(survival, seen, n_bins)
    for a, b in zip((ours["statistic"], ours["p_value"], ours["histogram"]), theirs): assert np.allclose(a, b, rtol=0, atol=1e-8)


@settings(relaxed, max_examples=100)
@given(PATIENTS, st.sampled_from([2.0, 5.0]), st.randoms(use_true_random=False), st.sampled_from([0.1, 30.0]))
def test_order_unit_and_what_comes_later_do_not_matter(patients, horizon, random, unit):
    durations, events, risks = arrays(patients)
    order = np.array(random.sample(range(len(risks)), len(risks)))
    later = durations > horizon
    def everything(d, e, r, h):
        return np.concatenate([calibration_slope(d, e, r, h).to_numpy().ravel(), calibration_groups(d, e, r, h, 2).to_numpy().ravel(), calibration_curve(d, e, r, h).to_numpy().ravel()])
    try: expected = everything(durations, events, risks, horizon)
    except ValueError: return
    assert np.isfinite(expected).all()
    for changed in ((durations[order], events[order], risks[order], horizon), (durations * unit, events, risks, horizon * unit), (np.where(later, horizon, durations), events & ~later, risks, horizon)):
        assert np.allclose(everything(*changed), expected, rtol=1e-5, atol=1e-6)


@relaxed
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0, 3.0]), st.booleans(), st.sampled_from([0.0, 1e-12, 0.3, 0.5, 1.0])), min_size=1, max_size=12), st.sampled_from([1.0, 2.0, 3.0]))
def test_a_number_or_an_error_never_nan(patients, horizon):
    durations, events, risks = arrays(patients)
    calls = [lambda: calibration_slope(durations, events, risks, horizon).to_numpy(), lambda: calibration_groups(durations, events, risks, horizon, 2).to_numpy(), lambda: calibration_groups(durations, events, risks, horizon, 1).to_numpy(),
             lambda: d_calibration(durations, events, risks[:, None], [3.0])["histogram"], lambda: d_calibration(durations, events, risks[:, None], [3.0])["p_value"]]
    calls += [lambda m=m: f(durations, events, risks, horizon, method=m) for f in (lambda *a, **k: calibration_curve(*a, **k).to_numpy(), lambda *a, **k: list(integrated_calibration_index(*a, **k).values())) for m in ("logistic", "cox")]
    numbers_or_errors(calls)


def test_memory_is_linear():
    generator, peaks = np.random.default_rng(0), []
    for n in (25_000, 100_000):
        x = generator.normal(size=n).clip(-3, 3)
        durations, events, risks = generator.exponential(np.exp(-x)), generator.random(n) < 0.5, 1 - np.exp(-np.exp(x))
        peaks.append(peak_memory(lambda: (calibration_slope(durations, events, risks, 1.0), calibration_groups(durations, events, risks, 1.0),
                                          *(integrated_calibration_index(durations, events, risks, 1.0, method=method) for method in ("logistic", "cox")))))
    assert peaks[1] < 5 * peaks[0] and peaks[1] < 100_000 * 1000


@pytest.mark.parametrize("method", ["logistic", "cox"])
def test_a_wrong_model_is_found_out(method):
    "Sanity of direction: risks doubled in log odds have slope one half and a larger index; proportional hazards, so that both methods are right."
    generator = np.random.default_rng(1)
    x = generator.normal(size=20_000)
    event, censored = generator.exponential(np.exp(-x)), generator.uniform(0, 3, 20_000)
    durations, events, truth = np.minimum(event, censored), event <= censored, -np.expm1(-0.5 * np.exp(x))
    doubled = 1 / (1 + ((1 - truth) / truth) ** 2)
    table = calibration_slope(durations, events, doubled, 0.5)
    assert table.low["slope"] < 0.5 < table.high["slope"] < 0.6
    assert integrated_calibration_index(durations, events, truth, 0.5, method=method)["ici"] < 0.01
    assert abs(integrated_calibration_index(durations, events, doubled, 0.5, knots=5, method=method)["ici"] - np.abs(doubled - truth).mean()) < 0.01


@pytest.mark.parametrize("method", ["logistic", "cox"])
@pytest.mark.parametrize("tied", [False, True])
def test_bands_are_as_wide_as_those_of_a_bootstrap(method, tied):
    generator, at = np.random.default_rng(2), [0.1, 0.3, 0.6]
    x = generator.normal(size=600)
    event, censored = generator.exponential(np.exp(-x)), generator.uniform(0, 2, 600)
    durations, events, risks = np.minimum(event, censored), event <= censored, -np.expm1(-0.5 * np.exp(x))
    if tied: durations = np.ceil(durations * 4) / 4  # two days of events up to the horizon
    def log_hazard(i): return np.log(-np.log1p(-calibration_curve(durations[i], events[i], risks[i], 0.5, at, method=method).observed.to_numpy()))
    spread = np.std([log_hazard(generator.integers(0, 600, 600)) for _ in range(300)], axis=0)
    curve = calibration_curve(durations, events, risks, 0.5, at, method=method)
    width = (np.log(-np.log1p(-curve.high)) - np.log(-np.log1p(-curve.low))) / (2 * 1.959963984540054)
    assert np.allclose(width / spread, 1, atol=0.15), width / spread


@pytest.mark.parametrize("competing", [False, True])
def test_influences_add_up_to_nothing(competing):
    "At the maximum the score is 0, patient by patient added up: Efron's rule for ties and the weights of the competing on both sides of the sum."
    generator = np.random.default_rng(3)
    x, durations = generator.normal(size=(200, 2)), generator.integers(1, 5, 200).astype(float)
    types = generator.choice(3 if competing else 2, 200)
    sets = _RiskSets(x, durations, types)
    beta, *fit = _fit_cox(sets)
    _, influence = _cox_influence(sets, beta, *fit, 3.0)
    assert np.abs(influence.sum(0)).max() < 1e-8 < np.abs(influence).max()
