"""Training: what a run promises about its numbers, its files and its failures."""

import json
import math
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kimi_nb.config import ConfigError, KimiError, RunConfig
from kimi_nb.data import prepare
from kimi_nb.train import (
    CheckpointError,
    Trainer,
    TrainError,
    checkpoints,
    fit,
    held_out_scores,
    load_model,
    pick_device,
    trainer,
)

TINY = {
    "data.corpus": "tinyworld",
    "data.tokenizer": "byte",
    "data.num_documents": 60,
    "model.d_model": 32,
    "model.max_seq_len": 16,
    "train.steps": 8,
    "train.batch_size": 4,
    "train.eval_tokens": 300,
    "train.lr": 1e-2,
}
KIMI = {
    "model.attention.kind": "mla",
    "model.attention.kv_lora_rank": 16,
    "model.attention.qk_nope_head_dim": 4,
    "model.attention.qk_rope_head_dim": 4,
    "model.attention.v_head_dim": 8,
    "model.norm.kind": "rmsnorm",
    "model.ffn.kind": "moe",
    "model.moe.router": "noaux_tc",
    "model.moe.n_experts": 4,
    "model.moe.d_expert": 16,
    "model.moe.n_shared_experts": 1,
    "model.first_dense_layers": 1,
    "train.optimizer.name": "muonclip",
    "model.dropout": 0.1,
}
CLOCK = {"seconds", "training_seconds", "step_seconds", "tokens_per_second", "peak_memory_mb"}


def tiny(*changes):
    return RunConfig().changed({k: v for c in (TINY, *changes) for k, v in c.items()})


def numbers(record):
    return {k: v for k, v in record.metrics.items() if k not in CLOCK}


class Stop(Exception):
    pass


def stop_after(n):
    def on_step(step, line):
        if step == n:
            raise Stop

    return on_step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        KIMI,
        {
            "train.micro_batch_size": 2,
            "model.ffn.kind": "moe",
            "model.moe.d_expert": 16,
            "train.optimizer.name": "muon",
        },
    ],
    ids=["plain", "kimi", "accumulating"],
)
def test_a_broken_off_run_ends_bitwise_as_an_unbroken_one(changes, tmp_path):
    run = tiny(changes, {"train.save_every": 3, "train.eval_every": 4})
    whole = fit(run, tmp_path / "whole", progress=False)
    with pytest.raises(Stop):
        fit(run, tmp_path / "broken", progress=False, on_step=stop_after(5))
    with pytest.raises(Stop):
        fit(run, tmp_path / "broken", progress=False, on_step=stop_after(7))
    steps = []
    again = fit(run, tmp_path / "broken", progress=False, on_step=lambda step, line: steps.append(step))
    assert steps == [7, 8]  # it went on after the checkpoint of step 6
    assert numbers(again) == numbers(whole) and again.curves == whole.curves
    a, b = (load_file(tmp_path / f / "checkpoints" / "final" / "model.safetensors") for f in ("whole", "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [json.loads(t) for t in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 9))


def test_checkpoints_written_beside_the_training_are_those_written_in_between(tmp_path, monkeypatch):
    """A slow disk: steps go on while a checkpoint is written, and every file is byte for byte that of a run which waited, but for its times."""
    from kimi_nb.train import loop as train

    run, written, steps, save = tiny(KIMI, {"train.save_every": 2}), [], [], train.save_checkpoint
    waited = fit(run, tmp_path / "a", device="cpu", progress=False, threads=1, keep=99, beside=False)

    def slow(folder, *args, **how):
        time.sleep(0.3)
        lines = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
        assert int(folder.name[5:]) in lines  # the journal is never behind a checkpoint
        written.append((folder.name, len(steps)))
        return save(folder, *args, **how)

    monkeypatch.setattr(train, "save_checkpoint", slow)
    went_on = fit(
        run,
        tmp_path / "b",
        device="cpu",
        progress=False,
        threads=1,
        keep=99,
        beside=True,
        on_step=lambda step, line: steps.append(step),
    )
    assert numbers(waited) == numbers(went_on) and written[0] == (
        "step_00000002",
        4,
    )  # two steps further, where the next one waits
    names = [p.name for p in checkpoints(tmp_path / "b" / "checkpoints")]
    assert names == ["step_00000002", "step_00000004", "step_00000006"]
    for name in (*names, "final"):
        ours, theirs = (tmp_path / x / "checkpoints" / name for x in "ab")
        files = sorted(p.relative_to(ours) for p in ours.rglob("*") if p.is_file())
        assert files == sorted(p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file()) and len(files) > 2
        for file in files:
            if file.name != "state.json":
                assert (ours / file).read_bytes() == (theirs / file).read_bytes(), (name, file)
        a, b = (
            {
                k: v
                for k, v in json.loads((x / "state.json").read_text()).items()
                if k not in ("seconds", "started", "digest", "journal")  # the journal's lines have times in them
            }
            for x in (ours, theirs)
        )
        assert a == b


@pytest.mark.parametrize("at", ["a step", "a stop", "the end"])
def test_a_checkpoint_that_cannot_be_written_beside_the_training_ends_it(at, tmp_path, monkeypatch):
    """The same line as without the thread; what was written before is intact, and the same command goes on."""
    import signal

    from kimi_nb.train import checkpoint

    run = tiny({"train.save_every": 7 if at == "the end" else 2 if at == "a step" else 0, "train.steps": 8})
    folder, save = tmp_path / "x", checkpoint.save_file

    def full(tensors, path):
        if at == "the end":
            time.sleep(0.3)
        if at != "a step" or "step_00000002" not in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    def on_step(step, line):
        if at == "a step":
            time.sleep(0.1)
        if at == "a stop" and step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            CheckpointError, match="cannot be written: No space left on device; what was there is untouched"
        ):
            fit(run, folder, device="cpu", progress=False, threads=1, on_step=on_step, beside=True)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == (
        ["step_00000002"] if at == "a step" else []
    ) and not (folder / "result.json").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) < (8 if at == "a step" else 9)
    assert numbers(fit(run, folder, device="cpu", progress=False, threads=1)) == numbers(
        fit(run, device="cpu", progress=False, threads=1)
    )


