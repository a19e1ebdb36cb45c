"""The how-to pages: what they tell a reader to type is what the programs take."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from kimi_nb.cli import build_parser
from kimi_nb.config import load_profile
from kimi_nb.report import HOWTO

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted((REPO / "nbs" / "howto").glob("*.ipynb"))


def prose(path):
    """The text cells of a notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]


def blocks(path, language):
    """The fenced blocks of a page in a language."""
    return [block for text in prose(path) for block in re.findall(rf"```{language}\n(.*?)```", text, re.S)]


def commands(path):
    """Every `kimi-nb` call of a page as its arguments; places to be filled in stay as they are."""
    found = []
    for block in blocks(path, "sh"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            places = [i for i, word in enumerate(words) if Path(word).name == "kimi-nb"]
            if places and not line.lstrip().startswith(("#", "$")):
                rest = words[places[0] + 1 :]
                ends = [i for i, word in enumerate(rest) if word in ("&&", "|", ">", ";", "&")]
                found.append(rest[: ends[0]] if ends else rest)
    return found


def test_the_pages_that_were_asked_for_are_there():
    """Training, architecture, benchmarks, OpenWebText, thanks: in the order of the list, on the site."""
    wanted = ["training", "openwebtext", "benchmarking", "architecture", "published_claims", "thanks"]
    assert [name for name in HOWTO if name in wanted] == wanted
    assert set(wanted) <= {path.stem for path in PAGES}
    assert {path.stem for path in PAGES} >= set(HOWTO)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_are_those_of_the_parser(path, monkeypatch, tmp_path):
    """Each command is parsed by the real parser; a misspelt option or a removed command fails here."""
    parser = build_parser()
    for words in commands(path):
        try:
            parser.parse_args(words)
        except SystemExit as end:
            assert end.code == 0, f"kimi-nb {shlex.join(words)}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_python_of_a_page_is_python(path):
    """Blocks that are not executed at least parse, and import what is there."""
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("kimi_nb"):
                exec(ast.unparse(node), {})


def test_the_profile_of_a_page_can_be_loaded(tmp_path):
    """A section of settings.ini that a page shows is one."""
    shown = blocks(REPO / "nbs" / "howto" / "openwebtext.ipynb", "ini")
    file = tmp_path / "settings.ini"
    file.write_text((REPO / "settings.ini").read_text(encoding="utf-8") + "\n" + "\n".join(shown), encoding="utf-8")
    base = load_profile("web", file).base
    assert (base.data.corpus, base.data.num_documents, base.train.steps) == ("openwebtext", 10000, 2000)
