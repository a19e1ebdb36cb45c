"""The largest batch that fits, and what a study's blocks take."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_run

from kimi_nb.bench import batch, bisected, largest_batch
from kimi_nb.bench.batch import BatchTry
from kimi_nb.cli import main
from kimi_nb.config import KimiError
from kimi_nb.runner import RunnerError, run_one, run_studies
from kimi_nb.study import Arm, Store, Study, read_sealed


@given(st.integers(0, 300), st.integers(1, 300), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_search_finds_what_fits(room, most, share):
    """At most `share` below the answer, nothing tried twice, and few tries."""
    asked = []

    def fits(n):
        asked.append(n)
        return n <= room

    found, right = bisected(fits, most, share), min(room, most)
    assert found <= right and right - found <= share * found
    assert len(set(asked)) == len(asked) <= 2 + 2 * math.log2(most + 1)
    assert found in asked or found == 0


def test_a_try_that_runs_out_of_memory_is_kept_with_the_others(tmp_path, monkeypatch):
    """As a GPU's: 12 sequences fit; what was tried stands in a sealed file beside the answer."""
    full = lambda run, n, *more: BatchTry(n, n <= 12, 10.0 * n, 0.1 * n, "" if n <= 12 else "out of memory")
    monkeypatch.setattr(batch, "try_batch", full)
    found = largest_batch(tiny_run(), 500.0, most=64, share=0.0, store=tmp_path)
    assert found.largest == 12 and found.best.step_seconds == pytest.approx(1.2)
    assert list(found.frame()["fits"]) == [n <= 12 for n in found.frame()["batch_size"]]
    (file,) = (tmp_path / "batches").iterdir()
    kept = read_sealed(file)
    assert (kept["largest"], kept["limit_mb"]) == (12, 500.0)
    assert [one["batch_size"] for one in kept["tried"]] == [one.batch_size for one in found.tried]


@pytest.mark.parametrize("wrong", [dict(most=0), dict(share=1.0), dict(limit_mb=-1)])
def test_an_impossible_search_is_refused(wrong):
    with pytest.raises(KimiError, match="at least 1, from 0 to below 1, and over 0"):
        largest_batch(tiny_run(), **wrong)


@pytest.mark.slow
def test_a_limit_on_memory_bounds_the_batch(tmp_path, capsys):
    """On a CPU by resident memory: a run whose activations grow by some MB a sequence, against a limit it reaches."""
    run = tiny_run(model__d_model=128, model__max_seq_len=256, model__n_layers=2, train__seq_len=256)
    one = batch.try_batch(run, 1, None, "cpu", 1)
    more = batch.try_batch(run, 33, None, "cpu", 1)
    each = (more.peak_memory_mb - one.peak_memory_mb) / 32
    assert one.fits and more.fits and each > 1 and more.step_seconds > one.step_seconds
    run.save(tmp_path / "run.yaml")
    limit = one.peak_memory_mb + 10 * each
    words = ["--memory-limit", f"{limit}", "--device", "cpu", "--threads", "1", "--share", "0.3", "--json"]
    assert main(["--results", str(tmp_path / "results"), "batch", "--config", str(tmp_path / "run.yaml"), *words]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert 3 <= row["largest_batch"] <= 24 and row["peak_memory_mb"] <= limit + 1
    assert len(list((tmp_path / "results" / "batches").iterdir())) == 1


def test_a_study_that_nobody_declares_is_refused(capsys):
    for command in (["memory", "nrom"], ["batch", "--arms", "nrom"]):
        assert main(command) == 2
        assert "study 'nrom' is unknown: did you mean norm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.d_model": 1_000_000}, "make model.d_model, n_layers, d_ff or the experts smaller"),
        ({"model.n_layers": 300, "model.d_ff": 10_000_000}, "make model.d_model, n_layers, d_ff"),
        ({"model.vocab_size": 10_000_000, "model.d_model": 100_000}, "a network of 1,"),
        (
            {"train.batch_size": 10_000_000, "model.max_seq_len": 100_000},
            "make train.batch_size or train.seq_len smaller",
        ),
        ({"data.num_documents": 1_000_000_000}, "make data.num_documents smaller"),
        ({"data.num_documents": None, "data.max_tokens": 10**12}, "make data.max_tokens smaller"),
    ],
)
def test_a_run_that_no_memory_holds_is_refused_before_it_begins(changes, words, tmp_path):
    """By itself and within a study, with a line that says how much it needs; no folder is begun, no text read."""
    store, run = Store(tmp_path), tiny_run().override(changes)
    for work in (
        lambda: run_one(run, store),
        lambda: run_studies([Study(name="one", base=run, baseline="a", arms=[Arm("a")])], store, progress=False),
    ):
        with pytest.raises(
            RunnerError, match=r"needs at least [\d,]+ GB of memory, and this (machine|GPU) has "
        ) as told:
            work()
        assert words in str(told.value)
    assert not (tmp_path / "experiments").exists()
