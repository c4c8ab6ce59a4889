"""Speed and memory of the simulated cohort.

    python benchmarks/synthesize.py

Runs `ehrseq_synthesize --num_patients 100000` from the start of the command to its end, three times, and, in the same run, the same simulation one patient at a time
(the same functions, called for cohorts of one), which is what a loop over patients would cost. Writes benchmarks/results/synthesize.md.
"""
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from fastcore.script import call_parse

from ehr_sequencing.synthetic import simulate_cohort

RESULTS = Path(__file__).resolve().parent / "results" / "synthesize.md"


def command(folder, n, *options):
    "Run the command; return seconds, the peak of the memory that all its processes have to themselves, and what it said."
    shutil.rmtree(folder, ignore_errors=True)
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([Path(sys.executable).parent / "ehrseq_synthesize", "--num_patients", str(n), "--out", str(folder), *map(str, options)], stdout=subprocess.PIPE, text=True)

    def watch():
        nonlocal peak
        while process.poll() is None:
            try: peak = max(peak, sum(p.memory_full_info().uss for p in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True))))
            except psutil.Error: pass
            time.sleep(0.1)
    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.communicate()[0]
    watcher.join()
    if process.returncode: raise RuntimeError("ehrseq_synthesize failed")
    return time.perf_counter() - began, peak, said.strip().splitlines()[-1]


@call_parse
def main(
    num_patients: int = 100_000, # of the large run
    alone: int = 200, # patients simulated one at a time
):
    "Measure and write the page."
    folder = Path(tempfile.mkdtemp())
    lines = ["# The simulated cohort, measured", "", f"`python benchmarks/synthesize.py`, on {psutil.cpu_count()} cores of a shared machine, Python {platform.python_version()}, numpy {np.__version__}.", ""]
    began = time.perf_counter()
    events = sum(len(simulate_cohort(1, seed=i).table.events) for i in range(alone))
    loop = events / (time.perf_counter() - began)
    runs = [command(folder / "cohort", num_patients) for _ in range(3)]
    seconds, memory = float(np.median([r[0] for r in runs])), max(r[1] for r in runs)
    total = int(runs[0][2].split(" visits, ")[1].split(" events")[0].replace(",", ""))
    one, one_memory, _ = command(folder / "cohort", num_patients, "--n_jobs", 1)
    lines += ["| what | events | seconds | events a second | peak memory of all processes, not shared, GB |", "|---|---|---|---|---|",
              f"| one patient at a time, {alone} patients | {events:,} | {events / loop:.1f} | {loop:,.0f} | |",
              f"| `ehrseq_synthesize --num_patients {num_patients}` (median of 3) | {total:,} | {seconds:.1f} | {total / seconds:,.0f} | {memory / 1e9:.2f} |",
              f"| the same, one process | {total:,} | {one:.1f} | {total / one:,.0f} | {one_memory / 1e9:.2f} |", "",
              f"For each event the command takes {loop / (total / seconds):.4f} of the time of the loop ({total / seconds / loop:,.0f} times as fast), writing included.", "", runs[0][2].split(": ", 1)[1].split(" The data are")[0]]
    shutil.rmtree(folder)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
