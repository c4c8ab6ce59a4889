"Bad input through the command: exit status 1, one line, no traceback, nothing written; or set aside and counted."
import json
import signal
from pathlib import Path

import polars as pl
import pytest

from ehr_sequencing.cli import ehrseq_benchmark
from ehr_sequencing.synthetic import simulate_cohort

PERSON = "person_id,gender_concept_id,year_of_birth\n" + "".join(f"{i},8507,1950\n" for i in range(40))
CONDITION = "person_id,condition_concept_id,condition_start_date,visit_occurrence_id,condition_source_value\n" + "".join(
    f"{i},1,20{10 + v}-01-0{v + 1},{10 * i + v},C{v}\n" for i in range(40) for v in range(3))

FAST = dict(arms="visit count; Cox, counts", sizes="all", n_seeds=1, n_resamples=50, n_jobs=1, device="cpu", out="run")


def omop(folder, **tables):
    "Write an OMOP folder."
    folder.mkdir()
    for name, text in ({"person": PERSON, "condition_occurrence": CONDITION} | tables).items():
        if text is not None: (folder / f"{name}.csv").write_text(text)
    return folder


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    "The command in this process, in an empty folder: options -> (status, stdout, stderr, what it left behind). Starting a process takes longer than what these tests ask of it."
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(**options):
        handler, status = signal.getsignal(signal.SIGTERM), 0
        try: ehrseq_benchmark(**{k: str(v) if isinstance(v, Path) else v for k, v in options.items()})
        except SystemExit as end: status = end.code
        finally: signal.signal(signal.SIGTERM, handler)
        return status, *capsys.readouterr(), sorted(str(p.relative_to(work)) for p in work.rglob("*"))
    return run


CASES = {
    "missing table": ({"person": None}, "death", "no table person"),
    "no clinical table": ({"condition_occurrence": None}, "death", "none of the tables"),
    "missing column": ({"condition_occurrence": CONDITION.replace("condition_start_date", "start")}, "death", "no column condition_start_date"),
    "unparsable dates": ({"condition_occurrence": CONDITION.replace("-01-0", "/01/0")}, "death", "no date in column condition_start_date can be read"),
    "duplicate ids": ({"person": PERSON + "3,8532,1960\n"}, "death", "'person_id' holds 1 ids more than once"),
    "empty table": ({"person": "person_id,year_of_birth\n"}, "death", "no person"),
    "empty file": ({"person": ""}, "death", "person.csv: cannot be read"),
    "outcome never occurs": ({}, "CONDITION//C9", "never occurs"),
    "outcome that is no code": ({}, "concept:77", "never occurs"),
    "nobody at risk": ({}, "CONDITION//C0", "no patient is at risk"),
    "too small to split": ({"death": "person_id,death_date\n1,2015-01-01\n"}, "death", "too small to split"),
}


def told_in_one_line(status, errors, message): return status == 1 and message in errors and len(errors.strip().splitlines()) == 1 and "Traceback" not in errors


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(case, tmp_path, inside):
    tables, outcome, message = CASES[case]
    status, _, errors, left = inside(source=omop(tmp_path / "omop", **tables), outcome=outcome, device="cpu")
    assert told_in_one_line(status, errors, message), errors
    assert left == []


def test_from_the_shell(tmp_path, command):
    "A process of its own ends the same way."
    tables, outcome, message = CASES["missing table"]
    done, left = command("--source", omop(tmp_path / "omop", **tables), "--outcome", outcome, "--device", "cpu")
    assert told_in_one_line(done.returncode, done.stderr, message) and left == []


@pytest.mark.parametrize("make, message", [
    (lambda p: p.mkdir(), "found no CSV or Parquet file"), (lambda p: None, "no such file or folder"),
    (lambda p: p.write_bytes(b"not a database"), "cannot tell the format")])
def test_source_that_is_none(make, message, tmp_path, inside):
    make(tmp_path / "source")
    status, _, errors, left = inside(source=tmp_path / "source", outcome="death")
    assert told_in_one_line(status, errors, message) and left == []


def test_no_message_shows_a_patient(tmp_path, inside):
    "Ids and dates in a faulty table do not appear in the error."
    secret = PERSON.replace("\n3,", "\n987654321,") + "987654321,8532,1961\n"
    status, output, errors, _ = inside(source=omop(tmp_path / "omop", person=secret), outcome="death")
    assert status == 1 and "987654321" not in errors + output and "1961" not in errors + output


def test_impossible_records_are_set_aside_and_counted(tmp_path, inside):
    events = simulate_cohort(300, seed=0, hazard_ratio=3).table.events.select("subject_id", "time", "code", "numeric_value")
    births = events.filter(pl.col("code") == "MEDS_BIRTH").head(7)
    deaths = events.filter(pl.col("code") == "MEDS_DEATH").head(5)
    early = births.with_columns(time=pl.col("time").dt.offset_by("-1y"), code=pl.lit("EARLY"))
    late = deaths.with_columns(time=pl.col("time").dt.offset_by("1y"), code=pl.lit("LATE"))
    path = tmp_path / "events.csv"
    pl.concat([events, early, late]).with_columns(pl.col("time").dt.to_string()).write_csv(path)
    path.write_text(path.read_text() + "1,the day before yesterday,C,\n")
    status, output, errors, _ = inside(source=path, outcome="ICD10CM//I50", **FAST)
    assert status == 0, errors
    told = dict(json.loads((tmp_path / "work" / "run" / "results.json").read_text())["about"]["summary"])
    for reason, n in {"event before birth": 7, "event after death": 5, "events.csv: no readable date": 1}.items():
        assert f"set aside: {reason}: {n}" in output and told[f"set aside: {reason}"] in (str(n), "<10")


def test_earlier_results_are_never_lost(tmp_path, inside):
    options = dict(num_patients=300, **FAST)
    assert inside(**options)[0] == 0
    before = (tmp_path / "work" / "run" / "results.csv").read_text()
    status, _, errors, _ = inside(**options)
    assert told_in_one_line(status, errors, "already holds a report")
    status, _, _, left = inside(num_patients=12, out="run", overwrite=True)
    assert status == 1 and not any("partial" in name for name in left)
    assert (tmp_path / "work" / "run" / "results.csv").read_text() == before
    status, _, _, left = inside(**options, overwrite=True, seed=1)
    assert status == 0 and (tmp_path / "work" / "run" / "results.csv").read_text() != before
    assert not any("partial" in name or ".old" in name for name in left)
