"""The same few facts as each generation of Synthea wrote them, with the columns of that generation in their order.

Sources of the columns: `lib/records/csv.rb` and `src/main/java/org/mitre/synthea/export/CSVExporter.java` of
github.com/synthetichealth/synthea; the chapter on Synthea cites the commits."""
import polars as pl
import pytest

from ehr_sequencing.events import DEATH, STRUCTURAL_CODES, visit_table
from ehr_sequencing.readers import detect_format, read_events, synthea_source

FIRST = "PREFIX,FIRST,LAST,SUFFIX,MAIDEN,MARITAL,RACE,ETHNICITY,GENDER,BIRTHPLACE,ADDRESS"
MONEY = "BASE_COST,REASONCODE,REASONDESCRIPTION"
LONG = {"MARITAL": "M", "RACE": "white", "ETHNICITY": "nonhispanic"}
RUBY = {  # to 2017
    "patients": f"ID,BIRTHDATE,DEATHDATE,SSN,DRIVERS,PASSPORT,{FIRST}",
    "encounters": "ID,DATE,PATIENT,CODE,DESCRIPTION,REASONCODE,REASONDESCRIPTION",
    "conditions": "START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION",
    "allergies": "START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION",
    "medications": "START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION,REASONCODE,REASONDESCRIPTION",
    "careplans": "ID,START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION,REASONCODE,REASONDESCRIPTION",
    "observations": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,VALUE,UNITS",
    "procedures": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,REASONCODE,REASONDESCRIPTION",
    "immunizations": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION"}
JAVA_2018 = RUBY | {  # costs, types of observations, imaging
    "encounters": "ID,DATE,PATIENT,CODE,DESCRIPTION,COST,REASONCODE,REASONDESCRIPTION",
    "medications": "START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION,COST,REASONCODE,REASONDESCRIPTION",
    "observations": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,VALUE,UNITS,TYPE",
    "procedures": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,COST,REASONCODE,REASONDESCRIPTION",
    "immunizations": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,COST",
    "imaging_studies": "ID,DATE,PATIENT,ENCOUNTER,BODYSITE_CODE,BODYSITE_DESCRIPTION,MODALITY_CODE,MODALITY_DESCRIPTION,SOP_CODE,SOP_DESCRIPTION"}
JAVA_2019 = JAVA_2018 | {  # `Id`; encounters start, stop and have a class
    "patients": f"Id,BIRTHDATE,DEATHDATE,SSN,DRIVERS,PASSPORT,{FIRST},CITY,STATE,ZIP",
    "encounters": "Id,START,STOP,PATIENT,PROVIDER,ENCOUNTERCLASS,CODE,DESCRIPTION,COST,REASONCODE,REASONDESCRIPTION",
    "medications": "START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION,COST,DISPENSES,TOTALCOST,REASONCODE,REASONDESCRIPTION",
    "careplans": RUBY["careplans"].replace("ID", "Id"), "imaging_studies": JAVA_2018["imaging_studies"].replace("ID", "Id")}
V2_5 = JAVA_2019 | {  # April 2020: payers, devices, supplies
    "patients": f"Id,BIRTHDATE,DEATHDATE,SSN,DRIVERS,PASSPORT,{FIRST},CITY,STATE,COUNTY,ZIP,LAT,LON,HEALTHCARE_EXPENSES,HEALTHCARE_COVERAGE",
    "encounters": ("Id,START,STOP,PATIENT,ORGANIZATION,PROVIDER,PAYER,ENCOUNTERCLASS,CODE,DESCRIPTION,"
                   "BASE_ENCOUNTER_COST,TOTAL_CLAIM_COST,PAYER_COVERAGE,REASONCODE,REASONDESCRIPTION"),
    "medications": "START,STOP,PATIENT,PAYER,ENCOUNTER,CODE,DESCRIPTION,BASE_COST,PAYER_COVERAGE,DISPENSES,TOTALCOST,REASONCODE,REASONDESCRIPTION",
    "procedures": f"DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,{MONEY}", "immunizations": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,BASE_COST",
    "devices": "START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION,UDI", "supplies": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,QUANTITY"}
V2_7 = V2_5 | {  # a row for each image of a study
    "imaging_studies": ("Id,DATE,PATIENT,ENCOUNTER,SERIES_UID,BODYSITE_CODE,BODYSITE_DESCRIPTION,MODALITY_CODE,MODALITY_DESCRIPTION,"
                        "INSTANCE_UID,SOP_CODE,SOP_DESCRIPTION,PROCEDURE_CODE")}
V3_0 = V2_7 | {  # procedures start and stop; categories; allergies with a system; claims
    "allergies": "START,STOP,PATIENT,ENCOUNTER,CODE,SYSTEM,DESCRIPTION,TYPE,CATEGORY,REACTION1,DESCRIPTION1,SEVERITY1,REACTION2,DESCRIPTION2,SEVERITY2",
    "observations": "DATE,PATIENT,ENCOUNTER,CATEGORY,CODE,DESCRIPTION,VALUE,UNITS,TYPE",
    "procedures": f"START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION,{MONEY}",
    "claims": ("Id,PATIENTID,PROVIDERID,PRIMARYPATIENTINSURANCEID,SECONDARYPATIENTINSURANCEID,DEPARTMENTID,PATIENTDEPARTMENTID,DIAGNOSIS1,DIAGNOSIS2,DIAGNOSIS3,DIAGNOSIS4,"
               "DIAGNOSIS5,DIAGNOSIS6,DIAGNOSIS7,DIAGNOSIS8,REFERRINGPROVIDERID,APPOINTMENTID,CURRENTILLNESSDATE,SERVICEDATE,SUPERVISINGPROVIDERID,STATUS1,STATUS2,STATUSP,"
               "OUTSTANDING1,OUTSTANDING2,OUTSTANDINGP,LASTBILLEDDATE1,LASTBILLEDDATE2,LASTBILLEDDATEP,HEALTHCARECLAIMTYPEID1,HEALTHCARECLAIMTYPEID2")}
V3_1 = V3_0 | {"patients": V2_5["patients"].replace("COUNTY,", "COUNTY,FIPS,") + ",INCOME"}
V3_3 = V3_1 | {  # systems of conditions and procedures; middle name
    "patients": V3_1["patients"].replace("FIRST,LAST", "FIRST,MIDDLE,LAST"),
    "conditions": "START,STOP,PATIENT,ENCOUNTER,SYSTEM,CODE,DESCRIPTION", "procedures": f"START,STOP,PATIENT,ENCOUNTER,SYSTEM,CODE,DESCRIPTION,{MONEY}"}
GENERATIONS = {"ruby": RUBY, "java 2018": JAVA_2018, "java 2019": JAVA_2019, "2.5": V2_5, "2.7": V2_7, "3.0": V3_0, "3.1": V3_1, "3.3": V3_3}

DAY, DEATH_DAY = "2010-05-04", "2015-03-02"
FACTS = {  # table -> rows; a generation takes the columns it has
    "patients": [LONG | {"ID": "u-1", "BIRTHDATE": "1960-02-01", "GENDER": "F", "MIDDLE": "Q", "INCOME": "30000", "SSN": "999-12-3456"},
                 LONG | {"ID": "u-2", "BIRTHDATE": "1950-06-30", "DEATHDATE": DEATH_DAY, "GENDER": "M"}],
    "encounters": [{"ID": "e-1", "DATE": DAY, "STOP": DAY, "PATIENT": "u-1", "ENCOUNTERCLASS": "ambulatory", "CODE": "185349003", "DESCRIPTION": "Check up", "COST": "9.5"},
                   {"ID": "e-2", "DATE": DEATH_DAY, "STOP": DEATH_DAY, "PATIENT": "u-2", "ENCOUNTERCLASS": "wellness", "CODE": "308646001",
                    "DESCRIPTION": "Death Certification", "REASONCODE": "22298006", "REASONDESCRIPTION": "Myocardial Infarction"}],
    "conditions": [{"CODE": "44054006", "DESCRIPTION": "Diabetes", "SYSTEM": "http://snomed.info/sct"}],
    "allergies": [{"CODE": "91935009", "DESCRIPTION": "Allergy to peanuts", "SYSTEM": "Unknown", "TYPE": "allergy", "CATEGORY": "food", "REACTION1": "39579001"}],
    "medications": [{"CODE": "860975", "DESCRIPTION": "Metformin", "REASONCODE": "44054006"}],
    "careplans": [{"ID": "c-1", "CODE": "698360004", "DESCRIPTION": "Diabetes self management plan"}],
    "observations": [{"CODE": "8302-2", "DESCRIPTION": "Body Height", "VALUE": "171.0", "UNITS": "cm", "TYPE": "numeric", "CATEGORY": "vital-signs"},
                     {"CODE": "72166-2", "DESCRIPTION": "Tobacco smoking status", "VALUE": "Never smoker", "TYPE": "text", "CATEGORY": "social-history"},
                     {"CODE": "QALY", "DESCRIPTION": "QALY", "VALUE": "41.5", "UNITS": "a", "TYPE": "numeric", "ENCOUNTER": ""}],
    "procedures": [{"CODE": "73761001", "DESCRIPTION": "Colonoscopy", "SYSTEM": "http://snomed.info/sct"}],
    "immunizations": [{"CODE": "140", "DESCRIPTION": "Influenza"}],
    "imaging_studies": [{"ID": "i-1", "BODYSITE_CODE": "51185008", "MODALITY_CODE": "DX", "MODALITY_DESCRIPTION": "Digital Radiography", "SERIES_UID": "1.2", "PROCEDURE_CODE": "399208008"}],
    "devices": [{"CODE": "72506001", "DESCRIPTION": "Cardioverter/defibrillator"}], "supplies": [{"CODE": "337388004", "DESCRIPTION": "Blood glucose testing strips", "QUANTITY": "50"}],
    "claims": [{"ID": "k-1", "PATIENTID": "u-1", "DIAGNOSIS1": "44054006"}]}
ANSWERS = {"java": {"CODE": "69453-9", "DESCRIPTION": "Cause of Death [US Standard Certificate of Death]", "VALUE": "Myocardial Infarction"},
           "ruby": {"CODE": "22298006", "DESCRIPTION": "Myocardial Infarction"}}  # Ruby wrote the code of the condition itself, and no value
EXPECTED = {"SNOMED//185349003", "SNOMED//44054006", "SNOMED//91935009", "RxNorm//860975", "SNOMED//698360004", "LOINC//8302-2", "LOINC//72166-2//Never smoker",
            "LOINC//QALY", "SNOMED//73761001", "CVX//140", "GENDER//F", "GENDER//M", "RACE//white", "ETHNICITY//nonhispanic"}
ADDED = {"imaging_studies": "DICOM//DX", "devices": "SNOMED//72506001", "supplies": "SNOMED//337388004"}  # tables that came later


def export(folder, name, facts=FACTS):
    "Write the facts as a generation did; the certificate's cause of death goes with them."
    folder.mkdir(parents=True, exist_ok=True)
    certified = {"ENCOUNTER": "e-2", "PATIENT": "u-2", "DATE": DEATH_DAY} | ANSWERS["ruby" if name == "ruby" else "java"]
    for table, header in GENERATIONS[name].items():
        rows = [{"PATIENT": "u-1", "ENCOUNTER": "e-1", "DATE": DAY} | row for row in facts[table]] + ([certified] if table == "observations" else [])
        if table == "imaging_studies" and "INSTANCE_UID" in header: rows += [rows[0] | {"INSTANCE_UID": f"1.2.{i}"} for i in range(3)]
        lines = [",".join(row.get({"Id": "ID", "START": "DATE"}.get(c, c), "") for c in header.split(",")) for row in rows]
        (folder / f"{table}.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def content(table):
    "The events without those that a generation may lack: class and end of a visit, and the tables that came later."
    later = [*STRUCTURAL_CODES[2:], *ADDED.values()]
    return table.events.filter(~pl.col("code").is_in(later) & ~pl.col("code").str.starts_with("ENCOUNTER//"))


@pytest.mark.parametrize("name", GENERATIONS)
def test_every_generation_gives_the_same_events(name, tmp_path):
    folder = export(tmp_path / "new", name)
    assert detect_format(folder) == "synthea"
    table = read_events(folder)
    assert content(table).equals(content(read_events(export(tmp_path / "old", "ruby"))))
    codes = set(table.events["code"])
    assert EXPECTED <= codes and {code for later, code in ADDED.items() if later in GENERATIONS[name]} <= codes
    assert ("ENCOUNTER//ambulatory" in codes) == ("ENCOUNTERCLASS" in GENERATIONS[name]["encounters"])
    assert len(visit_table(table.events)) == 2  # the encounter, and the day of the score that names none
    assert table.names["LOINC//8302-2"] == "Body Height" and table.events.filter(pl.col("code") == DEATH).height == 1


@pytest.mark.parametrize("name", GENERATIONS)
def test_no_generation_leaks_the_death_certificate(name, tmp_path):
    table = read_events(export(tmp_path, name))
    assert table.set_aside.pop("death certification") == 2  # the encounter and the cause of death
    assert not table.events["code"].str.contains("308646001|69453-9|22298006|Myocardial").any()
    assert set(table.set_aside) <= {"imaging_studies.csv: further image of a study"}


@pytest.mark.parametrize("name", ["ruby", "3.3"])
def test_a_certificate_is_known_by_its_description_where_its_code_is_blank(name, tmp_path):
    encounters = [FACTS["encounters"][0], FACTS["encounters"][1] | {"CODE": "", "DESCRIPTION": "Death Certification (procedure)"}]
    table = read_events(export(tmp_path, name, FACTS | {"encounters": encounters}))
    assert table.set_aside["death certification"] == 2 and not table.events["code"].str.contains("(?i)certification|69453|22298006").any()


def test_a_study_of_many_images_is_one_event(tmp_path):
    table = read_events(export(tmp_path, "3.3"))
    assert table.events.filter(pl.col("code") == "DICOM//DX").height == 1 and table.rows_read["imaging_studies.csv"] == 4
    assert table.set_aside["imaging_studies.csv: further image of a study"] == 3


@pytest.mark.parametrize("system, category, code", [
    ("SNOMED-CT", "food", "SNOMED//7984"), ("http://snomed.info/sct", "", "SNOMED//7984"), ("RxNorm", "medication", "RxNorm//7984"),
    ("http://www.nlm.nih.gov/research/umls/rxnorm", "", "RxNorm//7984"), ("Unknown", "medication", "RxNorm//7984"), ("", "medication", "RxNorm//7984"),
    ("Unknown", "environment", "SNOMED//7984"), ("", "", "SNOMED//7984"), ("http://hl7.org/fhir/sid/icd-10-cm", "", "ICD10CM//7984"), ("http://loinc.org", "", "LOINC//7984"),
    ("http://hl7.org/fhir/sid/cvx", "", "CVX//7984"), ("HOUSE LIST", "", "HOUSE LIST//7984")])
def test_the_system_column_names_the_vocabulary(system, category, code, tmp_path):
    allergy = {"CODE": "7984", "DESCRIPTION": "Penicillin V", "SYSTEM": system, "CATEGORY": category}
    table = read_events(export(tmp_path, "3.3", FACTS | {"allergies": [allergy]}))
    assert code in set(table.events["code"]) and table.names[code] == "Penicillin V"


def test_a_cause_of_death_is_known_by_its_code_where_it_names_no_encounter(tmp_path):
    cause = FACTS["observations"][0] | {"PATIENT": "u-2", "DATE": DEATH_DAY, "ENCOUNTER": ""} | ANSWERS["java"]
    table = read_events(export(tmp_path, "3.3", FACTS | {"observations": [*FACTS["observations"], cause]}))
    assert table.set_aside["death certification"] == 3 and not table.events["code"].str.contains("69453|Myocardial").any()


@pytest.mark.parametrize("name", GENERATIONS)
def test_pieces_of_any_size_give_the_same_events(name, tmp_path):
    source, whole = synthea_source(export(tmp_path, name)), read_events(tmp_path)
    key = ["subject_id", "time", "code", "visit_id"]
    for rows in (1, 3):
        assert pl.concat(source.frames(rows)).sort(key).equals(whole.events.sort(key))
        assert (source.account.rows_read, source.account.set_aside, source.account.notes) == (whole.rows_read, whole.set_aside, whole.notes)
