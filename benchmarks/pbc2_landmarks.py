"""PBC2: landmark Cox models on the last observed biomarkers, 3, 5 and 7 years after entry, five folds by patient.

    python benchmarks/pbc2_landmarks.py --data ../shared/data/pbc2/pbc2.csv.gz

Writes benchmarks/results/pbc2_landmarks.md and the figure beside it. The Mayo Clinic cohort of primary biliary cirrhosis, entered 1974 to 1984 (Murtaugh et al. 1994,
doi:10.1002/hep.1840200120): 312 patients, 1,945 visits, 140 deaths, 29 transplants. The event is death; a transplant is censoring in one analysis and a competing event in the
other. The covariates are those of the Mayo model, chosen before anything was fitted: age, edema, and the logarithms of bilirubin, albumin and prothrombin time.
"""
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import polars as pl
from fastcore.script import call_parse
from lifelines import CoxPHFitter

from ehr_sequencing.bootstrap import bootstrap
from ehr_sequencing.calibration import integrated_calibration_index, plot_calibration
from ehr_sequencing.competing_risks import aalen_johansen
from ehr_sequencing.evaluation import evaluate_survival
from ehr_sequencing.events import EventTable
from ehr_sequencing.landmarks import Landmarks, at_elapsed, last_values
from ehr_sequencing.metrics import COLORS, MARKERS, STYLES, censoring_weights, event_weights
from ehr_sequencing.outcomes import Outcome, VisitLabels, label_visits
from ehr_sequencing.readers import read_table
from ehr_sequencing.sequences import SequenceStore, build_store
from ehr_sequencing.splits import fold_patients
from ehr_sequencing.vocabulary import fit_vocabulary

YEAR = 365.25
ENTRY = datetime(1976, 1, 1)  # the data give years since entry and no dates; any day does
LABS = ("serBilir", "serChol", "albumin", "alkaline", "SGOT", "platelets", "prothrombin", "histologic")
EDEMA = {"No edema": 0.0, "edema no diuretics": 0.5, "edema despite diuretics": 1.0}  # as the Mayo model counts it
LANDMARK_YEARS, HORIZON_YEARS = (3, 5, 7), (2, 3)
HORIZONS = np.array(HORIZON_YEARS) * YEAR
STACKED_YEARS = range(8)  # landmarks of the stacked model
N_FOLDS = 5
OUTCOMES = {"transplant censors": Outcome("death", censored_by="TRANSPLANT"), "transplant competes": Outcome("death", competing="TRANSPLANT")}
MODELS = ("last values", "last values, stacked", "bilirubin alone", "values at entry", "no covariates")
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


@dataclass
class Cohort:
    "The patients under one outcome, and at each landmark who is at risk and what was known of them."
    table: EventTable
    store: SequenceStore
    labels: VisitLabels
    marks: dict # year -> Landmarks
    last: dict # year -> (n, 5) covariates as last observed by then
    entry: dict # year -> (n, 5) covariates of the same patients as observed at entry
    ages: dict # year -> (n, 4) days since the last measurements
    competing: bool # transplant is a competing event


def covariates(
    table: EventTable, # of `pbc2_events`
    store: SequenceStore, # of its patients
    rows, # (n,) rows of the store
    days, # (n,) datetime64[D]: what happened by the end of this day is known
) -> tuple: # frame (n, 5) with `COVARIATES` in its columns; frame (n, 4) of the ages of the measurements in days
    "The covariates of the Mayo model, as last observed on these days."
    values, ages = last_values(table, store.subject_ids[rows], days, ("SIGN//edema", "LAB//serBilir", "LAB//albumin", "LAB//prothrombin"))
    births = store.births[rows].astype("datetime64[D]")
    frame = pd.DataFrame({"age": (days - births).astype(float) / YEAR, "edema": values["SIGN//edema"], "log bilirubin": np.log(values["LAB//serBilir"]),
                          "log albumin": np.log(values["LAB//albumin"]), "log prothrombin": np.log(values["LAB//prothrombin"])})
    return frame, ages


def prepare(
    path, # pbc2.csv.gz
    outcome: Outcome, # one of `OUTCOMES`
) -> Cohort:
    "Read the cohort, label its visits, and find who is at risk at each landmark; follow-up counts up to the last horizon."
    table = pbc2_events(path)
    store = build_store(table, fit_vocabulary(table.events))
    labels = label_visits(store, table, outcome, HORIZONS)
    marks = {year: at_elapsed(labels, store, round(year * YEAR)) for year in STACKED_YEARS}
    known = {year: covariates(table, store, m.rows, m.days) for year, m in marks.items()}
    entry = {year: covariates(table, store, m.rows, labels.ends.first_days[m.rows])[0] for year, m in marks.items()}
    return Cohort(table, store, labels, marks, {y: k[0] for y, k in known.items()}, entry, {y: k[1] for y, k in known.items()}, outcome.competing is not None)


def _coefficients(frame, durations, happened, penalizer, strata=None):
    "Coefficients of a Cox model; zeros where fewer than five events were seen."
    if happened.sum() < 5: return np.zeros(frame.shape[1] - (strata is not None))
    return CoxPHFitter(penalizer=penalizer).fit(frame.assign(duration=durations, event=happened), "duration", "event", strata=strata).params_.to_numpy()


