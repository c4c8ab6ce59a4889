"Checkpoints: what goes in comes out, nothing spoiled is loaded, and the previous good one is never lost."
import errno
import io
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ehr_sequencing import checkpoints
from ehr_sequencing.checkpoints import Checkpoints, random_states, read_state, set_random_states, state_digest, write_state

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, of damaged pickles
IN_ONE_FOLDER = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64]


@st.composite
def tensors(draw):
    "Any bits, of any type and shape, at times seen through a transposition or a step."
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    tensor = (data > 127).reshape(shape) if dtype is torch.bool else data.view(dtype).reshape(shape)
    if tensor.ndim > 1 and draw(st.booleans()): tensor = tensor.transpose(0, 1)
    return tensor[::2] if tensor.ndim and draw(st.booleans()) else tensor


LEAVES = st.none() | st.booleans() | st.integers() | st.integers(-2**1900, 2**1900) | st.floats() | st.text() | st.text(st.characters()) | tensors()
KEYS = st.text(max_size=5) | st.integers()
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=15)
STATES = st.dictionaries(KEYS, TREES, max_size=4)


def same(a, b):
    "Equality of two trees, written a second time: floats and tensors by their bits."
    if type(a) is not type(b): return False
    if isinstance(a, torch.Tensor):
        bits = lambda t: [] if not t.numel() else t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).tolist()
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict): return list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a.hex() == b.hex() if isinstance(a, float) and a == a else a == b or (a != a and b != b)


@IN_ONE_FOLDER
@given(state=STATES)
def test_any_state_goes_there_and_back(state, tmp_path):
    write_state(tmp_path / "a.pt", state)
    again = read_state(tmp_path / "a.pt")
    assert same(again, state) and state_digest(again) == state_digest(state)
    write_state(tmp_path / "b.pt", again)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    memories = [t.data_ptr() for t in leaves(again) if isinstance(t, torch.Tensor) and t.numel()]
    assert len(set(memories)) == len(memories)


def leaves(tree):
    "All values of a tree that have no parts."
    if not isinstance(tree, (dict, list, tuple)): return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


FEW = st.sampled_from([None, True, 1, 1.0, 0.0, -0.0, float("nan"), "", "1", "i1:", torch.tensor(1.), torch.tensor([1.]), torch.tensor([1])])
SMALL = st.recursive(FEW, lambda inner: st.lists(inner, max_size=2) | st.lists(inner, max_size=2).map(tuple) | st.dictionaries(st.sampled_from(["1", 1]), inner), max_leaves=3)


@settings(IN_ONE_FOLDER, max_examples=500)
@given(a=SMALL, b=SMALL)
def test_digests_are_equal_where_the_trees_are(a, b):
    assert (state_digest(a) == state_digest(b)) == same(a, b)


STATE = {"weights": {"a": torch.arange(300.).reshape(30, 10), "b": torch.ones(7, dtype=torch.bfloat16)}, "history": [{"loss": float("nan"), "epoch": 1}], "step": 12}


@st.composite
def spoilers(draw):
    "A change of the bytes of a file: cut off, bits turned, a stretch removed, doubled, or made zero, bytes put in, another file altogether."
    kind, where, size = draw(st.sampled_from(["cut", "bit", "remove", "zero", "insert", "double", "other"])), draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 600))
    bit = draw(st.integers(0, 7))
    def spoil(data):
        at = int(where * len(data))
        if kind == "bit" and data: return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]
        middle = {"bit": b"", "remove": b"", "zero": bytes(len(data[at:at + size])), "insert": random.Random(size).randbytes(size) + data[at:at + size], "double": 2 * data[at:at + size]}
        return data[:at] if kind == "cut" else random.Random(size).randbytes(size) if kind == "other" else data[:at] + middle[kind] + data[at + size:]
    return spoil


@settings(IN_ONE_FOLDER, max_examples=300)
@given(spoil=spoilers(), again=st.lists(spoilers(), max_size=1), known=st.booleans())
def test_nothing_spoiled_is_loaded_and_the_good_one_is_not_lost(spoil, again, known, tmp_path):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run = Checkpoints(tmp_path / "run")
    for step in (1, 2): run.save(STATE | {"step": step})
    for change in (spoil, *again): run.latest.write_bytes(change(run.latest.read_bytes()))
    if not known: run = Checkpoints(run.folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = run.load()
    warned = any("Going on from previous.pt" in str(w.message) for w in caught)  # torch has warnings of its own about damaged pickles
    assert state["step"] == (1 if warned else 2) and state_digest(state) == state_digest(STATE | {"step": state["step"]})
    run.save(STATE | {"step": 3})
    assert run.load()["step"] == 3 and read_state(run.previous)["step"] == state["step"]


def test_every_bit_and_every_length(tmp_path):
    "Of a small file, a third of all bits and every place to cut it off. A bit is either noticed or without meaning."
    state, path = {"w": torch.arange(3.), "b": [1, None, "x"]}, tmp_path / "a.pt"
    write_state(path, state)
    data, digest, loaded = path.read_bytes(), state_digest(state), 0
    for bit in range(0, 8 * len(data), 3):
        path.write_bytes(data[:bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1:])
        try: assert state_digest(read_state(path)) == digest; loaded += 1
        except ValueError as error: assert str(path) in str(error)
    assert 0 < loaded < 8 * len(data) / 3 * 0.7  # what aligns the tensors, and much of what zip says of dates
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"a\.pt: (damaged|not a checkpoint)"): read_state(path)


