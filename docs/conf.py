"""Sphinx configuration: the pages are the notebooks in nbs/, read as they are and tidied on the way in.

No notebook is changed and no page is written by hand. While a notebook is read, nbdev's directive lines are taken off,
cells marked hidden are left out, and the exported names are listed below it as an API reference made from their
signatures and the comments beside their parameters. Library notebooks are not executed. Phase notebooks show what they
showed in the published reference run (KIMI_NB_SITE_PROFILE names its profile, quick without it), so no page trains its
models again; where other profiles are published too, a section below says what they found. The how-to pages are
executed, because what they show is computed in seconds; one that takes longer than KIMI_NB_SITE_LIMIT seconds (600
without it) says so and costs the site nothing but its results. What no notebook holds, the landing page, the cards, the
figures to touch and the command line, is made by pages.py.
"""

import ast
import atexit
import base64
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
NBS = REPO / "nbs"
sys.path[:0] = [str(REPO), str(REPO / "docs")]

import pages

from kimi_nb import __version__
from kimi_nb.lab import trailing_comments
from kimi_nb.plan import published as published_store
from kimi_nb.plan import published_profiles, read_bundle, where_from
from kimi_nb.report import (
    CHAPTERS,
    Evidence,
    advise,
    at_size,
    claims_markdown,
    claims_of,
    counts_words,
    course,
    howto_pages,
    main_figures,
    parts_seen,
    read_lesson,
    what_ran,
)
from kimi_nb.stats import answer_box
from kimi_nb.study import declared_apart

project = "kimi_nb"
author = "The kimi_nb authors"
copyright = author
extensions = ["myst_nb"]
root_doc = "index"
exclude_patterns = ["**.ipynb_checkpoints", "llms.txt", "_*", "**/_*"]
templates_path = ["_templates"]

html_theme = "pydata_sphinx_theme"
html_title = "kimi_nb"
html_static_path = ["_static"]
html_css_files = ["kimi_nb.css"]
html_js_files = ["kimi_nb.js", "kimi_figures.js"]
html_favicon = "_static/favicon.svg"
html_show_sourcelink = False
html_copy_source = False
PROFILE = os.environ.get("KIMI_NB_SITE_PROFILE", "quick")
version = release = __version__
REPOSITORY = pages.repository(REPO)
html_theme_options = {
    "navigation_with_keys": False,
    "navbar_center": ["doors.html"],
    "navbar_persistent": [],
    "navbar_end": ["search-button-field", "theme-switcher", "navbar-icon-links"],
    "icon_links": [{"name": "Repository", "url": REPOSITORY, "icon": "fa-brands fa-github"}] if REPOSITORY else [],
    "footer_start": ["copyright"],
    "footer_end": ["about.html"],
    "secondary_sidebar_items": {"index": [], "**": ["page-toc"]},
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "**": ["course.html"]}
PAPERS = {"paper.pdf": "Paper", "slides.pdf": "Slides"}  # that `make release` writes
html_extra_path = sorted(str(f) for end in PAPERS for f in (REPO / "dist").glob(f"kimi_nb-{PROFILE}-{end}"))
html_context = {
    "default_mode": "auto",
    "papers": {Path(file).name: PAPERS[file.rpartition("-")[2]] for file in html_extra_path},
    "release": release,
    "repository": REPOSITORY,
}

myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `executed` does it, so that a slow page is no error
COLLECTED = {NBS / "index.ipynb", *(NBS / "howto" / f"{name}.ipynb" for name in ("api", "command_line"))}  # by pages.py
EXECUTED = set((NBS / "howto").glob("*.ipynb")) - COLLECTED
LIMIT = float(os.environ.get("KIMI_NB_SITE_LIMIT", "600"))  # seconds of a cell
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Code", "Hide the code"
nb_render_markdown_format = "myst"


# --- what pages load: from npm, once, where npm is at hand; else from the public addresses ----------------------------

VENDOR = REPO / "docs" / "_static" / "vendor"
NPM = ["npm", "pack", "--silent", "--prefer-offline", "--fetch-retries=0", "--fetch-timeout=20000"]
failed: list[str] = []  # without a network, one package is asked for, not three


