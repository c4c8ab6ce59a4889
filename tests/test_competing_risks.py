"Competing risks against references and loops over pairs, on drawn data with ties and heavy censoring."
import warnings

import numpy as np
import pytest
import SurvivalEVAL as reference
from conftest import numbers_or_errors, peak_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lifelines import AalenJohansenFitter
from sksurv.nonparametric import cumulative_incidence_competing_risks

from ehr_sequencing.brier import brier_score
from ehr_sequencing.calibration import calibration_curve, calibration_groups, calibration_slope
from ehr_sequencing.competing_risks import (aalen_johansen, cause_specific_auc, cause_specific_brier, cause_specific_concordance, cause_specific_integrated_brier, cause_specific_uno, competing_calibration_curve,
                                            competing_calibration_groups, competing_calibration_index, competing_calibration_slope)
from ehr_sequencing.metrics import concordance_index, cumulative_dynamic_auc, uno_concordance

relaxed = settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], derandomize=True)
TYPE = st.sampled_from([0, 0, 0, 1, 1, 2, 2])
RISK = st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.05, 0.2, 0.5, 0.9]))
PATIENTS = st.lists(st.tuples(st.integers(1, 8), TYPE, RISK), min_size=6, max_size=50)
TRAIN = st.lists(st.tuples(st.integers(1, 9), TYPE), min_size=10, max_size=50)
MANY = st.lists(st.tuples(st.one_of(st.integers(1, 8), st.floats(0.5, 9)), TYPE, RISK), min_size=40, max_size=90)


def arrays(rows): return tuple(np.array(column) * 1.0 if k != 1 else np.array(column) for k, column in enumerate(zip(*rows)))


def censoring_survival(durations, types, at):
    "G(at) by a loop; at one time, events leave before the censored, and those censored on the last day leave just after it."
    G = 1.0
    for u in np.unique(durations[(durations <= at) & (durations < durations.max())]):
        staying = (durations >= u).sum() - ((durations == u) & (types > 0)).sum()
        if staying: G *= 1 - ((durations == u) & (types == 0)).sum() / staying
    return G


@relaxed
@given(st.lists(st.tuples(st.integers(1, 12), TYPE), min_size=2, max_size=60))
def test_incidence_with_ties_is_that_of_scikit_survival(rows):
    durations, types = arrays(rows)
    if not (types > 0).any(): return
    _, theirs = cumulative_incidence_competing_risks(np.append(types, [1, 2]), np.append(durations, [12, 12]))  # it needs both kinds
    for cause in (1, 2):
        ours = aalen_johansen(np.append(durations, [12, 12]), np.append(types, [1, 2]), cause=cause)
        assert np.allclose(ours.risk, theirs[cause], rtol=0, atol=1e-12)
        assert np.isfinite(ours.to_numpy()).all() and ((ours.low <= ours.risk + 1e-12) & (ours.risk <= ours.high + 1e-12)).all() and ours.risk.is_monotonic_increasing


