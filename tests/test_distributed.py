"""Two processes do what one does: the same patients, the same curve, each file once; stopped or killed with two, a run goes on with one.

accelerate's own launcher starts two processes on a CPU with `--multi_gpu`; with `--cpu --num_processes 2` it starts one. Most runs here are started once, all by the same launch, since two processes take seconds to begin."""
import json
import os
import signal
import socket
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from training_runs import make_trainer, prepare, read_state, run, start, wait_for

BIN = Path(sys.executable).parent
PLAIN = {"model": {"dropout": 0.0}, "epochs": 2, "train_rows": 50} # dropout draws other zeros on other processes
RUNS = {  # name -> kind, options
    "survival": ("survival", {}), "survival in four pieces": ("survival", {"gradient_accumulation_steps": 4}), "adapters, C-index": ("lora", {"monitor": "c_index", "evaluate_every": 5}),
    "frozen": ("frozen", {}), "masked codes": ("mlm", {}), "masked codes in four pieces": ("mlm", {"gradient_accumulation_steps": 4}), "both": ("both", {}), "few masked codes": ("rare", {}), "a head that is not used": ("heads", {"gradient_accumulation_steps": 2})}


def launcher(kind="torchrun"):
    "A command that starts two processes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if kind == "torchrun": return BIN/"torchrun", "--nproc_per_node", "2", "--master_port", port
    return BIN/"accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(folder): return prepare(folder)


@pytest.fixture(scope="module")
def pair(data, folder):
    "All runs on two processes, under one launch; and on this one."
    for name, (kind, options) in RUNS.items(): make_trainer(data, kind, folder/"one"/name, **PLAIN | options).fit()
    process = start(folder, folder/"two", "many", launcher=launcher(), runs=[[name, kind, PLAIN | options] for name, (kind, options) in RUNS.items()])
    assert process.wait(150) == 0, Path(f"{folder}/two.txt").read_text()[-3000:]
    return folder


def furthest(first, second):
    "The largest difference of two histories: of losses and learning rates, and of the C-index, of which one pair of patients is 1e-4 and more."
    first, second = (pd.DataFrame(state["run"]["history"]) for state in (first, second))
    assert first.shape == second.shape and (first["step"] == second["step"]).all()
    apart = (first - second).abs().max()
    return apart.drop("c_index", errors="ignore").max(), apart.get("c_index", 0.0)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(pair, name):
    "Losses and learning rates to 1e-4, the C-index to a pair or two, weights too, though AdamW makes steps of gradients that are nothing but rounding (of the biases of keys)."
    one, two = (read_state(pair/where/name/"latest.pt") for where in ("one", "two"))
    assert (len(one["random"]), len(two["random"])) == (1, 2)
    losses, ranks = furthest(one, two)
    assert losses < 1e-4 and ranks < 1e-3
    assert one["run"]["best"]["row"] == two["run"]["best"]["row"]
    assert max((one["model"][n] - t).abs().max() for n, t in two["model"].items() if "key" not in n and "qkv" not in n) < 1e-3


def test_every_patient_once(pair, data):
    "In an epoch, over both processes; of a long history that is cut into windows, each window."
    told = [json.loads((pair/f"two/seen.{rank}.json").read_text()) for rank in (0, 1)]
    for name in ("survival", "masked codes", "masked codes in four pieces"):
        counts = Counter(row for seen in told for row in seen[name])
        kind, options = RUNS[name]
        planned = Counter(int(row) for batch in make_trainer(data, kind, **PLAIN | options).train.plan() for row in batch[0])
        assert counts == planned and (kind == "survival" or set(counts.values()) == {1}) and all(len(seen[name]) >= 5 for seen in told)


def test_each_file_once(pair):
    "By the first process; the other one opens nothing for writing."
    writers = [json.loads((pair/f"two/wrote.{rank}.json").read_text()) for rank in (0, 1)]
    assert writers[1] == 0 and writers[0] > len(RUNS)
    for name in RUNS: assert {p.name for p in (pair/"two"/name).iterdir()} <= {"latest.pt", "previous.pt", "best_model.pt", "best_lora.pt"}


def test_accelerate_launch_and_another_number_of_processes(data, folder):
    "Begun with two under `accelerate launch`, killed, ended with one; and the other way round: the curve of one process. A signal to the launcher's group stops both at the same step."
    options = PLAIN | {"epochs": 3, "checkpoint_steps": 2}
    whole = make_trainer(data, "survival", folder/"whole", **options)
    whole.fit()
    expected = read_state(folder/"whole"/"latest.pt")
    begun = start(folder, folder/"fewer", "survival", launcher=launcher("accelerate"), **options)
    wait_for(lambda: (folder/"fewer"/"previous.pt").exists(), begun)
    os.killpg(begun.pid, signal.SIGKILL)  # the launcher; its processes have groups of their own and are killed by their number
    begun.wait()
    for pid in map(int, (folder/"fewer.pids").read_text().split()): kill(pid)
    assert len(read_state(folder/"fewer"/"latest.pt")["random"]) == 2
    ended = run(folder, folder/"fewer", "survival", **options)
    assert furthest(expected, ended)[0] < 1e-4

    class Stop(Exception): pass
    class At:
        def on_evaluation(self, trainer): raise Stop
    with pytest.raises(Stop): make_trainer(data, "survival", folder/"more", callbacks=[At()], **options).fit()
    more = start(folder, folder/"more", "survival", launcher=launcher(), **options)
    before = (folder/"more").stat().st_mtime_ns
    wait_for(lambda: (folder/"more").stat().st_mtime_ns > before, more)  # the first checkpoint of the two
    more.send_signal(signal.SIGTERM)
    for pid in map(int, (folder/"more.pids").read_text().split()): kill(pid, signal.SIGTERM)  # as a cluster does: to all of them, and the launcher passes its own on
    assert more.wait(60) != 0
    said, kept = (folder/"more.txt").read_text(), read_state(folder/"more"/"latest.pt")
    assert said.count(f"KeyboardInterrupt: stopped after step {kept['run']['steps']}; the checkpoint is in") == 2
    ended = run(folder, folder/"more", "survival", **options)
    assert furthest(expected, ended)[0] < 1e-4


def kill(pid, number=signal.SIGKILL):
    "End one process, if it has not ended."
    try: os.kill(pid, number)
    except ProcessLookupError: pass
