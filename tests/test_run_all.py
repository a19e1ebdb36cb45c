"""Somebody opens a phase in the lab and runs all its cells: what was found stays as it was."""

import os
import platform
from contextlib import suppress

import nbformat
import numpy as np
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


def leaves(value, path=()):
    """Every number and word of a tree: path -> value; a table's cell that is a number counts as one."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, inner in items for key, leaf in leaves(inner, (*path, name)).items()}
    with suppress(TypeError, ValueError):
        value = value if isinstance(value, bool) else float(value)
    return {path: value}


def told(store):
    """What all phases found, with every profile."""
    return leaves({name: outcome.model_dump(exclude=OWN) for name, outcome in outcomes_of(store).items()})


def differences(found, now):
    """Words that differ, and numbers that differ by more than the five digits of published curves explain."""
    same = lambda a, b: a == b or isinstance(a, float) and isinstance(b, float) and np.isclose(a, b, rtol=0.02)
    return {k: (found.get(k), now.get(k)) for k in found.keys() | now.keys() if not same(found.get(k), now.get(k))}


def pictures(store):
    """Every figure as grey values; published ones have a palette, those drawn now have not."""
    from PIL import Image

    files = sorted((store.path / "plots").rglob("*.png"))
    return {path.relative_to(store.path): np.asarray(Image.open(path).convert("L"), float) for path in files}


def run_all(desk, name):
    """What the menu's entry does, in a kernel that the lab's server would start."""
    from nbclient import NotebookClient

    (path,) = (desk.notebook.parent / "phases").glob(f"*_{name}.ipynb")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, resources=dict(metadata=dict(path=str(path.parent))), timeout=500)
    client.execute(env=os.environ | dict(KIMI_NB_RESULTS=str(desk.results)))


@pytest.mark.parametrize("name", ["norm", "combined"])
def test_run_all_over_finished_results_changes_nothing(desk, name):
    store = Store(desk.results)
    runs = sorted(folder.path.name for folder in store.run_folders(aside=True))
    found, drawn = told(store), pictures(store)
    run_all(desk, name)
    assert sorted(folder.path.name for folder in store.run_folders(aside=True)) == runs  # nothing was trained
    assert differences(found, told(store)) == {} and outcomes_of(store)[name].profile == "quick"
    now = pictures(store)
    assert now.keys() == drawn.keys()
    assert {file for file in now if now[file].shape != drawn[file].shape} == set()
    far = {str(file): float(np.abs(now[file] - drawn[file]).mean()) for file in now}
    assert {file: value for file, value in far.items() if value > 2} == {}


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
