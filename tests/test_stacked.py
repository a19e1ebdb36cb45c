"""Stacked seeds: each is its single run to rounding, its record is an ordinary one, and none is mixed with others."""

import os
import signal

import pytest
import torch
from test_train import Stop, stop_after
from tiny import tiny_run
from torch._dynamo.utils import counters

from kimi_nb.config import KimiError
from kimi_nb.data import prepare
from kimi_nb.runner import RunnerError, RunnerOptions, run_stack, run_studies
from kimi_nb.stats import compare, decide
from kimi_nb.study import Arm, RunFolder, Store, Study
from kimi_nb.train import (
    Interrupted,
    Stack,
    Trainer,
    TrainError,
    TrainOptions,
    fit,
    fit_stacked,
    load_model,
    stacking_refusal,
)

MLA = {
    "model.attention.kind": "mla", "model.attention.kv_lora_rank": 8, "model.attention.qk_nope_head_dim": 4,
    "model.attention.qk_rope_head_dim": 4, "model.attention.v_head_dim": 8,
}  # fmt: skip
MOE = {"model.ffn.kind": "moe", "model.d_ff": None, "model.moe.n_experts": 4, "model.moe.d_expert": 16}
NOAUX = MOE | {"model.moe.router": "noaux_tc", "model.moe.bias_update_speed": 0.1}
MUON = {"train.optimizer.name": "muon"}
CLIP = {"train.optimizer.name": "muonclip", "train.optimizer.qk_clip_threshold": 0.001}
ARMS = dict(
    dense={"train.optimizer.name": "adamw"},
    mla=MLA,
    noaux=NOAUX,
    muon=MUON | NOAUX | {"model.norm.kind": "rmsnorm"},
    muonclip=MLA | NOAUX | CLIP | {"model.moe.n_shared_experts": 1, "train.grad_clip": 0.1},
)
SLOW = dict(
    standard=MOE | {"model.moe.aux_loss_weight": 0.01, "train.micro_batch_size": 2},
    aux_tc=MOE | {"model.moe.router": "aux_tc", "model.moe.seq_loss_weight": 0.01},
    quantile=MOE | {"model.moe.router": "quantile"},
    latent_experts=NOAUX | {"model.moe.latent_dim": 8},
    untied=MUON | {"model.tie_embeddings": False, "model.norm.bias": True},
    clip_mha=CLIP | {"model.attention.implementation": "eager"},
    latent={"model.attention.kind": "latent"},
    kda={"model.attention.kind": "kda"},
)
CPU = torch.device("cpu")


def run_of(changes, **more):
    """A run of one layer, 12 steps."""
    return tiny_run(**more).override({name: value for name, value in changes.items() if value is not None})


def trainers(run, data, seeds=3):
    return [Trainer(run.override({"seed": seed}), data, CPU) for seed in range(seeds)]


