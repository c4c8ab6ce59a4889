"Folders of runs: whole at every instant, of one run, readable, and about no single patient; runs compared only where they can be."
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import is_mlflow_available
from conftest import ROOT
from hypothesis import given, settings, strategies as st
from lifelines import KaplanMeierFitter
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin
from privacy import patient_traces, with_long_ids
from safetensors.torch import save_file

from ehr_sequencing import jobs, run_figures, tracking
from ehr_sequencing.events import EventTable
from ehr_sequencing.horizons import labelled_batches
from ehr_sequencing.jobs import only_one
from ehr_sequencing.landmarks import draw_landmarks
from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
from ehr_sequencing.outcomes import Outcome, label_visits
from ehr_sequencing.run_figures import plot_run_calibration, plot_run_survival, run_survival
from ehr_sequencing.run_folders import Run, load_run, to_plain
from ehr_sequencing.run_tables import BenchmarkTracker, best_runs, group_runs
from ehr_sequencing.sequences import build_store
from ehr_sequencing.splits import split_patients
from ehr_sequencing.survival import survival_curves
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.tracking import ExperimentTracker
from ehr_sequencing.training import Trainer, ValidationConcordance
from ehr_sequencing.vocabulary import fit_vocabulary

DATA = {"fingerprint": "abc", "split": "seed 0", "task": "x", "counts": {"test": {"patients": 100, "events": 7}}}


def begin(folder, settings={"a": 1}, data=DATA, **options):
    tracker = ExperimentTracker(folder, **options)
    tracker.start(settings, data, seed=0)
    return tracker


def finished(folder, c=0.7, **options):
    tracker = begin(folder, **options)
    tracker.log({"epoch": 0, "validation_loss": 1.0})
    tracker.finish(metrics={"c_index": (c, c - 0.1, c + 0.1)})
    return load_run(folder)


