"Windows that tile long histories: every visit is new once, sees its past, and weighs in an epoch what it weighs in the whole history."
import datetime
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ehr_sequencing.batches import BatchLoader, make_batch, tiles
from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.horizons import labelled_batches
from ehr_sequencing.outcomes import Outcome, label_visits
from ehr_sequencing.progression import ProgressionOutput, Stages, attach_progression, label_progression, progression_loss
from ehr_sequencing.sequences import build_store
from ehr_sequencing.survival import survival_loss
from ehr_sequencing.vocabulary import fit_vocabulary

relaxed = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
VISIT = st.tuples(st.integers(1, 40), st.integers(1, 6), st.sampled_from(["", "", "", "", "EVENT", "S1", "S2"]))  # days since the one before, codes, what else happens
PATIENTS = st.lists(st.tuples(st.integers(0, 3), st.lists(VISIT, min_size=1, max_size=25)), min_size=1, max_size=5)


def records(patients):
    "Events of patients, each some facts and visits."
    rows = []
    for subject, (facts, visits) in enumerate(patients):
        rows += [(subject, None, f"FACT//{k}", None) for k in range(facts)]
        day = datetime.datetime(2010, 1, 1)
        for gap, n, what in visits:
            day += datetime.timedelta(days=gap)
            rows += [(subject, day, f"C{k}", None) for k in range(n)] + ([(subject, day, what, None)] if what else [])
    return EventTable(event_table(pl.DataFrame(rows, schema={"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}, orient="row")))


def store_of(table): return build_store(table, fit_vocabulary(table.events, min_patients=1, exclude=["EVENT"]))


@relaxed
@given(PATIENTS, st.integers(5, 40), st.floats(0, 1), st.integers(0, 2**31), st.booleans())
def test_every_visit_is_new_once_and_sees_its_past(patients, max_tokens, share, seed, some):
    store, generator = store_of(records(patients)), np.random.default_rng(seed)
    asked = generator.random(len(store.token_offsets) - 1) < share if some else None
    rows, ends = np.arange(len(store)), generator.integers(0, store.n_visits)
    row, end, new = tiles(store, rows, ends, max_tokens, asked)
    widths, count, n_asked = np.diff(store.token_offsets), np.zeros(len(store.token_offsets) - 1, dtype=int), np.ones(len(store.token_offsets) - 1, dtype=bool) if asked is None else asked
    for r, e, f in zip(row, end, new): count[store.first_visit[r] + f:store.first_visit[r] + e + 1] += 1
    for r in rows:
        own, room = slice(store.first_visit[r], store.first_visit[r] + ends[r] + 1), max_tokens - (store.static_offsets[r + 1] - store.static_offsets[r])
        fits = widths[own].sum() <= room or ends[r] == 0
        assert (count[own] <= 1).all() and (count[own][n_asked[own]] == 1).all()
        if fits: assert [(e, f) for q, e, f in zip(row, end, new) if q == r] == [(ends[r], 0)]
        assert not count[store.first_visit[r] + ends[r] + 1:store.first_visit[r + 1]].any()  # nothing after the end
    if not len(row): return
    batch = make_batch(store, row, end, max_tokens)
    assert batch["attention_mask"].sum(1).max() <= max_tokens and (batch["first_visits"].numpy() <= new).all()
    for r, e, f, first in zip(row, end, new, batch["first_visits"].tolist()):
        b, room = store.first_visit[r], max_tokens - (store.static_offsets[r + 1] - store.static_offsets[r])
        assert f == 0 or n_asked[b + f]  # begins with a visit that is asked about
        allowed = room - min(widths[b:b + f].sum(), room // 2)
        assert e == end[row == r].max() or widths[b + f:b + e + 2].sum() > allowed  # and takes as many new ones as may be
        if f == 0: continue
        past, fresh = widths[b + first:b + f].sum(), widths[b + f:b + e + 1].sum()
        assert first == 0 or past + fresh + widths[b + first - 1] > room  # as much past as there is room for
        assert e == f or fresh <= allowed


def epoch(loss, loader, tables):
    "Mean over the units of all batches, and its gradient with respect to the logits of every visit."
    parts = [loss(batch, *tables) for batch in loader]
    value = sum(v * n for v, n in parts) / sum(n for _, n in parts)
    return value.item(), torch.autograd.grad(value, tables, allow_unused=True)


def of_visits(table, batch, store):
    "Rows of a table of all visits for the visits of a batch."
    visit = torch.from_numpy(store.first_visit[batch["rows"].numpy()])[:, None] + batch["first_visits"][:, None] + torch.arange(batch["sequence_mask"].shape[1])
    return table[visit.clamp(max=len(table) - 1)]


def same_epochs(loss, tables, loaders, rel=1e-5):
    (whole, gradients), *others = [epoch(loss, loader, tables) for loader in loaders]
    for value, theirs in others:
        assert value == pytest.approx(whole, rel=rel)
        for a, b in zip(theirs, gradients, strict=True): torch.testing.assert_close(a, b, rtol=rel, atol=1e-9)


@relaxed
@given(PATIENTS, st.integers(5, 40), st.integers(0, 1000), st.sampled_from(["exclude", "include"]), st.sampled_from([0, 20]))
def test_an_epoch_of_windows_is_an_epoch_of_whole_histories(patients, max_tokens, seed, prevalent, washout):
    table = records([*patients, (0, [(1, 2, ""), (30, 2, ""), (9, 1, "EVENT")])])
    store = store_of(table)
    labels = label_visits(store, table, Outcome("EVENT", prevalent=prevalent, washout_days=washout), horizons=(10, 50, 200))
    torch.manual_seed(seed)
    n = len(store.token_offsets) - 1
    loaders = [labelled_batches(store, labels, max_tokens=limit, training=training, token_budget=100, seed=seed) for limit, training in ((10**6, False), (max_tokens, False), (max_tokens, True))]
    def on_calendar(batch, z): return survival_loss(of_visits(z, batch, store), batch), int(batch["at_risk"].any(1).sum())
    same_epochs(on_calendar, [torch.randn(n, 3, dtype=torch.float64, requires_grad=True)], loaders)
    def in_gaps(batch, z): return survival_loss(of_visits(z, batch, store), batch), int((batch["event_times"] >= 0).sum())
    if washout: return  # no gap of the washout is in a tile
    if prevalent == "include":  # windows that begin after the event add nothing to hazards per visit
        whole, tiled = (sum(v * n for v, n in (in_gaps(b, z) for b in loader if (b["event_times"] >= 0).any())) / loader.windows_per_patient for z in [torch.randn(n, dtype=torch.float64)] for loader in loaders[:2])
        assert tiled.item() == pytest.approx(whole.item(), rel=1e-5, abs=1e-9)
        return
    same_epochs(in_gaps, [torch.randn(n, dtype=torch.float64, requires_grad=True)], loaders)


@relaxed
@given(PATIENTS, st.integers(5, 40), st.integers(0, 1000), st.booleans())
def test_stages_too(patients, max_tokens, seed, onset):
    table = records([*patients, (0, [(1, 2, "S1"), (9, 2, ""), (5, 1, "S2")])])
    store = store_of(table)
    labels = label_progression(store, table, Stages({"S1": 1, "S2": 2}), (10, 50, 200), 30, onset=onset)
    torch.manual_seed(seed)
    n = len(store.token_offsets) - 1
    tables = [torch.randn(n, k, dtype=torch.float64, requires_grad=True) for k in (3, 3)]
    def loss(batch, stage, wait):
        parts = progression_loss(ProgressionOutput(*(of_visits(z, batch, store) for z in (stage, wait))), batch)
        return parts.total, parts.n
    attach = partial(attach_progression, store=store, labels=labels)
    whole, tiled = (labelled_batches(store, labels, max_tokens=limit, transform=attach, token_budget=100) for limit in (10**6, max_tokens))
    assume(any(b["stage_known"].any() for b in whole))
    same_epochs(loss, tables, [whole, tiled])


@relaxed
@given(PATIENTS, st.integers(0, 1000), st.sampled_from(["both", "flat", "hierarchical"]))
def test_where_all_fits_nothing_changes(patients, seed, layout):
    store = store_of(records(patients))
    options = dict(shuffle=True, seed=seed, max_patients=2, max_tokens=10**4, layout=layout)
    plain, tiled = BatchLoader(store, **options), BatchLoader(store, tile=True, **options)
    for number in range(2):
        plain.set_epoch(number); tiled.set_epoch(number)
        for a, b in zip(plain, tiled, strict=True):
            assert b.pop("new_visits").equal(b["sequence_mask"]) and (b.pop("window_weights") == 1).all()
            assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_of_a_plan_make_the_epoch(workers):
    "As a run does that goes on in the middle of an epoch, or on several processes."
    store = store_of(records([(1, [(3, 4, "")] * n) for n in (2, 9, 30)]))
    loader = BatchLoader(store, tile=True, max_tokens=20, token_budget=60, shuffle=True, num_workers=workers)
    plan, every = loader.plan(), list(loader)
    assert all(len(item) == 3 for item in plan) and len(plan) == len(loader) == len(every) > 3
    for mine, theirs in zip(loader.batches(plan[2:]), every[2:], strict=True): assert all(mine[k].equal(theirs[k]) for k in theirs)
    halves = [list(loader.batches([tuple(a[rank::2] for a in item) for item in plan if len(item[0]) > rank])) for rank in (0, 1)]
    assert sum(int(b["new_visits"].sum()) for half in halves for b in half) == sum(store.n_visits)
