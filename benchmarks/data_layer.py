"""Speed and memory of the data layer: a generated MEDS data set to a store, and a store to batches.

    python benchmarks/data_layer.py

Prints, and writes to benchmarks/results/data_layer.md:
- `ehrseq_prepare` on 10 million events of 100,000 patients in 20 shards: wall time, events a second, peak memory of all its processes;
- a plain pandas group-by that makes the same store, on two of the shards, in the same run;
- the same command on five times the events (and patients);
- opening the store, and a shuffled epoch of batches from one process.
"""
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import psutil
import torch
from fastcore.script import call_parse

from ehr_sequencing.batches import BatchLoader
from ehr_sequencing.sequences import SPECIAL_TOKENS, SPLITS, UNK, load_sequences

RESULTS = Path(__file__).resolve().parent / "results" / "data_layer.md"
N_CODES, N_LABS = 15_000, 500


def write_meds(folder, n_patients, n_events, n_shards, seed=0):
    "A MEDS data set: visits with a heavy tail, Zipf codes, a quarter of the events with a value; sorted as MEDS asks."
    folder = Path(folder)
    for split in ("train", "tuning", "held_out"): (folder / "data" / split).mkdir(parents=True)
    codes = np.array([f"ICD10CM//{chr(65 + i % 26)}{i // 26 % 100:02d}.{i // 2600}" for i in range(N_CODES)] + [f"LOINC//{1000 + i}-{i % 10}" for i in range(N_LABS)])
    patients = n_patients // n_shards
    for k in range(n_shards):
        generator = np.random.default_rng([seed, k])
        ids = (k * patients + np.arange(patients)).astype(np.int64) * 1_000_003 - 2**40
        share = generator.gamma(1.2, 1, patients) + 0.05
        visits = np.maximum(1, np.round(share / share.sum() * n_events / n_shards / 8)).astype(int)
        patient = np.repeat(np.arange(patients), visits)
        days = generator.integers(0, 3650, len(patient))
        event = np.repeat(np.arange(len(patient)), 1 + generator.geometric(1 / 7, len(patient)))
        n = len(event)
        is_lab = generator.random(n) < 0.25
        code = np.where(is_lab, N_CODES + np.minimum(generator.zipf(1.4, n) - 1, N_LABS - 1), np.minimum(generator.zipf(1.3, n) - 1, N_CODES - 1))
        seconds = generator.integers(8 * 3600, 18 * 3600, n).astype("timedelta64[s]")
        rows = pl.DataFrame({"subject_id": ids[patient[event]], "time": (np.datetime64("2010-01-01") + days[event]).astype("datetime64[us]") + seconds, "code": codes[code],
                             "numeric_value": np.where(is_lab, generator.normal(100, 20, n).round(1), np.nan).astype(np.float32)}).with_columns(pl.col("numeric_value").fill_nan(None))
        none = pl.Series([None] * patients, dtype=pl.Float32)
        births = pl.DataFrame({"subject_id": ids, "time": (np.datetime64("1930-01-01") + generator.integers(0, 29_000, patients)).astype("datetime64[us]"), "code": ["MEDS_BIRTH"] * patients, "numeric_value": none})
        sexes = births.with_columns(time=pl.lit(None, pl.Datetime("us")), code=pl.Series(np.where(generator.random(patients) < 0.5, "GENDER//F", "GENDER//M")))
        split = SPLITS[0 if k < 0.6 * n_shards else 1 if k < 0.75 * n_shards else 2]
        pl.concat([sexes, births, rows]).sort("subject_id", "time", nulls_last=False, maintain_order=True).write_parquet(folder / "data" / split / f"{k:03d}.parquet")
    return folder


