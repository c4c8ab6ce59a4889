"Scores of a benchmark on data drawn to be nasty, and intervals held against a truth that is known."
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_sequencing.benchmark_results import Asked, BenchmarkResults, Cell, imitate_results
from ehr_sequencing.benchmark_scores import METRICS, BenchmarkScores, over_seeds, pair_draws
from ehr_sequencing.bootstrap import interval
from ehr_sequencing.metrics import concordance_index, pair_sums

SOME = settings(max_examples=60, deadline=None)


@SOME
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 12), st.integers(1, 12))
def test_pairs_by_patient_are_the_general_sums(seed, n, n_keys, n_risks):
    g = np.random.default_rng(seed)
    patients = np.unique(g.integers(0, n, n), return_inverse=True)[1]
    keys, risks, a, counts = g.integers(0, n_keys, n), g.integers(0, n_risks, n), (g.random(n) < 0.4).astype(float), g.integers(0, 4, (patients.max() + 1, 5))
    def general(a): return pair_sums(keys, risks, counts[patients].T * a, counts[patients].T.astype(float))[1]
    assert (pair_draws(keys, risks, a, patients, counts) == general(a)).all()
    weights = a * g.random(n)
    assert np.allclose(pair_draws(keys, risks, weights, patients, counts), general(weights), rtol=1e-12, atol=1e-12)


def test_pairs_in_many_portions_are_those_in_one(monkeypatch):
    g = np.random.default_rng(0)
    keys, risks, a, patients, counts = g.integers(0, 50, 200), g.random(200), (g.random(200) < 0.5).astype(float), np.arange(200) % 40, g.integers(0, 4, (40, 30))
    once = pair_draws(keys, risks, a, patients, counts)
    monkeypatch.setattr("ehr_sequencing.benchmark_scores.CHUNK", 600)
    assert (pair_draws(keys, risks, a, patients, counts) == once).all()


