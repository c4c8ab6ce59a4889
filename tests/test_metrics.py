"Metrics against scikit-survival, torchsurv, pycox and SciPy on data drawn to be nasty: many ties, heavy censoring, few patients."
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import peak_memory
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter, NelsonAalenFitter
from pycox.evaluation import EvalSurv
from scipy.stats import bootstrap as scipy_bootstrap
from sksurv.metrics import (brier_score as sksurv_brier, concordance_index_censored, concordance_index_ipcw, cumulative_dynamic_auc as sksurv_auc,
                            integrated_brier_score as sksurv_ibs)
from sksurv.nonparametric import CensoringDistributionEstimator
from sksurv.util import Surv
from torchsurv.metrics.auc import Auc
from torchsurv.metrics.brier_score import BrierScore
from torchsurv.metrics.cindex import ConcordanceIndex
from torchsurv.stats.ipcw import get_ipcw

from ehr_sequencing.bootstrap import bca_interval, bootstrap, bootstrap_concordance, train_minus_test, weighted_concordance
from ehr_sequencing.brier import brier_score, integrated_brier_score, null_brier_score, scaled_brier_score
from ehr_sequencing.censoring import censoring_distribution, censoring_weights, kaplan_meier, nelson_aalen
from ehr_sequencing.metrics import concordance_index, cumulative_dynamic_auc, kaplan_meier_curves, mean_auc, pair_sums, uno_concordance

MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large])
SOME = settings(MANY, max_examples=200)


def column(draw, n, top):
    "n integers 0..top from one draw of bytes, which is many times as fast as a list."
    return np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8).astype(int) % (top + 1)


@st.composite
def cohorts(draw, least=2, most=40):
    "Times on a coarse grid, a share of events between none and all, risks with ties."
    n = draw(st.integers(least, most))
    last, share, levels = draw(st.integers(2, 12)), draw(st.integers(0, 10)), draw(st.integers(1, 12))
    return column(draw, n, last - 1) + 1.0, column(draw, n, 9) < share, column(draw, n, levels - 1) / max(levels - 1, 1)


@st.composite
def evaluations(draw, sane=True):
    "Test patients, risks at three horizons, and training patients. `sane`: with horizons between the first event and the end of follow-up, as far as there is room."
    (t, e, r), (train_t, train_e, _) = draw(cohorts(5, 40)), draw(cohorts(5, 60))
    train_t, first, last = train_t + draw(st.integers(0, 4)), 1, 24
    if sane:
        assume(e.any() and train_e.any())
        first, last = int(2 * t[e].min()), int(2 * min(t.max(), train_t.max())) - 1
        assume(last - first >= 2)
    horizons = np.sort(draw(st.lists(st.integers(first, last), min_size=3, max_size=3, unique=True))) / 2  # also between the times
    return t, e, (r[:, None] + column(draw, 3 * len(t), 3).reshape(-1, 3)) / 4, horizons, train_t, train_e


def defined(function, *arguments):
    "The value of a metric; a case in which it raises is not counted, and a value that is not finite fails."
    try: value = function(*arguments)
    except ValueError: assume(False)
    assert np.isfinite(value).all()
    return value


def theirs(function, *arguments):
    "The value of a reference; a case which it refuses is not counted."
    try: return function(*arguments)
    except ValueError: assume(False)


@MANY
@given(cohorts(1))
def test_curves_are_those_of_the_references(cohort):
    t, e, _ = cohort
    at = np.unique(np.concatenate([t, t - 0.5]))
    np.testing.assert_allclose(kaplan_meier(t, e)(at), KaplanMeierFitter().fit(t, e).predict(at), atol=1e-12)
    np.testing.assert_allclose(nelson_aalen(t, e)(at), np.ravel(NelsonAalenFitter(nelson_aalen_smoothing=False).fit(t, e).predict(at)), atol=1e-12)
    if e.any() and not e.all():
        np.testing.assert_allclose(censoring_distribution(t, e)(at), CensoringDistributionEstimator().fit(Surv.from_arrays(e, t)).predict_proba(at), atol=1e-12)
    for curve in (kaplan_meier(t, e), censoring_distribution(t, e)):
        assert (curve(t, left_limit=True) == curve(t - 0.5)).all()  # no time lies between


