"""A run that was killed, stopped, refused room or given a broken file goes on as if nothing had happened, or says why it does not.

`benchmarks/killed_runs.py` kills more often; two processes are in `test_distributed.py`."""
import errno
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_runs import make_trainer, prepare, read_state, run, same, start, wait_for

from ehr_sequencing import checkpoints
from ehr_sequencing.batches import BatchLoader
from ehr_sequencing.checkpoints import state_digest
from ehr_sequencing.initial_codes import code_table, freeze_codes
from ehr_sequencing.masked_codes import BEHRTForMLM, MaskCodes
from ehr_sequencing.training import Trainer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "The same digits on any number of cores."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(folder): return prepare(folder)


class At:
    "A callback that does something at one evaluation."
    def __init__(self, what, at=1): self.what, self.at = what, at
    def on_evaluation(self, trainer):
        if len(trainer.history) == self.at: self.what(trainer)


class Stop(Exception): pass


def stop(trainer): raise Stop
def terminate(trainer): os.kill(os.getpid(), signal.SIGTERM)


def agree(first, second):
    "Two trainers that have ended hold the same, to the last bit."
    assert first.history == second.history and first.run.best == second.run.best and first.run.steps == second.run.steps
    for get in (lambda t: dict(t.module.state_dict()), lambda t: t.optimizer.state_dict(), lambda t: t.best_weights): assert state_digest(get(first)) == state_digest(get(second))


def interrupted(data, kind, folder, at=1, **options):
    "A run that ends with an error at an evaluation."
    with pytest.raises(Stop): make_trainer(data, kind, folder, callbacks=[At(stop, at)], **options).fit()


# processes

@pytest.mark.parametrize("kind, options", [("lora", {"monitor": "c_index", "gradient_accumulation_steps": 2, "evaluate_every": 5, "train_rows": 40}), ("both", {}), ("contrastive", {"loader": {"num_workers": 1}})])
def test_killed_and_resumed(data, folder, kind, options):
    "SIGKILL at any instant, in the first process before it has saved perhaps; the undisturbed run is this process."
    plain = make_trainer(data, kind, folder/f"plain-{kind}", **options)
    plain.fit()
    out, generator = folder/f"killed-{kind}", np.random.default_rng(len(kind))
    for after in (lambda: True, lambda: (out/"previous.pt").exists()):
        process = start(folder, out, kind, **options)
        wait_for(after, process)
        time.sleep(generator.uniform(0, 0.4))
        process.kill()
        process.wait()
    killed = run(folder, out, kind, **options)
    assert set(same(read_state(folder/f"plain-{kind}"/"latest.pt"), killed).values()) == {True}
    for name in ("best_model.pt", "best_lora.pt")[:1 + (kind == "lora")]: assert (out/name).read_bytes() == (folder/f"plain-{kind}"/name).read_bytes()


@pytest.mark.parametrize("number, group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_signals(data, folder, number, group):
    "A signal to the process, or to its group with the workers of the loader: a checkpoint at the end of the step, KeyboardInterrupt, nothing lost."
    out, options = folder/f"signal-{number.name}", {"checkpoint_steps": None, "epochs": 60, "patience": 100, "loader": {"num_workers": 1} if group else {}}
    process = start(folder, out, "mlm", **options)
    wait_for(lambda: (out/"latest.pt").exists(), process)  # the one before the first step
    time.sleep(0.3)
    os.killpg(process.pid, number) if group else process.send_signal(number)
    assert process.wait(30) != 0
    said, kept = Path(f"{out}.txt").read_text(), read_state(out/"latest.pt")
    assert f"KeyboardInterrupt: stopped after step {kept['run']['steps']}; the checkpoint is in {out}" in said
    assert not list(out.glob(".*"))


def test_a_second_signal_does_not_wait(data, folder):
    "In a step that does not end, a second signal ends the run, if it is not the echo of the first; the checkpoint before the step stays."
    trainer = make_trainer(data, "mlm", folder/"second")
    def slow(*ignored):
        for pause in (0, 0.1): time.sleep(pause); terminate(None)
        assert trainer.stop_asked
        time.sleep(2.1)
        terminate(None)
        raise AssertionError("went on")
    trainer._step = slow
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt): trainer.fit()
    assert read_state(folder/"second"/"latest.pt")["run"]["steps"] == 0 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("at", [1, 3])
