"""From a store to a model and to risks, from the shell: killed and resumed, on real input, with everything wrong that can be."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT, data_folder
from privacy import patient_traces

from ehr_sequencing.checkpoints import Checkpoints
from ehr_sequencing.predictions import PredictSettings, load_model, model_fingerprint, predict_run
from ehr_sequencing.prepare import PrepareConfig, prepare_store
from ehr_sequencing.runs import FinetuneSettings, PretrainSettings, finetune_run, pretrain_run
from ehr_sequencing.sequences import load_sequences
from ehr_sequencing.synthetic import OUTCOME_CODE, write_cohort
from ehr_sequencing.run_folders import load_run

SMALL = ("--device", "cpu", "--max_tokens", 32, "--num_patients", 40, "--batch_size", 8)
TREE = {"checkpoints/best_model.pt", "checkpoints/latest.pt", "logs/metrics_history.json", "hyperparameters.json", "metadata.json", "summary.json", "SUMMARY.txt", "plots/loss_curve.png",
        "model/config.json", "model/model.safetensors", "model/vocabulary.json"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} # the library of this checkout
QUIET = dict(say=lambda line: None, show_progress=False)


def files(folder): return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    "Arguments -> what to start: an installed command, or the function behind it."
    scripts = tmp_path_factory.mktemp("scripts")
    def arguments(name, *options):
        module = "cli" if name == "ehrseq_prepare" else "cli_training"
        (scripts / f"{name}.py").write_text(f"from ehr_sequencing.{module} import {name}; {name}()")
        return [sys.executable, str(scripts / f"{name}.py"), *map(str, options)]
    return arguments


@pytest.fixture(scope="module")
def run(command):
    "Run a command: status, output, errors."
    def call(name, *options, cwd=None, **keywords):
        done = subprocess.run(command(name, *options), cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, **keywords)
        return done.returncode, done.stdout, done.stderr
    return call


@pytest.fixture(scope="module")
def stop(command):
    "Start a command and send it a signal once a file is there that was not: status, errors."
    def call(path, number, name, *options, cwd=None):
        begun = subprocess.Popen(command(name, *options), cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        deadline = time.time() + 120
        while time.time() < deadline and begun.poll() is None and not path.exists(): time.sleep(0.002)
        assert begun.poll() is None, f"it ended before it was stopped: {begun.stderr.read()}"
        begun.send_signal(number)
        errors = begun.communicate(timeout=120)[1]
        return begun.returncode, errors
    return call


def one_line(status, output, errors, *parts):
    "An error is told in one line, with these parts."
    assert status == 1 and len(errors.strip().splitlines()) == 1 and "Traceback" not in errors, errors
    for part in parts: assert part in errors, errors


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Records, a store without the outcome, and a pre-trained encoder."
    folder = tmp_path_factory.mktemp("world")
    write_cohort(folder / "records", 300, seed=0, hazard_ratio=3, n_jobs=1)
    prepare_store(PrepareConfig(folder / "records", folder / "store", exclude=(OUTCOME_CODE,), n_jobs=1), say=lambda line: None)
    torch.set_num_threads(1)
    pretrain_run(PretrainSettings(folder / "store", folder / "pretrained", num_patients=40, epochs=1, max_tokens=32, device="cpu"), **QUIET)
    return folder


def finetune(world, say=QUIET["say"], **changes):
    "A small run of fine-tuning; the summary."
    return finetune_run(FinetuneSettings(**dict(store=world / "store", source=world / "records", outcome=OUTCOME_CODE, pretrained=world / "pretrained", num_patients=40, epochs=2, batch_size=8, max_tokens=32, n_resamples=0, device="cpu") | changes), say=say, show_progress=False)


@pytest.fixture(scope="module")
def whole(world):
    "A run that nobody stopped."
    return finetune(world, out=world / "whole")


# As people use it


def test_synthea_from_the_shell(run, stop, tmp_path):
    "The issue's three commands on the official sample, killed once on the way; the tree is whole and tells nothing about a patient."
    source, diabetes = data_folder("synthea-apr2020-csv"), "SNOMED//44054006"
    assert run("ehrseq_prepare", source, "store", "--exclude", diabetes, "--n_jobs", 1, cwd=tmp_path)[0] == 0
    status, _, errors = run("ehrseq_pretrain", "store", "--out", "pretrained", "--epochs", 1, *SMALL, cwd=tmp_path)
    assert status == 0, errors
    options = ("ehrseq_finetune", "store", "--source", source, "--outcome", diabetes, "--pretrained", "pretrained", "--out", "diabetes", "--model_size", "small", "--use_lora", "--lora_rank", 8, "--epochs", 1, "--n_resamples", 0, "--checkpoint_steps", 1,
               "--price_per_hour", 2.5, *SMALL)
    assert stop(tmp_path / "diabetes/checkpoints/previous.pt", signal.SIGKILL, *options, cwd=tmp_path)[0] == -signal.SIGKILL
    status, output, errors = run(*options, "--resume", cwd=tmp_path)
    assert status == 0, errors
    assert TREE | {"checkpoints/best_lora.pt", "plots/calibration.png", "plots/survival.png"} <= files(tmp_path / "diabetes")
    assert TREE <= files(tmp_path / "pretrained")
    assert len(json.loads((tmp_path / "diabetes/metadata.json").read_text())["sessions"]) == 2
    status, output, errors = run("ehrseq_predict", "store", "diabetes", "--out", "risks.parquet", "--horizons", "365,1825", cwd=tmp_path)
    assert status == 0, errors
    store, risks = load_sequences(tmp_path / "store"), pl.read_parquet(tmp_path / "risks.parquet")
    held_out = store.subject_ids[store.splits == 2]
    assert set(risks["subject_id"]) <= set(held_out.tolist()) and len(risks) > len(held_out) and risks["risk"].is_between(0, 1).all()
    assert set(risks["model"]) == {load_run(tmp_path / "diabetes").summary["facts"]["model_fingerprint"]}
    shutil.rmtree(tmp_path / "pretrained/checkpoints")  # the other run has some too, and reading them takes long
    for name in ("pretrained", "diabetes"): assert patient_traces(tmp_path / name, store) == {}
    (tmp_path / "leak").mkdir(); shutil.copy(tmp_path / "risks.parquet", tmp_path / "leak/SUMMARY.txt")
    assert patient_traces(tmp_path / "leak", store), "the scan would not find patients if they were there"


def test_a_killed_run_ends_as_one_that_was_not(stop, world, whole, tmp_path):
    "SIGKILL, then SIGTERM, then to the end in this process: the same model to the bit, the same history."
    options = ("ehrseq_finetune", world / "store", "--source", world / "records", "--outcome", OUTCOME_CODE, "--pretrained", world / "pretrained", "--out", tmp_path / "run", "--epochs", 2, "--n_resamples", 0, "--checkpoint_steps", 2, *SMALL)
    assert stop(tmp_path / "run/checkpoints/previous.pt", signal.SIGKILL, *options)[0] == -signal.SIGKILL
    (tmp_path / "run/checkpoints/previous.pt").unlink()
    status, errors = stop(tmp_path / "run/checkpoints/previous.pt", signal.SIGTERM, *options, "--resume")
    assert status == 130 and errors.strip().splitlines()[-1] == "ehrseq_finetune: interrupted; the same command with --resume goes on."
    resumed, killed = finetune(world, out=tmp_path / "run", checkpoint_steps=2, resume=True), load_run(tmp_path / "run")
    assert resumed["facts"]["model_fingerprint"] == whole["facts"]["model_fingerprint"] and resumed["metrics"] == whole["metrics"] and killed.history == load_run(world / "whole").history
    assert [s["how"] for s in killed.metadata["sessions"]] == ["killed", "interrupted", "finished"]


@pytest.mark.parametrize("changes", [dict(task="progression", outcome=None, stages="ICD10CM//I10=1; ICD10CM//R60.0=2", use_lora=True), dict(task="classification", horizon_years=2, use_lora=True, monitor="c_index"), dict(pretrained=None, model_type="hierarchical", gradient_checkpointing=True),
                                     dict(task="classification", pretrained=None, model_type="lstm", horizon_years=2), dict(use_lora=True, freeze_behrt=True, num_patients=None, epochs=1, batch_size=200)], ids=["progression", "classification", "hierarchical", "lstm", "lora"])
def test_what_was_trained_is_what_is_saved_and_asked(changes, world, tmp_path):
    "Every task: the folder is whole, the saved model has the fingerprint of the summary, and predictions come out in their columns."
    summary = finetune(world, out=tmp_path / "run", **changes)
    assert TREE <= files(tmp_path / "run") and ("checkpoints/best_lora.pt" in files(tmp_path / "run")) == ("use_lora" in changes)
    assert ("plots/confusion_matrix.png" in files(tmp_path / "run")) == (changes.get("task") is not None)
    assert 0 < summary["metrics"]["c_index"]["value"] < 1 and 0 < summary["metrics"]["brier"]["value"] < 1
    assert summary["model"]["trainable_parameters"] == summary["facts"]["parameters"]["all"]["trainable"]
    assert model_fingerprint(load_model(tmp_path / "run")[0]) == summary["facts"]["model_fingerprint"]
    predict_run(PredictSettings(world / "store", tmp_path / "run", tmp_path / "risks.parquet", at="each", device="cpu"), **QUIET)
    risks = pl.read_parquet(tmp_path / "risks.parquet")
    assert ("stage_2" in risks.columns) == (changes.get("task") == "progression") and set(risks["horizon_days"]) == {365.0 * changes.get("horizon_years", 5)}
    store = load_sequences(world / "store")
    assert set(risks["subject_id"]) == set(store.subject_ids[store.splits == 2].tolist()) and risks["risk"].is_between(0, 1).all()


def test_fewer_patients_and_other_codes(world, tmp_path):
    "A store with other codes takes the weights of those it knows, and the report says so."
    prepare_store(PrepareConfig(world / "records", tmp_path / "store", exclude=(OUTCOME_CODE,), min_patients=25, n_jobs=1), say=lambda line: None)
    summary = finetune(world, store=tmp_path / "store", out=tmp_path / "run", num_patients=30, epochs=1)
    n = len(load_sequences(tmp_path / "store").vocabulary) - 5
    assert f"{n} of {n} codes known, 0 new, " in summary["facts"]["loaded"] and summary["data"]["counts"]["train"]["patients"] == 30
    with pytest.raises(ValueError, match="its vocabulary of"): predict_run(PredictSettings(world / "store", tmp_path / "run", tmp_path / "risks.parquet", device="cpu"), **QUIET)


def test_held_out_patients_are_not_read_in_pretraining(world, tmp_path, monkeypatch):
    "Every batch that is made holds training or tuning patients."
    import ehr_sequencing.batches as batches
    real, seen = batches.make_batch, set()
    monkeypatch.setattr(batches, "make_batch", lambda store, rows, *more, **options: seen.update(np.asarray(rows).tolist()) or real(store, rows, *more, **options))
    pretrain_run(PretrainSettings(world / "store", tmp_path / "run", objective="both", epochs=1, num_patients=60, max_tokens=32, device="cpu"), **QUIET)
    splits = load_sequences(world / "store").splits[sorted(seen)]
    assert (splits == 0).sum() == 60 and 0 < (splits == 1).sum() and (splits == 2).sum() == 0


def test_too_few_held_out_events_are_said_plainly(world, tmp_path):
    store = load_sequences(world / "store")
    rows = np.flatnonzero(store.splits < 2)  # nobody held out but two
    store.take(np.concatenate([rows, np.flatnonzero(store.splits == 2)[:2]])).save(tmp_path / "store")
    summary = finetune(world, store=tmp_path / "store", out=tmp_path / "run", epochs=1)
    assert summary["state"] == "finished" and "no conclusion" in summary["facts"]["notes"][0] and summary["facts"]["undefined"] and any("survival is not drawn" in n for n in summary["facts"]["notes"])
    store.take(rows).save(tmp_path / "nobody")
    summary = finetune(world, store=tmp_path / "nobody", out=tmp_path / "none", epochs=1)
    assert summary["metrics"] == {} and "no held-out patient" in summary["facts"]["notes"][0]


# What goes wrong


def fails(world, tmp_path, message, error=ValueError, **changes):
    "A run that is refused before anything is written."
    with pytest.raises(error, match=message): finetune(world, **dict(out=tmp_path / "run") | changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, message", [
    (dict(num_patients=5000), "num_patients: expected 2 to "), (dict(num_patients=1), "num_patients: expected a whole number, at least 2"), (dict(batch_size=0), "batch_size: expected"), (dict(epochs=0), "epochs: expected"), (dict(learning_rate=-1.0), "learning_rate: expected"),
    (dict(outcome="ICD10CM//I10"), r"--exclude 'ICD10CM//I10"), (dict(outcome="E99"), "never occurs"), (dict(task="ranking"), "task: expected one of"), (dict(monitor="auc"), "monitor: expected"), (dict(mixed_precision="fp16"), "mixed_precision: 'fp16' needs a GPU"), (dict(model_size="huge"), "model_size: expected one of"),
    (dict(model_size="medium"), "Leave --model_size out"), (dict(lora_rank=0), "lora_rank: expected"), (dict(track=("wandb",)), "trackers: expected some of"), (dict(price_per_hour=-1.0), "price_per_hour: expected"), (dict(schedule="steps"), "schedule: expected one of"), (dict(pretrained=None, model_type="lstm", use_lora=True), "use_lora: is for BEHRT")])
def test_settings_that_make_no_sense(changes, message, world, tmp_path): fails(world, tmp_path, message, **changes)


def test_a_device_that_is_not_there(world, tmp_path):
    if torch.cuda.is_available(): pytest.skip("there is a GPU here")
    fails(world, tmp_path, "device: 'cuda' is not available on this machine", device="cuda")


def test_stores_and_models_that_do_not_fit(world, tmp_path):
    shutil.copytree(world / "store", tmp_path / "old")
    meta = json.loads((tmp_path / "old/meta.json").read_text())
    (tmp_path / "old/meta.json").write_text(json.dumps(meta | {"schema_version": 1}))
    fails(world, tmp_path, "schema version 1, this library reads", store=tmp_path / "old")
    fails(world, tmp_path, "Is .* a sequence store", FileNotFoundError, store=tmp_path)
    fails(world, tmp_path, "no such file or folder", FileNotFoundError, source=tmp_path / "nowhere")
    fails(world, tmp_path, "holds no model", FileNotFoundError, pretrained=tmp_path)
    shutil.copytree(world / "pretrained/model", tmp_path / "damaged")
    with open(tmp_path / "damaged/model.safetensors", "rb+") as file: file.seek(-4, 2); file.write(b"evil")
    fails(world, tmp_path, "damaged", pretrained=tmp_path / "damaged")
    write_cohort(tmp_path / "others", 60, seed=5, n_jobs=1)
    store = load_sequences(world / "store")
    renamed = type(store.vocabulary)([*store.vocabulary.tokens[:5], *(f"X//{t}" for t in store.vocabulary.tokens[5:])])
    type(store)(store.table, renamed, store.meta).save(tmp_path / "foreign")
    fails(world, tmp_path, "none of the .* codes of the store is known", store=tmp_path / "foreign")
    fails(world, tmp_path, "of .* patients of the store are not in it", source=tmp_path / "others")


def test_folders_that_hold_something_else(world, tmp_path):
    (tmp_path / "thesis").mkdir(); (tmp_path / "thesis/chapter.txt").write_text("years of work")
    for changes in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="holds no run"): finetune(world, out=tmp_path / "thesis", **changes)
    assert files(tmp_path / "thesis") == {"chapter.txt"}
    first = finetune(world, out=tmp_path / "run", epochs=1)
    with pytest.raises(FileExistsError, match="already holds a run"): finetune(world, out=tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="resume: the run in .* was started with other learning_rate"): finetune(world, out=tmp_path / "run", epochs=1, learning_rate=1e-5, resume=True)
    with pytest.raises(ValueError, match="use_lora"): finetune(world, out=tmp_path / "run", epochs=1, use_lora=True, resume=True, learning_rate=1e-3)
    assert load_run(tmp_path / "run").summary["facts"]["model_fingerprint"] == first["facts"]["model_fingerprint"]
    second = finetune(world, out=tmp_path / "run", epochs=1, learning_rate=1e-5, overwrite=True)
    assert second["facts"]["model_fingerprint"] != first["facts"]["model_fingerprint"] and [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    again = finetune(world, out=tmp_path / "run", epochs=1, learning_rate=1e-5, resume=True)  # a run that has ended: the same end
    assert again["facts"]["model_fingerprint"] == second["facts"]["model_fingerprint"] and again["metrics"] == second["metrics"]


def test_checkpoints_that_are_not_ours_or_damaged(world, whole, tmp_path):
    "One of another model is refused by name; of a truncated one the previous is taken, with a warning."
    for name in ("run", "mixed"): shutil.copytree(world / "whole", tmp_path / name)
    finetune(world, out=tmp_path / "lstm", pretrained=None, model_type="lstm", epochs=1)
    for name in ("latest", "previous"): shutil.copy(tmp_path / "lstm/checkpoints/latest.pt", tmp_path / f"mixed/checkpoints/{name}.pt")
    with pytest.raises(ValueError, match="the checkpoint is of a SurvivalLSTM, and this model is a BEHRTForSurvival"): finetune(world, out=tmp_path / "mixed", resume=True)
    latest = tmp_path / "run/checkpoints/latest.pt"
    latest.write_bytes(latest.read_bytes()[:-1000])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = finetune(world, out=tmp_path / "run", resume=True)
    assert any("latest.pt" in str(w.message) for w in told) and again["facts"]["model_fingerprint"] == whole["facts"]["model_fingerprint"]


def test_a_loss_that_is_no_number_stops_the_run(world, whole, tmp_path, monkeypatch):
    "At the step, with its place; the last good checkpoint is kept, and the run goes on from it once the cause is gone."
    from ehr_sequencing.survival import BEHRTForSurvival
    real, calls = BEHRTForSurvival.loss, []
    def broken(self, outputs, batch):
        calls.append(1)
        loss, weight = real(self, outputs, batch)
        return (loss * float("nan") if len(calls) == 12 else loss), weight
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"epoch 0, step \d+, batch \d+ of \d+: .*finite"):
        patched.setattr(BEHRTForSurvival, "loss", broken)
        finetune(world, out=tmp_path / "run", checkpoint_steps=1)
    assert load_run(tmp_path / "run").state == "stopped" and Checkpoints(tmp_path / "run/checkpoints").load() is not None
    assert finetune(world, out=tmp_path / "run", checkpoint_steps=1, resume=True)["facts"]["model_fingerprint"] == whole["facts"]["model_fingerprint"]


def test_memory_that_runs_out_names_the_settings(world, tmp_path, monkeypatch):
    from ehr_sequencing.survival import BEHRTForSurvival
    def greedy(self, batch): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(BEHRTForSurvival, "forward", greedy)
    with pytest.raises(MemoryError, match="gradient_accumulation_steps"): finetune(world, out=tmp_path / "run")


def test_no_room_and_no_permission(run, world, tmp_path):
    "A disk without room: one line, the run before is as it was, and there is room again."
    options = ("ehrseq_finetune", world / "store", "--source", world / "records", "--outcome", OUTCOME_CODE, "--out", tmp_path / "run", "--epochs", 1, "--n_resamples", 0, "--model_type", "lstm", *SMALL)
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    status, output, errors = run(*options, preexec_fn=limit)
    one_line(status, output, errors, "latest.pt")
    finetune(world, out=tmp_path / "run", pretrained=None, model_type="lstm", epochs=1, resume=True)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")}
    one_line(*run(*options, "--overwrite", "--seed", 1, preexec_fn=limit), "latest.pt")
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")} == before, "the old run is back"
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        one_line(*run(*options[:7], tmp_path / "locked/run", *options[8:]), "cannot write to")


# What is not told


def test_the_tree_holds_nothing_of_an_address(world, tmp_path, monkeypatch):
    "User and password of a database stand in no file and in no line, wherever in the address they are."
    import ehr_sequencing.runs as runs
    real, said = runs.read_events, []
    monkeypatch.setattr(runs, "read_events", lambda source, *more: real(world / "records"))
    for i, url in enumerate(("postgresql://alice:s3cret@host/cdm", "postgresql://host/cdm?user=alice&password=ab/s3cret", "postgresql://host/cdm?sslcert=/home/alice/s3cret")):
        runs.finetune_run(runs.FinetuneSettings(world / "store", tmp_path / str(i), outcome=OUTCOME_CODE, source=url, model_type="lstm", epochs=1, num_patients=40, n_resamples=0, max_tokens=32, device="cpu"), said.append, show_progress=False)
        assert json.loads((tmp_path / str(i) / "hyperparameters.json").read_text())["source"] == "cdm"
    assert not any("alice" in line or "s3cret" in line for line in said)
    assert not any(word in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() for word in (b"alice", b"s3cret"))


def test_what_is_undefined_is_told(world, tmp_path):
    "Without held-out events there is no C-index: null in summary.json, named in SUMMARY.txt, and told with the reason."
    store, said = load_sequences(world / "store"), []
    store.take(np.concatenate([np.flatnonzero(store.splits < 2), np.flatnonzero(store.splits == 2)[:2]])).save(tmp_path / "store")
    summary = finetune(world, store=tmp_path / "store", out=tmp_path / "run", epochs=1, n_resamples=20, say=said.append)
    assert summary["metrics"]["c_index"]["value"] is None and "c_index" in summary["undefined"]
    assert any(line.startswith("  c_index: undefined: ") for line in said), said
    assert "undefined" in (tmp_path / "run/SUMMARY.txt").read_text()


def test_predictions_stay_out_of_runs(world, tmp_path):
    with pytest.raises(ValueError, match="in which nothing is about single patients"): PredictSettings(world / "store", world / "pretrained", world / "pretrained/plots/risks.parquet")
