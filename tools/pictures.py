"Draw the site's pictures from the stored results of the standard benchmark: python tools/pictures.py"
import shutil
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("agg")
import matplotlib.pyplot as plt

root = Path(__file__).resolve().parent.parent
STANDARD, IMAGES = root / "benchmarks" / "results" / "standard", root / "nbs" / "images"
ARMS = {  # arm -> (its words on the card, colour, marker); few enough to be read in a thumbnail
    "BEHRT, pre-trained, full": ("BEHRT, pre-trained", "#0b3c5d", "o"), "boosted trees, counts": ("boosted trees", "#b35900", "^"),
    "BEHRT, from scratch": ("BEHRT, from scratch", "#1c86c7", "s"), "visit count": ("visit count (control)", "#6b6b6b", "x")}


def social_card(path):
    "1200 x 630 pixels, as social networks show them: the name, the question, and the answer as a figure."
    results = pd.read_csv(STANDARD / "results.csv")
    sizes = sorted({int(n) for n in results["n_labels"].dropna()})
    figure = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="#f7f6f2")
    figure.text(0.05, 0.84, "ehr_sequencing", fontsize=40, weight="bold", color="#14232d")
    figure.text(0.05, 0.68, "Sequence models on electronic\nhealth records: who will have\nthe event, and when?", fontsize=25, color="#14232d", va="top", linespacing=1.35)
    figure.text(0.05, 0.13, "BEHRT · LoRA · discrete-time survival\nchecked for leakage, every score with an interval", fontsize=16, color="#4a5a64", linespacing=1.5)
    ax = figure.add_axes([0.59, 0.2, 0.37, 0.6], facecolor="none")
    for arm, (words, colour, marker) in ARMS.items():
        rows = results[results["arm"] == arm].sort_values("n_labels")
        ax.plot(rows["n_labels"], rows["c_index"], color=colour, marker=marker, markersize=9, linewidth=2.5, label=words)
    oracle = results[results["kind"] == "oracle"]
    if len(oracle): ax.axhline(oracle["c_index"].iloc[0], color="black", linewidth=2, label="oracle (the truth)")
    ax.set_xscale("log"); ax.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=14); ax.minorticks_off()
    ax.tick_params(axis="y", labelsize=14)
    ax.set_xlabel("labelled patients", fontsize=16); ax.set_title("C-index, simulated cohort", fontsize=16, loc="left")
    ax.legend(fontsize=13, frameon=False, loc="lower right", bbox_to_anchor=(1.02, 0.19), labelspacing=0.35)
    for side in ("top", "right"): ax.spines[side].set_visible(False)
    figure.savefig(path, dpi=100, facecolor=figure.get_facecolor())
    plt.close(figure)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    shutil.copyfile(STANDARD / "plots" / "label_efficiency.png", IMAGES / "label_efficiency.png")
    social_card(IMAGES / "social_card.png")
    print("nbs/images/ written")