def names(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ---- nothing of single patients


@pytest.fixture(scope="module")
def cohort():
    made = simulate_cohort(300, seed=0, hazard_ratio=4)
    table = EventTable(with_long_ids(made.table.events), *(getattr(made.table, f) for f in list(EventTable.__dataclass_fields__)[1:]))
    store = build_store(table, fit_vocabulary(table.events, min_patients=5, exclude=[OUTCOME_CODE]))
    labels = label_visits(store, table, Outcome(OUTCOME_CODE))
    return store, labels, split_patients(labels)


def train(cohort, folder, epochs=2, trackers=(), **options):
    store, labels, split = cohort
    marks = {part: draw_landmarks(labels, store, rows) for part, rows in split.items()}
    loaders = [labelled_batches(store, labels, split[part], part == "train", token_budget=4096, max_tokens=64) for part in ("train", "validation")]
    with ExperimentTracker(folder, trackers=trackers, **options) as tracker:
        torch.manual_seed(0)
        model = SurvivalLSTM(LSTMConfig(len(store.vocabulary), 16, 16, 1), labels.horizons)
        tracker.start({"model": model.settings, "epochs": epochs}, DATA | {"fingerprint": store.fingerprint()}, seed=0)
        trainer = Trainer(model, *loaders, metrics=ValidationConcordance(marks["validation"], 1825), callbacks=[tracker], folder=tracker.checkpoints, resume=options.get("resume", False), epochs=epochs, checkpoint_steps=1, device="cpu", show_progress=False)
        trainer.fit()
        test, days = marks["train"], np.linspace(0, 1825, 37)
        curves = survival_curves(model, test, days)
        figures = {"survival": plot_run_survival(run_survival(test.durations, test.events, 1 - curves[:, -1], days, curves, 2)), "calibration": plot_run_calibration(test.durations, test.events, 1 - curves[:, -1], 1825, n_groups=3)}
        tracker.finish(model, store.vocabulary, {"c_index": (0.6, 0.5, 0.7)}, figures)
    return trainer


def test_a_run_of_the_trainer_holds_every_file_and_nothing_of_single_patients(cohort, tmp_path):
    trainer = train(cohort, tmp_path / "run")
    assert set(names(tmp_path / "run")) == {"SUMMARY.txt", "summary.json", "metadata.json", "hyperparameters.json", "logs/metrics_history.json", "model/config.json", "model/model.safetensors", "model/vocabulary.json",
        "checkpoints/best_model.pt", "checkpoints/latest.pt", "checkpoints/previous.pt", "plots/loss_curve.png", "plots/c_index_curve.png", "plots/survival.png", "plots/calibration.png"}
    assert patient_traces(tmp_path / "run", cohort[0]) == {}
    run = load_run(tmp_path / "run")
    assert run.history == json.loads(json.dumps(trainer.history)) and run.best == trainer.run.best["row"] and run.summary["stopped"]["why"] == trainer.stopped
    assert run.summary["model"] == {"class": "SurvivalLSTM", "parameters": sum(p.numel() for p in trainer.module.parameters()), "trainable_parameters": sum(p.numel() for p in trainer.module.parameters())}


def test_a_trainer_alone_starts_its_tracker(cohort, tmp_path):
    store, labels, split = cohort
    loaders = [labelled_batches(store, labels, split[part], part == "train", token_budget=4096, max_tokens=64) for part in ("train", "validation")]
    tracker = ExperimentTracker(tmp_path / "run")
    model = SurvivalLSTM(LSTMConfig(len(store.vocabulary), 8, 8, 1), labels.horizons)
    Trainer(model, *loaders, callbacks=[tracker], folder=tracker.checkpoints, epochs=1, device="cpu", show_progress=False, seed=3).fit()
    tracker.finish(model)
    run = load_run(tmp_path / "run")
    assert run.metadata["data"]["counts"]["train"]["patients"] == len(split["train"]) and run.metadata["data"]["fingerprint"] == store.fingerprint()
    assert run.hyperparameters["training"]["epochs"] == 1 and run.metadata["seed"] == 3 and patient_traces(tmp_path / "run", store) == {}


def test_the_scan_finds_what_is_planted(cohort, tmp_path):
    store = cohort[0]
    one, day, us = int(store.subject_ids[5]), str(store.visit_starts[7].astype("datetime64[D]")), int(store.visit_starts[7].astype("datetime64[us]").astype(np.int64))
    generator, note = np.random.default_rng(0), PngImagePlugin.PngInfo()
    note.add_text("Comment", f"patient {one}", zip=True)
    Image.new("L", (2, 2)).save(tmp_path / "packed.png", pnginfo=note)
    (tmp_path / "id.txt").write_text(f"worst: {one}.")
    (tmp_path / "positive.txt").write_text(f"worst: {abs(one)}.")
    (tmp_path / "day.txt").write_text(f"seen {day}")
    (tmp_path / "compact.txt").write_text(f"seen {day.replace('-', '')}")
    (tmp_path / "bytes.bin").write_bytes(b"abc" + np.int64(one).tobytes() + b"d")
    torch.save({"a": [torch.zeros(3), {"b": torch.tensor([1, one])}]}, tmp_path / "ids.pt")
    torch.save({"a": {"deep": (1, [us])}}, tmp_path / "times.pt")
    save_file({"w": torch.tensor([0.5, float(one)], dtype=torch.float64)}, tmp_path / "floats.safetensors")
    (tmp_path / "rows.json").write_text(json.dumps({"order": generator.permutation(len(store))[:100].tolist()}))
    (tmp_path / f"{one}.json").write_text("{}")
    (tmp_path / "clean.json").write_text(json.dumps({"epochs": 20, "seconds": 12.5, "digest": "0123456789abcdef" * 4, "list": list(range(40))}))
    found = patient_traces(tmp_path, store)
    assert set(found) == set(names(tmp_path)) - {"clean.json"}
    assert found["rows.json"] == ["a list of rows"] and found["times.pt"] == ["times of patients as numbers"] and found["day.txt"] == found["compact.txt"] == ["dates of patients"]
    with pytest.raises(ValueError, match="like any other number"): patient_traces(tmp_path, build_store(simulate_cohort(20, seed=0).table, store.vocabulary))


# ---- whole at every instant


LOGGING = """
import sys
from ehr_sequencing.tracking import ExperimentTracker
tracker = ExperimentTracker(sys.argv[1], resume=True, redraw_seconds=0)
tracker.start({"a": 1}, {"fingerprint": "abc"}, seed=0)
print("ready", flush=True)
first = len(tracker.history)
for k in range(first, first + 100000):
    tracker.log({"step": k, "train_loss": 1 / (k + 1), "validation_loss": 1 / (k + 1)})
    if k == first + 40: tracker.draw()
"""


def test_every_file_is_whole_wherever_the_run_is_killed(tmp_path):
    folder, generator, lengths = tmp_path / "run", np.random.default_rng(0), []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", LOGGING, str(folder)], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0.02, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        run = load_run(folder)
        lengths.append(len(run.history))
        assert [row["step"] for row in run.history] == list(range(len(run.history))) and run.state == "running"
        for path in (folder / "plots").glob("[a-z]*.png"): Image.open(path).load()
    assert sorted(lengths) == lengths and lengths[-1] > 0
    sessions = load_run(folder).metadata["sessions"]
    assert [s["how"] for s in sessions] == ["killed"] * 2 + [None] and all(s["seconds"] > 0 for s in sessions[:2])


def test_a_disk_that_is_full_stops_no_training_but_the_end(tmp_path, monkeypatch):
    tracker, real = begin(tmp_path / "run"), tracking.whole_file
    tracker.log({"epoch": 0, "validation_loss": 1.0})
    def full(path): raise OSError(28, "No space left on device")
    for module in (jobs, tracking): monkeypatch.setattr(module, "whole_file", full)
    with pytest.warns(UserWarning, match="training goes on"): tracker.log({"epoch": 1, "validation_loss": 0.5})
    with pytest.raises(OSError, match="No space left"): tracker.finish()
    for module in (jobs, tracking): monkeypatch.setattr(module, "whole_file", real)
    assert len(load_run(tmp_path / "run").history) == 1 and load_run(tmp_path / "run").state == "running"
    tracker.finish()
    assert len(load_run(tmp_path / "run").history) == 2


def test_no_permission_is_said(tmp_path, monkeypatch):
    def refused(self, *arguments, **options): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(PermissionError, match="out: cannot write to .* Choose another folder with --out"): begin(tmp_path / "run")


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with begin(tmp_path / "run") as tracker:
        tracker.log({"epoch": 0, "validation_loss": 1.0})
        assert tracker.finish(metrics={"c": 1.0}) == {}
    assert not (tmp_path / "run").exists()


# ---- whose folder it is


def test_overwrite_keeps_the_old_run_until_the_new_one_has_something(tmp_path):
    folder = tmp_path / "run"
    finished(folder, 0.7)
    new = begin(folder, overwrite=True)
    assert (tmp_path / ".run.replaced").is_dir() and load_run(folder).state == "running"
    new.log({"epoch": 0, "validation_loss": 1.0})
    assert not (tmp_path / ".run.replaced").exists() and load_run(folder).metrics == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_new_run_that_fails_at_once_gives_the_place_back(tmp_path, error):
    folder = tmp_path / "run"
    before = finished(folder, 0.7)
    with pytest.raises(error):
        with begin(folder, overwrite=True) as tracker:
            (tracker.checkpoints / "latest.pt").write_text("of step 0")
            raise error
    assert load_run(folder).metrics == before.metrics and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_the_next_start_settles_what_a_killed_run_left(tmp_path, options):
    folder = tmp_path / "run"
    finished(folder, 0.7)
    begin(folder, {"a": 2}, overwrite=True)  # and is killed
    if not options:
        with pytest.raises(FileExistsError, match="already holds a run"): begin(folder)
    else: begin(folder, **options)
    assert load_run(folder).hyperparameters == {"a": 1}
    assert (tmp_path / ".run.replaced").exists() == ("overwrite" in options)


def test_killed_between_the_two_renames(tmp_path):
    folder = tmp_path / "run"
    finished(folder, 0.7)
    folder.rename(tmp_path / ".run.replaced")
    with pytest.raises(FileExistsError, match="already holds a run"): begin(folder)
    assert load_run(folder).metrics["c_index"]["value"] == 0.7


def test_a_checkpoint_of_the_new_run_counts_as_something(tmp_path):
    folder = tmp_path / "run"
    finished(folder, 0.7)
    new = begin(folder, {"a": 2}, overwrite=True)
    (new.checkpoints / "previous.pt").write_text("step 10")
    begin(folder, {"a": 2}, resume=True)
    assert not (tmp_path / ".run.replaced").exists() and load_run(folder).hyperparameters == {"a": 2}


def test_what_is_no_run_is_never_touched(tmp_path):
    for name, make in {"data": lambda f: (f / "events.parquet").write_text("mine"), "linked": lambda f: (f / "link").symlink_to(tmp_path), "strange": lambda f: (f / "metadata.json").write_text('{"kind": "something else"}')}.items():
        folder = tmp_path / name
        folder.mkdir()
        make(folder)
        before = names(folder)
        for options in ({}, {"overwrite": True}, {"resume": True}, {"overwrite": True, "resume": True}):
            with pytest.raises(FileExistsError, match="holds no run of this library; it is left as it is"): begin(folder, **options)
        assert names(folder) == before
    for place in ("notes.txt", "plots/mine.pdf", "checkpoints/data.csv", "logs/more.txt", "model/readme.md"):
        folder = tmp_path / place.replace("/", "-")
        finished(folder)
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text("mine")
        with pytest.raises(FileExistsError, match=f"but also {place}, which no run writes"): begin(folder, overwrite=True)
        assert (folder / place).read_text() == "mine" and load_run(folder).state == "finished"


def test_an_empty_tree_is_free(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert finished(tmp_path / "run").state == "finished"


def test_killed_in_the_first_instants(tmp_path):
    (tmp_path / "run" / "plots").mkdir(parents=True)
    (tmp_path / "run" / ".metadata.json.1234abcd-1-2-3").write_text('{"kin')  # while the first file was written
    begin(tmp_path / "run")
    (tmp_path / "run" / "hyperparameters.json").unlink()  # after the first file, before the second
    with pytest.raises(FileExistsError, match="already holds a run"): begin(tmp_path / "run")
    assert begin(tmp_path / "run", resume=True).how == "resume" and load_run(tmp_path / "run").hyperparameters == {"a": 1}


def test_a_linked_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    finished(tmp_path / "run")
    assert finished(tmp_path / "run", 0.8, overwrite=True).metrics["c_index"]["value"] == 0.8
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk" / "summary.json").exists()


# ---- going on


def test_going_on_needs_the_same_settings_and_data(tmp_path):
    folder = tmp_path / "run"
    first = begin(folder, {"model": {"size": 3, "layers": 1}, "device": "cpu"})
    first.log({"epoch": 0, "validation_loss": 1.0})
    with pytest.raises(ValueError, match="started with other model.size.* Give the same settings"): begin(folder, {"model": {"size": 4, "layers": 1}, "device": "cpu"}, resume=True)
    with pytest.raises(ValueError, match="started with other data.fingerprint"): begin(folder, {"model": {"size": 3, "layers": 1}, "device": "cpu"}, DATA | {"fingerprint": "other"}, resume=True)
    with pytest.raises(ValueError, match="started with other model.heads"): begin(folder, {"model": {"size": 3, "layers": 1, "heads": 1}, "device": "cpu"}, resume=True)
    with begin(folder, {"model": {"size": 3, "layers": 1}, "device": "cuda"}, resume=True) as again:
        assert again.how == "resume" and len(again.history) == 1
        again.log({"epoch": 0, "validation_loss": 0.9})  # the same place again
        again.log({"epoch": 1, "validation_loss": 0.8})
        again.finish()
    run = load_run(folder)
    assert [r["validation_loss"] for r in run.history] == [0.9, 0.8] and run.best == 1 and len(run.timings) == 2
    assert begin(folder, {"model": {"size": 4, "layers": 1}}, resume=True, overwrite=True).how == "overwrite"


def test_time_is_the_sum_of_sessions(tmp_path):
    folder = tmp_path / "run"
    first = begin(folder)
    first._began -= 100
    first.log({"epoch": 0, "validation_loss": 1.0})  # and is killed
    second = begin(folder, resume=True, price_per_hour=36.0)
    second._began -= 50
    second.log({"epoch": 1, "validation_loss": 0.9})
    assert 150 <= load_run(folder).seconds < 152
    summary = second.finish()
    assert 150 <= summary["seconds"] < 153 and abs(summary["cost"]["amount"] - summary["seconds"] / 100) < 1e-9
    assert [s["how"] for s in load_run(folder).metadata["sessions"]] == ["killed", "finished"] and "1 of them killed" in (folder / "SUMMARY.txt").read_text()


def test_how_a_run_ended_is_noted(tmp_path):
    for error, how in ((KeyboardInterrupt, "interrupted"), (MemoryError, "stopped by MemoryError")):
        with pytest.raises(error):
            with begin(tmp_path / how) as tracker:
                tracker.log({"epoch": 0, "validation_loss": 1.0})
                raise error("a path /home/ann and a patient")
        run = load_run(tmp_path / how)
        assert (run.state, run.metadata["sessions"][0]["how"], len(run.history)) == ("stopped", how, 1)
        assert not any(b"ann" in (tmp_path / how / name).read_bytes() for name in names(tmp_path / how) if name.endswith(".json"))
    with begin(tmp_path / "left"): pass
    assert load_run(tmp_path / "left").metadata["sessions"][0]["how"] == "left before it was finished"


# ---- what is written


plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.floats(width=32).map(np.float32) | st.integers(-9, 9).map(np.int64), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4) | st.tuples(inner, inner), max_leaves=20)


