"The report of a benchmark: the page stands alone and is valid, its four forms agree, times are apart, and odd results are told."
import csv
import io
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ehr_sequencing.benchmark_results import imitate_results
from ehr_sequencing.benchmark_scores import BenchmarkScores
from ehr_sequencing.hypotheses import decide_hypotheses, red_flags
from ehr_sequencing.report import FILES, TIME_FIELDS, Code, Items, Section, Table, Text, _md, _numeric, report_contents, report_html, report_markdown, write_report, without_times
from privacy import png_texts

NOISE = {"visit count": 4.0, "Cox, counts": 1.0, "boosted trees, counts": 1.0, "LSTM": 1.4, "BEHRT, from scratch": 1.3, "BEHRT, pre-trained, LoRA": 0.7, "BEHRT, pre-trained, full": 0.7}
KINDS = {"visit count": "control", "Cox, counts": "baseline", "boosted trees, counts": "baseline"}
VOID = {"meta", "img", "br", "link", "input", "hr", "col", "wbr"}
INSIDE = {"td": "tr", "th": "tr", "tr": ("thead", "tbody"), "thead": "table", "tbody": "table", "caption": "table", "li": "ul", "figcaption": "figure", "summary": "details", "html": None, "head": "html", "body": "html"}
NAMES = st.text(max_size=40) | st.lists(st.sampled_from(["<", ">", "&", "lt;", "</th>", "<b>", "\"", "'", "|", "\\", "`", "*", "_", "#", "[", "]", " ", "{{", "}}", "a"]), max_size=8).map("".join)
PHRASING = {"p", "h1", "h2", "h3", "span", "a", "code"} # hold no block


class Page(HTMLParser):
    "The tree of a page, checked while it is read."
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.headings, self.links, self.ids, self.alts, self.tables, self.tags = [], [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes, parent = dict(attrs), self.open[-1] if self.open else None
        assert len(attributes) == len(attrs), f"an attribute twice: {attrs}"
        if tag in INSIDE: assert parent in (INSIDE[tag] if isinstance(INSIDE[tag], tuple) else (INSIDE[tag],)), f"<{tag}> in <{parent}>"
        if parent in PHRASING: assert tag in {"span", "a", "code"}, f"<{tag}> in <{parent}>"
        if parent == "ul": assert tag == "li"
        assert not any(name.startswith("on") for name in attributes)
        self.tags.append(tag)
        self.links += [(tag, attributes[name]) for name in ("src", "href", "data", "srcset", "poster", "action", "background", "cite") if name in attributes]
        if "id" in attributes: self.ids.append(attributes["id"])
        if tag == "img": self.alts.append(attributes["alt"])
        if tag == "table": self.tables.append([])
        if tag == "tr": self.tables[-1].append([])
        if tag in ("td", "th"): self.tables[-1][-1].append("")
        if tag == "th": assert attributes["scope"] in ("col", "row")
        if re.fullmatch("h[1-6]", tag): self.headings.append(int(tag[1]))
        if tag not in VOID: self.open.append(tag)

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"): self.tables[-1][-1][-1] += text

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> where something else is open"


def judged(results, n_resamples=60):
    scores = BenchmarkScores(results, n_resamples=n_resamples)
    return scores, decide_hypotheses(scores), red_flags(scores)


def write(folder, results, figures=False, **changes):
    "A report, name of a file -> its bytes; figures take most of the time."
    folder.mkdir()
    scores, verdicts, flags = judged(results)
    with pytest.MonkeyPatch.context() as patch:
        if not figures: patch.setattr("ehr_sequencing.report.draw_figures", lambda *_: ({}, {}))
        write_report(folder, results, scores, verdicts, changes.get("flags", flags))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def results():
    found = imitate_results(NOISE, KINDS, sizes=(100, 1000), n_patients=250)
    found.about |= {"title": "A & B <i>", "outcome": "sodium <130 & *low*", "source": "a_file|of \"x\"", "command": "run --outcome 'a<b'", "flow": [["in the source", 500], ["without a visit", 7], ["analysed", 493]],
        "split": {"pool": {"patients": 243, "patients_with_event": 9, "landmarks": 700, "events": 100}}, "pretraining": [{"seed": 0, "patients": 200, "epochs": 3, "seconds": 8.5, "cpu_seconds": 8.25, "parameters": 1000}],
        "expected": [{"arm": "LSTM", "text": "0.67 to 0.72"}, {"arm": "GRU", "text": "0.6"}], "date": "2026-01-02", "seconds": 5.0, "cpu_seconds": 4.0, "settings": {"sizes": [100, 1000], "device": None}, "arms": {"LSTM": {"what": "a network", "settings_tried": [0.1, 0.2], "pretrained": False}}}
    return found


@pytest.fixture(scope="module")
def report(results, tmp_path_factory): return write(tmp_path_factory.mktemp("report") / "r", results, figures=True)


def test_page_is_valid_and_stands_alone(report):
    text = report["report.html"].decode()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and page.tags.count("h1") == 1 and page.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:]))
    assert len(page.ids) == len(set(page.ids)) and page.alts and all(len(alt) > 20 for alt in page.alts)
    assert not {"script", "link", "iframe", "object", "embed", "base", "video", "audio", "source", "form"} & set(page.tags)
    for tag, link in page.links: assert link.startswith("data:image/svg+xml;base64,") if tag == "img" else link[0] == "#" and link[1:] in page.ids
    assert not re.search(r"url\(|@import|@font-face", text) and all(len({len(row) for row in table}) == 1 for table in page.tables)


