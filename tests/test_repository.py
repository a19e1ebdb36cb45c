"""What holds for the repository as a whole: layout, notebooks against modules, import order, pins, README."""

import ast
import configparser
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[1]
PACKAGE = "kimi_nb"
# A wing uses those before it in this list, never one after it.
WINGS = "config data model study train runner stats use evals bench phases plan report lab cli".split()
FACES = {"moe": "model", "optim": "train", "store": "study", "generate": "use", "hub": "use"}  # short names
LIBRARY = sorted(p for w in WINGS if w != "phases" for p in (REPO / "nbs" / w).glob("*.ipynb"))
PHASES = sorted((REPO / "nbs" / "phases").glob("*.ipynb"))
PAGES = [REPO / "nbs" / "workbench.ipynb", *sorted((REPO / "nbs" / "howto").glob("*.ipynb"))]  # they export nothing
NOTEBOOKS = [*LIBRARY, *PHASES, *PAGES]
WITHOUT_TORCH = ("config", "data", "study", "stats")
WITHOUT_PANDAS = ("config", "data", "model", "train")
TRAINING_PACKAGES = {"torch", "numpy", "pydantic", "safetensors", "tokenizers", "tqdm", "yaml", "filelock"}


def name_of(path: Path) -> str:
    return path.relative_to(REPO / "nbs").as_posix()


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def default_exps(path: Path) -> list[str]:
    return [m for c in cells(path) for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M)]


def modules() -> dict[str, Path]:
    """Exported modules, wing after wing, in the order of their notebooks; one may import only those before it."""
    paths = [p for wing in WINGS for p in sorted((REPO / "nbs" / wing).glob("*.ipynb"))]
    names = [name for path in paths for name in default_exps(path)]
    return {name: REPO / PACKAGE / (name.replace(".", "/") + ".py") for name in names}


def wing_of(module: str) -> str:
    """`model` of `model.norm`, of `kimi_nb.model` and of the short name `moe`."""
    first = module.removeprefix(f"{PACKAGE}.").split(".")[0]
    return FACES.get(first, first)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST, importer: str) -> list[str]:
    """Absolute dotted names that an import in module kimi_nb.`importer` may load; nbdev writes relative ones."""
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = f"{PACKAGE}.{importer}".split(".")[: -node.level] if node.level else []
        start = ".".join(parents + ([node.module] if node.module else []))
        return [start] + [f"{start}.{a.name}" for a in node.names]
    return []


def at_load(body: list[ast.stmt]):
    """Statements that run when a module is loaded: everything but the inside of functions and of `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from at_load(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from at_load(handler.body)


def tracked() -> list[Path]:
    """Files git knows or would add; without git, those of the folders that are tracked."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        found = [REPO / line for line in listing.stdout.splitlines()]
    else:
        found = [p for d in ("nbs", PACKAGE, "tests", "docs", "data", "figures") for p in (REPO / d).rglob("*")] + list(
            REPO.glob("*")
        )
    return [p for p in found if p.is_file() and "__pycache__" not in p.parts]


# --- notebooks ---------------------------------------------------------------------------------------------------


def test_there_are_notebooks():
    assert LIBRARY and PHASES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_exports_the_one_module_it_is_named_after(path):
    name = re.fullmatch(r"(\d\d_)?(\w+)", path.stem)[2]
    assert default_exps(path) == ([] if path in PAGES else [f"{path.parent.name}.{name}"])


@pytest.mark.parametrize("wing", WINGS)
def test_numbers_of_notebooks_are_unique_inside_a_wing(wing):
    numbers = [p.stem[:2] for p in (REPO / "nbs" / wing).glob("*.ipynb")]
    assert numbers and len(numbers) == len(set(numbers))