@settings(relaxed, max_examples=250)
@given(st.lists(st.tuples(st.integers(1, 10_000), TYPE), min_size=5, max_size=60, unique_by=lambda row: row[0]))
def test_incidence_without_ties_is_that_of_lifelines(rows):
    durations, types = arrays(rows)
    if not (types > 0).any(): return
    for cause in set(types[types > 0]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = AalenJohansenFitter().fit(durations, types, event_of_interest=cause)
        ours = aalen_johansen(durations, types, cause=int(cause))
        assert np.allclose(ours.risk, theirs.cumulative_density_.iloc[1:, 0], rtol=0, atol=1e-12)
        variance = theirs.variance_.iloc[1:].to_numpy()
        assert np.allclose(ours.se[np.isfinite(variance)]**2, variance[np.isfinite(variance)], rtol=0, atol=1e-10)


@relaxed
@given(PATIENTS, TRAIN, st.sampled_from([2.0, 3.0, 5.0]))
def test_concordance_is_that_of_a_loop_over_pairs(rows, train, tau):
    (t, k, r), (train_t, train_k) = arrays(rows), arrays(train)
    G = {u: censoring_survival(train_t, train_k, u) for u in np.unique(t)}  # before tau, hence before the last day
    sums = np.zeros((2, 2))  # plain and weighted; all and concordant
    for i in range(len(t)):
        for j in range(len(t)):
            later, competing = t[j] > t[i] or (t[j] == t[i] and k[j] == 0), k[j] == 2 and t[j] <= t[i]
            if i == j or k[i] != 1 or not (later or competing): continue
            right = (r[i] > r[j]) + 0.5 * (r[i] == r[j])
            sums[0] += 1, right
            if t[i] < tau and tau <= min(t.max(), train_t.max()): sums[1] += np.array([1, right]) / G[t[i]] / (G[t[i]] if later else G[t[j]])
    calls = (lambda: cause_specific_concordance(t, k, r), lambda: cause_specific_uno(t, k, r, train_t, train_k, tau))
    for call, (every, right) in zip(calls, sums):
        if every: assert abs(call() - right / every) < 1e-10
        else:
            with pytest.raises(ValueError): call()


@relaxed
@given(PATIENTS, TRAIN, st.sampled_from([2.0, 3.5, 5.0]), st.booleans())
def test_auc_and_brier_are_those_of_loops(rows, train, horizon, cut):
    (t, k, r), (train_t, train_k) = arrays(rows), arrays(train)
    if cut: t, k = np.minimum(t, horizon), np.where(t > horizon, 0, k)
    at_horizon = censoring_survival(train_t, train_k, horizon)
    stays = (t > horizon) | ((t == horizon) & (horizon == t.max()) & (k == 0))  # follow-up cut at the horizon
    possible = stays.any() and horizon <= train_t.max()
    calls = (lambda: cause_specific_auc(t, k, r, horizon, train_t, train_k)[0], lambda: cause_specific_auc(t, k, r, horizon, train_t, train_k, "event free")[0], lambda: cause_specific_brier(t, k, r, horizon, train_t, train_k)[0])
    case = (k == 1) & (t <= horizon)
    if not possible or not case.any():
        for call in calls[:2] if possible else calls:
            with pytest.raises(ValueError): call()
        return
    w = np.array([1 / at_horizon if stay else (kind > 0) / censoring_survival(train_t, train_k, u) for u, kind, stay in zip(t, k, stays)])
    for call, control in zip(calls, (~case, stays)):
        pairs = [(w[i] * w[j], (r[i] > r[j]) + 0.5 * (r[i] == r[j])) for i in np.flatnonzero(case) for j in np.flatnonzero(control)]
        assert abs(call() - sum(a * b for a, b in pairs) / sum(a for a, _ in pairs)) < 1e-10
    assert abs(calls[2]() - sum(a * (c - f) ** 2 for a, c, f in zip(w, case, r)) / len(t)) < 1e-10


@relaxed
@given(PATIENTS, TRAIN, st.sampled_from([2.2, 3.2, 5.2]))
def test_references_agree_where_censoring_never_ties_with_events(rows, train, horizon):
    "Events tie with each other; censoring falls between days, where their G(t-) is our G(t)."
    (t, k, r), (train_t, train_k) = arrays(rows), arrays(train)
    t, train_t = t + 0.5 * (k == 0), train_t + 0.5 * (train_k == 0)
    known = dict(train_event_times=train_t, train_event_indicators=train_k, method="IPCW")
    pairs = [(lambda: cause_specific_concordance(t, k, r), lambda: reference.concordance_cr_per_event(r, t, k)[0]), (lambda: cause_specific_uno(t, k, r, train_t, train_k, horizon), lambda: reference.concordance_cr_per_event(r, t, k, tau=horizon, **known)[0]),
             (lambda: cause_specific_brier(t, k, r, horizon, train_t, train_k)[0], lambda: reference.brier_multiple_points_cr_per_event(r[:, None], t, k, train_t, train_k, np.array([horizon]))[0])]
    pairs += [(lambda ours=ours: cause_specific_auc(t, k, r, horizon, train_t, train_k, ours)[0], lambda theirs=theirs: reference.auc_cr_per_event(r, t, k, horizon, control_definition=theirs, **known)) for ours, theirs in (("not case", "NotCase"), ("event free", "EventFree"))]
    for ours, theirs in pairs:
        try: value = ours()
        except ValueError: continue
        assert abs(value - theirs()) < 1e-8


@relaxed
@given(PATIENTS, TRAIN, st.sampled_from([2.0, 3.5, 5.0]), st.booleans())
def test_without_competing_events_all_is_ordinary(rows, train, horizon, cut):
    (t, k, r), (train_t, train_k) = arrays(rows), arrays(train)
    if cut: t, k = np.minimum(t, horizon), np.where(t > horizon, 0, k)
    e, train_e = k > 0, train_k > 0
    both = np.stack([r / 2, r], axis=1)
    pairs = [(lambda: cause_specific_concordance(t, e, r), lambda: concordance_index(t, e, r)), (lambda: cause_specific_uno(t, e, r, train_t, train_e, horizon), lambda: uno_concordance(t, e, r, train_t, train_e, horizon)),
             (lambda: cause_specific_brier(t, e, both, [1, horizon], train_t, train_e), lambda: brier_score(t, e, both, [1, horizon], train_t, train_e)),
             (lambda: competing_calibration_slope(t, e, r, horizon), lambda: calibration_slope(t, e, r, horizon)), (lambda: competing_calibration_groups(t, e, r, horizon, 2), lambda: calibration_groups(t, e, r, horizon, 2)),
             (lambda: competing_calibration_curve(t, e, r, horizon), lambda: calibration_curve(t, e, r, horizon))]
    pairs += [(lambda c=c: cause_specific_auc(t, e, r, horizon, train_t, train_e, c), lambda: cumulative_dynamic_auc(t, e, r, horizon, train_t, train_e)) for c in ("not case", "event free")]
    for competing, ordinary in pairs:
        try: expected = ordinary()
        except ValueError:
            with pytest.raises(ValueError): competing()
            continue
        assert np.allclose(np.asarray(competing(), dtype=float), np.asarray(expected, dtype=float), rtol=0, atol=1e-12)


@relaxed
@given(MANY, st.sampled_from([2.0, 3.5, 5.0]), st.integers(3, 4))
def test_calibration_is_that_of_aalen_johansen_and_of_fine_and_gray(rows, horizon, knots):
    t, k, r = arrays(rows)
    if t.max() < horizon or not ((k == 1) & (t <= horizon)).any(): return
    whole, expected = competing_calibration_groups(t, k, r, horizon, 1).iloc[0], aalen_johansen(t, k, at=horizon).iloc[0]
    assert np.allclose(whole[["observed", "low", "high"]].to_numpy(dtype=float), expected[["risk", "low", "high"]].to_numpy(dtype=float), rtol=0, atol=1e-9)
    try: ours = competing_calibration_index(t, k, r, horizon, knots, "cox")
    except ValueError: return
    try: theirs = reference.integrated_calibration_index_cr(r, t, k, horizon, knots=knots)
    except ValueError: return
    for a, b in (("ici", "ICI"), ("e50", "E50"), ("e90", "E90"), ("e_max", "E_max")): assert abs(ours[a] - theirs[b]) < 1e-6


@settings(relaxed, max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 8), TYPE, RISK), min_size=30, max_size=40), st.sampled_from([3.5, 5.0]))
def test_errors_of_observed_over_expected_are_the_jackknife(rows, horizon):
    "Derivatives of log(Aalen-Johansen / mean risk) by the weight of each patient; patients are copied to weigh them."
    t, k, r = arrays(rows)
    try: error = competing_calibration_slope(t, k, r, horizon).se["observed/expected"]
    except ValueError: return
    n, copies, changes = len(t), 400, []
    for i in range(n):
        values = []
        for change in (1, -1):
            times = np.full(n, copies)
            times[i] += change
            values.append(np.log(aalen_johansen(np.repeat(t, times), np.repeat(k, times), at=horizon).risk.iloc[0] / np.average(r, weights=times)))
        changes.append((values[0] - values[1]) * copies / 2)
    assert np.isclose(np.sqrt(np.sum(np.square(changes))), error, rtol=1e-3)


