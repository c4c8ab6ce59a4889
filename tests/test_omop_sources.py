"One OMOP data set, wherever it lies: files of every kind, DuckDB, SQLite and a PostgreSQL server give the same events, row for row."
import csv
import gzip
import io
import re
import sqlite3
import threading
from urllib.parse import quote

import duckdb
import polars as pl
import pytest
from postgres import PASSWORD

from ehr_sequencing.events import DEATH, OBSERVATION_END, visit_table
from ehr_sequencing.omop import eunomia_path, omop_source, read_omop

BIG = 2**60 + 1  # an id that no float holds
PERSON = f"""person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth,birth_datetime,race_concept_id,race_source_value,ethnicity_concept_id,person_source_value
{-BIG},8532,1950,,,,0,,0,a
{BIG},8507,1948,11,31,,0,white,0,b
3,8507,1960,2,29,1960-02-29 07:30:00,8527,,0,c
3,8507,1960,2,29,1960-02-29 07:30:00,8527,,0,c
4,0,,,,,0,,0,d
"""
CONDITION = f"""condition_occurrence_id,person_id,condition_concept_id,condition_start_date,condition_start_datetime,visit_occurrence_id,condition_source_value,condition_source_concept_id
1,{-BIG},320128,2010-05-04,2010-05-04 09:30:00,11,I10,0
2,{-BIG},201826,,,12,E11,0
3,{BIG},0,2011-02-02,,{BIG},"I21, ""acute"" ünïcode
second line",0
4,99,320128,2012-01-01,,,I10,0
5,,320128,2012-01-01,,,I10,0
6,3,0,2013-05-05,2013-05-05 23:59:59.123456,0,,45
7,3,0,2013-05-05,,,,
8,3,4711,1900-01-01,,,X,0
"""
MEASUREMENT = f"""measurement_id,person_id,measurement_concept_id,measurement_date,measurement_datetime,value_as_number,visit_occurrence_id,measurement_source_value,measurement_source_concept_id
{BIG},{BIG},3004410,2011-02-03,2011-02-03 06:00:00,7.9,,,0
{BIG + 1},3,3004410,2014-01-01,,,15,,0
{BIG + 2},3,3004410,2014-01-01,,-0.125,15,,0
-7,4,3004410,2015-06-01,,1000000,,,0
"""
OTHERS = {
    "drug_exposure": f"drug_exposure_id,person_id,drug_concept_id,drug_exposure_start_date,drug_exposure_start_datetime,visit_occurrence_id,drug_source_value,drug_source_concept_id\n1,{BIG},1503297,2011-02-04,,,metformin  ,0\n2,3,0,2014-01-02,,15,aspirin,0\n",
    "death": f"person_id,death_date,death_datetime\n{BIG},2012-02-09,\n3,2020-01-01,2020-01-01 04:00:00\n",
    "observation_period": f"observation_period_id,person_id,observation_period_start_date,observation_period_end_date\n1,{-BIG},2009-01-01,2015-12-31\n2,{-BIG},2009-01-01,2016-12-31\n3,3,2009-01-01,\n",
    "concept": ('concept_id,concept_name,domain_id,vocabulary_id,concept_code\n0,No matching concept,Metadata,None,No matching concept\n320128,"Hypertension, ""essential""",Condition,SNOMED,59621000\n'
                "3004410,HbA1c,Measurement,LOINC,4548-4\n9202,Outpatient visit,Visit,Visit,OP\n1503297,metformin,Drug,RxNorm,6809\n45,Source code,Condition,ICD10,X45\n8527,White,Race,Race,5\n5,never used,Drug,RxNorm,1\n")}
VISIT = {  # the version decides what the columns of a visit are called
    "5.3": ("admitting_source_concept_id", "discharge_to_concept_id"), "5.4": ("admitted_from_concept_id", "discharged_to_concept_id")}
DEVICE = {"5.3": "", "5.4": ",production_id,unit_concept_id"}
PROCEDURE = {"5.3": "", "5.4": ",procedure_end_date,procedure_end_datetime"}


