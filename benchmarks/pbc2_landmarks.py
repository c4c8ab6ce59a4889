"""PBC2: landmark Cox models on the last observed biomarkers, 3, 5 and 7 years after entry, five folds by patient.

    python benchmarks/pbc2_landmarks.py --data ../shared/data/pbc2/pbc2.csv.gz

The Mayo Clinic cohort of primary biliary cirrhosis, entered 1974 to 1984 (Murtaugh et al. 1994, doi:10.1002/hep.1840200120): 312 patients, 1,945 visits, 140 deaths, 29
transplants. The event is death; a transplant is censoring in one analysis and a competing event in the other. The covariates are those of the Mayo model, chosen before
anything was fitted: age, edema, and the logarithms of bilirubin, albumin and prothrombin time, each as last observed by the landmark.
"""
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
from fastcore.script import call_parse
from lifelines import CoxPHFitter, NelsonAalenFitter

from ehr_sequencing.events import EventTable
from ehr_sequencing.landmarks import Landmarks, at_elapsed, last_values
from ehr_sequencing.outcomes import Outcome, VisitLabels, label_visits
from ehr_sequencing.readers import read_table
from ehr_sequencing.sequences import SequenceStore, build_store
from ehr_sequencing.splits import fold_patients
from ehr_sequencing.vocabulary import fit_vocabulary

YEAR = 365.25
ENTRY = datetime(1976, 1, 1)  # the data give years since entry and no dates; any day does
LABS = ("serBilir", "serChol", "albumin", "alkaline", "SGOT", "platelets", "prothrombin", "histologic")
EDEMA = {"No edema": 0.0, "edema no diuretics": 0.5, "edema despite diuretics": 1.0}  # as the Mayo model counts it
LANDMARK_YEARS, HORIZON_YEARS = (3, 5, 7), (1, 2, 3)
OUTCOMES = {"transplant censors": Outcome("death", censored_by="TRANSPLANT"), "transplant competes": Outcome("death", competing="TRANSPLANT")}
COVARIATES = ("age", "edema", "log bilirubin", "log albumin", "log prothrombin")


def pbc2_events(
    path, # pbc2.csv.gz
) -> EventTable: # events of the 312 patients
    "A row an event: biomarkers and signs at visits, birth, sex and drug as facts, death, transplant, and the end of observation of everyone."
    wide = pl.read_csv(path, null_values="NA").with_columns(time=pl.lit(ENTRY) + pl.duration(days=(pl.col("year") * YEAR).round()))
    once = wide.group_by("id", maintain_order=True).first().with_columns(end=pl.lit(ENTRY) + pl.duration(days=(pl.col("years") * YEAR).round()))
    def rows(frame, time, code, value=None):
        value = pl.lit(None, pl.Float64) if value is None else value.cast(pl.Float64)
        return frame.select(subject_id="id", time=pl.lit(None, pl.Datetime("us")) if time is None else pl.col(time).cast(pl.Datetime("us")), code=code, numeric_value=value)
    pieces = [rows(wide, "time", pl.lit(f"LAB//{lab}"), pl.col(lab)).drop_nulls("numeric_value") for lab in LABS]
    pieces.append(rows(wide, "time", pl.lit("SIGN//edema"), pl.col("edema").replace_strict(EDEMA, return_dtype=pl.Float64)))
    pieces += [rows(wide.filter(pl.col(sign).is_not_null()), "time", pl.lit(f"SIGN//{sign}"), (pl.col(sign) == "Yes")) for sign in ("ascites", "hepatomegaly", "spiders")]
    birth = once.with_columns(birth=pl.lit(ENTRY) - pl.duration(days=(pl.col("age") * YEAR).round()))
    pieces += [rows(birth, "birth", pl.lit("MEDS_BIRTH")), rows(once, None, pl.lit("GENDER//") + pl.col("sex")), rows(once, None, pl.lit("DRUG//") + pl.col("drug"))]
    pieces += [rows(once.filter(pl.col("status") == status), "end", pl.lit(code)) for status, code in (("dead", "MEDS_DEATH"), ("transplanted", "TRANSPLANT"))]
    pieces.append(rows(once, "end", pl.lit("OBSERVATION_END")))  # of the dead too, or they would be unobserved between the last visit and death
    return read_table(pl.concat(pieces))


def covariates(
    table: EventTable, # of `pbc2_events`
    store: SequenceStore, # of its patients
    marks: Landmarks, # moments of prediction
) -> tuple: # frame (n, 5) with `COVARIATES` in its columns; frame (n, 4) of the ages of the measurements in days
    "The covariates of the Mayo model, as last observed at each landmark."
    days = marks.days(store)
    values, ages = last_values(table, store.subject_ids[marks.rows], days, ("SIGN//edema", "LAB//serBilir", "LAB//albumin", "LAB//prothrombin"))
    births = store.births[marks.rows].astype("datetime64[D]")
    frame = pd.DataFrame({"age": (days - births).astype(float) / YEAR, "edema": values["SIGN//edema"], "log bilirubin": np.log(values["LAB//serBilir"]),
                          "log albumin": np.log(values["LAB//albumin"]), "log prothrombin": np.log(values["LAB//prothrombin"])})
    return frame, ages


