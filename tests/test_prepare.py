"`ehrseq_prepare` as people use it: killed and called again, on a cluster, on a full disk; and the data sets of ../shared/data."
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import data_folder

from ehr_sequencing.batches import make_batch
from ehr_sequencing.omop import eunomia_path
from ehr_sequencing.prepare import PrepareConfig, prepare_store
from ehr_sequencing.sequences import load_sequences

COMMAND = Path(sys.executable).parent / "ehrseq_prepare"


def quiet(line): pass


def run(*options, **keywords):
    return subprocess.run([COMMAND, *map(str, options)], capture_output=True, text=True, **keywords)


@pytest.fixture(scope="module")
def meds(tmp_path_factory):
    "A MEDS data set of 12 shards with values, births, deaths and facts; 400 patients each, ids in no order over the shards."
    folder = tmp_path_factory.mktemp("meds")
    generator = np.random.default_rng(0)
    ids = generator.permutation(4800).astype(np.int64) * 2**40 - 2**50
    for k in range(12):
        (folder / "data" / ("train", "tuning", "held_out")[k % 3]).mkdir(parents=True, exist_ok=True)
        mine, n = ids[400 * k:400 * (k + 1)], 20_000
        is_lab = generator.random(n) < 0.3
        rows = pl.DataFrame({"subject_id": generator.choice(mine, n), "time": np.datetime64("2010-01-01", "us") + generator.integers(0, 10**8, n).astype("timedelta64[s]"),
                             "code": np.where(is_lab, "LAB//", "DX//") + (generator.zipf(1.5, n) % 500).astype(str),
                             "numeric_value": np.where(is_lab, generator.normal(size=n).round(2), np.nan).astype(np.float32)}).with_columns(pl.col("numeric_value").fill_nan(None))
        births = pl.DataFrame({"subject_id": mine, "time": np.datetime64("1950-01-01", "us") + np.arange(400).astype("timedelta64[D]"), "code": ["MEDS_BIRTH"] * 400,
                               "numeric_value": pl.Series([None] * 400, dtype=pl.Float32)})
        facts = births.with_columns(time=pl.lit(None, pl.Datetime("us")), code=pl.lit("GENDER//F"))
        late = births.head(3).with_columns(time=pl.lit(np.datetime64("1940-01-01", "us")), code=pl.lit("DX//early"))
        pl.concat([facts, births, rows, late]).write_parquet(folder / "data" / ("train", "tuning", "held_out")[k % 3] / f"{k}.parquet")
    return folder


@pytest.fixture(scope="module")
def reference(meds, tmp_path_factory):
    "The store that one process makes of it."
    return prepare_store(PrepareConfig(meds, tmp_path_factory.mktemp("reference") / "store", n_jobs=1), say=quiet)


def assert_same(store, reference):
    assert store.table.equals(reference.table) and store.vocabulary == reference.vocabulary and store.meta == reference.meta and store.fingerprint() == reference.fingerprint()


def test_processes_do_not_matter(meds, reference, tmp_path):
    done = run(meds, tmp_path / "store", "--n_jobs", 2)
    assert done.returncode == 0 and "reading: 12/12" in done.stdout and "visits per patient" in done.stdout and "set aside: event before birth: 36" in done.stdout
    assert_same(load_sequences(tmp_path / "store"), reference)
    assert reference.meta["splits"] == {"train": 1600, "tuning": 1600, "held_out": 1600} and (np.diff(reference.subject_ids) > 0).all()