@given(plain)
@settings(max_examples=300, deadline=None)
def test_whatever_is_plain_is_json_without_nan(value):
    text = json.dumps(to_plain(value), allow_nan=False)
    assert json.loads(text) == to_plain(value) == to_plain(json.loads(text))


def test_undefined_numbers_are_null_and_said(tmp_path):
    with begin(tmp_path / "run") as tracker:
        for epoch, c in enumerate((float("nan"), 0.6, float("inf"))): tracker.log({"epoch": epoch, "validation_loss": 1.0 - epoch / 10, "c_index": c})
        tracker.finish(metrics={"brier": float("nan"), "c_index": (0.6, float("nan"), float("nan"))})
    for name in ("summary.json", "logs/metrics_history.json", "metadata.json"): json.loads((tmp_path / "run" / name).read_text(), parse_constant=lambda c: pytest.fail(c))
    run = load_run(tmp_path / "run")
    assert [r["c_index"] for r in run.history] == [None, 0.6, None] and run.summary["undefined"] == ["brier", "c_index (at 2 of 3 evaluations)"]
    assert "undefined, and null in summary.json: brier, c_index (at 2 of 3 evaluations)" in (tmp_path / "run" / "SUMMARY.txt").read_text()


def test_small_counts_are_hidden_and_paths_cut(tmp_path):
    with begin(tmp_path / "run", {"store": Path("/home/ann/store"), "init": "/home/ann/mlm"}) as tracker: tracker.finish()
    text = "".join((tmp_path / "run" / name).read_text() for name in names(tmp_path / "run") if not name.endswith("png"))
    assert '"<10"' in text and "<10 events" in text and "ann" not in text and socket.gethostname() not in text