def pandas_store(files, n_value_bins=10, min_patients=5):
    "The store of these files as plain pandas makes it: a list of visits for each patient, each a start and a list of token ids. Training patients: those under data/train."
    frame = pd.concat([pd.read_parquet(f).assign(train=f.parent.name == "train") for f in files])
    born = frame[frame.code == "MEDS_BIRTH"].groupby("subject_id").time.min().dt.normalize()
    frame = frame[frame.code != "MEDS_BIRTH"]
    frame = frame[~(frame.time.dt.normalize() < frame.subject_id.map(born))].copy()
    frame["day"] = frame.time.dt.normalize()
    with_visits = frame.dropna(subset="day").subject_id.unique()
    frame = frame[frame.subject_id.isin(with_visits)]
    frame = frame.sort_values(["subject_id", "time", "code", "numeric_value"], na_position="first", kind="stable")
    edges = {}
    for code, group in frame[frame.train].dropna(subset="numeric_value").groupby("code"):
        if len(group) >= 20 and group.subject_id.nunique() >= min_patients:
            values = np.sort(group.numeric_value.to_numpy())
            edges[code] = sorted({values[int(np.floor(i / n_value_bins * (len(values) - 1) + 0.5))] for i in range(1, n_value_bins)})
    frame["token"] = frame.code
    valued = frame.numeric_value.notna() & frame.code.isin(edges)
    bins = frame[valued].groupby("code").numeric_value.transform(lambda x: np.searchsorted(edges[x.name], x.to_numpy(), side="right") + 1)
    frame.loc[valued, "token"] = frame.code[valued] + "//Q" + bins.astype(int).astype(str)
    counts = frame[frame.train].groupby("token").subject_id.agg(["size", "nunique"])
    counts = counts[counts["nunique"] >= min_patients].reset_index().sort_values(["size", "token"], ascending=[False, True])
    ids = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *counts.token])}
    frame["id"] = frame.token.map(ids).fillna(UNK).astype(int)
    visits = frame.dropna(subset="day").groupby(["subject_id", "day"]).agg(start=("time", "min"), tokens=("id", lambda x: list(dict.fromkeys(x))))
    patients = visits.reset_index().groupby("subject_id").agg(starts=("start", list), tokens=("tokens", list))
    patients["static"] = frame[frame.day.isna()].groupby("subject_id").id.agg(lambda x: list(dict.fromkeys(x)))
    return patients, list(ids)


class PeakMemory:
    "The largest sum of resident memory of a process and its children, pages that they share counted once for each."
    def __init__(self, pid): self.process, self.peak, self.stop = psutil.Process(pid), 0, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.05):
            total = 0
            try:
                for process in [self.process, *self.process.children(recursive=True)]:
                    try: total += process.memory_info().rss
                    except psutil.NoSuchProcess: pass
            except psutil.NoSuchProcess: return
            self.peak = max(self.peak, total)

    def __exit__(self, *_): self.stop.set(); self.thread.join()


def prepare(source, store, *options):
    "Run the command: seconds, peak bytes."
    shutil.rmtree(store, ignore_errors=True)
    began = time.perf_counter()
    command = subprocess.Popen([Path(sys.executable).parent / "ehrseq_prepare", source, store, *map(str, options)], stdout=subprocess.DEVNULL)
    with PeakMemory(command.pid) as memory: status = command.wait()
    if status: sys.exit(f"ehrseq_prepare ended with status {status}")
    return time.perf_counter() - began, memory.peak


def same(store, frame, tokens):
    "Stop unless a store holds what pandas made."
    assert store.vocabulary.tokens == tokens and store.subject_ids.tolist() == frame.index.tolist()
    assert store.tokens.tolist() == [t for visits in frame.tokens for visit in visits for t in visit]
    assert store.visit_starts.tolist() == [s.to_pydatetime() for starts in frame.starts for s in starts]
    assert store.static_tokens.tolist() == [t for static in frame.static for t in static]


def opening(store):
    "Milliseconds to open a store, median of five fresh processes (imports not counted)."
    code = f"import time; from ehr_sequencing.sequences import load_sequences; t = time.perf_counter(); s = load_sequences({str(store)!r}); s.vocabulary; print(1e3 * (time.perf_counter() - t))"
    return float(np.median([float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5)]))


def epoch(store, **options):
    "Tokens a second, padding of `codes`, batches of a shuffled epoch."
    loader = BatchLoader(load_sequences(store), shuffle=True, **options)
    began, tokens, places, batches = time.perf_counter(), 0, 0, 0
    for batch in loader:
        mask = batch["attention_mask"] if "attention_mask" in batch else batch["visit_mask"]
        tokens, places, batches = tokens + int(mask.sum()), places + mask.numel(), batches + 1
    return tokens / (time.perf_counter() - began), 1 - tokens / places, batches


