"The oracle scores what theory says on 20,000 simulated patients, and no model that reads the record does better."
import importlib.util

import numpy as np
import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("known_truth", ROOT / "benchmarks" / "known_truth.py")
known_truth = importlib.util.module_from_spec(spec)
spec.loader.exec_module(known_truth)


@pytest.fixture(scope="module")
def deathless():
    world = known_truth.World(28_000, 200, 0.0, n_landmarks=20_000)
    return world, world.oracle(n_futures=15)


def test_the_oracle_scores_what_theory_says_without_death(deathless):
    table = known_truth.oracle_table(*deathless, competing=False, n_resamples=100)
    assert table.inside.mean() >= 0.8, table[~table.inside]  # 19 intervals that hang together; 95 % of them in the long run
    slope = table[(table.metric == "calibration_slope")]
    assert slope.inside.all() and ((slope.high - slope.low) < 0.2).all()
    assert (np.abs(table.value - table.theory) < 2.2 * (table.high - table.low)).all()  # none is far off


def test_the_oracle_scores_what_theory_says_where_death_competes():
    world = known_truth.World(30_000, 201, 1.0, n_landmarks=20_000)
    table = known_truth.oracle_table(world, world.oracle(n_futures=15, competing="death"), competing=True, n_resamples=100)
    assert table.inside.mean() >= 0.8, table[~table.inside]
    assert table[table.metric == "calibration_slope"].inside.all()


def test_the_wrong_question_is_found_out(deathless):
    "Risks that are wrong in level or in spread do not pass as the truth."
    world, truth = deathless
    for wrong in (0.8 * truth, 1 - (1 - truth) ** 1.3, truth**1.2):
        table = known_truth.oracle_table(world, wrong, competing=False, n_resamples=50)
        fitted = table[table.metric.isin(["calibration_slope", "calibration_intercept", "observed_expected"])]
        assert not fitted.inside.all()


def test_no_honest_model_exceeds_the_oracle(deathless):
    world, truth = deathless
    train = known_truth.World(4_000, 202, 0.0, world.store.vocabulary)
    table = known_truth.against_oracle(world, truth, known_truth.honest_models(train, networks=False), n_resamples=100)
    assert not table.exceeds.any()
    cox = table[(table.model == "Cox on age, sex and counts") & (table.metric == "auc")]
    assert (cox.difference_high < 0).all() and (cox.value > 0.7).all()  # good, and clearly below the ceiling
    assert set(table.model) == {"age alone", "Cox on age, sex and counts", "the same for all"}
