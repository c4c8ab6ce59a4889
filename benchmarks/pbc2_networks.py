"""PBC2: the networks of this library, and models on counts of tokens, beside the landmark Cox models: same patients, folds, landmarks, horizons and scores.

    python benchmarks/pbc2_networks.py --data ../shared/data/pbc2/pbc2.csv.gz

Writes benchmarks/results/pbc2_networks.md and the figure beside it. Each fit is kept under experiments/pbc2_networks/ and taken from there when the script is started again. Sizes and learning
rates were fixed for about 250 training patients before anything was fitted, and nothing was changed after a score had been seen.
"""
import json
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import polars as pl
import torch
from fastcore.script import call_parse
from pbc2_landmarks import (ENTRY, HORIZON_YEARS, HORIZONS, LANDMARK_YEARS, N_FOLDS, OTHER_HEADINGS, OUTCOMES, WITHIN, YEAR, Cohort, cox_risks, crossed_risks,
                            markdown_rows, prepare, score, score_table, stack_years, with_interval, within_folds)
from scipy.sparse import csr_matrix, hstack

from ehr_sequencing.aggregation import assert_no_future_leakage
from ehr_sequencing.baselines import LandmarkFeatures
from ehr_sequencing.batches import BatchLoader
from ehr_sequencing.behrt import BEHRTConfig, count_parameters
from ehr_sequencing.events import EventTable
from ehr_sequencing.horizons import labelled_batches
from ehr_sequencing.jobs import whole_file
from ehr_sequencing.landmarks import Landmarks
from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
from ehr_sequencing.metrics import COLORS
from ehr_sequencing.next_visit import next_visit_rates, repeat_last_visit
from ehr_sequencing.outcomes import VisitLabels, label_visits
from ehr_sequencing.period_models import BoostedTreesBaseline, LogisticBaseline
from ehr_sequencing.pretraining import compare_next_visit, pretrain, pretraining_loader
from ehr_sequencing.sequences import SequenceStore, build_store
from ehr_sequencing.splits import fold_patients
from ehr_sequencing.survival import BEHRTForSurvival
from ehr_sequencing.training import Trainer
from ehr_sequencing.transformers import HierarchicalConfig, SurvivalTransformer
from ehr_sequencing.vocabulary import fit_vocabulary

FOLDER = Path("experiments/pbc2_networks")
N_VALUE_BINS, MIN_PATIENTS = 10, 5
BINS = YEAR * np.arange(1, 7)  # of the networks: at year 7 a quarter of the last visits lie 1,018 days back, and three years are asked after that
SEEDS = (0, 1, 2)  # of weights, order of batches, dropout, and of the draw of validation patients
SIZES = {"embedding_dim": 32, "hidden_size": 32, "dropout": 0.2}
LAYERS = {"num_layers": 2, "num_heads": 4}  # of the transformers; the LSTM has one layer
LORA_RANK = 4  # of 32; with 16 an adapter has as many weights as the matrix that it adapts
TRAINING = {"epochs": 60, "patience": 10, "patients_per_step": 32}
RATES = {"LSTM": 2e-3, "BEHRT, pre-trained, LoRA": 3e-3, "BEHRT, pre-trained, frozen": 3e-3}  # others 1e-3
PRETRAINING = {"objective": "both", "epochs": 60, "patience": 10, "learning_rate": 2e-3}
NETWORKS = ("LSTM", "hierarchical transformer", "BEHRT, from scratch", "BEHRT, pre-trained, full", "BEHRT, pre-trained, LoRA", "BEHRT, pre-trained, frozen")
BASELINES = ("visit count", "logistic, last tokens", "logistic, counts", "boosted trees, counts")
COX = ("last values", "last values, stacked", "values at entry", "no covariates")
BINNED = "last values in bins, stacked"
ARMS = (*COX[:3], BINNED, *BASELINES, *NETWORKS)
SEEDS_OF = {arm: SEEDS[:1] if "pre-trained" in arm else SEEDS for arm in (*BASELINES, *NETWORKS)}  # pre-training three times was more than the machine had time for
CATEGORIES = ("SIGN//edema", "SIGN//ascites", "SIGN//hepatomegaly", "SIGN//spiders", "LAB//histologic")  # observed as one of a few values
BINNED_LABS = {"log bilirubin": "LAB//serBilir", "log albumin": "LAB//albumin", "log prothrombin": "LAB//prothrombin"}


def token_events(
    table: EventTable, # of `pbc2_events`
) -> EventTable: # with codes in the place of what has only a few values, and without transplants
    """What the networks read. A sign that few have would vanish in quantile bins: nine in ten visits are without ascites, so all deciles of a 0 or 1 are 0, and both values fall into one bin. So signs and stages become codes.
    A transplant is an end and no observation."""
    coded = pl.col("code").is_in(CATEGORIES)
    named = pl.col("code") + "//" + pl.col("numeric_value").cast(pl.String)
    events = table.events.filter(pl.col("code") != "TRANSPLANT")
    return replace(table, events=events.with_columns(code=pl.when(coded).then(named).otherwise("code"), numeric_value=pl.when(coded).then(None).otherwise("numeric_value")))


@dataclass
class Fold:
    "One fold: the records as tokens of a vocabulary that has not seen the fold's own patients."
    number: int
    store: SequenceStore # of all patients
    labels: VisitLabels # of the networks, with `BINS`
    marks: dict # year -> Landmarks of all patients at risk
    known: dict # year -> the same landmarks, of a store in which nothing after the landmark exists
    training: np.ndarray # rows outside the fold
    test: np.ndarray # rows of the fold


