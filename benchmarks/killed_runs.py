"""Does a training run that is killed at any instant, and resumed each time, end as one that nobody disturbed?

    python benchmarks/killed_runs.py

Each run is a process of its own, killed with SIGKILL at an instant drawn at random from its whole life, and started again, until twenty kills have fallen in each of three settings. A run that ends
before that is compared, and the next one begins. Compared to the last bit: weights, optimiser, random states, history, best weights, and the bytes of best_model.pt and best_lora.pt.
Prints, and writes to benchmarks/results/killed_runs.md: where the kills fell, and whether all was identical.
"""
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import torch
from fastcore.script import call_parse

from ehr_sequencing.batches import BatchLoader
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.checkpoints import read_state, state_digest
from ehr_sequencing.horizons import labelled_batches
from ehr_sequencing.landmarks import spaced_landmarks
from ehr_sequencing.masked_codes import BEHRTForMLM, MaskCodes
from ehr_sequencing.outcomes import Outcome, label_visits
from ehr_sequencing.sequences import build_store, load_sequences
from ehr_sequencing.survival import BEHRTForSurvival
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.training import Trainer, ValidationConcordance
from ehr_sequencing.vocabulary import fit_vocabulary

RESULTS = Path(__file__).resolve().parent / "results" / "killed_runs.md"
FORK = multiprocessing.get_context("fork")  # a new process has the libraries already, so that its life is reading, training and writing
PHASES = ("reading, building, resuming", "a step", "an evaluation", "a write", "after training")
READING, STEP, EVALUATION, WRITE, AFTER = range(5)
SETTINGS = {
    "masked codes": "BEHRT, dropout, another window of long histories in each epoch, an evaluation every seven steps",
    "survival": "BEHRT with LoRA adapters and dropout, batches cut in two (gradient accumulation), the C-index watched, early stopping",
    "two workers": "masked codes again, with two processes that prepare batches ahead",
}


def prepare(scratch):
    "Write synthetic patients, labels and a split."
    cohort = simulate_cohort(260, seed=0, hazard_ratio=3)
    store = build_store(cohort.table, fit_vocabulary(cohort.table.events, exclude=[OUTCOME_CODE]))
    store.save(scratch / "store")
    torch.save(label_visits(store, cohort.table, Outcome(OUTCOME_CODE)), scratch / "labels.pt")
    rows = np.random.default_rng(0).permutation(len(store))
    np.savez(scratch / "split.npz", train=np.sort(rows[60:]), validation=np.sort(rows[:60]))


def make_trainer(setting, scratch, folder):
    "The trainer of a setting; everything it reads lies on the disk."
    store, labels, split = load_sequences(scratch / "store"), torch.load(scratch / "labels.pt", weights_only=False), np.load(scratch / "split.npz")
    torch.manual_seed(1)
    n, common = len(store.vocabulary), {"token_budget": 2048, "max_tokens": 48}
    if setting == "survival":
        loaders = [labelled_batches(store, labels, split[part], part == "train", **common) for part in ("train", "validation")]
        model = BEHRTForSurvival(BEHRTConfig(n, 16, 32, 1, 2), labels.horizons, use_lora=True, lora_rank=4)
        watched = ValidationConcordance(spaced_landmarks(labels, store, split["validation"]), 1825, **common)
        return Trainer(model, *loaders, metrics=watched, monitor="c_index", patience=4, epochs=30, patients_per_step=48, gradient_accumulation_steps=2, checkpoint_steps=4, folder=folder, resume=True, device="cpu", show_progress=False)
    workers = 2 if setting == "two workers" else 0
    loaders = [BatchLoader(store, split[part], transform=MaskCodes(n, seed=i), layout="flat", num_workers=workers * (part == "train"), **common, **({"shuffle": True, "random_end": True, "max_patients": 16} if part == "train" else {}))
               for i, part in enumerate(("train", "validation"))]
    return Trainer(BEHRTForMLM(BEHRTConfig(n, 16, 32, 1, 2, attention="bidirectional")), *loaders, epochs=14 if workers else 28, patients_per_step=32, evaluate_every=7, patience=100, checkpoint_steps=3, folder=folder, resume=True, device="cpu", show_progress=False)


def train(setting, scratch, folder, phase):
    "What a process does; `phase` tells the one that kills it where it is."
    with open(scratch / "said.txt", "ab") as said: os.dup2(said.fileno(), 2)  # what the workers of a killed process say is no news
    torch.set_num_threads(1)
    trainer = make_trainer(setting, scratch, folder)
    save = trainer.save
    def marked():
        before, phase.value = phase.value, WRITE
        save()
        phase.value = before
    def note(module, *ignored): phase.value = STEP if module.training else EVALUATION
    trainer.save = marked
    trainer.module.register_forward_pre_hook(note)
    trainer.fit()
    phase.value = AFTER
    time.sleep(0.1)


def begin(setting, scratch, folder):
    "Start a process."
    phase = FORK.Value("i", READING, lock=False)
    process = FORK.Process(target=train, args=(setting, scratch, folder, phase))
    process.start()
    return process, phase