def test_reader_of_pages_finds_faults():
    "The checks above can fail."
    for wrong in ("<p>", "<p></div>", "<p><ul></ul></p>", "<table><td></td></table>", "<ul><p></p></ul>", '<p id="a" id="b"></p>', "<img>", "<table><tbody><tr><th></th></tr></tbody></table>", '<p onclick="x"></p>'):
        with pytest.raises((AssertionError, KeyError)): Page(wrong)


def test_numbers_agree_in_all_four(report):
    said, page, markdown = json.loads(report["results.json"]), Page(report["report.html"].decode()), report["report.md"].decode()
    rows = list(csv.DictReader(io.StringIO(report["results.csv"].decode())))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in said["results"]] == rows
    first = next(t for t in page.tables if "CPU time" in t[0])
    for row in (r for r in said["results"] if r["n_labels"] in (1000, None)):
        shown = next(cells for cells in first if cells[0].startswith(row["arm"]))
        assert shown[2] == f"{row['c_index']:.3f} ({row['c_index_low']:.3f} to {row['c_index_high']:.3f})" and shown[3] == f"{row['brier']:.3f} ({row['brier_low']:.3f} to {row['brier_high']:.3f})"
        assert shown[4:7] == [f"{row['auc']:.3f}", f"{row['observed_expected']:.2f}", "" if row["trainable"] is None else f"{row['trainable']:,.0f}"]
    below = [line for line in markdown.splitlines() if line.startswith("| ")]
    in_page = [[" ".join(cell.split()) for cell in row] for table in page.tables for row in table]
    in_markdown = [[unescape(re.sub(r"\\(.)", r"\1", cell)) for cell in re.split(r"(?<!\\) \| ", line[2:-2])] for line in below if not line.startswith("| ---")]
    assert [[c.strip() for c in row] for row in in_markdown] == [[c.strip() for c in row] for row in in_page]
    differences = list(csv.DictReader(io.StringIO(report["differences.csv"].decode())))
    assert [[d["first"], float(d["value"]), float(d["low"]), d["hypothesis"]] for d in differences] == [[d["first"], d["value"], d["low"], d["hypothesis"]] for d in said["differences"]]
    assert [d for v in said["verdicts"] for d in v["differences"]] == [{k: x for k, x in d.items() if k != "hypothesis"} for d in said["differences"]]


def test_names_are_text_and_not_markup(report):
    html, markdown = report["report.html"].decode(), report["report.md"].decode()
    assert "<title>A &amp; B &lt;i&gt;</title>" in html and "sodium &lt;130 &amp; *low*" in html and "<i>" not in html
    assert r"# A &amp; B \<i\>" in markdown and r"sodium \<130 &amp; \*low\*" in markdown and "    run --outcome 'a<b'" in markdown


def test_small_counts_are_hidden(report):
    said = json.loads(report["results.json"])
    assert said["about"]["flow"][1] == ["without a visit", "<10"] and said["about"]["split"]["pool"]["patients_with_event"] == "<10"
    assert ["without a visit", "<10"] in [row for table in Page(report["report.html"].decode()).tables for row in table] and r"| without a visit | \<10 |" in report["report.md"].decode()