def prepare_fold(
    cohort: Cohort, # of `prepare`, with transplant as censoring
    folds: np.ndarray, # (N,) fold of each patient
    k: int, # which fold is left out
) -> Fold:
    "Fit vocabulary and value bins on the other folds' patients, and write everybody's records in them. Raises `ValueError` if the patients or their visits are not those of the cohort."
    table, training = token_events(cohort.table), np.flatnonzero(folds != k)
    vocabulary = fit_vocabulary(table.events, cohort.store.subject_ids[training], MIN_PATIENTS, N_VALUE_BINS)
    store = build_store(table, vocabulary)
    marks = {year: replace(m, store=store) for year, m in cohort.marks.items()}
    if not (store.subject_ids == cohort.store.subject_ids).all() or any((m.days != cohort.marks[y].days).any() for y, m in marks.items()): raise ValueError("store: expected the patients and visits of the cohort")
    known = {}
    for year in LANDMARK_YEARS:
        by_then = table.events.filter(pl.col("time").is_null() | (pl.col("time") < ENTRY + timedelta(days=round(year * YEAR) + 1)))
        known[year] = replace(marks[year], store=build_store(replace(table, events=by_then), vocabulary))
    return Fold(k, store, label_visits(store, cohort.table, OUTCOMES["transplant censors"], BINS), marks, known, training, np.flatnonzero(folds == k))


def hold_out(
    fold: Fold, # of `prepare_fold`
    seed: int, # of the draw
) -> tuple: # rows to fit on, rows to stop on
    "Divide the training patients: a fifth of those who die and a fifth of the others are set aside."
    generator, died = np.random.default_rng([seed, 21]), fold.labels.event_indicators[fold.training]
    held = np.concatenate([(group := generator.permutation(fold.training[died == d]))[:round(len(group) / 5)] for d in (True, False)])
    return np.setdiff1d(fold.training, held), np.sort(held)


def stacked(
    fold: Fold, # of `prepare_fold`
    rows, # patients
) -> Landmarks: # 0, 1, ..., 7 years after entry, one below the other
    "The landmarks from which the models on counts learn: those of the stacked Cox model."
    parts = [m.take(np.isin(m.rows, rows)) for m in fold.marks.values()]
    join = lambda name: np.concatenate([getattr(p, name) for p in parts])
    return Landmarks(fold.store, join("rows"), join("visits"), join("durations"), join("events"), join("event_types"), join("elapsed"))


class LastTokens(LandmarkFeatures):
    "Age, sex, and which tokens the last visit holds: no counts, and nothing of what came before."
    def __init__(self): super().__init__(("age", "sex"))

    def fit(self, train):
        "Learn means and scales of age and sex. All tokens are used."
        super().fit(train)
        self.names = [*self.names, *self.vocabulary.tokens]
        return self

    def transform(self, landmarks):
        "Scaled age and sex, and a column of 0 and 1 for each token."
        store, at = landmarks.store, landmarks.store.first_visit[landmarks.rows] + landmarks.visits
        begin, end = store.token_offsets[at], store.token_offsets[at + 1]
        found = np.concatenate([store.tokens[b:e] for b, e in zip(begin, end)])
        there = csr_matrix((np.ones(len(found)), (np.repeat(np.arange(len(at)), end - begin), found)), (len(at), len(self.vocabulary)))
        return hstack([super().transform(landmarks), there > 0], format="csr").astype(float)


def fit_baseline(
    name: str, # one of `BASELINES`
    fold: Fold, # to fit on
    seed: int, # of the patients on whom the penalty or the size of the trees is chosen
) -> tuple: # fitted model, facts
    "A model on person-periods of the stacked landmarks of the training patients."
    train, validation = hold_out(fold, seed)
    model = {"visit count": lambda: LogisticBaseline("visits"), "logistic, last tokens": lambda: LogisticBaseline(LastTokens()),
             "logistic, counts": lambda: LogisticBaseline(max_codes=None), "boosted trees, counts": lambda: BoostedTreesBaseline(max_codes=None, seed=seed)}[name]()
    model.fit(stacked(fold, train), stacked(fold, validation))
    return model, {"parameters": model.n_parameters, "trainable": model.n_parameters, "epochs": None, "setting": str(model.setting)}


def behrt_config(
    fold: Fold, # with the vocabulary
) -> BEHRTConfig: # of all BEHRT arms, so that from scratch and pre-trained differ in their weights alone
    "Visit-causal, half of the heads on their own visit, as the chapter on pre-training recommends where masked codes are guessed."
    return BEHRTConfig(len(fold.store.vocabulary), **SIZES, **LAYERS, visit_heads=2)


def encoder_of(
    fold: Fold, # whose training patients are used
    seed: int, # of validation patients, weights, masks
    folder: Path = FOLDER, # where encoders are kept
) -> Path: # of the saved model; its quality lies beside it
    "Pre-train BEHRT on masked codes and the next visit of the training patients, labels unseen. Recall of the next visit's codes is measured on the fold's own patients, who take no part."
    path, (train, validation) = folder / f"encoder-{fold.number}-{seed}", hold_out(fold, seed)
    quality = path.with_suffix(".json")
    if quality.exists(): return path
    began = time.process_time()
    model, history = pretrain(fold.store, train, validation, behrt_config(fold), folder=path, seed=seed, device="cpu", show_progress=False, **PRETRAINING)
    seconds, rates = time.process_time() - began, next_visit_rates(fold.store, train)
    loader = pretraining_loader(fold.store, fold.test, model.config, "next_visit")
    recall = compare_next_visit({"model": model.next_visit_logits, "last visit again": repeat_last_visit(rates)}, loader, k=10, n_resamples=1).estimates
    with whole_file(quality) as partial: partial.write_text(json.dumps({"seconds": seconds, "epochs": len(history), "recall": {name.split(",")[0]: v for name, v in recall.items() if name.endswith(", all, recall")}}))
    return path