@pytest.mark.parametrize(
    "name", [*ARMS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)  # fmt: skip
def test_every_seed_is_its_single_run(name):
    """Losses, norms, loads and clips of six steps, and the held-out loss after them.

    Sums are taken in another order, which moves float32 by some 1e-7 of a number; six steps, the first of them with
    Adam's gradients divided by themselves, make at most 1e-4 of it, where seeds lie 1e-2 apart.
    """
    run = run_of((ARMS | SLOW)[name])
    data = prepare(run.data, run.seq_len)
    stack, alone = Stack(trainers(run, data)), trainers(run, data)
    for step in range(6):
        lines, expected = stack.step(step), [trainer.step(step) for trainer in alone]
        for line, other in zip(lines, expected):
            assert line.keys() == other.keys()
            assert line["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
            for same in ("expert_load", "qk_clipped_heads", "lr"):
                assert line.get(same) == other.get(same)
            for near in line.keys() & {"qk_max_logit", "qk_min_gamma", "aux_loss", "max_violation"}:
                assert line[near] == pytest.approx(other[near], rel=1e-2, abs=1e-6)
    if "clip" in name:
        assert lines[0]["qk_clipped_heads"] > 0 and lines[0]["qk_min_gamma"] < 1
    assert max(line["train_loss"] for line in lines) - min(line["train_loss"] for line in lines) > 1e-3
    for ours, theirs in zip(stack.trainers, alone):
        scores, other = ours.evaluate("val"), theirs.evaluate("val")
        assert scores["loss"] == pytest.approx(other["loss"], abs=1e-4)
        for mine, single in zip(ours.moe.values(), theirs.moe.values()):
            torch.testing.assert_close(mine.gate.e_score_correction_bias, single.gate.e_score_correction_bias)
        mine, single = ours.tensors()[0]["optimizer"], theirs.tensors()[0]["optimizer"]
        assert mine.keys() == single.keys() and all(mine[key].shape == single[key].shape for key in mine)


def place(tmp_path, runs, name="stack"):
    return [RunFolder(tmp_path / name / str(run.seed)) for run in runs]


def seeds_of(run, seeds=3):
    return [run.override({"seed": seed}) for seed in range(seeds)]


QUIET = dict(progress=False, device="cpu")


def test_k_records_are_k_ordinary_records(tmp_path):
    runs = seeds_of(run_of(ARMS["muonclip"]))
    folders = place(tmp_path, runs)
    records = fit_stacked(runs, folders, **QUIET)
    for run, folder, record in zip(runs, folders, records):
        single = fit(run, **QUIET)
        assert record.run_id == run.run_id == single.run_id and folder.read_result() == record
        assert record.provenance["stacked"] == 3 and "stacked" not in single.provenance
        assert record.metrics.keys() == single.metrics.keys() and record.curves.keys() == single.curves.keys()
        for name in ("train_loss", "val_loss"):
            assert record.curves[name]["step"] == single.curves[name]["step"]
            assert record.curves[name]["value"] == pytest.approx(single.curves[name]["value"], abs=1e-3)
        model, _, _ = load_model(folder.path)
        data = prepare(run.data, run.seq_len)
        trainer = Trainer(run, data, CPU)
        trainer.model.load_state_dict(model.state_dict())
        assert trainer.evaluate("test")["loss"] == record.metrics["test_loss"]


def test_a_stack_goes_on_where_it_stopped(tmp_path):
    """With the same bits as one that never stopped; a single run does not go on from it, nor it from a single run."""
    runs = seeds_of(run_of(NOAUX | MUON))
    whole = fit_stacked(runs, place(tmp_path, runs, "whole"), **QUIET)
    folders = place(tmp_path, runs, "cut")
    with pytest.raises(Stop):
        fit_stacked(runs, folders, on_step=stop_after(8), **QUIET)
    again = fit_stacked(runs, place(tmp_path, runs, "cut"), **QUIET)
    for one, other in zip(whole, again):
        assert one.curves == other.curves and one.metrics["test_loss"] == other.metrics["test_loss"]
    assert "goes on after step 6" in folders[0].log_file.read_text()
    with pytest.raises(Stop):
        fit_stacked(runs, place(tmp_path, runs, "other"), on_step=stop_after(8), **QUIET)
    single = fit(runs[0], tmp_path / "other" / "0", **QUIET)
    assert "stacked" not in single.provenance and single.curves == fit(runs[0], **QUIET).curves
    assert [p.name for p in (tmp_path / "other" / "0").glob("stacked*")] == ["stacked"]


def test_a_stack_that_is_asked_to_stop_saves_every_seed(tmp_path):
    runs = seeds_of(run_of({}), 2)

    def stop(step, line):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="2 stacked seeds after step 5 of 12"):
        fit_stacked(runs, place(tmp_path, runs), on_step=stop, **QUIET)
    saved = sorted(p.name for p in tmp_path.glob("stack/*/checkpoints/*"))
    assert saved == ["step_00000005"] * 2
    records = fit_stacked(runs, place(tmp_path, runs), **QUIET)
    assert [len(record.curves["train_loss"]["step"]) for record in records] == [12, 12]


@pytest.mark.slow
def test_a_compiled_stack_is_one_graph_a_block():
    counters.clear()
    run = run_of(ARMS["muonclip"])
    data = prepare(run.data, run.seq_len)
    stack, alone = Stack(trainers(run.override({"train.compile": True}), data)), trainers(run, data)
    assert stack.warm_up() > 0
    for step in range(2):
        lines, expected = stack.step(step), [trainer.step(step) for trainer in alone]
        for line, other in zip(lines, expected):
            assert line["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_checkpoints_of_different_steps_begin_anew(tmp_path):
    runs = seeds_of(run_of({}))
    with pytest.raises(Stop):
        fit_stacked(runs, place(tmp_path, runs), on_step=stop_after(8), **QUIET)
    (saved,) = (tmp_path / "stack" / "1" / "checkpoints").glob("step_*")
    saved.rename(saved.with_name("step_00000003"))
    records = fit_stacked(runs, place(tmp_path, runs), **QUIET)
    assert [record.curves["train_loss"]["step"] for record in records] == [list(range(1, 13))] * 3


@pytest.mark.slow
def test_a_seed_that_diverges_ends_alone(tmp_path, monkeypatch):
    real = Stack.step

    def step(self, number):
        if number == 4:
            self.trainers[1].model.norm.weight.data.fill_(float("nan"))
        return real(self, number)

    runs = seeds_of(run_of(NOAUX))
    expected = fit_stacked(runs, place(tmp_path, runs, "whole"), **QUIET)
    monkeypatch.setattr(Stack, "step", step)
    there = []

    def look(number, line):
        there.append((tmp_path / "stack" / "1" / "result.json").exists())

    records = fit_stacked(runs, place(tmp_path, runs), on_step=look, **QUIET)
    assert there == [False] * 5 + [True] * 7  # so that the others could go on without it
    assert [record.status for record in records] == ["done", "diverged", "done"]
    assert records[1].metrics["diverged_at_step"] == 5
    for i in (0, 2):
        assert records[i].curves["train_loss"]["value"] == pytest.approx(
            expected[i].curves["train_loss"]["value"], abs=1e-3
        )


@pytest.mark.parametrize(
    "changes", [{"model.dropout": 0.1}, {"model.mtp_depth": 1}, {"model.residual.kind": "attention"}]
)
def test_what_cannot_be_stacked_says_why(changes, tmp_path):
    runs = seeds_of(run_of(changes))
    assert next(iter(changes)) in stacking_refusal(runs[0])
    with pytest.raises(TrainError, match="one by one"):
        fit_stacked(runs, place(tmp_path, runs), **QUIET)
    mixed = [run_of({}), run_of({"train.lr": 2e-3, "seed": 1})]
    with pytest.raises(TrainError, match="differ in their seed alone"):
        fit_stacked(mixed, place(tmp_path, mixed, "mixed"), **QUIET)


def study_of(*arms, name="s", seeds=(0, 1)):
    return Study(name=name, base=run_of({}), baseline="a", seeds=seeds, arms=(Arm("a"), *arms))


@pytest.mark.parametrize("executor", ["inprocess", pytest.param("process", marks=pytest.mark.slow)])
def test_the_runner_stacks_all_or_none_of_what_belongs_together(executor, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    how = dict(executor=executor, workers=1, progress=False, device="cpu")
    plain, odd = study_of(Arm("b", MLA)), study_of(Arm("c", {"model.dropout": 0.1}), name="odd")
    store = Store(tmp_path / "one")
    records = run_studies([plain], store, stack="always", **how)
    assert [r.provenance.get("stacked") for r in records] == [2] * 4 and {r.status for r in records} == {"done"}
    store = Store(tmp_path / "two")
    records = run_studies([plain, odd], store, stack="always", **how)  # they share arm a
    assert len(records) == 6 and not any("stacked" in r.provenance for r in records)


def test_the_default_stacks_nothing_on_a_cpu(tmp_path):
    records = run_studies([study_of()], Store(tmp_path), executor="inprocess", progress=False, device="cpu")
    assert not any("stacked" in r.provenance for r in records)
    with pytest.raises(RunnerError, match="one of auto, never, always"):
        RunnerOptions(stack="sometimes").check()
    with pytest.raises(RunnerError, match="one machine"):
        RunnerOptions(stack="always", executor="ray").check()


def test_a_failure_of_a_stack_is_a_record_of_each_seed(tmp_path, monkeypatch):
    def broken(*_):
        raise KimiError("no")

    monkeypatch.setattr(Stack, "step", broken)
    how = dict(executor="inprocess", progress=False, device="cpu", stack="always")
    records = run_studies([study_of()], Store(tmp_path), **how)
    assert [(r.status, r.provenance["error"]) for r in records] == [("failed", "no")] * 2


def test_stacked_and_single_runs_are_not_compared(tmp_path):
    """What is there by itself keeps its study from being stacked; where both are there, nothing is decided."""
    study = study_of(Arm("b", MLA), seeds=(0, 1, 2))
    alone, mixed = Store(tmp_path / "alone"), Store(tmp_path / "mixed")
    how = dict(executor="inprocess", progress=False, device="cpu")
    for store in (alone, mixed):
        run_studies([study], store, wanted=lambda planned: planned.arm == "a", **how)
    records = run_studies([study], alone, stack="always", **how)
    assert len(records) == 6 and not any("stacked" in r.provenance for r in records)
    other = [planned for planned in study.expand() if planned.arm == "b"]
    options = TrainOptions(progress=False, device="cpu")
    run_stack([planned.run for planned in other], mixed, [planned.name for planned in other], options)
    run_studies([study], mixed, **how)
    (row,) = compare(alone.frame(study.name), "test_bpb", "a").to_dict("records")
    assert row["mixed"] == ""
    (row,) = compare(mixed.frame(study.name), "test_bpb", "a").to_dict("records")
    assert row["mixed"] == "cpu fp32, cpu fp32 stacked"
    finding = decide(row, claim="b is better")
    assert finding.word == "undecided" and any("way of training" in caveat for caveat in finding.caveats)
