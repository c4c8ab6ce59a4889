"""What the tracker and the loader cost, as a share of a training step.

    python benchmarks/tracker_overhead.py                   # the processor, about three minutes
    python benchmarks/tracker_overhead.py --device cuda     # writes training_overhead_cuda.md

The small preset of BEHRT for survival, 32 patients a step, on synthetic patients. The loader's share is the time that the loop waits for batches, within the time of all steps, evaluations left out.
The tracker's share is the time spent in its callbacks, divided by the time of the steps since the evaluation before: at evaluations after each epoch, and after every tenth step, which is more often than anybody evaluates. Beside it, the plain
ratio of whole runs with and without a tracker, in turns, the fastest of each; it holds all that a callback might slow down indirectly, and the noise of the machine. There a processor is asked for its own time, lest others who use the machine be counted, and a GPU for the time on the clock. What comes once a run, however long it is, is told apart: finding out versions and hardware at the start, and at the end the curves, the model and the summary.

Prints, and writes a page to benchmarks/results.
"""
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from fastcore.script import call_parse

from ehr_sequencing.configs import get_model_config
from ehr_sequencing.horizons import labelled_batches
from ehr_sequencing.outcomes import Outcome, label_visits
from ehr_sequencing.sequences import build_store
from ehr_sequencing.splits import split_patients
from ehr_sequencing.survival import BEHRTForSurvival
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.tracking import ExperimentTracker
from ehr_sequencing.training import Trainer
from ehr_sequencing.vocabulary import fit_vocabulary

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 32


class Stopwatch:
    "Seconds spent in the calls that it wraps, and how many they were."
    def __init__(self): self.spent = []

    def wrap(self, function):
        def timed(*arguments, **options):
            began = time.perf_counter()
            try: return function(*arguments, **options)
            finally: self.spent.append(time.perf_counter() - began)
        return timed

    def wait(self, batches):
        "Yield batches; the waiting is counted, and what is done with them is not."
        following = self.wrap(iter(batches).__next__)
        while True:
            try: batch = following()
            except StopIteration: return
            yield batch


def cohort(n):
    "Store, labels and split of synthetic patients."
    made = simulate_cohort(n, seed=0, hazard_ratio=3)
    store = build_store(made.table, fit_vocabulary(made.table.events, min_patients=5, exclude=[OUTCOME_CODE]))
    labels = label_visits(store, made.table, Outcome(OUTCOME_CODE))
    return store, labels, split_patients(labels)


def run(data, device, epochs, every, tracked):
    "Train once: seconds of the whole fit (of the processor, where it trains), of the steps, of waiting for batches, of the tracker's evaluations, number of steps, seconds of start and end of the tracker."
    store, labels, split = data
    torch.manual_seed(0)
    config = get_model_config("small", "transformer", vocab_size=len(store.vocabulary)).model_config
    model, folder = BEHRTForSurvival(config, labels.horizons), Path(tempfile.mkdtemp()) / "run"
    loaders = [labelled_batches(store, labels, split[part], part == "train", layout="flat") for part in ("train", "validation")]
    waiting, stepping, telling, once = Stopwatch(), Stopwatch(), Stopwatch(), Stopwatch()
    tracker = ExperimentTracker(folder, redraw_seconds=60)
    tracker.on_evaluation, tracker.start, tracker.finish = telling.wrap(tracker.on_evaluation), once.wrap(tracker.start), once.wrap(tracker.finish)
    trainer = Trainer(model, *loaders, callbacks=[tracker] if tracked else [], epochs=epochs, patients_per_step=BATCH, evaluate_every=every, patience=10**6, device=device, show_progress=False)
    batches = loaders[0].batches
    loaders[0].batches, trainer._step = lambda planned: waiting.wait(batches(planned)), stepping.wrap(trainer._step)
    clock = time.process_time if device == "cpu" else time.perf_counter
    tracker.start({"device": device}, {"fingerprint": store.fingerprint()}, seed=0)
    began = clock()
    trainer.fit()
    whole = clock() - began
    if tracked: tracker.finish(model, store.vocabulary)
    else: once.spent.append(0.0)
    shutil.rmtree(folder.parent)
    return whole, sum(stepping.spent), sum(waiting.spent), telling.spent, len(stepping.spent), once.spent


@call_parse
def main(
    device: str = "cpu", # or "cuda"
    patients: int = 1500, # of the synthetic cohort
    epochs: int = 3, # of each run
    rounds: int = 3, # of each pair of runs
):
    "Measure, print and write the page."
    torch.set_num_threads(1)
    data, lines = cohort(patients), []
    def say(line): print(line, flush=True); lines.append(line)
    where = torch.cuda.get_device_name() if device == "cuda" else f"one of {os.cpu_count()} cores of a shared machine"
    say(f"# Tracker and loader, as a share of training\n\n`python benchmarks/tracker_overhead.py{' --device cuda' if device == 'cuda' else ''}`, on {where}, Python {platform.python_version()}, PyTorch {torch.__version__}. Small BEHRT for survival, {BATCH} patients a step, {patients:,} synthetic patients, {epochs} epochs, {rounds} rounds; shares are medians over the rounds.\n")
    say("| evaluation | step, ms | loader's share of a step | tracker at an evaluation, ms | tracker's share of the steps | run with tracker / without |\n|---|---|---|---|---|---|")
    run(data, device, 1, None, True)  # loads what is loaded once
    worst, starts = {"loader": 0.0, "tracker": 0.0}, []
    for name, every in (("each epoch", None), ("every 10 steps", 10)):
        rows = []
        for _ in range(rounds):
            plain, tracked = (run(data, device, epochs, every, yes) for yes in (False, True))
            whole, steps, waited, told, n, once = tracked
            rows.append((steps + waited, n, waited / (steps + waited), np.median(told), sum(told) / (steps + waited), whole, plain[0]))
            starts.append(once)
        seconds, n, loader, told, share = np.median(rows, axis=0)[:5]
        ratio = np.divide(*np.min(rows, axis=0)[5:])
        worst = {"loader": max(worst["loader"], loader), "tracker": max(worst["tracker"], share)}
        say(f"| {name} | {1000 * seconds / n:.1f} | {loader:.2%} | {1000 * told:.1f} | {share:.2%} | {ratio:.3f} |")
    begun, ended = np.median(starts, axis=0)
    say(f"\nOnce a run: {begun:.2f} s at its start (the first of a process takes about a second longer, to find out versions and hardware), {ended:.2f} s at its end.")
    for what, limit in (("tracker", 0.02), ("loader", 0.05)): say(f"\nThe {what} takes at most {worst[what]:.2%}, {'within' if worst[what] < limit else 'NOT within'} the limit of {limit:.0%}.")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"training_overhead{'_cuda' if device == 'cuda' else ''}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