def new_network(
    name: str, # one of `NETWORKS`
    fold: Fold, # with the vocabulary
    seed: int, # of the weights
    folder: Path = FOLDER, # of the encoders
):
    "An untrained network; if its name says so, on a pre-trained encoder."
    size = len(fold.store.vocabulary)
    encoder = encoder_of(fold, seed, folder) if "pre-trained" in name else None
    torch.manual_seed(seed)
    if name == "LSTM": return SurvivalLSTM(LSTMConfig(size, **SIZES), BINS)
    if name == "hierarchical transformer": return SurvivalTransformer(HierarchicalConfig(size, **SIZES, **LAYERS), BINS)
    if encoder is None: return BEHRTForSurvival(behrt_config(fold), BINS)
    return BEHRTForSurvival.from_pretrained(encoder, horizons=BINS, lora_rank=LORA_RANK, use_lora=name.endswith("LoRA"), freeze_behrt=not name.endswith("full"))


def fit_network(
    name: str, # one of `NETWORKS`
    fold: Fold, # to fit on
    seed: int, # of everything that is drawn
    folder: Path = FOLDER, # of the encoders
    **changes, # of `TRAINING`
) -> tuple: # fitted model, facts
    "Train a network on all visits of the training patients; keep the epoch with the lowest validation loss. Raises `AssertionError` if it sees the future."
    model, (train, validation) = new_network(name, fold, seed, folder), hold_out(fold, seed)
    loaders = [labelled_batches(fold.store, fold.labels, rows, part == 0, seed=seed) for part, rows in enumerate((train, validation))]
    history = Trainer(model, *loaders, learning_rate=RATES.get(name, 1e-3), seed=seed, device="cpu", show_progress=False, **TRAINING | changes).fit()
    assert_no_future_leakage(model, next(iter(BatchLoader(fold.store, fold.test, layout="both"))))
    total, trainable, _ = count_parameters(model)
    best = min(range(len(history)), key=lambda i: history[i]["validation_loss"])
    return model, {"parameters": total, "trainable": trainable, "epochs": best + 1, "setting": ""}


def ask(
    model, # with `predict_risk`
    fold: Fold, # whose own patients are asked about
) -> dict: # year -> (n, H) risks of the fold's patients at risk
    "Risks at the landmarks. Raises `AssertionError` if they are others once everything after the landmark is taken out of the records."
    risks = {}
    for year in LANDMARK_YEARS:
        mine = np.isin(fold.marks[year].rows, fold.test)
        risks[year], blind = (model.predict_risk(m[year].take(mine), HORIZONS) for m in (fold.marks, fold.known))
        assert np.abs(risks[year] - blind).max() < 1e-5, f"fold {fold.number}, year {year}: the risks depend on what came after the landmark"
    return risks


def fit_and_ask(
    arm: str, # one of `BASELINES` or `NETWORKS`
    fold: Fold,
    seed: int,
    folder: Path = FOLDER, # where results are kept
) -> tuple: # year -> risks of the fold's patients; facts
    "A fit and what it says, from the folder if it is there already and was made with the settings of today."
    path = folder / f"{arm.replace(', ', '-').replace(' ', '-')}-{fold.number}-{seed}.npz"
    settings = json.dumps([SIZES, LAYERS, LORA_RANK, TRAINING, RATES, PRETRAINING, BINS.tolist(), N_VALUE_BINS, MIN_PATIENTS])
    if path.exists():
        with np.load(path) as kept: risks, facts = {year: kept[str(year)] for year in LANDMARK_YEARS}, json.loads(str(kept["facts"]))
        if facts["settings"] != settings: raise SystemExit(f"{path}: was made with other settings. Remove {folder} to fit everything again.")
        return risks, facts
    if "pre-trained" in arm: encoder_of(fold, seed, folder)  # its time is noted beside it
    began = time.process_time()
    model, facts = fit_network(arm, fold, seed, folder) if arm in NETWORKS else fit_baseline(arm, fold, seed)
    facts |= {"seconds": time.process_time() - began, "settings": settings}
    risks = ask(model, fold)
    with whole_file(path) as partial, open(partial, "wb") as handle: np.savez(handle, facts=np.array(json.dumps(facts)), **{str(year): r for year, r in risks.items()})
    return risks, facts


def binned_risks(
    cohort: Cohort, # of `prepare`
    folds: np.ndarray, # (N,)
    stores: list, # `Fold` of each number
) -> dict: # year -> (n, H) out-of-fold risks
    "The stacked Cox model, told of bilirubin, albumin and prothrombin time the bin alone: each value is replaced by the mean logarithm of the training patients' values in its bin."
    risks = {year: np.full((len(cohort.marks[year]), len(HORIZONS)), np.nan) for year in LANDMARK_YEARS}
    for fold in stores:
        events = cohort.table.events.filter(pl.col("subject_id").is_in(fold.store.subject_ids[fold.training].tolist()))
        means = {}
        for name, code in BINNED_LABS.items():
            seen, edges = (np.log(np.asarray(x, dtype=float)) for x in (events.filter(pl.col("code") == code)["numeric_value"].drop_nulls(), fold.store.vocabulary.value_edges[code]))
            place = np.searchsorted(edges, seen, side="right")
            means[name] = edges, np.bincount(place, seen, len(edges) + 1) / np.maximum(np.bincount(place, minlength=len(edges) + 1), 1)
        last = {year: frame.assign(**{name: mean[np.searchsorted(edges, frame[name], side="right")] for name, (edges, mean) in means.items()}) for year, frame in cohort.last.items()}
        coarse = replace(cohort, last=last)
        for year in LANDMARK_YEARS:
            marks = cohort.marks[year]
            test = folds[marks.rows] == fold.number
            risks[year][test] = cox_risks(last[year][~test], marks.durations[~test], marks.event_types[~test], last[year][test], HORIZONS, stack_years(coarse, folds, fold.number))
    return risks


