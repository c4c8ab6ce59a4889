"Write README.md from nbs/index.ipynb, without Quarto: python tools/readme.py"
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent


def render():
    "README.md as text: the notebook's cells and outputs, without hidden cells and nbdev's directives."
    notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # for the fences of code
    shown = []
    for cell in notebook.cells:
        directives = re.findall(r"^#\|\s*(\S+)", cell.source, flags=re.M)
        if cell.cell_type == "code" and "hide" in directives: continue
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        shown.append(cell)
    notebook.cells = shown
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"\]\(((?:tutorials/)?\w+\.ipynb|images/\w+\.png)\)", r"](nbs/\1)", text)  # chapters, tutorials and pictures lie in nbs/
    text = text.replace("https://github.com/ehr-sequencing/ehr_sequencing/blob/main/", "")  # and the rest beside the README
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    (root / "README.md").write_text(render(), encoding="utf-8")
    print("README.md written")
