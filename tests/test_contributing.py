"""CONTRIBUTING is followed word for word in a copy of the repository."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)(?: ([^\n`]+))?\n(.*?)^```$", re.M | re.S)


OFFERED = """
from kimi_nb.lab import Picker
def buttons(widget):
    if type(widget).__name__ == "ToggleButton": print("offers", widget.description)
    for child in getattr(widget, "children", ()): buttons(child)
buttons(Picker(only=["model.norm.kind"]).widget)
"""


def recipes() -> dict[str, list[tuple[str, str, str]]]:
    """Title of a recipe -> its blocks (language, what it is for, text) in order."""
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Adding things")[2].partition("\n## ")[0]
    parts = re.split(r"^### (.+)$", text, flags=re.M)[1:]
    return {
        title: [(m[1], (m[2] or "").strip(), m[3]) for m in BLOCK.finditer(body)]
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


def whole_notebook(text: str) -> dict:
    """The notebook of a block whose cells are divided by `# %%`."""
    cells = []
    for i, part in enumerate(re.split(r"^# %%", text, flags=re.M)[1:]):
        kind, _, body = part.partition("\n")
        cell = dict(cell_type="code", id=f"toy-{i:02d}", metadata={}, execution_count=None, outputs=[])
        if "markdown" in kind:
            cell = dict(cell_type="markdown", id=f"toy-{i:02d}", metadata={})
            body = re.sub(r"^# ?", "", body, flags=re.M)
        cells.append(cell | dict(source=body.strip("\n").splitlines(keepends=True)))
    spec = dict(display_name="python3", language="python", name="python3")
    return dict(cells=cells, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)


class Copy:
    """A copy of the checkout, and what CONTRIBUTING tells one to do in it."""

    def __init__(self, folder: Path):
        self.root = folder / "kimi_nb_copy"
        skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.egg-info", "cache")
        for name in ("nbs", "kimi_nb", "docs", "data", "figures", "examples", "tests"):
            if (REPO / name).is_dir():
                shutil.copytree(REPO / name, self.root / name, ignore=skip)
        for path in REPO.iterdir():
            if path.is_file() and not path.name.startswith("."):
                shutil.copy(path, self.root)
        cache = REPO / "data" / "cache"
        self.env = os.environ | dict(
            PYTHONPATH=str(self.root),
            OMP_NUM_THREADS="1",
            KIMI_NB_CACHE=str(cache if cache.is_dir() else self.root / "data" / "cache"),
        )
        for name in ("KIMI_NB_RESULTS", "KIMI_NB_SETTINGS", "IN_TEST"):
            self.env.pop(name, None)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=540, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def shell(self, line: str) -> str:
        """A command as CONTRIBUTING writes it, with this environment's programs in the place of .venv/bin."""
        program, *arguments = shlex.split(line)
        bin_folder = Path(sys.executable).parent
        if (program, arguments) == ("make", ["export"]):
            return self.run(str(bin_folder / "nbdev-export"))
        assert program.startswith(".venv/bin/"), f"CONTRIBUTING runs {program}, which this test does not know"
        if program.endswith("/kimi-nb"):
            return self.run(
                sys.executable,
                "-c",
                "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))",
                *arguments,
            )
        return self.run(str(bin_folder / Path(program).name), *arguments)

    def python(self, code: str) -> str:
        return self.run(sys.executable, "-c", code)

    def apply(self, kind: str, where: str, text: str) -> None:
        name, _, place = where.partition(" ")
        path = self.root / name
        if not name.endswith(".ipynb"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if place == "new":
            assert not path.exists(), f"CONTRIBUTING makes {name}, which is there"
            path.write_text(json.dumps(whole_notebook(text), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        notebook = json.loads(path.read_text(encoding="utf-8"))
        sources = ["".join(c["source"]) for c in notebook["cells"]]
        if kind == "diff":
            lines = text.splitlines()
            old = "\n".join(line[1:] for line in lines if line[:1] in "- ")
            new = "\n".join(line[1:] for line in lines if line[:1] in "+ ")
            found = [i for i, s in enumerate(sources) if old in s]
            assert len(found) == 1, f"{len(found)} cells of {name} hold the lines that CONTRIBUTING changes:\n{old}"
            assert sources[found[0]].count(old) == 1
            notebook["cells"][found[0]]["source"] = sources[found[0]].replace(old, new).splitlines(keepends=True)
        else:
            side, target = place.split()
            found = [i for i, s in enumerate(sources) if re.search(rf"^(def|class) {target}\b", s, re.M)]
            assert len(found) == 1, f"{len(found)} cells of {name} define {target}"
            cell = dict(
                cell_type="code",
                execution_count=None,
                id=f"toy-{len(sources)}",
                metadata={},
                outputs=[],
                source=text.rstrip("\n").splitlines(keepends=True),
            )
            notebook["cells"].insert(found[0] + (side == "after"), cell)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def follow(self, title: str) -> str:
        """Apply every block of a recipe and run every command; what the commands printed."""
        said = []
        for kind, where, text in recipes()[title]:
            if kind == "sh":
                said += [self.shell(line) for line in text.splitlines() if line.strip()]
            else:
                self.apply(kind, where, text)
        return "\n".join(said)


def test_recipes_name_notebooks_and_cells_that_exist():
    """The quick half: every file, line and definition that CONTRIBUTING tells one to change is there."""
    assert set(recipes()) >= {"A component", "A phase", "A task", "A corpus"}
    for title, blocks in recipes().items():
        for kind, where, text in blocks:
            name, _, place = where.partition(" ")
            if not name.endswith(".ipynb") or place == "new":
                continue
            sources = ["".join(c["source"]) for c in json.loads((REPO / name).read_text(encoding="utf-8"))["cells"]]
            wanted = (
                "\n".join(line[1:] for line in text.splitlines() if line[:1] in "- ")
                if kind == "diff"
                else f"def {place.split()[1]}"
            )
            assert sum(wanted in s for s in sources) == 1, f"{title}: {name} has no one cell with\n{wanted}"


def test_commands_in_the_documents_are_commands():
    """Every `kimi-nb …` line of README, CONTRIBUTING and the how-to pages is accepted by the parser."""
    from kimi_nb.cli import build_parser

    pages = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "nbs" / "howto").glob("*.ipynb"))]
    seen = 0
    for path in pages:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
        for block in (m[3] for m in BLOCK.finditer(text) if m[1] in ("sh", "yaml") and not m[2]):
            for found in re.finditer(
                r"(?<![\w/-])(?:\.venv/bin/)?kimi-nb ((?:\"[^\"]*\"|[^#\n&|;\"])+)", block.replace("\\\n", " ")
            ):
                if (
                    found[1].strip().startswith("#")
                    or "image:" in block[block.rfind("\n", 0, found.start()) + 1 : found.start()]
                ):
                    continue
                arguments = shlex.split(found[1])
                try:
                    build_parser().parse_args(arguments)
                except SystemExit as end:
                    assert not end.code, f"{path.name}: kimi-nb {shlex.join(arguments)} is refused by the command line"
                seen += 1
    assert seen > 20


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_following_contributing_adds_a_norm_a_phase_a_task_and_a_corpus(tmp_path):
    """A toy norm and a toy phase, made by the letter, appear in the picker, the plan, the site and the paper."""
    copy = Copy(tmp_path)
    said = copy.follow("A component")
    assert "done: run" in said
    assert "offers meanabs" in copy.python(OFFERED), "the workbench's picker does not offer the new norm"
    said = copy.follow("A phase")
    assert "toy" in said and (copy.root / "results" / "phases" / "smoke" / "toy.json").is_file()
    assert "toy" in copy.shell(".venv/bin/kimi-nb plan --profile quick --dry-run")
    assert "opposites" in copy.follow("A task")
    assert "sums as byte" in copy.follow("A corpus")
    site = copy.root / "site"
    copy.run(sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "auto", "-c", "docs", "nbs", str(site))
    page = next(site.glob("phases/*_toy.html")).read_text(encoding="utf-8")
    assert "No reference run of the profile" in page
    assert "mean_abs_norm" in (site / "howto" / "api.html").read_text(encoding="utf-8")
    copy.shell(".venv/bin/kimi-nb report --results results --out paper")
    papers = [p.read_text(encoding="utf-8") for p in (copy.root / "paper").rglob("*") if p.suffix in (".md", ".html")]
    assert any("toy" in text.lower() for text in papers), "the paper has no section on the new phase"