def tables(version):
    "Table name -> CSV text, in one version of the common data model."
    came, went = VISIT[version]
    later = version == "5.4"
    return OTHERS | {
        "person": PERSON, "condition_occurrence": CONDITION, "measurement": MEASUREMENT,
        "visit_occurrence": f"visit_occurrence_id,person_id,visit_concept_id,visit_start_date,visit_start_datetime,visit_end_date,visit_end_datetime,{came},{went}\n"
                            f"11,{-BIG},9202,2010-05-04,,2010-05-06,,0,0\n15,3,9201,2014-01-01,2014-01-01 10:00:00,2014-01-03,2014-01-03 18:00:00,8870,0\n"
                            f"15,3,9201,2014-01-01,2014-01-01 10:00:00,2014-01-03,2014-01-03 18:00:00,8870,0\n16,98,9202,2014-01-01,,,,0,0\n",
        "procedure_occurrence": f"procedure_occurrence_id,person_id,procedure_concept_id,procedure_date,procedure_datetime,visit_occurrence_id,procedure_source_value,procedure_source_concept_id{PROCEDURE[version]}\n"
                                f"1,3,0,2014-01-02,2014-01-02 11:00:00,15,0BJ08ZZ,0{',2014-01-02,2014-01-02 12:00:00' if later else ''}\n",
        "device_exposure": f"device_exposure_id,person_id,device_concept_id,device_exposure_start_date,device_exposure_start_datetime,visit_occurrence_id,device_source_value,device_source_concept_id{DEVICE[version]}\n"
                           f"1,3,0,2014-01-02,,15,pump,0{',serial 9,0' if later else ''}\n",
        "observation": "observation_id,person_id,observation_concept_id,observation_date,observation_datetime,value_as_number,visit_occurrence_id,observation_source_value,observation_source_concept_id\n1,3,0,2014-01-02,,2.5,15,smoker,0\n"}


def typed(text):
    "A CSV as a frame with the types that a database would have."
    frame, types = pl.read_csv(text.encode(), infer_schema=False), {}
    for c in frame.columns:
        if c.endswith("datetime"): types[c] = pl.col(c).str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="us")
        elif c.endswith("date"): types[c] = pl.col(c).str.to_date()
        elif c == "value_as_number": types[c] = pl.col(c).cast(pl.Float64)
        elif c.endswith("_of_birth") or c.endswith("_id") and c not in ("vocabulary_id", "domain_id", "production_id"): types[c] = pl.col(c).cast(pl.Int64)
    return frame.with_columns(**types)


def as_csv(folder, data):
    for name, text in data.items(): (folder / f"{name}.csv").write_bytes(text.encode())
    return folder


def as_upper_gz(folder, data):
    for name, text in data.items():
        header, _, body = text.partition("\n")
        (folder / f"{name.upper()}.CSV.GZ").write_bytes(gzip.compress((header.upper() + "\n" + body).encode()))
    return folder


def as_parquet(folder, data):
    for name, text in data.items(): typed(text).write_parquet(folder / f"{name}.parquet")
    return folder


def as_parts(folder, data):
    for name, text in data.items():
        (folder / name).mkdir()
        frame = typed(text)
        for i, part in enumerate((frame.head(2), frame.slice(2))): part.write_parquet(folder / name / f"part-{i}.parquet")
        (folder / name / "_SUCCESS").touch()
    return folder


def as_csv_parts(folder, data):
    for name, text in data.items():
        (folder / name).mkdir()
        frame = pl.read_csv(text.encode(), infer_schema=False)
        for i, part in enumerate((frame.head(1), frame.slice(1))): part.write_csv(folder / name / f"{i}.csv")
    return folder


def as_duckdb(folder, data):
    with duckdb.connect(str(folder / "cdm.duckdb")) as connection:
        for name, text in data.items():
            frame = typed(text)  # noqa: F841 (DuckDB finds it by its name)
            connection.execute(f'create table "{name.upper()}" as select * from frame')
    return folder / "cdm.duckdb"


def as_sqlite(folder, data):
    with sqlite3.connect(folder / "cdm.db") as connection:
        for name, text in data.items():
            header, *rows = csv.reader(io.StringIO(text))
            kinds = ["integer" if c.endswith("_id") and name != "concept" else "real" if c == "value_as_number" else "text" for c in header]
            connection.execute(f"create table {name} ({', '.join(f'{c} {k}' for c, k in zip(header, kinds))})")
            connection.executemany(f"insert into {name} values ({', '.join('?' * len(header))})", [[v or None for v in row] for row in rows])
    return f"sqlite:///{folder / 'cdm.db'}"


FILES = {"csv": as_csv, "upper-case csv.gz": as_upper_gz, "parquet": as_parquet, "parquet parts": as_parts, "csv parts": as_csv_parts, "duckdb": as_duckdb, "sqlite": as_sqlite}
SQL_TYPES = {pl.Int64: "bigint", pl.Float64: "numeric", pl.Date: "date", pl.Datetime("us"): "timestamp", pl.String: "varchar(400)"}


