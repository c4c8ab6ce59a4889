"The book as its readers meet it: no dead link, every figure described, every public name documented, cells that fit on a screen."
import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from fastcore.docments import docments

import ehr_sequencing

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SITE = "https://ehr-sequencing.github.io/ehr_sequencing/"
REPOSITORY = "https://github.com/ehr-sequencing/ehr_sequencing/blob/main/"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
LONGEST = 40  # lines of an export cell


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def name(path): return str(path.relative_to(ROOT / "nbs"))


def prose(text): return re.sub(r"(?m)^(?: {4}|\t).*$", "", re.sub(r"```.*?```", "", text, flags=re.S))


def slug(heading):
    "The anchor that a heading gets."
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    heading = re.sub(r"[^\w\s.\-]", "", heading.lower()).strip()
    return re.sub(r"\s+", "-", re.sub(r"^[^a-z]+", "", heading))


def anchors(texts): return {slug(h) for text in texts for h in re.findall(r"^#{1,6}\s+(.+?)\s*$", prose(text), flags=re.M)} | {a for text in texts for a in re.findall(r"id=\"([^\"]+)\"", text)}


@pytest.fixture(scope="module")
def processed():
    "What `nbdev_docs` makes before it calls Quarto: notebook -> (page of the site, its Markdown: prose, and what cells print as such)."
    end_at_once = "import os; os._exit(0)"  # the shells of so many notebooks take half a minute to take leave
    subprocess.run([sys.executable, "-c", f"from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True); {end_at_once}"], cwd=ROOT, check=True, capture_output=True)
    found = {}
    for path in NOTEBOOKS:
        made, texts, page = ROOT / "_proc" / path.relative_to(ROOT / "nbs"), [], f"{path.stem}.html"
        for cell in cells(made):
            if cell["cell_type"] == "raw" and (match := re.search(r"^output-file: (\S+)", source(cell), flags=re.M)): page = match.group(1)
            if cell["cell_type"] == "markdown": texts.append(source(cell))
            texts += ["".join(o["data"]["text/markdown"]) for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
        found[name(path)] = str((path.parent.relative_to(ROOT / "nbs") / page)), texts
    return found


def test_no_link_is_dead(processed):
    "Links between notebooks, links that backticks become, and anchors of both; files of the repository."
    pages = {page: anchors(texts) for page, texts in processed.values()}
    dead = []
    for path in NOTEBOOKS:
        page, texts = processed[name(path)]
        for text in texts:
            for _, _, target in LINK.findall(prose(text)):
                where, _, anchor = target.partition("#")
                if target.startswith(SITE): known = where.removeprefix(SITE) in pages and (not anchor or anchor in pages[where.removeprefix(SITE)])
                elif target.startswith(REPOSITORY): known = (ROOT / where.removeprefix(REPOSITORY)).exists()
                elif re.match(r"\w+:", target): continue  # of other sites
                elif not where: known = anchor in pages[page]
                else:
                    file = (path.parent / where).resolve()
                    known = file.exists() and (not anchor or file in NOTEBOOKS and anchor in pages[processed[name(file)][0]])
                if not known: dead.append(f"{name(path)}: {target}")
    assert not dead, "\n".join(dead)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "benchmarks" / "results").glob("*.md"))])
def test_no_link_of_a_text_file_is_dead(file):
    dead = [target for _, _, target in LINK.findall(prose((ROOT / file).read_text(encoding="utf-8"))) if not re.match(r"\w+:|#", target) and not ((ROOT / file).parent / target.partition("#")[0]).exists()]
    assert not dead


