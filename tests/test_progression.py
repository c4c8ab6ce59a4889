"Stages and waits of drawn histories against a plain loop, and what the loss must not depend on."
import datetime

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_sequencing.aggregation import assert_no_future_leakage
from ehr_sequencing.batches import make_batch
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.landmarks import at_each_visit
from ehr_sequencing.progression import BEHRTForProgression, ProgressionOutput, Stages, attach_progression, label_progression, progression_loss
from ehr_sequencing.sequences import build_store
from ehr_sequencing.vocabulary import fit_vocabulary

START, STAGE_OF = datetime.datetime(2010, 1, 1), {"S1": 1, "S1b": 1, "S2": 2, "S3": 3}
STAGES = Stages({"S1*": 1, "S2": 2, "S3": 3})
history = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["LAB", "LAB", "S1", "S1b", "S2", "S3", "STOP"])), min_size=1, max_size=10)
ALL = [(0, "S1"), (20, "S2"), (39, "S1b"), (40, "S3"), (41, "STOP"), (60, "LAB")]  # one patient has every code


def as_table(histories):
    rows = [(i, START + datetime.timedelta(days=d), c) for i, entries in enumerate([ALL, *histories]) for d, c in entries]
    return EventTable(event_table(pl.DataFrame(rows, schema=["subject_id", "time", "code"], orient="row")), source="drawn")


def by_hand(entries, day, horizon, onset, censored):
    "Stage, days to the end of the wait, whether a higher stage ends it, at risk, stage to come, known; from the definitions."
    highest = lambda until: max([STAGE_OF.get(c, 0) for d, c in entries if d <= until], default=0)
    stop = min([d for d, c in entries if c == "STOP"], default=np.inf) if censored else np.inf
    end, now = max(d for d, _ in entries), highest(day)
    higher = min([d for d, c in entries if STAGE_OF.get(c, 0) > now], default=np.inf)
    progressed = higher < np.inf and higher <= stop
    wait = (higher if progressed else min(stop, end)) - day
    at_risk = wait > 0 and now < 3 and (onset or now > 0)
    return now, wait, progressed, at_risk, highest(day + horizon), at_risk and min(stop, end) >= day + horizon


@settings(max_examples=250, deadline=None)
@given(histories=st.lists(history, max_size=4), horizon=st.integers(1, 30), onset=st.booleans(), censored=st.booleans())
def test_labels_are_those_of_a_plain_loop(histories, horizon, onset, censored):
    table = as_table(histories)
    store = build_store(table, fit_vocabulary(table.events, min_patients=1))
    labels = label_progression(store, table, STAGES, (5, 10, 20), horizon, onset, **({"censored_by": "STOP"} if censored else {}))
    place = 0
    for entries in [ALL, *histories]:
        for day in sorted({d for d, _ in entries}):
            now, wait, progressed, at_risk, later, known = by_hand(entries, day, horizon, onset, censored)
            assert (labels.stages[place], labels.at_risk[place], labels.stage_known[place]) == (now, at_risk, known)
            if at_risk: assert (labels.durations[place], labels.events[place]) == (wait, progressed)
            if known: assert labels.future_stages[place] == later
            place += 1
    assert place == len(labels.stages)
    for flow in (labels.flow, labels.visit_flow):  # everyone is counted once
        numbers, kinds = flow.iloc[:, 0].to_numpy(), flow["kind"].to_numpy()
        first, last = np.flatnonzero(kinds == "total")
        assert numbers[first] - numbers[kinds == "excluded"].sum() == numbers[last] == numbers[kinds == "part"].sum()
    assert labels.flow.iloc[:, 0][labels.flow["kind"] == "total"].iloc[-1] == (labels.n_at_risk > 0).sum()


