"""Published reference runs, through the command line: laid out, published again, refused when something is wrong."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_nb.plan import open_published, phase_notebooks, publish, published_profiles, read_bundle
from kimi_nb.study import Store, read_outcome

REPO = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    "quick" not in published_profiles(REPO), reason="no reference run of profile quick is published"
)


def kimi(*arguments: str, checkout: Path = REPO, **environment: str) -> subprocess.CompletedProcess:
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    env = {k: v for k, v in os.environ.items() if k != "KIMI_NB_RESULTS"} | dict(
        KIMI_NB_SETTINGS=str(checkout / "settings.ini"), PYTHONPATH=str(REPO), **environment
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=checkout, env=env, capture_output=True, text=True, check=False
    )


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
    store, (about, _) = Store(opened), read_bundle("quick", REPO)
    assert len(store.frame(stale=True)) == about["runs"] > 0
    assert [p for p in about["phases"] if read_outcome(store, p) is None] == []
    assert all((opened / f).is_file() for p in about["phases"] for f in read_outcome(store, p).figures)
    assert (opened / "plots" / "headline.png").is_file()


@pytest.mark.slow
def test_what_a_killed_publication_left_is_removed_by_the_next(opened, tmp_path):
    """Half a folder that was opened, half a file that was published, the folder that was drawn in."""
    home, temporary, results = checkout(tmp_path / "checkout"), tmp_path / "tmp", tmp_path / "results"
    left = [temporary / "knb-999999999-x" / "half", tmp_path / ".results-999999999-x" / "half"]
    left += [home / folder / ".a.999999999.tmp" for folder in ("data/records", "data/records/quick", "figures/quick")]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    open_published("quick", results, REPO)
    done = kimi("records", "publish", "--results", str(opened), "--stale", checkout=home, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    assert [path for path in left if path.exists()] == [] == list(temporary.iterdir())


@pytest.mark.parametrize("name", ["../evil.txt", "data/records/quick/../../../evil.txt", "/etc/passwd", "C:\\\\evil"])
def test_a_bundle_stays_inside_its_folder(tmp_path, name):
    """A file that would lie elsewhere is refused before anything is read or written."""
    seal = tmp_path / "data" / "records" / "quick" / "bundle.json"
    seal.parent.mkdir(parents=True)
    about = json.loads((REPO / "data" / "records" / "quick" / "bundle.json").read_text(encoding="utf-8"))
    seal.write_text(json.dumps(about | dict(files={name: "0" * 64} | about["files"])), encoding="utf-8")
    with pytest.raises(publish.PublishError, match="which is no file of its bundle"):
        read_bundle("quick", tmp_path)


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
    path = {
        "a record": next(results.glob("experiments/*/result.json")),
        "an outcome": results / "phases" / "quick" / "norm.json",
        "a notebook": results / "notebooks" / phase_notebooks()["norm"].name,
    }[what]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = kimi("records", "publish", "--results", str(results), "--stale", checkout=home)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        path.name.partition(".")[0].split("_")[-1] in done.stderr
        and not (home / "data").exists()
        and not (home / "figures").exists()
    )


def test_some_phases_are_published_alone(opened, tmp_path):
    """Whatever other phases left, the bundle says which it holds, has their records and the tuning, and opens."""
    results, home = tmp_path / "results", checkout(tmp_path / "checkout")
    shutil.copytree(opened, results)
    (results / "phases" / "quick" / "rope.json").unlink()
    store = Store(results)
    mine = {
        i
        for n in store.studies()
        if n.startswith("tuning") or store.manifest(n)[0].phase in ("norm", "moe")
        for i in store.manifest(n)[1].values()
    }
    lost = next(f for f in sorted(results.glob("experiments/*")) if f.name[-12:] not in mine)
    shutil.rmtree(lost)
    assert "start the plan again" in "".join(Store(results).verify(complete=True))  # no whole plan
    done = kimi("records", "publish", "--results", str(results), "--stale", "--only", "moe", "norm", checkout=home)
    assert done.returncode == 0 and "phases norm, moe only" in done.stdout, done.stderr
    about, files = read_bundle("quick", home)
    assert about["phases"] == ["norm", "moe"] and about["partial"] and about["runs"] == len(mine)
    assert [
        f for f in files if "headline" in f or "combined" in f or "rope" in f
    ] == [] and "figures/quick/moe-loss.png" in files
    assert kimi("records", "open", "--results", str(tmp_path / "again"), checkout=home).returncode == 0
    again = Store(tmp_path / "again")
    assert (
        {r.run_id for r in again.records()} == mine
        and again.verify(complete=True) == []
        and again.frame("tuning-1", stale=True).equals(store.frame("tuning-1", stale=True))
    )
    assert published_profiles(home, "moe") == ["quick"] and published_profiles(home, "combined") == []
    # of the phases that are named everything still counts
    next(results.glob(f"experiments/*_{min(mine)}/result.json")).unlink()
    done = kimi("records", "publish", "--results", str(results), "--stale", "--only", "moe", "norm", checkout=home)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and read_bundle("quick", home)[0] == about, done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("publish", "--only", "combind"), "phase 'combind' is unknown: did you mean combined?"),
        (("open", "--only", "moe"), "takes no --only"),
    ],
)
def test_phases_that_cannot_be_named_are_refused_in_a_line(opened, tmp_path, arguments, said):
    done = kimi("records", *arguments, "--results", str(opened if arguments[0] == "publish" else tmp_path / "new"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr


def test_many_runs_have_fewer_points_a_curve(opened, monkeypatch):
    """Where the records would not fit, their curves are thinned; every run and every final number stays."""
    store = Store(opened)
    whole = publish.bundle(store, "quick", stale=True, only=["norm"])
    monkeypatch.setattr(
        publish, "LIMIT", sum(map(len, whole.values())) - len(whole["data/records/quick/bundle.json"]) - 1
    )
    less = publish.bundle(store, "quick", stale=True, only=["norm"])
    read = lambda files: [
        x["record"]
        for x in map(json.loads, gzip.decompress(files["data/records/quick.jsonl.gz"]).decode().splitlines()[1:])
        if "record" in x
    ]
    assert [r["metrics"] for r in read(less)] == [r["metrics"] for r in read(whole)]
    points = [max(len(c["step"]) for r in read(files) for c in r["curves"].values()) for files in (whole, less)]
    assert points[0] > 30 >= points[1] and json.loads(less["data/records/quick/bundle.json"])["points"] == 30


@pytest.mark.slow
def test_publishing_again_gives_the_same(opened, tmp_path):
    """What was published, laid out and published again is the same run: every record and every verdict."""
    home = checkout(tmp_path / "checkout")
    done = kimi("records", "publish", "--results", str(opened), "--stale", checkout=home)
    assert done.returncode == 0, done.stderr
    (before, old), (after, new) = read_bundle("quick", REPO), read_bundle("quick", home)
    new_here = {"files", "partial", "points"}  # bundles of before do not say these
    assert {k: v for k, v in before.items() if k not in new_here} == {
        k: v for k, v in after.items() if k not in new_here
    } and old.keys() == new.keys()
    assert [n for n in old if n.endswith(".json") and old[n] != new[n]] == []
    lines = [
        [json.loads(line) for line in gzip.decompress(files["data/records/quick.jsonl.gz"]).decode().splitlines()[1:]]
        for files in (old, new)
    ]
    assert [x["record"] for x in lines[0] if "record" in x] == [x["record"] for x in lines[1] if "record" in x]
    assert [x["rows"] for x in lines[0] if "rows" in x] == [x["rows"] for x in lines[1] if "rows" in x]
