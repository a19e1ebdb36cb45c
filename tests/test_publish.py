"""Published reference runs, through the command line: laid out, published again, refused when something is wrong."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_nb.plan import phase_notebooks, read_outcome
from kimi_nb.publish import published_profiles, read_bundle

REPO = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif("quick" not in published_profiles(REPO), reason="no reference run of profile quick is published")


def kimi(*arguments: str, checkout: Path = REPO) -> subprocess.CompletedProcess:
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    env = {k: v for k, v in os.environ.items() if k != "KIMI_NB_RESULTS"} | dict(KIMI_NB_SETTINGS=str(checkout / "settings.ini"), PYTHONPATH=str(REPO))
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=checkout, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Path:
    """The results folder of the published run, as the command lays it out."""
    folder = tmp_path_factory.mktemp("published") / "results"
    done = kimi("records", "open", "--results", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def checkout(folder: Path) -> Path:
    """As much of a checkout as publishing looks at."""
    (folder / "nbs").mkdir(parents=True)
    shutil.copy(REPO / "settings.ini", folder)
    shutil.copytree(REPO / "nbs" / "phases", folder / "nbs" / "phases", ignore=shutil.ignore_patterns(".*"))
    return folder


def test_a_published_run_opens_as_a_results_folder(opened):
    """Records, verdicts, figures and notebooks are there, whole, without training."""
    assert kimi("records", "verify", "--results", str(opened)).returncode == 0
    from kimi_nb.store import Store

    store, (about, _) = Store(opened), read_bundle("quick", REPO)
    assert len(store.frame(stale=True)) == about["runs"] > 0
    assert [p for p in about["phases"] if read_outcome(store, p) is None] == []
    assert all((opened / f).is_file() for p in about["phases"] for f in read_outcome(store, p)["figures"])
    assert (opened / "plots" / "headline.png").is_file()


def test_it_does_not_open_over_other_results(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.txt").write_text("mine")
    done = kimi("records", "open", "--results", str(tmp_path / "results"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is not empty" in done.stderr
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("what", ["a record", "an outcome", "a notebook"])
def test_a_damaged_folder_is_not_published(opened, tmp_path, what):
    """One line says what is wrong, and nothing is written."""
    results, home = tmp_path / "results", checkout(tmp_path / "checkout")
    shutil.copytree(opened, results)
    path = {"a record": next(results.glob("experiments/*/result.json")), "an outcome": results / "phases" / "norm.json", "a notebook": results / "notebooks" / phase_notebooks()["norm"].name}[what]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = kimi("records", "publish", "--results", str(results), "--stale", checkout=home)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert path.name.partition(".")[0].split("_")[-1] in done.stderr and not (home / "data").exists() and not (home / "figures").exists()


@pytest.mark.slow
def test_publishing_again_gives_the_same(opened, tmp_path):
    """What was published, laid out and published again is the same run: every record and every verdict."""
    home = checkout(tmp_path / "checkout")
    done = kimi("records", "publish", "--results", str(opened), "--stale", checkout=home)
    assert done.returncode == 0, done.stderr
    (before, old), (after, new) = read_bundle("quick", REPO), read_bundle("quick", home)
    assert {k: v for k, v in before.items() if k != "files"} == {k: v for k, v in after.items() if k != "files"} and old.keys() == new.keys()
    assert [n for n in old if n.endswith(".json") and old[n] != new[n]] == []
    lines = [[json.loads(line) for line in gzip.decompress(files["data/records/quick.jsonl.gz"]).decode().splitlines()[1:]] for files in (old, new)]
    assert [x["record"] for x in lines[0] if "record" in x] == [x["record"] for x in lines[1] if "record" in x]
    assert [x["rows"] for x in lines[0] if "rows" in x] == [x["rows"] for x in lines[1] if "rows" in x]