def _increments(train, durations, happened, test, steps, beta):
    "Cause-specific hazard of each test patient at each step, (steps, m), the other cause counting as censoring; Breslow's baseline."
    centre = train.mean()
    relative, of_test = (np.exp((frame - centre).to_numpy() @ beta) for frame in (train, test))
    at_risk = ((durations >= steps[:, None]) * relative).sum(1)
    return (((durations == steps[:, None]) & happened).sum(1) / at_risk)[:, None] * of_test


def cox_risks(
    train: pd.DataFrame, # (n, p) covariates
    durations, # (n,) days from the landmark
    event_types, # (n,) 0 censored, 1 death, 2 transplant
    test: pd.DataFrame, # (m, p)
    horizons, # (H,) days
    stack: tuple = None, # frame with the covariates and the column year, durations, event types: from which the coefficients are learned instead, stratified by year
) -> np.ndarray: # (m, H) probability of death within each horizon
    """Risk of death, from a Cox model of each cause that occurs; the one for transplants, of which there are a dozen, has a ridge penalty.

    With hazard increments a_1(u), a_2(u) at the days u on which something happens, S is the product of exp(-a_1 - a_2), and F(tau) is the sum over u <= tau of
    S(u-) (1 - exp(-a_1 - a_2)) a_1 / (a_1 + a_2). With one cause that is 1 - S(tau)."""
    steps, increments = np.unique(durations[event_types > 0]), {}
    for cause, penalizer in ((1, 0.0), (2, 0.1)):
        if not (event_types == cause).any(): continue
        frame, t, k, strata = (train, durations, event_types, None) if stack is None else (*stack, ["year"])
        increments[cause] = _increments(train, durations, event_types == cause, test, steps, _coefficients(frame, t, k == cause, penalizer, strata))
    total = sum(increments.values())
    before = np.exp(-(np.cumsum(total, 0) - total))  # (steps, m): alive and not transplanted before each step
    happens = before * -np.expm1(-total) * np.divide(increments[1], total, out=np.zeros_like(total), where=total > 0)
    reached = np.searchsorted(steps, np.asarray(horizons), side="right")
    return np.minimum(np.concatenate([np.zeros((1, len(test))), np.cumsum(happens, 0)])[reached].T, 1.0)  # (m, H); the sum can exceed 1 by rounding


def stack_years(
    cohort: Cohort, # of `prepare`
    folds: np.ndarray, # (N,) fold of each patient
    k: int, # the fold left out
) -> tuple: # frame with the covariates and the column year, durations, event types; for `cox_risks`
    "The landmarks of all years of patients outside fold k, one below the other."
    parts = []
    for year, marks in cohort.marks.items():
        train = folds[marks.rows] != k
        parts.append((cohort.last[year][train].assign(year=year), marks.durations[train], marks.event_types[train]))
    frames, durations, types = zip(*parts)
    return pd.concat(frames, ignore_index=True), np.concatenate(durations), np.concatenate(types)


def crossed_risks(
    cohort: Cohort, # of `prepare`
    folds: np.ndarray, # (N,) fold of each patient
    year: int, # of the landmark
    models=MODELS, # some of them
) -> dict: # model -> (n, H) risks of death, each from a model that has not seen the patient
    "Risks at a landmark by cross-validation over patients."
    marks, last = cohort.marks[year], cohort.last[year]
    fold, risks = folds[marks.rows], {name: np.full((len(marks), len(HORIZONS)), np.nan) for name in models}
    frames = {"last values": last, "last values, stacked": last, "bilirubin alone": last[["log bilirubin"]], "values at entry": cohort.entry[year]}
    for k in range(folds.max() + 1):
        train, test = fold != k, fold == k
        t, types = marks.durations[train], marks.event_types[train]
        for name in models:
            if name == "no covariates": risks[name][test] = aalen_johansen(t, types, at=HORIZONS).risk.to_numpy()  # Kaplan-Meier's where nothing competes
            else: risks[name][test] = cox_risks(frames[name][train], t, types, frames[name][test], HORIZONS, stack_years(cohort, folds, k) if "stacked" in name else None)
    return risks


POOLED, WITHIN = ("harrell_c", "uno_c", "auc"), ("harrell_c within folds", "uno_c within folds", "auc within folds")
ACCURACY, CALIBRATION = ("brier", "scaled_brier"), ("calibration_slope", "calibration_intercept", "observed_expected", "ici")
SPREAD = POOLED + ("calibration_slope", "ici")  # not defined for a risk that is the same for all


def own_weights(
    marks: Landmarks, # at risk
    fold: np.ndarray, # (n,)
    horizon: float, # days
) -> tuple: # (n,) as `event_weights`; (n,) as `censoring_weights`
    "Inverse probability of censoring, learned for each patient from the other folds."
    at_event, at_horizon = np.zeros(len(marks)), np.zeros(len(marks))
    for k in np.unique(fold):
        train, test = fold != k, fold == k
        data = (marks.durations[test], marks.event_types[test] > 0), (marks.durations[train], marks.event_types[train] > 0)
        at_event[test], at_horizon[test] = event_weights(*data[0], *data[1], horizon), censoring_weights(*data[0], horizon, *data[1])[:, 0]
    return at_event, at_horizon


