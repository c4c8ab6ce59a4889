"PBC2 from the file to the page of numbers to beat; skips where the data are absent. The references are loops over the wide file, lifelines and scikit-survival."
import importlib
import importlib.util
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import polars as pl
import pytest
from conftest import ROOT, data_folder
from lifelines import AalenJohansenFitter, CoxPHFitter
from sksurv.metrics import brier_score as sksurv_brier, concordance_index_censored, concordance_index_ipcw, cumulative_dynamic_auc
from sksurv.util import Surv

from ehr_sequencing.competing_risks import cause_specific_auc, cause_specific_concordance, cause_specific_uno
from ehr_sequencing.events import DEATH, visit_table
from ehr_sequencing.landmarks import at_elapsed
from ehr_sequencing.metrics import censoring_weights, event_weights
from ehr_sequencing.splits import fold_patients

YEAR = 365.25
PAGE = ROOT / "benchmarks" / "results" / "pbc2_landmarks.md"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("pbc2_landmarks", ROOT / "benchmarks" / "pbc2_landmarks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def path():
    return data_folder("pbc2") / "pbc2.csv.gz"


@pytest.fixture(scope="module")
def everything(study, path):
    "Both analyses with their scores, as on the page."
    return study.study(path)


@pytest.fixture(scope="module", params=["transplant censors", "transplant competes"])
def prepared(everything, request):
    cohorts, folds, results = everything
    return request.param, cohorts[request.param], folds, results[request.param]


def test_counts(study, path):
    table = study.pbc2_events(path)
    count = lambda code: table.events.filter(pl.col("code") == code)["subject_id"].n_unique()
    assert (table.n_patients, count(DEATH), count("TRANSPLANT")) == (312, 140, 29) and not table.set_aside
    measured = table.events.filter(pl.col("code").str.starts_with("LAB//") | pl.col("code").str.starts_with("SIGN//"))
    assert len(visit_table(measured)) == 1945
    wide = pl.read_csv(path, null_values="NA")
    assert table.events.filter(pl.col("code") == "LAB//serChol").height == 1945 - wide["serChol"].null_count()


def test_labels(prepared):
    name, cohort, folds, _ = prepared
    labels = cohort.labels
    assert len(cohort.store) == 312 and labels.event_indicators.sum() == 140 and (labels.n_at_risk > 0).all() and (folds >= 0).all()
    flow = labels.flow["patients"]
    if name == "transplant competes": assert flow["  with a competing event first"] == 29
    assert flow["analysed"] == 312


@pytest.mark.parametrize("year", [3, 5, 7])
def test_landmarks_against_the_wide_file(study, path, prepared, year):
    name, cohort, _, _ = prepared
    store, marks = cohort.store, cohort.marks[year]
    wide = pl.read_csv(path, null_values="NA").sort("id", "year")
    start, limit = round(year * YEAR), 3 * YEAR
    expected = {}
    for row in wide.group_by("id").first().iter_rows(named=True):
        left = round(row["years"] * YEAR) - start
        if left > 0: expected[row["id"]] = (min(left, limit), {"dead": 1, "alive": 0, "transplanted": 2 * (name == "transplant competes")}[row["status"]] * (left <= limit))
    assert dict(zip(store.subject_ids[marks.rows].tolist(), zip(marks.durations.tolist(), marks.event_types.tolist()))) == expected
    frame, entry, ages = cohort.last[year], cohort.entry[year], cohort.ages[year]
    assert tuple(frame.columns) == study.COVARIATES == tuple(entry.columns) and not frame.isna().any().any() and not entry.isna().any().any() and (ages.to_numpy() >= 0).all()
    for i in range(0, len(marks), 7):
        visits = wide.filter((pl.col("id") == int(store.subject_ids[marks.rows[i]])) & ((pl.col("year") * YEAR).round() <= start))
        first, last = visits.row(0, named=True), visits.row(-1, named=True)
        assert frame["log bilirubin"][i] == pytest.approx(np.log(last["serBilir"]), abs=1e-6) and frame["log albumin"][i] == pytest.approx(np.log(last["albumin"]), abs=1e-6)
        assert entry["log bilirubin"][i] == pytest.approx(np.log(first["serBilir"]), abs=1e-6) and entry["log prothrombin"][i] == pytest.approx(np.log(first["prothrombin"]), abs=1e-6)
        assert frame["age"][i] == pytest.approx(last["age"] + year, abs=0.01) and entry["age"][i] == pytest.approx(last["age"], abs=0.01) and ages["LAB//serBilir"][i] == start - round(last["year"] * YEAR)
        assert marks.visits[i] == len(visits) - 1 and marks.elapsed[i] == ages["LAB//serBilir"][i]


def test_risks(study, prepared):
    _, cohort, folds, _ = prepared
    marks, risks = cohort.marks[5], study.crossed_risks(cohort, folds, 5)
    estimate = AalenJohansenFitter(calculate_variance=False, seed=0).fit(marks.durations, marks.event_types, event_of_interest=1).cumulative_density_
    assert tuple(risks) == study.MODELS
    for r in risks.values():
        assert r.shape == (len(marks), 2) and ((r > 0) & (r <= 1)).all() and (np.diff(r, axis=1) >= 0).all()
        for j, years in enumerate((2, 3)): assert abs(r[:, j].mean() - estimate[estimate.index <= years * YEAR].iloc[-1, 0]) < 0.03


def test_risks_against_lifelines(study, everything):
    cohort = everything[0]["transplant censors"]
    marks, frame = cohort.marks[3], cohort.last[3]
    model = CoxPHFitter().fit(frame.assign(duration=marks.durations, event=marks.events), "duration", "event")
    survival = model.predict_survival_function(frame)  # at the days on record; asked for others, lifelines interpolates where the curve is a step
    steps = survival.index.searchsorted(study.HORIZONS, side="right") - 1
    np.testing.assert_allclose(study.cox_risks(frame, marks.durations, marks.event_types, frame, study.HORIZONS), 1 - survival.to_numpy()[steps].T, atol=1e-10)
    alone = frame.assign(year=3), marks.durations, marks.event_types  # a stack of one landmark is that landmark
    np.testing.assert_allclose(study.cox_risks(frame, marks.durations, marks.event_types, frame, study.HORIZONS, alone), 1 - survival.to_numpy()[steps].T, atol=1e-6)


def test_no_fold_has_seen_its_patients(study, prepared):
    "Whatever is done to the patients of a fold, in any landmark, their own risks come out as before if only their covariates stay."
    _, cohort, folds, _ = prepared
    before, fold = study.crossed_risks(cohort, folds, 7), folds[cohort.marks[7].rows]
    changed, generator = {}, np.random.default_rng(0)
    for year, marks in cohort.marks.items():
        mine, types = folds[marks.rows] == 2, marks.event_types.copy()
        durations = np.where(mine, generator.permutation(marks.durations), marks.durations)
        types[mine] = generator.permutation(types[mine])
        changed[year] = replace(marks, durations=durations, event_types=types, events=types == 1)
    after = study.crossed_risks(replace(cohort, marks=changed), folds, 7)
    for name in study.MODELS:
        np.testing.assert_array_equal(before[name][fold == 2], after[name][fold == 2])
        assert (before[name][fold != 2] != after[name][fold != 2]).any()  # those who learned from them have other risks


def test_scores_against_scikit_survival(study, everything):
    cohorts, folds, results = everything
    cohort = cohorts["transplant censors"]
    for year, frame in results["transplant censors"].items():
        marks, at = cohort.marks[year], frame.set_index(["model", "metric", "horizon"]).value
        t = np.where(marks.durations == marks.durations.max(), marks.durations + 1, marks.durations)  # it refuses a horizon at the end of follow-up
        y = Surv.from_arrays(marks.events, t)
        for model, r in study.crossed_risks(cohort, folds, year, study.MODELS[:-1]).items():
            for k, h in enumerate(study.HORIZONS):
                expected = {"harrell_c": concordance_index_censored(marks.events & (t < h), np.minimum(t, h), r[:, k], tied_tol=0)[0], "uno_c": concordance_index_ipcw(y, y, r[:, k], h, tied_tol=0)[0],
                            "auc": cumulative_dynamic_auc(y, y, r[:, k], [h], tied_tol=0)[0][0], "brier": sksurv_brier(y, y, 1 - r[:, k], [h])[1][0]}
                for metric, value in expected.items(): assert at[model, metric, h] == pytest.approx(value, abs=1e-9), (year, model, metric, h)


def test_censoring_is_learned_from_the_other_folds(study, everything):
    cohorts, folds, _ = everything
    cohort, h = cohorts["transplant censors"], study.HORIZONS[-1]
    for year in study.LANDMARK_YEARS:
        marks, fold = cohort.marks[year], folds[cohort.marks[year].rows]
        t = np.where(marks.durations == marks.durations.max(), marks.durations + 1, marks.durations)
        r = study.crossed_risks(cohort, folds, year, ("last values",))["last values"][:, -1]
        of_folds = [sksurv_brier(Surv.from_arrays(marks.events[fold != k], t[fold != k]), Surv.from_arrays(marks.events[fold == k], t[fold == k]), 1 - r[fold == k][:, None], [h])[1][0] for k in range(5)]
        assert np.average(of_folds, weights=np.bincount(fold)) == pytest.approx(study.pooling(cohort, folds, year)["Brier, own weights"], abs=1e-9)


def test_matrices_of_pairs_are_those_of_the_library(study, prepared):
    _, cohort, folds, _ = prepared
    marks, h = cohort.marks[3], study.HORIZONS[1]
    r, everybody = study.crossed_risks(cohort, folds, 3, ("last values",))["last values"][:, 1], (marks.durations, marks.event_types > 0)
    pairs = study.pair_weights(marks, event_weights(*everybody, *everybody, h), censoring_weights(*everybody, h, *everybody)[:, 0], h)
    data = marks.durations, marks.event_types
    expected = cause_specific_concordance(*data, r, h), cause_specific_uno(*data, r, *data, h), cause_specific_auc(*data, r, h, *data)[0]
    np.testing.assert_allclose([study.share(p, r) for p in pairs], expected, atol=1e-12)
    with pytest.raises(ValueError, match="none can be compared"): study.share(np.zeros((2, 2)), np.zeros(2))


def test_ranks_within_folds_do_not_depend_on_levels(study, prepared):
    "Risks of a fold that are all raised alike change the pooled C and leave the one within folds."
    _, cohort, folds, results = prepared
    marks, fold = cohort.marks[7], folds[cohort.marks[7].rows]
    r = study.crossed_risks(cohort, folds, 7, ("values at entry",))["values at entry"]
    within = [study.within_folds(marks, fold, {"values at entry": x}, 0).value for x in (r, r / 5 * (1 + fold[:, None]))]
    np.testing.assert_allclose(*within, atol=1e-12)
    at = results[7].set_index(["model", "metric", "horizon"]).value
    h = study.HORIZONS[-1]
    assert within[0].iloc[-1] == pytest.approx(at["values at entry", study.WITHIN[-1], h], abs=1e-12)
    checks = study.pooling(cohort, folds, 7)
    assert checks["AUC null"] < 0.4 and checks["AUC null within"] == 0.5  # the bias of pooling, and its absence
    assert checks["AUC within"] == pytest.approx(at["last values", study.WITHIN[-1], h], abs=1e-12) and checks["AUC"] == pytest.approx(at["last values", "auc", h], abs=1e-12)
    assert checks["Brier"] == pytest.approx(at["last values", "brier", h], abs=1e-12)


def test_a_competing_transplant_lowers_the_risk_of_death(study, everything):
    cohorts, folds, _ = everything
    for year in study.LANDMARK_YEARS:
        net, real = (study.crossed_risks(c, folds, year, ("last values", "no covariates")) for c in cohorts.values())
        for name in net:  # the hazards of death are the same; transplants leave fewer to die
            assert (real[name] <= net[name] + 1e-12).all() and real[name].mean() < net[name].mean()


def numbers(line):
    return [float(x) for x in re.findall(r"[-+]?\d+(?:\.\d+)?", line)]


def test_the_page_is_what_comes_out(study, everything):
    cohorts, folds, results = everything
    page = PAGE.read_text(encoding="utf-8").splitlines()
    tables = [study.bar_table(cohorts, results), study.flow_table(cohorts["transplant competes"]), study.gain_table(results), study.incidence_table(cohorts, folds)]
    tables += [study.score_table(frames, headings) for frames in results.values() for headings in (study.RANKING_HEADINGS, study.OTHER_HEADINGS)]
    tables.append(study.pooling_table({name: {year: study.pooling(c, folds, year) for year in study.LANDMARK_YEARS} for name, c in cohorts.items()}))
    for table in tables:
        header, _, *rows = table.splitlines()
        starts = [i for i, line in enumerate(page) if line == header]
        there = ["\n".join(page[i + 2:i + 2 + len(rows)]).splitlines() for i in starts]
        def agrees(line, row):
            ours, theirs = numbers(row), numbers(line)
            return re.sub(r"[\d.+\- ()|to]", "", row) == re.sub(r"[\d.+\- ()|to]", "", line) and len(ours) == len(theirs) and np.allclose(ours, theirs, atol=0.0021)
        assert any(len(lines) == len(rows) and all(map(agrees, lines, rows)) for lines in there), f"the page has another table under {header}: {rows[0]}"
    text = "\n".join(page)
    assert "nan" not in text.lower().split() and "Nothing else is undefined." in text and (PAGE.with_suffix(".png")).exists()


def test_what_the_page_says_in_words(study, everything):
    _, _, results = everything
    at = {name: {year: f.set_index(["model", "metric", "horizon"]) for year, f in frames.items()} for name, frames in results.items()}
    auc, h = study.WITHIN[-1], study.HORIZONS[-1]
    for frames in at.values():
        for f in frames.values():  # the stacked model is ahead in every row
            for metric, sign in ((study.WITHIN[1], 1), (auc, 1), ("brier", -1), ("scaled_brier", 1)): assert sign * (f.loc[("last values, stacked", metric, h), "value"] - f.loc[("last values", metric, h), "value"]) > 0
        assert frames[5].loc[("last values", auc, h), "difference_low"] > 0 > frames[5].loc[("last values", "brier", h), "difference_high"]
        for year in (3, 7): assert frames[year].loc[("last values", auc, h), "difference_low"] < 0 < frames[year].loc[("last values", auc, h), "difference_high"]
        ipa = frames[7].xs("scaled_brier", level="metric")
        assert (ipa.low < 0).all() and frames[7].loc[("last values", "calibration_slope", h), "high"] < 1
        for year in (3, 5): assert frames[year].loc[("last values", "scaled_brier", h), "low"] > 0
    for year in study.LANDMARK_YEARS: assert at["transplant competes"][year].loc[("last values", auc, h), "value"] < at["transplant censors"][year].loc[("last values", auc, h), "value"]


def test_fitting_few_events(study):
    "With fewer than five events there are no coefficients, and with equal risks every pair is a tie."
    frame = pd.DataFrame({"x": [0.0, 1.0, 2.0, 3.0]})
    risks = study.cox_risks(frame, np.array([1.0, 2.0, 3.0, 4.0]), np.array([1, 0, 1, 0]), frame, [1, 3])
    np.testing.assert_allclose(risks, np.tile(1 - np.exp([-0.25, -0.75]), (4, 1)), atol=1e-12)


def test_folds_are_those_of_the_library(everything):
    cohorts, folds, _ = everything
    assert (fold_patients(cohorts["transplant censors"].labels, 5, seed=0) == folds).all()
    assert len(at_elapsed(cohorts["transplant censors"].labels, cohorts["transplant censors"].store, round(5 * YEAR))) == 202


# networks on the same question: benchmarks/pbc2_networks.py

@pytest.fixture(scope="module")
def networks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try: return importlib.import_module("pbc2_networks")
    finally: sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def cohort(networks, path):
    return networks.prepare(path, networks.OUTCOMES["transplant censors"])


@pytest.fixture(scope="module")
def fold(networks, cohort):
    return networks.prepare_fold(cohort, fold_patients(cohort.labels, 5, seed=0), 2)


def test_a_fold_is_that_of_the_cox_models(networks, study, cohort, fold):
    folds = fold_patients(cohort.labels, study.N_FOLDS, seed=0)
    assert (fold.test == np.flatnonzero(folds == 2)).all() and (fold.training == np.flatnonzero(folds != 2)).all() and fold.store.n_visits.sum() == 1945
    for year, marks in cohort.marks.items():
        mine = fold.marks[year]
        for name in ("subject_ids", "days", "durations", "event_types"): assert (getattr(mine, name) == getattr(marks, name)).all()
    for year, marks in fold.known.items():
        assert (marks.days == fold.marks[year].days).all() and (marks.store.n_visits[marks.rows] == marks.visits + 1).all()  # nothing comes after the landmark
    parts = [networks.hold_out(fold, seed) for seed in networks.SEEDS]
    for train, validation in parts:
        assert (np.sort(np.concatenate([train, validation])) == fold.training).all() and abs(len(validation) / len(fold.training) - 0.2) < 0.01
        assert abs(fold.labels.event_indicators[validation].mean() - fold.labels.event_indicators[train].mean()) < 0.02
    assert len({tuple(v) for _, v in parts}) == 3


def test_the_vocabulary_has_not_seen_the_fold(networks, cohort, fold):
    "Other values and other codes of the fold's patients leave tokens and edges as they are; those of others do not."
    before = fold.store.vocabulary
    def changed(rows):
        theirs = pl.col("subject_id").is_in(cohort.store.subject_ids[rows].tolist()) & pl.col("numeric_value").is_not_null()
        events = cohort.table.events.with_columns(numeric_value=pl.when(theirs).then(pl.col("numeric_value") * 3 + 1).otherwise("numeric_value"))
        folds = fold_patients(cohort.labels, 5, seed=0)
        return networks.prepare_fold(replace(cohort, table=replace(cohort.table, events=events)), folds, 2).store.vocabulary
    same, other = changed(fold.test), changed(fold.training[:40])
    assert (same.tokens, same.value_edges) == (before.tokens, before.value_edges) and other.value_edges != before.value_edges
    assert {"SIGN//ascites//0.0", "SIGN//ascites//1.0", "SIGN//edema//0.5", "SIGN//edema//1.0", "LAB//serBilir//Q1", "LAB//serBilir//Q10"} <= set(before.tokens)
    assert not any(t.startswith(("MEDS", "TRANSPLANT", "OBSERVATION")) for t in before.tokens)


@pytest.mark.parametrize("name", ["LSTM", "BEHRT, from scratch"])
def test_a_network_on_one_fold(networks, fold, tmp_path, name):
    model, facts = networks.fit_network(name, fold, 0, tmp_path, epochs=1)  # checks that it does not see the future
    risks = networks.ask(model, fold)  # and once more with the records cut at the landmark
    for year, r in risks.items():
        assert r.shape == (np.isin(fold.marks[year].rows, fold.test).sum(), 2) and ((r > 0) & (r < 1)).all() and (r[:, 0] < r[:, 1]).all()
    assert facts["trainable"] == facts["parameters"] == sum(p.numel() for p in model.parameters())
    class Peeks:
        def predict_risk(self, marks, horizons): return np.tile(1 / marks.store.n_visits[marks.rows, None], (1, len(horizons)))
    with pytest.raises(AssertionError, match="what came after"): networks.ask(Peeks(), fold)


def test_last_tokens(networks, fold):
    marks = networks.stacked(fold, fold.training)
    assert len(marks) == sum(np.isin(m.rows, fold.training).sum() for m in fold.marks.values()) and not np.isin(marks.rows, fold.test).any()
    features = networks.LastTokens().fit(marks)
    x, n = features.transform(marks).toarray(), len(fold.store.vocabulary)
    assert x.shape[1] == len(features.names)
    for i in range(0, len(marks), 97):
        at = fold.store.first_visit[marks.rows[i]] + marks.visits[i]
        assert set(np.flatnonzero(x[i, -n:])) == set(fold.store.tokens[fold.store.token_offsets[at]:fold.store.token_offsets[at + 1]]) and set(x[i, -n:]) <= {0, 1}


def test_bins_so_fine_that_nothing_is_lost(networks, cohort, fold):
    "With an edge at every value, the Cox model on bins is the one on values; with ten bins it is near."
    folds = fold_patients(cohort.labels, 5, seed=0)
    values = cohort.table.events.filter(pl.col("code").is_in(list(networks.BINNED_LABS.values()))).group_by("code").agg(pl.col("numeric_value").drop_nulls().unique().sort())
    exact, coarse = networks.crossed_risks(cohort, folds, 5, ("last values, stacked",))["last values, stacked"], networks.binned_risks(cohort, folds, [fold])[5]
    mine = folds[cohort.marks[5].rows] == 2
    assert np.isnan(coarse[~mine]).all() and 0.9 < np.corrcoef(coarse[mine, 1], exact[mine, 1])[0, 1] < 1
    store = SimpleNamespace(subject_ids=fold.store.subject_ids, vocabulary=SimpleNamespace(value_edges=dict(values.iter_rows())))
    fine = networks.binned_risks(cohort, folds, [replace(fold, training=np.arange(312), store=store)])[5]  # means from everybody, since a bin without a value has none
    np.testing.assert_allclose(fine[mine], exact[mine], atol=1e-9)


def test_both_pages_have_the_same_cox_models():
    "Same patients, folds and scores: the rows of the Cox models agree, digit for digit."
    def rows(page): return [[c.strip() for c in line.strip("|").split("|")] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cox = {(r[1], r[4]): r[5:9] for r in rows(PAGE) if len(r) == 9 and r[0] == "transplant censors"}
    page = PAGE.with_name("pbc2_networks.md")
    found, year = 0, None
    for line in page.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"### Year (\d)", line): year = match[1]
        cells = [c.strip() for c in line.strip("|").split("|")]
        if year and len(cells) == 6 and (year, cells[0]) in cox: found += cells[1:5] == cox[year, cells[0]]
    assert found == 6 and page.with_suffix(".png").exists()