def test_a_signal_during_an_evaluation(data, folder, at):
    "Also during the last one, after which there is no step."
    out = folder/f"evaluation-{at}"
    with pytest.raises(KeyboardInterrupt, match="stopped"): make_trainer(data, "mlm", out, callbacks=[At(terminate, at)]).fit()
    plain, resumed = make_trainer(data, "mlm"), make_trainer(data, "mlm", out, resume=True)
    plain.fit(), resumed.fit()
    agree(plain, resumed)


# what is resumed

@pytest.mark.parametrize("kind, options", [("frozen", {}), ("ranking", {}), ("hybrid", {"gradient_accumulation_steps": 2}), ("mlm", {"mixed_precision": "bf16"}), ("lora", {"patience": 1, "monitor": "train_loss", "maximize": True, "evaluate_every": 4})])
def test_resumed_in_this_process(data, folder, kind, options):
    "A frozen encoder, products in 16 bits, early stopping; and a run that has ended says the same again."
    plain, out = make_trainer(data, kind, **options), folder/f"again-{kind}"
    plain.fit()
    interrupted(data, kind, out, **options)
    for _ in range(2):
        resumed = make_trainer(data, kind, out, resume=True, **options)
        resumed.fit()
        agree(plain, resumed)
    assert resumed.stopped == plain.stopped


def test_what_may_change(data, folder):
    "Checkpoints more or less often, another precision, another device: the run goes on."
    interrupted(data, "mlm", folder/"free")
    trainer = make_trainer(data, "mlm", folder/"free", resume=True, checkpoint_steps=None, checkpoint_minutes=3, mixed_precision="bf16", device="auto")
    assert len(trainer.fit()) == 3


def test_rows_of_codes_stay_frozen(data, folder):
    "Through a kill, and if they were forgotten the run is refused."
    def build(*callbacks, resume=False, rows=range(5, 60)):
        trainer = make_trainer(data, "mlm", folder/"rows", callbacks=callbacks, resume=resume)
        freeze_codes(trainer.module, rows)
        return trainer
    first = build(At(stop, 2))
    table = code_table(first.module).weight.detach().clone()
    with pytest.raises(Stop): first.fit()
    for rows in ([], range(6, 61)):
        with pytest.raises(ValueError, match="keeps 55 rows of its table of codes"): build(resume=True, rows=rows).fit()
    resumed = build(resume=True)
    resumed.fit()
    weight = code_table(resumed.module).weight
    assert torch.equal(weight[5:60], table[5:60]) and not torch.equal(weight[60:], table[60:])


def test_one_transform_for_both_loaders(data, folder):
    "Stopped between the last step of an epoch and its evaluation: masks of the validation patients are those of that epoch."
    store, _, split = data
    def build(out=None, resume=False):
        mask = MaskCodes(len(store.vocabulary))
        torch.manual_seed(0)
        loaders = (BatchLoader(store, split[part], transform=mask, layout="flat", max_tokens=48, max_patients=8) for part in ("train", "validation"))
        return Trainer(BEHRTForMLM(make_trainer(data, "mlm").module.config), *loaders, epochs=3, patients_per_step=16, device="cpu", show_progress=False, folder=out, resume=resume)
    plain, stopped = build(), build(folder/"shared")
    plain.fit()
    step = stopped._step
    def then_stop(*group):
        step(*group)
        if (stopped.run.epoch, stopped.run.step) == (2, 0): terminate(None)
    stopped._step = then_stop
    with pytest.raises(KeyboardInterrupt): stopped.fit()
    resumed = build(folder/"shared", resume=True)
    resumed.fit()
    agree(plain, resumed)