def timeless(html): return re.sub(r'<td class="(?:num )?time">.*?</td>|<figure class="time">.*?</figure>', "", html)


def test_same_results_same_bytes_and_times_are_apart(results, report, tmp_path):
    generator = np.random.default_rng(0)
    cells = [replace(c, seconds=c.seconds * generator.uniform(0.5, 3), cpu_seconds=c.cpu_seconds * generator.uniform(0.5, 3)) for c in results.cells]
    about = results.about | {"date": "2027-05-06", "seconds": 99.0, "cpu_seconds": 98.0, "pretraining": [results.about["pretraining"][0] | {"seconds": 80.0, "cpu_seconds": 79.0}]}
    other = write(tmp_path / "other", replace(results, cells=[cells[i] for i in generator.permutation(len(cells))], about=about), figures=True)
    assert {name for name in report if report[name] != other[name]} == {"report.html", "report.md", "results.csv", "results.json", "plots/costs_time.png"}
    assert timeless(report["report.html"].decode()) == timeless(other["report.html"].decode())
    first, second = (json.loads(x["results.json"]) for x in (report, other))
    assert first != second and without_times(first) == without_times(second)
    first, second = ([{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in csv.DictReader(io.StringIO(x["results.csv"].decode()))] for x in (report, other))
    assert first == second
    assert write(tmp_path / "again", results) == write(tmp_path / "once more", results)
    changed = replace(results, cells=[replace(c, risks=c.risks * (0.9 if i == 3 else 1)) for i, c in enumerate(results.cells)])
    assert without_times(json.loads(write(tmp_path / "changed", changed)["results.json"])) != without_times(json.loads(report["results.json"]))


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.none() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*TIME_FIELDS, "c_index", "about"]), inner, max_size=3), max_leaves=12))
def test_without_times_leaves_no_time(value):
    "No field of times at any depth, and nothing else is lost."
    text, leaves = json.dumps(without_times(value)), lambda x: sum(map(leaves, x.values() if isinstance(x, dict) else x)) if isinstance(x, (dict, list)) else 1
    keys = lambda x: {k for part in (x.values() if isinstance(x, dict) else x) for k in keys(part)} | (set(x) if isinstance(x, dict) else set()) if isinstance(x, (dict, list)) else set()
    timed = lambda x: (sum(leaves(v) if k in TIME_FIELDS else timed(v) for k, v in x.items()) if isinstance(x, dict) else sum(map(timed, x))) if isinstance(x, (dict, list)) else 0
    assert not keys(json.loads(text)) & set(TIME_FIELDS) and leaves(without_times(value)) == leaves(value) - timed(value)


def test_a_leak_stands_on_the_first_screen(tmp_path):
    leaking = imitate_results(NOISE | {"time machine": 0.05}, KINDS, sizes=(100, 1000), n_patients=150)
    for c in leaking.cells:
        if c.arm == "time machine": c.leak = "risks moved by 0.3"
    found = write(tmp_path / "r", leaking)
    html, markdown, said = found["report.html"].decode(), found["report.md"].decode(), json.loads(found["results.json"])
    assert 'class="box flags"' in html and html.index("time machine&#34; looks ahead") < min(html.index("<table>"), html.index("For comparison"))
    assert markdown.index('"time machine" looks ahead') < markdown.index("C-index") and not said["checked"]
    assert "“time machine”" not in " ".join(said["answer"])


def test_without_a_flag_the_page_says_what_was_checked(results, tmp_path):
    found = write(tmp_path / "r", results, flags=[])
    html, said = found["report.html"].decode(), json.loads(found["results.json"])
    assert 'class="box calm"' in html and 'class="box flags"' not in html and "No red flag was raised" in found["report.md"].decode()
    assert any(f"all {len(results.cells)} fits" in line for line in said["checked"]) and any("oracle" in line for line in said["checked"])


@pytest.mark.parametrize("sizes, n_seeds, oracle", [((300,), 1, False), ((100, 300), 1, True)])
def test_one_size_one_seed_no_oracle(sizes, n_seeds, oracle, tmp_path):
    found = imitate_results(NOISE, KINDS, sizes=sizes, n_seeds=n_seeds, n_patients=150)
    if not oracle: found.oracle = None
    files = write(tmp_path / "r", found, figures=True)
    Page(files["report.html"].decode())
    said = json.loads(files["results.json"])
    assert ("plots/label_efficiency.png" in files) == (len(sizes) > 1) and any(line.startswith(f"{n_seeds} seed{'s' if n_seeds > 1 else ''}, one split") for line in said["limits"])
    assert ("oracle" in files["report.md"].decode()) == oracle and set(FILES) <= set(files)


