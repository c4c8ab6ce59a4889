"""Arms on samples so small that much is missing, the store without a future, and fits in other processes."""
import pickle
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joblib import Parallel, delayed

from ehr_sequencing import arms
from ehr_sequencing.arms import ARMS, Arm, FittingSettings, Fitted, Task, bins_with_events, fit_arm, fit_baseline, looks_ahead, loss_arms, pretrain_encoder, without_future
from ehr_sequencing.baselines import LandmarkFeatures, history_counts
from ehr_sequencing.batches import make_batch
from ehr_sequencing.benchmark_results import Cell, load_cell, save_cell
from ehr_sequencing.landmarks import Landmarks, at_each_visit, spaced_landmarks
from ehr_sequencing.outcomes import Outcome, feature_exclusions, label_visits
from ehr_sequencing.period_models import period_rows
from ehr_sequencing.sequences import build_store, load_sequences
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.vocabulary import fit_vocabulary

QUICK = FittingSettings(epochs=1)
BASELINES = [name for name, arm in ARMS.items() if arm.kind != "network"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    cohort, outcome = simulate_cohort(400, seed=8, hazard_ratio=3), Outcome(OUTCOME_CODE)
    folder = tmp_path_factory.mktemp("arms")
    build_store(cohort.table, fit_vocabulary(cohort.table.events, exclude=feature_exclusions(outcome, cohort.table))).save(folder/"store")
    store = load_sequences(folder/"store")
    labels = label_visits(store, cohort.table, outcome)
    pretrain_encoder(store, np.arange(0, 60), folder/"encoder", 0, QUICK)
    return store, labels, folder/"encoder"


def draw_task(world, n, seed, **changes):
    "n labelled patients, a fifth of them to choose on."
    store, labels, encoder = world
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(labels.n_at_risk))[:n]
    return Task(store, labels, rows[n // 5:], rows[:n // 5], seed, encoder, **({"fitting": QUICK} | changes))


def check(fitted, task, world):
    store, labels, _ = world
    asked = spaced_landmarks(labels, store, np.arange(0, len(store), 9))
    risks = fitted.predict_risk(asked, labels.horizons)
    assert risks.shape == (len(asked), len(labels.horizons)) and np.isfinite(risks).all() and (risks >= 0).all() and (risks <= 1).all()
    assert (np.diff(risks, axis=1) >= -1e-7).all() and fitted.leak == "" and 0 < fitted.trainable <= fitted.parameters
    return risks


@pytest.mark.parametrize("n", [6, 12, 25, 60])
def test_regressions_on_few_patients(world, n):
    "Whatever is missing, a risk comes out, and nothing looks ahead."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(3 if n < 60 else 1):
            task = draw_task(world, n, seed)
            for name in BASELINES: check(fit_arm(ARMS[name], task, ARMS[name].settings), task, world)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.kind == "network"])
def test_networks_on_sixty_patients(world, name):
    "The cell that would be written holds, too."
    task = draw_task(world, 60, 1)
    fitted = fit_arm(ARMS[name], task, ARMS[name].settings[:2])
    risks = check(fitted, task, world)
    assert fitted.chosen in ARMS[name].settings[:2] and f"{fitted.chosen:g}" in fitted.setting
    cell = Cell(name, 60, 1, risks, risks[:3], fitted.parameters, fitted.trainable, fitted.seconds, fitted.cpu_seconds, len(fitted.history), fitted.setting, fitted.history, fitted.leak)
    save_cell(task.encoder.parent/f"{name}.npz", cell)
    assert load_cell(task.encoder.parent/f"{name}.npz").history == fitted.history


def test_no_event_to_choose_on(world):
    "The default setting of a regression, the validation loss of a network, and words about it."
    task = draw_task(world, 60, 3)
    without = task.validation[~np.isin(task.validation, task.stop_landmarks.rows[task.stop_landmarks.events])]
    task = replace(task, validation=without)
    for name in ("Cox, counts", "boosted trees, counts", "LSTM"):
        fitted = fit_arm(ARMS[name], task, ARMS[name].settings)
        assert "no pair of the validation landmarks can be compared" in fitted.setting
        if name != "LSTM": assert fitted.chosen == ARMS[name].settings[0]
        assert "since" not in fit_arm(ARMS[name], task).setting  # with one setting nothing is chosen


@pytest.mark.parametrize("name", ["LSTM, ranking", "LSTM, hybrid", "BEHRT, from scratch, hybrid"])
def test_losses(world, name):
    "What is asked for is minimised; without an event among those to stop on, or to fit to, there is nothing to rank."
    task, arm = draw_task(world, 60, 3), loss_arms()[name]
    fitted = fit_arm(arm, task)
    check(fitted, task, world)
    assert fitted.model.objective.name == name.rsplit(", ")[-1] and "since" not in fitted.setting
    ill = world[1].event_indicators
    for changed in (replace(task, validation=task.validation[~ill[task.validation]]), replace(task, train=task.train[~ill[task.train]])):
        plain = fit_arm(arm, changed)
        assert plain.model.objective.name == "nll" and "no two patients of a batch can be compared" in plain.setting
        assert (plain.predict_risk(task.fit_landmarks, 365) == fit_arm(ARMS[name.rsplit(", ", 1)[0]], changed).predict_risk(task.fit_landmarks, 365)).all()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=12), st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True))
