"Figures of a benchmark: no text lies on another or is cut off, whatever the arms are called; what is drawn is what was computed; nothing that may be missing stops a figure."
import itertools
import re
from contextlib import contextmanager
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from scipy.optimize import minimize

from ehr_sequencing.benchmark_figures import (_aside, _frontier, _observed_groups, _spread, arm_styles, describe_arm_calibration, describe_arms, describe_costs, describe_differences, describe_label_efficiency,
                                              describe_metric_over_time, plot_arm_calibration, plot_arms, plot_costs, plot_differences, plot_label_efficiency, plot_metric_over_time)
from ehr_sequencing.benchmark_results import imitate_results
from ehr_sequencing.benchmark_scores import BenchmarkScores, Difference
from ehr_sequencing.evaluation import NULL
from ehr_sequencing.hypotheses import Verdict, decide_hypotheses

matplotlib.use("agg")
STANDARD = {"visit count": "control", "Cox, counts": "baseline", "logistic, counts": "baseline", "boosted trees, counts": "baseline", "Med2Vec, logistic": "baseline", "LSTM": "network", "hierarchical transformer": "network",
            "BEHRT, from scratch": "network", "BEHRT, pre-trained, frozen": "network", "BEHRT, pre-trained, LoRA": "network", "BEHRT, pre-trained, full": "network"}
SIZES = (100, 300, 1000, 3000, 10000)
LONG = {f"{name}, with laboratory values as quantile tokens and $HbA_{{1c}}$ below 7 % in {year}": kind for year, (name, kind) in enumerate(STANDARD.items(), start=2001)}
ONE_WORD = {"visits": "control", "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft": "network", "x_1": "baseline"}
DESIGNS = {"standard": (STANDARD, SIZES, True), "two arms, one size": ({"Cox": "baseline", "LSTM": "network"}, (300,), False), "long names": (LONG, SIZES, True), "one long word": (ONE_WORD, (50, 5000), True), "one arm": ({"LSTM": "network"}, (60,), False),
           "sizes side by side": (STANDARD, (100, 900, 1000, 9000, 10000), True), "large sizes": (STANDARD, (100_000, 300_000, 1_000_000), True), "control and oracle": ({"visit count": "control"}, (10, 20), True),
           "losses": ({f"{arm}, {loss}": "network" for arm in ("LSTM", "BEHRT, from scratch") for loss in ("NLL", "ranking", "hybrid")}, (100, 1000), True)}


def scores_of(kinds, sizes, oracle, seed=0):
    "Scores as `BenchmarkScores` has them, made up."
    generator, rows, over = np.random.default_rng(seed), [], []
    for arm, kind in [*kinds.items(), *([("oracle", "oracle")] if oracle else [])]:
        for n in sizes if kind != "oracle" else (None,):
            c = {"control": 0.56, "oracle": 0.8}.get(kind) or 0.77 - 0.5 / n**0.4 + generator.normal(0, 0.004)
            brier, cost = 0.2 - 0.13 * c, {"control": 0.0, "oracle": np.nan}.get(kind, 10 ** generator.uniform(-1, 3))
            row = {"arm": arm, "kind": kind, "n_labels": n, "parameters": 1000 * cost, "trainable": 500 * cost, "seconds": cost, "cpu_seconds": cost}
            for name, value in (("c_index", c), ("brier", brier), ("integrated_brier", brier / 2), ("gap", c / 10)): row |= {name: value, f"{name}_low": value * 0.97, f"{name}_high": value * 1.02}
            rows.append(row)
        for h, (name, value) in itertools.product((30, 90, 180, 365, 730, 1095, 1825), (("brier", brier), ("scaled_brier", 1 - brier / 0.14), ("auc", c))): over.append((arm, n, float(h), name, value * h**0.1, value * 0.9 * h**0.1, value * 1.1 * h**0.1))
    over += [(NULL, None, float(h), "brier", 0.14 * h**0.1, 0.13 * h**0.1, 0.15 * h**0.1) for h in (30, 90, 180, 365, 730, 1095, 1825)]
    table = pd.DataFrame(rows).astype({"n_labels": "Int64"})
    return SimpleNamespace(table=table, over_time=pd.DataFrame(over, columns=["arm", "n_labels", "horizon", "metric", "value", "low", "high"]), level=0.95)


def verdicts_of(kinds):
    "Five verdicts about these arms, one without anything to compare."
    names = [name for name, kind in kinds.items() if kind != "control"]
    pair = lambda value, metric="c_index", n=10000, level=0.95: Difference(names[0], names[-1], n, metric, value, value - 0.011, value + 0.013, 0.2, level)
    return [Verdict("H1", "?", "not decided", "", [pair(0.004), pair(0.03, n=100, level=0.9875), pair(0.02, n=300, level=0.9875)], 0.95), Verdict("H2", "?", "supported", "", [pair(0.03), pair(0.04, "relative_c_index")], 0.95),
            Verdict("H3", "?", "refuted", "", [pair(-0.02, level=0.9)], 0.9), Verdict("H4", "?", "supported", "", [pair(-0.03, "gap")], 0.95), Verdict("H5", "?", "not decided", "", [], None, "There is no such arm.")]