def what_is_there(folder):
    "What a killed process left, in words."
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    left = [f"a temporary {name}" for name in ("latest.pt", "best_model.pt", "best_lora.pt") if any(other.startswith(f".{name}.") for other in names)]
    if "previous.pt" in names and "latest.pt" not in names: left.append("previous.pt alone, between two renames")
    return left + ([] if {"latest.pt", "previous.pt"} & names else ["no checkpoint yet"])


def outcome(folder):
    "What is compared: digests of the parts of the last checkpoint, and of the files to share."
    state = read_state(folder / "latest.pt")
    run = {name: part for name, part in state["run"].items() if name not in ("timings", "seconds", "tokens", "stepping")}  # seconds are the machine's
    parts = {"weights": state["model"], "optimiser": state["optimizer"], "random states": state["random"], "history and position": run, "best weights": state["best"]}
    return {name: state_digest({"part": part}) for name, part in parts.items()} | {name: (folder / name).read_bytes() for name in ("best_model.pt", "best_lora.pt") if (folder / name).exists()}, state["run"]


def study(setting, scratch, n_kills, seed):
    "Kill and resume until `n_kills` have fallen; returns what is told of it."
    generator, kills, left, runs, identical = np.random.default_rng([seed, *setting.encode()]), Counter(), Counter(), 0, Counter()
    start = time.perf_counter()
    process, _ = begin(setting, scratch, scratch / setting / "undisturbed")
    process.join()
    life = time.perf_counter() - start
    expected, run = outcome(scratch / setting / "undisturbed")
    while sum(kills.values()) < n_kills:
        folder, ended, began = scratch / setting / f"killed{runs}", False, False
        while not ended:
            process, phase = begin(setting, scratch, folder)
            if sum(kills.values()) < n_kills:  # short lives and long ones; six of ten are counted from the end of reading, on which a short life would be spent
                if began and generator.random() < 0.6:
                    while process.is_alive() and phase.value == READING: time.sleep(0.002)
                process.join(generator.uniform(0, 0.25 * life if began else 0.1 * life))
                began = True
                if process.is_alive():
                    where = phase.value
                    os.kill(process.pid, 9)
                    process.join()
                    kills[where] += 1
                    left.update(what_is_there(folder))
                    continue
            process.join()
            if process.exitcode: raise SystemExit(f"{setting}: a resumed run ended with status {process.exitcode}: {(scratch / 'said.txt').read_text()[-2000:]}")
            ended = True
        found, _ = outcome(folder)
        identical.update({name: found[name] == part for name, part in expected.items()})
        runs += 1
    return {"kills": kills, "left": left, "runs": runs, "identical": identical, "steps": run["steps"], "evaluations": len(run["history"]), "life": life, "same": all(identical[name] == runs for name in expected), "parts": list(expected)}


@call_parse
def main(
    kills: int = 20, # in each setting
    seed: int = 0, # of the instants
    out: str = str(RESULTS), # page to write
):
    "Run the three settings and write the page."
    began, scratch = time.perf_counter(), Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    preparing = FORK.Process(target=prepare, args=(scratch,))  # so that this process starts no threads, which a fork would lose
    preparing.start(); preparing.join()
    n_patients = len(np.load(scratch / "split.npz")["train"]) + len(np.load(scratch / "split.npz")["validation"])
    parts = ["# Killed runs", f"`python benchmarks/killed_runs.py`, {date.today()}, {os.cpu_count()} cores of a shared machine, one thread a run, Python {platform.python_version()}, torch {torch.__version__}.",
             f"Processes that train, each killed with SIGKILL at an instant drawn at random, six of ten after it had read its data, and started again, {kills} times in each setting ({n_patients} synthetic patients). A run that ended was compared with one that nobody disturbed, and the next one began."]
    for setting, about in SETTINGS.items():
        said = study(setting, scratch, kills, seed)
        n = sum(said["kills"].values())
        print(f"{setting}: {n} kills in {said['runs']} runs of {said['steps']} steps; identical: {'yes' if said['same'] else 'no'}", flush=True)
        told = ", ".join(f"{count} in {PHASES[where]}" if where != AFTER else f"{count} {PHASES[where]}" for where, count in sorted(said["kills"].items()))
        print(f"  {told}; left behind: {dict(said['left'])}", flush=True)
        parts += [f"## {setting.capitalize()}", f"{about[0].upper()}{about[1:]}. {said['steps']} steps and {said['evaluations']} evaluations in {said['life']:.1f} s undisturbed; {n} kills fell in {said['runs']} run{'s' * (said['runs'] != 1)}.",
                  "| where the kill fell | kills |\n|---|---|\n" + "\n".join(f"| {name} | {said['kills'][i]} |" for i, name in enumerate(PHASES)),
                  "| found afterwards | kills |\n|---|---|\n" + "\n".join(f"| {name} | {count} |" for name, count in sorted(said["left"].items())) if said["left"] else "Nothing half-written was found.",
                  "| compared to the last bit | identical runs |\n|---|---|\n" + "\n".join(f"| {name} | {int(said['identical'][name])} of {said['runs']} |" for name in said["parts"]),
                  f"**Identical: {'yes' if said['same'] else 'no'}.**"]
    shutil.rmtree(scratch, ignore_errors=True)
    parts.append(f"All of it took {(time.perf_counter() - began) / 60:.1f} minutes.")
    Path(out).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{Path(out).name} written")
