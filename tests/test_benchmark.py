"The main job: the same seed gives the same table, nothing in a run names a patient, and no model looks ahead."
import re

import pandas as pd
import pytest
import torch

from ehr_sequencing.aggregation import assert_no_future_leakage
from ehr_sequencing.batches import make_batch
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.benchmark import BenchmarkConfig, prepare_cohort
from ehr_sequencing.horizons import attach_labels
from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
from ehr_sequencing.omop import eunomia_path
from ehr_sequencing.survival import BEHRTForSurvival


def test_same_seed_same_table(tmp_path, command):
    options = ("--num_patients", 400, "--epochs", 2, "--device", "cpu")
    tables = []
    for name in ("a", "b"):
        done, _ = command(*options, "--out", name)
        assert done.returncode == 0, done.stderr
        tables.append(pd.read_csv(tmp_path / "work" / name / "results.csv", dtype=str).drop(columns="seconds"))
    assert tables[0].equals(tables[1])
    other, _ = command(*options, "--out", "c", "--seed", 1)
    assert not pd.read_csv(tmp_path / "work" / "c" / "results.csv", dtype=str).drop(columns="seconds").equals(tables[0])


@pytest.fixture(scope="module")
def eunomia():
    "Real-shaped records: gastrointestinal haemorrhage in the Eunomia database."
    pytest.importorskip("duckdb")
    config = BenchmarkConfig(source=str(eunomia_path()), outcome="concept:192671", device="cpu")
    return prepare_cohort(config, say=lambda line: None), config


def test_eunomia_counts(eunomia):
    cohort, _ = eunomia
    flow = cohort.labels.flow["patients"]
    assert cohort.table.n_patients == flow["patients in the source"] == 2694
    assert flow["event on or before the day of the first visit"] + flow["  with the event"] == 479
    assert "SNOMED//74474003" not in cohort.store.vocabulary.index


@pytest.mark.parametrize("horizons", [None, (365.0, 1825.0)])
def test_leak_check_on_records(eunomia, horizons):
    cohort, _ = eunomia
    batch = attach_labels(make_batch(cohort.store, cohort.split["test"][:6], max_tokens=128), cohort.store, cohort.labels)
    torch.manual_seed(0)
    size = len(cohort.store.vocabulary)
    for model in (SurvivalLSTM(LSTMConfig.small(size), horizons), BEHRTForSurvival(BEHRTConfig.small(size), horizons)):
        assert_no_future_leakage(model, batch)
    with pytest.warns(UserWarning, match="leaks the future"):
        leaking = BEHRTForSurvival(BEHRTConfig.small(size, attention="bidirectional"), horizons, allow_future_leakage=True)
    with pytest.raises(AssertionError, match="Future leakage"):
        assert_no_future_leakage(leaking, batch)


def test_a_run_names_no_patient(tmp_path, command):
    "No subject id and no date of a record stands in any text file of a run."
    import polars as pl
    from ehr_sequencing.synthetic import simulate_cohort
    shift = 7_000_000_000_000
    events = simulate_cohort(300, seed=0, hazard_ratio=3).table.events.select(pl.col("subject_id") + shift, "time", "code", "numeric_value")
    events.with_columns(pl.col("time").dt.to_string()).write_csv(tmp_path / "events.csv")
    done, left = command("--source", tmp_path / "events.csv", "--outcome", "ICD10CM//I50", "--epochs", 1, "--device", "cpu", "--out", "run")
    assert done.returncode == 0, done.stderr
    texts = [done.stdout] + [(tmp_path / "work" / f).read_text() for f in left if f.endswith((".csv", ".md", ".json"))]
    assert len(texts) > 6
    for text in texts:
        assert not re.search(r"70000000\d{5}", text) and not re.search(r"\b(19|20)\d\d-\d\d-\d\d\b", text) and str(tmp_path) not in text.replace(done.stdout, "")