def test_links_are_found():
    "The patterns find what they are meant to find."
    assert LINK.findall("see [`a[0]`](b.ipynb#c) and ![a map](x.png)") == [("", "`a[0]`", "b.ipynb#c"), ("!", "a map", "x.png")]
    assert anchors(["# One, two `three`\n\n## 2. [Four](x) (five)\n```\n# six\n```"]) == {"one-two-three", "four-five"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_page(path):
    "A title and what it is about; figures described; formulas that MathJax and pandoc read; export cells that fit on a screen."
    first = next(source(c) for c in cells(path) if c["cell_type"] == "markdown")
    assert re.match(r"# \S.*\n\n> \S", first), "a page begins with its title and a line about it"
    for cell in cells(path):
        text = source(cell)
        if cell["cell_type"] == "markdown":
            for image, alt, target in LINK.findall(text): assert not image or len(alt) > 20, f"no alt text: {target}"
            formulas = re.sub(r"`[^`]*`", "", re.sub(r"\$\$.+?\$\$", "", prose(text), flags=re.S)).replace(r"\$", "")
            assert formulas.count("$") % 2 == 0, f"a dollar sign without its pair: {text[:80]}"
            for formula in formulas.split("$")[1::2]: assert formula == formula.strip() and "\n" not in formula, f"not read as a formula: {formula}"
        else:
            pictures = sum(any(kind.startswith("image/") for kind in o.get("data", {})) for o in cell["outputs"])
            match = re.search(r"^#\| fig-alt: (\".+\"|\[.+\])$", text, flags=re.M)
            described = ast.literal_eval(match.group(1)) if match else []
            described = [described] if isinstance(described, str) else described
            if "#| hide\n" not in text: assert len(described) == pictures and all(len(alt) > 40 for alt in described), f"{pictures} figures, {len(described)} descriptions: {text[:80]}"
            if text.startswith("#| export"): assert len(text.splitlines()) - 1 <= LONGEST, f"{len(text.splitlines()) - 1} lines: {text[:80]}"


def notes(function):
    "Parameter -> what is said of it. `docments` does not read the comment of `**options`."
    try: named = {k for k, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}
    except ValueError: named = set()
    return {k: v["docment"] for k, v in docments(function, full=True, returns=False).items() if k in named - {"self", "cls"}}


def plain(member): return member.__func__ if isinstance(member, (classmethod, staticmethod)) else member.fget if isinstance(member, property) else member


def undocumented(thing):
    "Parameters and public methods of a function or class that nobody describes, here or in a class above."
    if not inspect.isclass(thing): return [k for k, v in notes(thing).items() if not v]
    above = [b for b in thing.__mro__[1:] if b.__module__.startswith("ehr_sequencing")]
    found = []
    if "__init__" in vars(thing):
        inherited = {f.name for b in above if dataclasses.is_dataclass(b) for f in dataclasses.fields(b)}
        found += [k for k, v in notes(thing).items() if not v and k not in inherited]
    for method, member in vars(thing).items():
        function = plain(member)
        if method.startswith("_") or not inspect.isfunction(function): continue
        same = [plain(vars(b)[method]) for b in above if method in vars(b)]
        if not any((f.__doc__ or "").strip() for f in [function, *same]): found.append(f"{method}: docstring")
        known = {k for f in same if inspect.isfunction(f) for k, v in notes(f).items() if v}
        if not isinstance(member, property): found += [f"{method}: {k}" for k, v in notes(function).items() if not v and k not in known]
    return found


MODULES = [m.name for m in pkgutil.iter_modules(ehr_sequencing.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented(module):
    module = importlib.import_module(f"ehr_sequencing.{module}")
    for public in module.__all__:
        thing = getattr(module, public)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)) or inspect.isclass(thing) and issubclass(thing, Exception): continue
        assert (thing.__doc__ or "").strip() and not thing.__doc__.startswith(f"{public}("), f"{public} has no docstring"
        assert not undocumented(thing), f"{public}: {undocumented(thing)}"


ARRAYS = {"hazards", "logits", "event_times", "event_indicators", "event_types", "durations", "at_risk", "risks", "ages", "visit_ids", "visit_codes", "visit_mask", "sequence_mask", "attention_mask"}
TIMES = {"horizon", "horizons", "tau", "half_life", "washout_days"}


def unmeasured(function):
    "Arrays whose shape and times whose unit nobody tells."
    try: told = notes(function)
    except (OSError, TypeError, ValueError): return []  # made by `dataclass`, without a source of its own; the class says it
    return [k for k, v in told.items() if v and (k in ARRAYS and not re.search(r"\(.*\)|same shape|->", v) or k in TIMES and not re.search(r"day|year|bin|`horizons`", v))]


@pytest.mark.parametrize("module", MODULES)
def test_arrays_have_shapes_and_times_have_units(module):
    module = importlib.import_module(f"ehr_sequencing.{module}")
    for public in module.__all__:
        thing = getattr(module, public)
        functions = [thing] if inspect.isfunction(thing) else [thing, *(plain(f) for name, f in vars(thing).items() if name == "__init__" or not name.startswith("_"))] if inspect.isclass(thing) else []
        for function in functions:
            if inspect.isfunction(function) or function is thing: assert not unmeasured(function), f"{public}.{function.__name__}: {unmeasured(function)}"


def test_what_is_undocumented_is_found():
    def function(a, b=1): # b is one
        "Nothing of it."
    class Parent:
        def method(self,
            a, # a number
        ): "Something."
    Parent.__module__ = "ehr_sequencing.test"
    class Child(Parent):
        def method(self, a, b): pass
        def other(self): pass
    assert undocumented(function)[:1] == ["a"] and undocumented(Child) == ["method: b", "other: docstring"] and undocumented(Parent) == []
    def measured(hazards, # (B, V)
        risks, # probabilities
        horizon, # of the question
        tau, # days
    ): "Something."
    assert unmeasured(measured) == ["risks", "horizon"]
