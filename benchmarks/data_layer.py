"""Speed and memory of the data layer: a generated MEDS data set to a store, and a store to batches.

    python benchmarks/data_layer.py

Prints, and writes to benchmarks/results/data_layer.md:
- `ehrseq_prepare` on 10 million events of 100,000 patients in 20 shards: wall time, events a second, peak memory of all its processes;
- pandas making the same store of two of the shards, in the same run: a plain loop over groups, and aggregations where pandas has them;
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
import pyarrow as pa
import pyarrow.ipc
import torch
from fastcore.script import call_parse

from ehr_sequencing.batches import BatchLoader
from ehr_sequencing.events import SPLITS
from ehr_sequencing.sequences import STORE_SCHEMA, load_sequences, open_table
from ehr_sequencing.vocabulary import SPECIAL_TOKENS, UNK

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


def by_loop(frame):
    "Visits of each patient, and facts without a time: a loop over patients and, in each, over days."
    rows, facts = {}, {}
    for subject, person in frame.groupby("subject_id"):
        facts[subject] = list(dict.fromkeys(person[person.day.isna()].id))
        codes, offsets, starts, known = [], [], [], []
        for _, visit in person.groupby("day"):
            offsets.append(len(codes))
            codes += dict.fromkeys(visit.id)
            starts.append(visit.time.min())
            known.append(max(visit.time.max(), known[-1]) if known else visit.time.max())
        rows[subject] = (codes, offsets, starts, known)
    patients = pd.DataFrame.from_dict(rows, orient="index", columns=["codes", "visit_offsets", "visit_starts", "visit_known"])
    return patients.rename_axis("subject_id"), pd.Series(facts)


def by_aggregation(frame):
    "The same, with pandas aggregating wherever it can."
    visits = frame.dropna(subset="day").groupby(["subject_id", "day"]).agg(start=("time", "min"), end=("time", "max"), tokens=("id", lambda x: list(dict.fromkeys(x)))).reset_index()
    visits["known"] = visits.groupby("subject_id").end.cummax()
    visits["length"] = visits.tokens.map(len)
    visits["offset"] = visits.groupby("subject_id").length.cumsum() - visits.length
    patients = visits.groupby("subject_id").agg(codes=("tokens", lambda x: [t for visit in x for t in visit]), visit_offsets=("offset", list), visit_starts=("start", list), visit_known=("known", list))
    return patients, frame[frame.day.isna()].groupby("subject_id").id.agg(lambda x: list(dict.fromkeys(x)))


def pandas_store(files, path, loop, n_value_bins=10, min_patients=5):
    """The store of these files as pandas makes it, written to `path`. The split is the folder of a file. Returns the token names.

    With `loop`, a plain loop over the groups of patients and days, as most published preprocessing has it; without, aggregations as far as pandas has them."""
    frame = pd.concat([pd.read_parquet(f).assign(split=SPLITS.index(f.parent.name)) for f in files], ignore_index=True)
    frame["day"] = frame.time.dt.normalize()
    is_birth, is_death = frame.code == "MEDS_BIRTH", frame.code == "MEDS_DEATH"
    births, deaths = frame[is_birth].groupby("subject_id").time.min(), frame[is_death].groupby("subject_id").time.min()
    outside = (frame.day < frame.subject_id.map(births).dt.normalize()) | (frame.day > frame.subject_id.map(deaths).dt.normalize())
    frame = frame[~outside & ~is_birth & ~is_death]
    last = frame.groupby("subject_id").time.max()
    people = frame.groupby("subject_id").split.first().to_frame()
    people = people[people.index.isin(frame.subject_id[frame.day.notna()])]
    frame = frame[frame.subject_id.isin(people.index)].sort_values(["subject_id", "time", "code", "numeric_value"], na_position="first", kind="stable")
    train, edges = frame.split == 0, {}
    for code, group in frame[train].dropna(subset="numeric_value").groupby("code"):
        if len(group) >= 20 and group.subject_id.nunique() >= min_patients:
            values = np.sort(group.numeric_value.to_numpy())
            edges[code] = sorted({values[int(np.floor(i / n_value_bins * (len(values) - 1) + 0.5))] for i in range(1, n_value_bins)})
    frame["token"] = frame.code
    valued = frame.numeric_value.notna() & frame.code.isin(edges)
    bins = frame[valued].groupby("code").numeric_value.transform(lambda x: np.searchsorted(edges[x.name], x.to_numpy(), side="right") + 1)
    frame.loc[valued, "token"] = frame.code[valued] + "//Q" + bins.astype(int).astype(str)
    counts = frame[train].groupby("token").subject_id.agg(["size", "nunique"])
    counts = counts[counts["nunique"] >= min_patients].reset_index().sort_values(["size", "token"], ascending=[False, True])
    ids = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *counts.token])}
    frame["id"] = frame.token.map(ids).fillna(UNK).astype(int)
    patients, static = (by_loop if loop else by_aggregation)(frame)
    patients = patients.join(people).join(static.rename("static_codes")).join(births.rename("birth")).join(deaths.rename("death")).join(last.rename("observation_end")).reset_index()
    patients["static_codes"] = [x if isinstance(x, list) else [] for x in patients.static_codes]
    patients["observation_end"] = patients[["observation_end", "death"]].min(axis=1)
    table = pa.table({name: pa.array(patients[name], type=kind) for name, kind in zip(STORE_SCHEMA.names, STORE_SCHEMA.types)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer: writer.write_table(table)
    return list(ids)


def count_rows(files): return sum(pl.scan_parquet(f).select(pl.len()).collect().item() for f in files)


class PeakMemory:
    "The largest sums over a process and its children of resident memory, and of the part of it that is no mapped file (which the system can drop)."
    def __init__(self, pid): self.process, self.resident, self.private, self.stop = psutil.Process(pid), 0, 0, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.05):
            resident = private = 0
            try:
                for process in [self.process, *self.process.children(recursive=True)]:
                    try: memory = process.memory_info()
                    except psutil.NoSuchProcess: continue
                    resident, private = resident + memory.rss, private + memory.rss - memory.shared
            except psutil.NoSuchProcess: return
            self.resident, self.private = max(self.resident, resident), max(self.private, private)

    def __exit__(self, *_): self.stop.set(); self.thread.join()


def prepare(source, store, *options):
    "Run the command: seconds, peak bytes resident, and of these private."
    shutil.rmtree(store, ignore_errors=True)
    began = time.perf_counter()
    command = subprocess.Popen([Path(sys.executable).parent / "ehrseq_prepare", source, store, *map(str, options)], stdout=subprocess.DEVNULL)
    with PeakMemory(command.pid) as memory: status = command.wait()
    if status: sys.exit(f"ehrseq_prepare ended with status {status}")
    return time.perf_counter() - began, memory.resident, memory.private


def same(store, file, tokens):
    "Stop unless a store holds what pandas wrote."
    table = open_table(file)
    assert store.vocabulary.tokens == tokens
    for column in table.column_names: assert store.table.column(column).combine_chunks().equals(table.column(column).combine_chunks()), column


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
    rows = count_rows(source.rglob("*.parquet"))
    slice_folder = folder / f"slice-{n}"
    shutil.rmtree(slice_folder, ignore_errors=True)
    for split, name in (("train", "000"), ("held_out", "019")):
        (slice_folder / "data" / split).mkdir(parents=True)
        shutil.copy(source / "data" / split / f"{name}.parquet", slice_folder / "data" / split)
    files = sorted(slice_folder.rglob("*.parquet"))
    slice_rows, speeds = count_rows(files), {}
    for label, loop in (("pandas, a plain loop over groups", True), ("pandas, aggregated where it can", False)):
        began = time.perf_counter()
        tokens = pandas_store(files, folder / f"pandas-{loop}.arrow", loop)
        speeds[label] = time.perf_counter() - began
    prepare(slice_folder, folder / "slice-store")
    for loop in (True, False): same(load_sequences(folder / "slice-store"), folder / f"pandas-{loop}.arrow", tokens)
    runs = [prepare(source, folder / "store") for _ in range(3)]
    alone, alone_memory, alone_private = prepare(source, folder / "store", "--n_jobs", 1)
    prepare(source, folder / "store")
    whole = folder / f"whole-{n}.parquet"
    if not whole.exists(): pl.concat([pl.scan_parquet(f) for f in sorted(source.rglob("*.parquet"))]).sink_parquet(whole)
    one, one_memory, one_private = prepare(whole, folder / "whole-store")
    seconds, memory, private = float(np.median([r[0] for r in runs])), max(r[1] for r in runs), max(r[2] for r in runs)
    say("| what | events | seconds | events a second | peak memory of all processes, GB | of it not mapped files |\n|---|---|---|---|---|---|")
    for label, spent in speeds.items(): say(f"| {label}, two shards | {slice_rows:,} | {spent:.1f} | {slice_rows / spent:,.0f} | | |")
    say(f"| `ehrseq_prepare`, 20 shards (median of 3) | {rows:,} | {seconds:.1f} | {rows / seconds:,.0f} | {memory / 1e9:.2f} | {private / 1e9:.2f} |")
    say(f"| the same, one process (`--n_jobs 1`) | {rows:,} | {alone:.1f} | {rows / alone:,.0f} | {alone_memory / 1e9:.2f} | {alone_private / 1e9:.2f} |")
    say(f"| the same events in one Parquet file, dealt out | {rows:,} | {one:.1f} | {rows / one:,.0f} | {one_memory / 1e9:.2f} | {one_private / 1e9:.2f} |")
    if not skip_large:
        large = folder / f"meds-{5 * n}"
        if not large.exists(): write_meds(large, 5 * patients, 5 * n, 100, seed=1)
        large_rows = count_rows(large.rglob("*.parquet"))
        large_seconds, large_memory, large_private = prepare(large, folder / "large-store")
        say(f"| `ehrseq_prepare`, 100 shards | {large_rows:,} | {large_seconds:.1f} | {large_rows / large_seconds:,.0f} | {large_memory / 1e9:.2f} | {large_private / 1e9:.2f} |")
    ratios = [rows / seconds / (slice_rows / spent) for spent in speeds.values()]
    say(f"\nOn the two shards both ways of pandas make the same store, number for number. For each event `ehrseq_prepare`, with all cores where pandas uses one and with reading, writing and the start of its processes, takes {1 / ratios[0]:.3f} of the time of the loop ({ratios[0]:.0f} times as fast) and {1 / ratios[1]:.2f} of that of the aggregations ({ratios[1]:.1f} times as fast).")
    if not skip_large: say(f"Five times the events take {large_seconds / seconds:.2f} times as long, with {large_private / private:.2f} times the memory that is not mapped files.")
    say(f"\nOpening the store of {rows:,} events takes {opening(folder / 'store'):.1f} ms.\n")
    say("| a shuffled epoch, one process | tokens a second | padding | batches |\n|---|---|---|---|")
    for label, keywords in (("flat and hierarchical tensors, budget 8,192", {}), ("flat tensors only, budget 8,192", {"layout": "flat"}), ("flat and hierarchical tensors, budget 32,768", {"token_budget": 32768}),
                            ("hierarchical tensors only, budget 8,192", {"layout": "hierarchical"})):
        speed, padding, batches = epoch(folder / "store", **keywords)
        say(f"| {label} | {speed:,.0f} | {padding:.1%} | {batches:,} |")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not keep: shutil.rmtree(folder)