@MANY
@given(st.data(), st.integers(1, 40))
def test_pair_sums_are_those_of_two_loops(data, n):
    keys, r, a, b = (column(data.draw, n, top) for top in (20, 6, 3, 4))
    pairs, right = keys[:, None] < keys, (r[:, None] > r) + 0.5 * (r[:, None] == r)
    np.testing.assert_allclose(pair_sums(keys, r, a, b), [a @ pairs @ b, a @ (pairs * right) @ b], atol=1e-9)


@MANY
@given(cohorts())
def test_harrell_is_that_of_scikit_survival(cohort):
    t, e, r = cohort
    assert abs(defined(concordance_index, t, e, r) - concordance_index_censored(e, t, r)[0]) < 1e-12


@MANY
@given(cohorts())
def test_harrell_is_refused_exactly_where_no_pair_is_comparable(cohort):
    t, e, r = cohort
    if (e[:, None] & ((t[:, None] < t) | ((t[:, None] == t) & ~e))).any(): assert 0 <= concordance_index(t, e, r) <= 1
    else:
        with pytest.raises(ValueError, match="comparable|all censored"): concordance_index(t, e, r)


@MANY
@given(evaluations(), st.integers(1, 12))
def test_uno_is_that_of_scikit_survival(case, tau):
    t, e, r, _, train_t, train_e = case
    ours = defined(uno_concordance, t, e, r, train_t, train_e, tau)
    train, test = Surv.from_arrays(train_e, train_t) if train_e.any() else assume(False), Surv.from_arrays(e, t)
    for k in range(3): assert abs(ours[k] - theirs(concordance_index_ipcw, train, test, r[:, k], tau)[0]) < 1e-12


@MANY
@given(cohorts(), st.integers(2, 13))
def test_truncated_harrell_is_unos_with_weights_of_one(cohort, tau):
    t, e, r = cohort
    complete = Surv.from_arrays(np.ones(20, bool), np.arange(20) + 1.0)
    np.testing.assert_allclose(defined(concordance_index, t, e, np.stack([r, -r], axis=1), [tau, tau]), [theirs(concordance_index_ipcw, complete, Surv.from_arrays(e, t), x, tau)[0] for x in (r, -r)], atol=1e-12)
    assert concordance_index(t, e, np.stack([r, r], axis=1), [tau, 99])[0] == concordance_index(t, e, r, tau)


@MANY
@given(evaluations())
def test_auc_is_that_of_scikit_survival(case):
    t, e, r, horizons, train_t, train_e = case
    ours, mean = defined(cumulative_dynamic_auc, *case), defined(mean_auc, *case)
    assume(train_e.any())
    scores = theirs(sksurv_auc, Surv.from_arrays(train_e, train_t), Surv.from_arrays(e, t), r, horizons)
    np.testing.assert_allclose(ours, scores[0], atol=1e-12)
    assert abs(mean - scores[1]) < 1e-12


@MANY
@given(evaluations())
def test_brier_and_its_integral_are_those_of_scikit_survival(case):
    t, e, r, horizons, train_t, train_e = case
    risks = r / r.max() if r.max() else r
    ours, integral = defined(brier_score, t, e, risks, *case[3:]), defined(integrated_brier_score, t, e, risks, *case[3:])
    assume(train_e.any() and e.any())
    arguments = Surv.from_arrays(train_e, train_t), Surv.from_arrays(e, t), 1 - risks, horizons
    np.testing.assert_allclose(ours, theirs(sksurv_brier, *arguments)[1], atol=1e-12)
    assert abs(integral - theirs(sksurv_ibs, *arguments)) < 1e-12


@MANY
@given(evaluations(), st.booleans())
def test_follow_up_cut_at_the_last_horizon_is_read_as_cut_just_after(case, train_too):
    t, e, r, horizons, train_t, train_e = case
    def cut(days, events, at): return np.minimum(days, at), events & (days <= at)
    last, risks = horizons[-1], r / r.max() if r.max() else r
    assume(not (~e & (t == last)).any() and not (train_too and (~train_e & (train_t == last)).any()))  # censored on that very day before the cut: nothing can tell
    after = cut(t, e, last + 0.25), cut(train_t, train_e, last + 0.25) if train_too else (train_t, train_e)  # no time lies between
    at = cut(t, e, last), cut(train_t, train_e, last) if train_too else (train_t, train_e)
    for metric, x in ((cumulative_dynamic_auc, r), (mean_auc, r), (brier_score, risks), (integrated_brier_score, risks), (scaled_brier_score, risks)):
        np.testing.assert_allclose(metric(*at[0], x, horizons, *at[1]), defined(metric, *after[0], x, horizons, *after[1]), atol=1e-12)