def pair_weights(
    marks: Landmarks, # at risk
    at_event, # (n,) as `event_weights`
    at_horizon, # (n,) as `censoring_weights`
    horizon: float, # days
) -> tuple: # three (n, n): weights of pairs in Harrell's C, Uno's C and the AUC; the first patient of a pair has the event
    "Plain matrices of pairs in place of the library's sums, so that the pairs of one fold can be looked at alone."
    t, types = marks.durations, marks.event_types
    later = (t[:, None] < t) | ((t[:, None] == t) & (types == 0))
    competing = (types == 2) & (t <= t[:, None])  # never has the event, however early the patient left
    death, case = (types == 1) & (t < horizon), (types == 1) & (t <= horizon)
    uno = (at_event * death)[:, None] * (at_event[:, None] * later + at_event * competing)
    return death[:, None] * (later | competing), uno, np.outer(at_horizon * case, at_horizon * ~case)


def share(
    pairs: np.ndarray, # (n, n) weights
    risks: np.ndarray, # (n,)
) -> float: # of the pairs whose first patient has the higher risk, ties half
    "Concordance of weighted pairs. Raises `ValueError` where there are none."
    if not pairs.any(): raise ValueError("pairs: none can be compared")
    return float((pairs * ((risks[:, None] > risks) + 0.5 * (risks[:, None] == risks))).sum() / pairs.sum())


def within_folds(
    marks: Landmarks, # at risk
    fold: np.ndarray, # (n,)
    risks: dict, # model -> (n, H)
    n_resamples: int = 1000, # bootstrap draws of patients, who stay in their folds; 0 for none
    reference: str = "values at entry", # model from which the others are subtracted
) -> pd.DataFrame: # as `evaluate_survival`
    "C and AUC of pairs of the same fold, so that no two patients are compared whose risks come from different models."
    same, names, matrices = fold[:, None] == fold, [], []
    for k, h in enumerate(HORIZONS):
        for metric, pairs in zip(WITHIN, pair_weights(marks, *own_weights(marks, fold, h), h)):
            for model, r in risks.items():
                names.append((model, metric, h))
                matrices.append((pairs * same, pairs * same * ((r[:, k][:, None] > r[:, k]) + 0.5 * (r[:, k][:, None] == r[:, k]))))
    def metric(weights):
        sums = [[((weights @ matrix) * weights).sum(1) for matrix in pair] for pair in matrices]
        return {str(i): np.divide(right, every, out=np.full(len(weights), np.nan), where=every > 0) for i, (every, right) in enumerate(sums)}
    boot, rows = bootstrap(metric, len(marks), n_resamples=max(n_resamples, 1), weighted=True), []
    for i, (model, name, h) in enumerate(names):
        row = {"model": model, "metric": name, "horizon": h, "value": boot.estimates[str(i)]}
        if n_resamples:
            row |= dict(zip(("low", "high"), boot.interval(str(i))), left_out=boot.left_out(str(i)))
            if model != reference:
                minus = boot.difference(str(i), str(names.index((reference, name, h))))
                (d, value), = minus.estimates.items()
                row |= {"difference": value, **dict(zip(("difference_low", "difference_high"), minus.interval(d))), "p_value": minus.p_value(d)}
        rows.append(row)
    return pd.DataFrame(rows)


def score(
    cohort: Cohort, # of `prepare`
    folds: np.ndarray, # (N,) fold of each patient
    year: int, # of the landmark
    n_resamples: int = 1000, # bootstrap draws of patients; 0 for no intervals
    risks: dict = None, # model -> (n, H) out-of-fold risks at the landmark; those of `crossed_risks` if None
    reference: str = "values at entry", # model from which the others are subtracted
) -> pd.DataFrame: # as `evaluate_survival`, with each model's difference from the reference, and with `WITHIN`
    "Evaluate the risks of all folds together. Censoring, and the risk that is the same for all, are learned from everybody at risk at the landmark."
    marks, risks = cohort.marks[year], crossed_risks(cohort, folds, year) if risks is None else risks
    types, spread = marks.event_types if cohort.competing else None, {name: r for name, r in risks.items() if name != "no covariates"}
    frame = evaluate_survival(marks.durations, marks.events, risks, HORIZONS, marks.durations, marks.events, types, types, metrics=POOLED + ACCURACY + CALIBRATION,
                              reference=reference if n_resamples else None, n_resamples=n_resamples, undefined="omit")
    undefined = [row for row in frame.attrs["omitted"] if not (row["model"] == "no covariates" and row["metric"] in SPREAD)]
    frame = frame[~((frame.model == "no covariates") & frame.metric.isin(SPREAD))]
    frame = pd.concat([frame.astype({"horizon": float, "low": float, "high": float}), within_folds(marks, folds[marks.rows], spread, n_resamples, reference)], ignore_index=True)
    frame.attrs = {"undefined": undefined}
    return frame


def pooling(
    cohort: Cohort, # of `prepare`
    folds: np.ndarray, # (N,) fold of each patient
    year: int, # of the landmark
) -> dict: # what -> number, or text where undefined
    "Does it matter that risks of different folds are compared, and where censoring is learned? At the last horizon, last values."
    marks, h = cohort.marks[year], HORIZONS[-1]
    fold, risks = folds[marks.rows], crossed_risks(cohort, folds, year, ("last values", "no covariates"))
    r, null = risks["last values"][:, -1], risks["no covariates"][:, -1]
    everybody = (marks.durations, marks.event_types > 0) * 2
    at_horizon, own = censoring_weights(*everybody[:2], h, *everybody[2:])[:, 0], own_weights(marks, fold, h)
    (c, _, auc), (_, _, own_auc) = pair_weights(marks, event_weights(*everybody, h), at_horizon, h), pair_weights(marks, *own, h)
    same, case = fold[:, None] == fold, (marks.event_types == 1) & (marks.durations <= h)
    def of_folds(pairs):
        each = [(pairs[fold == k][:, fold == k], r[fold == k]) for k in range(N_FOLDS)]
        undefined = sum(not p.any() for p, _ in each)
        return f"undefined: {undefined} folds without a pair" if undefined else float(np.mean([share(*e) for e in each]))
    return {"C": share(c, r), "C within": share(c * same, r), "C of folds": of_folds(c), "AUC": share(auc, r), "AUC, own weights": share(own_auc, r), "AUC within": share(own_auc * same, r), "AUC of folds": of_folds(own_auc),
            "Brier": float(np.mean(at_horizon * (case - r) ** 2)), "Brier, own weights": float(np.mean(own[1] * (case - r) ** 2)),
            "AUC null": share(auc, null), "AUC null within": share(own_auc * same, null)}


