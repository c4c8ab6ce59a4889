"For any event table: tokens -> store -> batches -> codes loses nothing and invents nothing; flat and hierarchical agree; shards do not matter."
import datetime
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ehr_sequencing.batches import BatchLoader, make_batch
from ehr_sequencing.events import SCHEMA, EventTable, event_table
from ehr_sequencing.prepare import PrepareConfig, prepare_store
from ehr_sequencing.sequences import build_store, load_sequences
from ehr_sequencing.vocabulary import fit_vocabulary

NO_DAY = datetime.date(1, 1, 1)
CODES = st.one_of(st.just("LAB"), st.sampled_from(["A", "B", "LAB", "C//Q1", "VISIT_END", "MEDS_BIRTH", "OBSERVATION_END", "é, \"ü\"\n", "ICD10CM//I50.9"]), st.text(min_size=1, max_size=3))
TIMES = st.one_of(st.none(), st.sampled_from([datetime.datetime(2010, 1, d, h) for d in (1, 2, 3) for h in (0, 9)]),
                  st.datetimes(datetime.datetime(1890, 1, 1), datetime.datetime(2100, 1, 1)))
VALUES = st.one_of(st.none(), st.sampled_from([0.0, -0.0, 1.5, float("inf"), float("-inf")]), st.floats(width=32, allow_nan=False, allow_infinity=False))
ROW = st.tuples(st.sampled_from([0, 1, -3, 2**62 + 1, -(2**62) - 1]), TIMES, CODES, VALUES, st.sampled_from([None, None, -7, 8, 2**60]))
ROWS = st.one_of(st.lists(ROW, min_size=1, max_size=60), st.lists(ROW, min_size=60, max_size=120))  # from 20 values of a code on there are bins
relaxed = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])


def reference(rows, vocabulary):
    "Patient -> (facts, visits), each visit a list of tokens; written without any of the library's grouping."
    def token(code, value):
        edges = vocabulary.value_edges.get(code)
        name = code if value is None or edges is None else f"{code}//Q{1 + sum(e <= np.float32(value) for e in edges)}"
        return name if name in vocabulary.index else "[UNK]"
    def once(names): return list(dict.fromkeys(names))
    patients = {}
    def order(row): return row[0], row[1] is not None, row[1] or 0, row[2].encode(), row[3] is not None, row[3] or 0  # nothing before something
    for subject, time, code, value, visit in sorted(rows, key=order):
        facts, visits = patients.setdefault(subject, ([], {}))
        if code in ("MEDS_BIRTH", "MEDS_DEATH", "OBSERVATION_END"): continue
        if time is None:
            if code != "VISIT_END": facts.append(token(code, value))
            continue
        key = (visit or 0, NO_DAY if visit is not None else time.date())
        visits.setdefault(key, []).append((time, code, value))
    result = {}
    for subject, (facts, visits) in patients.items():
        ordered = []
        for key, events in visits.items():
            content = [e for e in events if e[1] != "VISIT_END"]
            if content: ordered.append((min(e[0] for e in content), max(e[0] for e in events), *key, once(token(c, v) for _, c, v in content)))
        if ordered: result[subject] = (once(facts), [visit[-1] for visit in sorted(ordered, key=lambda v: v[:-1])])
    return result


def table_of(rows): return event_table(pl.DataFrame(rows, schema=SCHEMA, orient="row"))


def store_of(rows, min_patients=1):
    "The store of some rows with everything in the vocabulary, or None where there is nothing to learn."
    events = table_of(rows)
    try: vocabulary = fit_vocabulary(events, min_patients=min_patients, n_value_bins=3)
    except ValueError as error:
        assert "no code occurs" in str(error)
        return None
    return build_store(EventTable(events), vocabulary)


def visits_of(batch, b, decode):
    "Facts and visits of a row, from the flat tensors and from the hierarchical ones: token names by visit."
    n = int(batch["sequence_mask"][b].sum())
    flat = [decode(batch["codes"][b][batch["visit_ids"][b] == v]) for v in range(n)]
    nested = [decode(batch["visit_codes"][b, v][batch["visit_mask"][b, v]]) for v in range(n)]
    return flat, nested