# what does not fit

@pytest.fixture(scope="module")
def begun(data, folder):
    "A run of survival that was stopped."
    interrupted(data, "survival", folder/"begun")
    return folder/"begun"


@pytest.mark.parametrize("changes, says", [({"epochs": 4}, "begun with epochs=3, and now it is 4"), ({"evaluate_every": 5}, "begun with evaluate_every=None"), ({"seed": 1}, "begun with seed=0"),
    ({"model": {"intermediate_size": 64}}, "another architecture: 'behrt"), ({"kind": "mlm"}, "of a BEHRTForSurvival, and this model is a BEHRTForMLM"), ({"kind": "lora"}, "another architecture"), ({"kind": "frozen"}, "other parts are frozen"), ({"kind": "ranking"}, "the run minimises {'name': 'nll'}, and this model {'name': 'ranking'"),
    ({"train_rows": 70}, "other patients"), ({"loader": {"tile": False}}, "other patients, or with other labels, masks or batches"), ({"loader": {"seed": 3}}, "other patients"), ({"loader": {"max_tokens": 40}}, "other patients")])
def test_refused(data, begun, changes, says):
    "By name; and the checkpoint is left as it was."
    before = (begun/"latest.pt").read_bytes()
    with pytest.raises(ValueError, match=says): make_trainer(data, begun and changes.get("kind", "survival"), begun, resume=True, **{name: value for name, value in changes.items() if name != "kind"}).fit()
    with pytest.raises(FileExistsError, match="holds the checkpoint of another run"): make_trainer(data, "survival", begun).fit()
    assert (begun/"latest.pt").read_bytes() == before


def test_other_contents_and_labels(data, begun, folder):
    "Of the same size: other codes in the store, other events."
    store, labels, split = data
    other = pickle.loads(pickle.dumps(store))
    other.tokens = np.roll(np.array(other.tokens), 7)
    events = pickle.loads(pickle.dumps(labels))
    for name, value in vars(events).items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f": setattr(events, name, value + 1)
    for changed in ((other, labels, split), (store, events, split)):
        with pytest.raises(ValueError, match="other labels"): make_trainer(changed, "survival", begun, resume=True).fit()
    interrupted(data, "mlm", folder/"masks")
    with pytest.raises(ValueError, match="other labels, masks"): make_trainer((other, labels, split), "mlm", folder/"masks", resume=True).fit()


# files that are broken

class Evil:
    "A pickle that would create a file."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, "w"))


def break_file(path, how, trap):
    "Damage a checkpoint."
    whole = path.read_bytes()
    if how == "truncated": path.write_bytes(whole[:len(whole) // 2])
    if how == "empty": path.write_bytes(b"")
    if how == "flipped": path.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 4]) + whole[len(whole) // 2 + 1:])
    if how == "pickle": path.write_bytes(pickle.dumps(Evil(trap)))
    if how == "torch": torch.save({"format": checkpoints.FORMAT, "state": Evil(trap)}, path)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "pickle", "torch"])
def test_broken_latest(data, folder, tmp_path, how):
    "The one before is used and the file named; no code runs; the run ends as if nothing had happened; and a kill at the next save finds the good one."
    out = tmp_path/"run"
    interrupted(data, "mlm", out, 2, checkpoint_steps=1)
    good = (out/"previous.pt").read_bytes()
    break_file(out/"latest.pt", how, tmp_path/"trap")
    plain = make_trainer(data, "mlm", checkpoint_steps=1)
    plain.fit()
    with pytest.warns(UserWarning, match="latest.pt.*Going on from previous.pt"):
        first = make_trainer(data, "mlm", out, resume=True, checkpoint_steps=1)
        kept = []
        save = first.checkpoints.save
        def watched(state):
            save(state)
            kept.append((out/"previous.pt").read_bytes())
            raise Stop
        first.checkpoints.save = watched
        with pytest.raises(Stop): first.fit()
    assert kept == [good]
    resumed = make_trainer(data, "mlm", out, resume=True, checkpoint_steps=1)
    resumed.fit()
    agree(plain, resumed)
    assert not (tmp_path/"trap").exists()


