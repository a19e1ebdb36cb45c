"""Scores of every run: in the record beside the losses, the same as the harness gives, and no bit of training moved."""

import json
import math
import os
import re

import numpy as np
import pytest
from tiny import tiny_run

from kimi_nb.cli import main
from kimi_nb.config import ConfigError, load_profile, settings_path
from kimi_nb.data import load_corpus
from kimi_nb.evals import SCORED_ITEMS, TASK_NAMES, Scorer, choice_scores, chosen_rows, score_metrics_of, share_interval
from kimi_nb.phases.long import studies as studies_of_long
from kimi_nb.phases.scaling import studies as studies_of_scaling
from kimi_nb.plan import changed_profile, published
from kimi_nb.report import Evidence, best_recipe, draw_scores, scores_markdown, scores_section
from kimi_nb.runner import RunnerError, RunnerOptions, run_one, run_study
from kimi_nb.study import Arm, Record, Store, Study, metric_info, read_sealed

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


# data of a study


def test_a_profile_takes_other_lines_without_an_edit_and_leaves_nothing_behind(tmp_path):
    before = sorted(settings_path().parent.glob(".*.ini"))
    changes = {"data.corpus": "tinyworld", "data.num_documents": "2000", "data.max_tokens": "500000", "seeds": "1"}
    with changed_profile("smoke", changes, tmp_path) as name:
        data = load_profile(name).base.data
        assert (data.corpus, data.num_documents, data.max_tokens) == ("tinyworld", 2000, 500000)
        assert load_profile(name).seeds == 1 and name.startswith("smoke-")
        assert load_profile("smoke").base.data.corpus == "pydocs"
    assert (tmp_path / "settings" / f"{name}.ini").is_file() and sorted(settings_path().parent.glob(".*.ini")) == before
    with changed_profile(name, {}, tmp_path) as again:
        assert again == name and load_profile(again).base.data.corpus == "tinyworld"
    refused = pytest.raises(ConfigError, match=r"--set .* data.corpsu is not a setting: did you mean data\.corpus")
    with refused, changed_profile("smoke", {"data.corpsu": "x"}, tmp_path):
        pass
    assert sorted(settings_path().parent.glob(".*.ini")) == before and "KIMI_NB_SETTINGS" not in os.environ


def amounts(*numbers, corpus="tinyworld"):
    """A study of amounts of a text."""
    blocks = {f"{n} documents": {"data.num_documents": n, "data.corpus": corpus} for n in numbers}
    arms = [Arm("reference").within(block) for block in blocks]
    base = tiny_run(train__steps=2, train__eval_every=0, train__save_every=0)
    return Study(name="amounts", base=base, baseline="reference", seeds=(0,), arms=arms, blocks=blocks)


def test_amounts_of_a_text_are_different_texts_or_refused(tmp_path):
    (tmp_path / "a").mkdir()
    for k in range(30):
        (tmp_path / "a" / f"{k}.txt").write_text(f"document {k} of the folder, which says {k * k} and no more. " * 4)
    here = RunnerOptions(executor="inprocess", progress=False)
    with pytest.raises(RunnerError, match=r"40 documents and 50 documents are the same text, .* 24 documents"):
        run_study(amounts(40, 50, corpus=str(tmp_path / "a")), Store(tmp_path / "r"), options=here)
    records = run_study(amounts(40, 80), Store(tmp_path / "s"), options=here)
    assert len({record.provenance["data"]["fingerprint"] for record in records}) == 2


def test_a_study_of_amounts_may_repeat_its_text_and_another_may_not(tmp_path):
    here = RunnerOptions(executor="inprocess", progress=False, max_epochs=0.01)
    assert all(r.ok for r in run_study(amounts(40, 80), Store(tmp_path / "s"), options=here))
    one = Study(name="one", base=tiny_run(), baseline="a", seeds=(0,), arms=[Arm("a")])
    with pytest.raises(RunnerError, match="more than max_epochs"):
        run_study(one, Store(tmp_path / "r"), options=here)


def test_the_paper_profile_compares_amounts_that_its_text_has():
    found = next(s for s in studies_of_scaling(load_profile("paper")) if s.name == "scaling-data")
    asked = [(found.arm_run(arm).data.corpus, found.arm_run(arm).data.num_documents) for arm in found.arms]
    assert asked == [("pysource", None), ("tinyworld", None)] + [("tinyworld", n) for n in (1000, 3000, 10000)]
    documents = [len(load_corpus("tinyworld", n)) for n in (1000, 3000)]
    assert documents[0] > 950 and documents[1] > 2.5 * documents[0]


def test_a_study_of_one_arm_in_several_blocks_ends_without_a_comparison(tmp_path, monkeypatch, capsys):
    """What more text gives is read from the means of the blocks: there is no other arm inside a block."""
    monkeypatch.setenv("KIMI_NB_RESULTS", str(tmp_path))
    line = "run scaling-data --profile smoke --executor inprocess --scores none --quiet".split()
    for setting in ("data.corpus=tinyworld", "data.tokenizer=byte", "scaling.train.steps=2", "train.warmup_steps=1"):
        line += ["--set", setting]
    assert main([*line, "--set", "scaling.data.num_documents=40,80"]) == 0
    told = capsys.readouterr().out
    assert "num_documents 40" in told and "num_documents 80" in told and "nothing to compare" in told


def test_a_very_long_run_keeps_a_checkpoint_every_thousand_steps():
    (longest,), (usual,) = (studies_of_long(load_profile(name)) for name in ("paper", "quick"))
    assert (longest.base.train.steps, longest.base.train.save_every, longest.keep) == (50000, 1000, 50)
    assert usual.keep == 20 and usual.base.train.save_every * 20 == usual.base.train.steps


def test_what_eval_scored_is_kept_beside_the_run(pair, capsys):
    _, scored, folder = pair
    run = Store(folder / "scored").folder(scored.run_id)
    pytest.importorskip("lm_eval")
    assert main(["eval", "--checkpoint", str(run), "--tasks", "arithmetic", "--limit", "5"]) == 0
    assert "kept in" in capsys.readouterr().out
    kept = read_sealed(run / "scores" / "final-arithmetic-5.json")
    assert kept["run_id"] == scored.run_id and kept["tasks"]["arithmetic"]["n"] == 5


def test_the_best_architecture_is_stated_with_its_settings_and_caveats(tmp_path):
    lines = best_recipe(published("standard"))
    assert re.match(
        r"The best of the cells is .*bits per byte\), with optimizer \w+, rate of the matrices [\d.]+", lines[0]
    )
    assert "Hsu" in lines[1] and lines[-1].startswith("Rates were tuned at the baseline's architecture")
    assert best_recipe(Store(tmp_path)) == []
