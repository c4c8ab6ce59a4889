"What the tests share: where the development data lie, the command run as a user runs it, and checks of many calls at once."
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core, so a thread a process; before torch is there

import numpy as np
import pytest
from postgres import PASSWORD, Server, find

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


def data_folder(name):
    "A data set for development; the test skips where it is absent."
    path = DATA / name
    if not path.exists(): pytest.skip(f"{name} is not beside this checkout")
    return path


def numbers_or_errors(calls):
    "Each call gives finite numbers or a `ValueError`: never NaN, never a warning."
    for call in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try: result = call()
            except ValueError: continue
        assert np.isfinite(result).all()


def peak_memory(call):
    "Bytes at the peak of what a call allocates."
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


@pytest.fixture
def command(tmp_path):
    "Run `ehrseq_benchmark` in an empty folder: options -> (completed process, what it left behind)."
    work = tmp_path / "work"
    work.mkdir()

    def run(*options):
        script = Path(sys.executable).parent / "ehrseq_benchmark"
        done = subprocess.run([script, *map(str, options)], cwd=work, capture_output=True, text=True)
        return done, sorted(str(p.relative_to(work)) for p in work.rglob("*"))
    return run


@pytest.fixture(scope="session")
def postgres():
    "A running PostgreSQL server with the role ann, who needs a password; the test skips where no server is installed."
    missing = [p for p in ("initdb", "pg_ctl", "psql") if find(p) is None]
    if missing: pytest.skip(f"no PostgreSQL server here ({', '.join(missing)} not found); on Debian: apt-get install postgresql")
    server = Server()
    server.start()
    server.sql(f"create role ann login password '{PASSWORD}'; grant pg_read_all_data to ann")
    yield server
    server.stop()
    shutil.rmtree(server.folder)