@contextmanager
def closing():
    "Close all figures, also when a test fails."
    try: yield
    finally: plt.close("all")


def drawn_texts(figure):
    "(text, box in pixels) of everything that is written when the figure is drawn; nothing that lies outside of an axis is."
    found, draw = {}, Text.draw
    def note(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip(): found[id(self)] = self
        return draw(self, renderer, *args, **kwargs)
    Text.draw = note
    try: figure.canvas.draw()
    finally: Text.draw = draw
    assert not any("$" in t.get_text() and t.get_parse_math() for t in found.values()), "a name is taken for a formula"
    return [(t.get_text(), t.get_window_extent(figure.canvas.get_renderer())) for t in found.values()]


def assert_legible(figure):
    "No text overlaps another, and none is cut off; to half a pixel."
    texts, page = drawn_texts(figure), figure.bbox
    assert texts
    for text, box in texts: assert box.x0 > -0.5 and box.y0 > -0.5 and box.x1 < page.x1 + 0.5 and box.y1 < page.y1 + 0.5, f"{text!r} is cut off"
    for (one, a), (two, b) in itertools.combinations(texts, 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 0.5 or min(a.y1, b.y1) - max(a.y0, b.y0) < 0.5, f"{one!r} and {two!r} overlap"
    return {re.sub(r"\s+", "", text) for text, _ in texts}


def assert_names(written, names):
    "Every arm is named, with nothing left out."
    for name in names: assert any(re.sub(r"\s+", "", name) in text for text in written), name


FIGURES = {"label efficiency": plot_label_efficiency, "label efficiency, Brier": lambda s: plot_label_efficiency(s, "brier"), "arms": plot_arms, "gaps": lambda s: plot_arms(s, "gap"), "gaps by labels": lambda s: plot_label_efficiency(s, "gap"),  "Brier": plot_metric_over_time,
           "scaled Brier": lambda s: plot_metric_over_time(s, "scaled_brier"), "AUC": lambda s: plot_metric_over_time(s, "auc"), "seconds": plot_costs, "trainable": lambda s: plot_costs(s, "trainable")}


def test_the_check_finds_texts_that_overlap_or_are_cut_off():
    with closing():
        for place, at in (((0.5, 0.5), "overlap"), ((0.97, 0.2), "cut off")):
            figure = plt.figure()
            figure.text(0.5, 0.51, "one"); figure.text(*place, "another one")
            with pytest.raises(AssertionError, match=at): assert_legible(figure)


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("design", DESIGNS)
def test_all_is_legible(design, figure):
    kinds, sizes, oracle = DESIGNS[design]
    with closing():
        written = assert_legible(FIGURES[figure](scores_of(kinds, sizes, oracle)).figure)
        assert_names(written, kinds)
        assert any("oracle(thetruth)" in text for text in written) == oracle


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("design", ["standard", "two arms, one size", "long names", "one long word"])
def test_differences_are_legible(design, others):
    with closing():
        drawn = plot_differences(verdicts_of(DESIGNS[design][0]), others=others)
        written = assert_legible(drawn.figure)
        assert sum(l.get_marker() == "D" for l in drawn.lines) == (6 if others else 4)  # what is relative is on another scale
        assert {"H1:notdecided(95%)", "H3:refuted(90%)", "H5:notdecided"} <= written


@pytest.mark.parametrize("design", ["standard", "two arms, one size", "long names", "one long word", "one arm"])
def test_calibration_is_legible(design):
    kinds, sizes, oracle = DESIGNS[design]
    results = imitate_results({name: 1.0 + 0.1 * i for i, name in enumerate(kinds)}, kinds, sizes=sizes[-1:], n_patients=80, n_seeds=2)
    if not oracle: results.oracle = None
    with closing():
        axes = plot_arm_calibration(results)
        assert_names(assert_legible(axes[0].figure), kinds)
        assert len(axes) == len(kinds) + oracle


def test_given_axes_are_used():
    with closing():
        scores = scores_of(STANDARD, SIZES, True)
        for draw in (plot_label_efficiency, plot_arms, plot_metric_over_time, plot_costs):
            ax = plt.subplots(figsize=(6, 6), layout="constrained")[1]
            assert draw(scores, ax=ax) is ax and len(plt.get_fignums()) == 1
            assert_legible(ax.figure)
            plt.close("all")
        figure, axes = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")  # C and Brier score side by side
        plot_label_efficiency(scores, ax=axes[0]); plot_label_efficiency(scores, "brier", ax=axes[1])
        assert_legible(figure)


def points(ax, color):
    "(x, value) of the markers of this colour within the axes, in the order drawn."
    lines = [l for l in ax.lines if l.get_color() == color and l.get_marker() not in ("", "None", None) and l.get_transform() == ax.transData]
    return np.concatenate([l.get_xydata() for l in lines])


@pytest.mark.parametrize("design", ["standard", "sizes side by side", "two arms, one size"])
def test_what_is_drawn_is_what_was_computed(design):
    kinds, sizes, oracle = DESIGNS[design]
    scores, styles = scores_of(kinds, sizes, oracle), arm_styles({**kinds, "oracle": "oracle"})
    with closing():
        ax = plot_label_efficiency(scores)
        for name, kind in kinds.items():
            mine = scores.table[scores.table.arm == name]
            found = points(ax, styles[name]["color"])
            assert np.allclose(found[:, 1], mine.c_index)
            nearest = np.abs(np.log(found[:, :1] / np.array(sizes))).argmin(1)
            assert (nearest == np.arange(len(sizes))).all()  # moved aside, but not to another size
            if kind != "control":
                bars = [c for c in ax.collections if hasattr(c, "get_segments") and matplotlib.colors.to_hex(c.get_colors()[0]).upper() == styles[name]["color"]]
                assert np.allclose([seg[:, 1] for seg in bars[0].get_segments()], mine[["c_index_low", "c_index_high"]])
        flat = [l.get_ydata()[0] for l in ax.lines if len(l.get_ydata()) == 2 and l.get_ydata()[0] == l.get_ydata()[1] and l.get_color() == "#222222"]
        assert (scores.table.c_index[scores.table.kind == "oracle"].tolist() == flat[:1]) if oracle else not flat
        if "control" not in kinds.values(): return
        costs = plot_costs(scores, "trainable")
        for name, kind in kinds.items():
            (x, y), = points(costs, styles[name]["color"])
            row = scores.table[(scores.table.arm == name) & (scores.table.n_labels == max(sizes))].iloc[0]
            assert y == row.c_index and abs(np.log10(x / max(1, row.trainable))) < 0.6


def test_arms_of_one_cost_stand_side_by_side():
    scores = scores_of(STANDARD, SIZES, True)
    scores.table["cpu_seconds"] = 7.0
    with closing():
        ax = plot_costs(scores)
        x = sorted(points(ax, style["color"])[0, 0] for style in arm_styles(STANDARD).values())
        assert (np.diff(np.log10(x)) > 0.01).all() and abs(np.log10(x).mean() - np.log10(7)) < 1e-6


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.15)), min_size=1, max_size=6))
def test_labels_are_spread_as_well_as_can_be(labels):
    wanted, heights = np.array(labels).T
    placed = _spread(wanted, heights)
    order = np.argsort(wanted, kind="stable")
    y, h = placed[order], heights[order]
    assert (np.diff(y) >= (h[1:] + h[:-1]) / 2 - 1e-9).all() and y[0] >= h[0] / 2 - 1e-9 and y[-1] <= 1 - h[-1] / 2 + 1e-9
    limits = [{"type": "ineq", "fun": lambda v: np.concatenate([np.diff(v) - (h[1:] + h[:-1]) / 2, [v[0] - h[0] / 2, 1 - h[-1] / 2 - v[-1]]])}]
    start = np.cumsum(h) - h / 2
    best = minimize(lambda v: ((v - wanted[order]) ** 2).sum(), start, constraints=limits, method="SLSQP", options={"ftol": 1e-12, "maxiter": 300})
    assert ((y - wanted[order]) ** 2).sum() <= best.fun + 1e-6


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8))
def test_frontier_is_who_is_not_beaten(arms):
    cost, value = np.array(arms).T
    beaten = [any((c < cost[i] and v >= value[i]) or (c <= cost[i] and v > value[i]) for c, v in zip(cost, value)) for i in range(len(arms))]
    found = _frontier(cost, value)
    assert set(zip(cost[found], value[found])) == {(cost[i], value[i]) for i in range(len(arms)) if not beaten[i]} and (np.diff(cost[found]) > 0).all()