@pytest.mark.parametrize("step, n", [("records", 5), ("values", 3), ("tokens", 4), ("rows", 6)])
def test_killed_half_way_and_called_again(step, n, meds, reference, tmp_path, monkeypatch):
    "SIGKILL to every process of the command once `n` shards have done `step`; the second call keeps what they did."
    import ehr_sequencing.prepare as prepare
    work = tmp_path / "store.partial"
    begun = subprocess.Popen([COMMAND, meds, tmp_path / "store", "--n_jobs", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 60
    while time.time() < deadline and begun.poll() is None and len(list((work / step).glob("0*"))) < n: time.sleep(0.001)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    assert not (tmp_path / "store").exists(), "the command finished before it was killed"
    finished, indexed, real = len(list((work / "records").glob("*.json"))), [], prepare.index_records
    assert finished == 12 or step == "records" and finished >= 1
    monkeypatch.setattr(prepare, "index_records", lambda *arguments: indexed.append(1) or real(*arguments))
    assert_same(prepare_store(PrepareConfig(meds, tmp_path / "store", n_jobs=1), say=quiet), reference)
    assert len(indexed) == 12 - finished and [p.name for p in tmp_path.iterdir()] == ["store"]


def test_finished_shards_are_not_done_again(meds, reference, tmp_path, monkeypatch):
    import ehr_sequencing.prepare as prepare
    done, real = [], prepare.tokenize_records
    def fails_at_the_seventh(*arguments):
        if len(done) == 6: raise OSError("No space left on device")
        done.append(1)
        return real(*arguments)
    monkeypatch.setattr(prepare, "tokenize_records", fails_at_the_seventh)
    config = PrepareConfig(meds, tmp_path / "store", n_jobs=1)
    with pytest.raises(OSError, match="No space left"): prepare_store(config, say=quiet)
    calls = []
    for name in ("index_records", "count_values", "count_tokens"): monkeypatch.setattr(prepare, name, lambda *a: calls.append(a))
    monkeypatch.setattr(prepare, "tokenize_records", lambda *a: done.append(2) or real(*a))
    assert_same(prepare_store(config, say=quiet), reference)
    assert not calls and done == [1] * 6 + [2] * 6


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as made: yield made.scheduler_address


def test_a_dask_cluster_of_two_workers_makes_the_same_store(cluster, meds, reference, tmp_path):
    done = run(meds, tmp_path / "store", "--cluster", cluster)
    assert done.returncode == 0, done.stderr
    assert_same(load_sequences(tmp_path / "store"), reference)


def test_a_cluster_that_does_not_answer(meds, tmp_path):
    done = run(meds, tmp_path / "store", "--cluster", "tcp://127.0.0.1:9")
    assert done.returncode == 1 and "no Dask scheduler answers at tcp://127.0.0.1:9" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_full_disk_loses_nothing(meds, reference, tmp_path):
    "No file may grow past 100 kB, as on a disk without room; then there is room again."
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    done = run(meds, tmp_path / "store", "--n_jobs", 1, preexec_fn=limit)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr and not (tmp_path / "store").exists()
    assert run(meds, tmp_path / "store", "--n_jobs", 1).returncode == 0
    assert_same(load_sequences(tmp_path / "store"), reference)


def test_what_is_there_is_not_lost(meds, reference, tmp_path):
    store = tmp_path / "store"
    assert run(meds, store, "--n_jobs", 1).returncode == 0
    refused = run(meds, store, "--n_jobs", 1, "--min_patients", 50)
    assert refused.returncode == 1 and "already exists" in refused.stderr
    failing = run(tmp_path / "nowhere", store, "--overwrite")
    assert failing.returncode == 1 and "no such file" in failing.stderr
    assert_same(load_sequences(store), reference)
    assert run(meds, store, "--n_jobs", 1, "--min_patients", 50, "--overwrite").returncode == 0
    assert len(load_sequences(store).vocabulary) < len(reference.vocabulary)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    refused = run(meds, tmp_path / "thesis", "--overwrite")
    assert refused.returncode == 1 and "is no sequence store" in refused.stderr and (tmp_path / "thesis" / "chapter.txt").exists()


def test_a_source_that_changed_is_not_mixed_with_the_old(meds, tmp_path, monkeypatch):
    import ehr_sequencing.prepare as prepare
    source = shutil.copytree(meds, tmp_path / "meds")
    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(prepare, "count_values", lambda *a: (_ for _ in ()).throw(OSError("stop")))
        prepare_store(PrepareConfig(source, tmp_path / "store", n_jobs=1), say=quiet)
    (source / "data" / "train" / "0.parquet").unlink()
    with pytest.raises(ValueError, match="begun with other files in the source"): prepare_store(PrepareConfig(source, tmp_path / "store", n_jobs=1), say=quiet)
    assert len(prepare_store(PrepareConfig(source, tmp_path / "store", n_jobs=1, overwrite=True), say=quiet)) == 4400


def test_a_store_maps_its_file_and_travels_by_path(reference, tmp_path):
    import pickle
    assert len(pickle.dumps(reference)) < 1000
    again = pickle.loads(pickle.dumps(reference))
    assert again.table.equals(reference.table) and not again.tokens.flags.owndata and not again.tokens.flags.writeable


def test_roll_up_map(tmp_path):
    (tmp_path / "map.csv").write_text("code,parent\nSNOMED//74474003,bleeding\nSNOMED//192671,bleeding\n")
    done = run(eunomia_path(), tmp_path / "store", "--roll_up_map", tmp_path / "map.csv", "--n_jobs", 1)
    assert done.returncode == 0, done.stderr
    vocabulary = load_sequences(tmp_path / "store").vocabulary
    assert "bleeding" in vocabulary.index and "SNOMED//74474003" not in vocabulary.index
    (tmp_path / "map.csv").write_text("code,parent\nA,B\nA,C\n")
    done = run(eunomia_path(), tmp_path / "other", "--roll_up_map", tmp_path / "map.csv")
    assert done.returncode == 1 and "more than one parent" in done.stderr


def test_two_commands_at_once(meds, reference, tmp_path):
    "The second is refused while the first is at it, and takes nothing from it."
    first = subprocess.Popen([COMMAND, meds, tmp_path / "store", "--n_jobs", "1"], stdout=subprocess.DEVNULL)
    while first.poll() is None and not list((tmp_path / "store.partial" / "records").glob("*.npz")): time.sleep(0.001)
    second = run(meds, tmp_path / "store", "--overwrite")
    assert first.wait() == 0 and second.returncode == 1 and "another process is preparing this store" in second.stderr and len(second.stderr.strip().splitlines()) == 1
    assert_same(load_sequences(tmp_path / "store"), reference)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_by_a_scheduler_or_by_hand(sent, meds, reference, tmp_path):
    "One line, no process left behind, and the next call goes on."
    for attempt in range(3):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        begun = subprocess.Popen([COMMAND, meds, tmp_path / "store", "--n_jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while begun.poll() is None and not list((tmp_path / "store.partial" / "records").glob("*.npz")): time.sleep(0.001)
        os.killpg(begun.pid, sent) if sent == signal.SIGINT else os.kill(begun.pid, sent)
        _, errors = begun.communicate(timeout=60)  # ends only when no process holds the pipe
        if begun.returncode: break  # on a busy machine it may be done before the signal comes
    assert begun.returncode == 130 and "interrupted; the same command goes on where it was" in errors and "Traceback" not in errors, errors
    assert list((tmp_path / "store.partial" / "records").glob("*.npz"))
    assert_same(prepare_store(PrepareConfig(meds, tmp_path / "store", n_jobs=1), say=quiet), reference)


def test_killed_while_joining(meds, reference, tmp_path, monkeypatch):
    "What a join that was killed left behind is in no store."
    import ehr_sequencing.prepare as prepare
    def killed(folder, *arguments):
        (folder / ".columns-left").mkdir()
        (folder / ".columns-left" / "codes").write_bytes(b"tokens of patients")
        raise OSError("killed")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="killed"):
        patched.setattr(prepare, "write_store", killed)
        prepare_store(PrepareConfig(meds, tmp_path / "store", n_jobs=1), say=quiet)
    assert_same(prepare_store(PrepareConfig(meds, tmp_path / "store", n_jobs=1), say=quiet), reference)
    assert {p.name for p in (tmp_path / "store").iterdir()} == {"sequences.arrow", "vocabulary.json", "meta.json"}


def test_only_its_own_is_replaced(meds, reference, tmp_path):
    store, link = tmp_path / "store", tmp_path / "link"
    assert run(meds, store, "--n_jobs", 1).returncode == 0
    shutil.copytree(store, tmp_path / "store.old")
    link.symlink_to(store)
    assert run(meds, link, "--n_jobs", 1, "--overwrite").returncode == 0 and link.is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"store", "store.old", "link"}
    assert_same(load_sequences(link), reference)
    (store / "notes.txt").write_text("mine")
    refused = run(meds, store, "--overwrite")
    assert refused.returncode == 1 and "holds other files too" in refused.stderr and (store / "notes.txt").exists()
    refused = run(store, tmp_path / "store" / "inner")
    assert refused.returncode == 1 and not (store / "inner").exists()


def test_paths_with_brackets_and_blanks(meds, reference, tmp_path):
    source = shutil.copytree(meds, tmp_path / "a [1]* b")
    assert_same(prepare_store(PrepareConfig(source, tmp_path / "out [2]? c" / "store", n_jobs=1), say=quiet), reference_named(reference, source.name))


def reference_named(reference, name):
    "The reference with another name of its source."
    from ehr_sequencing.sequences import SequenceStore
    return SequenceStore(reference.table, reference.vocabulary, reference.meta | {"source": name})


def test_a_file_too_large_to_be_a_shard_is_dealt_out_in_pieces(meds, reference, tmp_path, monkeypatch):
    import ehr_sequencing.prepare as prepare
    monkeypatch.setattr(prepare, "_LARGE_FILE", 20_000)
    store = prepare_store(PrepareConfig(meds, tmp_path / "store", n_jobs=1, n_shards=7), say=quiet)
    assert_same(store, reference)


SLIPS = {  # options -> what the one line says
    "an exclusion that fits nothing": (["--exclude", "DX//1,DX//2"], "fits no code of the source. Several are separated by ';'"),
    "a roll-up that concerns nothing": (["--roll_up", "atc3"], "no code of the source is rolled up"),
    "columns that are no pairs": (["--columns", "subject_id"], "columns: expected pairs such as"),
    "a seed below 0": (["--seed", -1], "seed: expected 0 or more"),
    "no process": (["--n_jobs", 0], "n_jobs: expected 1 or more"),
    "too many shards": (["--n_shards", 10_000], "n_shards: expected 1 to 1000"),
    "an address that is none": (["--cluster", "junk"], "expected the address of a Dask scheduler"),
    "fractions that are none": (["--train_fraction", "nan"], "fractions: expected three numbers"),
    "rare everything": (["--min_patients", 10**9], "min_patients: no code occurs in 1000000000 or more training patients")}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_told_in_one_line(slip, meds, tmp_path):
    options, message = SLIPS[slip]
    done = run(meds, tmp_path / "store", *options)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_fractions_that_add_up_on_paper(meds, tmp_path):
    assert run(eunomia_path(), tmp_path / "store", "--train_fraction", 0.9, "--tuning_fraction", 0.1, "--n_jobs", 1).returncode == 0
    assert load_sequences(tmp_path / "store").meta["splits"]["held_out"] == 0


def test_a_shard_that_is_cut_short_is_named(meds, tmp_path):
    source = shutil.copytree(meds, tmp_path / "meds")
    shard = source / "data" / "train" / "6.parquet"
    shard.write_bytes(shard.read_bytes()[:1000])
    done = run(source, tmp_path / "store")
    assert done.returncode == 1 and "train/6.parquet: cannot be read" in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "store.partial").exists()


EXPECTED = {  # patients with visits, visits, explained: what the README of the data counts
    "mimic-iv-demo-omop": (100, 852), "mimic-iv-demo-meds": (100, 3289), "synthea-apr2020-csv": (1171, 63423)}


@pytest.mark.parametrize("name", EXPECTED)
def test_shared_data_go_through(name, tmp_path):
    store = prepare_store(PrepareConfig(data_folder(name), tmp_path / "store", n_jobs=1), say=quiet)
    assert (len(store), len(store.visit_starts)) == EXPECTED[name]
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    assert meta["tokens"] == len(store.tokens) and meta["events"] > 0 and sum(meta["rows_read"].values()) > meta["events"] / 2


def test_pbc2_goes_through_as_a_plain_table(tmp_path):
    "A wide table of visits becomes a long table of events; its columns have other names."
    wide = pl.read_csv(data_folder("pbc2") / "pbc2.csv.gz", null_values="NA", infer_schema_length=None)
    when = pl.datetime(1974, 1, 1) + pl.duration(days=(pl.col("year") * 365.25).round().cast(pl.Int64))
    numbers, words = ["serBilir", "serChol", "albumin", "alkaline", "SGOT", "platelets", "prothrombin", "histologic"], ["ascites", "hepatomegaly", "spiders", "edema"]
    values = wide.with_columns(when=when).unpivot(numbers, index=["id", "when"], variable_name="what", value_name="amount").drop_nulls()
    signs = wide.with_columns(when=when).unpivot(words, index=["id", "when"]).drop_nulls().select("id", "when", what=pl.col("variable") + "//" + pl.col("value"), amount=pl.lit(None, pl.Float64))
    last = wide.group_by("id").agg(pl.first("years", "status"))
    end = pl.datetime(1974, 1, 1) + pl.duration(days=(pl.col("years") * 365.25).ceil().cast(pl.Int64))
    ends = last.select("id", when=end, what=pl.when(pl.col("status") == "dead").then(pl.lit("MEDS_DEATH")).otherwise(pl.lit("OBSERVATION_END")), amount=pl.lit(None, pl.Float64))
    pl.concat([values.select(ends.columns), signs, ends]).with_columns(pl.col("when").dt.to_string()).write_csv(tmp_path / "pbc2.csv")
    done = run(tmp_path / "pbc2.csv", tmp_path / "store", "--columns", "subject_id=id,time=when,code=what,numeric_value=amount", "--n_jobs", 1)
    assert done.returncode == 0, done.stderr
    store = load_sequences(tmp_path / "store")
    assert len(store) == 312 and len(store.visit_starts) == 1945 and (~np.isnat(store.deaths)).sum() == 140
    assert {"serBilir//Q10", "ascites//Yes"} <= set(store.vocabulary.tokens) and not store.meta["set_aside"]


def test_a_million_events_of_one_patient_over_a_century(tmp_path):
    generator = np.random.default_rng(1)
    days = np.sort(generator.integers(0, 36_525, 1_000_000))
    pl.DataFrame({"subject_id": np.repeat([7, -7], [1_000_000, 20]), "time": np.datetime64("1920-01-01", "us") + np.append(days, np.arange(20)).astype("timedelta64[D]"),
                  "code": np.char.add("C", generator.integers(0, 1000, 1_000_020).astype(str))}).with_columns(numeric_value=pl.lit(None, pl.Float32)).write_parquet(tmp_path / "one.parquet")
    store = prepare_store(PrepareConfig(tmp_path / "one.parquet", tmp_path / "store", format="meds", min_patients=1, fractions=(1., 0., 0.), n_jobs=1), say=quiet)
    assert store.n_visits.tolist() == [20, len(np.unique(days))] and store.describe().loc["years from first to last visit", "maximum"] > 99
    batch = make_batch(store, [0, 1], max_tokens=512)
    last = [names for _, names in store[1][-1:]][0]
    assert store.vocabulary.decode(batch["codes"][1][batch["visit_ids"][1] == batch["visit_ids"][1].max()]) == last and batch["attention_mask"].sum(1).tolist()[1] > 512 - 2 * 60
