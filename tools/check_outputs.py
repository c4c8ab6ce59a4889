"""Are the stored outputs what the notebooks give today? Executes each in a copy and compares: python tools/check_outputs.py [NAME ...] [--jobs N] [--write]

Text must be equal but for times, dates, addresses, temporary paths and digits beyond the seventh; in cells that measure time or files, but for every number. Pictures must be equal to the eye.
Cells that `nbdev_test` passes over are passed over here too. `--write` keeps the fresh outputs of the notebooks that differ, so that the difference can be read in git.
"""
import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")
LONG = re.compile(r"\d+\.\d{9,}(e[-+]?\d+)?")  # printed to the last digit, in which processors differ
CHANGING = [  # what may differ from run to run -> what stands for it
    (re.compile(r"( at)? 0x[0-9a-f]{6,}"), ""), (re.compile(r"T_[0-9a-f]{5}"), "TABLE"),
    (re.compile(r"(/private)?(/var/folders|/tmp)/[\w./-]+"), "PATH"),
    (re.compile(r"\b\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|\+\d\d:\d\d)?)?\b"), "DATE"),
    (re.compile(r"commit [0-9a-f]{7,}( with changes that are not committed)?"), "COMMIT"), (re.compile(r"[\d,]+ tokens a second"), "SPEED"),
    (re.compile(r", \d+:\d\d(:\d\d)? left\b"), ""),  # of a progress line; a fast machine does not say it
    (re.compile(r"\b\d+:\d\d(:\d\d)?\b"), "TIME"),
    (re.compile(r"\b[\d,.]+ ?(µs|us|ms|s|sec|seconds?|min|minutes?|h|hours?)\b"), "TIME"),
    (re.compile(r"-{3,}"), "---"),  # a table is as wide as its times are long
]
MEASURES = re.compile(r"perf_counter|process_time|time\.time|monotonic|timeit|\"seconds\"|run_benchmark\(|runs_table\(|st_size")  # the tables of runs hold times; so do files, which are longer or shorter for it


def normal(text, numbers):
    "The text without what may change; without any number if `numbers`."
    text = " ".join(text.split())  # lines are broken, and columns as wide, as the times in them are long
    for pattern, word in CHANGING: text = pattern.sub(word, text)
    text = LONG.sub(lambda found: f"{float(found[0]):.7g}", text)
    return NUMBER.sub("NUMBER", text) if numbers else text


def same_picture(first, second, tolerance=2.0):
    "Do two PNGs have the same size, and differ by less than `tolerance` of 255 on average?"
    import numpy as np
    from PIL import Image
    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(x))).convert("RGB"), dtype=float) for x in (first, second))
    return a.shape == b.shape and np.abs(a - b).mean() < tolerance


def joined(value): return "".join(value) if isinstance(value, list) else value


def shown(outputs):
    "A cell's outputs as (kind, content) pairs; streams are joined, progress on stderr is left out."
    found, streams = [], {}
    for o in outputs:
        if o["output_type"] == "stream": streams[o["name"]] = streams.get(o["name"], "") + joined(o["text"])
        elif o["output_type"] == "error": found.append(("error", o["ename"]))
        else: found += [(kind, joined(content)) for kind, content in sorted(o.get("data", {}).items())]
    return [(kind, text) for kind, text in streams.items() if kind == "stdout"] + found


def differences(stored, fresh):
    "For each cell whose outputs differ: its beginning and how."
    found = []
    for before, after in zip(stored["cells"], fresh["cells"], strict=True):
        if before["cell_type"] != "code": continue
        source = joined(before["source"])
        measures, a, b = bool(MEASURES.search(source)), shown(before["outputs"]), shown(after["outputs"])
        how = ""
        if [kind for kind, _ in a] != [kind for kind, _ in b]: how = f"{[kind for kind, _ in a]} became {[kind for kind, _ in b]}"
        for (kind, x), (_, y) in zip(a, b):
            if how: break
            if kind == "image/png": how = "" if measures or same_picture(x, y) else "another picture"
            elif normal(x, measures) != normal(y, measures):
                lines = [(p, q) for p, q in zip(x.splitlines(), y.splitlines()) if normal(p, measures) != normal(q, measures)]
                how = f"{kind}: {lines[0][0].strip()[:120]!r} became {lines[0][1].strip()[:120]!r}" if lines else f"{kind}: another number of lines"
        if how: found.append((next((line for line in source.splitlines() if not line.startswith("#|")), "")[:70], how))
    return found


def execute(path):
    "Run a notebook and print it as JSON on the last line; called in a process of its own."
    from execnb.nbio import nb2str
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    flags = set(get_config().tst_flags.split())
    notebook = NBProcessor(path, rm_directives=False).nb
    def passed_over(cell):
        directives = getattr(cell, "directives_", None) or {}
        return cell.cell_type != "code" or "nbdev_export" + "(" in cell.source or directives.get("eval:", [""])[0].lower() == "false" or bool(flags & directives.keys())
    os.chdir(path.parent)
    CaptureShell(path, mpl_format="png").run_all(notebook, exc_stop=True, preproc=passed_over)
    return nb2str(notebook)


def check(path, write):
    "Differences of one notebook, or why it could not be run."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "fresh.ipynb"
        done = subprocess.run([sys.executable, __file__, "--execute", path, "--out", out], capture_output=True, text=True, env=os.environ | {"IN_TEST": "1", "PYTHONPATH": str(ROOT)})
        if done.returncode: return [("", (done.stderr.strip().splitlines() or ["ended without a word"])[-1])]
        text = out.read_text(encoding="utf-8")
    found = differences(json.loads(path.read_text(encoding="utf-8")), json.loads(text))
    if found and write: path.write_text(text, encoding="utf-8")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, such as 09_losses or tutorials/03_leakage; all if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="notebooks at a time")
    parser.add_argument("--write", action="store_true", help="keep the fresh outputs of notebooks that differ (then run nbdev_clean)")
    parser.add_argument("--execute", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.execute: return options.out.write_text(execute(options.execute.resolve()), encoding="utf-8") and 0
    paths = [ROOT / "nbs" / f"{n.removesuffix('.ipynb')}.ipynb" for n in options.names] or sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    if missing := [str(p.relative_to(ROOT)) for p in paths if not p.is_file()]: parser.error(f"no such notebook: {', '.join(missing)}")
    stale = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for path, found in zip(paths, pool.map(lambda p: check(p, options.write), paths)):
            print(f"{path.relative_to(ROOT / 'nbs')}: {'as stored' if not found else f'{len(found)} cells differ'}", flush=True)
            for cell, how in found: print(f"    {cell}\n        {how}", flush=True)
            stale += bool(found)
    print(f"{len(paths) - stale} of {len(paths)} notebooks give what they store.")
    return int(stale > 0)


if __name__ == "__main__": sys.exit(main())