def all_risks(
    cohort: Cohort, # of `prepare`, with transplant as censoring
    folds: np.ndarray, # (N,)
    folder: Path = FOLDER, # where results are kept
    say=print, # called with a line a fit
) -> tuple: # year -> arm -> (n, H) mean over seeds; year -> arm -> (S, n, H) each seed; facts, a row a fit; stores
    "Every arm's out-of-fold risks."
    folder.mkdir(parents=True, exist_ok=True)
    stores, facts = [prepare_fold(cohort, folds, k) for k in range(N_FOLDS)], []
    each = {year: {arm: np.full((len(SEEDS_OF[arm]), len(cohort.marks[year]), len(HORIZONS)), np.nan) for arm in (*BASELINES, *NETWORKS)} for year in LANDMARK_YEARS}
    for arm in (*BASELINES, *NETWORKS):
        for fold in stores:
            for s, seed in enumerate(SEEDS_OF[arm]):
                risks, fact = fit_and_ask(arm, fold, seed, folder)
                for year, r in risks.items(): each[year][arm][s, folds[cohort.marks[year].rows] == fold.number] = r
                facts.append({"arm": arm, "fold": fold.number, "seed": seed, **fact})
                say(f"{arm}, fold {fold.number}, seed {seed}: {fact['seconds']:.1f} s, {fact['parameters']} parameters, epoch {fact['epochs']} {fact['setting']}")
    binned = binned_risks(cohort, folds, stores)
    risks = {}
    for year in LANDMARK_YEARS:
        risks[year] = crossed_risks(cohort, folds, year, COX) | {BINNED: binned[year]} | {arm: r.mean(0) for arm, r in each[year].items()}
        risks[year] = {name: risks[year][name] for name in (*ARMS, COX[-1])}
    return risks, each, pd.DataFrame(facts), stores


def seed_spread(
    cohort: Cohort, # of `prepare`
    folds: np.ndarray, # (N,)
    each: dict, # year -> arm -> (S, n, H)
) -> dict: # year -> frame (arm, seed) -> metrics at the last horizon
    "Scores of each seed alone."
    frames = {}
    for year, arms in each.items():
        parts = []
        for s, seed in enumerate(SEEDS):
            frame = score(cohort, folds, year, 0, {arm: r[s] for arm, r in arms.items() if s < len(r)})
            parts.append(frame[frame.horizon == HORIZONS[-1]].assign(seed=seed))
        frames[year] = pd.concat(parts).pivot(index=["model", "seed"], columns="metric", values="value")
    return frames


def _last(frame): return frame[frame.horizon == HORIZONS[-1]].set_index(["model", "metric"])


HEADINGS = {WITHIN[1]: "Uno's C within folds", WITHIN[2]: "AUC within folds"} | {m: OTHER_HEADINGS[m] for m in ("brier", "scaled_brier", "calibration_slope")}
GAINS = (WITHIN[1], WITHIN[2], "brier")


def main_table(
    frame: pd.DataFrame, # of `score`
) -> str:
    "A row an arm, at the last horizon, as Markdown."
    at = frame[frame.horizon == HORIZONS[-1]].set_index(["model", "metric"])
    rows = [[arm, *(with_interval(*at.loc[(arm, m), ["value", "low", "high"]]) for m in HEADINGS)] for arm in ARMS]
    return markdown_rows(["model", *HEADINGS.values()], rows)


def difference_table(
    frames: dict, # year -> from `score` with a reference
    reference: str, # the model that is subtracted
) -> str:
    "Differences on the same draws, at the last horizon, as Markdown; bold where the interval leaves out 0."
    rows = []
    for year, frame in frames.items():
        at = frame[frame.horizon == HORIZONS[-1]].set_index(["model", "metric"])
        for arm in ARMS:
            if arm in (reference, "values at entry", "visit count"): continue
            cells = [at.loc[(arm, m)] for m in GAINS]
            texts = [with_interval(*c[["difference", "difference_low", "difference_high"]], signed=True) + f", p = {c.p_value:.3f}" for c in cells]
            rows.append([year, arm, *(f"**{t}**" if c.difference_low > 0 or c.difference_high < 0 else t for t, c in zip(texts, cells))])
    return markdown_rows(["landmark, year", "model", *(HEADINGS[m] for m in GAINS)], rows)


def spread_rows(
    frames: dict, # year -> of the mean of the seeds, from `score`
    spreads: dict, # year -> of `seed_spread`
) -> str:
    "AUC within folds and IPA of each arm with several seeds: of the mean of the seeds' risks, and the mean and range of the seeds alone, as Markdown."
    rows = []
    for year, frame in frames.items():
        at = frame[frame.horizon == HORIZONS[-1]].set_index(["model", "metric"]).value
        for arm in (arm for arm, seeds in SEEDS_OF.items() if len(seeds) > 1):
            alone = spreads[year].loc[arm]
            told = lambda m: [f"{at[arm, m]:.3f}", f"{alone[m].mean():.3f} ({alone[m].min():.3f} to {alone[m].max():.3f})"]
            rows.append([year, arm, *told(WITHIN[2]), *told("scaled_brier")])
    return markdown_rows(["landmark, year", "model", "AUC, mean risk", "AUC, each seed", "IPA, mean risk", "IPA, each seed"], rows)