@relaxed
@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, 3]), TYPE, st.sampled_from([0.0, 1e-12, 0.3, 0.5, 1.0])), min_size=1, max_size=12), st.sampled_from([1.0, 2.0, 3.0]))
def test_a_number_or_an_error_never_nan(rows, horizon):
    t, k, r = arrays(rows)
    calls = [lambda: aalen_johansen(t, k).to_numpy(), lambda: aalen_johansen(t, k, at=horizon).to_numpy(), lambda: cause_specific_concordance(t, k, r), lambda: cause_specific_uno(t, k, r, t, k, horizon), lambda: cause_specific_auc(t, k, r, horizon, t, k),
             lambda: cause_specific_brier(t, k, r, horizon, t, k), lambda: cause_specific_integrated_brier(t, k, np.stack([r, r], axis=1), [0.5, horizon], t, k), lambda: competing_calibration_slope(t, k, r, horizon).to_numpy(),
             lambda: competing_calibration_groups(t, k, r, horizon, 2).to_numpy(), lambda: competing_calibration_curve(t, k, r, horizon, method="cox").to_numpy(), lambda: list(competing_calibration_index(t, k, r, horizon).values())]
    numbers_or_errors(calls)


def test_memory_is_linear():
    generator, peaks = np.random.default_rng(0), []
    for n in (25_000, 100_000):
        x = generator.normal(size=n).clip(-3, 3)
        t, k, r = generator.exponential(np.exp(-x)), generator.choice(3, n), -np.expm1(-0.5 * np.exp(x))
        peaks.append(peak_memory(lambda: (aalen_johansen(t, k), cause_specific_uno(t, k, r, t, k, 1.0), cause_specific_auc(t, k, r, 1.0, t, k), cause_specific_brier(t, k, r, 1.0, t, k),
                                          competing_calibration_slope(t, k, r, 1.0), competing_calibration_index(t, k, r, 1.0, method="cox"))))
    assert peaks[1] < 5 * peaks[0] and peaks[1] < 100_000 * 1000