def fill_postgres(server, database, data, schema="public", kinds=None):
    "Make a database with these tables; the types of single columns can be chosen."
    server.sql(f"create database {database}")
    for name, frame in data.items(): copy_in(server, database, schema, name, frame, kinds or {})
    return server.url(database)


def copy_in(server, database, schema, name, frame, kinds):
    columns = ", ".join(f"{c} {kinds.get(c, SQL_TYPES.get(t, 'text'))}" for c, t in frame.schema.items())
    server.sql(f"create schema if not exists {schema}; create table {schema}.{name} ({columns});\n\\copy {schema}.{name} from pstdin with (format csv, header)\n" + frame.write_csv(), database)


@pytest.fixture(scope="module", params=["5.3", "5.4"])
def version(request): return request.param


@pytest.fixture(scope="module")
def expected(version, tmp_path_factory):
    "What the CSV files give, read whole."
    return read_omop(as_csv(tmp_path_factory.mktemp("expected"), tables(version)))


def plain(counts):
    "Counts by table, whatever the file is called."
    return {re.sub(r"\.csv(\.gz)?|\.parquet|/", "", k.lower()): n for k, n in counts.items()}


def assert_same(table, expected):
    assert table.events.equals(expected.events), table.events.join(expected.events, on=table.events.columns, how="anti", nulls_equal=True)
    assert table.names == expected.names and table.concepts == expected.concepts
    assert plain(table.rows_read) == plain(expected.rows_read) and plain(table.set_aside) == plain(expected.set_aside)
    assert [n.split(": ")[-1] for n in table.notes] == [n.split(": ")[-1] for n in expected.notes]


def test_what_the_data_hold(expected):
    "The expectation itself, by hand, so that agreement is not agreement in error."
    events = expected.events
    assert expected.set_aside == {"person.csv: repeated row": 1, "visit_occurrence.csv: repeated row": 1, "condition_occurrence.csv: no readable date": 1, "condition_occurrence.csv: no patient": 1,
                                  "condition_occurrence.csv: no code": 1, "event of a patient missing from the patient table": 2, "observation_period.csv: no readable date": 1, "event before birth": 1}
    assert set(events["subject_id"]) == {-BIG, BIG, 3, 4} and set(events["visit_id"].drop_nulls()) == {11, 15, BIG}
    code = lambda c: events.filter(pl.col("code") == c)
    assert str(code("SNOMED//59621000")["time"][0]) == "2010-05-04 09:30:00" and str(code("ICD10//X45")["time"][0]) == "2013-05-05 23:59:59.123456"
    assert code('CONDITION//I21, "acute" ünïcode\nsecond line').height == 1 and code("DRUG//aspirin").height == code("RxNorm//6809").height == code("PROCEDURE//0BJ08ZZ").height == code("DEVICE//pump").height == 1
    assert code("LOINC//4548-4")["numeric_value"].to_list() == [None, -0.125, 1e6, pytest.approx(7.9)]
    assert code(DEATH).height == 2 and str(code(OBSERVATION_END)["time"][0]) == "2016-12-31 00:00:00"
    assert expected.names == {"SNOMED//59621000": 'Hypertension, "essential"', "LOINC//4548-4": "HbA1c", "Visit//OP": "Outpatient visit", "RxNorm//6809": "metformin", "ICD10//X45": "Source code", "Race//5": "White"}
    assert len(visit_table(events)) == 7 and len(events) == 27


@pytest.mark.parametrize("kind", FILES)
def test_files_agree(kind, version, expected, tmp_path):
    assert_same(read_omop(FILES[kind](tmp_path, tables(version))), expected)


@pytest.mark.parametrize("kind", ["csv", "parquet parts", "duckdb", "sqlite"])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_size_of_pieces_does_not_matter(kind, rows, tmp_path):
    source = omop_source(FILES[kind](tmp_path, tables("5.4")))
    whole, first_bad = source.table(), source.account.first_bad
    assert_same(source.table(rows), whole)
    assert source.account.first_bad == first_bad and source.account.notes == whole.notes
    assert first_bad  # rows are set aside in these data
    frames = list(source.frames(rows))
    assert len(frames) > 11 and all(len(f) <= rows for f in frames[1:])  # the first holds the people