def encoder_frames(
    cohort: Cohort, # of `prepare`
    folds: np.ndarray, # (N,)
    each: dict, # year -> arm -> (S, n, H)
    n_resamples: int = 1000, # draws
) -> dict: # year -> frame (model, metric), with differences from BEHRT from scratch
    "BEHRT from scratch and pre-trained, with the same seed, at the last horizon."
    marks, arms = cohort.marks, NETWORKS[2:]
    return {year: _last(within_folds(marks[year], folds[marks[year].rows], {arm: each[year][arm][0] for arm in arms}, n_resamples, reference=arms[0])) for year in LANDMARK_YEARS}


def encoder_table(
    frames: dict, # of `encoder_frames`
) -> str:
    "AUC, and difference from BEHRT from scratch, as Markdown."
    def cell(r): return f"{r.value:.3f}" + ("" if pd.isna(r.difference) else ", " + with_interval(r.difference, r.difference_low, r.difference_high, signed=True))
    return markdown_rows(["model", *(f"year {year}" for year in frames)], [[arm, *(cell(f.loc[(arm, WITHIN[2])]) for f in frames.values())] for arm in NETWORKS[2:]])


def cost_table(
    facts: pd.DataFrame, # a row a fit
) -> str:
    "Sizes and times of the fits, as Markdown."
    rows = []
    for arm in (*BASELINES, *NETWORKS):
        f = facts[facts.arm == arm]
        span = lambda x: f"{x.min():,.0f}" if x.min() == x.max() else f"{x.min():,.0f} to {x.max():,.0f}"
        rows.append([arm, span(f.parameters), span(f.trainable), f"{f.seconds.iloc[0]:.1f}", span(f.epochs) if arm in NETWORKS else ""])
    return markdown_rows(["model", "parameters", "trained", "CPU seconds, first fit", "epoch kept"], rows)


def figure(
    frames: dict, # year -> from `score`
    spreads: dict, # year -> of `seed_spread`
    path: Path, # PNG to write
):
    "AUC within folds and IPA of every arm at each landmark, with intervals; small dots are single seeds."
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, len(frames), figsize=(11, 8.4), layout="constrained", sharey=True, sharex="row")
    color = {arm: COLORS[0] if arm in (*COX, BINNED) else COLORS[1] if arm in BASELINES else COLORS[2] for arm in ARMS}
    for row, metric, name in zip(axes, (WITHIN[2], "scaled_brier"), (f"AUC within {HORIZON_YEARS[-1]} years, pairs within folds", f"IPA within {HORIZON_YEARS[-1]} years")):
        for ax, (year, frame) in zip(row, frames.items()):
            at = frame[(frame.horizon == HORIZONS[-1]) & (frame.metric == metric)].set_index("model")
            for y, arm in enumerate(ARMS):
                ax.hlines(y, at.low[arm], at.high[arm], color=color[arm], lw=1.4)
                ax.plot(at.value[arm], y, "o" if arm in NETWORKS else "s" if arm in BASELINES else "D", color=color[arm], ms=6)
                if len(SEEDS_OF.get(arm, ())) > 1: ax.plot(spreads[year].loc[arm][metric], np.full(len(SEEDS_OF[arm]), y + 0.28), ".", color="0.35", ms=4)
            ax.axvline(at.value["last values"], color=COLORS[0], lw=0.8, ls=":")
            ax.axvline(0.5 if metric == WITHIN[2] else 0, color="0.6", lw=0.8)
            ax.set(yticks=range(len(ARMS)), yticklabels=ARMS, ylim=(len(ARMS) - 0.4, -0.6), xlabel=name, title=f"landmark at year {year}")
    axes[0, 0].set_xlim(0.28, 1)
    axes[1, 0].set_xlim(max(-0.6, axes[1, 0].get_xlim()[0]), None)
    fig.savefig(path, dpi=80)
    plt.close(fig)