def other_folds(
    cohort: Cohort, # of `prepare`
    year: int, # of the landmark
    seeds=range(10), # of the folds
) -> pd.DataFrame: # (seed, model) -> metrics at the last horizon
    "The same with the patients dealt out otherwise."
    frames = []
    for seed in seeds:
        frame = score(cohort, fold_patients(cohort.labels, N_FOLDS, seed), year, n_resamples=0)
        frames.append(frame[(frame.horizon == HORIZONS[-1]) & frame.model.isin(MODELS)].assign(seed=seed))
    return pd.concat(frames).pivot(index=["seed", "model"], columns="metric", values="value")


def calibrated_ici(
    marks: Landmarks, # at risk, without competing events
    risks: np.ndarray, # (n, H)
    k: int, # of the horizon
    n_samples: int = 300, # simulated sets of outcomes
) -> tuple: # median and 95 % quantile
    "ICI if the risks were right: outcomes drawn from them, with a constant rate between horizons, and censoring as in the data. Samples without an ICI are left out."
    generator, values = np.random.default_rng(0), []
    times, counts = np.unique(marks.durations[~marks.events], return_counts=True)
    at_risk = np.array([(marks.durations >= t).sum() - ((marks.durations == t) & marks.events).sum() for t in times])
    drops = np.diff(1 - np.cumprod(1 - counts / at_risk), prepend=0)
    edges, hazards = np.append(0, HORIZONS), np.insert(-np.log1p(-risks), 0, 0, axis=1)
    for _ in range(n_samples):
        drawn = generator.exponential(size=len(marks))
        event = np.array([np.interp(x, h, edges, right=np.inf) for x, h in zip(drawn, hazards)])
        event[drawn > hazards[:, -1]] = np.inf
        censored = generator.choice(times, len(marks), p=drops / drops.sum())
        try: values.append(integrated_calibration_index(np.minimum(event, censored), event <= censored, risks[:, k], HORIZONS[k])["ici"])
        except ValueError: continue
    return float(np.median(values)), float(np.quantile(values, 0.95))


def with_interval(
    value: float, # estimate
    low=None, # end of the interval; no interval if None or NaN
    high=None, # its other end
    signed: bool = False, # with a plus before positive numbers
) -> str:
    "A number with its interval."
    form = "{:+.3f}" if signed else "{:.3f}"
    return form.format(value) + ("" if low is None or pd.isna(low) else f" ({form.format(low)} to {form.format(high)})")


def markdown_rows(
    header, # names of the columns
    rows, # sequences of cells
) -> str:
    "A Markdown table."
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def score_table(
    frames: dict, # year -> from `score`
    metrics: dict, # metric -> heading
    models=MODELS, # rows, in this order
) -> str: # a row for each landmark, horizon and model
    "Values with intervals, as Markdown. What is not defined for a risk that is the same for all says so."
    rows = []
    for year, frame in frames.items():
        at = frame.set_index(["model", "metric", "horizon"])
        for horizon, years in zip(HORIZONS, HORIZON_YEARS):
            for model in models:
                if model == "no covariates" and set(metrics) <= {*POOLED, *WITHIN}: continue
                cells = [with_interval(*at.loc[(model, m, horizon), ["value", "low", "high"]]) if (model, m, horizon) in at.index else "not defined" for m in metrics]
                rows.append([year, years, model, *cells])
    return markdown_rows(["landmark, year", "within, years", "model", *metrics.values()], rows)


def gain_table(
    results: dict, # treatment -> year -> from `score`
) -> str:
    "Differences from the values at entry on the same bootstrap draws, at the last horizon, as Markdown."
    rows = []
    for name, frames in results.items():
        for year, frame in frames.items():
            at = frame[frame.horizon == HORIZONS[-1]].set_index(["model", "metric"])
            for model in MODELS[:2]:
                cells = [with_interval(*at.loc[(model, m), ["difference", "difference_low", "difference_high"]], signed=True) + f", p = {at.loc[(model, m), 'p_value']:.3f}" for m in (*WITHIN[1:], "brier")]
                rows.append([name, year, model, *cells])
    return markdown_rows(["analysis", "landmark, year", "model", "Uno's C within folds", "AUC within folds", "Brier score"], rows)


def bar_table(
    cohorts: dict, # treatment -> Cohort
    results: dict, # treatment -> year -> from `score`
) -> str:
    "The numbers to beat, as Markdown."
    rows = []
    for name, frames in results.items():
        for year, frame in frames.items():
            at = frame[frame.horizon == HORIZONS[-1]].set_index(["model", "metric"])
            for model in MODELS[:2]:
                rows.append([name, year, len(cohorts[name].marks[year]), int(cohorts[name].marks[year].events.sum()), model,
                             *(with_interval(*at.loc[(model, m), ["value", "low", "high"]]) for m in (*WITHIN[1:], "brier", "scaled_brier"))])
    return markdown_rows(["analysis", "landmark, year", "at risk", "deaths", "model", "Uno's C within folds", "AUC within folds", "Brier score", "IPA"], rows)


