"How often a verdict claims what is not so."
from dataclasses import replace

import numpy as np
import pytest

from ehr_sequencing.benchmark_results import imitate_results
from ehr_sequencing.benchmark_scores import BenchmarkScores
from ehr_sequencing.hypotheses import COX, FULL, LORA, LSTM, OUTCOMES, SCRATCH, TREES, decide_hypotheses, red_flags

KINDS = {"visit count": "control", COX: "baseline", TREES: "baseline"}


def made(noise, n_patients, seed, n_resamples=150, spread=0.0):
    "Scores within the last horizon; with `spread` an arm's noise differs from seed to seed."
    g = np.random.default_rng(seed)
    of_seeds = {(arm, s): sigma * np.exp(spread * g.normal()) for arm, sigma in noise.items() for s in range(3)}
    results = imitate_results(of_seeds, sizes=(1000,), n_seeds=1, n_patients=n_patients, seed=seed)
    cells = [replace(c, arm=c.arm[0], seed=c.arm[1], risks=c.risks[:, -1:], train_risks=c.train_risks[:, -1:], trainable=10 if c.arm[0] == LORA else 100) for c in results.cells]
    everybody = {(1000, s): results.train[1000, 0] for s in range(3)}
    return BenchmarkScores(replace(results, cells=cells, horizons=results.horizons[-1:], kinds={arm: KINDS.get(arm, "network") for arm in noise}, train=everybody, oracle=results.oracle[:, -1:], oracle_train={}), n_resamples=n_resamples)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_arms_of_equal_worth_are_rarely_told_apart(spread):
    "Each side of an interval is wrong in 2.5 % of the benchmarks; of 60, more than 6 would be a surprise."
    noise = {arm: 1.0 for arm in (COX, TREES, LSTM, SCRATCH, LORA, FULL)}
    found = np.array([[v.outcome for v in decide_hypotheses(made(noise, 80, s, spread=spread))] for s in range(60)])
    for h in (0, 1, 3):
        assert (found[:, h] == "supported").sum() <= 6 and (found[:, h] == "refuted").sum() <= 6
    assert (found[:, 4] == "supported").sum() <= 4  # both differences at once
    assert (found[:, 2] == "refuted").sum() <= 5


def test_equivalence_is_rarely_found_where_there_is_none():
    noise = {LORA: 1.3, FULL: 0.8}  # C differs by about three margins
    found = [decide_hypotheses(made(noise, 400, s))[2] for s in range(30)]
    assert np.mean([v.differences[0].value for v in found]) < -0.02
    assert sum(v.outcome == "supported" for v in found) <= 3 and sum(v.outcome == "refuted" for v in found) > 12


def test_verdicts_follow_the_noise():
    good, bad = {COX: 1.2, TREES: 1.2, LSTM: 1.0, SCRATCH: 1.0, LORA: 0.2, FULL: 0.2}, {COX: 0.2, TREES: 1.0, LSTM: 0.3, SCRATCH: 0.3, LORA: 4.0, FULL: 1.5}
    for noise, outcome in ((good, "supported"), (bad, "refuted")):
        verdicts = decide_hypotheses(made(noise, 800, 0, 300))
        assert [verdicts[i].outcome for i in (0, 1, 2, 4)] == [outcome] * 4, [v.words for v in verdicts]
        assert all(v.outcome in OUTCOMES and v.words.startswith({"supported": "Yes", "refuted": "No", "not decided": "Not decided"}[v.outcome]) for v in verdicts)


def test_lora_that_is_better_than_the_margin_is_neither_a_match_nor_a_failure():
    verdict = decide_hypotheses(made({LORA: 0.2, FULL: 2.0}, 600, 0, 300))[2]
    assert verdict.outcome == "not decided" and "LoRA is better" in verdict.words


def test_the_primary_contrast_alone_decides():
    "From scratch BEHRT beats the LSTM, pre-trained it does not: H2 is not supported."
    verdict = decide_hypotheses(made({LSTM: 1.0, SCRATCH: 0.2, FULL: 1.0}, 600, 1, 300))[1]
    assert verdict.outcome == "not decided" and verdict.differences[2].low > 0


def test_an_honest_arm_is_rarely_flagged_against_the_oracle():
    "An arm that knows the truth but for a little noise."
    flags = [flag for s in range(40) for flag in red_flags(made({"visit count": 6.0, FULL: 0.1}, 150, s)) if "true risks" in flag]
    assert len(flags) <= 4


def test_beating_one_baseline_of_two_is_not_enough():
    verdict = decide_hypotheses(made({COX: 0.5, TREES: 2.0, LSTM: 2.0, FULL: 0.5}, 400, 2, 300))[4]
    assert verdict.differences[1].low > 0 and verdict.outcome == "not decided" and 'worse than one of the two: "LSTM"' in verdict.words
