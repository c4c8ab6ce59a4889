"Bad tables, one line a case: the right result, or one sentence that names file, column and row and shows nothing of a patient."
import gzip
import os
import re

import polars as pl
import pytest

from ehr_sequencing.events import DEATH
from ehr_sequencing.omop import omop_source, read_omop

SECRET = "987654321"  # an id that no message may show
GOOD = {
    "person": f"person_id,gender_concept_id,year_of_birth\n1,8507,1950\n{SECRET},8532,1948\n",
    "condition_occurrence": f"person_id,condition_concept_id,condition_start_date,visit_occurrence_id,condition_source_value\n1,0,2010-05-04,11,I10\n{SECRET},0,2011-02-02,12,E11\n1,0,2012-03-03,,I21\n",
    "measurement": f"person_id,measurement_concept_id,measurement_date,value_as_number\n{SECRET},5,2011-02-03,7.9\n1,5,2012-02-03,8.1\n",
    "visit_occurrence": f"visit_occurrence_id,person_id,visit_concept_id,visit_start_date,visit_end_date\n11,1,9202,2010-05-04,2010-05-06\n12,{SECRET},9202,2011-02-02,\n",
    "concept": "concept_id,concept_name,vocabulary_id,concept_code\n5,HbA1c,LOINC,4548-4\n9202,Outpatient,Visit,OP\n",
    "death": f"person_id,death_date\n{SECRET},2015-01-01\n", "observation_period": "person_id,observation_period_end_date\n1,2016-12-31\n",
    "drug_exposure": "person_id,drug_concept_id,drug_exposure_start_date\n1,7,2012-03-03\n1,5,2012-03-03\n", "procedure_occurrence": "person_id,procedure_concept_id,procedure_date\n1,7,2012-03-03\n",
    "device_exposure": "person_id,device_concept_id,device_exposure_start_date\n1,7,2012-03-03\n", "observation": "person_id,observation_concept_id,observation_date,value_as_number\n1,7,2012-03-03,\n"}
CONDITIONS, PERSONS = "condition_occurrence", "person"


def write(folder, *changes):
    "The good tables with changes: (table, text, bytes, frame, or function of the folder); a frame becomes Parquet, None no file."
    changes = dict(changes)
    for name, good in GOOD.items():
        content = changes.get(name, good)
        if content is None: continue
        if isinstance(content, pl.DataFrame): content.write_parquet(folder / f"{name}.parquet")
        elif callable(content): content(folder)
        else: (folder / f"{name}.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def without(name, column): return name, GOOD[name].replace(column, "other")
def frame(name, **columns): return pl.read_csv(GOOD[name].encode(), try_parse_dates=True).with_columns(**columns)
def dates(*texts): return CONDITIONS, "person_id,condition_concept_id,condition_start_date,condition_source_value\n" + "".join(f"1,0,{t},C{i}\n" for i, t in enumerate(texts))
def ids(series, dtype=None): return pl.Series(series, dtype=dtype, strict=False)
def zipped(name, cut): return lambda folder: (folder / f"{name}.csv.gz").write_bytes(gzip.compress(GOOD[name].encode() * 30)[:cut])
def files(**contents): return lambda folder: [(folder / name.replace("_dot_", ".")).write_bytes(c) for name, c in contents.items()]


def damaged(folder):
    "A Parquet file with a page overwritten in the middle."
    path = folder / f"{CONDITIONS}.parquet"
    pl.concat([frame(CONDITIONS)] * 300).with_columns(condition_source_value=pl.int_range(pl.len()).hash().cast(pl.String)).write_parquet(path, row_group_size=200)
    data = bytearray(path.read_bytes())
    data[len(data) // 2:len(data) // 2 + 600] = b"\xff" * 600
    path.write_bytes(bytes(data))


def cut_parquet(folder):
    path = folder / f"{CONDITIONS}.parquet"
    frame(CONDITIONS).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])


def parts_that_differ(folder):
    (folder / CONDITIONS).mkdir()
    frame(CONDITIONS).write_parquet(folder / CONDITIONS / "part-0.parquet")
    frame(CONDITIONS).rename({"person_id": "subject"}).write_parquet(folder / CONDITIONS / "part-1.parquet")


def parts_of_two_kinds(folder):
    (folder / CONDITIONS).mkdir()
    frame(CONDITIONS).write_parquet(folder / CONDITIONS / "part-0.parquet")
    frame(CONDITIONS).write_csv(folder / CONDITIONS / "part-1.csv")