def test_no_two_notebooks_share_a_module():
    owners = defaultdict(list)
    for path in NOTEBOOKS:
        for name in default_exps(path):
            owners[name].append(name_of(path))
    assert {name: paths for name, paths in owners.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", [*NOTEBOOKS, REPO / "nbs" / "index.ipynb"], ids=name_of)
def test_notebook_is_stored_without_outputs(path):
    assert [source(c)[:60] for c in cells(path) if c["outputs"] or c["execution_count"] is not None] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_parameters_tag(path):
    """papermill puts its values after the cell tagged `parameters`; without the tag they land above the defaults."""
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == (1 if path in PHASES else 0)
    for cell in tagged:
        assert all(isinstance(node, ast.Assign | ast.AnnAssign) for node in ast.parse(source(cell)).body), (
            "a parameters cell only assigns"
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_begins_with_a_title_and_a_blurb(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    lines = [line for line in source(first).splitlines() if line.strip()]
    assert re.match(r"# [^\W_]", lines[0]) and lines[1].startswith("> "), lines[:2]


@pytest.mark.parametrize("path", [*NOTEBOOKS, REPO / "nbs" / "index.ipynb"], ids=name_of)
def test_only_the_title_is_a_heading_of_the_first_level(path):
    """A text form of a notebook may put `# ` before each line of prose; left in, each paragraph shows as a title."""
    fenced = [re.sub(r"^```.*?^```", "", source(c), flags=re.M | re.S) for c in cells(path, "markdown")]
    assert [line[:80] for text in fenced for line in text.splitlines() if re.match(r"#\s", line)][1:] == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, REPO / "nbs" / "index.ipynb"], ids=name_of)
def test_links_of_a_notebook_lead_somewhere(path):
    """Relative links of the prose name files that are there, so no page and no lesson points into the void."""
    wrong = []
    for cell in cells(path, "markdown"):
        prose = re.sub(r"^```.*?^```|`[^`]*`|\$\$.*?\$\$", "", source(cell), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
            if not re.match(r"\w+:", target) and not (path.parent / target).exists():
                wrong.append(target)
    assert wrong == []


# --- modules -----------------------------------------------------------------------------------------------------


def test_every_module_has_a_notebook():
    """A deleted notebook must not leave its module behind."""
    generated = {
        p
        for p in (REPO / PACKAGE).rglob("*.py")
        if p.name not in ("__init__.py", "_modidx.py") and "__pycache__" not in p.parts
    }
    assert generated == set(modules().values())


def test_no_public_name_is_defined_by_two_modules():
    owners = defaultdict(list)
    for name, path in modules().items():
        if name.startswith("phases."):
            continue  # each phase has its own `study`; they are used as `attention.study`
        for public in (n for node in tree(path).body for n in exported(node)):
            owners[public].append(name)
    assert owners, "no module has an __all__"
    assert {public: names for public, names in owners.items() if len(names) > 1} == {}


def loaded_by(name: str) -> dict[str, int]:
    """Dotted names inside the package that a module may load, wherever in it and however, with the line."""
    found = {}
    for node in ast.walk(tree(modules()[name])):
        for used in imported(node, name):
            found[used] = node.lineno
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for used in re.findall(rf"\b{PACKAGE}\.[a-z_.]*[a-z_]", ast.unparse(node.args[0])):
                found.setdefault(used, node.lineno)
    own = f"{PACKAGE}.{name}"
    inside = {used: line for used, line in found.items() if used.startswith(f"{PACKAGE}.") and used != own}
    return {used: line for used, line in inside.items() if wing_of(used) in WINGS}


@pytest.mark.parametrize("name", modules())
def test_imports_point_up_the_list_only(name):
    """In its own wing a module uses those before it; of other wings, those above its own, through their face."""
    order, own = list(modules()), wing_of(name)
    above = WINGS[: WINGS.index(own)]
    for absolute, line in loaded_by(name).items():
        used = absolute.removeprefix(f"{PACKAGE}.")
        if wing_of(used) != own:
            assert wing_of(used) in above or own == "plan", f"line {line}: {used} is not above {name}"
        home = next((m for m in order if used == m or used.startswith(m + ".")), None)
        if home and wing_of(home) == own:
            assert order.index(home) < order.index(name), f"line {line}: {home} is not before {name}"


def test_the_longest_chain_of_wings_is_short():
    uses = defaultdict(set)
    for name in modules():
        uses[wing_of(name)] |= {wing_of(used) for used in loaded_by(name)} & set(WINGS) - {wing_of(name)}
    depth = {}
    for wing in WINGS:
        depth[wing] = 1 + max((depth[w] for w in uses[wing] if w in depth), default=0)
    assert max(depth.values()) <= 10, depth


def test_few_doors_at_the_top():
    doors = {p.stem for p in (REPO / PACKAGE).iterdir() if p.stem not in ("__init__", "_modidx", "__pycache__")}
    assert doors == {*WINGS, *FACES} and len(doors) <= 20


@pytest.mark.parametrize("wing", [w for w in WINGS if w != "phases"])
def test_a_face_gives_what_its_wing_exports(wing):
    """Every public name once, under no name that a module of the wing bears."""
    face = importlib.import_module(f"{PACKAGE}.{wing}")
    rooms = {name.partition(".")[2]: path for name, path in modules().items() if wing_of(name) == wing}
    public = {n for path in rooms.values() for node in tree(path).body for n in exported(node)}
    assert set(face.__all__) - {"KimiConfig"} == public - set(rooms) - {"KimiConfig"}
    assert all(getattr(face, name) is not None for name in face.__all__)


def exported(node: ast.stmt) -> list[str]:
    """The names of `__all__`, where the statement gives it."""
    named = isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    return ast.literal_eval(node.value) if named else []


def training_path() -> list[str]:
    return [
        name for name in modules() if wing_of(name) in ("config", "data", "model", "train") or name == "study.record"
    ]


@pytest.mark.parametrize("name", training_path())
def test_training_loads_few_packages(name):
    """A bare GPU machine trains with these packages alone; whatever else is used, is imported where it is used."""
    loaded = {n.split(".")[0] for node in at_load(tree(modules()[name]).body) for n in imported(node, name)}
    assert loaded - set(sys.stdlib_module_names) - TRAINING_PACKAGES - {PACKAGE} == set()


def test_the_bench_loads_where_only_training_is_installed():
    """On a GPU machine without the package's other dependencies."""
    others = [
        re.split(r"[^\w-]", d)[0].replace("-", "_")
        for d in tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    ]
    absent = sorted({*others, "transformers", "ray"} - TRAINING_PACKAGES - {"pyyaml"})
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {PACKAGE}.bench, {PACKAGE}.cli"
    assert "pandas" in absent and subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


def loads_without(package: str, wing: str) -> bool:
    """Whether no module of the wing loads the package."""
    names = ", ".join(f"{PACKAGE}.{m}" for m in modules() if wing_of(m) == wing) or PACKAGE
    code = f"import sys, {names}; sys.exit({package!r} in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


@pytest.mark.parametrize("wing", ["", *WITHOUT_TORCH])
def test_loads_without_torch(wing):
    assert loads_without("torch", wing)


@pytest.mark.parametrize("wing", WITHOUT_PANDAS)
def test_loads_without_pandas(wing):
    assert loads_without("pandas", wing)


@pytest.mark.parametrize("wing", [w for w in WINGS if w != "lab"])
def test_only_the_lab_loads_widgets(wing):
    assert loads_without("ipywidgets", wing)


# --- packaging ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    parsed = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][^\s;+*]*)", line) for line in lines if line]
    assert all(parsed), "each line is name==version, without a local part such as +cpu"
    return {canonicalize_name(m[1]): m[2] for m in parsed}


def test_settings_file_parses():
    settings = configparser.ConfigParser()
    settings.read_string((REPO / "settings.ini").read_text(encoding="utf-8"))
    assert {"smoke", "quick", "standard", "paper"} <= set(settings.sections())


def test_packages_found_are_the_packages_there_are(project):
    from setuptools import find_packages

    found = set(find_packages(str(REPO), **project["tool"]["setuptools"]["packages"]["find"]))
    assert found == {PACKAGE, *(f"{PACKAGE}.{door}" for door in (*WINGS, *FACES))}


def test_cell_tags_survive_cleaning(project):
    nbdev = project["tool"]["nbdev"]
    assert nbdev["allowed_cell_metadata_keys"] == ["tags"] and nbdev["clear_all"] is False
    assert {"slow", "cuda"} <= set(nbdev["tst_flags"].split())


def reached(project, *groups: str) -> dict:
    """Name -> specifier of all that the package and these extras can reach, as far as it is installed here."""
    extras, seen, wanted = project["project"]["optional-dependencies"], defaultdict(set), {}
    todo = [
        Requirement(r)
        for r in project["project"]["dependencies"] + [r for group in groups or extras for r in extras[group]]
    ]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        new = ({""} | requirement.extras) - seen[name]
        seen[name] |= new
        if name == canonicalize_name(PACKAGE):
            todo += [Requirement(r) for extra in new - {""} for r in extras[extra]]
            continue
        wanted[name] = wanted.get(name, requirement.specifier) & requirement.specifier
        if not new:
            continue
        try:
            more = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here: its own name must still be pinned
        todo += [
            r for r in map(Requirement, more) if any(r.marker is None or r.marker.evaluate({"extra": e}) for e in new)
        ]
    return wanted


def test_every_dependency_is_pinned(project, pins):
    """All that the extras can reach stands in constraints.txt with a version that fits."""
    wanted = reached(project)
    assert sorted(set(wanted) - set(pins)) == []
    assert {n: f"{pins[n]}, wanted {s}" for n, s in wanted.items() if not s.contains(pins[n], prereleases=True)} == {}


def locked() -> dict[str, tuple[str, list[str]]]:
    """Name -> version and hashes, for each entry of requirements.lock; nothing else may stand there."""
    text = re.sub(r"^#.*\n", "", (REPO / "requirements.lock").read_text(encoding="utf-8"), flags=re.M)
    entry = r"([a-z0-9-]+)==(\S+)(?: ;[^\n]*?)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
    assert re.fullmatch(f"(?:{entry})+", text), "each entry is name==version, perhaps a marker, and hashes"
    return {name: (version, hashes.split("sha256:")[1:]) for name, version, hashes in re.findall(entry, text)}


BY_VERSION = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # the build depends on the machine and the index


def test_the_lock_is_that_of_the_constraints(project, pins):
    """What set-up installs has hashes in requirements.lock, at the versions of constraints.txt."""
    lock = locked()
    assert {n: v for n, (v, _) in lock.items() if pins.get(n) != v} == {}
    assert sorted(n for n in set(reached(project, "dev")) - set(lock) if not BY_VERSION.fullmatch(n)) == []
    assert [n for n in lock if BY_VERSION.fullmatch(n)] == []


def audited(name: str, *vulnerable: str) -> dict:
    return dict(name=name, version="1.0", vulns=[dict(id=v, fix_versions=["1.1"]) for v in vulnerable])


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ([audited("a"), audited("b")], 0, "audit: 2 packages asked about, 0 with known vulnerabilities"),
        ([audited("a"), audited("b", "PYSEC-1")], 1, "b 1.0: PYSEC-1, fixed in 1.1"),
        (
            [audited("a"), dict(name="b", skip_reason="not found")],
            0,
            "warning: the index says nothing about 1 of 2 packages",
        ),
        (None, 0, "warning: not audited: the index does not answer"),
    ],
)
def test_an_audit_fails_for_a_known_vulnerability_alone(monkeypatch, capsys, answer, code, said):
    monkeypatch.syspath_prepend(REPO / "docs")
    import lock

    done = SimpleNamespace(
        stdout="" if answer is None else json.dumps(dict(dependencies=answer)),
        stderr="warning\nthe index does not answer\n",
    )
    monkeypatch.setattr(lock, "run_tool", lambda *_: done)
    assert lock.main("audit") == code
    assert said in "".join(capsys.readouterr())


