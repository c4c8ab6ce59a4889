"The one call, on data drawn to be nasty: it gives finite numbers with finite intervals or says why not, and its numbers are those of the single metrics."
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ehr_sequencing.brier import brier_score, integrated_brier_score, scaled_brier_score
from ehr_sequencing.competing_risks import aalen_johansen, cause_specific_auc, cause_specific_brier, cause_specific_concordance, cause_specific_uno
from ehr_sequencing.evaluation import METRICS, NULL, OTHERS, evaluate_survival
from ehr_sequencing.metrics import concordance_index, cumulative_dynamic_auc, mean_auc, uno_concordance

SOME = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large])


@st.composite
def cohorts(draw, kinds):
    "Test and training patients on a coarse grid, two models and three horizons, some of them past the follow-up."
    def column(n, top): return np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8).astype(int) % (top + 1)
    n, m, last, share = draw(st.integers(8, 40)), draw(st.integers(8, 50)), draw(st.integers(2, 12)), draw(st.integers(0, 10))
    types = np.where(column(n, 9) < share, 1 + column(n, 9) % kinds, 0)
    risks = {name: np.sort(column(3 * n, 20).reshape(n, 3) / 20, axis=1) for name in ("one", "two")}
    horizons = np.sort(draw(st.lists(st.integers(1, 2 * last), min_size=3, max_size=3, unique=True))) / 2
    return column(n, last - 1) + 1.0, types, risks, horizons, column(m, last) + 1.0, np.where(column(m, 9) < 4, 1 + column(m, 9) % kinds, 0)


def value_of(function, *arguments):
    "A metric, or None where it is undefined."
    try: return np.ravel(function(*arguments))[0]
    except ValueError: return None


@SOME
@given(cohorts(1))
def test_values_are_those_of_the_metrics_and_undefined_where_they_are(cohort):
    t, types, risks, horizons, train_t, train_types = cohort
    e, train = types == 1, (train_t, train_types == 1)
    table = evaluate_survival(t, e, risks, horizons, *train, n_resamples=0, undefined="omit")
    assert np.isfinite(table.value).all() and all(row["reason"] for row in table.attrs["omitted"])
    found = {(r.model, r.metric, None if pd.isna(r.horizon) else r.horizon): r.value for r in table.itertuples()}
    listed = {(o["model"], o["metric"], o["horizon"]) for o in table.attrs["omitted"]}
    assert not listed & set(found) and len(listed) + len([k for k in found if k[0] != NULL]) == 2 * (3 * (len(METRICS) - 3) + 3)
    within = True
    for k, h in enumerate(horizons):
        known = value_of(brier_score, t, e, risks["one"][:, k], h, *train) is not None
        within &= known
        for model, r in risks.items():
            x = r[:, k]
            for name, function, arguments in (("harrell_c", concordance_index, (t, e, x, h)), ("uno_c", uno_concordance, (t, e, x, *train, h)), ("auc", cumulative_dynamic_auc, (t, e, x, h, *train)),
                                              ("brier", brier_score, (t, e, x, h, *train)), ("scaled_brier", scaled_brier_score, (t, e, x, h, *train))):
                expected = value_of(function, *arguments) if known else None  # a horizon past follow-up is left out as a whole
                assert (expected is None) == ((model, name, h) in listed)
                if expected is not None: assert abs(found[model, name, h] - expected) < 1e-9
    for model, r in risks.items():
        for name, function in (("mean_auc", mean_auc), ("integrated_brier", integrated_brier_score)):
            expected = value_of(function, t, e, r, horizons, *train) if within else None
            assert (expected is None) == ((model, name, None) in listed)
            if expected is not None: assert abs(found[model, name, None] - expected) < 1e-9


@SOME
@given(cohorts(2))
def test_competing_values_are_the_cause_specific_ones(cohort):
    t, types, risks, horizons, train_t, train_types = cohort
    assume((types == 1).any())
    chosen = ["harrell_c", "uno_c", "auc", "brier", "scaled_brier"]
    table = evaluate_survival(t, None, risks, horizons, train_t, None, event_types=types, train_event_types=train_types, metrics=chosen, n_resamples=0, undefined="omit")
    for row in table[table.model != NULL].itertuples():
        x, h = risks[row.model][:, list(horizons).index(row.horizon)], row.horizon
        def scaled():
            same = np.full(len(t), aalen_johansen(train_t, train_types, at=h).risk.iloc[0])
            return 1 - cause_specific_brier(t, types, x, h, train_t, train_types)[0] / cause_specific_brier(t, types, same, h, train_t, train_types)[0]
        expected = {"scaled_brier": scaled, "harrell_c": lambda: cause_specific_concordance(t, types, x, h), "uno_c": lambda: cause_specific_uno(t, types, x, train_t, train_types, h),
                    "auc": lambda: cause_specific_auc(t, types, x, h, train_t, train_types)[0], "brier": lambda: cause_specific_brier(t, types, x, h, train_t, train_types)[0]}[row.metric]()
        assert abs(row.value - expected) < 1e-9