@SOME
@given(evaluations(), st.integers(2, 12))
def test_all_are_those_of_torchsurv(case, tau):
    "To 1e-6: torchsurv's weights are in single precision."
    t, e, r, horizons, train_t, train_e = case
    assume(t.max() <= train_t.max() and e.any() and train_e.any())
    risks = r / r.max() if r.max() else r
    event, days, at = torch.tensor(e), torch.tensor(t), torch.tensor(horizons)
    auc, mean = defined(cumulative_dynamic_auc, *case), defined(mean_auc, *case)
    brier, integral = defined(brier_score, t, e, risks, *case[3:]), defined(integrated_brier_score, t, e, risks, *case[3:])
    weights, at_horizons = (get_ipcw(torch.tensor(train_e), torch.tensor(train_t).float(), x.float()).double() for x in (days, at))
    areas, scores, concordance = Auc(), BrierScore(), ConcordanceIndex()
    np.testing.assert_allclose(auc, areas(torch.tensor(r), event, days, weight=weights, new_time=at, weight_new_time=at_horizons), atol=1e-6)
    assert abs(mean - areas.integral()) < 1e-6
    np.testing.assert_allclose(brier, scores(torch.tensor(1 - risks), event, days, at, weights, at_horizons), atol=1e-6)
    assert abs(integral - scores.integral()) < 1e-6
    harrell, uno = defined(concordance_index, t, e, r[:, 0]), defined(uno_concordance, t, e, r[:, 0], train_t, train_e, tau)
    assert abs(harrell - concordance(torch.tensor(r[:, 0]), event, days)) < 1e-6
    assert abs(uno - concordance(torch.tensor(r[:, 0]), event, days, weight=weights, tmax=torch.tensor(tau))) < 1e-6


@SOME
@given(st.permutations(range(1, 25)), st.data())
def test_brier_is_that_of_pycox_without_ties(times, data):
    "With distinct times that are their own training set the weights add up to n, so that pycox's division by them is ours by n."
    t, e = np.array(times, dtype=float), column(data.draw, 24, 1).astype(bool)
    risks, horizon = column(data.draw, 24, 8) / 8, data.draw(st.integers(1, 22)) + 0.5
    ours = defined(brier_score, t, e, risks, horizon, t, e)
    survival = pd.DataFrame(np.stack([np.ones(24), 1 - risks]), index=[0, horizon])
    assert abs(ours[0] - EvalSurv(survival, t, e.astype(int), censor_surv="km").brier_score(np.array([horizon]))[horizon]) < 1e-9
    assert abs(censoring_weights(t, e, horizon, t, e).mean() - 1) < 1e-12


@MANY
@given(evaluations(sane=False), st.integers(0, 14))
def test_no_metric_gives_what_is_not_a_number(case, tau):
    "Whatever comes: a finite number in its range, or a ValueError."
    t, e, r, horizons, train_t, train_e = case
    risks = r / r.max() if r.max() else r
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no division by zero on the way either
        for metric, arguments, low, high in ((concordance_index, (t, e, r), 0, 1), (uno_concordance, (t, e, r, train_t, train_e, tau), 0, 1), (cumulative_dynamic_auc, case, 0, 1),
                                             (mean_auc, case, 0, 1), (brier_score, (t, e, risks, *case[3:]), 0, np.inf), (integrated_brier_score, (t, e, risks, *case[3:]), 0, np.inf),
                                             (scaled_brier_score, (t, e, risks, *case[3:]), -np.inf, 1), (null_brier_score, (t, e, *case[3:]), 0, np.inf)):
            try: value = metric(*arguments)
            except ValueError: continue
            assert np.isfinite(value).all() and (low - 1e-12 <= np.min(value)) and (np.max(value) <= high + 1e-12), metric.__name__