def test_other_arms_get_differences_in_place_of_verdicts(tmp_path):
    losses = imitate_results({f"{arm}, {loss}": 1.0 for arm in ("LSTM", "BEHRT, from scratch") for loss in ("NLL", "ranking", "hybrid")}, sizes=(300,), n_patients=150)
    files = write(tmp_path / "r", losses, figures=True)
    said, page = json.loads(files["results.json"]), Page(files["report.html"].decode())
    assert len(said["differences"]) == 15 and not any(d["hypothesis"] for d in said["differences"]) and "badge" not in re.sub(r"<style>.*?</style>", "", files["report.html"].decode(), flags=re.S)
    assert sum(len(t) == 16 and t[0][0] == "contrast" for t in page.tables) == 1 and "plots/differences.png" not in files


def test_what_is_not_told_is_left_out(tmp_path):
    bare = imitate_results({"a": 1.0, "b": 2.0}, sizes=(300,), n_patients=150)
    bare.about = {"title": "Bare"}
    markdown = write(tmp_path / "r", bare)["report.md"].decode()
    for absent in ("From the source", "Pre-training,", "The machine", "expected before", "Notes of the reader", "vocabulary has", "None.", "<NA>", "When, and"): assert absent not in markdown, absent
    assert not re.search(r"\bnan\b", markdown)


def test_nothing_is_written_after_an_error(results, tmp_path):
    scores, verdicts, flags = judged(results)
    (tmp_path / "a").mkdir()
    for about, message in (({}, "expected a 'title'"), ({"title": "x", "settings": {"out": tmp_path}}, "about.settings.out")):
        with pytest.raises((ValueError, TypeError), match=message): write_report(tmp_path / "a", replace(results, about=about), scores, verdicts, flags)
    assert not list((tmp_path / "a").iterdir())
    with pytest.raises(FileNotFoundError, match="expected an existing folder"): write_report(tmp_path / "b", results, scores, verdicts, flags)
    (tmp_path / "a" / "report.md").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds report.md"): write_report(tmp_path / "a", results, scores, verdicts, flags)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["report.md"] and (tmp_path / "a" / "report.md").read_text() == "mine"


def test_pictures_and_data_tell_nothing_of_patients(results, report):
    "Numbers are of groups: no list in the JSON is as long as there are landmarks or patients, and pictures carry no text beside themselves."
    longest = lambda x: max([len(x), *map(longest, x)], default=0) if isinstance(x, list) else max(map(longest, x.values()), default=0) if isinstance(x, dict) else 0
    assert longest(json.loads(report["results.json"])) < results.test.n_patients
    for name, content in report.items():
        if name.endswith(".png"): assert not png_texts(content)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NAMES, NAMES)
def test_any_text_is_safe_in_both_forms(one, other):
    "Whatever an arm is called, the page keeps its tree and gives the same text back; Markdown keeps its number of cells."
    table = Table(one, ["arm", other], [[one, other]])
    html = report_html(one, other, [Section("a", "A", [Text(one), Items([other]), Code(one), table])], {})
    clean = lambda text: " ".join(text.split())
    if "\0" not in one + other and not re.search("[\x01-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef]|[\ufffe\uffff]", one + other):
        assert [clean(cell) for cell in Page(html).tables[0][1]] == [clean(one), clean(other)]
    lines = [line for line in report_markdown("t", "", [Section("a", "A", [table])]).split("\n") if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines) and len(lines) == 3


def test_columns_of_numbers():
    table = Table("", ["arm", "n", "mixed", "value"], [["1", "1,000", "12 s", "3"], ["2", "not defined", "LSTM", "4"], ["3", "", "-1", "5"]])
    assert [_numeric(table, i) for i in range(4)] == [False, True, False, False]


def test_contents_have_only_what_json_has(results):
    scores, verdicts, flags = judged(results)
    contents = report_contents(results, scores, verdicts, flags)
    assert json.loads(json.dumps(contents, allow_nan=False)) == contents and contents["schema_version"] == 1
    assert _md("a_b <c> & [d] `e` #f *g*") == r"a\_b \<c\> &amp; \[d\] \`e\` \#f \*g\*"
