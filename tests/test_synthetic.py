"The simulated cohort as people use it: the command, any number of processes, a store made of it, and a truth that fits."
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import ehr_sequencing.synthetic as synthetic
from ehr_sequencing.events import BIRTH, DEATH, OBSERVATION_END, SPLITS
from ehr_sequencing.oracle import oracle_risk
from ehr_sequencing.prepare import PrepareConfig, prepare_store
from ehr_sequencing.readers import detect_format, read_events
from ehr_sequencing.synthetic import CODES, OUTCOME_CODE, load_truth, simulate_cohort, write_cohort

COMMANDS = Path(sys.executable).parent


def quiet(line): pass


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "A cohort of two chunks and a half, written by two processes."
    folder = tmp_path_factory.mktemp("synthetic") / "cohort"
    return folder, write_cohort(folder, 2 * synthetic.CHUNK + 500, seed=9, years=1, n_jobs=2, show_progress=False)


def test_any_number_of_processes_writes_the_same_files(written, tmp_path):
    folder, counts = written
    assert write_cohort(tmp_path / "alone", 2 * synthetic.CHUNK + 500, seed=9, years=1, n_jobs=1, show_progress=False) == counts
    files = sorted(f.relative_to(folder) for f in folder.rglob("*.parquet"))
    assert len(files) == 3 * 4 + 2  # three splits and the truth of three chunks, codes and splits
    for file in files: assert pl.read_parquet(folder / file).equals(pl.read_parquet(tmp_path / "alone" / file)), file


def test_a_smaller_cohort_of_the_same_seed_has_the_same_first_chunk(written):
    folder, _ = written
    first = simulate_cohort(synthetic.CHUNK, seed=9, years=1)
    mine = pl.concat([pl.read_parquet(f) for f in folder.glob("data/*/0.parquet")])
    key = ["subject_id", "time", "code", "numeric_value"]
    assert mine.select(key).sort(key).equals(first.table.events.select(key).sort(key))
    truth = load_truth(folder)
    one = truth["subject_id"] < synthetic.CHUNK
    assert np.array_equal(truth["stage"][one], first.snapshots["stage"]) and np.array_equal(truth["day"][one], first.snapshots["day"])


def test_the_record_holds_together(written):
    folder, counts = written
    assert detect_format(folder) == "meds"
    table = read_events(folder)
    events = table.events
    assert not table.set_aside and table.n_patients == counts["patients"] and set(events["code"]) <= set(CODES)
    at = {code: events.filter(pl.col("code") == code).select("subject_id", "time") for code in (BIRTH, DEATH, OBSERVATION_END, OUTCOME_CODE)}
    assert len(at[BIRTH]) == counts["patients"] and len(at[OUTCOME_CODE]) == counts["outcomes"]
    assert len(at[OBSERVATION_END]) == counts["patients"] and at[DEATH].join(at[OBSERVATION_END], on=["subject_id", "time"]).height == len(at[DEATH])
    assert not set(at[DEATH]["subject_id"]) & set(at[OUTCOME_CODE]["subject_id"])  # the outcome ends the record
    last = events.filter(pl.col("time").is_not_null()).group_by("subject_id").agg(pl.col("time").max())
    end = pl.concat([at[DEATH], at[OBSERVATION_END]]).rename({"time": "end"})
    assert (last.join(end, on="subject_id").select(pl.col("time") <= pl.col("end")).to_series()).all()
    visits = events.filter(pl.col("code").str.starts_with("VISIT//"))
    assert len(visits) == counts["visits"] and not visits.select("subject_id", "time").is_duplicated().any()


def test_the_command_makes_a_source_for_the_next_command(tmp_path):
    done = subprocess.run([COMMANDS / "ehrseq_synthesize", "--num_patients", "400", "--seed", "3", "--out", "cohort", "--hazard_ratio", "3"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "400 patients" in done.stdout, done.stderr
    again = subprocess.run([COMMANDS / "ehrseq_synthesize", "--num_patients", "400", "--out", "cohort"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1 and "already exists" in again.stderr and len(again.stderr.strip().splitlines()) == 1
    store = prepare_store(PrepareConfig(tmp_path / "cohort", tmp_path / "store", exclude=(OUTCOME_CODE,), min_patients=2, n_jobs=1), say=quiet)
    assert len(store) > 380 and OUTCOME_CODE not in store.vocabulary.tokens  # some people never come
    assert np.isin(store.subject_ids, np.arange(400)).all() and np.array_equal(np.array(SPLITS)[store.splits], synthetic._split_of(store.subject_ids))
    truth = load_truth(tmp_path / "cohort")
    starts = store.visit_starts[store.first_visit[:-1]]
    known = set(zip(truth["subject_id"].tolist(), truth["time"].tolist()))
    asked = np.array([(s, t) in known for s, t in zip(store.subject_ids.tolist(), starts.astype("datetime64[us]").tolist())])
    assert asked.mean() > 0.97  # the others come for the first time on the day of the outcome
    risk = oracle_risk(truth, store.subject_ids[asked], starts[asked], 365, n_futures=5)
    assert ((risk > 0) & (risk < 1)).all()


def test_an_interrupted_command_leaves_nothing(tmp_path):
    process = subprocess.Popen([COMMANDS / "ehrseq_synthesize", "--num_patients", "200000", "--out", "cohort"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired): process.communicate(timeout=6)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors and not (tmp_path / "cohort").exists()


def test_codes_alone_do_not_give_the_hazard_away():
    "The share of the log hazard that counts of codes explain stays clear of all of it, and above that of age and sex."
    cohort = simulate_cohort(3000, seed=0)
    s = cohort.snapshots
    last = np.flatnonzero(np.r_[s["subject_id"][1:] != s["subject_id"][:-1], True])
    state = {k: v[last] for k, v in s.items() if k not in ("day", "time", "period", "subject_id")}
    target = np.log(synthetic.event_hazard(state, s["period"][last]))
    counts = cohort.table.events.filter(pl.col("code").str.contains("ICD10CM//[EFIJMN]|ATC") & (pl.col("code") != OUTCOME_CODE)).group_by("subject_id", "code").len().pivot("code", index="subject_id", values="len").fill_null(0)
    counts = pl.DataFrame({"subject_id": s["subject_id"][last]}).join(counts, on="subject_id", how="left", maintain_order="left").fill_null(0).drop("subject_id").to_numpy()

    def explained(*columns):
        x = np.column_stack([np.ones(len(target)), *columns])
        half = np.arange(len(target)) % 2 == 0
        fit = np.linalg.lstsq(x[half], target[half], rcond=None)[0]
        return 1 - np.var(target[~half] - x[~half] @ fit) / np.var(target[~half])

    base = state["age"] + s["day"][last] / 365.25, state["male"]
    shares = explained(*base), explained(*base, np.log1p(counts))
    assert shares[0] + 0.1 < shares[1] < 0.85, shares
