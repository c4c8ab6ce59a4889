"PBC2 from the file to risks at landmarks; skips where the data are absent. The references are loops over the wide file and lifelines."
import importlib.util

import numpy as np
import polars as pl
import pytest
from conftest import ROOT, data_folder
from lifelines import AalenJohansenFitter, CoxPHFitter

from ehr_sequencing.events import DEATH, visit_table
from ehr_sequencing.landmarks import at_elapsed
from ehr_sequencing.splits import fold_patients

YEAR = 365.25


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("pbc2_landmarks", ROOT / "benchmarks" / "pbc2_landmarks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def path():
    return data_folder("pbc2") / "pbc2.csv.gz"


@pytest.fixture(scope="module", params=["transplant censors", "transplant competes"])
def prepared(study, path, request):
    return request.param, *study.prepare(path, study.OUTCOMES[request.param])


def test_counts(study, path):
    table = study.pbc2_events(path)
    count = lambda code: table.events.filter(pl.col("code") == code)["subject_id"].n_unique()
    assert (table.n_patients, count(DEATH), count("TRANSPLANT")) == (312, 140, 29) and not table.set_aside
    measured = table.events.filter(pl.col("code").str.starts_with("LAB//") | pl.col("code").str.starts_with("SIGN//"))
    assert len(visit_table(measured)) == 1945
    wide = pl.read_csv(path, null_values="NA")
    assert table.events.filter(pl.col("code") == "LAB//serChol").height == 1945 - wide["serChol"].null_count()


def test_labels(prepared):
    name, _, store, labels = prepared
    assert len(store) == 312 and labels.event_indicators.sum() == 140 and (labels.n_at_risk > 0).all()
    flow = labels.flow["patients"]
    if name == "transplant competes": assert flow["  with a competing event first"] == 29
    assert flow["analysed"] == 312


@pytest.mark.parametrize("year", [3, 5, 7])
def test_landmarks_against_the_wide_file(study, path, prepared, year):
    name, table, store, labels = prepared
    wide = pl.read_csv(path, null_values="NA")
    marks = at_elapsed(labels, store, round(year * YEAR))
    start, limit = round(year * YEAR), 3 * YEAR
    expected = {}
    for row in wide.group_by("id").first().iter_rows(named=True):
        left = round(row["years"] * YEAR) - start
        if left > 0: expected[row["id"]] = (min(left, limit), {"dead": 1, "alive": 0, "transplanted": 2 * (name == "transplant competes")}[row["status"]] * (left <= limit))
    assert dict(zip(store.subject_ids[marks.rows].tolist(), zip(marks.durations.tolist(), marks.event_types.tolist()))) == expected
    frame, ages = study.covariates(table, store, marks)
    assert tuple(frame.columns) == study.COVARIATES and not frame.isna().any().any() and (ages.to_numpy() >= 0).all()
    for i in range(0, len(marks), 7):
        visits = wide.filter((pl.col("id") == int(store.subject_ids[marks.rows[i]])) & ((pl.col("year") * YEAR).round() <= start)).sort("year")
        last = visits.row(-1, named=True)
        assert frame["log bilirubin"][i] == pytest.approx(np.log(last["serBilir"]), abs=1e-6) and frame["log albumin"][i] == pytest.approx(np.log(last["albumin"]), abs=1e-6)
        assert frame["age"][i] == pytest.approx(last["age"] + year, abs=0.01) and ages["LAB//serBilir"][i] == start - round(last["year"] * YEAR)
        assert marks.visits[i] == len(visits) - 1 and marks.elapsed[i] == ages["LAB//serBilir"][i]


def test_risks(study, prepared):
    name, table, store, labels = prepared
    folds = fold_patients(labels, 5, seed=0)
    marks, risks, fold = study.crossed_risks(table, store, labels, folds, 5)
    assert risks.shape == (len(marks), 3) and np.isfinite(risks).all() and ((risks > 0) & (risks < 1)).all() and (np.diff(risks, axis=1) > 0).all()
    estimate = AalenJohansenFitter(calculate_variance=False, seed=0).fit(marks.durations, marks.event_types, event_of_interest=1).cumulative_density_
    for j, years in enumerate((1, 2, 3)): assert abs(risks[:, j].mean() - estimate[estimate.index <= years * YEAR].iloc[-1, 0]) < 0.03


def test_risk_of_one_cause_is_one_minus_survival(study, path):
    table, store, labels = study.prepare(path, study.OUTCOMES["transplant censors"])
    marks = at_elapsed(labels, store, round(3 * YEAR))
    frame, _ = study.covariates(table, store, marks)
    horizons = np.array([YEAR, 2 * YEAR, 3 * YEAR])
    model = CoxPHFitter().fit(frame.assign(duration=marks.durations, event=marks.events), "duration", "event")
    survival = model.predict_survival_function(frame)  # at the days on record; asked for others, lifelines interpolates where the curve is a step
    steps = survival.index.searchsorted(horizons, side="right") - 1
    np.testing.assert_allclose(study.cox_risks(frame, marks.durations, marks.event_types, frame, horizons), 1 - survival.to_numpy()[steps].T, atol=1e-10)