def _increments(train, durations, happened, test, steps, penalizer):
    "Cause-specific hazard of each test patient at each step, (steps, m), the other cause counting as censoring; without covariates where fewer than five events were seen."
    if happened.sum() >= 5:
        model = CoxPHFitter(penalizer=penalizer).fit(train.assign(duration=durations, event=happened), "duration", "event")
        cumulative = model.predict_cumulative_hazard(test, times=steps).to_numpy()  # the steps are days on record, so nothing is interpolated
    else: cumulative = NelsonAalenFitter().fit(durations, happened).cumulative_hazard_at_times(steps).to_numpy()[:, None].repeat(len(test), 1)
    return np.diff(cumulative, axis=0, prepend=0)


def cox_risks(
    train: pd.DataFrame, # (n, 5) covariates
    durations, # (n,) days from the landmark
    event_types, # (n,) 0 censored, 1 death, 2 transplant
    test: pd.DataFrame, # (m, 5)
    horizons, # (H,) days
) -> np.ndarray: # (m, H) probability of death within each horizon
    """Risk of death, from a Cox model of each cause that occurs; the one for transplants, of which there are a dozen, has a ridge penalty.

    With hazard increments a_1(u), a_2(u) at the days u on which something happens, S is the product of exp(-a_1 - a_2), and F(tau) is the sum over u <= tau of
    S(u-) (1 - exp(-a_1 - a_2)) a_1 / (a_1 + a_2). With one cause that is 1 - S(tau)."""
    steps = np.unique(durations[event_types > 0])
    increments = {k: _increments(train, durations, event_types == k, test, steps, penalizer) for k, penalizer in ((1, 0.0), (2, 0.1)) if (event_types == k).any()}
    total = sum(increments.values())
    before = np.exp(-(np.cumsum(total, 0) - total))  # (steps, m): alive and not transplanted before each step
    happens = before * -np.expm1(-total) * np.divide(increments[1], total, out=np.zeros_like(total), where=total > 0)
    reached = np.searchsorted(steps, np.asarray(horizons), side="right")
    return np.concatenate([np.zeros((1, len(test))), np.cumsum(happens, 0)])[reached].T  # (m, H)


def crossed_risks(
    table: EventTable, # of `pbc2_events`
    store: SequenceStore, # of its patients
    labels: VisitLabels, # of the store, with follow-up up to the last horizon
    folds: np.ndarray, # (N,) fold of each patient
    year: int, # of the landmark
) -> tuple: # Landmarks at the year; (n, H) risks, each from a model that has not seen the patient; (n,) fold
    "Risks at a landmark by cross-validation over patients."
    marks = at_elapsed(labels, store, round(year * YEAR), rows=np.flatnonzero(folds >= 0))
    frame, _ = covariates(table, store, marks)
    horizons, fold = np.array(HORIZON_YEARS) * YEAR, folds[marks.rows]
    risks = np.full((len(marks), len(horizons)), np.nan)
    for k in range(folds.max() + 1):
        train, test = fold != k, fold == k
        risks[test] = cox_risks(frame[train], marks.durations[train], marks.event_types[train], frame[test], horizons)
    return marks, risks, fold


def prepare(
    path, # pbc2.csv.gz
    outcome: Outcome, # one of `OUTCOMES`
) -> tuple: # events, store, labels
    "Read the cohort and label its visits; follow-up counts up to the last horizon."
    table = pbc2_events(path)
    store = build_store(table, fit_vocabulary(table.events))
    return table, store, label_visits(store, table, outcome, np.array(HORIZON_YEARS) * YEAR)


@call_parse
def main(
    data: str = "../shared/data/pbc2/pbc2.csv.gz", # file of the cohort
    seed: int = 0, # of the folds
):
    "Fit and count; the table of scores is added with the metrics."
    if not Path(data).exists(): raise SystemExit(f"{data}: not there. Give the place of pbc2.csv.gz with --data.")
    for name, outcome in OUTCOMES.items():
        table, store, labels = prepare(data, outcome)
        folds = fold_patients(labels, 5, seed)
        print(f"{name}: {table.n_patients} patients, {int((folds >= 0).sum())} at risk after a visit, {int(labels.event_indicators.sum())} deaths")
        for year in LANDMARK_YEARS:
            marks, risks, _ = crossed_risks(table, store, labels, folds, year)
            counts = np.bincount(marks.event_types, minlength=3)
            print(f"  year {year}: {len(marks)} at risk; within {HORIZON_YEARS[-1]} years {counts[1]} deaths, {counts[2]} transplants; mean risk {risks[:, -1].mean():.3f}")
