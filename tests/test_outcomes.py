"""Labels, landmarks, splits and label files on hundreds of drawn histories, against plain loops over the definition, and on the development data.

The loop below knows nothing of stores or arrays: it takes one patient's days and says what the chapters define."""
import datetime

import numpy as np
import polars as pl
import pytest
from conftest import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.horizons import horizon_targets, person_periods, within_horizons
from ehr_sequencing.label_files import read_meds_labels, write_meds_labels
from ehr_sequencing.landmarks import at_date, at_each_visit, at_elapsed, at_moments, at_random_day, at_visit, draw_landmarks, last_values
from ehr_sequencing.outcomes import Outcome, events_before, label_visits
from ehr_sequencing.readers import read_events
from ehr_sequencing.sequences import build_store
from ehr_sequencing.splits import split_patients
from ehr_sequencing.vocabulary import SPECIAL_TOKENS, Vocabulary

BEGIN = datetime.datetime(2010, 1, 1)
DAYS = st.integers(0, 30)  # few different days, so that ties are common
PATIENT = st.fixed_dictionaries({"visit": st.lists(DAYS, min_size=1, max_size=6), "F": st.lists(DAYS, max_size=3), "X": st.lists(DAYS, max_size=2), "C": st.lists(DAYS, max_size=2),
                                 "MEDS_DEATH": st.lists(st.integers(31, 40), max_size=1), "OBSERVATION_END": st.lists(st.integers(20, 45), max_size=1)})
OPTIONS = st.fixed_dictionaries({"prevalent": st.sampled_from(["exclude", "include"]), "washout_days": st.sampled_from([0, 3, 10]),
                                 "competing": st.sampled_from([None, "X", "X; death"]), "censored_by": st.sampled_from([None, "C"])})
SURE = {"visit": [0, 5], "F": [7], "X": [9], "C": [9], "MEDS_DEATH": [31], "OBSERVATION_END": []}  # so that every code occurs, and somebody has the event
SURE_LATE = SURE | {"visit": [0, 12], "F": [14], "X": [20], "C": [20]}


def source(patients):
    rows = [(i, BEGIN + datetime.timedelta(days=d), code) for i, p in enumerate(patients) for code, days in p.items() for d in days]
    table = EventTable(event_table(pl.DataFrame(rows, schema=["subject_id", "time", "code"], orient="row", schema_overrides={"time": pl.Datetime("us")})))
    return table, build_store(table, Vocabulary(list(SPECIAL_TOKENS)))


def by_definition(patient, options, day, moment_rule=False):
    "Duration, type and whether at risk at the end of a day, or None where no visit is known by then."
    records = [d for code, days in patient.items() for d in days if code != "MEDS_DEATH"]
    died = patient["MEDS_DEATH"]
    visits = sorted({d for code in ("visit", "F", "X", "C") for d in patient[code]})
    observed = min([max(records), *died])
    codes = {"X": ["X"], "X; death": ["X", "MEDS_DEATH"], None: []}[options["competing"]]
    never = 10**6
    competing = min([d for c in codes for d in patient[c]], default=never)
    censored = min(patient["C"] if options["censored_by"] else [], default=never)
    if options["prevalent"] == "exclude": event = min(patient["F"], default=never)
    else: event = min([d for d in patient["F"] if d > day], default=never)
    if event < never and event <= competing and event <= censored: end, kind = event, 1
    elif competing < never and competing <= censored: end, kind = competing, 2
    else: end, kind = min(censored, observed), 0
    quiet = day - visits[0] >= options["washout_days"]
    if options["prevalent"] == "include": quiet = quiet and all(day - d >= options["washout_days"] for d in patient["F"] if d <= day)
    return end - day, kind, end > day and quiet and (not moment_rule or (observed > day and visits[0] <= day))