PAGE = """# PBC2: networks beside Cox models

Written by `benchmarks/pbc2_networks.py`; the fits take about {minutes:.0f} minutes, one after the other on one core. Data: 312 patients of the Mayo Clinic's trial in primary biliary cirrhosis with 1,945 visits (Murtaugh et al. 1994, [doi:10.1002/hep.1840200120](https://doi.org/10.1002/hep.1840200120)).

## What was asked

[The page of the Cox models](pbc2_landmarks.md) sets the bar: 3, 5 and 7 years after entry, who dies within the next 2 and 3 years? Here the networks of this library answer the same question about the same patients, with the same five folds, landmarks, horizons and scores; the functions that score are imported from that page's script, and the rows of the Cox models are the same to the last digit. A transplant is censoring.

{counts}

The networks read records, not a table of covariates. A visit is a set of tokens: seven laboratory values as one of {bins} quantile bins each, edema, ascites, hepatomegaly, spiders and the histologic stage as codes, and once for each patient sex and drug; beside them age, and the days between visits. Vocabulary and edges of the bins are fitted on the patients of the other four folds ({tokens} tokens). Signs had to become codes: a 0 or 1 that is 0 in nine of ten visits has one quantile bin, and ascites would have vanished.

| model | reads | learns from |
| --- | --- | --- |
| last values | five covariates as last observed: age, edema, logarithms of bilirubin, albumin and prothrombin time; Cox | training patients at the landmark |
| last values, stacked | the same; Cox | training patients at years 0, 1, ..., 7 |
| values at entry | the five at entry; Cox | training patients at the landmark |
| last values in bins, stacked | as "last values, stacked", but each of the three laboratory values is replaced by the mean logarithm of its bin | years 0, 1, ..., 7 |
| visit count | how many visits there were; logistic regression on person-periods | years 0, 1, ..., 7 |
| logistic, last tokens | age, sex and the tokens of the last visit; ridge logistic regression on person-periods | years 0, 1, ..., 7 |
| logistic, counts; boosted trees, counts | age, sex, and in how many visits so far each token occurred | years 0, 1, ..., 7 |
| LSTM, hierarchical transformer, BEHRT | all tokens of all visits so far, ages and times | all visits |

BEHRT is trained from scratch, or after pre-training on the training patients' records without labels (masked codes and the next visit at once): all weights (full), adapters of rank {rank} and the head (LoRA), or the head alone (frozen).

Everything was fixed for about 250 training patients before a score was seen, and not touched afterwards: embedding and state of size {size}, one layer (LSTM) or two blocks with four heads, dropout {dropout}; learning rate 0.002 for the LSTM, 0.001 for networks that train in full, 0.003 for adapters and heads; at most {epochs} epochs, and the one with the lowest loss on the validation patients is kept. These are a fifth of the training patients, drawn anew for each of three seeds; the baselines choose penalty or tree size on them. **The risk of a model is the mean over its three seeds**, each with other weights and other validation patients; the pre-trained networks have one seed, the first, because there was no time for more. So they are to be held against the first seed of BEHRT from scratch, [below](#pre-training-on-250-patients). The Cox models need no validation patients and learn from all 250.

Networks have the hazard of each of the six years after a visit. At a landmark between visits the risk is that of those who lived until then: F is conditioned on the days elapsed since the last visit.

Every fit passed two checks: the outputs of a network at a visit do not move when later visits change (`assert_no_future_leakage`), and the risks of every model stay as they are if all that happened after the landmark is taken out of the records.

One row, "visit count", was added after the first scores had been seen, to explain what happens at year 7.

## Results

Death within 3 years, with 95 % intervals (bootstrap of patients; slope in closed form). C and AUC are over pairs of the same fold. IPA is the share of the Brier score of the risk that is the same for all that a model takes away. The slope of the visit count means nothing: its risks hardly differ.

### Year 3: {n3} at risk, {d3} deaths

{main3}

### Year 5: {n5} at risk, {d5} deaths

{main5}

### Year 7: {n7} at risk, {d7} deaths

{main7}

![AUC within folds and IPA of each model at each landmark](pbc2_networks.png)

Death within 3 years: Cox models (diamonds), models on tokens without a network (squares), networks (circles), with 95 % intervals; the small dots are the three seeds alone. Dotted: the Cox model on the last values.

## Differences from the Cox models

On the same draws of patients, within 3 years; bold where the interval leaves out 0. For the Brier score less is better.

### From "last values"

{difference0}

### From "last values, stacked"

{difference1}

## What it means

{meaning}

## Seeds

{spread}

{seeds_say}

## Pre-training on 250 patients

{pretraining}

The first seed of each, AUC within folds and its difference from BEHRT from scratch on the same draws; death within 3 years:

{encoders_table}

## Costs

{costs}

Seconds are those of the first fold and seed, on one core. The encoder of the pre-trained arms took {pre_seconds:.0f} s more, once for the three of them.

## What falls short

{short}

## All horizons

{everything}
"""


def numbers(
    cohort: Cohort, # of `prepare`
    facts: pd.DataFrame, # a row a fit
    stores: list, # `Fold` of each number
    folder: Path = FOLDER, # of the encoders
) -> dict: # name in `PAGE` -> what stands there
    "What the page says about data and fits."
    quality = pd.DataFrame([json.loads((folder / f"encoder-{k}-{s}.json").read_text()) for k in range(N_FOLDS) for s in SEEDS_OF[NETWORKS[-1]]])
    recall = pd.DataFrame(quality.recall.tolist())
    sizes = sorted(len(f.store.vocabulary) for f in stores)
    told = {"bins": N_VALUE_BINS, "tokens": f"{sizes[0]} to {sizes[-1]}" if sizes[0] < sizes[-1] else sizes[0], "rank": LORA_RANK, "size": SIZES["hidden_size"], "dropout": SIZES["dropout"], "epochs": TRAINING["epochs"],
            "minutes": ((facts.groupby("arm").seconds.first() * facts.groupby("arm").size()).sum() + quality.seconds[0] * len(quality)) / 60, "pre_seconds": quality.seconds[0], "recall": recall.model.mean(), "again": recall["last visit again"].mean(), "wins": int((recall.model > recall["last visit again"]).sum()),
            "encoders": len(quality), "head": int(facts[facts.arm == NETWORKS[-1]].trainable.max())}
    for year in LANDMARK_YEARS: told |= {f"n{year}": len(cohort.marks[year]), f"d{year}": int(cohort.marks[year].events.sum())}
    return told


