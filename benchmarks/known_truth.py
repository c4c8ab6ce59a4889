"""Does every metric of the oracle match theory, and does any honest model exceed the oracle?

    python benchmarks/known_truth.py

20,000 simulated patients of a world without death, asked at their fifth visit, and as many of ours, where death competes. The oracle predicts the true risk from the latent
state; theory says what it must score. Models that read the record (age alone, Cox on age, sex and counts, LSTM, BEHRT) learn from 8,000 other patients and are asked the same.
Writes benchmarks/results/known_truth.md.
"""
import time
from pathlib import Path

import numpy as np
import pandas as pd
from fastcore.script import call_parse

from ehr_sequencing.baselines import CoxBaseline
from ehr_sequencing.evaluation import evaluate_survival
from ehr_sequencing.landmarks import at_visit, draw_landmarks, spaced_landmarks
from ehr_sequencing.oracle import expected_auc, expected_brier, expected_concordance, oracle_risk
from ehr_sequencing.outcomes import Outcome, label_visits
from ehr_sequencing.sequences import build_store
from ehr_sequencing.splits import split_patients
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.vocabulary import fit_vocabulary

RESULTS = Path(__file__).resolve().parent / "results" / "known_truth.md"
HORIZONS = tuple(182.5 * k for k in range(1, 11))  # half-years up to five
ASKED = (365.0, 1095.0, 1825.0)
VISIT = 5  # the landmark: everybody's fifth visit


class World:
    "A simulated cohort with its store, its labels and everybody's landmark."
    def __init__(self, n, seed, mortality, vocabulary=None, n_landmarks=None):
        self.cohort = simulate_cohort(n, seed, mortality=mortality, hazard_ratio=2)
        table = self.cohort.table
        self.store = build_store(table, vocabulary or fit_vocabulary(table.events, exclude=[OUTCOME_CODE]))
        self.labels = label_visits(self.store, table, Outcome(OUTCOME_CODE, competing="death" if mortality else None), HORIZONS)
        self.marks = at_visit(self.labels, self.store, VISIT)
        if n_landmarks is not None:
            if len(self.marks) < n_landmarks: raise ValueError(f"n: {n} patients have only {len(self.marks)} landmarks at visit {VISIT}")
            self.marks = self.marks.take(np.arange(n_landmarks))

    def oracle(self, n_futures, competing=None):
        "True risks at the landmarks, (n, H)."
        where = self.store.first_visit[self.marks.rows] + self.marks.visits
        return oracle_risk(self.cohort, self.store.subject_ids[self.marks.rows], self.store.visit_starts[where], HORIZONS, n_futures, competing=competing)


def theory(risks):
    "What the true risks (n, H) at `HORIZONS` must score: (metric, horizon or None) -> value."
    brier = [expected_brier(r) for r in risks.T]
    said = {("integrated_brier", None): np.trapezoid([brier[HORIZONS.index(h)] for h in ASKED], ASKED) / (ASKED[-1] - ASKED[0])}
    for h in ASKED:
        k = HORIZONS.index(h)
        said |= {("brier", h): brier[k], ("auc", h): expected_auc(risks[:, k]), ("uno_c", h): expected_concordance(risks[:, :k + 1]), ("calibration_slope", h): 1.0, ("calibration_intercept", h): 0.0, ("observed_expected", h): 1.0}
    return said


def at_asked(risks): return risks[:, [HORIZONS.index(h) for h in ASKED]]


def evaluate(world, risks, competing, n_resamples, **keywords):
    "The tidy table of several models at the landmarks. Censoring is learned from these patients themselves: nobody is trained on them."
    marks = world.marks
    types = {"event_types": marks.event_types, "train_event_types": marks.event_types} if competing else {}
    return evaluate_survival(marks.durations, marks.events, risks, ASKED, marks.durations, marks.events, n_resamples=n_resamples, **types, **keywords)


def oracle_table(world, risks, competing, n_resamples=200):
    "The oracle's scores beside theory: metric, horizon, theory, value, low, high, inside."
    expected = theory(risks)
    table = evaluate(world, {"oracle": at_asked(risks)}, competing, n_resamples, metrics=sorted({m for m, _ in expected}))
    table = table[table.model == "oracle"]
    table = table.assign(theory=[expected[m, None if pd.isna(h) else float(h)] for m, h in zip(table.metric, table.horizon)])
    return table.assign(inside=(table.low <= table.theory) & (table.theory <= table.high))[["metric", "horizon", "theory", "value", "low", "high", "inside"]]


def honest_models(train, networks, epochs=6):
    "Models fitted on other patients: name -> function of a world that gives risks (n, 3)."
    split = split_patients(train.labels, fractions=(0.8, 0.15, 0.05))
    fit = spaced_landmarks(train.labels, train.store, split["train"])
    stop = draw_landmarks(train.labels, train.store, split["validation"])
    models = {}
    for name, cox in {"age alone": CoxBaseline("age"), "Cox on age, sex and counts": CoxBaseline()}.items():
        cox.fit(fit, stop)
        models[name] = lambda world, cox=cox: cox.predict_risk(world.marks, ASKED)
    return models | (fit_networks(train, split, epochs) if networks else {})


