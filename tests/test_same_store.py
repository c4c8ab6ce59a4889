"The same OMOP database gives the same store from CSV, Parquet, DuckDB and a PostgreSQL server; no password is left on disk."
from urllib.parse import quote

import duckdb
import pytest
from postgres import PASSWORD
from test_omop_sources import fill_postgres

from ehr_sequencing.omop import OMOP_TABLES, eunomia_path
from ehr_sequencing.prepare import PrepareConfig, prepare_store

TABLES = ("person", "visit_occurrence", "observation_period", "concept", *OMOP_TABLES)


def quiet(line): pass


@pytest.fixture(scope="module")
def frames():
    "The tables of Eunomia that have rows of their own."
    with duckdb.connect(str(eunomia_path()), read_only=True) as connection:
        return {name: connection.sql(f"select * from {name}").pl() for name in TABLES if name != "device_exposure"}  # an empty table there


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return prepare_store(PrepareConfig(eunomia_path(), tmp_path_factory.mktemp("duckdb") / "store", n_jobs=1), say=quiet)


def assert_same(store, reference):
    assert store.table.equals(reference.table) and store.vocabulary == reference.vocabulary
    plain = lambda counts: {k.split(".")[0]: n for k, n in counts.items()}
    assert plain(store.meta["rows_read"]) == reference.meta["rows_read"] and store.meta["set_aside"] == reference.meta["set_aside"]
    assert {k: v for k, v in store.meta.items() if k not in ("rows_read", "source")} == {k: v for k, v in reference.meta.items() if k not in ("rows_read", "source")}


@pytest.mark.parametrize("kind", ["csv", "parquet", "postgresql"])
def test_the_same_store(kind, frames, reference, tmp_path, request):
    if kind == "postgresql": source = fill_postgres(request.getfixturevalue("postgres"), "same_store", frames)
    else:
        source = tmp_path / "omop"
        source.mkdir()
        for name, frame in frames.items(): frame.write_csv(source / f"{name}.csv") if kind == "csv" else frame.write_parquet(source / f"{name}.parquet")
    assert_same(prepare_store(PrepareConfig(source, tmp_path / "store", n_jobs=1, n_shards=5), say=quiet), reference)


def test_no_password_on_disk(postgres, frames, reference, tmp_path, monkeypatch):
    "Interrupted, so that the folder of work stays, and then finished."
    import ehr_sequencing.prepare as prepare
    fill_postgres(postgres, "secret", frames)
    postgres.sql("grant select on all tables in schema public to ann", "secret")
    config = PrepareConfig(postgres.url("secret", "ann", quote(PASSWORD, safe="")), tmp_path / "store", n_jobs=1)
    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(prepare, "count_values", lambda *a: (_ for _ in ()).throw(OSError("stop")))
        prepare_store(config, say=quiet)
    def secrets(): return [f for f in tmp_path.rglob("*") if f.is_file() and any(word.encode() in f.read_bytes() for word in (PASSWORD, quote(PASSWORD, safe="")))]
    assert len(list((tmp_path / "store.partial").rglob("*.npz"))) == 16 and not secrets()
    assert_same(prepare_store(config, say=quiet), reference)
    assert not secrets()