def test_the_summary_fits_a_terminal(tmp_path):
    with begin(tmp_path / "run", data=DATA | {"task": "a long name of an outcome " * 10, "counts": {p: {f"patients_with_{k}": 10**k for k in range(2, 8)} for p in ("train", "test")}}) as tracker: tracker.finish(metrics={"c_index": (0.7, 0.6, 0.8)})
    text = (tmp_path / "run" / "SUMMARY.txt").read_text()
    assert max(map(len, text.splitlines())) <= 80 and text.isascii() and "c_index  0.7000   (95% interval 0.6000 to 0.8000)" in text


def test_pictures_are_drawn_only_when_due(tmp_path, monkeypatch):
    tracker, drawn, clock = begin(tmp_path / "run", redraw_seconds=60), [], [0.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: clock[0])
    tracker._began, tracker._next_drawing = 0.0, 60.0
    def draw(): drawn.append(clock[0]); clock[0] += 2.0
    monkeypatch.setattr(tracker, "draw", draw)
    for step in range(500):
        clock[0] += 1.0
        tracker.log({"step": step, "validation_loss": 1.0})
    assert len(drawn) == 3 and drawn[0] == 60.0 and all(b - a >= 200 for a, b in zip(drawn, drawn[1:]))  # a hundredth of the time at most