@MANY
@given(evaluations(), st.randoms(use_true_random=False))
def test_order_of_patients_and_scale_of_risks_do_not_matter(case, random):
    t, e, r, horizons, train_t, train_e = case
    order = np.array(random.sample(range(len(t)), len(t)))
    values = defined(concordance_index, t, e, r), defined(cumulative_dynamic_auc, *case), defined(uno_concordance, t, e, r, train_t, train_e, horizons[0] + 1)
    for again in ((t[order], e[order], r[order]), (t, e, 1e-13 * r**3)):
        np.testing.assert_allclose(values[0], concordance_index(*again), atol=1e-12)
        np.testing.assert_allclose(values[1], cumulative_dynamic_auc(*again, *case[3:]), atol=1e-12)
        np.testing.assert_allclose(values[2], uno_concordance(*again, train_t, train_e, horizons[0] + 1), atol=1e-12)


@SOME
@given(cohorts(6))
def test_survival_bands_are_those_of_lifelines(cohort):
    t, e, r = cohort
    groups = (r > np.median(r)).astype(int)
    for g, curve in kaplan_meier_curves(t, e, groups).groupby("group"):
        km = KaplanMeierFitter().fit(t[groups == g], e[groups == g])
        inside = ((curve.survival > 0) & (curve.survival < 1)).to_numpy()
        np.testing.assert_allclose(curve.survival, km.survival_function_.to_numpy()[-len(curve):, 0], atol=1e-12)
        np.testing.assert_allclose(curve[["low", "high"]].to_numpy()[inside], km.confidence_interval_.to_numpy()[-len(curve):][inside], atol=1e-6)
        assert np.isfinite(curve.drop(columns="group")).all().all()


@settings(SOME, max_examples=40)
@given(cohorts(4, 25), st.integers(0, 1000), st.integers(2, 8))
def test_weights_and_copies_give_the_same_draws(cohort, seed, n_patients):
    t, e, r = cohort
    groups = np.arange(len(t)) % n_patients
    defined(concordance_index, t, e, r)
    copies = bootstrap(lambda rows: concordance_index(t[rows], e[rows], r[rows]), len(t), groups, n_resamples=30, seed=seed)
    counts = bootstrap(weighted_concordance(t, e, {"value": r}), len(t), groups, n_resamples=30, seed=seed, weighted=True)
    np.testing.assert_allclose(copies.draws["value"], counts.draws["value"], atol=1e-12)  # NaN at the same places
    np.testing.assert_allclose(copies.influence["value"], counts.influence["value"], atol=1e-12)
    assert copies.left_out("value") == counts.left_out("value")


@settings(SOME, max_examples=60)
@given(st.lists(st.integers(-30, 30), min_size=5, max_size=30), st.sampled_from([0.8, 0.9, 0.95, 0.99]), st.sampled_from([np.mean, np.std, lambda x: np.mean(x) / np.max(x)]))
def test_bca_is_that_of_scipy(values, level, statistic):
    x = np.exp(np.array(values) / 10)
    n = len(x)
    boot = bootstrap(lambda rows: float(statistic(x[rows])), n, n_resamples=1)
    reference = scipy_bootstrap((x,), statistic, method="BCa", n_resamples=400, confidence_level=level, vectorized=False, rng=np.random.default_rng(0))
    assume(np.isfinite(reference.confidence_interval).all() and boot.influence["value"].abs().max() > 1e-9)  # with rounding alone SciPy's acceleration is that of the rounding
    try: ours = bca_interval(reference.bootstrap_distribution, float(statistic(x)), boot.influence["value"], level)
    except ValueError: assume(False)
    np.testing.assert_allclose(ours, reference.confidence_interval, rtol=1e-9, atol=1e-12)


def test_influence_of_independent_samples_is_that_of_scipy():
    generator = np.random.default_rng(0)
    x, y = generator.exponential(size=40), generator.exponential(2, size=25)
    minus = lambda a, b, axis=-1: a.mean(axis) - b.mean(axis)
    reference = scipy_bootstrap((x, y), minus, method="BCa", n_resamples=3000, rng=np.random.default_rng(0))
    gap = train_minus_test(*(bootstrap(lambda rows, a=a: a[rows].mean(), len(a), seed=s) for s, a in enumerate((x, y))))
    ours = bca_interval(reference.bootstrap_distribution, x.mean() - y.mean(), gap.influence["value"])
    np.testing.assert_allclose(ours, reference.confidence_interval, rtol=5e-3)  # SciPy's acceleration differs by a factor (n - 1) / n a sample


