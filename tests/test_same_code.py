"""Code that was shown to be equal: what the record makes of it, and the tool that shows it."""

import importlib.util
import json
from pathlib import Path

import pytest

from kimi_nb.config import RunConfig
from kimi_nb.plan import where_from
from kimi_nb.study import Record, RecordError, code_hash, record, seal, shown_equal, shown_since

TOOL = Path(__file__).resolve().parents[1] / "docs" / "same_code.py"
ABOUT = dict(runs=40, steps=12, commits=["a" * 40, "b" * 40], where="a processor, PyTorch 2.13.0")
NOW = code_hash(RunConfig())


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("same_code", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Puts comparisons where the package looks for them."""
    file = tmp_path / "equal_code.json"
    monkeypatch.setattr(record, "equal_code_file", lambda: file)

    def put(*pairs):
        record._pairs_shown.cache_clear()
        file.write_text(seal(dict(shown=[ABOUT | dict(pairs=[pair]) for pair in pairs])))
        return file

    return put


def made_by(code: str) -> Record:
    return Record.of(RunConfig(), "done", provenance=dict(code_hash=code))


def test_a_record_of_code_that_was_shown_equal_is_not_stale(write):
    """Of today's hash, of a listed one, through a chain, and either way round; of any other it is stale."""
    write(["older", "old"], ["old", NOW], ["other", "another"])
    assert made_by(NOW).equivalence == [] and not made_by(NOW).stale
    assert len(made_by("old").equivalence) == 1 and len(made_by("older").equivalence) == 2
    assert not made_by("older").stale
    assert made_by("another").stale and made_by("unknown").stale and made_by("another").equivalence is None
    assert Record.of(RunConfig(), "done", provenance=dict(code_hash="")).stale
    words = made_by("old").equivalence[0].words()
    assert words == (
        "shown equal to the bit over the first 12 steps of 40 runs, aaaaaaaaaa to bbbbbbbbbb "
        "(a processor, PyTorch 2.13.0)"
    )
    assert shown_equal(NOW, "older") and shown_since(["other"]) and not shown_since(["unknown"])


def test_without_a_comparison_only_the_same_hash_is_fresh(write):
    write()
    assert not made_by(NOW).stale and made_by("old").stale


@pytest.mark.parametrize(
    ("old", "new"), [('"runs":40', '"runs":41'), ('"shown"', '"shows"'), ('["old"', '["new"'), ("}", "")]
)
def test_an_altered_list_is_refused_in_a_line(old, new, write):
    file = write(["old", NOW])
    file.write_text(file.read_text().replace(old, new))
    record._pairs_shown.cache_clear()
    with pytest.raises(RecordError, match=str(file)) as e:
        _ = made_by("old").stale
    assert "\n" not in str(e.value)


def test_a_list_of_another_shape_is_refused(write):
    file = write()
    file.write_text(seal(dict(shown=[dict(pairs=3)])))
    record._pairs_shown.cache_clear()
    with pytest.raises(RecordError, match="no list of code that was shown equal"):
        _ = made_by("old").stale


def test_pages_say_what_was_shown(write):
    about = dict(
        profile="quick", phases=["a"], device_name="one", device="cuda", runs=1, statuses={"done": 1}, dirty=False,
        others=0, torch="2", python="3", finished="2026-01-01", code_hash="old x",
    )  # fmt: skip
    write(["other", "another"])
    assert "Later code" not in where_from(about)
    write(["old", NOW])
    assert "Later code gives the same bits" in where_from(about)


def test_one_run_of_every_kind_is_compared(tool):
    """Another rate or seed is no other path through the code; another component, or a switch, is."""
    base = RunConfig()
    same = [base, base.override({"train.lr": 1e-4, "seed": 3, "model.d_model": 128, "data.max_tokens": 99})]
    other = [
        {"model.norm.kind": "rmsnorm"}, {"model.tie_embeddings": False}, {"model.dropout": 0.1},
        {"train.optimizer.name": "muon"}, {"train.optimizer.name": "muon", "train.optimizer.muon_split": "heads"},
        {"data.corpus": "tinyworld"}, {"train.grad_clip": 0}, {"train.schedule": "linear"},
    ]  # fmt: skip
    configs = [run.model_dump(mode="json") for run in (*same, *map(base.override, other))]
    assert tool.distinct(configs) == [configs[0], *configs[2:]]
    assert tool.distinct([base.override({"train.steps": 0}).model_dump(mode="json")]) == []


def test_a_difference_in_one_bit_is_named(tool):
    config = RunConfig().model_dump(mode="json")
    one = dict(hash="a", numbers=[["0x1.0p+0", "0x1.0p+0"]] * 2, scores={}, weights="w")
    assert tool.differences([config], [one], [one | dict(hash="b")]) == []
    bad = one | dict(numbers=[one["numbers"][0], ["0x1.0000000000001p+0", "0x1.0p+0"]])
    (line,) = tool.differences([config], [one], [bad])
    assert line.startswith("numbers differ, from step 2 on: ")
    assert tool.differences([config], [one], [one | dict(weights="v")])[0].startswith("weights differ: ")


def test_the_tool_trains_what_it_says(tool, tmp_path, monkeypatch):
    """The same process twice: same bits; and the hash is the one that records carry."""
    from tiny import tiny_run

    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path))
    config = tiny_run().model_dump(mode="json")
    first, again = (tool.train([config], 3)[0] for _ in range(2))
    assert first == again and first["hash"] == code_hash(config) and len(first["numbers"]) == 3
    assert json.loads(json.dumps(first)) == first