def test_the_record_and_the_folder(tmp_path):
    run = tiny({"train.eval_every": 4})
    record = fit(run, tmp_path, progress=False)
    assert record.run_id == run.run_id and record.status == "done" and record.run == run
    assert {"config.json", "result.json", "metrics.jsonl", "training_log.txt", "checkpoints"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert record.curves["val_loss"]["step"] == [4, 8] and len(record.curves["train_loss"]["step"]) == 8
    m = record.metrics
    assert (
        math.isclose(m["val_ppl"], math.exp(m["val_loss"]))
        and m["tokens"] == 8 * 4 * 16
        and m["total_parameters"] > m["non_embedding_parameters"] > 0
    )
    for k in (
        "code_hash",
        "git",
        "device",
        "device_name",
        "kernel",
        "threads",
        "micro_batch_size",
        "precision",
        "versions",
        "data",
        "platform",
        "started",
    ):
        assert k in record.provenance
    assert fit(run, tmp_path, progress=False) == record  # it is there already
    with pytest.raises(TrainError, match="another run"):
        fit(run.override({"seed": 1}), tmp_path, progress=False)


def test_bits_per_byte_of_bytes_is_loss_in_bits(tmp_path):
    m = fit(tiny({"train.eval_tokens": None}), progress=False).metrics
    assert m["test_bpb"] == pytest.approx(
        m["test_loss"] / math.log(2), rel=0.02
    )  # only the ends of documents are no bytes


def test_the_final_model_scores_as_recorded(tmp_path):
    run = tiny(KIMI)
    record = fit(run, tmp_path, progress=False)
    model, tokenizer, kept = load_model(tmp_path)
    data = prepare(run.data)
    scores = [
        held_out_scores(model, data.val, 16, data.token_bytes, max_tokens=300, batch_size=b)["loss"] for b in (1, 7, 64)
    ]
    assert scores == pytest.approx([record.metrics["val_loss"]] * 3, rel=1e-6)
    assert kept.model.vocab_size == tokenizer.vocab_size == 257 and not model.training


def test_micro_batches_give_the_gradient_of_the_batch():
    def gradient(micro):
        run = tiny({"train.micro_batch_size": micro})
        t = Trainer(run, prepare(run.data), pick_device("cpu"))
        x, y = (torch.as_tensor(a) for a in t.batches.batch(0))
        t._accumulate(x, y)
        return torch.cat([p.grad.flatten() for p in t.model.parameters()])

    whole = gradient(4)
    for micro in (1, 2):
        assert torch.allclose(gradient(micro), whole, atol=1e-6)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(tmp_path, monkeypatch):
    run = tiny(KIMI, {"train.batch_size": 8})
    forward, asked = trainer.KimiModel.forward, []

    def narrow(self, input_ids, *args, **kw):
        if self.training:
            asked.append(len(input_ids))
            if len(input_ids) > 2:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
                )
        return forward(self, input_ids, *args, **kw)

    monkeypatch.setattr(trainer.KimiModel, "forward", narrow)
    record = fit(run, tmp_path / "narrow", progress=False)
    monkeypatch.undo()
    assert asked[:3] == [8, 4, 2] and record.provenance["micro_batch_size"] == 2
    log = (tmp_path / "narrow" / "training_log.txt").read_text()
    assert "out of memory at step 1: micro-batch 8 -> 4" in log and "micro-batch 4 -> 2" in log
    same = fit(run.override({"train.micro_batch_size": 2}), tmp_path / "asked", progress=False)
    assert numbers(same) == numbers(record)


