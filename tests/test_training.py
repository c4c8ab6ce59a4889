"Whole runs in other pieces, in other precision, with blocks computed twice: the same curve."
import numpy as np
import pytest
import torch

from ehr_sequencing.batches import BatchLoader
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.horizons import labelled_batches
from ehr_sequencing.learning_rate import learning_rate_test, suggest_learning_rate
from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
from ehr_sequencing.masked_codes import BEHRTForMLM, MaskCodes
from ehr_sequencing.outcomes import Outcome, label_visits
from ehr_sequencing.sequences import build_store
from ehr_sequencing.steps import SCHEDULES, learning_rate_factor
from ehr_sequencing.survival import BEHRTForSurvival
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.training import Trainer
from ehr_sequencing.vocabulary import fit_vocabulary


@pytest.fixture(scope="module")
def records():
    torch.set_num_threads(1)
    cohort = simulate_cohort(200, seed=2, hazard_ratio=3)
    store = build_store(cohort.table, fit_vocabulary(cohort.table.events, exclude=[OUTCOME_CODE]))
    return store, label_visits(store, cohort.table, Outcome(OUTCOME_CODE))


def run(records, kind="survival", dropout=0.0, rows=slice(0, 96), checkpointing=False, **changes):
    "A run of three epochs, 32 patients a batch and a step."
    store, labels = records
    config = BEHRTConfig(len(store.vocabulary), 16, 32, 2, 2, dropout=dropout, gradient_checkpointing=checkpointing)
    torch.manual_seed(1)
    options = dict(max_tokens=64, token_budget=10**6, layout="flat")
    if kind == "survival":
        model = BEHRTForSurvival(config, labels.horizons)
        train, validation = (labelled_batches(store, labels, np.arange(len(store))[part], training, **options | ({"max_patients": 32} if training else {})) for part, training in ((rows, True), (slice(96, None), False)))
    else:
        model = BEHRTForMLM(config)
        train, validation = (BatchLoader(store, np.arange(len(store))[part], transform=MaskCodes(len(store.vocabulary)), shuffle=shuffle, max_patients=32, **options) for part, shuffle in ((rows, True), (slice(96, None), False)))
    trainer = Trainer(model, train, validation, **{"epochs": 3, "patients_per_step": 32, "device": "cpu", "show_progress": False} | changes)
    trainer.fit()
    return trainer


def curve(trainer): return np.array([[row["train_loss"], row["validation_loss"]] for row in trainer.history])


@pytest.mark.parametrize("kind", ["survival", "mlm"])
def test_one_times_32_is_eight_times_4(records, kind):
    whole, pieces = run(records, kind), run(records, kind, gradient_accumulation_steps=8)
    assert whole.run.steps == pieces.run.steps >= 9
    assert np.abs(curve(whole) - curve(pieces)).max() < 1e-5
    other = run(records, kind, patients_per_step=64)  # another run altogether: the test can fail
    assert np.abs(curve(whole) - curve(other)).max() > 1e-3


def test_computing_blocks_twice_changes_no_number(records):
    once, twice = (run(records, dropout=0.1, checkpointing=again) for again in (False, True))
    assert once.history == twice.history
    assert all(torch.equal(a, b) for a, b in zip(once.module.state_dict().values(), twice.module.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["survival", "mlm"])
def test_bf16_stays_near_float32(records, kind):
    exact, rounded = run(records, kind), run(records, kind, mixed_precision="bf16")
    apart = np.abs(curve(exact) / curve(rounded) - 1).max()
    assert 0 < apart < 0.01
    assert all(p.dtype == torch.float32 for p in rounded.module.parameters())
    batch = next(iter(rounded.validation))
    again = type(rounded.module)(rounded.module.config, **({"horizons": rounded.module.horizons} if kind == "survival" else {}))
    again.load_state_dict(rounded.module.state_dict())
    with torch.no_grad(): assert torch.equal(again.eval()(batch), rounded.module(batch))  # after training it answers in float32


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_of_every_step_is_that_of_its_place(records, schedule):
    trainer = run(records, schedule=schedule, warmup=0.25, learning_rate=1e-3, evaluate_every=1, patience=100)
    rates = [row["learning_rate"] for row in trainer.history]
    sizes = [sum(len(b[0]) for b in trainer.train.plan())]
    assert len(rates) == trainer.run.steps and max(rates) <= 1e-3 and sizes[0] >= 90
    middle = [1e-3 * learning_rate_factor((i + 0.5) / len(rates), 0.25, schedule) for i in range(len(rates))]
    assert np.abs(np.array(rates) - middle).max() < 2e-4  # steps see nearly, not exactly, the same number of patients


def test_the_range_test_leaves_model_and_data_as_they_are(records):
    store, labels = records
    torch.manual_seed(0)
    model = SurvivalLSTM(LSTMConfig(len(store.vocabulary), 16, 16), labels.horizons)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first, again = (learning_rate_test(model, labelled_batches(store, labels, None, True, max_tokens=64), 1e-4, 1.0, steps=40, patients_per_step=32, device="cpu") for _ in range(2))
    assert first.equals(again) and 1e-4 < suggest_learning_rate(first) < 0.1
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
