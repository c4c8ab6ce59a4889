"""Bad and odd input for Synthea, MEDS and plain tables, a line a case: refused in one sentence that names file, column and first bad
row and never shows a patient's value, or read with the right result."""
import datetime
import gzip
import time

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ehr_sequencing.events import SCHEMA, visit_table
from ehr_sequencing.readers import detect_format, meds_frame, meds_shards, meds_split_of, meds_splits, meds_source, open_events, read_events, read_meds, read_table, synthea_source, table_source
from ehr_sequencing.synthea import read_synthea

ID, CODE, DAY = 987654321, "HUSH//77", datetime.datetime(1961, 5, 4, 9, 30)
SECRETS = (str(ID)[:6], "HUSH", "1961", "4321")


def day(*parts): return datetime.datetime(*parts)


def frame(**columns):
    "Three events of two patients; columns replaced, added, or left out where None."
    base = {"subject_id": [ID, ID + 1, ID], "time": [DAY, None, DAY], "code": [CODE, CODE, "B"], "numeric_value": [1.5, None, 2.0]}
    return pl.DataFrame({k: v for k, v in (base | columns).items() if v is not None})


def meds(folder, *frames, names=None, **metadata):
    "A MEDS folder: a shard for each frame, and metadata files."
    for i, one in enumerate(frames):
        file = folder / "data" / (names[i] if names else f"{i}.parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(one, bytes): file.write_bytes(one)
        else: pq.write_table(one if isinstance(one, pa.Table) else one.to_arrow(), file)
    for name, one in metadata.items():
        (folder / "metadata").mkdir(exist_ok=True)
        if isinstance(one, bytes): (folder / "metadata" / f"{name}.parquet").write_bytes(one)
        else: one.write_parquet(folder / "metadata" / f"{name}.parquet")
    return folder


def parquet_bytes(one):
    sink = pa.BufferOutputStream()
    pq.write_table(one.to_arrow(), sink)
    return sink.getvalue().to_pybytes()


def splits(*rows): return pl.DataFrame(rows, schema=["subject_id", "split"], orient="row", strict=False)


def arrow(names, *columns): return pa.table([pa.array(c) for c in columns], names=names)


GOOD = frame()
TORN = parquet_bytes(GOOD)[:-60]
NESTED = [{"time": DAY, "code": CODE}]
IN_SPLITS = ["train/0.parquet", "held_out/0.parquet"]
MEDS_REFUSED = {  # name -> frames, keywords of `meds`, what the message says
    "no code": ([frame(code=None)], {}, "0.parquet: no column code; found subject_id, time, numeric_value"),
    "no id and no time": ([frame(subject_id=None, time=None)], {}, "no column subject_id, time"),
    "another table": ([pl.DataFrame({"subject_id": [ID], "prediction_time": [DAY], "boolean_value": [True]})], {}, "no column time, code"),
    "another schema in the second shard": ([GOOD, frame(time=None)], {}, "1.parquet: no column time"),
    "time as text": ([frame(time=["1961-05-04"] * 3)], {}, "column 'time' is String"),
    "time as integer": ([frame(time=[1, 2, 3])], {}, "column 'time' is Int64"),
    "ids as floats": ([frame(subject_id=[float(ID), 2.0, 3.0])], {}, "column 'subject_id' is Float64; 64-bit ids lose digits"),
    "NaN among the ids": ([frame(subject_id=[float(ID), float("nan"), 3.0])], {}, "column 'subject_id' is Float64"),
    "ids as text": ([frame(subject_id=[str(ID), "b", "c"])], {}, "column 'subject_id' is String, expected Int64"),
    "ids of 2**63 and more": ([frame(subject_id=pl.Series([2**63 + ID, 1, 2], dtype=pl.UInt64))], {}, "do not fit Int64"),
    "null id": ([frame(subject_id=[ID, ID, None])], {}, "column 'subject_id' is null in 1 rows, first in row 2"),
    "null code": ([frame(code=[CODE, None, None])], {}, "column 'code' is null in 2 rows, first in row 1"),
    "null code in the second shard": ([GOOD, frame(code=[CODE, CODE, None])], {}, "1.parquet: column 'code' is null in 1 rows, first in row 2"),
    "empty code": ([frame(code=[CODE, CODE, ""])], {}, "column 'code' is empty text in 1 rows, first in row 2"),
    "integer codes": ([frame(code=[1, 2, 3])], {}, "column 'code' is Int64, expected String"),
    "infinite value": ([frame(numeric_value=[1.0, float("-inf"), 2.0])], {}, "column 'numeric_value' is infinite in 1 rows, first in row 1"),
    "value beyond Float32": ([frame(numeric_value=[1.0, 2.0, 1e300])], {}, "column 'numeric_value' is infinite in 1 rows, first in row 2"),
    "values as text": ([frame(numeric_value=None, value=["4321", "a", "b"])], {}, "(value read as numeric_value): column 'numeric_value' is String"),
    "visit ids as floats": ([frame(visit_id=[4321.0, None, None])], {}, "column 'visit_id' is Float64"),
    "a column twice": ([arrow(["subject_id", "time", "code", "code"], [ID], [DAY], [CODE], [CODE])], {}, "0.parquet: column code is there more than once"),
    "nested draft 0.1": ([pl.DataFrame({"patient_id": [ID], "static_measurements": [NESTED], "events": [NESTED]})], {}, "column 'events' is a list, as in the drafts 0.1 and 0.2 of MEDS"),
    "nested draft 0.2": ([pl.DataFrame({"patient_id": [ID], "events": [NESTED]})], {}, "column 'events' is a list"),
    "all shards empty": ([GOOD.clear(), GOOD.clear()], {}, "no rows in any of 2 Parquet files"),
    "truncated": ([GOOD, TORN], {}, "1.parquet: cannot be read"),
    "text that calls itself Parquet": ([b"subject_id,time,code\n987654321,1961-05-04,HUSH//77\n"], {}, "0.parquet: cannot be read"),
    "codes.parquet without codes": ([GOOD], {"codes": pl.DataFrame({"name": ["HUSH"]})}, "codes.parquet: no column code; found name"),
    "codes.parquet torn": ([GOOD], {"codes": TORN}, "codes.parquet: cannot be read"),
    "a subject in two splits": ([GOOD], {"subject_splits": splits((ID, "train"), (ID, "held_out"), (ID + 1, "train"))}, "subject_splits.parquet: 1 subjects are in more than one split"),
    "splits against folders": ([GOOD.head(1), GOOD[1:2]], {"names": IN_SPLITS, "subject_splits": splits((ID, "held_out"), (ID + 1, "held_out"))}, "train/0.parquet: 1 subjects lie in the folder of train"),
    "a split of another name": ([GOOD], {"subject_splits": splits((ID, "HUSH"))}, "column 'split' has 1 other values than train, tuning, held_out"),
    "null split": ([GOOD], {"subject_splits": splits((ID, "train"), (ID + 1, None))}, "subject_splits.parquet: column 'split' is null in 1 rows, first in row 1"),
    "splits without subjects": ([GOOD], {"subject_splits": pl.DataFrame({"split": ["train"]})}, "subject_splits.parquet: no column subject_id"),
    "splits with float ids": ([GOOD], {"subject_splits": splits((float(ID), "train"))}, "subject_splits.parquet: column 'subject_id' is Float64"),
}


def refused(message, job):
    "The job fails with that message, in one line, and shows no secret."
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught: job()
    text = str(caught.value)
    assert message in text and "\n" not in text, text
    assert not any(secret in text for secret in SECRETS), text


@pytest.mark.parametrize("case", MEDS_REFUSED)
def test_meds_refused(case, tmp_path):
    frames, keywords, message = MEDS_REFUSED[case]
    refused(message, lambda: read_meds(meds(tmp_path / "d", *frames, **keywords)))


def test_meds_in_split_folders_with_a_subject_in_two(tmp_path):
    refused("the split folders: 1 subjects are in more than one split", lambda: meds_splits(meds(tmp_path / "d", GOOD, GOOD.head(1), names=IN_SPLITS)))


TIMES = {u: pl.Series([DAY, None, DAY]).dt.cast_time_unit(u) for u in ("ms", "us", "ns")}
PARIS = pl.Series([DAY, None, DAY]).dt.replace_time_zone("Europe/Paris")
HUGE = -(2**62) - 1
MEDS_READ = {  # name -> frames, keywords, what is true of the table
    "negative ids": ([frame(subject_id=[-ID, -1, -ID])], {}, lambda t: t.events["subject_id"].to_list() == [-ID, -ID, -1]),
    "ids beyond 2**53": ([frame(subject_id=[HUGE, HUGE - 1, HUGE])], {}, lambda t: t.events["subject_id"].to_list() == [HUGE - 1, HUGE, HUGE]),
    "UInt64 ids that fit": ([frame(subject_id=pl.Series([2**63 - 1, 1, 2], dtype=pl.UInt64))], {}, lambda t: t.events["subject_id"].max() == 2**63 - 1),
    "an empty shard among full ones": ([GOOD, GOOD.clear(), GOOD], {}, lambda t: len(t.events) == 6 and t.rows_read == {"0.parquet": 3, "1.parquet": 0, "2.parquet": 3}),
    "NaN values": ([frame(numeric_value=[float("nan"), 1.0, 2.0])], {}, lambda t: t.events["numeric_value"].null_count() == 1 and not t.events["numeric_value"].is_nan().any()),
    "no values at all": ([frame(numeric_value=None)], {}, lambda t: t.events["numeric_value"].null_count() == 3),
    "times in ms, us and ns": ([frame(time=s) for s in TIMES.values()], {}, lambda t: t.events["time"].value_counts().filter(pl.col("time") == DAY)["count"].to_list() == [6]),
    "time zones, all given": ([frame(time=PARIS), frame(time=PARIS.dt.convert_time_zone("UTC"))], {}, lambda t: set(t.events["time"].drop_nulls()) == {day(1961, 5, 4, 8, 30)} and len(t.notes) == 2),
    "time zones, some given": ([frame(time=PARIS), GOOD], {}, lambda t: "they may be hours apart" in t.notes[0]),
    "duplicate rows are kept": ([pl.concat([GOOD, GOOD])], {}, lambda t: len(t.events) == 6 and t.set_aside == {}),
    "a subject in two shards": ([GOOD, frame(time=[day(1950, 1, 1)] * 3)], {}, lambda t: len(t.events) == 6 and t.n_patients == 2 and t.events.filter(subject_id=ID)["time"].is_sorted()),
    "unicode, commas, newlines in codes": ([frame(code=["Größe, 身長", 'a "b"\nc', "B"])], {}, lambda t: set(t.events["code"]) == {"Größe, 身長", 'a "b"\nc', "B"}),
    "a century apart, years 1 and 9999": ([frame(time=[day(1, 1, 1), day(9999, 12, 31), day(101, 1, 1)])], {}, lambda t: t.events["time"].max() - t.events["time"].min() > datetime.timedelta(3_600_000)),
    "categorical codes": ([frame(code=pl.Series([CODE, CODE, "B"], dtype=pl.Categorical))], {}, lambda t: t.events["code"].dtype == pl.String),
    "dictionary and large text": ([GOOD.to_arrow().set_column(2, "code", pa.array([CODE, CODE, "B"]).dictionary_encode()), GOOD.to_arrow().set_column(2, "code", pa.array([CODE] * 3, pa.large_string()))], {},
                                  lambda t: set(t.events["code"]) == {CODE, "B"} and len(t.events) == 6),
    "names of codes": ([GOOD], {"codes": pl.DataFrame({"code": [CODE, "B"], "description": ["a name", None], "parent_codes": [["P"], []]})}, lambda t: t.name_of(CODE) == "a name" and t.name_of("B") == "B"),
    "names of 2024": ([GOOD.rename({"subject_id": "patient_id", "time": "timestamp", "numeric_value": "numerical_value"})], {}, lambda t: t.events["numeric_value"].sum() == 3.5),
    "names of MEDS Flat": ([GOOD.rename({"subject_id": "patient_id", "numeric_value": "value"})], {}, lambda t: t.events["numeric_value"].sum() == 3.5),
    "both old and new name": ([frame(patient_id=[1, 1, 1], value=[7.0, 7.0, 7.0])], {}, lambda t: t.n_patients == 2 and t.events["numeric_value"].sum() == 3.5),
    "splits counted": ([GOOD], {"subject_splits": splits((ID, "train"), (ID + 1, "held_out"))}, lambda t: "The split of the source is kept: 1 train, 1 held_out." in t.notes and sorted(t.splits["split"]) == ["held_out", "train"]),
    "shards in split folders": ([GOOD.head(1), GOOD[1:2]], {"names": IN_SPLITS}, lambda t: t.rows_read == {"held_out/0.parquet": 1, "train/0.parquet": 1}),
}


@pytest.mark.parametrize("case", MEDS_READ)
def test_meds_read(case, tmp_path):
    frames, keywords, holds = MEDS_READ[case]
    folder = meds(tmp_path / "d", *frames, **keywords)
    table = read_meds(folder)
    assert table.events.schema == pl.Schema(SCHEMA) and holds(table)
    key = ["subject_id", "time", "code", "numeric_value"]
    assert pl.concat(meds_source(folder).frames()).sort(key).equals(table.events.sort(key))


def test_meds_folders_of_every_layout(tmp_path):
    plain, split, single = tmp_path / "plain", tmp_path / "split", tmp_path / "single.parquet"
    for file in (plain / "b.parquet", plain / "a.parquet", plain / "._a.parquet", split / "train" / "x" / "0.parquet", split / "test" / "0.parquet", single):
        file.parent.mkdir(parents=True, exist_ok=True)
        GOOD.write_parquet(file)
    assert [f.name for f in meds_shards(plain)] == ["a.parquet", "b.parquet"] and meds_shards(single) == [single]
    assert [meds_split_of(f, split) for f in meds_shards(split)] == ["held_out", "train"] and meds_split_of(plain / "a.parquet", plain) is None
    assert detect_format(plain) == detect_format(split) == detect_format(single) == "meds"
    assert meds_splits(plain) is None and meds_splits(single) is None and len(read_meds(single).events) == 3


def test_meds_splits_of_older_data(tmp_path):
    folder = meds(tmp_path / "d", GOOD, patient_splits=splits((ID, "validation"), (ID + 1, "test"), (ID, "validation")).rename({"subject_id": "patient_id"}))
    assert meds_splits(folder).rows() == [(ID, "tuning"), (ID + 1, "held_out")] and meds_splits(folder).schema == pl.Schema({"subject_id": pl.Int64, "split": pl.String})


def test_a_shard_is_neither_sorted_nor_slow(tmp_path):
    n = 500_000
    rng = np.random.default_rng(0)
    events = pl.DataFrame({"subject_id": np.full(n, ID), "time": rng.integers(0, 10**15, n).astype("datetime64[us]"), "code": pl.Series(rng.integers(0, 5000, n)).cast(pl.String), "numeric_value": rng.normal(size=n).astype("f4")})
    file = meds(tmp_path / "d", events) / "data" / "0.parquet"
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        read = meds_frame(file)
        spent.append(time.perf_counter() - began)
    assert read["time"].equals(events["time"]) and min(spent) < 0.15


def test_a_million_events_of_one_patient(tmp_path):
    n = 1_000_000
    events = pl.DataFrame({"subject_id": np.full(n, ID), "time": np.arange(n).astype("datetime64[m]").astype("datetime64[us]"), "code": pl.Series(np.arange(n) % 997).cast(pl.String)})
    began = time.perf_counter()
    table = read_meds(meds(tmp_path / "d", events))
    assert len(table.events) == n and len(visit_table(table.events)) == 695 and time.perf_counter() - began < 10


PATIENTS = f"Id,BIRTHDATE,DEATHDATE,GENDER\n{ID},1931-05-04,,F\nu-2,1932-01-01,2015-03-02,M\n"
ENCOUNTERS = f"Id,START,STOP,PATIENT,ENCOUNTERCLASS,CODE,DESCRIPTION\ne-1,1961-05-04T09:00:00Z,1961-05-04T10:00:00Z,{ID},wellness,185349003,Check up\n"
CONDITIONS = f"START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION\n1961-05-04,,{ID},e-1,44054006,Diabetes\n1962-01-01,,{ID},,59621000,Hypertension\n"


def synthea(folder, **tables):
    "A small export; a table is text, bytes (compressed as .csv.gz) or None."
    folder.mkdir(parents=True)
    for name, text in ({"patients": PATIENTS, "encounters": ENCOUNTERS, "conditions": CONDITIONS} | tables).items():
        if isinstance(text, bytes): (folder / f"{name}.csv.gz").write_bytes(text)
        elif text is not None: (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return folder


SYNTHEA_REFUSED = {
    "no patients": ({"patients": None}, "no table patients; found conditions, encounters"),
    "no encounters": ({"encounters": None}, "no table encounters"),
    "patients without birth": ({"patients": PATIENTS.replace("BIRTHDATE", "BORN")}, "patients.csv: no column birthdate"),
    "conditions without code": ({"conditions": CONDITIONS.replace("CODE", "KODE")}, "conditions.csv: no column code"),
    "conditions without date": ({"conditions": CONDITIONS.replace("START", "BEGIN")}, "conditions.csv: no column date"),
    "no header": ({"conditions": CONDITIONS.split("\n", 1)[1]}, "is the header missing?"),
    "American dates": ({"conditions": CONDITIONS.replace("1961-05-04", "05/04/1961").replace("1962-01-01", "01/01/1962")}, "conditions.csv: no date in column start can be read; the first, in row 0, has the form '99/99/9999'"),
    "a patient twice": ({"patients": PATIENTS + f"{ID},1933-01-01,,F\n"}, "patients.csv: column 'id' holds 1 ids more than once with different contents"),
    "no patient": ({"patients": PATIENTS.split("\n")[0] + "\n"}, "patients.csv: no patient"),
    "an empty file": ({"conditions": ""}, "conditions.csv: cannot be read"),
    "a row too long": ({"conditions": CONDITIONS + f"1961-05-04,,{ID},e-1,44054006,HUSH,HUSH\n"}, "conditions.csv: cannot be read"),
    "a torn archive": ({"observations": gzip.compress(b"DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,VALUE\n" + b"1961-05-04,987654321,e-1,8302-2,HUSH,171.0\n" * 5000)[:-40]}, "observations.csv.gz: cannot be read"),
    "a table twice": ({"conditions": CONDITIONS, "Conditions": CONDITIONS}, "table 'conditions' is there twice"),
}


@pytest.mark.parametrize("case", SYNTHEA_REFUSED)
def test_synthea_refused(case, tmp_path):
    tables, message = SYNTHEA_REFUSED[case]
    refused(message, lambda: read_synthea(synthea(tmp_path / "s", **tables)))


def codes(table): return set(table.events["code"])


SYNTHEA_READ = {
    "event of an unknown patient": ({"conditions": CONDITIONS + "1961-05-04,,nobody,e-1,1,x\n"}, lambda t: t.set_aside == {"event of a patient missing from the patient table": 1}),
    "a patient repeated": ({"patients": PATIENTS + PATIENTS.split("\n", 1)[1]}, lambda t: t.set_aside == {"patients.csv: repeated row": 2}),
    "a date that is none": ({"conditions": CONDITIONS + f"someday,,{ID},e-1,1,x\n"}, lambda t: t.set_aside == {"conditions.csv: no readable date": 1}),
    "neither code nor description": ({"conditions": CONDITIONS + f"1961-05-04,,{ID},e-1,,\n"}, lambda t: t.set_aside == {"conditions.csv: no code": 1}),
    "a blank code": ({"conditions": CONDITIONS + f"1961-05-04,,{ID},e-1,,Sprain\n"}, lambda t: "SYNTHEA//Sprain" in codes(t)),
    "codes that were floats": ({"conditions": CONDITIONS.replace("44054006", "44054006.0")}, lambda t: "SNOMED//44054006" in codes(t)),
    "an event before birth": ({"conditions": CONDITIONS + "1900-01-01,,u-2,,1,x\n"}, lambda t: t.set_aside == {"event before birth": 1}),
    "a byte order mark": ({"patients": "\ufeff" + PATIENTS}, lambda t: t.n_patients == 2),
    "an empty table": ({"procedures": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION\n"}, lambda t: t.rows_read["procedures.csv"] == 0),
    "infinite and NaN results": ({"observations": f"DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,VALUE\n1961-05-04,{ID},e-1,1-1,x,inf\n1961-05-04,{ID},e-1,1-2,x,NaN\n"},
                                 lambda t: {"LOINC//1-1//inf", "LOINC//1-2//NaN"} <= codes(t) and t.events["numeric_value"].null_count() == len(t.events)),
    "events without an encounter": ({}, lambda t: any("1 events name no encounter" in note for note in t.notes) and len(visit_table(t.events)) == 2),
}


@pytest.mark.parametrize("case", SYNTHEA_READ)
def test_synthea_read(case, tmp_path):
    tables, holds = SYNTHEA_READ[case]
    table = read_synthea(synthea(tmp_path / "s", **tables))
    pieces = synthea_source(tmp_path / "s").table(rows=1)
    assert pieces.events.equals(table.events) and (pieces.set_aside, pieces.notes, pieces.names) == (table.set_aside, table.notes, table.names)
    assert {"SNOMED//185349003", "SNOMED//44054006", "GENDER//F"} <= codes(table) and holds(table), (table.set_aside, table.notes)


CSV = f"subject_id,time,code,numeric_value\n{ID},1961-05-04,{CODE},1.5\nb,,B,\n"
MAP = {"subject_id": "mrn"}


def text(content, name="t.csv"):
    "A maker of a file with that content."
    def make(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name
    return make


def pandas(**columns): return lambda folder: pd.DataFrame({"subject_id": [ID, 2], "time": [DAY, DAY], "code": [CODE, "B"]} | columns)


def feather(one):
    def make(folder):
        one.write_ipc(folder / "t.feather")
        return folder / "t.feather"
    return make


TABLE_REFUSED = {  # name -> maker of the source, mapping, message
    "no code": (text(CSV.replace("code", "kode")), None, "t.csv: no column code; found subject_id, time, kode, numeric_value. Map yours"),
    "mapped to a column that is not there": (text(CSV), MAP, "t.csv: no column mrn"),
    "value mapped to a column that is not there": (text(CSV), {"numeric_value": "amount"}, "t.csv: no column amount"),
    "a mapping of no column of ours": (text(CSV), {"patient": "subject_id"}, "columns: patient is no column of an event table"),
    "a mapping to a number": (text(CSV), {"time": 1}, "columns: the column for time is a int; expected its name as text"),
    "no header": (text(CSV.split("\n", 1)[1]), None, "is the header missing?"),
    "semicolons": (text(CSV.replace(",", ";")), None, "Is it separated by semicolons? Save it with commas or tabs"),
    "a header twice": (text(CSV.replace("numeric_value", "code")), None, "t.csv: column code is there more than once"),
    "no date that can be read": (text(CSV.replace("1961-05-04", "4 May 1961")), None, "no date in column time can be read; the first, in row 0, has the form '9 aaa 9999'"),
    "an empty file": (text(""), None, "t.csv: cannot be read"),
    "a header alone": (text(CSV.split("\n")[0] + "\n"), None, "no rows"),
    "a row too long": (text(CSV + f"{ID},1961-05-04,{CODE},1,2,3\n"), None, "t.csv: cannot be read"),
    "Latin-1": (text(CSV.encode() + f"{ID},1961-05-04,HUSH f\xe8vre,1\n".encode("latin-1")), None, "t.csv: cannot be read"),
    "a torn archive": (text(gzip.compress(CSV.encode() * 1000)[:-30], "t.csv.gz"), None, "t.csv.gz: cannot be read"),
    "a torn Parquet file": (text(TORN, "t.parquet"), None, "t.parquet: cannot be read"),
    "a torn Arrow file": (text(b"ARROW1" + bytes(90), "t.arrow"), None, "t.arrow: cannot be read"),
    "a spreadsheet": (text(CSV, "t.xlsx"), None, "t.xlsx: cannot be read as a table"),
    "no file": (lambda folder: folder / "t.csv", None, "no such file"),
    "pandas with a column twice": (lambda f: pd.DataFrame([[ID, DAY, CODE, CODE]], columns=["subject_id", "time", "code", "code"]), None, "table: column code is there more than once"),
    "Arrow with a column twice": (lambda f: arrow(["subject_id", "time", "code", "code"], [ID], [DAY], [CODE], [CODE]), None, "table: column code is there more than once"),
    "objects of mixed types": (pandas(subject_id=np.array([ID, "HUSH"], dtype=object)), None, "table: column 'subject_id' mixes types"),
    "ids that are no whole numbers": (pandas(subject_id=[4321.5, 2.0]), None, "column 'subject_id' is Float64 and holds values that are no exact integers"),
    "ids of 2**63 and more": (pandas(subject_id=np.array([2**63 + ID, 2], dtype="uint64")), None, "do not fit Int64"),
    "boolean ids": (pandas(subject_id=[True, False]), None, "column 'subject_id' is Boolean"),
    "times as integers": (pandas(time=[4321, 4321]), None, "column 'time' is Int64, expected a date or text"),
    "no table at all": (lambda folder: {"subject_id": [ID]}, None, "expected a polars, pandas or Arrow table, or a path"),
}


@pytest.mark.parametrize("case", TABLE_REFUSED)
def test_table_refused(case, tmp_path):
    make, columns, message = TABLE_REFUSED[case]
    source = make(tmp_path)
    refused(message, lambda: read_table(source, columns))


TWO = {"subject_id": [ID, 2], "time": [DAY, DAY], "code": [CODE, "B"], "numeric_value": [1.5, None]}
TABLE_READ = {  # name -> maker of the source, mapping, what is true of the table
    "a byte order mark": (text("\ufeff" + CSV), None, lambda t: len(t.events) == 2),
    "tabs": (text(CSV.replace(",", "\t"), "t.tsv"), None, lambda t: len(t.events) == 2),
    "compressed": (text(gzip.compress(CSV.encode()), "t.csv.gz"), None, lambda t: len(t.events) == 2 and t.rows_read == {"t.csv.gz": 2}),
    "an Arrow file": (feather(pl.DataFrame(TWO)), None, lambda t: t.events["numeric_value"].to_list() == [None, 1.5]),
    "a lazy frame": (lambda f: pl.LazyFrame(TWO), None, lambda t: len(t.events) == 2),
    "an Arrow table": (lambda f: pl.DataFrame(TWO).to_arrow(), None, lambda t: len(t.events) == 2),
    "pandas": (pandas(numeric_value=[1.5, np.nan]), None, lambda t: t.events["numeric_value"].null_count() == 1),
    "pandas nullable": (pandas(subject_id=pd.array([ID, 2], dtype="Int64"), code=pd.array([CODE, "B"], dtype="string"), numeric_value=pd.array([1.5, None], dtype="Float64")), None, lambda t: t.n_patients == 2),
    "pandas with pyarrow": (lambda f: pd.DataFrame(TWO).convert_dtypes(dtype_backend="pyarrow"), None, lambda t: t.n_patients == 2 and t.events["numeric_value"].null_count() == 1),
    "objects of one type": (lambda f: pd.DataFrame(TWO).astype(object), None, lambda t: t.n_patients == 2),
    "an odd column that is not used": (pandas(other=np.array([1, "HUSH"], dtype=object)), None, lambda t: t.n_patients == 2),
    "categorical columns": (pandas(subject_id=pd.Categorical(["p", "q"]), code=pd.Categorical([CODE, "B"])), None, lambda t: t.n_patients == 2 and CODE in codes(t)),
    "float ids with a gap": (pandas(subject_id=[float(ID), np.nan]), None, lambda t: t.set_aside == {"table: no patient": 1} and t.events["subject_id"].to_list() == [ID]),
    "negative ids beyond 2**53": (pandas(subject_id=[HUGE, -1]), None, lambda t: t.events["subject_id"].to_list() == [HUGE, -1]),
    "infinite values": (pandas(numeric_value=[np.inf, 1.0]), None, lambda t: t.events["numeric_value"].null_count() == 1 and "1 values in column numeric_value are no numbers" in t.notes[0]),
    "numbers as codes": (pandas(code=[4019, 25000]), None, lambda t: codes(t) == {"4019", "25000"}),
    "zones": (text(CSV.replace("1961-05-04", "1961-05-04T11:30:00+02:00")), None, lambda t: t.events["time"].max() == DAY),
    "years 1 and 9999": (text(CSV + "b,0001-01-01,B,\nb,9999-12-31,B,\n"), None, lambda t: (t.events["time"].min().year, t.events["time"].max().year) == (1, 9999)),
    "unicode, commas, newlines": (text(CSV + 'b,2000-01-01,"Größe, 身長\nzwei",3\n'), None, lambda t: "Größe, 身長\nzwei" in codes(t)),
    "duplicate rows are kept": (text(CSV + CSV.split("\n", 1)[1]), None, lambda t: len(t.events) == 4),
    "mapped names": (text(CSV.replace("subject_id", "mrn")), MAP, lambda t: len(t.events) == 2),
    "two of ours from one of theirs": (text(CSV), {"visit_id": "subject_id"}, lambda t: t.events["visit_id"].to_list() == t.events["subject_id"].to_list()),
    "rows without patient, date and code": (text(CSV + " ,2000-01-01,B,\nb,someday,B,\nb,2000-01-01, ,\n"), None, lambda t: t.set_aside == {"t.csv: no patient": 1, "t.csv: no readable date": 1, "t.csv: no code": 1}),
}


@pytest.mark.parametrize("case", TABLE_READ)
def test_table_read(case, tmp_path):
    make, columns, holds = TABLE_READ[case]
    source = make(tmp_path)
    table = read_table(source, columns)
    assert table_source(source, columns).table(rows=1).events.equals(table.events)
    assert table.events.schema == pl.Schema(SCHEMA) and table.format == "table" and holds(table), (table.set_aside, table.notes, table.events)


def test_unreadable_dates_of_a_late_piece_are_set_aside(tmp_path):
    "Whether a column of dates is at fault is decided on all rows, not on the last few."
    rows = "".join(f"{i},2000-01-0{i + 1},B,\n" for i in range(4))
    source = table_source(text("subject_id,time,code,numeric_value\n" + rows + "7,someday,B,\n8,,B,\n")(tmp_path))
    table = source.table(rows=2)
    assert source.account.first_bad == {"t.csv: no readable date": ("t.csv", 4)} and table.set_aside == {"t.csv: no readable date": 1} and len(table.events) == 5 and table.rows_read == {"t.csv": 6}


def nested(folder): return synthea(folder / "output" / "csv").parents[1]


FOUND = {  # name -> maker of a source, what `detect_format` says or complains of
    "the top folder of Synthea": (nested, "s: holds no tables itself, but output/csv is a source of the format synthea. Give that folder."),
    "nothing": (lambda p: p.mkdir() or p, "found no CSV or Parquet file"),
    "other tables": (lambda p: p.mkdir() or text("a\n1\n", "prices.csv")(p).parent, "found prices, which is no OMOP"),
    "a file of an unknown kind": (lambda p: p.mkdir() or text("x", "a.docx")(p), "cannot tell the format of this file"),
    "no such place": (lambda p: p, "no such file or folder"),
}


@pytest.mark.parametrize("case", FOUND)
def test_detect_says_what_it_found(case, tmp_path):
    make, message = FOUND[case]
    refused(message, lambda: detect_format(make(tmp_path / "s")))


def test_detect_kinds(tmp_path):
    parts = tmp_path / "parts" / "condition_occurrence"
    parts.mkdir(parents=True)
    pl.DataFrame({"person_id": [1]}).write_parquet(parts / "part-0.parquet")
    assert detect_format(tmp_path / "parts") == "omop" and detect_format("postgresql://user:HUSH@server/cdm") == "omop"
    assert detect_format(synthea(tmp_path / "s")) == "synthea" and detect_format(meds(tmp_path / "m", GOOD)) == "meds"
    for suffix in ("csv", "csv.gz", "tsv", "feather", "arrow"): assert detect_format(text("x", f"t.{suffix}")(tmp_path)) == "table"


def test_open_events_names_what_it_opened(tmp_path):
    source = open_events(synthea(tmp_path / "s"))
    assert (source.format, source.name) == ("synthea", "s")
    table = read_events(text(CSV.replace("subject_id", "mrn"))(tmp_path), columns=MAP)
    assert (table.format, table.source) == ("table", "t.csv")
    one = meds(tmp_path / "m", GOOD.rename({"subject_id": "mrn"})) / "data" / "0.parquet"
    assert read_events(one, columns=MAP).format == "table"  # a mapping says that it is no MEDS
    refused("columns: a mapping is for plain tables, but the source is synthea", lambda: open_events(tmp_path / "s", columns=MAP))
    refused("schema: is for databases, but the source is synthea", lambda: open_events(tmp_path / "s", schema="cdm"))
    refused("format: expected one of omop, synthea, meds, table, got 'fhir'", lambda: open_events(tmp_path / "s", "fhir"))
