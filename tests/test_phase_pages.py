"""Phase pages: the answer first, a sentence below each output, three changes to try, no word that is not earned."""

import ast
import json
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PHASES = sorted((REPO / "nbs" / "phases").glob("[0-9]*.ipynb"))
PAGES = [*PHASES, REPO / "nbs" / "_templates" / "phase.ipynb"]
SHOWS = re.compile(
    r"tables\.kept\(|plots\.save\(|display\(|plots\.table\(|\.to_frame\(\)\s*$|^noise$|^power$|^clips$", re.M
)


def cells_of(path: Path) -> list[dict]:
    """Cells with their source as one text, without the line that says when nbdev tests them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"]).removeprefix("#| slow\n")} for c in cells]


def hidden(cell: dict) -> bool:
    return bool(re.match(r"#\s*\|\s*(hide|default_exp|export)", cell["source"]))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_phase_opens_with_its_answer_and_ends_with_changes_to_try(path):
    """The box stands right below the title, is filled when the outcome is recorded, and three exercises follow it."""
    cells = cells_of(path)
    assert [c["cell_type"] for c in cells[:3]] == ["markdown", "code", "code"]
    assert cells[1]["metadata"]["tags"] == ["parameters"] and "answer_at_top(" in cells[2]["source"]
    recorded = next(i for i, c in enumerate(cells) if re.search(r"^outcome = record_outcome\(", c["source"], re.M))
    told = next(i for i, c in enumerate(cells) if c["source"] == "on_top.tell(outcome)")
    assert recorded < told < len(cells) - 1
    assert cells[told + 1]["source"].startswith("## Change this and run again")
    assert all(hidden(c) for c in cells[told + 2 :]), "something stands below the exercises"
    assert len(re.findall(r"^\d\. ", cells[told + 1]["source"], re.M)) == 3


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_output_is_read_aloud(path):
    """Below each table and figure of the results stands what to see in it, from its numbers or on how to look."""
    cells = [c for c in cells_of(path) if not hidden(c)]
    start = (
        next(i for i, c in enumerate(cells) if "run_studies(mine, store)" in c["source"])
        if "10_stats" not in path.name
        else 0
    )
    silent = []
    for cell, below in zip(cells[start:], [*cells[start + 1 :], None], strict=True):
        if cell["cell_type"] != "code" or "record_outcome(" in cell["source"] or not SHOWS.search(cell["source"]):
            continue
        if "open_phase(" in cell["source"] or "reading" in cell["metadata"].get("tags", ()):
            continue
        read = below is not None and (
            below["source"].startswith("*How to read it.*") or "reading" in below["metadata"].get("tags", ())
        )
        if not read:
            silent.append(cell["source"][:80])
    assert silent == []


def exercises(path: Path) -> list[str]:
    """The code of a page's exercises."""
    text = next(c["source"] for c in cells_of(path) if c["source"].startswith("## Change this"))
    return [
        "\n".join(line[3:] for line in block.splitlines())
        for block in re.findall(r"```python\n(.*?)   ```", text, re.S)
    ]


def given(plan, tried) -> dict:
    """What an exercise may use."""
    from kimi_nb.phases.combined import FACTORS, cell_delta

    def try_change(plan, store, change, start=None, seeds=0):
        return tried(plan, change, start, seeds)

    return dict(plan=plan, store=None, try_change=try_change, cell_delta=cell_delta, FACTORS=FACTORS)


@pytest.mark.parametrize("path", PHASES, ids=lambda p: p.stem)
@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_every_exercise_is_possible(path, profile):
    """Each asks for a change that exists and is allowed; the one of a pair is another run than the other."""
    from kimi_nb.config import load_profile
    from kimi_nb.plan import change_study

    plan, asked = load_profile(profile), exercises(path)
    assert len(asked) == 3
    for source in asked:
        study = eval(compile(source, path.name, "eval"), given(plan, change_study))
        assert len(study.arms) == 2 and len({p.run for p in study.expand()}) == 2 * len(study.seeds)
        names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
        assert names <= {"try_change", "plan", "store", "cell_delta", "tuple", "FACTORS"}


@pytest.mark.slow
def test_an_exercise_answers_in_a_box(tmp_path):
    """A change is trained beside the base run in a store of its own, and the answer of a short profile is held back."""
    from kimi_nb.config import load_profile
    from kimi_nb.plan import try_change
    from kimi_nb.study import Store

    box = try_change(load_profile("smoke"), Store(tmp_path), {"model.norm.kind": "rmsnorm"})
    assert "decides nothing" in box.html and "not testable here" in box.html and "bits/byte" in box.html
    assert not (tmp_path / "runs").exists() and (tmp_path / "tries").is_dir()


def shown(path: Path) -> list[tuple[str, str]]:
    """(source, what it showed) of every cell of an executed notebook."""
    found = []
    for cell in cells_of(path):
        texts = [output.get("text", "") for output in cell.get("outputs", ())]
        for output in cell.get("outputs", ()):
            texts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
        found.append((cell["source"], "\n".join("".join(t) for t in texts)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["norm", "combined"])
def test_a_page_of_a_profile_that_decides_nothing_says_so_and_shows_no_word(tmp_path, phase):
    """Executed with smoke, the page opens with a banner, and no output calls anything supported or contradicted.

    Its results folder has braces in its name, which papermill takes for parameters.
    """
    from kimi_nb.config import load_profile
    from kimi_nb.plan import execute_phase, pick_phases
    from kimi_nb.study import Store

    notebook, results = pick_phases([phase])[phase], tmp_path / "results {a}"
    execute_phase(phase, notebook, Store(results), load_profile("smoke"))
    pages = shown(results / "notebooks" / notebook.name)
    top = next(text for source, text in pages if "answer_at_top(" in source)
    assert "decides nothing" in top and "not testable here" in top, "the box on top was not filled"
    unguarded = [s[:60] for s, text in pages if re.search(r"\b(supported|contradicted|undecided)\b", text)]
    assert unguarded == []
