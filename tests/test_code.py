"""Which code and which settings a run's names cover: what changes them, and what must not."""

import ast
import shutil
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from kimi_nb.config import NEUTRAL, AttentionConfig, Float, ModelConfig, RunConfig
from kimi_nb.study import TRAINING_WINGS, asked_for, code_hash, files_of, hash_definitions, training_files

PACKAGE = Path(__file__).resolve().parents[1] / "kimi_nb"
RUNS = dict(
    plain=RunConfig(),
    kimi=RunConfig.preset("kimi"),
    plan=RunConfig.preset("plan"),
    latent=RunConfig().override({"model.attention.kind": "latent"}),
    kda=RunConfig().override({"model.attention.kind": "kda"}),
    mixed=RunConfig().override({"model.attention.pattern": "latent,kda"}),
    aux=RunConfig.preset("plan").override({"model.moe.router": "aux_tc"}),
)


@pytest.fixture
def package(tmp_path):
    """A copy of the code that decides runs."""
    for wing in TRAINING_WINGS:
        shutil.copytree(PACKAGE / wing, tmp_path / wing, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def hashes(package) -> dict[str, str]:
    """What `code_hash` would say of each run if the package lay there."""
    return {name: hash_definitions(files_of(asked_for(run), training_files(package))) for name, run in RUNS.items()}


def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_hashes_are_those_of_this_process(package):
    assert hashes(package) == {name: code_hash(run) for name, run in RUNS.items()}
    assert len(set(hashes(package).values())) == len(RUNS)


def test_moving_and_formatting_code_changes_no_hash(package):
    before = hashes(package)
    for path in training_files(package):  # as the syntax tree prints it: no comments, other lines, other quotes
        path.write_text(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))), encoding="utf-8")
    assert hashes(package) == before
    change(package / "model" / "rope.py", '"""', '"""Another first line. ')
    kernels, caches = package / "model" / "kernels.py", package / "model" / "caches.py"
    text = kernels.read_text(encoding="utf-8")
    (moved,) = (ast.unparse(n) for n in ast.parse(text).body if getattr(n, "name", "") == "causal_mask")
    change(kernels, moved, "")
    caches.write_text(caches.read_text(encoding="utf-8") + "\n" + moved, encoding="utf-8")
    assert hashes(package) == before
    change(caches, "2 * buffer.shape[2]", "3 * buffer.shape[2]")
    assert all(hashes(package)[name] != before[name] for name in RUNS)


NOVEL = """
__component__ = ("attention.kind", "novel")
from .rmsnorm import RMSNorm
class NovelAttention:
    kind = "novel"
"""


def test_a_new_component_changes_no_hash_and_no_run_id(package):
    before, ids = hashes(package), {name: run.run_id for name, run in RUNS.items()}
    (package / "model" / "novel.py").write_text(NOVEL, encoding="utf-8")
    change(package / "model" / "attention.py", "    mha=Multi", "    novel=NovelAttention,\n    mha=Multi")
    change(
        package / "model" / "attention.py", "from .mha import", "from .novel import NovelAttention\nfrom .mha import"
    )
    change(package / "config" / "schema.py", '"gdn"]', '"gdn", "novel"]')
    change(package / "config" / "schema.py", "    n_latents:", "    novelty: Positive = 3  # novel\n    n_latents:")
    assert hashes(package) == before and ids == {name: run.run_id for name, run in RUNS.items()}
    novel = {**asked_for(RunConfig()), "attention.kind": "novel"}
    used = {f.stem for f in files_of(novel, training_files(package))}
    assert {"novel", "rmsnorm"} <= used and "mha" not in used


def test_a_component_counts_for_the_runs_that_use_it(package):
    before = hashes(package)
    change(package / "model" / "mla.py", "gamma.sqrt()", "gamma")
    assert {name for name, found in hashes(package).items() if found != before[name]} == {"kimi"}
    change(package / "model" / "delta.py", "CHUNK = 32", "CHUNK = 64")
    using = {name for name, found in hashes(package).items() if found != before[name]}
    assert using == {"kimi", "kda", "mixed"}
    change(package / "model" / "router_aux_tc.py", "m.top_k", "m.top_k + 0")
    assert {name for name, found in hashes(package).items() if found != before[name]} == using | {"aux"}
    change(package / "model" / "rmsnorm.py", "eps: float = 1e-6", "eps: float = 1e-5")  # latents are normed with it
    change(package / "config" / "schema.py", "4 * self.d_model", "3 * self.d_model")  # a property is code
    assert all(found != before[name] for name, found in hashes(package).items())


def test_run_ids_of_before_are_what_they_were():
    """A run's name is written on records and folders."""
    assert RUNS["plain"].override({"data.corpus": "tinyworld"}).run_id == "aae6127fb99f"
    assert RUNS["kimi"].override({"data.corpus": "tinyworld"}).run_id == "dc63759e93db"


def test_a_neutral_setting_changes_no_run_id():
    class Attention(AttentionConfig):
        gate: Annotated[bool, NEUTRAL] = False
        stretch: Annotated[Float, Field(gt=0), NEUTRAL] = 1.0

    class Model(ModelConfig):
        attention: Attention = Attention()

    class Run(RunConfig):
        model: Model = Model()

    assert Run().run_id == RunConfig().run_id and "model.attention.gate" in Run().flat()
    changed = {Run().override({f"model.attention.{k}": v}).run_id for k, v in dict(gate=True, stretch=2.0).items()}
    assert len(changed | {RunConfig().run_id}) == 3

    class Loud(RunConfig):
        volume: Float = 1.0  # not marked

    assert Loud().run_id != RunConfig().run_id