@settings(max_examples=40, deadline=None)
@given(histories=st.lists(history, min_size=1, max_size=4), seed=st.integers(0, 1000), weight=st.floats(0, 3))
def test_loss_of_a_step_is_that_of_all_its_patients(histories, seed, weight):
    table = as_table([[(0, "S1"), (3, "LAB")], *histories])
    store = build_store(table, fit_vocabulary(table.events, min_patients=1))
    labels = label_progression(store, table, STAGES, (5, 10, 20), 7)
    batch = attach_progression(make_batch(store, range(len(store))), store, labels)
    torch.manual_seed(seed)
    logits = ProgressionOutput(torch.randn(*batch["stages"].shape, 4), torch.randn(*batch["stages"].shape, 3))
    whole, total, n = progression_loss(logits, batch, weight), 0.0, 0
    for row in np.flatnonzero(labels.n_at_risk):
        part = progression_loss(ProgressionOutput(*(x[row:row + 1] for x in logits)), {k: v[row:row + 1] for k, v in batch.items()}, weight)
        total, n = total + part.total.item() * part.n, n + part.n
    assert n == whole.n and total / n == pytest.approx(whole.total.item(), rel=1e-4)
    assert n > (batch["stage_known"].any(1)).sum()  # one patient is at risk, and the stage to come is not known
    expected, softplus = 0.0, torch.nn.functional.softplus
    for b, row in enumerate(batch["rows"].tolist()):  # written out, from the labels of the store
        for v in range(store.n_visits[row]):
            at, (z, stage) = store.first_visit[row] + v, (logits.progression_logits[b, v], logits.stage_logits[b, v])
            if not labels.at_risk[at]: continue
            days, nll = labels.durations[at], 0.0
            for k, (low, high) in enumerate(((0, 5), (5, 10), (10, 20))):
                if labels.events[at] and low < days <= high: nll += softplus(-z[k]).item()
                elif days > low: nll += min((days - low) / (high - low), 1) * softplus(z[k]).item()
            if labels.stage_known[at]: nll -= weight * stage.log_softmax(-1)[labels.future_stages[at]].item()
            gap = 365 if v == 0 else min((store.visit_starts[at] - store.visit_starts[at - 1]) / np.timedelta64(1, "D"), 365)
            expected += gap / 365 * nll
    assert whole.total.item() == pytest.approx(expected / n, rel=1e-4)
    noise = ProgressionOutput(*(torch.where((batch["at_risk"] if k else batch["stage_known"]).unsqueeze(-1), x, 99.0) for k, x in enumerate(logits)))
    assert progression_loss(noise, batch, weight).total.item() == pytest.approx(whole.total.item(), rel=1e-5)  # what does not count does not count


def test_codes_of_later_visits_change_no_answer():
    histories = [[(0, "S1"), (5, "LAB"), (9, "LAB"), (30, "LAB")], [(0, "S1"), (5, "LAB"), (9, "S3"), (30, "S3")]]
    table = as_table(histories)
    store = build_store(table, fit_vocabulary(table.events, min_patients=1))
    labels = label_progression(store, table, STAGES, (5, 10, 20), 7)
    torch.manual_seed(0)
    model = BEHRTForProgression(BEHRTConfig.small(len(store.vocabulary)), labels.n_stages, labels.horizons, 7)
    batch = make_batch(store, range(len(store)))
    assert_no_future_leakage(model, batch)
    landmarks = at_each_visit(labels, store)
    early = np.flatnonzero((landmarks.visits == 1) & (landmarks.rows > 0))
    assert len(early) == 2
    for answer in (model.predict_risk(landmarks, [5, 20]), model.predict_stage(landmarks)): np.testing.assert_allclose(answer[early[0]], answer[early[1]], atol=1e-6)


def test_a_prefix_means_what_an_outcome_means():
    table = as_table([])
    assert STAGES.codes(table) == {"S1": 1, "S1b": 1, "S2": 2, "S3": 3}
    assert STAGES.outcome(2).codes(table) == ["S2", "S3"]
    with pytest.raises(ValueError, match="whole number of days"): label_progression(build_store(table, fit_vocabulary(table.events, min_patients=1)), table, STAGES, stage_horizon=0.5)


@pytest.mark.parametrize("wrong", [{"n_stages": 0}, {"n_stages": True}, {"stage_horizon": 0}, {"stage_horizon": float("nan")}, {"stage_weight": -1}, {"horizons": None}])
def test_a_question_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"): BEHRTForProgression(BEHRTConfig.small(10), **{"n_stages": 3, "horizons": (365,)} | wrong)