MEANING = """Numbers are those of death within 3 years.

- **No network is shown to be better than a Cox model on five numbers.** Of the {all} differences between a network and the stacked Cox model (six networks, three landmarks, three scores) {against1} go against the network beyond their interval, all at year 5 and {against_pre} of them of pre-trained networks, which have one seed; {for1} goes for it; of those from the model on the last values, which learns from the patients at the landmark alone, {against0} go against it and {for0} for it. The stacked model has the lowest Brier score of all models at years 3 and 5. The highest AUC of a network is at year 3 that of {best3}, at year 5 of {best5}, at year 7 of {best7}; the stacked model has {s3}, {s5} and {s7}. Nor is it shown that networks are as good: with so few deaths an interval of their differences in AUC is {narrow} to {wide} wide.
- **What the bins cost: little.** Told no more than the bins, the stacked Cox model moves by {bin3}, {bin5} and {bin7} in AUC at years 3, 5 and 7, and by {ibin3}, {ibin5} and {ibin7} in IPA; its Brier score at year 3 is told to be worse, by {bbin3}. Tokens in the place of values are not what holds the networks back.
- **What it costs not to be told what matters: more, where the last values are fresh.** A logistic regression on the tokens of the same visit must find out from the deaths which of some 90 tokens count, and that bins have an order. Against the Cox model in bins its AUC changes by {tok3} and {tok5} at years 3 and 5 ({tok7} at year 7), and its difference from the stacked model on values is {gaint3} and {gaint5}: likely, and not shown. The five covariates bring decades of clinical knowledge, and more than that: the Mayo model was developed on the patients of this trial ([Dickson et al. 1989](https://doi.org/10.1002/hep.1840100102)), so that the choice of covariates, though not their coefficients, has seen the patients of every fold. No model on tokens has this advantage; how much it is worth cannot be told here, and the model has proved right in other hospitals since ([Grambsch et al. 1989](https://doi.org/10.1002/hep.1840100516)).
- **At year 7 counting the past pays.** There the last measurements are old, and the logistic regression on counts of all visits has AUC {count7} and IPA {icount7}; its difference from the last values is {gain7} in AUC, from the stacked model {gains7}. It is not attendance that helps: the number of visits alone has AUC {visit7}. But it is one of many comparisons, on {d7} deaths, and at years 3 and 5 the same model is behind ({count3} and {count5}). The networks read the same past; their AUC at year 7 is {low7} to {high7}.
- **Between the networks** there is no order that holds: their AUC is {low3} to {high3} at year 3, {low5} to {high5} at year 5, and which is first changes with the landmark."""

SHORT = """- {d3}, {d5} and {d7} deaths, three landmarks that share patients, {all} differences a reference and no correction: single bold cells mean little.
- Sizes and learning rates were set once and not chosen on data. A search might find better ones; it would also use up patients, of whom there are 250, and the Cox models had no search either.
- A fifth of the training patients stops the networks and chooses penalties. The Cox models learn from all.
- The intervals are about the patients who are scored. They leave out the variation of fitting, of which the seeds give a picture, and of dealing out the folds, of which the page of the Cox models does.
- Networks are trained to answer on the day of a visit. That a patient has not come since is used as survival up to the landmark, and not as news of its own.
- Transplants are censoring alone. A network with one hazard has no risk in the presence of transplants; that takes a second hazard."""


PRETRAINING_WORDS = """Two hundred patients' records teach an encoder little. Asked for the ten codes most likely at the next visit of patients who took no part, it finds {recall:.0f} % of them; the rule that the last visit comes again finds {again:.0f} %, and is better for {ahead} of {encoders} encoders. Longer pre-training did not help: tried on one fold with up to 200 epochs, before any score was seen, the loss on validation patients was lowest after 59 and rose from there.

So no gain is shown: none of the nine differences below lies beyond its interval. Still, the frozen encoder has never seen an outcome, and a head of {head} numbers on it ranks like the network whose weights were all trained from scratch with the same seed."""


def _beyond(frames, arms=NETWORKS):
    "How many differences between networks and the reference lie beyond their interval: for the network, against it."
    rows = [(_last(f).loc[(arm, m)], 1 if m == "brier" else -1) for f in frames.values() for arm in arms for m in GAINS]
    return [sum(flip * sign * row.difference_low < 0 and flip * sign * row.difference_high < 0 for row, sign in rows) for flip in (1, -1)]