def test_out_of_memory_with_one_sequence_is_one_line(monkeypatch):
    def full(self, *args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer.KimiModel, "forward", full)
    with pytest.raises(TrainError, match="out of memory at step 1 with a micro-batch of 1 sequence"):
        fit(tiny(), progress=False)


def test_a_run_that_diverges_is_a_record(tmp_path):
    record = fit(
        tiny(
            {
                "train.lr": 1e9,
                "train.grad_clip": 0.0,
                "train.steps": 60,
                "train.optimizer.name": "adam",
                "model.norm.eps": 1e-6,
            }
        ),
        tmp_path,
        progress=False,
    )
    if record.status == "done":
        pytest.skip("the learning rate was not large enough on this platform")
    assert (
        record.status == "diverged"
        and record.metrics["diverged_at_step"] < 60
        and record.metrics.get("test_loss") is None
    )
    assert not (tmp_path / "checkpoints" / "final").exists()


def test_a_loss_that_is_not_finite_stops_at_its_step(monkeypatch):
    forward, calls = trainer.KimiModel.forward, []

    def broken(self, input_ids, *args, **kw):
        out = forward(self, input_ids, *args, **kw)
        calls.append(1)
        if len(calls) == 3:
            out.loss = out.loss * math.nan
        return out

    monkeypatch.setattr(trainer.KimiModel, "forward", broken)
    record = fit(tiny(), progress=False)
    assert record.status == "diverged" and record.metrics["diverged_at_step"] == 3 and record.metrics["steps"] == 3


def test_seeds_differ_and_repeats_agree():
    runs = [fit(tiny(c), progress=False) for c in ({}, {"seed": 1}, {"repeat": 1})]
    assert (
        numbers(runs[0]) != numbers(runs[1])
        and numbers(runs[0]) == numbers(runs[2])
        and runs[0].curves == runs[2].curves
    )


def test_half_precision_trains_as_full_precision_does():
    """All parts at once, with enough tokens that the experts' slices are padded."""
    run = tiny(KIMI, {"train.batch_size": 16, "train.steps": 30, "train.warmup_steps": 0, "model.dropout": 0.0})
    full, half = (fit(run.override({"train.precision": p}), progress=False) for p in ("fp32", "bf16"))
    assert half.provenance["precision"] == "bf16" and full.metrics["val_loss"] < 4.0
    assert 0 < abs(half.metrics["val_loss"] - full.metrics["val_loss"]) < 0.01 * full.metrics["val_loss"]


