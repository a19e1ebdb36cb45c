"""Sphinx configuration: the pages are the notebooks in nbs/, read as they are and tidied on the way in.

No notebook is changed and no page is written by hand. While a notebook is read, nbdev's directive lines are taken off,
cells marked hidden are left out, and the exported names are listed below it as an API reference made from their
signatures and the comments beside their parameters. Library and phase notebooks are not executed, so no page trains
a model; index.ipynb is, because its tables are computed.
"""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
NBS = REPO / "nbs"
sys.path.insert(0, str(REPO))

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
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navigation_with_keys": False,
    "navbar_center": [],
    "navbar_persistent": [],
    "navbar_end": ["search-button-field", "theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"**": ["course.html"]}
html_context = {"default_mode": "auto"}

myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_excludepatterns = [p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb") if p.name not in ("index.ipynb", "21_promises.ipynb")]
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_render_markdown_format = "myst"


# --- formulas without a network: MathJax from npm, once, where npm is at hand; else the public address ------------


def vendored_mathjax() -> str | None:
    """Path below _static of a local MathJax, or None where npm or the network is missing."""
    vendor = REPO / "docs" / "_static" / "vendor" / "mathjax"
    if not (vendor / "tex-mml-chtml.js").exists() and shutil.which("npm"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(["npm", "pack", "--silent", "mathjax@3"], cwd=folder, check=True, capture_output=True, timeout=60)
                with tarfile.open(next(Path(folder).glob("mathjax-*.tgz"))) as archive:
                    archive.extractall(folder, filter="data")
                es5 = Path(folder) / "package" / "es5"
                part = vendor.with_name("mathjax.part")
                shutil.rmtree(part, ignore_errors=True)
                for name in ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions"):
                    target = part / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if (es5 / name).is_dir() else shutil.copy)(es5 / name, target)
                shutil.rmtree(vendor, ignore_errors=True)
                os.replace(part, vendor)
            except (OSError, subprocess.SubprocessError, StopIteration, tarfile.TarError) as problem:
                print(f"no local MathJax ({type(problem).__name__}): formulas on the pages need a network", file=sys.stderr)
    return "vendor/mathjax/tex-mml-chtml.js" if (vendor / "tex-mml-chtml.js").exists() else None


mathjax_local = vendored_mathjax()
if mathjax_local:
    mathjax_path = mathjax_local


# --- notebooks on their way in -----------------------------------------------------------------------------------

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\w+):?\s*(.*?)\s*$")
HIDDEN = {"hide", "default_exp", "exporti"}


def tidy(cell: dict) -> dict | None:
    """The cell without nbdev's directive lines, or None where it is not for readers."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        # links out of the folder have no page here; pictures keep theirs
        return cell | {"source": re.sub(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", source)}
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


def trailing_comments(code: str) -> dict[int, str]:
    """Line number -> the comment that ends that line."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def described(kind: str, name: str, node: ast.AST, notes: dict[int, str], depth: int = 0) -> list[str]:
    """A MyST directive for a function or class, its parameters explained by the comments beside them."""
    function = node
    if isinstance(node, ast.ClassDef):
        function = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    arguments, fields = "", []
    if function is not None:
        spec = function.args
        everything = [*spec.posonlyargs, *spec.args, *filter(None, [spec.vararg]), *spec.kwonlyargs, *filter(None, [spec.kwarg])]
        for a in everything:
            if a.arg in ("self", "cls"):
                spec.args = [x for x in spec.args if x is not a]
            elif notes.get(a.end_lineno):
                fields.append(f":param {a.arg}: {notes[a.end_lineno]}")
        arguments = f"({ast.unparse(spec)})"
        if not isinstance(node, ast.ClassDef) and node.returns is not None:
            arguments += f" -> {ast.unparse(node.returns)}"
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
                body += ["", *described("property" if "property" in decorators else "method", n.name, n, notes, depth + 1)]
    head = f"{name}{arguments}" if kind != "property" else name
    return [f"{fence}{{py:{kind}}} {head}", *body, fence, ""]


def reference(module: str) -> str:
    """Markdown that lists what a module exports, made from its source without importing it."""
    path = REPO / "kimi_nb" / (module.replace(".", "/") + ".py")
    if not path.exists():
        return ""
    code = path.read_text(encoding="utf-8")
    parsed, notes = ast.parse(code), trailing_comments(code)
    exported: list[str] = next(
        (ast.literal_eval(n.value) for n in parsed.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"), []
    )
    lines = ["## Reference", "", f"Everything `kimi_nb.{module}` exports.", "", f":::{{py:module}} kimi_nb.{module}", ":::", ""]
    for node in parsed.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exported:
            lines += described("class" if isinstance(node, ast.ClassDef) else "function", node.name, node, notes)
    return "\n".join(lines)


def toctree(caption: str, pages: list[Path]) -> str:
    names = [p.relative_to(NBS).with_suffix("").as_posix() for p in pages]
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", ""])


def read(app, docname, content):
    """Sphinx's source-read event: content[0] is the notebook as text."""
    path = NBS / f"{docname}.ipynb"
    if not path.exists():
        return
    notebook = json.loads(content[0])
    modules = re.findall(r"#\|\s*default_exp\s+(\S+?)[\\\"]", content[0])
    notebook["cells"] = [kept for kept in map(tidy, notebook["cells"]) if kept]
    extra = "\n\n".join(reference(m) for m in modules)
    if docname == "index":
        library = sorted(p for p in NBS.glob("*.ipynb") if p.name != "index.ipynb")
        extra = toctree("Course", library) + "\n" + toctree("Phases", sorted((NBS / "phases").glob("*.ipynb")))
    if extra:
        notebook["cells"].append({"cell_type": "markdown", "id": "made-by-conf", "metadata": {}, "source": extra})
    content[0] = json.dumps(notebook)


def setup(app):
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
