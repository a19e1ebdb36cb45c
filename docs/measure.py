"""How the code reads, beside the codebases it learns from: `python docs/measure.py`, for orientation only.

Lines that are blank or comments are left out, and in exported modules nbdev's own lines as well. The figures of the
others were measured in the same way on their own files, once; nothing fails for being above them.
"""

import ast
import json
import statistics
from itertools import chain
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Lines(NamedTuple):
    """What a body of code looks like, line by line."""

    name: str
    lines: int  # neither blank nor comment
    mean: float  # characters a line
    over_100: float  # share of the lines
    over_120: float
    nested: float  # comprehensions inside comprehensions, for 1000 lines


class Cells(NamedTuple):
    """What the exported cells of a body of notebooks look like."""

    name: str
    cells: int
    median: float  # lines
    ninth: float  # lines of the cell that a tenth exceed
    largest: int
    words: float  # of prose for a line that is exported


# Measured on their own files with these definitions; the reading that chose them is in the project's design notes.
OTHER_LINES = (
    Lines("fastcore", 6333, 52, 0.075, 0.031, 1.6),
    Lines("miniai", 1091, 42, 0.023, 0.005, 1.8),
    Lines("nanochat", 4507, 50, 0.064, 0.023, 0.2),
    Lines("modded-nanogpt", 4212, 47, 0.047, 0.015, 0.9),
    Lines("torchtitan", 44988, 40, 0.003, 0.0, 0.5),
    Lines("lm-evaluation-harness", 19038, 42, 0.014, 0.006, 0.8),
    Lines("OLMo-core", 46412, 41, 0.013, 0.002, 0.8),
)
OTHER_CELLS = (Cells("fastcore", 672, 7, 17, 52, 3.6), Cells("miniai", 86, 7, 20, 47, 7.1))


def code_lines(text: str) -> list[str]:
    """Lines that are neither blank nor a comment."""
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def written_by_hand(text: str) -> str:
    """A module without the list of exports that nbdev writes."""
    start, end = text.find("\n# %% auto"), text.find("\n# %% ../")
    return text if min(start, end) < 0 else text[:start] + text[end:]


def nested_comprehensions(text: str) -> int:
    """Comprehensions that stand inside another one."""
    found = 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, COMPREHENSIONS):
            inside = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
            found += len(inside) > 1
    return found


def measured_lines(name: str, paths: list[Path]) -> Lines:
    """The figures of some modules."""
    texts = [written_by_hand(path.read_text(encoding="utf-8")) for path in paths]
    widths = [len(line) for text in texts for line in code_lines(text)]
    nested = sum(map(nested_comprehensions, texts))
    over = [sum(width > limit for width in widths) / len(widths) for limit in (100, 120)]
    return Lines(name, len(widths), statistics.mean(widths), *over, 1000 * nested / len(widths))


def measured_cells(name: str, notebooks: list[Path]) -> Cells:
    """The figures of some notebooks."""
    sizes, words = [], 0
    for notebook in notebooks:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                words += len(source.split())
            elif source.startswith(("#| export\n", "#| exporti\n", "#|export\n")):
                sizes.append(len(code_lines(source)))
    ninth = statistics.quantiles(sizes, n=10)[-1] if len(sizes) > 1 else sizes[0]
    return Cells(name, len(sizes), statistics.median(sizes), ninth, max(sizes), words / sum(sizes))


def line_table(rows) -> list[str]:
    """A heading and a line for each body of code."""
    text = [f"{'modules':24}{'lines':>8}{'chars/line':>12}{'>100':>8}{'>120':>8}{'nested/1000':>13}"]
    for row in rows:
        shares = f"{row.over_100:8.1%}{row.over_120:8.1%}"
        text.append(f"{row.name:24}{row.lines:8,}{row.mean:12.0f}{shares}{row.nested:13.1f}")
    return text


def cell_table(rows) -> list[str]:
    """A heading and a line for each body of notebooks."""
    text = [f"{'exported cells':24}{'cells':>8}{'median':>8}{'90%':>8}{'largest':>9}{'words/line':>12}"]
    for row in rows:
        sizes = f"{row.median:8.0f}{row.ninth:8.0f}{row.largest:9}"
        text.append(f"{row.name:24}{row.cells:8,}{sizes}{row.words:12.1f}")
    return text


def wings() -> list[str]:
    """Folders of notebooks that export a wing of the package."""
    return sorted(p.name for p in (REPO / "nbs").iterdir() if (REPO / "kimi_nb" / p.name / "__init__.py").is_file())


def report() -> str:
    """Package and wings beside the others."""
    modules = {wing: sorted((REPO / "kimi_nb" / wing).glob("[a-z]*.py")) for wing in wings()}
    notebooks = {wing: sorted((REPO / "nbs" / wing).glob("[0-9]*.ipynb")) for wing in wings()}
    lines = [measured_lines("kimi_nb", list(chain(*modules.values())))]
    lines += [measured_lines(f"  {wing}", paths) for wing, paths in modules.items()]
    cells = [measured_cells("kimi_nb", list(chain(*notebooks.values())))]
    cells += [measured_cells(f"  {wing}", paths) for wing, paths in notebooks.items()]
    return "\n".join([*line_table([*lines, *OTHER_LINES]), "", *cell_table([*cells, *OTHER_CELLS])])


if __name__ == "__main__":
    print(report())