def test_torch_is_the_version_the_measurements_were_made_with(pins):
    assert pins["torch"] == "2.13.0"


WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(path):
    """A tag can be moved to other code; the version it had then stands beside the commit."""
    used = re.findall(r"uses: *(.+)$", path.read_text(encoding="utf-8"), re.M)
    assert (
        used
        and [line for line in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_ci_installs_by_hash_or_not_at_all(path):
    """Whatever job sets an environment up with make does not fall back to versions."""
    import yaml

    for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
        made = any(re.search(r"\bmake\b", step.get("run", "")) for step in job["steps"])
        assert not made or job.get("env", {}).get("HASHES") == "require", f"{path.name}: {name}"


# --- files -------------------------------------------------------------------------------------------------------


def test_readme_is_the_index_notebook(tmp_path):
    made = tmp_path / "README.md"
    done = subprocess.run(
        [sys.executable, "docs/readme.py", str(made)], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    same = made.read_text(encoding="utf-8") == (REPO / "README.md").read_text(encoding="utf-8")
    assert same, "README.md is not what nbs/index.ipynb gives: run make readme"


def test_readme_links_lead_somewhere():
    for text, target in re.findall(
        r"\[([^\]]*)\]\(([^)#\s]+)[^)]*\)", (REPO / "README.md").read_text(encoding="utf-8")
    ):
        elsewhere = target.startswith(("http", "../../"))  # `../../`: pages of the repository's host
        assert elsewhere or (REPO / target).exists(), f"[{text}]({target})"


def test_buttons_that_need_an_address_wait_for_it(monkeypatch):
    """Binder and Colab appear when pyproject.toml says where the repository is; what they open is there."""
    monkeypatch.syspath_prepend(REPO / "docs")
    from readme import badges

    assert "mybinder" not in badges({}) and "colab" not in badges({})
    line = badges({"urls": {"Repository": "https://github.com/somebody/kimi_nb"}})
    assert "mybinder.org/v2/gh/somebody/kimi_nb/HEAD?urlpath=lab/tree/results/lab/workbench.ipynb" in line
    assert "colab.research.google.com/github/somebody/kimi_nb/blob/main/examples/colab.ipynb" in line
    assert (REPO / "examples" / "colab.ipynb").is_file() and os.access(REPO / ".binder" / "postBuild", os.X_OK)


def test_the_readme_is_short():
    """A stranger reads it in minutes: at most 120 lines and 10 kB, and the lists of modules stand on the site."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000 and text.count("\n") <= 120
    assert [name for name in modules() if f"{PACKAGE}.{name}" in text] == []


def test_the_readme_has_a_line_for_each_wing():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^- \[`(\w+)`\]\(nbs/\w+/\d\d_\w+\.ipynb\) \S", text, re.M) == WINGS


def test_the_course_lists_every_lesson():
    """Each numbered notebook stands once on the page of the course, in the order in which modules may use others."""
    from kimi_nb.report import course

    lessons = [lesson for chapter in course(REPO / "nbs").values() for lesson in chapter]
    assert [lesson.module for lesson in lessons] == list(modules())


def test_the_usual_files_are_there():
    wanted = "LICENSE README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff Makefile constraints.txt requirements.lock"
    wanted += " settings.ini setup.py .ci/run .pre-commit-config.yaml Containerfile .devcontainer/devcontainer.json"
    empty = [name for name in wanted.split() if not (REPO / name).is_file() or not (REPO / name).stat().st_size]
    assert empty == []
    assert os.access(REPO / ".ci" / "run", os.X_OK)


UNWANTED = {
    "a path of one machine": r"(?<![\w.~$}/-])/(?:work|home|root|Users)/[\w.-]",
    "a note to oneself": r"\b(?:TODO|FIXME|XXX)\b",
    "a conflict marker": r"^(?:<{7}|>{7}) ",
}


def test_tracked_files_are_fit_for_strangers():
    found = []
    for path in tracked():
        if path == Path(__file__).resolve() or path.stat().st_size > 2_000_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # figures and other binary files
        found += [
            f"{path.relative_to(REPO)}: {what}: {m[0]!r}"
            for what, pattern in UNWANTED.items()
            for m in re.finditer(pattern, text, re.M)
        ]
    assert found == []


def test_no_large_or_generated_file_is_tracked():
    bad = [
        p
        for p in tracked()
        if p.stat().st_size > 1_500_000 or {"results", ".venv", "_docs", "_proc"} & set(p.relative_to(REPO).parts)
    ]
    assert [str(p.relative_to(REPO)) for p in bad] == []


# --- make --------------------------------------------------------------------------------------------------------


def make(*arguments: str, cwd: Path = REPO, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=cwd, env=clean | env, capture_output=True, text=True, check=False)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
@pytest.mark.parametrize("target", ["plan", "test", "test-slow", "lab", "docs", "bench", "clean", "export"])
def test_make_lists_the_target(target):
    assert re.search(rf"^  make {target} ", make("help").stdout, re.M)


@needs_make
def test_make_hands_variables_on():
    shown = make("-n", "plan", "PROFILE=smoke", "RESULTS=elsewhere", "ARGS=--only norm").stdout
    assert "kimi-nb plan --profile smoke --results elsewhere --only norm" in shown


@needs_make
def test_an_old_python_is_refused_in_one_line(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.9.1;; *) exit 1;; esac\n')
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", cwd=tmp_path)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("make")] == [
        "kimi_nb needs Python 3.11 or newer, found Python 3.9.1: "
        "install one, or name it: make PYTHON=/path/to/python3.11"
    ]
    assert not (tmp_path / ".venv").exists()


@needs_make
@pytest.mark.parametrize(
    ("hashes", "fits", "asked"),
    [
        ("prefer", True, "lock torch own"),
        ("prefer", False, "lock all"),
        ("require", True, "lock torch own"),
        ("require", False, "lock"),
        ("off", False, "all"),
    ],
)
def test_set_up_installs_by_hash_where_the_index_has_the_files(tmp_path, hashes, fits, asked):
    """By hash, but for torch and the package; where hashes do not fit, only `prefer` goes on."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements.lock"):
        shutil.copy(REPO / name, tmp_path)
    python = tmp_path / "python"  # makes an environment of itself, and a pip that only writes down what it is asked
    python.write_text(f"""#!/bin/sh
case "$*" in
*venv*) mkdir -p .venv/bin && cp "$0" .venv/bin/python;;
*--require-hashes*) echo lock >> asked
    [ {int(fits)} = 1 ] || {{ echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES' >&2; exit 1; }};;
*torch*) echo torch >> asked;;
*--no-deps*-e*) echo own >> asked;;
*install*'[dev]'*) echo all >> asked;;
esac
""")
    python.chmod(0o755)
    done = make("setup", f"PYTHON={python}", f"HASHES={hashes}", cwd=tmp_path)
    assert (done.returncode == 0) == (fits or hashes != "require"), done.stderr
    assert (tmp_path / "asked").read_text().split() == asked.split()
    assert ("note: installed by version, not by hash: ERROR: THESE PACKAGES" in done.stdout) == (
        hashes == "prefer" and not fits
    )
    assert (tmp_path / ".venv" / ".installed").exists() == (done.returncode == 0)
