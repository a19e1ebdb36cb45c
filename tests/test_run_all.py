"""Somebody opens a phase in the lab and runs all its cells: what was found stays as it was."""

import os
import platform

import nbformat
import pytest

from kimi_nb.config import load_profile
from kimi_nb.lab import lay_out
from kimi_nb.plan import MODELS, kept_models, open_published, phases, published_profiles
from kimi_nb.runner import run_studies, tuned
from kimi_nb.study import Store, outcomes_of, record_beside

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("quick" not in published_profiles(), reason="no reference run of profile quick is published"),
]
OWN = {"finished", "mark", "key", "digest"}  # of each time that an outcome is written


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The published quick plan, as `kimi-nb lab` lays it out where there are no runs."""
    return lay_out(tmp_path_factory.mktemp("work") / "results")


def told(store):
    """What all phases found, with every profile."""
    return {name: outcome.model_dump(exclude=OWN) for name, outcome in outcomes_of(store).items()}


def pictures(store):
    """Every figure as it stands there: file -> bytes."""
    files = sorted((store.path / "plots").rglob("*.png"))
    return {path.relative_to(store.path).as_posix(): path.read_bytes() for path in files}


def run_all(desk, name):
    """What the menu's entry does, in a kernel that the lab's server would start."""
    from nbclient import NotebookClient

    (path,) = (desk.notebook.parent / "phases").glob(f"*_{name}.ipynb")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, resources=dict(metadata=dict(path=str(path.parent))), timeout=500)
    client.execute(env=os.environ | dict(KIMI_NB_RESULTS=str(desk.results)))


@pytest.mark.parametrize("name", ["norm", "combined"])
def test_run_all_over_finished_results_changes_nothing(desk, name):
    """Nothing is trained, no other phase is touched; what today's analysis found, it finds and draws again."""
    store = Store(desk.results)
    runs = sorted(folder.path.name for folder in store.run_folders(aside=True))
    published, drawn = told(store), pictures(store)
    run_all(desk, name)  # the published words are those of the analysis of their day
    found, now = told(store), pictures(store)
    assert found[name]["profile"] == published[name]["profile"] == "quick"
    assert found | {name: None} == published | {name: None} and now.keys() >= drawn.keys()
    assert {file for file in drawn if now[file] != drawn[file]} <= set(found[name]["figures"])
    run_all(desk, name)
    assert told(store) == found and pictures(store) == now
    assert sorted(folder.path.name for folder in store.run_folders(aside=True)) == runs


def test_another_version_of_python_sees_the_published_results(tmp_path, monkeypatch):
    """Its `pydocs` is another text, and its runs have other names: the published ones stand for them."""
    store = open_published("quick", tmp_path / "results")
    before = store.manifest("norm")
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    elsewhere = Store(store.path)
    profile = tuned(load_profile("quick"), elsewhere, run=False)
    assert profile.tuned
    mine = phases(["norm"])["norm"].studies(profile)
    assert not {p.run_id for p in mine[0].expand()} & store.run_ids("norm")
    monkeypatch.setattr("kimi_nb.runner.pool._train_all", lambda *_: pytest.fail("something is trained"))
    records = run_studies(mine, elsewhere)
    assert {record.run_id for record in records} == store.run_ids("norm") == set(elsewhere.frame("norm")["run_id"])
    assert elsewhere.manifest("norm") == before


def test_the_models_that_are_kept_are_those_of_the_published_records(desk):
    """The weights were left by a run that ended at the numbers of the record they are put beside."""
    from kimi_nb.train import load_model

    store = Store(desk.results)
    assert set(kept_models()) == set(MODELS)
    for folder in kept_models().values():
        trained = record_beside(folder)
        published = store.get(trained.run_id)
        assert abs(trained.metrics["test_bpb"] - published.metrics["test_bpb"]) < 1e-6
        assert (store.run_folder(trained.run_id).checkpoints / "final" / "model.safetensors").is_file()
        assert load_model(folder)[2].seed == published.run.seed