def flow_table(
    cohort: Cohort, # with transplant as the competing event
) -> str:
    "Who is at risk at each landmark, what happens to them, and how old their last measurements are, as Markdown."
    columns = []
    for year in LANDMARK_YEARS:
        marks, flow = cohort.marks[year], cohort.marks[year].flow["moments"]
        by = lambda kind, h: int(((marks.event_types == kind) & (marks.durations <= h)).sum())
        lost = lambda h: int(((marks.event_types == 0) & (marks.durations < h)).sum())
        ages = cohort.ages[year]["LAB//serBilir"].quantile([0.5, 0.25, 0.75]).round().astype(int).tolist()
        columns.append([flow["moments asked about"], flow["event on or before that day"], flow["competing event on or before that day"], flow.get("no follow-up after that day", 0), len(marks),
                        *(f"{by(1, h)} / {by(2, h)} / {lost(h)}" for h in HORIZONS), f"{ages[0]} [{ages[1]}, {ages[2]}]"])
    names = ["patients", "died before", "transplanted before", "no longer followed", "at risk", *(f"within {y} years: deaths / transplants / lost to follow-up" for y in HORIZON_YEARS),
             "days since the last measurement, median [quartiles]"]
    return markdown_rows(["", *(f"year {year}" for year in LANDMARK_YEARS)], [[name, *values] for name, values in zip(names, zip(*columns))])


def pooling_table(
    checks: dict, # treatment -> year -> from `pooling`
) -> str:
    "Pooled against folds, as Markdown."
    keys = {"C": "C, all pairs", "C within": "C, pairs within folds", "C of folds": "C, mean of folds", "AUC": "AUC, all pairs", "AUC within": "AUC, pairs within folds", "AUC of folds": "AUC, mean of folds",
            "AUC null": "AUC without covariates, all pairs", "AUC, own weights": "AUC, all pairs, censoring from training folds", "Brier": "Brier score", "Brier, own weights": "Brier score, censoring from training folds"}
    shown = lambda x: x if isinstance(x, str) else f"{x:.3f}"
    columns = [values for years in checks.values() for values in years.values()]
    return markdown_rows(["", *(f"{name}, year {year}" for name, years in checks.items() for year in years)], [[label, *(shown(values[key]) for values in columns)] for key, label in keys.items()])


def spread_table(
    spreads: dict, # treatment -> year -> from `other_folds`
) -> str:
    "Mean and range over other draws of the folds, as Markdown."
    rows = []
    for name, years in spreads.items():
        for year, frame in years.items():
            for model in MODELS[:-1]:
                values = frame.xs(model, level="model")
                rows.append([name, year, model, *(f"{values[m].mean():.3f} ({values[m].min():.3f} to {values[m].max():.3f})" for m in (*WITHIN[1:], "brier", "scaled_brier", "calibration_slope"))])
    return markdown_rows(["analysis", "landmark, year", "model", "Uno's C within folds", "AUC within folds", "Brier score", "IPA", "slope"], rows)


def ici_table(
    cohort: Cohort, # with transplant as censoring
    folds: np.ndarray, # (N,)
    frames: dict, # year -> from `score`
) -> str:
    "ICI beside what it would be if the risks were right, as Markdown."
    rows, beyond = [], []
    for year in LANDMARK_YEARS:
        risks, at = crossed_risks(cohort, folds, year, MODELS[:-1]), frames[year].set_index(["model", "metric", "horizon"])
        for k, (horizon, years) in enumerate(zip(HORIZONS, HORIZON_YEARS)):
            for model, r in risks.items():
                index, (median, top) = at.loc[(model, "ici", horizon), "value"], calibrated_ici(cohort.marks[year], r, k)
                rows.append([year, years, model, f"{index:.3f}", f"{median:.3f}", f"{top:.3f}"])
                if index > top: beyond.append(f"{model} (year {year}, within {years})")
    table = markdown_rows(["landmark, year", "within, years", "model", "ICI", "median if calibrated", "95 % quantile if calibrated"], rows)
    return f"{table}\n\nBeyond the 95 % quantile: {', '.join(beyond) or 'none'}. Of {len(rows)}, one or so would be by chance."


def figure(
    cohort: Cohort, # with transplant as censoring
    folds: np.ndarray, # (N,)
    frames: dict, # year -> from `score`
    path: Path, # PNG to write
):
    "AUC by landmark and model, and the calibration of the last values at each landmark."
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 2, figsize=(9, 8.6), layout="constrained")
    for i, model in enumerate(MODELS[:-1]):
        rows = pd.concat([f[(f.model == model) & (f.metric == WITHIN[-1]) & (f.horizon == HORIZONS[-1])] for f in frames.values()])
        x = np.array(LANDMARK_YEARS) + 0.12 * (i - 1.5)
        axes[0, 0].plot(x, rows.value, color=COLORS[i], ls=STYLES[i], marker=MARKERS[i], ms=5, label=model)
        axes[0, 0].vlines(x, rows.low.to_numpy(dtype=float), rows.high.to_numpy(dtype=float), color=COLORS[i], lw=1)
    axes[0, 0].axhline(0.5, color="0.5", lw=0.8)
    axes[0, 0].set(xlabel="landmark, years after entry", ylabel=f"AUC within {HORIZON_YEARS[-1]} years, pairs within folds", xticks=LANDMARK_YEARS, ylim=(0.35, 1), title="discrimination")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
    for ax, year in zip(axes.ravel()[1:], LANDMARK_YEARS):
        marks, r = cohort.marks[year], crossed_risks(cohort, folds, year, ("last values",))["last values"]
        plot_calibration(marks.durations, marks.events, r[:, -1], HORIZONS[-1], ax, title=f"last values, landmark at year {year}", n_groups=5)
        ax.set_xlabel(f"predicted risk within {HORIZON_YEARS[-1]} years")
    fig.savefig(path, dpi=80)
    plt.close(fig)