def words(
    frames: dict, # year -> from `score`, with differences from the last values
    stacked_frames: dict, # year -> the same, with differences from the stacked model
    spreads: dict, # year -> of `seed_spread`
    encoders: dict, # year -> of `encoder_frames`
    told: dict, # of `numbers`
) -> dict: # name in `PAGE` -> what stands there
    "What the results mean. Raises `AssertionError` where a sentence is no longer true."
    at, auc = {year: _last(frame) for year, frame in frames.items()}, WITHIN[2]
    value = lambda year, arm, metric=auc: at[year].loc[(arm, metric), "value"]
    said = {"all": len(NETWORKS) * len(frames) * len(GAINS)} | told
    for i, (better, worse) in enumerate((_beyond(frames), _beyond(stacked_frames))): said |= {f"for{i}": better or "none", f"against{i}": worse or "none"}
    for year in frames:
        of = {arm: value(year, arm) for arm in NETWORKS}
        best = max(of, key=of.get)
        said |= {f"best{year}": f"{best} ({of[best]:.3f})", f"low{year}": f"{min(of.values()):.2f}", f"high{year}": f"{max(of.values()):.2f}", f"s{year}": f"{value(year, COX[1]):.3f}",
                 f"bin{year}": f"{value(year, BINNED) - value(year, COX[1]):+.3f}", f"ibin{year}": f"{value(year, BINNED, 'scaled_brier') - value(year, COX[1], 'scaled_brier'):+.3f}",
                 f"tok{year}": f"{value(year, 'logistic, last tokens') - value(year, BINNED):+.3f}", f"count{year}": f"{value(year, 'logistic, counts'):.3f}", f"visit{year}": f"{value(year, 'visit count'):.2f}"}
    gain = lambda f, year=7, arm="logistic, counts": with_interval(*_last(f[year]).loc[(arm, auc), ["difference", "difference_low", "difference_high"]], signed=True)
    of_bins = _last(stacked_frames[3]).loc[(BINNED, "brier")]
    widths = [row.difference_high - row.difference_low for f in stacked_frames.values() for arm in NETWORKS for row in [_last(f).loc[(arm, auc)]]]
    said |= {"icount7": f"{value(7, 'logistic, counts', 'scaled_brier'):.2f}", "gain7": gain(frames), "gains7": gain(stacked_frames), "bbin3": f"{of_bins.difference:.3f}", **{f"gaint{year}": gain(stacked_frames, year, "logistic, last tokens") for year in (3, 5)},
             "against_pre": _beyond(stacked_frames, [arm for arm in NETWORKS if "pre-trained" in arm])[1], "narrow": f"{min(widths):.2f}", "wide": f"{max(widths):.2f}"}
    assert of_bins.difference_low > 0 and _beyond({5: stacked_frames[5]})[1] == said["against1"] and len({said[f"best{year}"].rpartition(" (")[0] for year in frames}) == len(frames)
    assert all(_last(stacked_frames[year]).loc[("logistic, last tokens", auc), "difference_high"] > 0 for year in (3, 5))
    assert said["for1"] == said["for0"] == "none" and all(min(ARMS, key=lambda arm: value(year, arm, "brier")) == COX[1] for year in (3, 5))
    assert all(abs(float(said[f"bin{year}"])) < 0.015 for year in frames) and all(float(said[f"tok{year}"]) < -0.02 for year in (3, 5)) and value(7, "logistic, counts") > max(value(7, arm) for arm in ARMS if arm != "logistic, counts")
    return {"meaning": MEANING.format(**said), "short": SHORT.format(**said)} | _seeds_and_encoders(at, spreads, encoders, told)


def _seeds_and_encoders(at, spreads, encoders, told):
    "The words about seeds and about pre-training."
    auc, several = WITHIN[2], [arm for arm in NETWORKS if len(SEEDS_OF[arm]) > 1]
    gain = np.mean([at[y].loc[(arm, auc), "value"] - spreads[y].loc[arm][auc].mean() for y in at for arm in several])
    ranges = [np.ptp(spreads[y].loc[arm][auc]) for y in at for arm in several]
    apart = np.mean([np.ptp([spreads[y].loc[arm][auc].mean() for arm in several]) for y in at])
    rows = [e.loc[(arm, auc)] for e in encoders.values() for arm in NETWORKS[3:]]
    assert all(r.difference_low < 0 < r.difference_high for r in rows) and all(abs(e.loc[(NETWORKS[-1], auc), "difference"]) < 0.01 for e in encoders.values())
    seeds = (f"The mean of three risks is a small ensemble: its AUC is {gain:+.3f} from that of a single network, averaged over networks and landmarks. The seeds of one network lie {min(ranges):.3f} to {max(ranges):.3f} apart, "
             f"{np.mean(ranges):.3f} on average, and the averages of the {len(several)} networks {apart:.3f}. Whoever fits one network once and compares has measured the seed.")
    pretraining = PRETRAINING_WORDS.format(recall=100 * told["recall"], again=100 * told["again"], ahead=told["encoders"] - told["wins"], encoders=told["encoders"], head=told["head"])
    counts = f"At the three landmarks {told['n3']}, {told['n5']} and {told['n7']} patients are at risk, of whom {told['d3']}, {told['d5']} and {told['d7']} die within 3 years."
    return {"seeds_say": seeds, "pretraining": pretraining, "counts": counts}


@call_parse
def main(
    data: str = "../shared/data/pbc2/pbc2.csv.gz", # file of the cohort
    out: str = "benchmarks/results/pbc2_networks.md", # page to write
    n_resamples: int = 1000, # draws for intervals
):
    "Fit what is not there yet, evaluate, and write the page."
    if not Path(data).exists(): raise SystemExit(f"{data}: not there. Give the place of pbc2.csv.gz with --data.")
    matplotlib.use("agg")
    torch.set_num_threads(1)
    cohort = prepare(data, OUTCOMES["transplant censors"])
    folds = fold_patients(cohort.labels, N_FOLDS, seed=0)
    risks, each, facts, stores = all_risks(cohort, folds)
    frames, stacked_frames = ({year: score(cohort, folds, year, n_resamples, risks[year], reference) for year in LANDMARK_YEARS} for reference in COX[:2])
    spreads, encoders = seed_spread(cohort, folds, each), encoder_frames(cohort, folds, each, n_resamples)
    figure(frames, spreads, Path(out).with_suffix(".png"))
    tables = {f"main{year}": main_table(frame) for year, frame in frames.items()} | {"difference0": difference_table(frames, COX[0]), "difference1": difference_table(stacked_frames, COX[1]), "spread": spread_rows(frames, spreads),
              "encoders_table": encoder_table(encoders), "costs": cost_table(facts), "everything": score_table(frames, dict(zip(WITHIN, ("Harrell's C within folds", "Uno's C within folds", "AUC within folds"))) | OTHER_HEADINGS, (*ARMS, COX[-1]))}
    told = numbers(cohort, facts, stores)
    Path(out).write_text(PAGE.format(**tables, **told, **words(frames, stacked_frames, spreads, encoders, told)), encoding="utf-8")
    print(f"{out} written")