def test_both_broken(data, folder, tmp_path):
    "Nothing good is left: an error that names both files, and nothing is written."
    interrupted(data, "mlm", tmp_path/"run", 2)
    for name, how in (("latest.pt", "truncated"), ("previous.pt", "torch")): break_file(tmp_path/"run"/name, how, tmp_path/"trap")
    before = {path.name: path.read_bytes() for path in (tmp_path/"run").iterdir()}
    with pytest.raises(ValueError, match="latest.pt.*previous.pt.*"): make_trainer(data, "mlm", tmp_path/"run", resume=True).fit()
    assert {path.name: path.read_bytes() for path in (tmp_path/"run").iterdir()} == before and not (tmp_path/"trap").exists()


# a disk that is full, memory that runs out, numbers that are none

@pytest.mark.parametrize("number, says", [(errno.ENOSPC, "no room|No space"), (errno.EACCES, "permission|Permission"), (errno.EIO, "Input/output")])
@pytest.mark.parametrize("name", ["latest.pt", "best_model.pt"])
def test_no_room(data, tmp_path, monkeypatch, number, says, name):
    "The run stops with an OSError that says why; the checkpoint before is intact, and the run goes on from it."
    out, real, count = tmp_path/"run", os.fsync, []
    def fsync(handle):
        target = os.readlink(f"/proc/self/fd/{handle}") if Path("/proc/self/fd").exists() else ""
        if f".{name}." in target:
            count.append(target)
            if len(count) > 4: raise OSError(number, os.strerror(number), target)
        return real(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=says) as error: make_trainer(data, "mlm", out, checkpoint_steps=1).fit()
    assert error.value.errno == number
    monkeypatch.undo()
    if not count: pytest.skip("no /proc here")
    assert read_state(out/"latest.pt")["run"]["steps"] > 0 and not list(out.glob(".*"))
    plain, resumed = make_trainer(data, "mlm", checkpoint_steps=1), make_trainer(data, "mlm", out, resume=True, checkpoint_steps=1)
    plain.fit(), resumed.fit()
    agree(plain, resumed)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
@pytest.mark.parametrize("training", [True, False])
def test_out_of_memory(data, tmp_path, error, training):
    "Says where, and which setting to lower; the checkpoint stays."
    trainer = make_trainer(data, "mlm", tmp_path/"run", checkpoint_steps=1)
    def raise_later(module, *ignored):
        if trainer.run.steps >= 2 and module.training == training: raise error
    trainer.module.register_forward_pre_hook(raise_later)
    with pytest.raises(MemoryError, match="epoch 0, step 2, batch 0 of .: out of memory. Raise --gradient_accumulation_steps" if training else "validation, batch 0: out of memory"): trainer.fit()
    assert read_state(tmp_path/"run"/"latest.pt")["run"]["steps"] >= 2


def test_not_a_number(data, tmp_path):
    "The step is named, and the checkpoint before it holds finite weights."
    trainer = make_trainer(data, "survival", tmp_path/"run", checkpoint_steps=1)
    def poison(module, inputs, output): return output * (float("nan") if trainer.run.steps >= 3 else 1.0)
    trainer.module.register_forward_hook(poison)
    with pytest.raises(ValueError, match="epoch 0, step 3, batch 0 of"): trainer.fit()
    kept = read_state(tmp_path/"run"/"latest.pt")
    assert kept["run"]["steps"] == 3 and all(t.isfinite().all() for t in kept["model"].values())