def incidence_table(
    cohorts: dict, # treatment -> Cohort
    folds: np.ndarray, # (N,), the same in both
) -> str:
    "What the two treatments of transplants predict and observe at the last horizon, as Markdown."
    censors, competes = cohorts.values()
    rows = []
    for year in LANDMARK_YEARS:
        net, real = (crossed_risks(c, folds, year, ("last values",))["last values"][:, -1].mean() for c in cohorts.values())
        of = [aalen_johansen(c.marks[year].durations, c.marks[year].event_types, at=HORIZONS[-1:]).risk.iloc[0] for c in (censors, competes)]
        rows.append([year, *(f"{x:.3f}" for x in (net, of[0], real, of[1]))])
    return markdown_rows(["landmark, year", "mean predicted, transplant censors", "1 - Kaplan-Meier", "mean predicted, transplant competes", "Aalen-Johansen"], rows)


PAGE = """# PBC2: what a Cox model on the last biomarkers reaches

Written by `benchmarks/pbc2_landmarks.py` in {seconds:.0f} s on one core. Data: 312 patients of the Mayo Clinic's trial in primary biliary cirrhosis with 1,945 visits (Murtaugh et al. 1994, [doi:10.1002/hep.1840200120](https://doi.org/10.1002/hep.1840200120)).

## The question

A patient is alive with the own liver 3, 5 or 7 years after entry. How likely is death within the next 2 and 3 years, from what was measured up to that day? Each patient's risk comes from models fitted to the other four of five folds of patients. A transplant is treated in two ways:

- *transplant censors*: the patient leaves observation. The risk is that of death if nobody were transplanted, and it presumes that the transplanted would have died as often as others with their covariates.
- *transplant competes*: the risk is that of dying before a transplant, as it happens.

Why 2 and 3 years: within one year of the landmarks only {one_year} patients die, too few to measure calibration; and by 3 years {left7} of the {n7} at risk at year 7 have left follow-up alive.

| model | covariates | learned from |
| --- | --- | --- |
| last values (the one asked for) | age, edema, logarithms of bilirubin, albumin, prothrombin time, as last observed by the landmark; the covariates of the Mayo model, chosen beforehand | training patients at risk at the landmark |
| last values, stacked | the same | coefficients from the training patients' landmarks at years 0, 1, ..., 7 together, with a baseline hazard for each ([van Houwelingen 2007](https://doi.org/10.1111/j.1467-9469.2006.00529.x)); the baseline at the landmark |
| bilirubin alone | logarithm of bilirubin, as last observed | training patients at risk at the landmark |
| values at entry | the five, as observed at entry | training patients at risk at the landmark |
| no covariates | none: Kaplan-Meier, or Aalen-Johansen where transplants compete | training patients at risk at the landmark |

Where transplants compete, there is a second Cox model for them, with a ridge penalty because they are few.

## Who is at risk

{flow}

## The numbers to beat

Death within 3 years, with 95 % intervals.

{bar}

A network that learns from all visits of its training patients should be held against the stacked model, which does so too; the first row of each pair is the model that was asked for. Use the same folds (`fold_patients(labels, 5, seed=0)`), and give the network's out-of-fold risks to `evaluate_survival` and `within_folds` together with those of `crossed_risks`, so that both are scored on the same draws: intervals this wide, laid side by side, say nothing about a difference.

## All results

Harrell's C, Uno's C and the AUC (with transplants competing, their cause-specific forms; the transplanted count as free of the event) appear twice: over all pairs of patients, and over pairs of the same fold only, for reasons given [below](#pooling). IPA is the share of the Brier score of the risk that is the same for all that a model takes away.

### Ranking, transplant censors

{ranking0}

### Ranking, transplant competes

{ranking1}

Ranking is not defined without covariates: everybody in a fold has the same risk.

### Accuracy and calibration, transplant censors

{calibration0}

### Accuracy and calibration, transplant competes

{calibration1}

Slope and ICI are not defined without covariates, as the risk does not vary within a fold. {undefined}

The ICI has no interval. It is a distance and comes out above 0 for perfect risks too; a bootstrap adds the same bias once more, and its intervals miss a small true distance far too often. So here it is (transplant censors) beside its distribution in 300 sets of outcomes simulated from the risks themselves, with the censoring of the data:

{ici}

![AUC by landmark and model; calibration of the last values at each landmark](pbc2_landmarks.png)

AUC within folds, and calibration, of death within 3 years; transplant censors.

## What the later measurements buy

Differences from the values at entry, same patients and same draws, within 3 years. A negative difference of Brier scores is a gain.

{gain}

## What it means

Numbers are those of death within 3 years, transplant censors.

- At years 3 and 5 the last values rank well, with an AUC within folds of {a3} and {a5}, and their Brier scores are {i3} and {i5} below that of the risk that is the same for all. The calibration slope at year 5 is low ({s5}); the stacked model's is {t5}.
- At year 7 they do not: IPA {i7}; slope {s7}. Five coefficients are learned from about 18 deaths, and the measurements are old: for a quarter of the patients the last is more than {old:,} days back. No model's IPA is above 0 beyond its interval. The stacked model ranks somewhat better there, but its risks are too extreme as well (slope {t7}) and on the whole too low (observed over expected {o7}). A network should be neither praised nor blamed for its score at year 7.
- What was measured since entry counts most at year 5 (AUC {g5}). At year 3 the values at entry still do well and the gain is not told from none ({g3}); nor is it at year 7 ({g7}).
- Bilirubin alone gives away {b3} of AUC at year 3 and {b5} at year 5.
- The stacked model is ahead of the one asked for in every row of the table of numbers to beat, with the same five covariates. What it gains comes from learning the coefficients from more deaths, not from knowing more about a patient.
- With transplants competing, ranking is a little worse: those who get a transplant are ill, and here they count as not dying. The risks are lower, as they should be. Averages over the patients at risk, last values:

{incidence}

**Beside published numbers.** The [vignette on dynamic predictions of JMbayes2](https://drizopoulos.github.io/JMbayes2/articles/Dynamic_Predictions.html) asks for death *or* transplant within 3 years of year 5, of the patients to whom its models were fitted: 202 at risk, 40 events, 58 censored before; a joint model of bilirubin, prothrombin time and ascites has AUC 0.83 and Brier score 0.124, a Cox model of values at entry AUC 0.67. Here too 202 are at risk, {c_events} have either event and {c_lost} leave before. Asked the same question, out of fold, the last values reach AUC {c_auc} and Brier score {c_brier}, the values at entry AUC {c_entry}.

## Pooling

Five models, one for each fold, rank the patients of their own fold; whether their risks may be compared *across* folds is another matter. If a fold holds many deaths, the other four hold few, and all risks in it are a little lower. This biases the AUC of all pairs downwards ([Parker et al. 2007](https://doi.org/10.1186/1471-2105-8-326)): for the model that knows nothing it is well below one half (below). It costs weak models and small landmarks most, so that the bar would be too low just where it is easiest to pass. Hence the numbers to beat are those within folds: all comparable pairs of the same fold together. The mean of the five folds' values is close, but gives a fold with two deaths as much say as one with seven. Brier score and calibration are about each patient's risk and not about pairs; they are pooled.

Death within 3 years, last values:

{pooling}

**Weights for censoring.** Within folds they are learned from the other four folds. In the pooled metrics (one call of `evaluate_survival`) they are learned from everybody at risk at the landmark, and so is the risk that is the same for all; the table shows that it changes the third decimal at most. Calibration has its weights from the patients evaluated, as its chapter explains.

**Intervals.** BCa, from 1,000 draws of patients, each keeping the risk and the fold; closed-form (sandwich) for slope, intercept and observed over expected. They say how far the numbers would move with other patients to *evaluate*, the fitted models being what they are. They leave out the variation of fitting, and of dealing out the folds. Of the latter here is a picture: mean and range over ten draws of the folds (seeds 0 to 9, of which 0 is used above), within 3 years.

{spread}

The ranges are narrower than the intervals. Still, the slope of the last values at year 5 moves widely, and in one draw their Brier score is {worst}: one unlucky fit is enough.

## What falls short

- 22 to 39 deaths. The interval of the AUC within folds of the last values is {narrow} to {wide} wide, and that of its difference from the values at entry {narrow_difference} to {wide_difference}.
- The three landmarks share patients and deaths. They are not three independent tests.
- For many patients measurements end long before follow-up does, so that the "last values" at year 7 are old ones.
- Leaving follow-up is taken to have nothing to do with the risk. Where transplants censor, that is surely wrong.
- Folds are balanced for death at any time, not for deaths after a landmark: at year 7 they hold {fold_deaths} deaths within 3 years.
- Many comparisons, and no correction of p-values. That pairs within folds set the bar was decided after seeing the AUC of no covariates.
"""