@settings(max_examples=150, deadline=None)
@given(st.lists(PATIENT, min_size=1, max_size=5), OPTIONS)
def test_visit_labels_follow_the_definition(patients, options):
    patients = [*patients, SURE, SURE_LATE]
    table, store = source(patients)
    labels = label_visits(store, table, Outcome("F", **options), horizons=(5, 20))
    for row in range(len(store)):
        patient, visits = patients[store.subject_ids[row]], range(store.first_visit[row], store.first_visit[row + 1])
        for v in visits:
            day = int((store.visit_known[v] - np.datetime64(BEGIN)) / np.timedelta64(1, "D"))
            assert (labels.durations[v], labels.event_types[v], labels.at_risk[v]) == by_definition(patient, options, day)
        at_risk = [v - visits[0] for v in visits if labels.at_risk[v]]
        assert labels.n_at_risk[row] == len(at_risk)
        assert (labels.first_at_risk[row], labels.last_at_risk[row]) == ((at_risk[0], at_risk[-1]) if at_risk else (-1, -1))
        if at_risk:
            known = ((store.visit_known[visits.start:visits.stop] - np.datetime64(BEGIN)) / np.timedelta64(1, "D")).astype(int)
            d, kind, _ = by_definition(patient, options, int(known[at_risk[0]]))
            assert labels.event_indicators[row] == (kind == 1)
            assert labels.event_times[row] == ((known < known[at_risk[0]] + d) if kind else (known <= known[at_risk[0]] + d)).sum() - 1
    flow = labels.flow
    assert flow.loc["patients in the source", "patients"] == len(patients)
    assert flow.loc[flow["kind"] == "excluded", "patients"].sum() + flow.loc["analysed", "patients"] == len(patients)
    assert flow.loc[flow["kind"] == "part", "patients"].sum() == flow.loc["analysed", "patients"] == (labels.n_at_risk > 0).sum()


@settings(max_examples=150, deadline=None)
@given(st.lists(PATIENT, min_size=1, max_size=5), OPTIONS, st.lists(st.integers(0, 35), min_size=1, max_size=6))
def test_moments_follow_the_definition(patients, options, days):
    patients = [*patients, SURE, SURE_LATE]
    table, store = source(patients)
    labels = label_visits(store, table, Outcome("F", **options), horizons=(5, 20))
    ids = np.repeat(np.arange(len(patients)), len(days))
    asked = np.tile(days, len(patients))
    expected = [by_definition(patients[i], options, d, moment_rule=True) for i, d in zip(ids, asked)]
    times = np.datetime64(BEGIN, "D") + asked
    if not any(e[2] for e in expected):
        with pytest.raises(ValueError, match="no landmark is left"): at_moments(labels, store, ids, times)
        return
    marks = at_moments(labels, store, ids, times)
    assert marks.asked.tolist() == [i for i, e in enumerate(expected) if e[2]]
    for position, row, visit, duration, kind in zip(marks.asked, marks.rows, marks.visits, marks.durations, marks.event_types):
        d, k, _ = expected[position]
        assert (duration, kind) == (min(d, 20), k if d <= 20 else 0)
        known = store.visit_known[store.first_visit[row]:store.first_visit[row + 1]].astype("datetime64[D]")
        assert visit == (known <= times[position]).sum() - 1  # no later visit is used
    assert (marks.days == times[marks.asked]).all()
    flow = marks.flow
    assert flow["moments"].iloc[0] == len(ids) == flow.loc[flow["kind"] == "excluded", "moments"].sum() + len(marks)


@settings(max_examples=60, deadline=None)
@given(st.lists(PATIENT, min_size=1, max_size=5), st.integers(8, 40), st.data())
def test_nothing_after_the_date_matters(patients, date, data):
    "Whatever is recorded from the date on, labels made as of the date are the same."
    patients = [*patients, SURE]
    later = [{code: [d for d in days if d < date] + data.draw(st.lists(st.integers(date, 60), max_size=2)) * (code not in ("MEDS_DEATH", "OBSERVATION_END")) for code, days in p.items()} for p in patients]
    stated = [p["OBSERVATION_END"] and p["OBSERVATION_END"][0] >= date for p in patients]  # a stated end is known beforehand, so it stays
    for p, q, s in zip(patients, later, stated):
        if s: q["OBSERVATION_END"] = p["OBSERVATION_END"]
    seen = []
    for version in (patients, later):
        table, store = source(version)
        limit = (BEGIN + datetime.timedelta(days=date)).date()
        labels = label_visits(store, table, Outcome("F"), before=limit)
        marks = at_each_visit(labels, store)
        assert np.isfinite(labels.durations).all()
        seen.append((store.subject_ids[marks.rows].tolist(), marks.visits.tolist(), marks.durations.tolist(), marks.events.tolist()))
        past = events_before(table, limit)
        assert (past.events["time"] < datetime.datetime.combine(limit, datetime.time())).all()
    assert seen[0] == seen[1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 800), st.integers(0, 2)), min_size=1, max_size=50), st.lists(st.integers(1, 700), min_size=1, max_size=6, unique=True), st.integers(0, 2**32 - 1))