def test_p_value_and_interval_agree():
    generator = np.random.default_rng(1)
    x = generator.exponential(size=30)
    boot = bootstrap(lambda weights: {"value": weights @ x / weights.sum(1)}, 30, n_resamples=20_000, weighted=True)
    for method in ("percentile", "bca"):
        for level in (0.5, 0.8, 0.9, 0.95, 0.99):
            for end in boot.interval("value", level, method): assert abs(boot.p_value("value", end, method) - (1 - level)) < 0.002, (method, level)


def test_differences_are_paired():
    generator = np.random.default_rng(2)
    x = generator.normal(size=200)
    t, e = generator.exponential(np.exp(-x)), generator.random(200) < 0.5
    boot = bootstrap(weighted_concordance(t, e, {"a": x, "b": x + 1e-3 * generator.normal(size=200)}), 200, weighted=True)
    width = lambda ends: ends[1] - ends[0]
    assert width(boot.difference("a", "b").interval("a - b")) < 0.1 * width(boot.interval("a"))
    draws = bootstrap_concordance(t, e, {"a": x})
    np.testing.assert_allclose(draws["a"], boot.draws["a"])  # the same seed gives the same draws, whatever else is evaluated


def test_whole_patients_are_drawn():
    generator = np.random.default_rng(3)
    x = generator.normal(size=60)
    ids = generator.permutation(60) - 2**40  # any label
    rows = np.concatenate([np.repeat(np.arange(60), 2), np.arange(10)])  # two rows a patient, three for some
    boot = bootstrap(lambda drawn: {"patients": len(np.unique(drawn)), "rows": len(drawn), "mean": x[rows][drawn].mean()}, 130, ids[rows], n_resamples=200)
    single = bootstrap(lambda drawn: {"patients": len(np.unique(drawn))}, 60, n_resamples=200)
    assert (boot.draws["rows"] >= 120).all() and boot.draws["patients"].between(2 * single.draws["patients"].min(), 3 * single.draws["patients"].max()).all()
    assert len(boot.influence) == 60  # each block of the jackknife is a patient
    spread = bootstrap(lambda drawn: x[rows][drawn].mean(), 130, n_resamples=200).draws["value"].std()
    assert 1.2 < boot.draws["mean"].std() / spread < 1.7  # about the square root of two


def test_models_that_are_the_same_do_not_differ():
    generator = np.random.default_rng(4)
    x = generator.exponential(size=50)
    same = bootstrap(lambda rows: {"a": x[rows].mean(), "b": x[rows].mean() * (1 + 1e-15)}, 50, n_resamples=100).difference("a", "b")
    for method in ("bca", "percentile"): assert same.interval("a - b", method=method) == (0, 0) and same.p_value("a - b", method=method) == 1
    assert bca_interval(x, 1.0, 1e-17 * generator.exponential(size=50)) == bca_interval(x, 1.0, np.zeros(50))  # rounding has no skewness


def test_a_hundred_thousand_patients_in_seconds_and_linear_memory():
    peaks = {}
    for n in (20_000, 100_000):
        generator = np.random.default_rng(0)
        x = generator.normal(size=n)
        event, censored = np.ceil(1000 * generator.exponential(np.exp(-x))), np.ceil(generator.uniform(100, 3000, n))
        t, e, horizons = np.minimum(event, censored), event <= censored, np.array([200, 500, 1000, 2000])
        risks = 1 - np.exp(-np.exp(x[:, None] + 0.1 * generator.normal(size=(n, 1))) * horizons / 1000)
        for metric, arguments in ((concordance_index, (t, e, x)), (uno_concordance, (t, e, x, t, e, 2000)), (cumulative_dynamic_auc, (t, e, risks, horizons, t, e)), (mean_auc, (t, e, risks, horizons, t, e)),
                                  (brier_score, (t, e, risks, horizons, t, e)), (integrated_brier_score, (t, e, risks, horizons, t, e)), (scaled_brier_score, (t, e, risks, horizons, t, e))):
            began = time.perf_counter()
            metric(*arguments)
            assert time.perf_counter() - began < 10, metric.__name__
            peaks[metric.__name__, n] = peak_memory(lambda: metric(*arguments))
    for name in {name for name, _ in peaks}: assert peaks[name, 100_000] < 6 * peaks[name, 20_000], name