def study(
    data, # pbc2.csv.gz
    n_resamples: int = 1000, # draws for intervals
) -> tuple: # treatment -> Cohort; folds; treatment -> year -> from `score`
    "Read, fit and score. The folds are the same in both analyses, because the deaths are."
    cohorts = {name: prepare(data, outcome) for name, outcome in OUTCOMES.items()}
    folds = [fold_patients(c.labels, N_FOLDS, seed=0) for c in cohorts.values()]
    if not (folds[0] == folds[1]).all(): raise ValueError("folds: expected the same in both analyses")
    return cohorts, folds[0], {name: {year: score(c, folds[0], year, n_resamples) for year in LANDMARK_YEARS} for name, c in cohorts.items()}


RANKING_HEADINGS = {"harrell_c": "Harrell's C, all pairs", "uno_c": "Uno's C, all pairs", "auc": "AUC, all pairs"} | dict(zip(WITHIN, ("Harrell's C within folds", "Uno's C within folds", "AUC within folds")))
OTHER_HEADINGS = {"brier": "Brier score", "scaled_brier": "IPA", "calibration_slope": "slope", "calibration_intercept": "intercept", "observed_expected": "observed / expected", "ici": "ICI"}


def composite(data) -> dict: # what -> text
    "Death or transplant from year 5 within 3 years, for the comparison with published numbers."
    cohort = prepare(data, Outcome(("MEDS_DEATH", "TRANSPLANT")))
    marks, folds = cohort.marks[5], fold_patients(cohort.labels, N_FOLDS, seed=0)
    at = score(cohort, folds, 5, n_resamples=0).set_index(["model", "metric", "horizon"]).value
    lost = int((~marks.events & (marks.durations < HORIZONS[-1])).sum())
    return {"c_events": int(marks.events.sum()), "c_lost": lost, "c_auc": f"{at['last values', WITHIN[-1], HORIZONS[-1]]:.2f}", "c_brier": f"{at['last values', 'brier', HORIZONS[-1]]:.3f}",
            "c_entry": f"{at['values at entry', WITHIN[-1], HORIZONS[-1]]:.2f}"}