def test_names_of_figures_are_names(tmp_path):
    with begin(tmp_path / "run") as tracker:
        with pytest.raises(ValueError, match="figures: expected names of letters"): tracker.finish(figures={"../../x": Figure()})
        tracker.finish(figures={"mine": Figure()})
    assert (tmp_path / "run" / "plots" / "mine.png").exists()
    Image.open(tmp_path / "run" / "plots" / "mine.png").load()
    assert Image.open(tmp_path / "run" / "plots" / "mine.png").info.keys() <= {"dpi"}


@given(st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4), min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_hidden_cell_of_a_row_can_be_worked_out(rows):
    counts = np.array(rows)
    hidden = run_figures._hidden_cells(counts, 10)
    assert not (~hidden & (counts > 0) & (counts < 10)).any() and not (hidden & (counts == 0)).any()
    assert all(h.sum() != 1 or (c[~h] == 0).all() for h, c in zip(hidden, counts))


def test_survival_of_groups_against_lifelines():
    generator = np.random.default_rng(0)
    for n in (60, 200):
        durations, events, risks, days = generator.integers(1, 900, n), generator.random(n) < 0.5, generator.random(n), np.arange(0, 900, 25)
        table = run_survival(durations, events, risks, days, n_groups=2)
        for g, t in table.groupby("group"):
            mine = (risks > np.median(risks)) == bool(g)
            km = KaplanMeierFitter().fit(durations[mine], events[mine])
            np.testing.assert_allclose(t.observed, km.predict(t.days).to_numpy(), atol=1e-12)
            assert t.at_risk.tolist() == [(durations[mine] >= d).sum() for d in t.days] and t.at_risk.min() >= 10 and (durations[mine] >= days[days > t.days.max()][:1]).sum() < 10


