"The project as a whole: README in step with its notebook, light import, chapters that import only upward."
import ast
import importlib.util
import json
import re
import subprocess
import sys

from conftest import ROOT

CHAPTERS = sorted(p for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
PAGES = [ROOT / "nbs" / "index.ipynb", ROOT / "nbs" / "glossary.ipynb"]
NOTEBOOKS = [*CHAPTERS, *PAGES, *TUTORIALS]


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def test_readme_is_what_the_index_notebook_says():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme.render(), "run: python tools/readme.py"


def test_pictures_of_the_site_are_those_of_the_stored_report():
    picture = "plots/label_efficiency.png"
    assert (ROOT / "nbs/images/label_efficiency.png").read_bytes() == (ROOT / "benchmarks/results/standard" / picture).read_bytes(), "run: python tools/pictures.py"
    card = (ROOT / "nbs/images/social_card.png").read_bytes()
    assert card[:8] == b"\x89PNG\r\n\x1a\n" and [int.from_bytes(card[i:i + 4], "big") for i in (16, 20)] == [1200, 630]
    assert "image: images/social_card.png" in (ROOT / "_quarto.yml").read_text()


def test_import_is_light():
    code = ("import sys, time; began = time.perf_counter(); import ehr_sequencing; spent = time.perf_counter() - began;"
            "print(spent, 'torch' in sys.modules, 'polars' in sys.modules)")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split() for _ in range(3)]
    assert all(run[1:] == ["False", "False"] for run in runs)
    assert min(float(run[0]) for run in runs) < 0.3


def test_chapters_import_only_from_chapters_above():
    found = [re.search(r"#\| default_exp (\w+)", source(cells(p)[0])) for p in CHAPTERS]  # none in a chapter that only uses the others
    order = {match.group(1): i for i, match in enumerate(found) if match}
    for i, path in enumerate(CHAPTERS):
        for cell in cells(path):
            if cell["cell_type"] != "code" or "#| export" not in source(cell): continue
            for name in re.findall(r"from ehr_sequencing\.(\w+) import", source(cell)):
                # the command imports the benchmark inside a function, which is above it too
                assert order[name] < i, f"{path.name} imports from {name}, which is not above it"


def test_notebooks_have_outputs_and_no_errors():
    for path in NOTEBOOKS:
        code = [c for c in cells(path) if c["cell_type"] == "code"]
        assert any(c["outputs"] for c in code), f"{path.name} has no stored output"
        for c in code:
            assert not any(o["output_type"] == "error" for o in c["outputs"]), f"{path.name}: {source(c)[:60]}"


def test_every_chapter_is_in_the_sidebar_and_the_index():
    sidebar, index = (ROOT / "_quarto.yml").read_text(), (ROOT / "nbs" / "index.ipynb").read_text()
    for path in [*CHAPTERS, *TUTORIALS, PAGES[1]]:
        assert path.name in sidebar and path.name in index
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink() and (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_import_cells_hold_nothing_else():
    "The docs build executes every cell with an import, so code beside an import would run without what it needs."
    for path in NOTEBOOKS:
        for cell in cells(path):
            text = source(cell)
            if cell["cell_type"] != "code" or "#| export" in text: continue
            statements = ast.parse(text).body
            imports = [node for statement in statements for node in ast.walk(statement) if isinstance(node, (ast.Import, ast.ImportFrom))]
            assert len(imports) in (0, len(statements)) or "nbdev_export()" in text, f"{path.name}: {text[:80]}"
