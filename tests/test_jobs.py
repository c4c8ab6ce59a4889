"Files and folders that appear whole, written by several processes of which some are killed; disks without room."
import json
import os
import random
import subprocess
import sys
import time

import pytest

from ehr_sequencing.jobs import remove_leftovers, whole_file, whole_folder

WRITER = """import sys, time; from pathlib import Path; from ehr_sequencing.jobs import whole_file, whole_folder
what, path, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
for i in range(10**9):
    if what == "file":
        with whole_file(path) as new: new.write_text(number * 200_000)
    else:
        with whole_folder(path, replace=True) as new:
            for name in "abc": (new/name).write_text(number * 50_000); time.sleep(0.001)
    if i == 0: print("first", flush=True)
"""
needs_kill = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")


def begin(what, path, number):
    "A process that writes the same again and again; it has done so once."
    child = subprocess.Popen([sys.executable, "-c", WRITER, what, path, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "first\n", child.stderr.read()
    return child


def kill(child):
    child.kill()
    return child.communicate()[1]


@needs_kill
def test_a_file_with_many_writers_of_which_some_are_killed(tmp_path):
    "What is there is always of one writer, whole; a writer that lives is never disturbed; the next write leaves nothing of the dead."
    path, generator = tmp_path / "latest", random.Random(0)
    lasting = begin("file", path, 0)
    for n in range(1, 7):
        child = begin("file", path, n)
        time.sleep(generator.uniform(0, 0.05))
        assert kill(child) == ""
        text = path.read_text()
        assert len(text) == 200_000 and len(set(text)) == 1
    assert lasting.poll() is None and kill(lasting) == ""
    with whole_file(path) as new: new.write_text("end")
    assert [p.name for p in tmp_path.iterdir()] == ["latest"] and path.read_text() == "end"


@needs_kill
def test_a_folder_whose_writers_are_killed(tmp_path):
    "At every instant the folder is there whole, or its predecessor beside it, which the next writer puts back."
    path, generator = tmp_path / "run", random.Random(0)
    for n in range(8):
        child = begin("folder", path, n)
        time.sleep(generator.uniform(0, 0.03))
        assert kill(child) == ""
        remove_leftovers(path)
        texts = {(path / name).read_text() for name in "abc"}
        assert len(texts) == 1 and len(texts.pop()) == 50_000 and [p.name for p in tmp_path.iterdir()] == ["run"]


@needs_kill
def test_a_process_that_waits_to_be_collected_is_dead(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", f"import os, signal; from ehr_sequencing.jobs import whole_file\nwith whole_file({str(tmp_path / 'x')!r}) as p: p.write_text(''); os.kill(os.getpid(), signal.SIGKILL)"])
    deadline = time.time() + 60
    while time.time() < deadline and os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None: time.sleep(0.01)
    assert len(list(tmp_path.iterdir())) == 1
    with whole_file(tmp_path / "x") as path: path.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    child.wait()


def test_a_fork_writes_under_its_own_name(tmp_path):
    if not hasattr(os, "fork"): pytest.skip("needs fork")
    with whole_file(tmp_path / "x") as path:
        child = os.fork()
        if child == 0:
            with whole_file(tmp_path / "x") as other: other.write_text("child")
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / "x").read_text() == "child"
        path.write_text("parent")
    assert (tmp_path / "x").read_text() == "parent" and [p.name for p in tmp_path.iterdir()] == ["x"]


FULL = """import json, resource, signal, sys; from pathlib import Path; import numpy as np, polars as pl, torch; from safetensors.torch import save_file; from ehr_sequencing.jobs import whole_file, whole_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, told = Path(sys.argv[1]), []
ways = {"python": lambda p: p.write_bytes(bytes(10**6)), "polars": lambda p: pl.DataFrame({"a": np.random.default_rng(0).random(10**5)}).write_parquet(p), "safetensors": lambda p: save_file({"a": torch.zeros(10**5)}, p)}
for name, write in ways.items():
    for where in ("file", "folder"):
        try:
            if where == "file":
                with whole_file(folder/name) as path: write(path)
            else:
                with whole_folder(folder/"run", replace=True) as new, whole_file(new/name) as path: write(path)
        except OSError as error: told.append([name, where, error.errno, str(error)])
print(json.dumps(told))
"""


@needs_kill
def test_a_full_disk_is_told_whichever_library_writes(tmp_path):
    "No file may grow past 100 kB, as on a disk without room."
    with whole_folder(tmp_path / "run") as new: (new / "old").write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert [entry[:2] for entry in told] == [[name, where] for name in ("python", "polars", "safetensors") for where in ("file", "folder")]
    for name, where, number, text in told:
        place = tmp_path / name if where == "file" else tmp_path / "run" / name
        assert number == 27 and "File too large" in text and "write elsewhere" in text and text.endswith(f": '{place}'") and text.count("as it was") == 1
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["run", "run/old"]


def test_a_folder_of_others(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o555)
    if os.access(tmp_path / "theirs", os.W_OK): pytest.skip("permissions do not count for this user")
    def file():
        with whole_file(tmp_path / "theirs" / "x") as path: path.write_text("")
    for call in (file, lambda: whole_folder(tmp_path / "theirs" / "x").__enter__(), lambda: whole_folder(tmp_path / "theirs" / "deep" / "x").__enter__()):
        with pytest.raises(PermissionError, match="Write to a folder of your own"): call()