def test_arms_keep_apart_between_sizes():
    for sizes in (SIZES, (100, 900, 1000, 9000, 10000), (5, 6)):
        for n in (1, 2, 11, 30):
            aside = _aside(sizes, n)
            assert len(aside) == n and (np.diff(aside) > 0).all() and abs(np.log(aside).mean()) < 1e-9
            assert all(a * aside[-1] < b * aside[0] for a, b in zip(sizes, sizes[1:]))


def test_colours_are_told_apart_without_colour():
    "Kinds differ in line and filling, arms of one kind in marker; hues of different kinds differ in lightness or in blue against yellow, which most colour-blind readers see."
    styles = arm_styles({**STANDARD, "oracle": "oracle"})
    assert len({(s["marker"], s["mfc"] == "white", s["ls"]) for s in styles.values()}) == len(styles)
    many = arm_styles({str(i): "network" for i in range(42)})
    assert len({(s["marker"], s["color"]) for s in many.values()}) == 42
    rgb = {name: matplotlib.colors.to_rgb(s["color"]) for name, s in styles.items()}
    for one, two in itertools.product(STANDARD, STANDARD):
        if (STANDARD[one], STANDARD[two]) == ("baseline", "network"): assert rgb[one][2] - rgb[one][0] < 0 < rgb[two][2] - rgb[two][0]  # more red than blue, and more blue than red


