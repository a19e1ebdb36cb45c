"""Two stores beside each other: the same runs, how far apart they are, other rates, other words."""

import json
import time

import pytest
from tiny import tiny_run

from kimi_nb.cli import main
from kimi_nb.config import load_profile
from kimi_nb.report import agree, agreement_data, agreement_told, agreement_words, common_runs, words_apart
from kimi_nb.study import Arm, Finding, Record, Store, Study, record_outcome

TRIED = (1e-3, 2e-3, 4e-3)


def plan_on(path, rate, noise=0.0, word="supported", precision="fp32"):
    """A store with a tuned AdamW, two arms and three seeds; `noise` is what the machine adds to a loss."""
    store, base = Store(path), tiny_run(train__precision=precision)
    searched = Study(
        name="tuning-1",
        phase="optimizer",
        base=base,
        arms=[
            Arm(f"adamw lr {lr:g}", base.differing({"train.optimizer.name": "adamw", "train.lr": lr})) for lr in TRIED
        ],
        baseline="adamw lr 0.001",
        seeds=(1000,),
        metric="val_loss",
    )
    study = Study(
        name="norm",
        phase="norm",
        base=base,
        arms=[
            Arm(kind, base.differing({"train.optimizer.name": "adamw", "train.lr": rate, "model.norm.kind": kind}))
            for kind in ("layernorm", "rmsnorm")
        ],
        baseline="layernorm",
        seeds=(0, 1, 2),
    )
    for asked in (searched, study):
        for p in asked.expand():
            loss = 2.0 + 0.01 * p.seed + noise * (1 + p.seed % 3)
            curves = dict(train_loss=dict(step=[1, 2, 3], value=[5.0, 4.0 + noise, 3.0 + 2 * noise]))
            metrics = dict(test_loss=loss, val_loss=loss, test_bpb=loss, seconds=time.perf_counter())
            store.put(
                Record.of(p.run, "done", metrics, curves, dict(device="cpu", device_name=f"noise {noise}")), asked.phase
            )
        store.record_study(asked)
    finding = Finding(id="RQ2", claim="RMSNorm is better.", word=word, direction="better", size="beyond", diff=-0.1)
    record_outcome(store, "norm", load_profile("quick"), [finding])
    return store


def test_equal_runs_are_counted_and_others_measured(tmp_path):
    """Runs that share an id are paired; equal ones are so in every digit, others have a spread and a parting step."""
    a, same, b = plan_on(tmp_path / "a", 2e-3), plan_on(tmp_path / "same", 2e-3), plan_on(tmp_path / "b", 2e-3, 0.01)
    assert agree(a, same).runs["equal"].all()
    found = agree(a, b, ("a", "b"))
    assert len(found.runs) == 9 and not found.runs["equal"].any() and set(found.runs["parted"]) == {2}
    assert found.runs["diff"].max() == pytest.approx(0.03) and found.spread["sd"][0] == pytest.approx(0.0071, abs=1e-4)
    assert (
        "9" in str(found.spread["runs"][0])
        and "nine runs in common, 0 equal" in " ".join(agreement_words(found)).lower()
    )


def test_what_was_carried_over_shows_nothing(tmp_path):
    """Rates and runs that a second plan took from the first, records and all, are no second measurement."""
    a = plan_on(tmp_path / "a", 2e-3)
    a.export(tmp_path / "tuning.jsonl.gz", study=["tuning-1"])
    b = Store(tmp_path / "b")
    b.import_records(tmp_path / "tuning.jsonl.gz")
    other = plan_on(tmp_path / "other", 2e-3, 0.01)
    other.export(tmp_path / "norm.jsonl.gz", study=["norm"])
    b.import_records(tmp_path / "norm.jsonl.gz")
    found = agree(a, b)
    assert set(found.runs["where"]) == {"norm / layernorm", "norm / rmsnorm"} and found.rates.empty
    assert len(agree(a, other).rates) == 1


def test_a_machine_with_another_number_format_is_matched_by_its_settings(tmp_path):
    """Where ids differ by what the machine chose, the configuration without it pairs the runs."""
    a, b = plan_on(tmp_path / "a", 2e-3), plan_on(tmp_path / "b", 2e-3, precision="bf16")
    runs = common_runs(a, b)
    assert len(runs) == 9 and set(runs["matched"]) == {"settings"} and (runs["run_a"] != runs["run_b"]).all()


def test_rates_and_words_that_differ_are_named(tmp_path):
    """A rate one grid step up, and a claim whose word changed; a claim that kept its word is not said to change."""
    a, b = plan_on(tmp_path / "a", 2e-3), plan_on(tmp_path / "b", 4e-3, word="undecided")
    found = agree(a, b, ("a", "b"))
    (rate,) = found.rates.to_dict("records")
    assert (rate["a"], rate["b"]) == (2e-3, 4e-3) and rate["steps"] == pytest.approx(1)
    assert list(found.words["changed"]) == [True]
    assert "norm RQ2: supported, better, beyond at a; undecided, better, beyond at b." in " ".join(
        agreement_words(found)
    )
    assert not words_apart(a, plan_on(tmp_path / "c", 2e-3))["changed"].any()


def test_a_published_comparison_is_told_in_words(tmp_path):
    """From its JSON alone: runs, their spread beside that of seeds, rates, and each word that changed."""
    a, b = plan_on(tmp_path / "a", 2e-3), plan_on(tmp_path / "b", 4e-3, 0.01, word="undecided")
    told = agreement_told(json.loads(json.dumps(agreement_data(agree(a, b, ("a", "seeds_100_to_104"))))))
    assert (
        told.startswith("Made again as *seeds 100 to 104* on ")
        and "tuned values at most 1 of a grid's steps apart" in told
    )
    assert "of one claim judged both times, one changed (norm RQ2 from “supported” to “undecided”)" in told
    same = agreement_told(agreement_data(agree(a, plan_on(tmp_path / "same", 2e-3))))
    assert "nine runs in common, all equal in every digit" in same and "none changed" in same


def test_the_command_prints_words_or_json_and_draws(tmp_path, capsys):
    """`records agree A B` takes folders and exported files; anything else is refused in one line."""
    a, b = plan_on(tmp_path / "a", 2e-3), plan_on(tmp_path / "b", 2e-3, 0.01)
    b.export(tmp_path / "b.jsonl.gz")
    figure = tmp_path / "apart.png"
    assert main(["records", "agree", str(a.path), str(tmp_path / "b.jsonl.gz"), "--json", "--figure", str(figure)]) in (
        0,
        None,
    )
    told = json.loads(capsys.readouterr().out)
    assert len(told["runs"]) == 9 and told["words"] == [] and figure.stat().st_size > 5000
    assert told == json.loads(json.dumps(agreement_data(agree(a, b, told["names"])) | dict(words=[])))
    for wrong in (["agree", str(a.path)], ["agree", str(a.path), "nowhere"], ["verify", "x", "y"]):
        assert main(["records", *wrong, "--results", str(a.path)]) not in (0, None)
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