@st.composite
def small_results(draw):
    "A few patients on a coarse grid, some of them censored, risks with ties, horizons past the follow-up."
    g = np.random.default_rng(draw(st.integers(0, 10**6)))
    last, share, seeds = draw(st.integers(2, 8)), draw(st.floats(0.05, 0.9)), draw(st.integers(1, 3))
    def asked(n): return Asked(g.integers(1, last + 1, n), g.random(n) < share, g.integers(0, max(1, n // 2), n))
    def risks(n): return np.sort(g.integers(0, 6, (n, 3)) / 5, axis=1)
    n, m, k = (draw(st.integers(4, 30)) for _ in range(3))
    test, train = asked(n), {(5, s): asked(m) for s in range(seeds)}
    cells = [Cell(arm, 5, s, risks(n), risks(m), 3, 2, 1.0, 1.0) for arm in ("a", "b") for s in range(seeds)]
    return BenchmarkResults((1.0, 3.0, 6.0), test, train, cells, {"a": "control", "b": "network"}, asked(k), risks(n), {key: risks(m) for key in train})


@settings(max_examples=30, deadline=None)
@given(small_results())
def test_nothing_is_silent(results):
    try: concordance_index(results.test.durations, results.test.events, np.ones(len(results.test)))
    except ValueError:
        with pytest.raises(ValueError): BenchmarkScores(results, n_resamples=20)
        return
    scores = BenchmarkScores(results, n_resamples=20)
    notes = " ".join(scores.notes)
    for _, row in scores.table.iterrows():
        assert 0 <= row.c_index <= 1
        for metric in METRICS:
            assert np.isfinite(row[metric]) or f"{metric} is undefined" in notes or (metric == "integrated_brier" and "needs two horizons" in notes) or (metric == "brier" and not scores.horizons)
            if metric != "train_c_index" and np.isfinite(row[metric]): assert row[f"{metric}_low"] <= row[f"{metric}_high"] or f"{metric} is without an interval" in notes
    assert np.isfinite(scores.over_time.value).all() and set(scores.over_time.horizon) <= set(scores.horizons)
    assert len(scores.horizons) == 3 or "left out" in notes


def test_the_mean_over_seeds_is_the_score_and_the_same_twice():
    results = imitate_results({"a": 1.0, "b": 0.5}, n_patients=60)
    scores, again, other = (BenchmarkScores(results, n_resamples=50, seed=s) for s in (0, 0, 1))
    of_seeds = [concordance_index(results.test.durations, results.test.events, c.risks.astype(np.float32)[:, -1]) for c in results.of("a")]
    assert scores.score("a").value == pytest.approx(np.mean(of_seeds), abs=1e-12)
    assert scores.table.set_index(["arm", "n_labels"]).c_index_sd["a", 1000] == pytest.approx(np.std(of_seeds, ddof=1), abs=1e-12)
    assert scores.difference("a", "b") == again.difference("a", "b") != other.difference("a", "b")


def test_a_training_patient_of_two_seeds_is_one_patient():
    "Three seeds with the same training patients and the same model know no more than one of them."
    one = imitate_results({"a": 1.0}, sizes=(1000,), n_seeds=1, n_patients=80)
    cell, key = one.cells[0], (1000, 0)
    three = replace(one, cells=[replace(cell, seed=s) for s in range(3)], train={(1000, s): one.train[key] for s in range(3)}, oracle_train={(1000, s): one.oracle_train[key] for s in range(3)})
    gap, gaps = (BenchmarkScores(r, n_resamples=200).score("a", metric="gap") for r in (one, three))
    assert (gap.value, gap.low, gap.high) == pytest.approx((gaps.value, gaps.low, gaps.high), abs=1e-12)


def test_the_gap_is_that_of_the_training_landmarks():
    results = imitate_results({"a": 1.0}, sizes=(1000,), n_seeds=2, n_patients=80)
    scores = BenchmarkScores(results, n_resamples=100)
    by_hand = [concordance_index(a.durations, a.events, c.train_risks.astype(np.float32)[:, -1]) - concordance_index(results.test.durations, results.test.events, c.risks.astype(np.float32)[:, -1])
               for c in results.of("a") for a in [results.train[1000, c.seed]]]
    assert scores.score("a", metric="gap").value == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert scores.difference("a", "oracle", metric="gap").value == pytest.approx(scores.score("a", metric="gap").value - scores.score("oracle", metric="gap").value, abs=1e-12)


def test_files_of_cells_and_cells_in_memory_have_the_same_scores():
    results = imitate_results({"a": 1.0}, n_patients=50, n_seeds=1)
    stored = replace(results, cells=[replace(c, risks=c.risks.astype(np.float32), train_risks=c.train_risks.astype(np.float32)) for c in results.cells])
    assert BenchmarkScores(results, n_resamples=20).table.equals(BenchmarkScores(stored, n_resamples=20).table)


def test_the_interval_of_a_difference_covers_one_that_is_not_zero():
    def at_last(results): return replace(results, cells=[replace(c, risks=c.risks[:, -1:]) for c in results.cells], horizons=results.horizons[-1:], train={}, oracle=None, oracle_train={})
    noise = {"a": 0.6, "b": 1.2}
    truth = BenchmarkScores(at_last(imitate_results(noise, sizes=(1000,), n_seeds=3, n_patients=2000)), n_resamples=1).score
    true = truth("a", level=0.5).value - truth("b", level=0.5).value
    found = [BenchmarkScores(at_last(imitate_results(noise, sizes=(1000,), n_patients=100, seed=s + 1)), n_resamples=200).difference("a", "b") for s in range(60)]
    assert np.mean([d.low <= true <= d.high for d in found]) > 0.86 and np.mean([d.low > 0 for d in found]) > 0.3


@pytest.mark.parametrize("S", [2, 3, 5])
def test_seeds_alone_give_an_interval_that_covers(S):
    g = np.random.default_rng(S)
    ends = [interval(over_seeds(whole, np.broadcast_to(whole, (300, S)), s)) for s, whole in enumerate(g.normal(size=(400, S)))]
    naive = [interval(whole.mean() + (g.multinomial(S, np.full(S, 1 / S), size=300) / S) @ (whole - whole.mean())) for whole in g.normal(size=(400, S))]
    covered, at_first = (np.mean([low <= 0 <= high for low, high in found]) for found in (ends, naive))
    assert covered > 0.85 and covered > at_first + 0.05
