"Counts of the development data sets, as their READMEs state them; each test skips where the data are absent."
import polars as pl
from conftest import data_folder

from ehr_sequencing.events import DEATH, visit_table
from ehr_sequencing.readers import detect_format, read_events


def deaths(table):
    return table.events.filter(pl.col("code") == DEATH).height


def test_mimic_omop():
    path = data_folder("mimic-iv-demo-omop")
    assert detect_format(path) == "omop"
    table = read_events(path)
    assert table.n_patients == 100 and len(visit_table(table.events)) == 852 and deaths(table) == 15
    read = table.rows_read
    assert read["condition_occurrence.csv.gz"] == 16441 and read["drug_exposure.csv.gz"] == 18229
    assert read["procedure_occurrence.csv.gz"] == 18447 and read["device_exposure.csv.gz"] == 3855
    assert table.events["subject_id"].min() < -(2**53)  # negative 64-bit hashes came through exactly
    persons = pl.read_csv(path / "person.csv", columns=["person_id"], schema_overrides={"person_id": pl.Int64})["person_id"]
    assert set(persons) == set(table.events["subject_id"])
    assert not table.events["code"].str.contains(r"\s$").any()  # source values have trailing blanks
    assert set(table.set_aside) <= {"event after death"}


def test_mimic_meds():
    path = data_folder("mimic-iv-demo-meds")
    table = read_events(path)
    assert table.format == "meds" and table.n_patients == 100 and deaths(table) == 31
    assert sum(table.rows_read.values()) == 916166 == len(table.events) + sum(table.set_aside.values())
    assert 7030 <= table.events["code"].n_unique() <= 7035  # codes that occur only after death are gone
    assert table.events["numeric_value"].is_not_null().mean() > 0.43


def test_synthea():
    path = data_folder("synthea-apr2020-csv")
    table = read_events(path)
    assert table.format == "synthea" and table.n_patients == 1171 and deaths(table) == 171
    read = table.rows_read
    assert read["encounters.csv.gz"] == 53346 and read["conditions.csv.gz"] == 8376 and read["medications.csv.gz"] == 42989
    assert read["procedures.csv.gz"] == 34981 and read["observations.csv.gz"] == 299697 and read["immunizations.csv.gz"] == 15478
    people = lambda code: table.events.filter(pl.col("code") == code)["subject_id"].n_unique()
    assert people("SNOMED//44054006") == 76 and people("SNOMED//59621000") == 302
    assert table.set_aside["death certification"] > 0
    assert not table.events["code"].str.contains("308646001|69453-9").any()
    blank = table.events.filter(pl.col("code") == "SYNTHEA//Hydrochlorothiazide 12.5 MG").height
    assert 0 < blank <= 1598


def test_the_two_editions_of_mimic_hold_the_same_people():
    omop, meds = (read_events(data_folder(f"mimic-iv-demo-{kind}")) for kind in ("omop", "meds"))
    sex = lambda t: sorted(t.events.filter(pl.col("code").str.starts_with("GENDER//"))["code"])
    assert sex(omop) == sex(meds)