def test_metrics_that_do_not_serve(data):
    "NaN cannot be watched, the columns of the history are taken, and a model without anything to train is refused."
    with pytest.raises(ValueError, match="monitor: 'c' is nan after step 4"): make_trainer(data, "mlm", metrics=lambda model: {"c": float("nan")}, monitor="c", maximize=True).fit()
    with pytest.raises(ValueError, match="metrics: 'step' is a column"): make_trainer(data, "mlm", metrics=lambda model: {"step": 0}).fit()
    assert len(make_trainer(data, "mlm", metrics=lambda model: None, epochs=1).fit()) == 1
    for name, value in (("learning_rate", "fast"), ("seed", None), ("epochs", 2.0)):
        with pytest.raises(ValueError, match=f"{name}: expected"): make_trainer(data, "mlm", **{name: value})
    model = nn.Linear(2, 2).requires_grad_(False)
    model.loss = lambda outputs, batch: (outputs.sum(), 1)
    loader = make_trainer(data, "mlm").train
    with pytest.raises(ValueError, match="no parameter of this Linear is to be trained"): Trainer(model, loader, loader, device="cpu")


# all ways to stop, drawn

class Rates(nn.Module):
    "Logits of codes that depend on the number of tokens, with dropout and noise from three generators: cheap, and every draw shows."
    def __init__(self, n): super().__init__(); self.codes = nn.Linear(3, n)
    def forward(self, batch):
        x = torch.stack([batch["attention_mask"].sum(1).float().log(), torch.full((len(batch["codes"]),), random.random() if self.training else 0.5), torch.full((len(batch["codes"]),), float(np.random.random()) if self.training else 0.5)], 1)
        return self.codes(nn.functional.dropout(x, 0.3, self.training))
    def loss(self, logits, batch):
        there = batch["masked_labels"] >= 0
        rows = there.nonzero()[:, 0]
        return (nn.functional.cross_entropy(logits[rows], batch["masked_labels"][there]) if len(rows) else logits.sum() * 0), len(rows)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), schedule=st.sampled_from(["cosine", "linear", "constant"]), warmup=st.sampled_from([0.0, 0.1, 0.7]), evaluate_every=st.sampled_from([None, 1, 2, 3, 7]), patients_per_step=st.sampled_from([3, 16, 1000]),
       checkpoint_steps=st.sampled_from([1, 2, 5]), accumulation=st.sampled_from([1, 3]), patience=st.sampled_from([1, 2, 9]), stops=st.lists(st.integers(0, 30), max_size=4), how=st.sampled_from(["signal", "error"]))
def test_drawn_runs(data, tmp_path_factory, seed, schedule, warmup, evaluate_every, patients_per_step, checkpoint_steps, accumulation, patience, stops, how):
    "Whatever the schedule, however often it evaluates and saves, and wherever it is stopped: the same run."
    store, _, split = data
    def build(out=None, at=None):
        torch.manual_seed(seed)
        loaders = (BatchLoader(store, rows, transform=MaskCodes(len(store.vocabulary), seed=i), layout="flat", max_tokens=32, max_patients=4, shuffle=True, random_end=True, seed=seed) for i, rows in enumerate((split["train"][:24], split["validation"][:8])))
        trainer = Trainer(Rates(len(store.vocabulary)), *loaders, epochs=3, patients_per_step=patients_per_step, schedule=schedule, warmup=warmup, evaluate_every=evaluate_every, checkpoint_steps=checkpoint_steps,
                          gradient_accumulation_steps=accumulation, patience=patience, seed=seed, device="cpu", show_progress=False, learning_rate=0.3, folder=out, resume=out is not None)
        step = trainer._step
        def counted(*group):
            step(*group)
            if at is not None and trainer.run.steps == at:
                if how == "error": raise Stop
                terminate(None)
        trainer._step = counted
        return trainer
    plain, out = build(), tmp_path_factory.mktemp("drawn")
    plain.fit()
    for at in stops:
        try: build(out, at).fit()
        except (Stop, KeyboardInterrupt): pass
    last = build(out)
    last.fit()
    agree(plain, last)
    shutil.rmtree(out)