@call_parse
def main(
    events: int = 10_000_000, # of the generated data set, about
    folder: str = None, # where to write the data; a temporary folder that is removed if absent
    skip_large: bool = False, # leave out five times the events
):
    "Generate, measure, print and write the page."
    torch.set_num_threads(1)
    keep, folder = folder is not None, Path(folder or tempfile.mkdtemp())
    lines = [f"# The data layer, measured\n\n`python benchmarks/data_layer.py`, on {os.cpu_count()} cores of a shared machine, Python {platform.python_version()}, polars {pl.__version__}.\n"]

    def say(line): print(line, flush=True); lines.append(line)
    n, patients = events, events // 100
    source = folder / f"meds-{n}"
    if not source.exists(): write_meds(source, patients, n, 20)
    rows = sum(pl.scan_parquet(f).select(pl.len()).collect().item() for f in source.rglob("*.parquet"))
    slice_folder = folder / f"slice-{n}"
    shutil.rmtree(slice_folder, ignore_errors=True)
    for split, name in (("train", "000"), ("held_out", "019")):
        (slice_folder / "data" / split).mkdir(parents=True)
        shutil.copy(source / "data" / split / f"{name}.parquet", slice_folder / "data" / split)
    files = sorted(slice_folder.rglob("*.parquet"))
    began = time.perf_counter()
    frame, tokens = pandas_store(sorted(files, key=lambda f: f.name))
    pandas_seconds = time.perf_counter() - began
    slice_rows = sum(pl.scan_parquet(f).select(pl.len()).collect().item() for f in files)
    prepare(slice_folder, folder / "slice-store")
    same(load_sequences(folder / "slice-store"), frame, tokens)
    del frame
    runs = [prepare(source, folder / "store") for _ in range(3)]
    seconds, memory = float(np.median([r[0] for r in runs])), max(r[1] for r in runs)
    say("| what | events | seconds | events a second | peak memory, GB |\n|---|---|---|---|---|")
    say(f"| plain pandas group-by, two shards | {slice_rows:,} | {pandas_seconds:.1f} | {slice_rows / pandas_seconds:,.0f} | |")
    say(f"| `ehrseq_prepare`, 20 shards (median of 3) | {rows:,} | {seconds:.1f} | {rows / seconds:,.0f} | {memory / 1e9:.2f} |")
    if not skip_large:
        large = folder / f"meds-{5 * n}"
        if not large.exists(): write_meds(large, 5 * patients, 5 * n, 100, seed=1)
        large_rows = sum(pl.scan_parquet(f).select(pl.len()).collect().item() for f in large.rglob("*.parquet"))
        large_seconds, large_memory = prepare(large, folder / "large-store")
        say(f"| `ehrseq_prepare`, 100 shards | {large_rows:,} | {large_seconds:.1f} | {large_rows / large_seconds:,.0f} | {large_memory / 1e9:.2f} |")
    say(f"\nOn the two shards pandas makes the same store, token for token. `ehrseq_prepare` is {rows / seconds / (slice_rows / pandas_seconds):.1f} times as fast an event.")
    if not skip_large: say(f"Five times the events take {large_seconds / seconds:.2f} times as long, with {large_memory / memory:.2f} times the memory.")
    say(f"\nOpening the store of {rows:,} events takes {opening(folder / 'store'):.1f} ms.\n")
    say("| a shuffled epoch, one process | tokens a second | padding | batches |\n|---|---|---|---|")
    for label, keywords in (("flat and hierarchical tensors, budget 8,192", {}), ("flat tensors only, budget 8,192", {"layout": "flat"}), ("flat and hierarchical tensors, budget 32,768", {"token_budget": 32768}),
                            ("hierarchical tensors only, budget 8,192", {"layout": "hierarchical"})):
        speed, padding, batches = epoch(folder / "store", **keywords)
        say(f"| {label} | {speed:,.0f} | {padding:.1%} | {batches:,} |")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not keep: shutil.rmtree(folder)
