"""Small training runs that tests start, kill and compare: `python training_runs.py FOLDER OUT KIND [JSON]` runs one as a process of its own.

FOLDER holds what `prepare` wrote, OUT is where the checkpoints go, JSON holds settings of the trainer, of the loaders ("loader") and of the model ("model")."""
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ehr_sequencing import checkpoints
from ehr_sequencing.batches import BatchLoader
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.checkpoints import read_state, state_digest
from ehr_sequencing.horizons import labelled_batches
from ehr_sequencing.landmarks import spaced_landmarks
from ehr_sequencing.objectives import Objective
from ehr_sequencing.outcomes import Outcome, label_visits
from ehr_sequencing.pretraining import OBJECTIVES, pretraining_loader, pretraining_model
from ehr_sequencing.sequences import build_store
from ehr_sequencing.survival import BEHRTForSurvival
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.training import Trainer, ValidationConcordance
from ehr_sequencing.vocabulary import fit_vocabulary

PARTS = ("model", "optimizer", "random", "best") # tensors and generators of a checkpoint
SURVIVAL = {"survival": {}, "lora": {"use_lora": True, "lora_rank": 2}, "frozen": {"freeze_behrt": True}, "ranking": {"objective": "ranking"}, "hybrid": {"objective": Objective("hybrid", 0.5, (3.0, 0.7))}}


def prepare(folder, n=120):
    "Synthetic patients, their labels and a split, for the processes to read."
    cohort = simulate_cohort(n, seed=0, hazard_ratio=3)
    store = build_store(cohort.table, fit_vocabulary(cohort.table.events, exclude=[OUTCOME_CODE]))
    labels = label_visits(store, cohort.table, Outcome(OUTCOME_CODE))
    rows = np.random.default_rng(0).permutation(len(store))
    data = store, labels, {"train": np.sort(rows[:2 * len(rows) // 3]), "validation": np.sort(rows[2 * len(rows) // 3:])}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder)/"data.pickle").write_bytes(pickle.dumps(data))
    return data


def make_trainer(data, kind, folder=None, loader=None, model=None, metrics=None, callbacks=(), train_rows=None, **changes):
    "The trainer of a tiny BEHRT: an objective of pre-training, or survival, with adapters or with a frozen encoder."
    store, labels, split = data
    split = split if train_rows is None else split | {"train": split["train"][:train_rows]}
    common, training = {"token_budget": 1024, "max_tokens": 48} | (loader or {}), {"max_patients": 8, "shuffle": True}
    torch.manual_seed(5)
    if kind == "heads":
        built = TwoHeads()
        loaders = [BatchLoader(store, split[part], **common | (training if part == "train" else {})) for part in ("train", "validation")]
    elif kind in SURVIVAL:
        config = BEHRTConfig(len(store.vocabulary), 16, 32, 1, 2, **model or {})
        built = BEHRTForSurvival(config, labels.horizons, **SURVIVAL[kind])
        loaders = [labelled_batches(store, labels, split[part], **common | (training if part == "train" else {})) for part in ("train", "validation")]
        if changes.get("monitor") == "c_index": metrics = ValidationConcordance(spaced_landmarks(labels, store, split["validation"]), 1825, max_tokens=48, token_budget=2048)
    else:
        config = BEHRTConfig(len(store.vocabulary), 16, 32, 1, 2, attention="visit_causal" if kind in ("both", "next_visit") else "bidirectional", **model or {})
        kind, masking = ("mlm", 0.003) if kind == "rare" else (kind, 0.15)  # rare: most batches have nothing masked
        built = pretraining_model(store, split["train"], config, kind)
        loaders = [pretraining_loader(store, split[part], config, kind, masking, i, **common | (training | {"random_end": True} if part == "train" else {})) for i, part in enumerate(("train", "validation"))]
    return Trainer(built, *loaders, metrics=metrics, callbacks=callbacks, folder=folder, **{"epochs": 3, "patients_per_step": 16, "device": "cpu", "show_progress": False, "checkpoint_steps": 2} | changes)


KINDS = (*OBJECTIVES, *SURVIVAL)


class TwoHeads(nn.Module):
    "One of two heads for each batch, by its first patient: the other one has no gradient in it, and where a batch comes last it may be on one process only."
    def __init__(self): super().__init__(); self.even, self.odd = nn.Linear(2, 1), nn.Linear(2, 1)
    def forward(self, batch): return (self.even if batch["rows"][0] % 2 else self.odd)(batch["time_features"].sum(1))[:, 0]
    def loss(self, outputs, batch): return (outputs - batch["visit_ages"].float().mean(1) / 50).square().mean(), len(outputs)


def environment():
    "Of the processes: one thread, this checkout."
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])}


def start(folder, out, kind, launcher=(sys.executable,), **changes):
    "A run as a process, in a group of its own; its output goes to OUT.txt."
    with open(f"{out}.txt", "a") as said:
        return subprocess.Popen([*map(str, launcher), __file__, str(folder), str(out), kind, json.dumps(changes)], stdout=said, stderr=subprocess.STDOUT, env=environment(), start_new_session=True)


def run(folder, out, kind, **options):
    "A run to its end; returns its checkpoint."
    process = start(folder, out, kind, **options)
    if process.wait(120): raise AssertionError(Path(f"{out}.txt").read_text())
    return read_state(Path(out)/"latest.pt")


def wait_for(condition, process, seconds=60):
    "Wait until something is so; fail if the process ends before."
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None: raise AssertionError(f"the process ended with {process.returncode}")
        if time.monotonic() > end: raise AssertionError("nothing happened")
        time.sleep(0.005)


def same(first, second):
    "What of two finished checkpoints agrees to the last bit."
    runs = [{name: part for name, part in state["run"].items() if name not in ("timings", "seconds", "tokens", "stepping")} for state in (first, second)]
    return {part: state_digest(first[part]) == state_digest(second[part]) for part in PARTS} | {"run": state_digest(runs[0]) == state_digest(runs[1])}


def many(data, out, runs):
    "Several runs one after the other, all processes together; each process notes which patients it saw in the first epoch, and how many files it wrote."
    seen, rank, wrote, write = {}, os.environ["RANK"], [], checkpoints._written
    def counted(path, state): wrote.append(str(path)); return write(path, state)
    checkpoints._written = counted
    for name, kind, changes in runs:
        trainer, seen[name] = make_trainer(data, kind, out/name, **changes), []
        step = trainer._step
        def noted(group, spare, patients):
            if trainer.run.epoch == 0: seen[name].extend(row for batch in group[:len(group) - spare] for row in batch["rows"].tolist())
            step(group, spare, patients)
        trainer._step = noted
        trainer.fit()
    for what, told in (("seen", seen), ("wrote", len(wrote))): (out/f"{what}.{rank}.json").write_text(json.dumps(told))


def main(folder, out, kind, changes="{}"):
    torch.set_num_threads(1)
    with open(f"{out}.pids", "a") as pids: print(os.getpid(), file=pids)
    data, changes = pickle.loads((Path(folder)/"data.pickle").read_bytes()), json.loads(changes)
    if kind == "many": many(data, Path(out), **changes)
    else: make_trainer(data, kind, out, **{"resume": True} | changes).fit()


if __name__ == "__main__": main(*sys.argv[1:])