def test_person_periods_have_the_likelihood_of_bins(pairs, horizons, seed):
    (durations, types), horizons = np.array(pairs).T, sorted(horizons)
    h = np.random.default_rng(seed).uniform(0.01, 0.99, (len(durations), len(horizons)))
    asked = durations > 0
    bins, within = horizon_targets(durations, types == 1, horizons)
    expected = [np.log1p(-h[i, :T]).sum() + (np.log(h[i, T]) if d else 0) for i, (T, d) in enumerate(zip(bins, within))]
    at_risk, happened = person_periods(durations, types == 1, horizons)
    terms = np.where(at_risk, np.where(happened == 1, np.log(h), np.log1p(-h)), 0).sum(-1)
    np.testing.assert_allclose(terms[asked], np.array(expected)[asked], rtol=1e-12, atol=1e-12)
    assert (terms[~asked] == 0).all()
    yes, known = within_horizons(durations, types, horizons)
    for i, (d, k) in enumerate(pairs):
        for j, tau in enumerate(horizons): assert (yes[i, j], known[i, j]) == (k == 1 and 0 < d <= tau, d > 0 and (k > 0 or d >= tau))


@settings(max_examples=40, deadline=None)
@given(st.lists(PATIENT, min_size=3, max_size=8), st.integers(0, 100), st.integers(1, 4))
def test_drawn_landmarks(patients, seed, per_patient):
    table, store = source([*patients, SURE])
    labels = label_visits(store, table, Outcome("F", prevalent="include", washout_days=3))
    rows = np.flatnonzero(labels.n_at_risk)
    marks = draw_landmarks(labels, store, rows, seed, per_patient)
    assert np.bincount(marks.rows, minlength=len(store)).tolist() == np.minimum(labels.n_at_risk, per_patient).tolist()
    assert labels.at_risk[store.first_visit[marks.rows] + marks.visits].all()
    assert len(set(zip(marks.rows.tolist(), marks.visits.tolist()))) == len(marks)
    shuffled = draw_landmarks(labels, store, rows[::-1], seed, per_patient)
    assert shuffled.visits.tolist() == marks.visits.tolist() and shuffled.rows.tolist() == marks.rows.tolist()


def test_drawn_visits_are_uniform():
    table, store = source([SURE | {"visit": list(range(5)), "F": [29], "X": [30], "C": [30]}, SURE])
    labels = label_visits(store, table, Outcome("F"))
    drawn = np.bincount(np.concatenate([draw_landmarks(labels, store, [0], seed).visits for seed in range(2000)]), minlength=5)
    assert len(drawn) == 5 and (abs(drawn - 400) < 4.5 * np.sqrt(2000 * 0.2 * 0.8)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.sampled_from("ABC"), st.integers(-3, 3)), min_size=1, max_size=40), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 22)), min_size=1, max_size=20))
def test_last_values_against_a_loop(measured, asked):
    rows = [(s, BEGIN + datetime.timedelta(days=d), c, float(v)) for s, d, c, v in measured]
    table = EventTable(event_table(pl.DataFrame(rows, schema=["subject_id", "time", "code", "numeric_value"], orient="row")))
    codes = sorted({c for _, _, c, _ in measured})
    ids, days = np.array(asked).T
    values, ages = last_values(table, ids, np.datetime64(BEGIN, "D") + days, codes)
    for i, (s, t) in enumerate(asked):
        for code in codes:
            past = [(d, v) for who, d, c, v in measured if (who, c) == (s, code) and d <= t]
            if not past: assert np.isnan(values[code][i]) and np.isnan(ages[code][i]); continue
            last = max(d for d, _ in past)
            assert ages[code][i] == t - last and values[code][i] == pytest.approx(np.mean([v for d, v in past if d == last]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12), st.sampled_from(["stratified", "random", "group", "date"]))