def test_what_is_missing_stops_no_figure():
    scores = scores_of(STANDARD, SIZES, True)
    scores.table.loc[scores.table.arm == "LSTM", ["c_index_low", "c_index_high"]] = np.nan  # an interval that is undefined
    scores.table = scores.table[~((scores.table.arm == "Cox, counts") & (scores.table.n_labels != 300))]  # an arm at one size alone
    scores.table.loc[(scores.table.arm == "Med2Vec, logistic") & (scores.table.n_labels == 10000), "c_index"] = np.nan
    with closing():
        for draw in (plot_label_efficiency, plot_arms, plot_costs): assert_legible(draw(scores).figure)
        assert not any("Cox" in t.get_text() for t in plot_arms(scores).get_yticklabels())  # it has nothing with all labels
        for text in (describe_label_efficiency(scores), describe_arms(scores), describe_costs(scores)): assert "nan" not in text.lower()


def test_texts_say_the_numbers():
    scores = scores_of(STANDARD, SIZES, True)
    table = scores.table[scores.table.n_labels == 10000].set_index("arm")
    arms = table[table.kind != "control"].sort_values("c_index")
    best, worst = arms.iloc[-1], arms.iloc[0]
    for text in (describe_label_efficiency(scores), describe_arms(scores)):
        assert f"best {best.name}, {best.c_index:.3f} ({best.c_index_low:.3f} to {best.c_index_high:.3f})" in text and f"worst {worst.name}, {worst.c_index:.3f}" in text
        assert "the oracle 0.800 (0.776 to 0.816), the control (visit count) 0.560" in text
    by_brier = table[table.kind != "control"].sort_values("brier")
    assert f"best {by_brier.index[0]}, {by_brier.brier.iloc[0]:.3f}" in describe_arms(scores, "brier")  # lower is better
    assert "At 30 d: best" in describe_metric_over_time(scores) and "At 5 y: best" in describe_metric_over_time(scores, "auc")
    said = describe_differences(verdicts_of(STANDARD), 0.02)
    assert "H1, not decided: Cox, counts minus BEHRT, pre-trained, full 0.004 (\u22120.007 to 0.017)" in said and "margin of \u00b10.02" in said and "H5, not decided: nothing to compare" in said and "100" not in said
    bare = scores_of({"Cox": "baseline"}, (300,), False)
    assert "For comparison" not in describe_arms(bare) and "worst" not in describe_arms(bare) and describe_label_efficiency(bare).count("With 300 patients") == 1


def test_real_scores_without_oracle_and_control():
    results = imitate_results({"Cox, counts": 1.0, "boosted trees, counts": 1.1, "LSTM": 1.4, "BEHRT, from scratch": 1.4, "BEHRT, pre-trained, LoRA": 0.8, "BEHRT, pre-trained, full": 0.7}, {"Cox, counts": "baseline", "boosted trees, counts": "baseline"}, sizes=(200,), n_patients=120, n_seeds=1)
    results.oracle, results.oracle_train = None, {}
    scores = BenchmarkScores(results, n_resamples=50)
    with closing():
        for draw in FIGURES.values(): assert_names(assert_legible(draw(scores).figure), results.arms)
        assert_legible(plot_differences(decide_hypotheses(scores), others=True).figure)
    for text in (describe_label_efficiency(scores), describe_arms(scores, "gap"), describe_metric_over_time(scores, "scaled_brier"), describe_arm_calibration(results), describe_costs(scores)): assert "nan" not in text and "oracle" not in text


def test_calibration_intervals_cover_the_truth():
    "Of a model that is right, with three landmarks a patient."
    covered, n = 0, 0
    for seed in range(25):
        results = imitate_results({"oracle-like": 0.0}, n_patients=150, n_seeds=2, seed=seed, sizes=(100,))
        table = _observed_groups(results.test, [c.risks[:, -1] for c in results.cells], 1825.0, 5, 0.95)
        covered, n = covered + ((table.low <= table.predicted) & (table.predicted <= table.high)).sum(), n + len(table)
    assert 0.89 < covered / n <= 1.0
