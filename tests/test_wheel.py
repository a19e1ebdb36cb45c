"""What somebody gets who has no checkout: the wheel, in an environment of its own, used in a folder of its own.

The environment sees the packages that are installed for these tests, so nothing is downloaded; kimi_nb comes from the
wheel. Where `KIMI_NB_WHEEL_PYTHON` names an interpreter that has the wheel and what it asks for, that one is used.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parents[1]
PARTS = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "settings.ini",
    "kimi_nb",
    "nbs",
    "data",
    "examples",
    "figures",
)
LARGEST = 16_000_000  # bytes of a wheel that people install in a moment


def run(*command, **how) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **how)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: what setuptools leaves behind is none of the checkout's."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    leave = shutil.ignore_patterns("__pycache__", "cache", ".ipynb_checkpoints")
    for part in PARTS:
        if (REPO / part).is_dir():
            shutil.copytree(REPO / part, source / part, ignore=leave)
        else:
            shutil.copy(REPO / part, source)
    here = ["--no-build-isolation"] if find_spec("setuptools") else []  # where it is, nothing is downloaded
    built = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *here, "-w", out, source)
    assert built.returncode == 0, built.stderr[-2000:]
    (made,) = out.glob("kimi_nb-*.whl")
    return made


@pytest.fixture(scope="module")
def python(request, tmp_path_factory) -> Path:
    """An interpreter that has kimi_nb from the wheel."""
    if named := os.environ.get("KIMI_NB_WHEEL_PYTHON"):
        return Path(named)
    wheel = request.getfixturevalue("wheel")
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    here, fresh = next(folder.glob("lib/python*/site-packages")), folder / "bin" / "python"
    done = run(sys.executable, "-m", "pip", "--python", fresh, "install", "-q", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    (here / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files do not count
    return fresh


class Person:
    """Somebody with a folder of their own, who has installed the wheel."""

    def __init__(self, python, folder):
        self.python, self.folder = python, folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KIMI_NB_", "PYTHON", "JUPYTER", "IN_TEST"))}
        shared = Path(sys.prefix) / "share" / "jupyter"
        borrowed = dict(JUPYTER_PATH=str(shared), JUPYTERLAB_DIR=str(shared / "lab")) if shared.is_dir() else {}
        own = {name: str(folder / name) for name in ("XDG_CACHE_HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
        self.env = kept | borrowed | own | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

    def command(self, *argv):
        return [str(self.python.parent / "kimi-nb"), *map(str, argv)]

    def types(self, *argv):
        return run(*self.command(*argv), cwd=self.folder, env=self.env)

    def computes(self, code):
        done = run(self.python, "-P", "-c", code, cwd=self.folder, env=self.env)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()


@pytest.fixture(scope="module")
def person(python, tmp_path_factory) -> Person:
    return Person(python, tmp_path_factory.mktemp("somewhere"))


def test_the_wheel_holds_what_a_checkout_has_beside_the_package(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name.removeprefix("kimi_nb/shipped/") for name in file.namelist()}
    wanted = {"settings.ini", "nbs/workbench.ipynb", "nbs/_templates/phase.ipynb", "examples/nano.yaml"}
    for part in ("nbs/phases", "data/tasks", "data/records/quick", "data/checkpoints"):
        wanted |= {
            path.relative_to(REPO).as_posix()
            for path in (REPO / part).rglob("*")
            if path.suffix in (".ipynb", ".json", ".jsonl", ".yaml", ".safetensors")
            and "checkpoints/." not in str(path)
        }
    assert sorted(wanted - names) == []
    assert wheel.stat().st_size < LARGEST
    strangers = [
        name
        for name in names
        if name.startswith(("tests/", "docs/", "data/cache/", "results/")) or ".ipynb_checkpoints" in name
    ]
    assert strangers == []


def test_it_is_the_wheel_that_is_used(person):
    found = person.computes("import kimi_nb, kimi_nb.config as c; print(kimi_nb.__file__); print(c.settings_path())")
    package, settings = map(Path, found.splitlines())
    assert REPO not in package.parents and settings == package.parent / "shipped" / "settings.ini"


def test_where_it_stands_and_what_cannot_be_done(person):
    done = person.types()
    assert done.returncode == 0 and f"{person.folder / 'results'}: 0 finished runs" in done.stdout, done.stderr
    for argv in (("new-phase", "mine"), ("records", "publish")):
        done = person.types(*argv)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "checkout" in done.stderr, done.stderr
    assert not (person.folder / "results").exists()


def test_a_plan_runs(person):
    done = person.types("plan", "--profile", "smoke", "--only", "norm", "--quiet")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    results = person.folder / "results"
    assert json.loads((results / "phases" / "smoke" / "norm.json").read_text())["profile"] == "smoke"
    assert (results / "notebooks" / "03_norm.ipynb").is_file() and (
        results / "plots" / "smoke" / "norm-loss.png"
    ).is_file()


def test_published_records_open(person):
    done = person.types("records", "open", "--results", "published-quick")
    assert done.returncode == 0 and "runs of the published profile quick" in done.stdout, done.stderr
    assert person.types("records", "verify", "--results", "published-quick").returncode == 0


def test_a_report_is_written_from_the_published_records(person):
    done = person.types("report", "--published", "quick", "--out", "report")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"paper.pdf", "research_report.md"} <= {path.name for path in (person.folder / "report").iterdir()}


def test_a_model_that_comes_with_it_is_scored(person):
    model = person.computes("from kimi_nb.plan import kept_models; print(kept_models()['kimi'])")
    done = person.types("eval", "--checkpoint", model, "--tasks", "tiny", "--limit", "20")
    assert done.returncode == 0 and "arithmetic" in done.stdout, done.stderr[-2000:]


def test_the_notebook_for_borrowed_machines_runs(python, tmp_path):
    """All of it but the installation, which the wheel is."""
    cells = json.loads((REPO / "examples" / "colab.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "%pip install" in code[0]
    done = Person(python, tmp_path).computes("\n\n".join(code[1:]))
    assert done.startswith("The function returns"), done


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_the_lab_opens_on_the_published_run(python, tmp_path):
    person, port = Person(python, tmp_path), free_port()
    options = ("--", "--IdentityProvider.token=", "--ServerApp.ip=127.0.0.1", "--allow-root")
    with (tmp_path / "log").open("wb") as log:
        how = dict(cwd=tmp_path, env=person.env, stdout=log, stderr=subprocess.STDOUT)
        server = subprocess.Popen(person.command("lab", "--no-browser", "--port", port, *options), **how)
    try:
        page = None
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            with suppress(OSError):
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents/lab/workbench.ipynb").read()
                break
            time.sleep(0.5)
        assert json.loads(page)["content"]["cells"], "the workbench is not there"
    finally:
        server.terminate()
        server.wait(30)
    assert "published ones of profile quick" in (tmp_path / "log").read_text()
    phase = tmp_path / "results" / "lab" / "phases" / "03_norm.ipynb"
    assert 'profile = \\"quick\\"' in phase.read_text()
    runs = tmp_path / "results" / "published" / "quick" / "experiments"
    before = sorted(path.name for path in runs.iterdir())
    assert len(list(runs.glob("*/checkpoints/final/model.safetensors"))) == 2
    code = (
        "import nbformat; from nbclient import NotebookClient; "
        f"nb = nbformat.read({str(phase)!r}, as_version=4); "
        f"NotebookClient(nb, resources=dict(metadata=dict(path={str(phase.parent)!r}))).execute(); print('ran')"
    )
    person.env["KIMI_NB_RESULTS"] = str(runs.parent)
    assert person.computes(code).endswith("ran")
    assert sorted(path.name for path in runs.iterdir()) == before  # nothing was trained