def test_first_bad_rows_are_those_of_the_file(tmp_path):
    source = omop_source(as_csv(tmp_path, tables("5.4")))
    for _ in source.frames(rows=2): pass
    table = "condition_occurrence.csv"
    assert source.account.first_bad == {"person.csv: repeated row": ("person.csv", 3), "visit_occurrence.csv: repeated row": ("visit_occurrence.csv", 2), f"{table}: no readable date": (table, 1), f"{table}: no patient": (table, 4),
                                        f"{table}: no code": (table, 6), "event of a patient missing from the patient table": ("visit_occurrence.csv", 3), "observation_period.csv: no readable date": ("observation_period.csv", 2)}


def test_frames_hold_only_the_schema_and_known_patients(tmp_path):
    source = omop_source(as_csv(tmp_path, tables("5.3")))
    everything = pl.concat(list(source.frames(rows=3)), how="diagonal")
    assert set(everything.columns) == set(source.table().events.columns) and set(everything["subject_id"]) == {-BIG, BIG, 3, 4}
    assert source.format == "omop" and source.name == tmp_path.name


# --- PostgreSQL

def test_postgres_agrees(postgres, version, expected, refusals):
    url = fill_postgres(postgres, f"cdm{version[-1]}", {name: typed(text) for name, text in tables(version).items()})
    assert_same(read_omop(url), expected)
    for rows in (1, 3): assert_same(omop_source(url).table(rows), expected)


def test_postgres_types(postgres, tmp_path):
    "Ids as numeric, upper-case quoted names, timestamps with a zone, infinite dates and fixed-width text."
    data = {name: typed(text) for name, text in tables("5.4").items()}
    kinds = {c: "numeric(19,0)" for c in ("person_id", "visit_occurrence_id", "measurement_id")} | {c: "timestamptz" for c in ("condition_start_datetime", "measurement_datetime")} | {
        "value_as_number": "numeric(20,6)", "condition_source_value": "text", "drug_source_value": "char(20)"}
    url = fill_postgres(postgres, "types", data, kinds=kinds)
    postgres.sql("alter database types set timezone to 'Asia/Tokyo'; alter database types set datestyle to 'SQL, DMY'")
    before = read_omop(as_parquet(tmp_path, tables("5.4")))
    for rows in (2, 100): assert_same(omop_source(url).table(rows), before)
    postgres.sql("insert into condition_occurrence (condition_occurrence_id, person_id, condition_concept_id, condition_start_date) values (70, 3, 320128, 'infinity'), (71, 3, 320128, '2015-01-01 BC')", "types")
    postgres.sql("insert into condition_occurrence (condition_occurrence_id, person_id, condition_concept_id, condition_start_datetime) values (72, 3, 320128, '2016-01-01 00:30:00+09')", "types")
    after = read_omop(url)
    assert after.set_aside["condition_occurrence: no readable date"] == before.set_aside["condition_occurrence.parquet: no readable date"] + 1
    assert after.set_aside["event before birth"] == before.set_aside["event before birth"] + 1
    assert "2015-12-31 15:30:00" in after.events.filter(pl.col("subject_id") == 3)["time"].cast(pl.String).str.slice(0, 19)
    postgres.sql('alter table measurement rename to "Measurement"; alter table "Measurement" rename person_id to "PERSON_ID"', "types")
    assert_same(read_omop(url), after)


@pytest.fixture(scope="module")
def refusals(postgres):
    "Logins that fail, begun here since the driver gives up after half a minute only: what the error should say -> the address, the thread that tries it, and what came of it."
    cases = {"this user and password": postgres.url("small", "ann", "wr0ng-s3cret"), "no such database": postgres.url("absent", "postgres", "s3cret"), "know this user": postgres.url("small", "bob", "s3cret")}
    errors = {}

    def attempt(words, url):
        try: read_omop(url)
        except Exception as error: errors[words] = error

    threads = [threading.Thread(target=attempt, args=case) for case in cases.items()]
    for t in threads: t.start()
    yield cases, threads, errors
    for t in threads: t.join()


@pytest.fixture(scope="module")
def small(postgres):
    "A database that the tests below only read."
    return fill_postgres(postgres, "small", {name: typed(text) for name, text in tables("5.4").items()})


def test_a_view_and_a_table_without_ids_can_be_read(postgres, small):
    frame = typed(CONDITION).drop("condition_occurrence_id")
    url = fill_postgres(postgres, "views", {name: typed(text) for name, text in tables("5.4").items() if name != "condition_occurrence"} | {"raw": frame})
    postgres.sql("create view condition_occurrence as select * from raw", "views")
    assert omop_source(url).table(rows=2).events.equals(read_omop(small).events)