# ---- TensorBoard and MLflow


def test_tensorboard_hears_every_row_once_and_not_the_name_of_the_machine(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = tmp_path / "run"
    first = begin(folder, {"a": 1, "b": {"c": None, "d": [1, 2]}}, trackers=("tensorboard",))
    for epoch in range(3): first.log({"epoch": epoch, "validation_loss": 1.0 - epoch / 10})
    first._elsewhere.trackers[0].writer.flush()  # and is killed
    with begin(folder, {"a": 1, "b": {"c": None, "d": [1, 2]}}, trackers=("tensorboard",), resume=True) as second:
        second.log({"epoch": 3, "validation_loss": 0.65})
        second.finish()
    files = [p for p in (folder / "logs" / "tensorboard").glob("events*")]
    assert len(files) == 2 and not any(socket.gethostname() in p.name for p in (folder / "logs").rglob("*"))
    heard = []
    for path in sorted(files, key=lambda p: p.stat().st_mtime):
        log = EventAccumulator(str(path))
        log.Reload()
        heard += [(e.step, round(e.value, 6)) for e in log.Scalars("validation_loss")]
    assert heard == [(0, 1.0), (1, 0.9), (2, 0.8), (3, 0.65)]
    begin(folder, overwrite=True).log({"epoch": 0, "validation_loss": 1.0})  # its files are a run's, and go with it
    assert not (folder / "logs" / "tensorboard").exists()


def test_mlflow_hears_every_row(tmp_path, monkeypatch):
    if not is_mlflow_available(): pytest.skip("mlflow is not installed")
    import mlflow
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri((tmp_path / "mlflow").as_uri())
    with begin(tmp_path / "heard", {"a": 1, "b": {"c": None}}, trackers=("mlflow",)) as tracker:
        for epoch in range(3): tracker.log({"epoch": epoch, "validation_loss": 1.0 - epoch / 10})
        tracker.finish()
    client = mlflow.MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("heard").experiment_id])
    assert len(found) == 1 and found[0].info.status == "FINISHED" and found[0].data.params == {"a": "1", "b.c": "null"}
    assert [(m.step, m.value) for m in sorted(client.get_metric_history(found[0].info.run_id, "validation_loss"), key=lambda m: m.step)] == [(0, 1.0), (1, 0.9), (2, 0.8)]