def test_swapped_and_foreign_files(tmp_path):
    run = Checkpoints(tmp_path)
    run.save({"step": 1}); run.save({"step": 2})
    newer, older = run.latest.read_bytes(), run.previous.read_bytes()
    run.latest.write_bytes(older); run.previous.write_bytes(newer)  # both are good: the name decides
    assert run.load() == {"step": 1}
    torch.save({"step": 3}, run.latest)
    with pytest.warns(UserWarning, match="latest.pt: not a checkpoint of this version"): assert run.load() == {"step": 2}
    torch.save({"step": 3}, run.latest, _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match="latest.pt: (not a checkpoint|refused)"): assert run.load() == {"step": 2}
    run.latest.unlink(); run.latest.mkdir()
    with pytest.warns(UserWarning, match="directory"): assert run.load() == {"step": 2}
    run.latest.rmdir(); run.previous.unlink()
    assert run.load() is None and not run.exists


def test_a_disk_that_cannot_be_read(tmp_path, monkeypatch):
    "An error of the disk is no reason to lose the run, nor to push the good file out."
    run = Checkpoints(tmp_path)
    run.save({"step": 1}); run.save({"step": 2})
    def broken(path, *args):
        if Path(path).name == "latest.pt": raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open(path, *args)
    monkeypatch.setattr(checkpoints, "open", broken, raising=False)
    again = Checkpoints(tmp_path)
    with pytest.raises(OSError, match="Input/output"): read_state(again.latest)
    with pytest.warns(UserWarning, match="Input/output"): assert again.load() == {"step": 1}
    again.save({"step": 3})
    monkeypatch.undo()
    assert again.load() == {"step": 3} and read_state(again.previous) == {"step": 1}


def test_memory_that_runs_out_is_not_called_damage(tmp_path, monkeypatch):
    write_state(tmp_path / "a.pt", STATE)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        def load(*args, **options): raise error
        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(type(error)): read_state(tmp_path / "a.pt")


TRAPPED = ["nothing"]


def spring(path): Path(path).mkdir(); TRAPPED.append(path)


class Trap:
    "Its pickle asks for a call of `spring`, in one of the ways that pickle has."
    def __init__(self, path, way): self.path, self.way = str(path), way
    def __reduce__(self):
        if self.way == "reduce": return spring, (self.path,)
        if self.way == "eval": return eval, (f"__import__('os').mkdir({self.path!r})",)
        return torch.load, (self.path,)