def sentences(cohorts, folds, results, spreads) -> dict: # what -> text
    "The numbers that the page's sentences mention."
    name, last = "transplant censors", HORIZONS[-1]
    at, marks = {year: frame.set_index(["model", "metric", "horizon"]) for year, frame in results[name].items()}, cohorts[name].marks
    def told(year, model, metric, columns=("value", "low", "high"), form="{:.2f}"):
        return "{}, {} to {}".format(*(form.format(x) for x in at[year].loc[(model, metric, last), list(columns)]))
    gain = lambda year: told(year, "last values", WITHIN[-1], ("difference", "difference_low", "difference_high"), "{:+.2f}")
    number = lambda year, model, metric: at[year].loc[(model, metric, last), "value"]
    widths = {column: [(lambda r: r[f"{column}high"] - r[f"{column}low"])(f.set_index(["model", "metric", "horizon"]).loc[("last values", WITHIN[-1], last)]) for frames in results.values() for f in frames.values()]
              for column in ("", "difference_")}
    undefined = [f"{n}, year {y}, {row['model']}, {row['metric']}: {row['reason']}" for n, frames in results.items() for y, frame in frames.items() for row in frame.attrs["undefined"]]
    listed = lambda numbers: ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    return {"one_year": listed([int((marks[y].events & (marks[y].durations <= YEAR)).sum()) for y in LANDMARK_YEARS]), "n7": len(marks[7]),
            "left7": int((~marks[7].events & (marks[7].durations < last)).sum()), "undefined": "Not defined: " + "; ".join(undefined) + "." if undefined else "Nothing else is undefined.",
            "a3": f"{number(3, 'last values', WITHIN[-1]):.2f}", "a5": f"{number(5, 'last values', WITHIN[-1]):.2f}", "i3": f"{100 * number(3, 'last values', 'scaled_brier'):.0f} %",
            "i5": f"{100 * number(5, 'last values', 'scaled_brier'):.0f} %", "s5": told(5, "last values", "calibration_slope"), "t5": told(5, "last values, stacked", "calibration_slope"),
            "i7": told(7, "last values", "scaled_brier"), "s7": told(7, "last values", "calibration_slope"), "t7": told(7, "last values, stacked", "calibration_slope"),
            "o7": told(7, "last values, stacked", "observed_expected"), "old": round(cohorts[name].ages[7]["LAB//serBilir"].quantile(0.75)), "g3": gain(3), "g5": gain(5), "g7": gain(7),
            "b3": f"{number(3, 'last values', WITHIN[-1]) - number(3, 'bilirubin alone', WITHIN[-1]):.2f}", "b5": f"{number(5, 'last values', WITHIN[-1]) - number(5, 'bilirubin alone', WITHIN[-1]):.2f}",
            "worst": f"{spreads[name][5].xs('last values', level='model').brier.max():.3f}", "fold_deaths": listed(np.bincount(folds[marks[7].rows][marks[7].events], minlength=N_FOLDS).tolist()),
            "narrow": f"{min(widths['']):.2f}", "wide": f"{max(widths['']):.2f}", "narrow_difference": f"{min(widths['difference_']):.2f}", "wide_difference": f"{max(widths['difference_']):.2f}"}


@call_parse
def main(
    data: str = "../shared/data/pbc2/pbc2.csv.gz", # file of the cohort
    out: str = "benchmarks/results/pbc2_landmarks.md", # page to write
):
    "Fit, evaluate and write the page."
    if not Path(data).exists(): raise SystemExit(f"{data}: not there. Give the place of pbc2.csv.gz with --data.")
    matplotlib.use("agg")
    began = time.perf_counter()
    cohorts, folds, results = study(data)
    censors, competes = cohorts.values()
    spreads = {name: {year: other_folds(c, year) for year in LANDMARK_YEARS} for name, c in cohorts.items()}
    figure(censors, folds, results["transplant censors"], Path(out).with_suffix(".png"))
    tables = {"flow": flow_table(competes), "bar": bar_table(cohorts, results), "gain": gain_table(results), "ici": ici_table(censors, folds, results["transplant censors"]), "incidence": incidence_table(cohorts, folds),
              "pooling": pooling_table({name: {year: pooling(c, folds, year) for year in LANDMARK_YEARS} for name, c in cohorts.items()}), "spread": spread_table(spreads)}
    for i, frames in enumerate(results.values()): tables |= {f"ranking{i}": score_table(frames, RANKING_HEADINGS), f"calibration{i}": score_table(frames, OTHER_HEADINGS)}
    page = PAGE.format(**tables, **sentences(cohorts, folds, results, spreads), **composite(data), seconds=time.perf_counter() - began)
    Path(out).write_text(page, encoding="utf-8")
    print(f"{out} written")