def test_merged_bins_can_be_learned(follow_up, ends):
    "Every merged bin has an event and somebody who outlives it; the ends are some of those that were given, and the last one stays."
    durations, events = (np.array(x) for x in zip(*follow_up))
    ends = sorted(ends)
    inside = events & (durations <= ends[-1])
    if not inside.any() or inside.all():
        with pytest.raises(ValueError, match="durations: expected some that end with the event"): bins_with_events(durations, events, ends)
        return
    bins = bins_with_events(durations, events, ends)
    assert set(bins) <= set(ends) and bins[-1] == ends[-1] and list(bins) == sorted(set(bins))
    n = len(durations)
    _, step, outcome, weight = period_rows(Landmarks(None, np.zeros(n, int), np.zeros(n, int), durations.astype(float), events), bins)
    assert (np.bincount(step, outcome, len(bins)) > 0).all() and (np.bincount(step, (~outcome) * weight, len(bins)) > 0).all()
    if np.array([((durations > a) & (durations <= b) & events).any() and ((durations > a) & ~((durations <= b) & events)).any() for a, b in zip([0, *ends], ends)]).all(): assert list(bins) == ends


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_without_future(world, data):
    "Batches and features of cut histories are those of histories that end at the landmark, also where a patient is asked about twice."
    store, labels, _ = world
    every = at_each_visit(labels, store)
    marks = every.take(data.draw(st.lists(st.integers(0, len(every) - 1), min_size=1, max_size=9)))
    blind = without_future(marks)
    mine, theirs = make_batch(blind.store, np.arange(len(marks))), make_batch(store, marks.rows, marks.visits)
    for key in mine.keys() - {"rows"}: assert torch.equal(mine[key], theirs[key]), key
    assert (history_counts(blind) != history_counts(marks)).nnz == 0
    assert (blind.store.n_visits == marks.visits + 1).all() and (blind.days == marks.days).all() and not blind.events.any()
    assert len(blind.store.tokens) == blind.store.token_offsets[-1] and len(blind.store.visit_known) == len(blind.store.visit_starts) == (marks.visits + 1).sum()


def test_facts_of_the_end_are_found(world):
    "An arm that reads the day of death or of the end of observation, or the labels, is seen from outside; one that reads the first visit is not."
    store, labels, _ = world
    task = draw_task(world, 60, 0)
    class Reads:
        def __init__(self, of): self.of = of
        def predict_risk(self, landmarks, horizons): return np.nan_to_num(np.tile(self.of(landmarks)[:, None], len(horizons)))
    def years(days): return np.where(np.isnat(days), 0.0, days.astype("datetime64[D]").astype(float) / 365)
    looks = {"end": lambda m: years(m.store.observation_ends[m.rows]), "death": lambda m: years(m.store.deaths[m.rows]), "last": lambda m: years(m.store.visit_starts[m.store.first_visit[m.rows + 1] - 1]), "label": lambda m: m.durations}
    fair = {"first": lambda m: years(m.store.visit_starts[m.store.first_visit[m.rows]]), "known": lambda m: years(m.store.visit_known[m.store.first_visit[m.rows] + m.visits]), "birth": lambda m: years(m.store.births[m.rows])}
    def found(of): return fit_arm(Arm("reads", "baseline", (0,), False, lambda task, settings: Fitted(Reads(of), 1, 1)), task).leak
    assert [name for name, of in (looks | fair).items() if found(of)] == [*looks]


def test_digits_do_not_depend_on_processes_or_threads(world):
    "Two at a time in other processes, here with another number of threads, and after other arms: the same."
    task, names = draw_task(world, 60, 2), ("BEHRT, pre-trained, LoRA", "boosted trees, counts", "Med2Vec, logistic")
    asked = spaced_landmarks(task.labels, task.store, np.arange(0, len(task.store), 9))
    def ask(name): return fit_arm(ARMS[name], task, ARMS[name].settings[:2]).predict_risk(asked, task.labels.horizons)
    here = [ask(name) for name in names]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = [ask(name) for name in reversed(names)][::-1]
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)
    there = Parallel(2)(delayed(ask)(name) for name in names)
    for a, b, c in zip(here, again, there): assert (a == b).all() and (a == c).all()
    assert len(pickle.dumps(task)) < 600_000


def test_a_pretraining_that_is_killed_leaves_nothing(world, tmp_path, monkeypatch):
    "Neither the folder nor a part of it."
    store, _, _ = world
    def killed(*args, **options): raise KeyboardInterrupt
    monkeypatch.setattr(arms, "pretrain", killed)
    with pytest.raises(KeyboardInterrupt): pretrain_encoder(store, np.arange(40), tmp_path/"encoder", 0, QUICK)
    assert not list(tmp_path.iterdir())


def test_few_epochs_for_many(world):
    "The limit on presentations holds in the fits, not only in its formula; pre-training takes other patients to stop on than to train on."
    task = draw_task(world, 60, 0, fitting=FittingSettings(epochs=5, presentations=100, patience=9))
    assert len(fit_arm(ARMS["LSTM"], task).history) == 2 == 100 // len(task.train)
    assert len(fit_arm(ARMS["LSTM"], replace(task, fitting=replace(task.fitting, presentations=1))).history) == 1


def test_features_that_look_ahead(world):
    "Counts over whole histories, in the place of those up to the landmark."
    class Whole(LandmarkFeatures):
        def transform(self, landmarks): return super().transform(replace(landmarks, visits=landmarks.store.n_visits[landmarks.rows] - 1))
    task = draw_task(world, 60, 0)
    def make(features, task, settings): return arms.CoxBaseline(features, penalties=settings)
    leaking, fair = (fit_arm(Arm("own", "baseline", (0.1,), False, partial(fit_baseline, partial(make, features), "{}")), task) for features in (Whole(), LandmarkFeatures()))
    assert leaking.leak.startswith("risks move") and fair.leak == "" and looks_ahead(leaking, task.stop_landmarks, 1825) != ""
