"""Scores of every run: in the record beside the losses, the same as the harness gives, and no bit of training moved."""

import json
import math

import numpy as np
import pytest
from tiny import tiny_run

from kimi_nb.evals import SCORED_ITEMS, TASK_NAMES, Scorer, choice_scores, chosen_rows, score_metrics_of, share_interval
from kimi_nb.report import Evidence, draw_scores, scores_markdown, scores_section
from kimi_nb.runner import RunnerOptions, run_one, run_study
from kimi_nb.study import Arm, Record, Store, Study, metric_info

CLOCK = ("seconds", "tokens_per_second", "memory")


def untimed(metrics):
    """What the clock and the memory leave out."""
    return {name: value for name, value in metrics.items() if not any(word in name for word in CLOCK)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same run without scores and with them."""
    folder = tmp_path_factory.mktemp("scores")
    plain = run_one(tiny_run(), Store(folder / "plain"))
    return plain, run_one(tiny_run(), Store(folder / "scored"), scorer=Scorer(items=8)), folder


def test_scores_stand_beside_the_losses_and_training_is_the_same(pair):
    plain, scored, folder = pair
    told = {name: value for name, value in scored.metrics.items() if name.startswith("score")}
    assert told["score_n"] == 8 * len(TASK_NAMES) and told["score_tasks"] == len(TASK_NAMES)
    assert all(told[f"score_{task}_chance"] == 0.25 for task in TASK_NAMES)
    assert untimed(plain.metrics).items() <= scored.metrics.items()
    assert untimed(scored.metrics).keys() - untimed(plain.metrics).keys() == {n for n in told if "seconds" not in n}
    for name in set(plain.curves) - {"seconds"}:
        assert plain.curves[name] == scored.curves[name], name
    weights = [
        next((folder / which).glob("experiments/*/checkpoints/final/model.safetensors"))
        for which in ("plain", "scored")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_scored_record_is_sealed_listed_and_carried(pair, tmp_path):
    _, scored, folder = pair
    store = Store(folder / "scored")
    assert store.verify() == [] and store.get(scored.run_id).digest == scored.digest
    store.rebuild()
    listed = json.loads((store.path / "experiments.json").read_text())
    assert listed[0]["results"]["score"] == scored.metrics["score"]
    store.export(tmp_path / "records.jsonl.gz")
    there = Store(tmp_path / "there")
    there.import_records(tmp_path / "records.jsonl.gz")
    assert there.get(scored.run_id).metrics == scored.metrics
    assert there.frame()["score_arithmetic"].iloc[0] == scored.metrics["score_arithmetic"]


def test_a_run_whose_scores_cannot_be_had_keeps_its_record(tmp_path):
    def broken(place, device):
        raise ValueError("no items")

    store = Store(tmp_path)
    record = run_one(tiny_run(), store, scorer=broken)
    assert record.ok and "score" not in record.metrics and record.metrics["test_bpb"] > 0
    assert "not scored: ValueError: no items" in store.run_folder(record.run_id).log_file.read_text()


def test_a_record_without_scores_is_not_trained_again(tmp_path):
    store = Store(tmp_path)
    first = run_one(tiny_run(), store)
    assert run_one(tiny_run(), store, scorer=Scorer()).digest == first.digest


@pytest.mark.slow
def test_workers_score_what_they_train(tmp_path):
    study = Study(name="one", base=tiny_run(), baseline="a", seeds=(0,), arms=[Arm("a"), Arm("b", {"train.lr": 2e-3})])
    records = run_study(
        study, Store(tmp_path), options=RunnerOptions(workers=1, progress=False, scorer=Scorer(items=4))
    )
    assert [record.metrics["score_n"] for record in records] == [16, 16]


def test_the_items_are_the_same_for_every_run_and_come_from_both_halves():
    for task in TASK_NAMES:
        rows = chosen_rows(task)
        assert len(rows) == SCORED_ITEMS == len({row["id"] for row in rows})
        assert [row["half"] for row in rows].count("general") == SCORED_ITEMS // 2
        assert len(chosen_rows(task, None)) == 120


def test_overall_score_is_that_of_its_parts():
    right = np.array([1.0, 0.0, 1.0, 1.0])
    found = {"arithmetic": dict(right=right, probability=np.full(4, 0.4), chance=np.full(4, 0.25))}
    others = {
        "piqa": dict(status="done", score=0.5, stderr=0.1, chance=0.5, n=20),
        "siqa": dict(status="skipped: no rows", group="tiny"),
    }
    metrics = score_metrics_of(found, others)
    assert metrics["score"] == pytest.approx(((0.75 - 0.25) / 0.75 + 0) / 2)
    assert metrics["score_stderr"] == pytest.approx(math.hypot(right.std(ddof=1) / 2 / 0.75, 0.1 / 0.5) / 2)
    assert (metrics["score_n"], metrics["score_tasks"], metrics["score_probability"]) == (24, 2, pytest.approx(0.4))
    assert "score_siqa" not in metrics and metrics["score_piqa_chance"] == 0.5
    assert score_metrics_of({}) == {}


def test_every_score_has_words():
    for name in ("score", "score_n", "score_arithmetic", "score_simple_qa_stderr", "score_probability_chance"):
        assert metric_info(name).known, name
    assert metric_info("score_arithmetic").good == 1 and metric_info("score_arithmetic_chance").good == 0


def test_an_interval_of_a_share_holds_it():
    low, high = share_interval(0.1, 40)
    assert 0 < low < 0.1 < high < 0.3


@pytest.mark.slow
def test_the_scores_are_those_of_the_harness():
    pytest.importorskip("lm_eval")
    from kimi_nb.config import ModelConfig
    from kimi_nb.data import build_tokenizer
    from kimi_nb.evals import run_benchmarks
    from kimi_nb.model import KimiModel

    byte = build_tokenizer("byte", [])
    model = KimiModel(
        ModelConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=byte.vocab_size), seed=1
    )
    ours = score_metrics_of(choice_scores(model, byte, None))
    theirs = run_benchmarks(model, byte, ",".join(TASK_NAMES))
    for task in TASK_NAMES:
        assert ours[f"score_{task}"] == pytest.approx(theirs[task]["score"]), task
        assert ours[f"score_{task}_stderr"] == pytest.approx(theirs[task]["stderr"]), task


# what scores go with


def scored_store(folder, arms, slope=0.2):
    """A store of records with scores, made by hand: the score falls with the loss."""
    rng, store = np.random.default_rng(0), Store(folder)
    chosen = [Arm(f"a{k}", {"train.lr": 1e-3 * (1 + k)}) for k in range(arms)]
    study = Study(name="made", base=tiny_run(), baseline="a0", seeds=(0, 1), arms=chosen)
    for planned in study.expand():
        loss = 2 + 0.05 * int(planned.arm[1:])
        one = {f"score_{task}": 1 - slope * loss + rng.normal(0, 0.01) for task in TASK_NAMES}
        metrics = dict(test_bpb=loss, score=1 - slope * loss, score_stderr=0.03, score_n=160, score_tasks=4)
        store.put(Record.of(planned.run, "done", metrics | one), planned.name)
    store.record_study(study)
    return store


def test_the_report_says_what_scores_go_with(tmp_path):
    e = Evidence(scored_store(tmp_path / "many", 16))
    drawn = draw_scores(e, tmp_path)
    assert drawn.is_file()
    text = str(scores_section(e, drawn))
    assert "32 runs have scores" in text and "scores-tasks" in text and "train.lr" in text
    lines = scores_markdown(e)
    assert lines[0] == "32 scored runs of 16 arms, four tasks." and "rank correlation -1.00" in " ".join(lines)


def test_few_scored_arms_say_nothing(tmp_path):
    e = Evidence(scored_store(tmp_path, 5))
    assert scores_section(e) == [] == scores_markdown(e) and draw_scores(e, tmp_path) is None


def test_records_without_scores_have_no_section(tmp_path):
    store = Store(tmp_path)
    store.put(Record.of(tiny_run(), "done", dict(test_bpb=2.0)))
    assert scores_section(Evidence(store)) == [] == scores_markdown(Evidence(store))
