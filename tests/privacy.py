"Does a folder that is meant to be shared hold anything of single patients? Reads every file of it, tensors and text chunks of pictures included."
import datetime
import json
import re
import struct
import zlib

import numpy as np
import torch
from safetensors.torch import load_file

SHORTEST = 10**6 # smaller ids cannot be told from other numbers
DAY = re.compile(rb"(?<!\d)(\d{4})[-/]?(\d{2})[-/]?(\d{2})(?!\d)")


def with_long_ids(events, seed=0):
    "The same events, with ids of sixteen digits in the place of the patients' ids, some of them negative."
    old = events["subject_id"].unique().sort()
    new = np.random.default_rng(seed).choice(2**40, len(old), replace=False) * 4096 + 10**15
    return events.with_columns(subject_id=events["subject_id"].replace_strict(old.to_list(), np.where(np.arange(len(old)) % 2, -new, new).tolist()))


class PatientScan:
    "Looks for ids and dates of the patients of a store, and for long lists of its rows."
    def __init__(self, store):
        self.ids = np.sort(np.asarray(store.subject_ids, dtype=np.int64))
        if np.abs(self.ids).min() < SHORTEST: raise ValueError(f"store: some ids are below {SHORTEST}, and so like any other number. Build it with with_long_ids(events).")
        times = np.concatenate([store.visit_starts, store.births[~np.isnat(store.births)]])
        today = {np.datetime64(datetime.datetime.now(datetime.timezone.utc).date() - datetime.timedelta(days=d)) for d in (0, 1)}  # of the run itself
        days = np.unique(times.astype("datetime64[D]"))
        self.days = {str(d) for d in days if d not in today}
        stamps = np.concatenate([times.astype("datetime64[us]").astype(np.int64), days.astype("datetime64[us]").astype(np.int64)])
        self.stamps = np.unique(np.concatenate([stamps * k // 1000 for k in (1, 1000, 1_000_000)] + [stamps // 1_000_000]))  # as ms, us, ns and s
        self.stamps = self.stamps[np.abs(self.stamps) > SHORTEST]
        self.rows = len(store)

    def of_numbers(self, numbers):
        "What an array of numbers gives away."
        x = np.asarray(numbers).reshape(-1)
        if x.dtype.kind == "f": x = x[np.isfinite(x) & (x == np.floor(x)) & (np.abs(x) < 2**62)]
        if x.dtype.kind not in "iuf" or not len(x): return []
        whole, found = x.astype(np.int64), []
        if np.isin(whole, self.ids).any(): found.append("subject ids as numbers")
        if np.isin(whole, self.stamps).any(): found.append("times of patients as numbers")
        distinct = np.unique(whole)
        if len(whole) >= 20 and len(distinct) == len(whole) >= self.rows / 20 and distinct[0] >= 0 and distinct[-1] < self.rows and not (np.diff(whole) == 1).all(): found.append("a list of rows")
        return found

    def of_bytes(self, content):
        "What text, or bytes as they lie, give away."
        found = []
        words = {int(w) for w in re.findall(rb"-?\d{7,19}", content) if abs(int(w)) < 2**63}
        if words and np.isin(list(words) + [-w for w in words], self.ids).any(): found.append("subject ids")
        if {"-".join(p.decode() for p in match) for match in DAY.findall(content)} & self.days: found.append("dates of patients")
        for offset in range(8):
            x = np.frombuffer(content, "<i8", (len(content) - offset) // 8, offset) if len(content) >= offset + 8 else np.zeros(0, np.int64)
            if np.isin(x, self.ids).any(): found.append("subject ids as bytes")
        return found

    def of_tree(self, value):
        "What a structure of dicts, lists, numbers, texts and tensors gives away."
        if isinstance(value, torch.Tensor): return self.of_numbers(value.detach().to(torch.float64 if value.is_floating_point() else torch.int64).numpy()) if not value.is_complex() else []
        if isinstance(value, dict): return [f for k, v in value.items() for f in (*self.of_tree(k), *self.of_tree(v))]
        if isinstance(value, (list, tuple)):
            is_number = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in value]
            numbers = [v for v, yes in zip(value, is_number) if yes and abs(v) < 2**62]
            return [f for v, yes in zip(value, is_number) if not yes for f in self.of_tree(v)] + self.of_numbers(np.array(numbers))
        if isinstance(value, str): return self.of_bytes(value.encode())
        return self.of_numbers([value]) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**62 else []

    def of_file(self, path):
        "What a file gives away."
        content = path.read_bytes()
        found = self.of_bytes(content) + self.of_bytes(path.name.encode())
        if path.suffix == ".pt": found += self.of_tree(torch.load(path, weights_only=True, map_location="cpu"))
        if path.suffix == ".safetensors": found += self.of_tree(load_file(path))
        if path.suffix == ".json": found += self.of_tree(json.loads(content))
        if path.suffix == ".png": found += [f for text in png_texts(content) for f in self.of_bytes(text)]
        return sorted(set(found))


def png_texts(content):
    "The text chunks of a PNG, unpacked."
    at, texts = 8, []
    while at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at:at + 8])
        body = content[at + 8:at + 8 + length]
        if kind == b"tEXt": texts.append(body)
        if kind == b"zTXt": texts.append(zlib.decompress(body.split(b"\0", 1)[1][1:]))
        if kind == b"iTXt":
            packed, rest = body.split(b"\0", 1)[1][0], body.split(b"\0", 1)[1][2:].split(b"\0", 2)[2]
            texts.append(zlib.decompress(rest) if packed else rest)
        at += 12 + length
    return texts


def patient_traces(folder, store):
    "File -> what it gives away of the patients of a store, for every file of a folder that does. Raises `ValueError` for ids too short to be told from other numbers."
    scan = PatientScan(store)
    found = {str(p.relative_to(folder)): scan.of_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: what for name, what in found.items() if what}
