"""Time and memory of the metrics at 10,000 and 100,000 patients.

    python benchmarks/metrics_speed.py

Prints, and writes to benchmarks/results/metrics_speed.md: for each metric the wall time at both sizes, the time of scikit-survival (a reference of the development, never imported
by the library) on the same data in the same run, and the peak of the memory that the call allocates. Values must agree with the reference to 1e-9, or the script stops.
"""
import os
import platform
import time
import tracemalloc
from pathlib import Path

import numpy as np
from fastcore.script import call_parse
from sksurv import __version__ as sksurv_version
from sksurv.metrics import brier_score as sksurv_brier, concordance_index_censored, concordance_index_ipcw, cumulative_dynamic_auc as sksurv_auc, integrated_brier_score as sksurv_ibs
from sksurv.util import Surv

from ehr_sequencing.bootstrap import bootstrap, weighted_concordance
from ehr_sequencing.brier import brier_score, integrated_brier_score
from ehr_sequencing.evaluation import evaluate_survival
from ehr_sequencing.metrics import concordance_index, cumulative_dynamic_auc, mean_auc, uno_concordance

RESULTS = Path(__file__).resolve().parent / "results" / "metrics_speed.md"
HORIZONS = np.arange(1, 11) * 180.0
TAU = 1800.0


def cohort(n, seed=0):
    "Whole days, half of the patients censored, and risks at ten horizons in single precision, as a network gives them."
    generator = np.random.default_rng(seed)
    x = generator.normal(size=n)
    event, censored = generator.exponential(3000 * np.exp(-x)), generator.uniform(1, 4000, n)
    risks = 1 - np.exp(-np.exp(x + 0.5 * generator.normal(size=n))[:, None] * HORIZONS / 3000)
    return np.ceil(np.minimum(event, censored)), event <= censored, risks.astype(np.float32)


def metrics(t, e, r, train_t, train_e):
    "Name -> our function and the reference, both without arguments."
    test, train, data = Surv.from_arrays(e, t), Surv.from_arrays(train_e, train_t), (HORIZONS, train_t, train_e)
    survival = 1 - r.astype(float)
    return {"Harrell's C": (lambda: concordance_index(t, e, r[:, -1]), lambda: concordance_index_censored(e, t, r[:, -1].astype(float), tied_tol=0)[0]),
            "Uno's C": (lambda: uno_concordance(t, e, r[:, -1], train_t, train_e, TAU), lambda: concordance_index_ipcw(train, test, r[:, -1].astype(float), TAU, tied_tol=0)[0]),
            "AUC at 10 horizons": (lambda: cumulative_dynamic_auc(t, e, r, *data), lambda: sksurv_auc(train, test, r.astype(float), HORIZONS, tied_tol=0)[0]),
            "mean AUC over 10 horizons": (lambda: mean_auc(t, e, r, *data), lambda: sksurv_auc(train, test, r.astype(float), HORIZONS, tied_tol=0)[1]),
            "Brier score at 10 horizons": (lambda: brier_score(t, e, r, *data), lambda: sksurv_brier(train, test, survival, HORIZONS)[1]),
            "integrated Brier score": (lambda: integrated_brier_score(t, e, r, *data), lambda: sksurv_ibs(train, test, survival, HORIZONS))}


def timed(function, repeats=3):
    "Median seconds, and the value."
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        value = function()
        spent.append(time.perf_counter() - began)
    return float(np.median(spent)), value


def peak(function):
    "Peak megabytes allocated by a call; NumPy reports its arrays to tracemalloc."
    tracemalloc.start()
    function()
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return megabytes


@call_parse
def main(
    small: int = 10_000, # patients of the smaller set, on which the reference runs
    large: int = 100_000, # patients of the larger
    n_resamples: int = 1000, # draws of the bootstrap, on the smaller set
):
    "Measure, print and write the page."
    lines = [f"# The metrics, measured\n\n`python benchmarks/metrics_speed.py`, on one of {os.cpu_count()} cores of a shared machine, Python {platform.python_version()}, "
             f"NumPy {np.__version__}, scikit-survival {sksurv_version}. Times are medians of three; what counts is their ratio.\n"]

    def say(line): print(line, flush=True); lines.append(line)
    ours = {n: metrics(*cohort(n), *cohort(n, seed=1)[:2]) for n in (small, large)}
    say(f"| metric | {small:,} patients, s | of scikit-survival's time | {large:,} patients, s | times as long | peak MB, {small:,} | peak MB, {large:,} | times as much |\n|---|---|---|---|---|---|---|---|")
    slowest, memory = 0.0, 0.0
    for name, (function, reference) in ours[small].items():
        seconds, value = timed(function)
        reference_seconds, reference_value = timed(reference, repeats=1)
        np.testing.assert_allclose(value, reference_value, atol=1e-9)
        many, _ = timed(ours[large][name][0])
        few_mb, many_mb = peak(function), peak(ours[large][name][0])
        slowest, memory = max(slowest, many), max(memory, many_mb / few_mb)
        say(f"| {name} | {seconds:.3f} | {seconds / reference_seconds:.3f} | {many:.2f} | {many / seconds:.1f} | {few_mb:.1f} | {many_mb:.1f} | {many_mb / few_mb:.1f} |")
    t, e, r = cohort(small)
    once, _ = timed(lambda: concordance_index(t, e, r[:, -1]))
    draws, _ = timed(lambda: bootstrap(weighted_concordance(t, e, {"C": r[:, -1]}), small, n_resamples=n_resamples, weighted=True), repeats=1)
    say(f"\n{large / small:g} times the patients take at most {memory:.1f} times the memory, and the slowest metric {slowest:.2f} s. Values at {small:,} patients agree with scikit-survival to 1e-9 (there with a tolerance of 0 for ties).")
    say(f"\nAn interval of C for {small:,} patients ({n_resamples:,} draws and 200 jackknife blocks) takes {draws:.1f} s, {draws / once / (n_resamples + 200):.2f} of the time of evaluating C as often.")
    risks, data = {"model": r[:, [1, 5, 9]]}, (HORIZONS[[1, 5, 9]], *cohort(small, seed=1)[:2])
    bare, _ = timed(lambda: evaluate_survival(t, e, risks, *data, n_resamples=0))
    full, table = timed(lambda: evaluate_survival(t, e, risks, *data, n_resamples=n_resamples), repeats=1)
    megabytes = peak(lambda: evaluate_survival(t, e, risks, *data, n_resamples=n_resamples))
    say(f"\n`evaluate_survival` for one model at three horizons, {small:,} patients: {len(table)} rows in {bare:.2f} s, and with intervals from {n_resamples:,} draws in {full:.1f} s and {megabytes:.0f} MB.")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