def test_no_split_divides_a_patient_or_a_group(seed, n_groups, method):
    generator = np.random.default_rng(seed)
    patients = [{"visit": [int(d), int(d) + 2], "F": [int(d) + 5] * bool(e), "OBSERVATION_END": [70]} for d, e in zip(generator.integers(0, 40, 120), generator.random(120) < 0.4)]
    table, store = source(patients)
    labels, groups = label_visits(store, table, Outcome("F")), generator.integers(0, n_groups, 120)
    split = split_patients(labels, seed, method=method, groups=groups)
    everyone = np.concatenate(list(split.values()))
    assert sorted(everyone.tolist()) == np.flatnonzero(labels.n_at_risk).tolist()
    assert all((np.diff(rows) > 0).all() for rows in split.values())
    if method == "group":
        for a in split:
            for b in split: assert a == b or not set(groups[split[a]]) & set(groups[split[b]])
    if method == "date":
        first = labels.ends.first_days
        assert first[split["train"]].max() < first[split["validation"]].min() and first[split["validation"]].max() < first[split["test"]].min()
    again = split_patients(labels, seed, method=method, groups=groups)
    assert all((split[p] == again[p]).all() for p in split)


def test_a_label_file_brings_back_the_visits(tmp_path):
    table, store = source([SURE, SURE_LATE, SURE | {"F": [], "visit": [1, 2, 3], "OBSERVATION_END": [25], "MEDS_DEATH": [31]}])
    labels = label_visits(store, table, Outcome("F"), horizons=(5, 20))
    marks = at_each_visit(labels, store)
    write_meds_labels(tmp_path / "labels.parquet", marks, 5)
    read = read_meds_labels(tmp_path / "labels.parquet")
    back = at_moments(labels, store, read["subject_id"].to_numpy(), read["prediction_time"].to_numpy())
    yes, known = (a[:, 0] for a in within_horizons(marks.durations, marks.event_types, 5))
    assert (back.visits == marks.visits[known]).all() and (back.rows == marks.rows[known]).all() and (back.elapsed == 0).all()
    assert read["boolean_value"].to_list() == yes[known].tolist()


def test_two_visits_of_one_day_have_one_label(tmp_path):
    rows = [(1, 0, "visit", 1), (1, 0, "visit", 2), (1, 9, "F", None), (1, 20, "visit", 3), (2, 0, "visit", 4), (2, 30, "visit", 5)]
    frame = pl.DataFrame([(s, BEGIN + datetime.timedelta(days=d), c, v) for s, d, c, v in rows], schema=["subject_id", "time", "code", "visit_id"], orient="row")
    table = EventTable(event_table(frame))
    store = build_store(table, Vocabulary(list(SPECIAL_TOKENS)))
    marks = at_each_visit(label_visits(store, table, Outcome("F")), store)
    assert len(marks) == 3 and (marks.days == np.datetime64(BEGIN, "D")).all()
    counted = write_meds_labels(tmp_path / "labels.parquet", marks, 10)
    assert read_meds_labels(tmp_path / "labels.parquet")["boolean_value"].to_list() == [True, False]
    assert counted["landmarks"].to_dict() == {"landmarks": 3, "censored within 10 days, label not known": 0, "another landmark of the same patient and day": 1,
                                              "labels": 2, "  event within the horizon": 1, "  no event within it": 1}


@pytest.mark.parametrize("horizon, seen", [(7, True), (6, False)])
def test_the_last_horizon_is_inside(horizon, seen):
    table, store = source([SURE, SURE_LATE])
    marks = at_visit(label_visits(store, table, Outcome("F"), horizons=(2, horizon)), store, 1)
    assert (marks.durations[0], marks.events[0]) == (horizon, seen)