def fit_networks(train, split, epochs):
    "LSTM and BEHRT on horizon hazards."
    import torch

    from ehr_sequencing.behrt import BEHRTConfig
    from ehr_sequencing.horizons import labelled_batches
    from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
    from ehr_sequencing.survival import BEHRTForSurvival
    from ehr_sequencing.training import Trainer

    def loader(part, shuffle):
        return labelled_batches(train.store, train.labels, split[part], shuffle, token_budget=4096, max_tokens=1024)

    models = {}
    for name, build, rate in (("LSTM", lambda v: SurvivalLSTM(LSTMConfig.small(v), HORIZONS), 2e-3), ("BEHRT", lambda v: BEHRTForSurvival(BEHRTConfig.small(v), HORIZONS), 1e-3)):
        torch.manual_seed(0)
        model = build(len(train.store.vocabulary))
        Trainer(model, loader("train", True), loader("validation", False), epochs=epochs, learning_rate=rate, device="cpu", label=name).fit()
        models[name] = lambda world, model=model: model.predict_risk(world.marks, ASKED, max_tokens=1024)
    return models


def against_oracle(world, risks, models, n_resamples=200):
    "Each honest model minus the oracle on the same patients and draws: AUC and Uno's C (higher is better), Brier (lower is better); and observed over expected."
    every = {"oracle": at_asked(risks)} | {name: model(world) for name, model in models.items()}
    table = evaluate(world, every, False, n_resamples, metrics=("uno_c", "auc", "brier", "observed_expected"), reference="oracle")
    table = table[table.model != "oracle"]
    better = np.where(table.metric == "brier", (table.difference_high < 0).fillna(False), (table.difference_low > 0).fillna(False))
    return table.assign(exceeds=better.astype(bool))[["model", "metric", "horizon", "value", "difference", "difference_low", "difference_high", "exceeds"]]


def markdown(table):
    "A tidy table as Markdown."
    shown = table.assign(horizon=["" if pd.isna(h) else f"{h / 365:g}" for h in table.horizon]).rename(columns={"horizon": "years"})
    cells = [["" if pd.isna(v) else f"{v:.4f}" if isinstance(v, float) else ("yes" if v else "no") if isinstance(v, (bool, np.bool_)) else str(v).replace("_", " ") for v in row] for row in shown.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [[c.replace("_", " ") for c in shown.columns], ["---"] * shown.shape[1], *cells])


@call_parse
def main(
    n: int = 20_000, # landmarks in each world
    n_futures: int = 50, # of the oracle
    n_resamples: int = 500, # of the bootstrap
):
    "Simulate, ask, compare, and write the page."
    began = time.perf_counter()
    train = World(8_000, 101, 0.0)
    deathless = World(int(n * 1.5), 100, 0.0, train.store.vocabulary, n)
    ours = World(int(n * 1.6), 102, 1.0, train.store.vocabulary, n)
    truth, incidence = deathless.oracle(n_futures), ours.oracle(n_futures, "death")
    tables = {"without death": oracle_table(deathless, truth, False, n_resamples), "with death competing": oracle_table(ours, incidence, True, n_resamples)}
    models = against_oracle(deathless, truth, honest_models(train, networks=True), n_resamples)
    events = {name: int((world.marks.events & (world.marks.durations <= ASKED[-1])).sum()) for name, world in (("without death", deathless), ("with death competing", ours))}
    n_inside, n_all = sum(int(t.inside.sum()) for t in tables.values()), sum(map(len, tables.values()))
    lines = ["# The oracle against theory", "", f"`python benchmarks/known_truth.py`: {n:,} simulated patients in each of two worlds, asked at their fifth visit (so that the number of visits tells nobody apart); the hazard of the outcome is twice that of people of their age. "
             f"Events within five years: {events['without death']:,} without death, {events['with death competing']:,} with death competing. The oracle averages over {n_futures} futures. Intervals are 95 %: closed-form for calibration, bootstrap over patients ({n_resamples} draws) for the rest.", "",
             f"{n_inside} of {n_all} intervals contain what theory says. They are not independent; about one in twenty may miss.", ""]
    for name, table in tables.items(): lines += [f"## The oracle, {name}", "", markdown(table), ""]
    exceeding = models[models.exceeds]
    lines += ["## Honest models minus the oracle, without death", "", "Differences on the same patients and the same draws. " + ("No model exceeds the oracle beyond its interval." if not len(exceeding) else f"{len(exceeding)} of {len(models)} exceed the oracle beyond their interval."), "", markdown(models), "",
              "Observed over expected tells the level of the risks: 1 is right, less than 1 means that too much is predicted. In training a visit weighs by the time since the previous one, which was known at the visit. When every patient had the same weight instead, this script "
              "found 0.33 to 0.42 at one year for Cox and both networks, and Brier scores of the networks that were worse than saying the same to all: who has the event soon has few visits at risk, each of which then counted for more, and how few there will be is the future. "
              "Concordance and AUC hardly noticed.", ""]
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines), f"\n{time.perf_counter() - began:.0f} s")