def test_no_steps_scores_the_model_as_drawn():
    record = fit(tiny({"train.steps": 0, "train.warmup_steps": 0}), progress=False)
    assert (
        record.status == "done"
        and abs(record.metrics["val_loss"] - math.log(257)) < 0.1
        and record.metrics["tokens"] == 0
    )


def test_qk_clip_is_logged(tmp_path):
    fires = fit(tiny(KIMI, {"train.optimizer.qk_clip_threshold": 1e-3}), progress=False)
    quiet = fit(tiny(KIMI), progress=False)
    assert fires.metrics["qk_clips"] > 0 and quiet.metrics["qk_clips"] == 0 and "qk_max_logit" in quiet.curves


def test_the_bias_of_the_router_is_in_the_checkpoint(tmp_path):
    fit(tiny(KIMI), tmp_path, progress=False)
    bias = load_file(tmp_path / "checkpoints" / "final" / "model.safetensors")[
        "layers.1.mlp.gate.e_score_correction_bias"
    ]
    assert bias.abs().max() > 0


def test_impossible_requests():
    with pytest.raises(ConfigError, match="below the 257 ids"):
        fit(tiny({"model.vocab_size": 100}), progress=False)
    with pytest.raises(TrainError, match="device 'quantum'"):
        fit(tiny(), progress=False, device="quantum")
    with pytest.raises(ConfigError, match="fp16"):
        fit(tiny({"train.precision": "fp16"}), progress=False)


@pytest.mark.parametrize("harm", ["truncate", "alter", "remove", "state"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(harm, tmp_path):
    run = tiny({"train.save_every": 2})
    with pytest.raises(Stop):
        fit(run, tmp_path, progress=False, on_step=stop_after(5))
    (place,) = checkpoints(tmp_path / "checkpoints")
    victim = place / ("state.json" if harm == "state" else "optimizer.safetensors")
    blob = victim.read_bytes()
    if harm == "truncate":
        victim.write_bytes(blob[:-10])
    elif harm == "remove":
        victim.unlink()
    else:
        victim.write_bytes(blob[:-20] + bytes([blob[-20] ^ 1]) + blob[-19:])
    before = sorted(p.name for p in place.iterdir())
    with pytest.raises(CheckpointError) as e:
        fit(run, tmp_path, progress=False)
    assert str(victim) in str(e.value) and "checkpoint's folder" in str(e.value) and "\n" not in str(e.value)
    assert sorted(p.name for p in place.iterdir()) == before
    assert isinstance(e.value, KimiError)


def test_the_same_batches_and_initial_values_for_every_arm():
    arms = [tiny(c) for c in ({}, {"model.norm.kind": "rmsnorm"}, KIMI | {"model.dropout": 0.0})]
    trainers = [Trainer(r, prepare(r.data), pick_device("cpu")) for r in arms]
    for step in (0, 1, 5):
        batches = [t.batches.batch(step)[0] for t in trainers]
        assert all(np.array_equal(batches[0], b) for b in batches)
    named = [dict(t.model.named_parameters()) for t in trainers]
    for other in named[1:]:
        shared = [n for n in named[0].keys() & other.keys() if named[0][n].shape == other[n].shape]
        assert shared and all(torch.equal(named[0][n], other[n]) for n in shared)


def test_evaluation_clips_nothing():
    run = tiny(KIMI)
    t = Trainer(run, prepare(run.data), pick_device("cpu"))
    t.step(0)
    before = [layer.self_attn.logit_max.clone() for layer in t.model.layers]
    t.evaluate("val")
    assert all(
        torch.equal(b, layer.self_attn.logit_max) and layer.self_attn.track_logits
        for b, layer in zip(before, t.model.layers, strict=True)
    )