def test_label_files_are_what_the_standard_checks(tmp_path):
    meds = pytest.importorskip("meds")
    import pyarrow.parquet as pq
    table, store = source([SURE, SURE_LATE, SURE | {"F": [], "OBSERVATION_END": [25], "MEDS_DEATH": [31]}])
    marks = at_each_visit(label_visits(store, table, Outcome("F")), store)
    write_meds_labels(tmp_path / "labels.parquet", marks, 10)
    written = pq.read_table(tmp_path / "labels.parquet")
    checked = meds.LabelSchema.align(written)
    assert checked.num_rows == written.num_rows and checked.schema.field("prediction_time").type == written.schema.field("prediction_time").type
    assert read_meds_labels(tmp_path / "labels.parquet").height == written.num_rows


@pytest.mark.parametrize("name, outcome", [("mimic-iv-demo-meds", Outcome("death")), ("mimic-iv-demo-meds", Outcome("re:^DIAGNOSIS//ICD//(9//428|10//I50)", competing="death")),
                                           ("mimic-iv-demo-omop", Outcome("death")), ("synthea-apr2020-csv", Outcome("SNOMED//44054006", competing="death", washout_days=365))])
def test_records(name, outcome, tmp_path):
    "From the records to labels and back, on the development data."
    table = read_events(data_folder(name))
    store = build_store(table, Vocabulary(list(SPECIAL_TOKENS)))
    labels = label_visits(store, table, outcome)
    flow = labels.flow
    assert flow.loc[flow["kind"] == "excluded", "patients"].sum() + flow.loc["analysed", "patients"] == table.n_patients == flow["patients"].iloc[0]
    codes = outcome.codes(table)
    first = dict(table.events.filter(pl.col("code").is_in(codes) & pl.col("time").is_not_null()).group_by("subject_id").agg(pl.col("time").min().dt.date()).iter_rows())
    marks = at_each_visit(labels, store)
    limit = labels.horizons[-1]
    for row, visit, duration, event in zip(*(a[::37] for a in (marks.rows, marks.visits, marks.durations, marks.events))):
        day = store.visit_known[store.first_visit[row] + visit].astype("datetime64[D]").astype(object)
        subject = int(store.subject_ids[row])
        assert subject not in first or first[subject] > day
        if event: assert (first[subject] - day).days == duration <= limit
    drawn, later = draw_landmarks(labels, store, np.flatnonzero(labels.n_at_risk)), at_elapsed(labels, store, 400 if outcome.washout_days else 30)
    assert len(drawn) == flow.loc["analysed", "patients"] and (later.days - labels.ends.first_days[later.rows] == np.timedelta64(400 if outcome.washout_days else 30, "D")).all()
    counted = write_meds_labels(tmp_path / "labels.parquet", later, 90)
    back = read_meds_labels(tmp_path / "labels.parquet")
    again = at_moments(labels, store, back["subject_id"].to_numpy(), back["prediction_time"].to_numpy())
    yes, known = (a[:, 0] for a in within_horizons(later.durations, later.event_types, 90))
    assert len(again) == len(back) == counted.loc["labels", "landmarks"] == known.sum()
    assert (again.visits == later.visits[known]).all() and (again.durations == later.durations[known]).all() and back["boolean_value"].to_list() == yes[known].tolist()


def test_rules_agree_with_one_another():
    table, store = source([SURE, SURE_LATE, SURE | {"visit": [3, 4], "F": [11]}])
    labels = label_visits(store, table, Outcome("F"))
    one, other = at_date(labels, store, BEGIN + datetime.timedelta(days=4)), at_random_day(labels, store, BEGIN.date() + datetime.timedelta(days=4), BEGIN.date() + datetime.timedelta(days=4))
    for name in ("rows", "visits", "durations", "elapsed", "event_types"): assert (getattr(one, name) == getattr(other, name)).all()
    assert at_visit(labels, store, 1).durations.tolist() == at_elapsed(labels, store, 0).durations.tolist()