def test_a_table_in_two_schemas_needs_a_choice(postgres):
    data = {name: typed(text) for name, text in tables("5.4").items()}
    url = fill_postgres(postgres, "schemas", data)
    copy_in(postgres, "schemas", "staging", "person", data["person"].head(1), {})
    with pytest.raises(ValueError, match=r"table 'person' is there more than once, as public.person and staging.person. Choose one with schema="): read_omop(url)
    assert read_omop(url, schema="PUBLIC").n_patients == 4
    with pytest.raises(ValueError, match="none of the tables"): read_omop(url, schema="staging")
    with pytest.raises(ValueError, match="no table in schema 'nowhere'; there are public, staging"): read_omop(url, schema="nowhere")


def test_password(postgres, small, monkeypatch):
    monkeypatch.delenv("PGPASSWORD", raising=False)
    url = postgres.url("small", "ann", quote(PASSWORD, safe=""))
    source = omop_source(url)
    assert source.table().n_patients == 4
    shown = f"{source.name} {source.tables!r} {source!r} {source.table().source}"
    assert source.name == f"postgresql://127.0.0.1:{postgres.port}/small" and "s3cret" not in shown
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert omop_source(postgres.url("small", "ann")).table().n_patients == 4


def test_no_server_there(postgres):
    "A port that nothing listens at is told at once."
    with pytest.raises(ConnectionError, match="no answer from 127.0.0.1 at port 1 ") as caught: read_omop("postgresql://ann:s3cret@127.0.0.1:1/cdm")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConnectionError, match="no answer from nowhere.invalid"): read_omop("postgresql://ann:s3cret@nowhere.invalid/cdm")


def test_a_table_that_may_not_be_read(postgres, small):
    postgres.sql("create role eve login; grant select on person, condition_occurrence to eve;"
                 "create table hidden as select 1 as a; create view device as select a / (a - 1) as person_id from hidden; grant select on device to eve", "small")
    tables = omop_source(postgres.url("small", "eve")).tables
    assert "measurement" not in tables  # what a user may not see is not listed
    with pytest.raises(ValueError, match="table device cannot be read"): list(tables.chunks("device", ["person_id"]))
    postgres.sql("revoke select on person from eve", "small")  # after the tables were listed
    with pytest.raises(ValueError, match="this user may not read table person. Grant SELECT on it."): list(tables.chunks("person", ["person_id"]))


def test_eunomia_in_postgres(postgres):
    "A whole database, copied from DuckDB: as many rows, the same events."
    whole = read_omop(eunomia_path())
    with duckdb.connect(str(eunomia_path()), read_only=True) as connection:
        names = [t for (t,) in connection.execute("select table_name from information_schema.tables").fetchall() if t.lower() in whole.rows_read]
        data = {name: connection.sql(f"select * from {name}").pl() for name in names}
    url = fill_postgres(postgres, "eunomia", data)
    copied = omop_source(url).table(rows=20_000)
    assert copied.rows_read == whole.rows_read and copied.events.equals(whole.events)
    assert copied.names == whole.names and copied.concepts == whole.concepts and copied.set_aside == whole.set_aside


def test_those_who_are_not_let_in(refusals):
    "Each of the logins that the first test with a database began has failed, says why, and gives no password away."
    cases, threads, errors = refusals
    for t in threads: t.join()
    for words in cases:
        error = errors[words]
        assert isinstance(error, ConnectionError) and words in str(error), error
        assert "s3cret" not in str(error) and error.__cause__ is None and error.__suppress_context__


def test_a_server_that_dies_half_way(postgres):
    fill_postgres(postgres, "doomed", {name: typed(text) for name, text in tables("5.4").items()})
    source = omop_source(postgres.url("doomed", "ann", quote(PASSWORD, safe="")))
    frames = source.frames(rows=1)
    try:
        with pytest.raises(ConnectionError) as caught:
            for frame in frames:
                if "condition_occurrence" in source.account.rows_read: postgres.kill()
    finally: postgres.start()
    message = str(caught.value)
    assert "condition_occurrence" in message and f"port {postgres.port}" in message and "s3cret" not in message and "ann" not in message.replace("cannot", "")
    assert source.table().n_patients == 4  # the server is back, and so is the source