@pytest.mark.parametrize("way", ["reduce", "eval", "load"])
@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_runs_code(way, protocol, tmp_path):
    "Plain, in an archive, beside a good pickle of an archive, under its name a second time, and compressed."
    trap = pickle.dumps({"state": Trap(tmp_path / "trapped", way)}, protocol)
    run = Checkpoints(tmp_path / "run")
    for step in (1, 2): run.save({"step": step})
    data = run.latest.read_bytes()
    def archive(*extra, compression=zipfile.ZIP_STORED, **changes):
        target = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", compression) as new:
            warnings.simplefilter("ignore")  # two files of one name
            for part in old.namelist(): new.writestr(part, changes.get(Path(part).stem, old.read(part)))
            for name in extra: new.writestr(name, trap)
        return target.getvalue()
    name = zipfile.ZipFile(io.BytesIO(data)).namelist()[0]
    assert name.endswith("/data.pkl")
    for spoiled in (trap, b"\n" + trap, archive(data=trap), archive(name), archive("other.pkl"), archive(compression=zipfile.ZIP_DEFLATED, data=trap), data + trap, archive(data=trap) + data, data + archive(data=trap)):
        run.latest.write_bytes(spoiled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert run.load()["step"] in (1, 2)
            run.save({"step": 3}); assert run.load() == {"step": 3}; run.save({"step": 1}); run.save({"step": 2})
    run.latest.write_bytes(archive(data=trap))
    with pytest.raises(ValueError, match="refused: it asks to run code .*(spring|eval|load)"): read_state(run.latest)
    assert not (tmp_path / "trapped").exists() and TRAPPED == ["nothing"]
    if way == "reduce": pickle.loads(trap); assert (tmp_path / "trapped").exists() and len(TRAPPED) == 2; TRAPPED.pop()  # the trap is one


@pytest.mark.parametrize("limit", [1000, 50_000, 300_000])
def test_no_room_while_it_is_written(limit, tmp_path):
    "The operating system stops the write at some length, as a quota does."
    run = Checkpoints(tmp_path)
    run.save({"step": 1}); run.save({"step": 2})
    before, (soft, hard) = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"latest\.pt: no room on the disk: 0\.5 MB are needed") as caught: run.save({"step": 3, "weights": torch.ones(100_000)})
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name[0] != "."} | before == before
    assert run.load() in ({"step": 2}, {"step": 1}) and run.load() == {"step": 2}
    run.save({"step": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.pt", "previous.pt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    run = Checkpoints(tmp_path / "run")
    run.save({"step": 1})
    run.folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="no permission to write there"): run.save({"step": 2})
        assert run.load() == {"step": 1}
        with pytest.raises(PermissionError, match="no permission"): Checkpoints(run.folder / "below").save({"step": 2})
    finally: run.folder.chmod(0o700)


OPTIMISERS = {"adamw": lambda p: torch.optim.AdamW(p, 1e-2), "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True), "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
              "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True), "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2), "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, centered=True)}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("schedule", ["lambda", "cosine"])
def test_training_goes_on_bit_for_bit(name, schedule, tmp_path):
    "An optimiser, a schedule, a gradient scaler, dropout and BatchNorm, written after some steps and read by others."
    def parts():
        net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
        optimizer = OPTIMISERS[name](net.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s)) if schedule == "lambda" else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return net, optimizer, scheduler, torch.amp.GradScaler("cpu")
    def go_on(net, optimizer, scheduler, scaler, steps):
        for _ in range(steps):
            optimizer.zero_grad(); scaler.scale(net(torch.randn(8, 5) * random.random() + np.random.rand()).pow(2).mean()).backward()
            scaler.step(optimizer); scaler.update(); scheduler.step()
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    first = parts()
    go_on(*first, 5)
    write_state(tmp_path / "a.pt", {"parts": [part.state_dict() for part in first], "random": random_states()})
    go_on(*first, 5)
    drawn = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(9); random.seed(9); np.random.seed(9)
    second, state = parts(), read_state(tmp_path / "a.pt")
    for part, numbers in zip(second, state["parts"]): part.load_state_dict(numbers)
    set_random_states(state["random"])
    go_on(*second, 5)
    assert [state_digest(part.state_dict()) for part in second] == [state_digest(part.state_dict()) for part in first]
    assert torch.equal(torch.rand(3), drawn[0]) and (random.random(), np.random.rand()) == drawn[1:]


@pytest.mark.parametrize("seed", range(5))
def test_random_states_through_a_file(seed, tmp_path):
    "At any place of a stream, also with half a pair of Gaussians kept, and at the ends of what a seed may be."
    random.seed([0, 2**64, -1, "text", 2.5][seed]); np.random.seed([0, 2**32 - 1, 1, 2, 3][seed]); torch.manual_seed([0, 2**63, -1, 2**64 - 1, 5][seed])
    draw = lambda n: ([random.gauss(0, 1) for _ in range(n)], np.random.normal(size=n).tolist(), np.random.randint(0, 2**31, n).tolist(), torch.randn(n).tolist(), torch.randperm(n).tolist())
    draw(seed * 401 + 1)
    write_state(tmp_path / "a.pt", random_states())
    first = draw(1501)
    draw(3)
    set_random_states(read_state(tmp_path / "a.pt"))
    assert draw(1501) == first


def test_equal_bytes_from_other_processes(tmp_path):
    "Whatever the seed of Python's hashes, the number of threads and the name of the file."
    code = ("import sys, torch; from ehr_sequencing.checkpoints import random_states, write_state; torch.manual_seed(0); net = torch.nn.Linear(50, 50);"
            "o = torch.optim.AdamW(net.parameters()); net(torch.ones(1, 50)).sum().backward(); o.step();"
            "write_state(sys.argv[1], {'net': net.state_dict(), 'o': o.state_dict(), 'names': [''.join(['a', 'b']), 'ab'], 'torch': random_states()['torch']})")
    for i in range(2): subprocess.run([sys.executable, "-c", code, str(tmp_path / f"name{i * 'longer'}{i}.pt")], check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": str(i), "OMP_NUM_THREADS": str(i + 1)})
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1