def vendored(name: str, package: str, wanted: dict[str, str]) -> bool:
    """Whether files of an npm package (path in it -> name) are in _static/vendor/`name`; fetched when they are not."""
    target = VENDOR / name
    if not all((target / new).exists() for new in wanted.values()) and not failed and shutil.which("npm"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run([*NPM, package], cwd=folder, check=True, capture_output=True, timeout=60)
                with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                    archive.extractall(folder, filter="data")
                part = target.with_name(f"{name}.part")
                shutil.rmtree(part, ignore_errors=True)
                for old, new in wanted.items():
                    source = Path(folder) / "package" / old
                    (part / new).parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if source.is_dir() else shutil.copy)(source, part / new)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(part, target)
            except (OSError, subprocess.SubprocessError, StopIteration, tarfile.TarError) as problem:
                failed.append(package)
                print(
                    f"no local {package} ({type(problem).__name__}): pages that need it need a network", file=sys.stderr
                )
    return all((target / new).exists() for new in wanted.values())


if vendored(
    "mathjax",
    "mathjax@3",
    {f"es5/{n}": n for n in ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions")},
):
    mathjax_path = "vendor/mathjax/tex-mml-chtml.js"
local = vendored("requirejs", "requirejs@2.3", {"require.js": "require.js"})
if vendored("widgets", "@jupyter-widgets/html-manager@1.0", {"dist/embed-amd.js": "embed-amd.js"}) and local:
    nb_ipywidgets_js = {"vendor/requirejs/require.js": {}, "vendor/widgets/embed-amd.js": {}}

# kernels that pages are executed with: quiet, and one thread each, since pages are read side by side
os.environ["IPYTHONDIR"] = tempfile.mkdtemp(prefix="kimi_nb-ipython-")
(Path(os.environ["IPYTHONDIR"]) / "profile_default").mkdir()
(Path(os.environ["IPYTHONDIR"]) / "profile_default" / "ipython_kernel_config.py").write_text(
    "c.IPKernelApp.log_level = 40\n", encoding="utf-8"
)
atexit.register(shutil.rmtree, os.environ["IPYTHONDIR"], ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")


# --- notebooks on their way in -----------------------------------------------------------------------------------

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\w+):?\s*(.*?)\s*$")
HIDDEN = {"hide", "default_exp", "exporti"}


def tidy(cell: dict, folder: Path) -> dict | None:
    """The cell of a notebook in `folder` without nbdev's directive lines, or None where it is not for readers."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        # links out of nbs/ have no page here; pictures keep theirs
        inside = lambda target: (folder / target.partition("#")[0]).resolve().is_relative_to(NBS)
        return cell | {
            "source": re.sub(r"(?<!!)\[([^\]]*)\]\((\.\./[^)]*)\)", lambda m: m[0] if inside(m[2]) else m[1], source)
        }
    directives, lines = {}, []
    for line in source.splitlines():
        match = DIRECTIVE.match(line)
        if match and not any(kept.strip() for kept in lines):
            directives[match[1]] = match[2]
        else:
            lines.append(line)
    text = "\n".join(lines).strip("\n")
    if HIDDEN & directives.keys() or directives.get("include") == "false" or not text:
        return None
    tags = [t for t in cell["metadata"].get("tags", []) if t.startswith(("remove-", "hide-"))]
    tags += ["remove-input"] if directives.get("echo") == "false" else []
    return cell | {"source": text, "metadata": {"tags": tags}}


def described(kind: str, name: str, node: ast.AST, notes: dict[int, str], depth: int = 0) -> list[str]:
    """A MyST directive for a function or class, its parameters explained by the comments beside them."""
    function = node
    if isinstance(node, ast.ClassDef):
        function = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    arguments, fields = "", []
    if function is not None:
        spec = function.args
        everything = [
            *spec.posonlyargs,
            *spec.args,
            *filter(None, [spec.vararg]),
            *spec.kwonlyargs,
            *filter(None, [spec.kwarg]),
        ]
        for a in everything:
            if a.arg in ("self", "cls"):
                spec.args = [x for x in spec.args if x is not a]
            elif notes.get(a.end_lineno):
                fields.append(f":param {a.arg}: {notes[a.end_lineno]}")
        arguments = f"({ast.unparse(spec)})"
        if not isinstance(node, ast.ClassDef) and node.returns is not None:
            arguments += f" -> {ast.unparse(node.returns)}"
    if function is not None and not isinstance(node, ast.ClassDef):
        ends = [a.end_lineno for a in ast.walk(function.args) if isinstance(a, ast.arg)]
        result = next(
            (notes[n] for n in range(max(ends, default=node.lineno - 1) + 1, node.body[0].lineno) if n in notes), ""
        )
        fields += [f":returns: {result}"] if result else []
    fence = ":" * (6 - depth)
    doc = [re.sub(r"^(Raises|Source):", r"\n**\1**:", line) for line in (ast.get_docstring(node) or "").splitlines()]
    body = [*doc, "", *fields]
    if isinstance(node, ast.ClassDef):
        body += [
            f"- `{ast.unparse(n.target)}: {ast.unparse(n.annotation)}{f' = {ast.unparse(n.value)}' if n.value else ''}`"
            + (f": {notes[n.end_lineno]}" if notes.get(n.end_lineno) else "")
            for n in node.body
            if isinstance(n, ast.AnnAssign) and not ast.unparse(n.target).startswith("_")
        ]
        for n in node.body:
            if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and ast.get_docstring(n):
                decorators = {ast.unparse(d) for d in n.decorator_list}
                body += [
                    "",
                    *described("property" if "property" in decorators else "method", n.name, n, notes, depth + 1),
                ]
    head = f"{name}{arguments}" if kind != "property" else name
    return [f"{fence}{{py:{kind}}} {head}", *body, fence, ""]


def exports(module: str) -> tuple[ast.Module, list[str], dict[int, str]]:
    """A module's syntax tree, the names it exports and its comments; nothing is imported."""
    path = REPO / "kimi_nb" / (module.replace(".", "/") + ".py")
    if not path.exists():
        return ast.Module([], []), [], {}
    code = path.read_text(encoding="utf-8")
    parsed = ast.parse(code)
    names = next(
        (
            ast.literal_eval(n.value)
            for n in parsed.body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
        ),
        [],
    )
    return parsed, names, trailing_comments(code)


def reference(module: str) -> str:
    """Markdown that describes what a module exports."""
    parsed, exported, notes = exports(module)
    if not exported:
        return ""
    lines = [
        "## Reference",
        "",
        f"Everything `kimi_nb.{module}` exports.",
        "",
        f":::{{py:module}} kimi_nb.{module}",
        ":::",
        "",
    ]
    described_names = set()
    for node in parsed.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exported:
            described_names.add(node.name)
            lines += described("class" if isinstance(node, ast.ClassDef) else "function", node.name, node, notes)
    values = [f"`{name}`" for name in exported if name not in described_names]
    return "\n".join([*lines, *([f"Values: {', '.join(values)}."] if values else [])])


def toctree(caption: str, notebooks: list[Path]) -> str:
    names = [p.relative_to(NBS).with_suffix("").as_posix() for p in notebooks]
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", ""])


# --- results of the published reference run ------------------------------------------------------------------------


@functools.cache
def published(profile: str = PROFILE) -> tuple[dict, dict[str, bytes]]:
    """What the reference run left, checked; nothing where none of this profile is published."""
    return read_bundle(profile, REPO) if profile in published_profiles(REPO) else ({}, {})


def meaning(source: str) -> str:
    """What a cell does, whatever its layout, comments and import lines are; the text itself where it is not Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source.strip()
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                kept = [s for s in statements if not isinstance(s, ast.Import | ast.ImportFrom)]
                setattr(node, field, kept)
    return "\n".join(ast.dump(node) for node in tree.body)


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shows(source: str) -> bool:
    """Whether a cell ends in an expression, so that it would show something."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic line
        return True
    return bool(body) and isinstance(body[-1], ast.Expr)


def restore(notebook: dict, executed: dict) -> int:
    """Give cells the outputs of an executed copy where they still do the same; how many visible ones have changed."""
    ran = code_cells(executed)
    by_id, by_meaning = {c["id"]: c for c in ran}, {meaning("".join(c["source"])): c for c in ran}
    changed = 0
    for cell in code_cells(notebook):
        now = meaning("".join(cell["source"]))
        if now in by_meaning:
            cell["outputs"] = by_meaning[now]["outputs"]
        elif {"answer", "reading"} & set(cell["metadata"].get("tags", ())):
            continue  # shown without their code, so nothing is missing where they have nothing to say
        elif now and tidy(cell, NBS / "phases"):
            former = by_id.get(cell.get("id"))
            changed += bool(former["outputs"]) if former else shows("".join(cell["source"]))
    return changed


def shown_profile(phase: str) -> str:
    """Whose results a phase's page shows below its answer: those of `PROFILE`, else of the largest that has them."""
    held = published_profiles(REPO, phase)
    return PROFILE if PROFILE in held or not held else held[-1]


def with_results(notebook: dict, name: str) -> None:
    """Give the cells of a phase notebook what they showed in the reference run, where they are still the same."""
    profile = shown_profile(name.partition("_")[2])
    about, files = published(profile)
    executed = files.get(f"data/records/{profile}/notebooks/{name}.ipynb")
    if executed is None:
        title = "No results here"
        note = f"No reference run of the profile `{PROFILE}` is published for this phase: "
        note += f"run `kimi-nb plan --profile {PROFILE} --only {name.partition('_')[2]}` to see its results."
    else:
        title, note = "Results of the published reference run", where_from(about)
        changed = restore(notebook, json.loads(executed))
        if changed:
            verbs = ("s have", "are") if changed > 1 else (" has", "is")
            note += f" {changed} cell{verbs[0]} been edited since and {verbs[1]} shown without results."
    source = f":::{{admonition}} {title}\n:class: note reference-run\n{note}\n:::"
    notebook["cells"].insert(1, {"cell_type": "markdown", "id": "where-from", "metadata": {}, "source": source})


@functools.cache
def evidence(profile: str) -> Evidence:
    """Records and verdicts of a published profile."""
    return Evidence(published_store(profile, REPO))


def other_sizes(phase: str) -> list[dict]:
    """Cells about what the other published profiles say on a phase; none where there is no other."""
    cells, shown = [], shown_profile(phase)
    for profile in published_profiles(REPO, phase):
        if profile == shown:
            continue
        (about, files), sizes, names = published(profile), [evidence(shown), evidence(profile)], [shown, profile]
        claims = claims_of(phase, [e.outcomes.get(phase) for e in sizes])
        text = [
            f"## The same {at_size(sizes).replace('At', 'at', 1)} (profile {profile})",
            *(f"- **{n}**: {what_ran(e, [phase])}." for n, e in zip(names, sizes, strict=True)),
            "",
            where_from(about) + (f" {counts_words(claims, names)}" if claims else ""),
        ]
        cells.append({"cell_type": "markdown", "id": f"size-{profile}", "metadata": {}, "source": "\n".join(text)})
        results = [("claims", {"text/markdown": claims_markdown(claims, names)})] if claims else []
        results.append(("figures", {"text/markdown": f"The main figures of profile {profile}:"}))
        for name in main_figures(sizes[1], phase):
            results.append(
                (
                    Path(name).stem,
                    {"image/png": base64.b64encode(files[f"figures/{profile}/{Path(name).name}"]).decode()},
                )
            )
        for what, data in results:
            output = {
                "output_type": "display_data",
                "data": data | {"text/plain": f"{what}, profile {profile}"},
                "metadata": {},
            }
            cells.append(
                {
                    "cell_type": "code",
                    "id": f"size-{profile}-{what}"[:64],
                    "metadata": {"tags": ["remove-input"]},
                    "source": f"# {what}, profile {profile}",
                    "execution_count": None,
                    "outputs": [output],
                }
            )
    return cells


def executed(notebook: dict, path: Path) -> dict:
    """The notebook with what its cells showed; a cell that takes too long ends the page, not the site."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError

    node = nbformat.from_dict(notebook)
    node.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    place, late = {"metadata": {"path": str(path.parent)}}, False
    try:
        NotebookClient(node, timeout=LIMIT, kernel_name="python3", resources=place).execute()
    except CellTimeoutError:
        late = True
    made = json.loads(nbformat.writes(node))
    if late:
        note = f"A cell of this page took longer than {LIMIT:g} seconds on the machine that built the site: "
        note += "what it and the cells below it show is left out."
        warning = f":::{{admonition}} Not all results\n:class: warning\n{note}\n:::"
        made["cells"].insert(1, pages.markdown_cell("too-slow", warning))
    return made


def answer_cell(phase: str) -> dict | None:
    """The box with which a phase's page opens: the largest size's answer, which confirms, and folded the others'."""
    profiles = published_profiles(REPO, phase)[::-1]
    if not profiles:
        return None
    outcomes = declared_apart(evidence(profile).outcomes[phase] for profile in profiles)
    boxes = {profile: answer_box(outcome).html for profile, outcome in zip(profiles, outcomes, strict=True)}
    return pages.html_cell("answer", pages.largest_first(boxes, shown_profile(phase)))


def main_figure(phase: str) -> list[dict]:
    """The curves of a phase's study, to touch; where it has none, its main picture; nothing where it is unpublished."""
    profile = shown_profile(phase)
    about, files = published(profile)
    if phase not in about.get("phases", ()):
        return []
    found = evidence(profile)
    data = pages.curves_data(found, phase) if phase in found.studies else None
    if data:
        words = f"Profile {profile}. Line: mean over seeds; band: lowest to highest seed."
        return [pages.html_cell("curves", pages.figure(data) + pages.tag("p", words, cls="knb-fine"))]
    pictures = [f for f in (*main_figures(found, phase), *found.outcomes[phase].figures) if f.endswith(".png")]
    return [picture_cell(f"figures/{profile}/{Path(pictures[0]).name}", files)] if pictures else []


def picture_cell(name: str, files: dict[str, bytes]) -> dict:
    """A cell that shows a published picture."""
    data = {"image/png": base64.b64encode(files[name]).decode(), "text/plain": Path(name).stem}
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    about = {"cell_type": "code", "id": f"picture-{Path(name).stem}"[:64], "metadata": {"tags": ["remove-input"]}}
    return about | {"source": f"# {name}", "execution_count": None, "outputs": [output]}


def opened(cell: dict) -> list[dict]:
    """The first cell of a page in two: title and blurb, and what follows them."""
    source = "".join(cell["source"])
    head = re.match(r"# .+\n+(?:>.*\n?)+", source)
    if not head or not source[head.end() :].strip():
        return [cell]
    return [cell | {"source": head[0].rstrip()}, pages.markdown_cell("after-blurb", source[head.end() :].lstrip())]


def joined(cells: list[dict]) -> list[dict]:
    """Cells of code that show nothing stand in one, which is folded once."""
    kept = []
    for cell in cells:
        silent = cell["cell_type"] == "code" and not cell.get("outputs")
        before = kept[-1] if kept else None
        if silent and before and before["cell_type"] == "code" and not before.get("outputs"):
            kept[-1] = before | {"source": f"{before['source']}\n\n\n{cell['source']}"}
        else:
            kept.append(cell)
    return kept


def result_page(notebook: dict, path: Path) -> None:
    """A phase notebook as a page: its answer, its results, its curves, what other sizes say; code is folded."""
    phase = path.stem.partition("_")[2]
    with_results(notebook, path.stem)
    box = answer_cell(phase)
    cells = [cell for cell in notebook["cells"] if "answer" not in cell["metadata"].get("tags", ())]
    cells[0] = cells[0] | {"source": re.sub(r"^# ", "# Result: ", "".join(cells[0]["source"]), count=1)}
    origin = cells.pop(1)
    cells[:1] = [*opened(cells[0])[:1], *([box] if box else []), *main_figure(phase), origin, *opened(cells[0])[1:]]
    notebook["cells"] = [*cells, *other_sizes(phase)]
    fold(notebook)


def fold(notebook: dict) -> None:
    """Code is there for those who open it."""
    for cell in code_cells(notebook):
        tags = cell["metadata"].setdefault("tags", [])
        if not {"remove-input", "reading"} & set(tags):
            tags.append("hide-input")
        elif "reading" in tags:
            tags.append("remove-input")


def on_paper(notebook: dict) -> None:
    """The workbench's page: a film of it in place of the widgets, and what opens the workbench itself."""
    fold(notebook)
    how = "On this page it is a film. `make lab`, or `kimi-nb lab` in any folder, opens the workbench itself."
    first = notebook["cells"][0]
    first["source"] = re.sub(r"^.*[Rr]un the cell below.*$", how, "".join(first["source"]), flags=re.M)
    if (REPO / "figures" / "workbench.gif").is_file():
        words = "Two parts are switched on, the runs that are there already are judged, compared and found in the plan"
        notebook["cells"].insert(1, pages.markdown_cell("film", f"![{words}](../figures/workbench.gif)"))


def fold_imports(notebook: dict) -> None:
    """Cells that only import are folded."""
    for cell in code_cells(notebook):
        if not meaning("".join(cell["source"])) and not cell["metadata"].get("tags"):
            cell["metadata"]["tags"] = ["hide-input"]


def sizes_of_parts() -> dict:
    """Profile -> evidence, of every published factorial, the largest first."""
    return {profile: evidence(profile) for profile in reversed(published_profiles(REPO, "combined"))}


def links() -> pages.Markup | None:
    """Repository, paper and slides, as far as there are any."""
    found = [("Repository", REPOSITORY)] if REPOSITORY else []
    found += [(PAPERS[file.rpartition("-")[2]], Path(file).name) for file in html_extra_path]
    told = [pages.tag("a", name, href=target) for name, target in found]
    return pages.tag("p", *told, pages.tag("span", f"version {release}"), cls="knb-fine knb-links")


def first_page() -> list[dict]:
    """The landing page."""
    pictures = [embedded(f"figures/{name}.png") for name in (f"{PROFILE}/headline", "ladder/ladder-effects")]
    return pages.landing(read_lesson(NBS / "index.ipynb").blurb, sizes_of_parts(), pictures[0], links(), pictures[1])


def embedded(source: str) -> str:
    """A picture of the repository as an address that holds it; nothing where it is not there."""
    if not (REPO / source).is_file():
        return ""
    return f"data:image/png;base64,{base64.b64encode((REPO / source).read_bytes()).decode()}"


START = ("get_started", "decision_guide", "found")
QUESTIONS = (
    "training",
    "own_data",
    "openwebtext",
    "own_study",
    "someone_elses_claim",
    "own_component",
    "benchmarking",
    "cpu",
    "gpu",
    "cluster",
    "command_line",
)


def trees() -> str:
    """The list of all pages: what to begin with, the results, what to do, the course wing by wing, what to look up."""
    by_name = {path.stem: path for path in howto_pages(NBS)}
    begin = [by_name.pop(name) for name in START if name in by_name]
    do = [by_name.pop(name) for name in QUESTIONS if name in by_name]
    others = [p for p in sorted(NBS.glob("*.ipynb")) if p.stem != "index"]
    chapters = course(NBS)
    results = [lesson.path for lesson in chapters.pop(CHAPTERS["phases"])]
    found = [
        toctree("Begin", [begin[0], *others, *begin[1:]]),
        toctree("Results", results),
        toctree("Do it yourself", do),
    ]
    found.append(toctree("Look it up", list(by_name.values())))
    found += [
        toctree(f"Course: {chapter}", [lesson.path for lesson in lessons]) for chapter, lessons in chapters.items()
    ]
    return "\n".join(found)


def read(app, docname, content):
    """Sphinx's source-read event: content[0] is the notebook as text."""
    path = NBS / f"{docname}.ipynb"
    if not path.exists():
        return
    notebook = json.loads(content[0])
    modules = re.findall(r"#\|\s*default_exp\s+(\S+?)[\\\"]", content[0])
    for module in modules:
        app.env.note_dependency(str(REPO / "kimi_nb" / (module.replace(".", "/") + ".py")))
    if path.parent.name == "phases":
        for profile in {PROFILE, *published_profiles(REPO)}:
            app.env.note_dependency(str(REPO / "data" / "records" / profile / "bundle.json"))
        result_page(notebook, path)
    notebook["cells"] = [kept for kept in (tidy(c, path.parent) for c in notebook["cells"]) if kept]
    if path.parent.name == "phases":
        notebook["cells"] = joined(notebook["cells"])
    fold_imports(notebook)
    if path in EXECUTED:
        notebook = executed(notebook, path)
    extra = "\n\n".join(reference(m) for m in modules)
    if docname == "index":
        notebook["cells"], extra = first_page(), trees()
    elif docname == "howto/decision_guide":
        fold(notebook)
        advice = {p: list(map(advise, parts_seen(e.store))) for p, e in sizes_of_parts().items()}
        data = pages.effects_data(sizes_of_parts())
        cards = pages.html_cell("cards", pages.advice_cards(advice) + pages.figure(data))
        first, *rest = opened(notebook["cells"][0])
        notebook["cells"][:1] = [first, cards, *rest]
    elif docname == "workbench":
        on_paper(notebook)
    elif docname == "howto/get_started":
        for cell in notebook["cells"]:
            cell["source"] = pages.addressed("".join(cell["source"]), REPOSITORY)
    elif docname == "howto/api":
        extra = pages.api_index(course(NBS), exports, NBS)
    elif docname == "howto/command_line":
        extra = pages.command_line()
    if extra:
        notebook["cells"].append({"cell_type": "markdown", "id": "made-by-conf", "metadata": {}, "source": extra})
    content[0] = json.dumps(notebook)


def outdated(app, env, added, changed, removed):
    """Pages that are computed or collected, made anew each time; the others when what they are made from changed."""
    return sorted({p.relative_to(NBS).with_suffix("").as_posix() for p in [*EXECUTED, *COLLECTED]} & env.found_docs)


def with_folding(app, pagename, templatename, context, doctree):
    """The template that lists the pages folds their chapters."""
    context["folded_pages"] = pages.folded_pages


def setup(app):
    app.connect("html-page-context", with_folding)
    app.connect("source-read", read)
    app.connect("env-get-outdated", outdated)
    return {"parallel_read_safe": True}
