"The main job: the same seed gives the same report, through kills and on any number of processes; nothing in it names a patient; an arm that looks ahead is flagged."
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from privacy import patient_traces

from ehr_sequencing.aggregation import assert_no_future_leakage
from ehr_sequencing.arms import Arm, Fitted
from ehr_sequencing.batches import make_batch
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.benchmark import run_benchmark
from ehr_sequencing.benchmark_plan import BenchmarkConfig, make_task, prepare_cohort
from ehr_sequencing.horizons import attach_labels
from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
from ehr_sequencing.omop import eunomia_path
from ehr_sequencing.report import without_times
from ehr_sequencing.survival import BEHRTForSurvival

FEW = "visit count; Cox, counts; LSTM; BEHRT, pre-trained, LoRA"
OPTIONS = ("--num_patients", 200, "--sizes", "60,all", "--n_seeds", 2, "--epochs", 1, "--n_resamples", 100, "--max_tokens", 64, "--device", "cpu")


def numbers(folder):
    "What a report says, times apart, and apart from the state of the checkout, in which somebody may be working."
    contents = without_times(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    contents["about"]["provenance"].pop("git")
    return contents


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A benchmark that nobody disturbed, in one process."
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, "run", "--n_jobs", 1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder / "run"


def start(folder, out, *options, arms=FEW):
    "The command in a process group of its own."
    program = Path(sys.executable).parent / "ehrseq_benchmark"
    return subprocess.Popen([program, *map(str, OPTIONS), "--arms", arms, "--out", out, *map(str, options)], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_killed_three_times(tmp_path, whole):
    "Killed with all its processes after so many cells, and started again, at last on a Dask cluster: the same numbers as without."
    distributed = pytest.importorskip("distributed")
    for cells, n_jobs in ((1, 2), (5, 1), (11, 2)):
        process = start(tmp_path, "run", "--n_jobs", n_jobs)
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until and len(list((tmp_path / "run.work" / "cells").glob("*.npz"))) < cells: time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "run").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run.work" / "cells").glob("*.npz")}
    assert len(before) >= 11
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        process = start(tmp_path, "run", "--cluster", cluster.scheduler_address)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert not (tmp_path / "run.work").exists()
    assert numbers(tmp_path / "run") == numbers(whole)


def test_seed_matters(tmp_path, whole):
    process = start(tmp_path, "other", "--seed", 1, "--n_jobs", 1, arms="visit count; Cox, counts")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first, second = ([row["c_index"] for row in numbers(folder)["results"] if row["arm"] == "Cox, counts"] for folder in (whole, tmp_path / "other"))
    assert len(first) == len(second) == 2 and not set(first) & set(second)


class Hindsight:
    "Knows how many visits a patient will have had in the end."
    def predict_risk(self, landmarks, horizons):
        left = landmarks.store.n_visits[landmarks.rows] - landmarks.visits
        return np.repeat((1 / (1 + left))[:, None], len(np.atleast_1d(horizons)), 1)


def look_ahead(task, settings):
    return Fitted(Hindsight(), 1, 1, "", [], "", settings[0])


def test_leaking_arm_is_flagged(tmp_path):
    arm = Arm("hindsight", "baseline", (None,), False, look_ahead, "how many visits are still to come")
    config = BenchmarkConfig(num_patients=400, sizes=("all",), n_seeds=1, n_resamples=100, device="cpu", n_jobs=1, arms=("visit count", "Cox, counts", "hindsight"), out=str(tmp_path / "run"))
    said = []
    run_benchmark(config, say=said.append, show_progress=False, extra_arms={"hindsight": arm})
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    first_screen = report[:report.index("<table")]
    assert "hindsight" in first_screen and any("hindsight" in line for line in said if line.startswith("Note"))
    assert not any("Cox, counts" in line and "leak" in line.lower() for line in said)


@pytest.fixture(scope="module")
def eunomia():
    "Real-shaped records: gastrointestinal haemorrhage in the Eunomia database."
    pytest.importorskip("duckdb")
    config = BenchmarkConfig(source=str(eunomia_path()), outcome="concept:192671", device="cpu")
    return prepare_cohort(config, say=lambda line: None), config


def test_eunomia_counts(eunomia):
    cohort, config = eunomia
    flow = cohort.labels.flow["patients"]
    assert cohort.table.n_patients == flow["patients in the source"] == 2694
    assert flow["event on or before the day of the first visit"] + flow["  with the event"] == 479
    assert "SNOMED//74474003" not in cohort.store.vocabulary.index


def test_no_arm_is_given_labels_of_others(eunomia):
    cohort, config = eunomia
    task = make_task(cohort, config, 200, 0)
    mine = np.isin(np.arange(len(cohort.store)), np.concatenate([task.train, task.validation]))
    assert mine.sum() == 200 and not mine[cohort.test.rows].any()
    assert not task.labels.at_risk[np.repeat(~mine, cohort.store.n_visits)].any() and not task.labels.event_indicators[~mine].any()
    assert (task.labels.n_at_risk > 0).sum() == 200


@pytest.mark.parametrize("horizons", [None, (365.0, 1825.0)])
def test_leak_check_on_records(eunomia, horizons):
    cohort, _ = eunomia
    batch = attach_labels(make_batch(cohort.store, cohort.pool[:6], max_tokens=128), cohort.store, cohort.labels)
    torch.manual_seed(0)
    size = len(cohort.store.vocabulary)
    for model in (SurvivalLSTM(LSTMConfig.small(size), horizons), BEHRTForSurvival(BEHRTConfig.small(size), horizons)):
        assert_no_future_leakage(model, batch)
    with pytest.warns(UserWarning, match="leaks the future"):
        leaking = BEHRTForSurvival(BEHRTConfig.small(size, attention="bidirectional"), horizons, allow_future_leakage=True)
    with pytest.raises(AssertionError, match="Future leakage"):
        assert_no_future_leakage(leaking, batch)


def test_a_run_names_no_patient(tmp_path, command):
    "No subject id and no date of a record stands in any text file of a run, and the working folder is gone."
    import polars as pl
    from ehr_sequencing.synthetic import simulate_cohort
    shift = 7_000_000_000_000
    events = simulate_cohort(300, seed=0, hazard_ratio=3).table.events.select(pl.col("subject_id") + shift, "time", "code", "numeric_value")
    events.with_columns(pl.col("time").dt.to_string()).write_csv(tmp_path / "events.csv")
    done, left = command("--source", tmp_path / "events.csv", "--outcome", "ICD10CM//I50", "--epochs", 1, "--n_seeds", 1, "--n_resamples", 100, "--arms", "visit count; Cox, counts; LSTM", "--device", "cpu", "--n_jobs", 1, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert not any(".work" in name for name in left)
    store = prepare_cohort(BenchmarkConfig(source=str(tmp_path / "events.csv"), outcome="ICD10CM//I50", device="cpu"), say=lambda line: None).store
    assert patient_traces(tmp_path / "work" / "run", store) == {}
    texts = [done.stdout] + [(tmp_path / "work" / f).read_text() for f in left if f.endswith((".csv", ".md", ".json", ".html"))]
    assert len(texts) > 6
    today = time.strftime("%Y-%m-%d", time.gmtime())
    for text in texts:
        text = text.replace(today, "")
        assert not re.search(r"70000000\d{5}", text) and not re.search(r"\b(19|20)\d\d-\d\d-\d\d\b", text) and str(tmp_path) not in text.replace(done.stdout, "")