@settings(SOME, max_examples=30)
@given(cohorts(1), st.sampled_from(["bca", "percentile"]))
def test_intervals_are_finite_and_ordered(cohort, method):
    t, types, risks, horizons, train_t, train_types = cohort
    table = evaluate_survival(t, types == 1, risks, horizons, train_t, train_types == 1, n_resamples=60, method=method, undefined="omit", reference="one")
    drawn = table[~table.metric.isin(OTHERS)]
    assert np.isfinite(table.value).all() and drawn.low.notna().all() and (drawn.low <= drawn.high).all() and np.isfinite(drawn[["low", "high"]].to_numpy(dtype=float)).all()
    values = {(r.model, r.metric, None if pd.isna(r.horizon) else r.horizon): r.value for r in table.itertuples()}
    for r in table.dropna(subset="difference").itertuples():
        first = values.get(("one", r.metric, None if pd.isna(r.horizon) else r.horizon))  # its own row may lack for want of an interval
        assert r.model == "two" and (first is None or abs(r.difference - (r.value - first)) < 1e-9)
        assert r.difference_low <= r.difference_high and 0 < r.p_value <= 1
    assert table[table.model == "one"].difference.isna().all()


def test_the_same_seed_gives_the_same_table_and_another_does_not():
    generator = np.random.default_rng(0)
    x = generator.normal(size=200)
    t, e = np.ceil(900 * generator.exponential(np.exp(-x))), generator.random(200) < 0.6
    risks = 1 - np.exp(-np.exp(x)[:, None] * np.array([200, 500]) / 900)
    one, same, other = (evaluate_survival(t, e, risks, [200, 500], t, e, metrics=["auc", "uno_c"], n_resamples=100, seed=seed) for seed in (1, 1, 2))
    assert one.equals(same) and not one.equals(other)
    wide, narrow = (evaluate_survival(t, e, risks, [200, 500], t, e, metrics=["auc"], n_resamples=400, level=level) for level in (0.99, 0.8))
    assert (wide.low < narrow.low).all() and (wide.high > narrow.high).all()


def test_too_many_undefined_draws_are_refused():
    t, e = np.array([5.0] + [9.0] * 40), np.array([True] + [False] * 40)
    risks = np.linspace(0.9, 0.1, 41)
    with pytest.raises(ValueError, match="model, auc at 6 days: .*too few events"): evaluate_survival(t, e, risks, 6, t, e, metrics=["auc"], n_resamples=200)
    kept = evaluate_survival(t, e, risks, 6, t, e, metrics=["auc", "brier"], n_resamples=200, undefined="omit")
    assert "auc" not in set(kept.metric) and "brier" in set(kept.metric)


def test_a_difference_without_an_interval_is_left_out_or_refused():
    "One draw lies on one side of the estimate, so BCa has no answer."
    t = np.arange(1.0, 41)
    one = np.linspace(0.9, 0.1, 40)
    two = one.copy()
    two[[0, 39]] = two[[39, 0]]  # the perfect ranking with its ends exchanged
    arguments = dict(durations=t, events=np.ones(40, bool), risks={"one": one, "two": two}, horizons=20.5, train_durations=t, train_events=np.ones(40, bool), metrics=["auc"], n_resamples=50, reference="one")
    with pytest.raises(ValueError, match="two, auc.*on one side of the estimate"): evaluate_survival(**arguments | {"n_resamples": 1})
    kept = evaluate_survival(**arguments | {"n_resamples": 1, "undefined": "omit"})
    assert kept.difference.isna().all() and any("two" == o["model"] for o in kept.attrs["omitted"])
    assert evaluate_survival(**arguments | {"method": "percentile"}).difference.notna().sum() == 1


def test_only_what_is_undefined_is_left_out_also_where_fits_are_drawn_anew():
    "With the same risk for everybody there is no slope; intercept and observed over expected are defined, here with several rows a patient."
    generator = np.random.default_rng(5)
    t = np.repeat(generator.integers(1, 30, 80), 2).astype(float)
    e, groups, flat = np.repeat(generator.random(80) < 0.6, 2), np.repeat(np.arange(80), 2), np.full(160, 0.3)
    arguments = dict(durations=t, events=e, risks=flat, horizons=15, train_durations=t, train_events=e, groups=groups, n_resamples=60)
    with pytest.raises(ValueError, match="model, calibration_slope at 15 days: .*no slope"): evaluate_survival(**arguments, metrics=["calibration_slope", "observed_expected"])
    kept = evaluate_survival(**arguments, metrics=["calibration_slope", "calibration_intercept", "observed_expected"], undefined="omit").set_index("metric")
    assert [o["metric"] for o in kept.attrs["omitted"]] == ["calibration_slope"] and (kept.loc[["calibration_intercept", "observed_expected"], "left_out"] == 0).all()
    observed = aalen_johansen(t, e.astype(int), at=15).risk.iloc[0]
    assert abs(kept.value["observed_expected"] - observed / 0.3) < 1e-9
    row = kept.loc["observed_expected"]
    assert row.low < row.value < row.high
    alone = evaluate_survival(**arguments, metrics=["observed_expected"]).iloc[0]
    assert (alone.low, alone.value, alone.high) == (row.low, row.value, row.high)