@relaxed
@given(ROWS, st.integers(1, 3))
def test_nothing_is_lost_and_nothing_invented(rows, min_patients):
    store = store_of(rows, min_patients)
    if store is None: return
    expected = reference(rows, store.vocabulary)
    assert store.subject_ids.tolist() == sorted(expected)
    batch = make_batch(store, range(len(store)), max_tokens=10_000)
    for b, subject in enumerate(store.subject_ids.tolist()):
        facts, visits = expected[subject]
        flat, nested = visits_of(batch, b, store.vocabulary.decode)
        assert flat == nested == [facts + visits[0], *visits[1:]]
        assert [names for _, names in store[b]] == visits
    assert not (batch["codes"][batch["attention_mask"]] == 0).any() and not batch["codes"][~batch["attention_mask"]].any()
    assert (batch["visit_ids"][~batch["attention_mask"]] == -1).all()


@relaxed
@given(ROWS, st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_truncation_keeps_the_most_recent_whole_visits(rows, max_tokens, seed):
    store = store_of(rows)
    if store is None or np.diff(store.static_offsets).max() >= max_tokens: return
    generator = np.random.default_rng(seed)
    ends = generator.integers(0, store.n_visits)
    batch = make_batch(store, range(len(store)), ends, max_tokens)
    for b in range(len(store)):
        facts = store.vocabulary.decode(store.static_tokens[store.static_offsets[b]:store.static_offsets[b + 1]])
        visits, room = [names for _, names in store[b]][:ends[b] + 1], max_tokens - len(facts)
        kept = []
        while visits and len(visits[-1]) + sum(map(len, kept)) <= room: kept.insert(0, visits.pop())
        if not kept: kept = [visits[-1][:room]]  # one visit alone is longer than the limit
        flat, nested = visits_of(batch, b, store.vocabulary.decode)
        assert flat == nested == [facts + kept[0], *kept[1:]]
        assert int(batch["first_visits"][b]) == ends[b] + 1 - len(kept)


@relaxed
@given(ROWS, st.integers(10, 200), st.booleans(), st.sampled_from(["both", "flat", "hierarchical"]))
def test_a_pass_of_the_loader_visits_everybody_once(rows, budget, shuffle, layout):
    store = store_of(rows)
    if store is None: return
    seen = []
    for batch in BatchLoader(store, token_budget=budget, shuffle=shuffle, seed=5, layout=layout):
        seen += batch["rows"].tolist()
        if len(batch["rows"]) > 1: assert batch["visit_codes" if layout == "hierarchical" else "codes"].numel() <= budget
    assert sorted(seen) == list(range(len(store)))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS, st.integers(1, 4), st.randoms())
def test_the_order_of_rows_and_the_shards_do_not_matter(rows, n_shards, random):
    rows = [(s, t, c, v, None) for s, t, c, v, _ in rows if c != "MEDS_BIRTH"]
    if not any(t for _, t, c, _, _ in rows if c not in ("OBSERVATION_END", "VISIT_END")): return
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for name, some, n in (("a", rows, 1), ("b", random.sample(rows, len(rows)), n_shards)):
            file = Path(folder, f"{name}.parquet")
            pl.DataFrame(some, schema=SCHEMA, orient="row").drop("visit_id").write_parquet(file)
            config = PrepareConfig(file, Path(folder, name), format="table", min_patients=1, n_value_bins=3, fractions=(1., 0., 0.), n_shards=n, n_jobs=1)
            made.append(prepare_store(config, say=lambda line: None))
        assert made[0].table.equals(made[1].table) and made[0].vocabulary == made[1].vocabulary
        again = load_sequences(Path(folder, "a"))
        assert [again[i] for i in range(len(again))] == [made[0][i] for i in range(len(again))]