C = f"{CONDITIONS}.csv"
REFUSED = {  # what is wrong -> (changes, what the message says)
    "person: no person_id": ([without("person", "person_id")], "person.csv: no column person_id"),
    "person: no year of birth": ([without("person", "year_of_birth")], "person.csv: no column year_of_birth"),
    "visits: no visit_occurrence_id": ([without("visit_occurrence", "visit_occurrence_id")], "visit_occurrence.csv: no column visit_occurrence_id"),
    "visits: no person_id": ([without("visit_occurrence", "person_id")], "visit_occurrence.csv: no column person_id"),
    "visits: no start": ([without("visit_occurrence", "visit_start_date")], "visit_occurrence.csv: no column visit_start_date"),
    "visits: no concept": ([without("visit_occurrence", "visit_concept_id")], "visit_occurrence.csv: no column visit_concept_id"),
    "death: no date": ([without("death", "death_date")], "death.csv: no column death_date"),
    "death: no person_id": ([without("death", "person_id")], "death.csv: no column person_id"),
    "observation period: no end": ([without("observation_period", "observation_period_end_date")], "observation_period.csv: no column observation_period_end_date"),
    "conditions: no concept": ([without(CONDITIONS, "condition_concept_id")], f"{C}: no column condition_concept_id"),
    "drugs: no date": ([without("drug_exposure", "drug_exposure_start_date")], "drug_exposure.csv: no column drug_exposure_start_date"),
    "procedures: no date": ([without("procedure_occurrence", "procedure_date")], "procedure_occurrence.csv: no column procedure_date"),
    "devices: no date": ([without("device_exposure", "device_exposure_start_date")], "device_exposure.csv: no column device_exposure_start_date"),
    "measurements: no person": ([without("measurement", "person_id")], "measurement.csv: no column person_id"),
    "observations: no date": ([without("observation", "observation_date")], "observation.csv: no column observation_date"),
    "concepts: no code": ([without("concept", "concept_code")], "concept.csv: no column concept_code"),
    "no header": ([(CONDITIONS, f"{SECRET},0,2010-05-04,11,I10\n")], f"{C}: no column person_id, condition_concept_id|{C}: no column condition_start_date"),
    "ids are dates": ([("person", frame("person", person_id=pl.date(2010, 1, 1)))], "person.parquet: column 'person_id' is Date, expected an integer or text"),
    "ids are true and false": ([(CONDITIONS, frame(CONDITIONS, person_id=pl.col("person_id") == 1))], "condition_occurrence.parquet: column 'person_id' is Boolean"),
    "fractional ids": ([(CONDITIONS, frame(CONDITIONS, person_id=ids([1.0, 2.5, 3.5])))], "condition_occurrence.parquet: column 'person_id' is Float64 and holds values that are no exact integers, first in row 1"),
    "ids beyond 2**53 as floats": ([(CONDITIONS, frame(CONDITIONS, person_id=ids([1.0, float(SECRET), 2.0**60])))], "column 'person_id' is Float64 and holds values that are no exact integers, first in row 2"),
    "fractional decimal ids": ([(CONDITIONS, frame(CONDITIONS, person_id=ids(["1.0", "2.5", "3"]).cast(pl.Decimal(38, 2))))], r"'person_id' is Decimal\(.*\) and holds values that are no exact integers, first in row 1"),
    "infinite ids": ([(CONDITIONS, frame(CONDITIONS, person_id=ids([1.0, 2.0, float("inf")])))], "no exact integers, first in row 2"),
    "unsigned ids": ([(CONDITIONS, frame(CONDITIONS, visit_occurrence_id=ids([1, 2, 2**63 + 5], pl.UInt64)))], "column 'visit_occurrence_id' holds ids of 2\\*\\*63 or more, first in row 2"),
    "nobody has an id": ([("person", "person_id,year_of_birth\nx,1950\ny,1951\n")], "person.csv: no person with an integer person_id among 2 rows"),
    "one id, two births": ([("person", GOOD["person"] + f"1,8507,1951\n{SECRET},8532,1949\n1,8507,1952\n")], "person.csv: column 'person_id' holds 2 ids more than once with different contents, first in row 2"),
    "one visit, two people": ([("visit_occurrence", GOOD["visit_occurrence"] + "11,2,9202,2010-05-04,2010-05-06\n")], "visit_occurrence.csv: column 'visit_occurrence_id' holds 1 ids more than once with different contents, first in row 2"),
    "dates as Americans write them": ([dates("", "05/04/2010", "13/04/2010")], f"{C}: no date in column condition_start_date can be read; the first, in row 1, has the form '99/99/9999'"),
    "dates with names of months": ([dates("4 May 2010")], "has the form '9 aaa 9999'"),
    "years alone": ([dates("2010", "2011")], "the first, in row 0, has the form '9999'"),
    "dates as numbers": ([(CONDITIONS, frame(CONDITIONS, condition_start_date=pl.lit(20100504)))], "condition_occurrence.parquet: column 'condition_start_date' is Int32, expected a date or text"),
    "empty file": ([(CONDITIONS, "")], f"{C}: cannot be read \\(the file is empty\\)"),
    "empty person": ([("person", "person_id,year_of_birth\n")], "person.csv: no person with an integer person_id among 0 rows"),
    "truncated gzip": ([(CONDITIONS, zipped(CONDITIONS, -40))], f"{C}.gz: cannot be read \\(the compressed data are cut short or damaged\\)"),
    "gzip cut in its first bytes": ([(CONDITIONS, zipped(CONDITIONS, 12))], f"{C}.gz: cannot be read"),
    "Parquet of another schema": ([(CONDITIONS, pl.DataFrame({"a": [1]}))], "condition_occurrence.parquet: no column condition_start_date; found a"),
    "truncated Parquet": ([(CONDITIONS, cut_parquet)], "condition_occurrence.parquet: cannot be read"),
    "damaged Parquet page": ([(CONDITIONS, damaged)], "condition_occurrence.parquet: cannot be read"),
    "text that is called Parquet": ([(CONDITIONS, files(condition_occurrence_dot_parquet=GOOD[CONDITIONS].encode()))], "condition_occurrence.parquet: cannot be read"),
    "a row with too many fields": ([(CONDITIONS, GOOD[CONDITIONS] + "1,0,2010-05-04,11,I10,more\n")], f"{C}: cannot be read \\(row 3 has 6 fields where the header has 5\\)"),
    "an unquoted comma in a code": ([(CONDITIONS, GOOD[CONDITIONS].replace("E11", "E11, old"))], f"{C}: cannot be read \\(row 1 has 6 fields"),
    "a quote that never ends": ([(CONDITIONS, GOOD[CONDITIONS].replace("E11", '"E11'))], f"{C}: cannot be read"),
    "Latin-1": ([(CONDITIONS, GOOD[CONDITIONS].replace("E11", "fièvre").encode("latin-1"))], f"{C}: cannot be read \\(row 1 holds bytes that are no UTF-8 in column 'condition_source_value'\\)"),
    "UTF-16": ([(CONDITIONS, GOOD[CONDITIONS].encode("utf-16"))], f"{C}: cannot be read"),
    "duplicate column": ([(CONDITIONS, GOOD[CONDITIONS].replace("visit_occurrence_id", "Person_ID"))], f"{C}: column person_id is there more than once"),
    "a table twice": ([(CONDITIONS, files(condition_occurrence_dot_csv=GOOD[CONDITIONS].encode(), Condition_Occurrence_dot_csv_dot_gz=gzip.compress(GOOD[CONDITIONS].encode())))],
                      "table 'condition_occurrence' is there twice, as Condition_Occurrence.csv.gz and condition_occurrence.csv"),
    "parts with different columns": ([(CONDITIONS, parts_that_differ)], "condition_occurrence/part-1.parquet: no column person_id, which the first part has"),
    "parts of two kinds": ([(CONDITIONS, parts_of_two_kinds)], "table 'condition_occurrence' is there twice, as part-0.parquet and part-1.csv"),
    "no clinical table": ([(name, None) for name in GOOD if name.endswith(("occurrence", "exposure", "ment", "ation"))], "none of the tables condition_occurrence, "),
    "no person table": ([("person", None)], "no table person; found concept, condition_occurrence"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    changes, message = REFUSED[case]
    for rows in (1, 1000):  # the same sentence whatever the size of the pieces
        with pytest.raises((ValueError, TypeError), match=message) as caught: omop_source(write_once(tmp_path, changes)).table(rows)
        said = str(caught.value)
        assert SECRET not in said and not re.search(r"\d{4}-\d\d-\d\d (?!or )", said.replace("such as 2010-05-04 or", "")) and len(said.splitlines()) == 1
        assert caught.value.__cause__ is None and "E11" not in said


def write_once(folder, changes):
    return folder if any(folder.iterdir()) else write(folder, *changes)


def conditions(table): return sorted(c.removeprefix("CONDITION//") for c in table.events["code"] if c.startswith("CONDITION//"))
def aside(table): return {k.removeprefix(f"{CONDITIONS}.csv: ").removeprefix(f"{CONDITIONS}.parquet: "): n for k, n in table.set_aside.items()}
def times(table): return sorted(str(t) for t, c in table.events.select("time", "code").iter_rows() if c.startswith("CONDITION//"))


READ = {  # what is odd -> (changes, what to look at, what it must be)
    "nothing": ([], conditions, ["E11", "I10", "I21"]),
    "float ids with NaN": ([(CONDITIONS, frame(CONDITIONS, person_id=ids([1.0, float("nan"), 1.0])))], lambda t: (conditions(t), aside(t)), (["I10", "I21"], {"no patient": 1})),
    "float ids as text": ([(CONDITIONS, GOOD[CONDITIONS].replace("1,0,", "1.0,0.0,"))], conditions, ["E11", "I10", "I21"]),
    "ids beyond 2**53 as text": ([("person", GOOD["person"].replace(SECRET, str(2**60 + 1))), (CONDITIONS, GOOD[CONDITIONS].replace(SECRET, str(2**60 + 1)))], lambda t: t.events["subject_id"].max(), 2**60 + 1),
    "ids beyond 2**63 as text": ([(CONDITIONS, GOOD[CONDITIONS].replace(SECRET, str(2**70)))], lambda t: (conditions(t), aside(t)), (["I10", "I21"], {"no patient": 1})),
    "unsigned ids that fit": ([(CONDITIONS, frame(CONDITIONS, person_id=ids([1, int(SECRET), 1], pl.UInt64)))], conditions, ["E11", "I10", "I21"]),
    "whole decimal ids": ([(CONDITIONS, frame(CONDITIONS, person_id=ids(["1", SECRET, "1"]).cast(pl.Decimal(38, 10))))], conditions, ["E11", "I10", "I21"]),
    "decimal ids that do not fit": ([(CONDITIONS, frame(CONDITIONS, person_id=ids(["1", str(10**25), "1"]).cast(pl.Decimal(38, 0))))], lambda t: (conditions(t), aside(t)), (["I10", "I21"], {"no patient": 1})),
    "negative ids": ([("person", GOOD["person"].replace(SECRET, str(-2**63))), (CONDITIONS, GOOD[CONDITIONS].replace(SECRET, str(-2**63)))], lambda t: (t.events["subject_id"].min(), conditions(t)), (-2**63, ["E11", "I10", "I21"])),
    "dates in several ISO forms": ([dates("2010-05-04", "2010-05-04 09:30:00", "2010-05-04T09:30:00.250Z", " 2010-05-04T09:30 ", "20xx", "")],
                                   lambda t: (times(t), aside(t)), (["2010-05-04 00:00:00", "2010-05-04 09:30:00", "2010-05-04 09:30:00", "2010-05-04 09:30:00.250000"], {"no readable date": 2})),
    "dates of mixed zones": ([dates("2010-05-04T11:30:00+02:00", "2010-05-04T04:30:00-05", "2010-05-04 15:00:00+05:30")], times, ["2010-05-04 09:30:00"] * 3),
    "a year among dates": ([dates("2010-05-04", "2010")], lambda t: (conditions(t), aside(t)), (["C0"], {"no readable date": 1})),
    "days that no calendar has": ([dates("2010-02-28", "2010-02-30", "2010-13-01", "0000-00-00")], lambda t: (conditions(t), aside(t)), (["C0"], {"no readable date": 3})),
    "a column without a date": ([dates("", "")], lambda t: (conditions(t), aside(t)), ([], {"no readable date": 2})),
    "header only": ([(CONDITIONS, GOOD[CONDITIONS].splitlines()[0] + "\n")], lambda t: (conditions(t), t.rows_read[C]), ([], 0)),
    "header without a newline": ([(CONDITIONS, GOOD[CONDITIONS].splitlines()[0])], lambda t: (conditions(t), t.rows_read[C]), ([], 0)),
    "Parquet without rows": ([(CONDITIONS, frame(CONDITIONS).clear())], conditions, []),
    "byte order mark": ([(CONDITIONS, b"\xef\xbb\xbf" + GOOD[CONDITIONS].encode())], conditions, ["E11", "I10", "I21"]),
    "lines that end as on Windows": ([(CONDITIONS, GOOD[CONDITIONS].replace("\n", "\r\n"))], conditions, ["E11", "I10", "I21"]),
    "names with blanks and capitals": ([(CONDITIONS, GOOD[CONDITIONS].replace("person_id,", " Person_ID ,"))], conditions, ["E11", "I10", "I21"]),
    "quotes, commas, newlines and letters": ([(CONDITIONS, GOOD[CONDITIONS].replace("E11", '"a, ""b""\nü 中"'))], conditions, ["I10", "I21", 'a, "b"\nü 中']),
    "blank lines": ([(CONDITIONS, GOOD[CONDITIONS].replace("\n1,", "\n\n,,,,\n1,"))], lambda t: (conditions(t), aside(t)), (["E11", "I10", "I21"], {})),
    "a row with too few fields": ([(CONDITIONS, GOOD[CONDITIONS] + "1,0\n")], lambda t: (conditions(t), aside(t)), (["E11", "I10", "I21"], {"no readable date": 1})),
    "repeated people": ([("person", GOOD["person"] + GOOD["person"].split("\n", 1)[1])], lambda t: (t.n_patients, t.set_aside["person.csv: repeated row"]), (2, 2)),
    "repeated visits": ([("visit_occurrence", GOOD["visit_occurrence"] + GOOD["visit_occurrence"].split("\n", 1)[1])], lambda t: (t.events["code"].to_list().count("Visit//OP"), t.set_aside["visit_occurrence.csv: repeated row"]), (2, 2)),
    "repeated conditions stay": ([(CONDITIONS, GOOD[CONDITIONS] + GOOD[CONDITIONS].split("\n", 1)[1])], conditions, ["E11", "E11", "I10", "I10", "I21", "I21"]),
    "repeated and contradicting concepts": ([("concept", GOOD["concept"] + "5,HbA1c,LOINC,4548-4\n5,Other,LOINC,1-1\n")], lambda t: (t.concepts[5], t.names["LOINC//4548-4"]), (["LOINC//4548-4"], "HbA1c")),
    "a concept without a name": ([("concept", GOOD["concept"].replace("HbA1c", ""))], lambda t: t.name_of("LOINC//4548-4"), "LOINC//4548-4"),
    "concepts as OHDSI ships them": ([("concept", GOOD["concept"].replace("HbA1c", '"Light" HbA1c').replace(",", "\t"))], lambda t: t.name_of("LOINC//4548-4"), '"Light" HbA1c'),
    "values that are no numbers": ([("measurement", GOOD["measurement"].replace("8.1", ">100"))], lambda t: t.notes, ["measurement.csv: 1 values in column value_as_number are no numbers, the first in row 1; those events have no value."]),
    "values that are too large": ([("measurement", GOOD["measurement"].replace("8.1", "1e300"))], lambda t: sorted(t.events["numeric_value"].drop_nulls().round(1)), [pytest.approx(7.9)]),
    "two deaths": ([("death", GOOD["death"] + f"{SECRET},2016-01-01\n")], lambda t: (t.events["code"].to_list().count(DEATH), t.set_aside), (1, {"repeated death record": 1})),
    "unknown patients": ([(CONDITIONS, GOOD[CONDITIONS].replace(SECRET, "77"))], lambda t: (conditions(t), t.set_aside), (["I10", "I21"], {"event of a patient missing from the patient table": 1})),
    "visit ids that are no integers": ([(CONDITIONS, GOOD[CONDITIONS].replace(",12,", ",v12,"))], lambda t: t.notes, [f"{C}: 1 visit ids are no integers, the first in row 1; those events form a visit a day."]),
    "a folder beside the tables": ([("death", lambda folder: (folder / "death").mkdir())], lambda t: "death" in t.rows_read, False),
}


@pytest.mark.parametrize("case", READ)
def test_read(case, tmp_path):
    changes, look, expected = READ[case]
    source = omop_source(write(tmp_path, *changes))
    for rows in (1, 2, 1000): assert look(source.table(rows)) == expected


def test_first_row_set_aside_is_named(tmp_path):
    source = omop_source(write(tmp_path, (CONDITIONS, GOOD[CONDITIONS] + "x,0,2010-05-04,,A\n1,0,someday,,A\n1,0,never,,A\n")))
    for rows in (1, 2, 1000):
        source.table(rows)
        assert source.account.first_bad == {f"{C}: no patient": (C, 3), f"{C}: no readable date": (C, 4)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path):
    write(tmp_path)
    (tmp_path / C).chmod(0)
    with pytest.raises(ValueError, match=f"{C}: may not be read by this user"): read_omop(tmp_path)


def test_a_folder_where_a_file_should_be(tmp_path):
    (tmp_path / C).mkdir()
    write(tmp_path, (CONDITIONS, None))
    assert C not in read_omop(tmp_path).rows_read