# ---- tables of runs


def run_of(name, value, data, state="finished", low=None, high=None, **facts):
    return Run(Path(name), name, state, {}, {"data": data, "sessions": [{"seconds": 1.0, "ended": "x"}]}, summary={"metrics": {"c_index": {"value": value, "low": low, "high": high, **facts}}, "model": {"parameters": 10, "trainable_parameters": 5}})


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.sampled_from("pq"), st.floats(0, 1), st.sampled_from(["finished", "running", "stopped"])), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_runs_are_ranked_within_their_question_only(drawn):
    runs = [run_of(f"r{i}", v, {"fingerprint": f, "split": s, "task": t}, state) for i, (f, s, t, v, state) in enumerate(drawn)]
    groups = group_runs(runs)
    for i, a in enumerate(drawn):
        for j, b in enumerate(drawn): assert (groups[i] == groups[j]) == (a[:3] == b[:3])
    if not any(state == "finished" for *_, state in drawn):
        with pytest.raises(ValueError, match="no finished run has 'c_index'"): best_runs(runs, groups, "c_index")
        return
    best = best_runs(runs, groups, "c_index")
    for group, row in best.iterrows():
        values = [d[3] for d, g in zip(drawn, groups) if g == group and d[4] == "finished"]
        assert row["value"] == max(values) and row["of"] == len(values)
    report = BenchmarkTracker(runs).to_markdown()
    assert ("cannot be compared with each other" in report) == (len(set(groups)) > 1)
    assert all(run.name in report for run in runs)


def test_a_table_from_folders(tmp_path):
    for name, c in (("one", 0.6), ("two", 0.7)): finished(tmp_path / name, c, price_per_hour=1.0)
    begin(tmp_path / "three").log({"epoch": 0, "validation_loss": 1.0})
    begin(tmp_path / "two", overwrite=True)  # the old run lies beside it, hidden, and is not a run of the table
    bench = BenchmarkTracker(tmp_path)
    assert sorted(bench.table()["run"]) == ["one", "three", "two"] and bench.best("c_index").loc["A", "run"] == "one"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Not finished" in bench.to_markdown() and bench.table()["cost"].notna().sum() == 1
    (tmp_path / "three" / "logs" / "metrics_history.json").write_text("{")
    with pytest.raises(ValueError, match="metrics_history.json: is damaged"): BenchmarkTracker(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no locks of folders there")
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_folder_in_which_another_process_works_is_left_alone(tmp_path, how, monkeypatch):
    first = ExperimentTracker(tmp_path / "run")
    first.start({"a": 1}, {"fingerprint": "x"})
    first.log({"epoch": 0, "step": 1, "validation_loss": 1.0})
    first._locks.close()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    code = f"import fcntl, os, time; fcntl.flock(os.open({str(tmp_path / 'run')!r}, os.O_RDONLY), fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    holder.stdout.readline()
    monkeypatch.setattr("ehr_sequencing.tracking.only_one", functools.partial(only_one, wait=0.1))
    with pytest.raises(BlockingIOError, match="another process is writing a run there"): ExperimentTracker(tmp_path / "run", **{how: True}).start({"a": 1}, {"fingerprint": "x"})
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    holder.kill()
    holder.wait()
    assert ExperimentTracker(tmp_path / "run", **{how: True}).start({"a": 1}, {"fingerprint": "x"}) == how
