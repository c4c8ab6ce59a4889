"The variants of formats that hospitals send, and inputs that must be refused in one sentence without a patient's value in it."
import datetime

import duckdb
import polars as pl
import pytest

from ehr_sequencing.events import visit_table
from ehr_sequencing.omop import read_omop
from ehr_sequencing.readers import read_meds, read_table
from ehr_sequencing.synthea import read_synthea

PERSON = "PERSON_ID,GENDER_CONCEPT_ID,YEAR_OF_BIRTH,MONTH_OF_BIRTH,DAY_OF_BIRTH\n1,8507,1950,2,30\n2,8532,1951,0,0\n3,8532,1952,,\n"
CONDITION = "PERSON_ID,CONDITION_CONCEPT_ID,CONDITION_START_DATE,CONDITION_START_DATETIME,VISIT_OCCURRENCE_ID,CONDITION_SOURCE_VALUE\n1,0,2010-01-01,,5,I10\n2,0,2010-01-02,,6,E11.9\n"


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items(): (folder / f"{name}.csv").write_text(text)
    return folder


def codes(table): return set(table.events["code"])


def test_omop_upper_case_odd_births_and_concept_zero(tmp_path):
    concept = "CONCEPT_ID\tCONCEPT_NAME\tVOCABULARY_ID\tCONCEPT_CODE\n0\tNo matching concept\tNone\tNone\n"  # tabs, as OHDSI ships it
    table = read_omop(write(tmp_path / "o", PERSON=PERSON, CONDITION_OCCURRENCE=CONDITION, CONCEPT=concept))
    assert {"CONDITION//I10", "CONDITION//E11.9"} <= codes(table)
    births = table.events.filter(pl.col("code") == "MEDS_BIRTH")["time"].dt.date().to_list()
    assert births == [datetime.date(1950, 2, 1), datetime.date(1951, 1, 1), datetime.date(1952, 1, 1)]


def test_omop_optional_table_without_a_single_date(tmp_path):
    period = "person_id,observation_period_end_date\n1,\n2,\n"
    table = read_omop(write(tmp_path / "o", person=PERSON, condition_occurrence=CONDITION, observation_period=period))
    assert table.set_aside == {"observation_period.csv: no readable date": 2}


def test_omop_visit_without_an_end_is_in_the_visit_table(tmp_path):
    visits = "visit_occurrence_id,person_id,visit_concept_id,visit_start_date,visit_end_date\n5,1,9202,2010-01-01,\n6,2,9202,2010-01-02,2010-01-03\n"
    table = read_omop(write(tmp_path / "o", person=PERSON, condition_occurrence=CONDITION, visit_occurrence=visits))
    assert not any("named by events only" in note for note in table.notes) and len(visit_table(table.events)) == 2


@pytest.fixture
def database(tmp_path):
    "A DuckDB file made by the given statements."
    def make(*statements):
        path = tmp_path / "cdm.duckdb"
        connection = duckdb.connect(str(path))
        for statement in statements: connection.execute(statement)
        connection.close()
        return path
    return make


TABLES = ("create table person as select 1::bigint person_id, 8507 gender_concept_id, 1950 year_of_birth",
          "create table condition_occurrence as select 1::bigint person_id, 1 condition_concept_id, date '2010-01-01' condition_start_date, 'I10' condition_source_value")


def test_duckdb_table_in_two_schemas_is_refused(database):
    with pytest.raises(ValueError, match="'person' is there more than once"):
        read_omop(database(*TABLES, "create schema staging", "create table staging.person as select 7::bigint person_id, 1950 year_of_birth"))


def test_duckdb_unrelated_view_and_infinite_date(database, tmp_path):
    (tmp_path / "gone.csv").write_text("a\n1\n")
    path = database(*TABLES, f"create view elsewhere as select * from read_csv('{tmp_path}/gone.csv')", 'create table "we""ird" as select 1 a',
                    "insert into condition_occurrence values (1, 1, date 'infinity', 'E11')")
    (tmp_path / "gone.csv").unlink()
    table = read_omop(path)
    assert "CONDITION//I10" in codes(table) and table.set_aside == {"condition_occurrence: no readable date": 1}


def test_synthea_parquet_with_integer_codes_and_start_stop(tmp_path):
    pl.DataFrame({"Id": ["10", "A11"], "BIRTHDATE": ["1960-01-01", "1961-01-01"]}).write_parquet(tmp_path / "patients.parquet")
    pl.DataFrame({"Id": ["e1", "e2"], "START": ["2010-01-01T09:00:00Z"] * 2, "STOP": ["2010-01-01T10:00:00Z"] * 2, "PATIENT": ["10", "10"],
                  "CODE": [185349003, 308646001]}).write_parquet(tmp_path / "encounters.parquet")
    pl.DataFrame({"START": ["2010-01-01"], "STOP": ["2010-01-01"], "PATIENT": ["10"], "ENCOUNTER": ["e1"], "CODE": [44054006]}).write_parquet(tmp_path / "procedures.parquet")
    table = read_synthea(tmp_path)
    assert "SNOMED//44054006" in codes(table) and "SNOMED//308646001" not in codes(table) and len(visit_table(table.events)) == 1


def test_synthea_of_2017(tmp_path):
    table = read_synthea(write(tmp_path / "s", patients="ID,BIRTHDATE,DEATHDATE\nu,1960-01-01,\n", encounters="ID,DATE,PATIENT,CODE,DESCRIPTION\ne,2010-05-04,u,185349003,Visit\n",
                               conditions="START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION\n2010-05-04,,u,e,44054006,Diabetes\n"))
    assert {"SNOMED//185349003", "SNOMED//44054006"} <= codes(table) and len(visit_table(table.events)) == 1


def test_meds_variants(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    frame = pl.DataFrame({"patient_id": pl.Series([1, 2], dtype=pl.Int32), "timestamp": pl.Series([datetime.datetime(2010, 1, 1, 23)] * 2).dt.cast_time_unit("ns").dt.replace_time_zone("UTC"),
                          "code": pl.Series(["A", "B"], dtype=pl.Enum(["A", "B"])), "value": [1.5, None], "extra": ["x", "y"]})
    frame.write_parquet(data / "0.parquet")
    frame.clear().write_parquet(data / "1.parquet")
    (tmp_path / "metadata").mkdir()
    pl.DataFrame({"code": ["A"]}).write_parquet(tmp_path / "metadata" / "codes.parquet")
    table = read_meds(tmp_path)
    assert codes(table) == {"A", "B"} and table.events["numeric_value"].to_list() == [1.5, None] and table.rows_read == {"0.parquet": 2, "1.parquet": 0}


def test_table_ids_and_values(tmp_path):
    rows = 'subject_id,time,code,numeric_value\n007,2010-01-01,A, 5\n7,2010-01-01, A,>100\n" ",2010-01-01,A,1\n8,2010-01-01, ,1\n'
    (tmp_path / "t.csv").write_text(rows)
    table = read_table(tmp_path / "t.csv")
    assert table.n_patients == 2 and codes(table) == {"A"}
    assert table.set_aside == {"t.csv: no patient": 1, "t.csv: no code": 1} and "1 values in column numeric_value are no numbers" in table.notes[0]


def test_a_file_without_header_is_not_quoted(tmp_path):
    (tmp_path / "t.csv").write_text("90210,2011-03-04,ICD10CM//B20\n90211,2011-03-05,ICD10CM//B20\n")
    with pytest.raises(ValueError, match="is the header missing") as caught: read_table(tmp_path / "t.csv")
    assert "90210" not in str(caught.value) and "B20" not in str(caught.value)
