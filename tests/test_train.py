"""Training: what a run promises about its numbers, its files and its failures."""

import json
import math
import os
import sys
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
    TrainOptions,
    checkpoints,
    environment,
    eval_batch,
    fit,
    hardware,
    held_out_scores,
    load_model,
    newton_schulz,
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
    "train.test_tokens": 300,
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
CLOCK = {"seconds", "training_seconds", "compile_seconds", "step_seconds", "tokens_per_second", "peak_memory_mb"}


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
    """Slow disk: steps go on while a checkpoint is written; its files are those of a run that waited, but for times."""
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


def test_a_record_says_which_variables_choose_its_kernels(monkeypatch):
    """A path by its last part alone: folders are nobody's business."""
    for name in [name for name in os.environ if name.startswith(hardware.TELLING)]:
        monkeypatch.delenv(name)
    assert environment(pick_device("cpu"))["variables"] == ""
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("LD_PRELOAD", "/usr/local/lib/first.so:/opt/second.so")
    monkeypatch.setenv("MALLOC_CONF", "narenas:1,prof_prefix:/srv/someone/heap")
    monkeypatch.setenv("SOMEONES_KEY", "secret")
    told = "LD_PRELOAD=first.so:second.so MALLOC_CONF=narenas:1,prof_prefix:heap MKL_CBWR=COMPATIBLE"
    assert environment(pick_device("cpu"))["variables"] == told


def test_bits_per_byte_of_bytes_is_loss_in_bits(tmp_path):
    m = fit(tiny({"train.eval_tokens": None, "train.test_tokens": None}), progress=False).metrics
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
                    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: "
                    "you tried to allocate 99 bytes"
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


WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def waits_in_training(monkeypatch, run, steps=3):
    """Calls by which code of the training wing would make the host wait for a GPU, one list a step."""
    trainer_, found = Trainer(run, prepare(run.data), pick_device("cpu")), []

    def watch(name):
        real = getattr(torch.Tensor, name)

        def method(self, *args, **how):
            caller = sys._getframe(1).f_code
            if "/kimi_nb/train/" in caller.co_filename:
                found[-1].append(f"{name} in {caller.co_name}")
            return real(self, *args, **how)

        monkeypatch.setattr(torch.Tensor, name, method)

    for name in WAITS:
        watch(name)
    for step in range(steps):
        found.append([])
        trainer_.step(step)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", ["adamw", "muon", "muonclip", "adam"])
@pytest.mark.parametrize("fires", [False, True])
def test_a_step_waits_for_the_device_once(name, fires, monkeypatch):
    """Losses, norm, clips and loads come over together, on steps that write every load down as on others."""
    clip = {"train.optimizer.qk_clip_threshold": 1e-3 if fires else 100.0} if name == "muonclip" else {}
    run = tiny(KIMI, {"train.optimizer.name": name, "train.steps": 60} | clip)
    assert waits_in_training(monkeypatch, run) == [["tolist in read"]] * 3


def test_evaluation_asks_the_device_once(monkeypatch):
    """However many batches there are."""
    run = tiny({"train.eval_tokens": None, "train.test_tokens": None})
    data, asked, real = prepare(run.data), [], torch.Tensor.tolist
    model = Trainer(run, data, pick_device("cpu")).model
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(tuple(self.shape)) or real(self))
    scores = [held_out_scores(model, data.val, 16, data.token_bytes, batch_size=b)["loss"] for b in (3, 50)]
    assert asked == [(2,), (2,)] and scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_a_gpu_gets_equal_batches_that_fit():
    """At most 64 windows and 2^28 logits at a time; the last batch is about as large as the others."""
    gpu = torch.device("cuda")
    for n, seq_len, vocab in (
        (256, 512, 8192),
        (250, 512, 8192),
        (1000, 1024, 50257),
        (3, 16, 257),
        (1, 4096, 200_000),
    ):
        size = eval_batch(gpu, n, seq_len, vocab)
        assert 1 <= size <= 64 and (size == 1 or size * seq_len * vocab <= 2**28)
        batches = -(-n // size)
        assert batches * size - n < batches  # less than one window a batch is missing
    assert eval_batch(torch.device("cpu"), 250, 512, 8192) == 8


def test_a_layer_is_compiled_by_itself_before_the_clock_starts(tmp_path, monkeypatch):
    """Warming up learns nothing and draws nothing: the run is that without compiling, the time for it stands apart."""
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compiled.append((type(self).__name__, how)) or time.sleep(0.05)
    )
    run = tiny(KIMI, {"train.save_every": 3})
    plain = fit(run, progress=False)
    assert not compiled and plain.metrics["compile_seconds"] == 0 and plain.provenance["compiled"] is False
    calls, forward = [], trainer.KimiModel.forward

    def slow_at_first(self, input_ids, *args, **how):
        if not calls:
            time.sleep(0.5)
        calls.append(len(input_ids))
        return forward(self, input_ids, *args, **how)

    monkeypatch.setattr(trainer.KimiModel, "forward", slow_at_first)
    monkeypatch.setattr("kimi_nb.train.muon._compiled", lambda: newton_schulz)
    before_the_first_step = []

    def on_step(step, line):
        if step == 1:
            before_the_first_step.append(len(calls))

    record = fit(run.override({"train.compile": True}), tmp_path, progress=False, on_step=on_step)
    assert compiled == [("Block", {"dynamic": False})] * 2
    assert record.curves == plain.curves and record.metrics["val_loss"] == plain.metrics["val_loss"]
    assert record.metrics["compile_seconds"] >= 0.5 and before_the_first_step == [1 + 1]
    assert record.provenance["compiled"] is True and "compiled in" in (tmp_path / "training_log.txt").read_text()


def test_threads_are_the_free_cores_unless_somebody_says_a_number(monkeypatch):
    """A busy core is left to whoever has it; a number given by hand, by the environment or by the program stands."""
    ticks = {0: [(0.0, 0.0), (1.0, 10.0)], 1: [(0.0, 0.0), (9.5, 10.0)], 2: [(5.0, 50.0), (15.0, 60.0)]}
    looks = []

    def idle_times(cores):
        looks.append(cores)
        return {core: ticks[core][(len(looks) - 1) % 2] for core in ticks}

    monkeypatch.setattr(hardware, "_idle_times", idle_times)
    assert hardware.free_cores(0.0) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(hardware, "_AT_START", 8)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert hardware.pick_threads(None) == 2 and hardware.pick_threads(5) == 5
    monkeypatch.setattr(hardware, "_AT_START", 4)  # somebody called set_num_threads
    assert hardware.pick_threads(None) == 8
    monkeypatch.setattr(hardware, "_AT_START", 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert hardware.pick_threads(None) == 8
    monkeypatch.setattr(hardware, "_idle_times", lambda cores: {})  # a system that does not tell
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= hardware.pick_threads(None) <= 8


def test_a_run_on_busy_cores_says_how_many_threads_it_had(monkeypatch):
    """The record has the number that was chosen, and afterwards PyTorch has its own again."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    monkeypatch.setattr(hardware, "_AT_START", 2)
    monkeypatch.setattr(hardware, "free_cores", lambda: 1)
    assert fit(tiny(), progress=False).provenance["threads"] == 1 and torch.get_num_threads() == 2
    assert fit(tiny(), progress=False, threads=2).provenance["threads"] == 2


def broken_off(run, folder, at=5):
    with pytest.raises(Stop):
        fit(run, folder, progress=False, on_step=stop_after(at))


@pytest.mark.parametrize("harm", ["a digit", "a line that looks like another", "a cut", "gone"])
def test_a_journal_changed_while_the_run_was_broken_off_is_refused(harm, tmp_path):
    """Its numbers would enter the sealed record; what follows the checkpoint may be anything, it is written again."""
    run = tiny({"train.save_every": 4})
    broken_off(run, tmp_path)
    file = tmp_path / "metrics.jsonl"
    text = file.read_text()
    file.write_text("".join(text.splitlines(True)[:4]) + '{"step": 5, "train_loss": 1.0}\n')
    assert fit(run, tmp_path, progress=False).curves["train_loss"]["value"][4] != 1.0
    broken_off(run, tmp_path / "again")
    file = tmp_path / "again" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    digit = lines[1].replace('"grad_norm": ', '"grad_norm": 1')
    changed = {
        "a digit": "".join([lines[0], digit, *lines[2:]]),
        "a line that looks like another": "".join([lines[0], lines[1].replace(" ", ""), *lines[2:]]),
        "a cut": "".join(lines[:2]),
        "gone": None,
    }[harm]
    file.unlink() if changed is None else file.write_text(changed)
    with pytest.raises(TrainError, match="altered or cut short") as refused:
        fit(run, tmp_path / "again", progress=False)
    assert str(file) in str(refused.value) and "delete" in str(refused.value) and "\n" not in str(refused.value)
    file.write_text("".join(lines))
    assert fit(run, tmp_path / "again", progress=False).status == "done"


def test_an_unfinished_run_of_other_settings_is_refused_as_a_finished_one_is(tmp_path):
    """One line that names what differs, nothing is moved; `resume=False` sets it aside and says so."""
    run = tiny({"train.save_every": 2, "train.steps": 100})
    broken_off(run, tmp_path)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    other = run.override({"train.steps": 6, "train.lr": 2e-3})
    with pytest.raises(TrainError, match="unfinished run of other settings") as refused:
        fit(other, tmp_path, progress=False)
    assert "train.lr 0.01" in str(refused.value) and "train.steps 100" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert fit(other, tmp_path, progress=False, resume=False).status == "done"
    assert (tmp_path / "replaced" / "metrics.jsonl").exists()
    assert "what was here before is in" in (tmp_path / "training_log.txt").read_text()


def test_a_checkpoint_of_other_text_or_code_is_set_aside_under_the_right_name(tmp_path, monkeypatch):
    """The folder's name says data or stale, and so does the log."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    run = tiny({"train.save_every": 2, "data.corpus": str(text), "data.num_documents": None})
    broken_off(run, tmp_path / "run")
    text.write_text("the dog sat on the mat. " * 400)
    broken_off(run, tmp_path / "run")
    (moved,) = (tmp_path / "run").glob("data-*")
    assert (moved / "checkpoints" / "step_00000004").is_dir()
    assert f"is in {moved}: data" in (tmp_path / "run" / "training_log.txt").read_text()
    monkeypatch.setattr("kimi_nb.train.loop.code_hash", lambda run: "f" * 16)
    assert fit(run, tmp_path / "run", progress=False).metrics["steps"] == 8
    assert len(list((tmp_path / "run").glob("stale-*"))) == 1


def test_options_are_one_value(tmp_path):
    """Given whole or one by one, by the old names of the folder too; what does not exist is an error, not ignored."""
    run, seen = tiny(), []
    options = TrainOptions(progress=False, on_step=lambda step, line: seen.append(step), weights="none")
    record = fit(run, tmp_path / "a", options)
    assert seen == list(range(1, 9)) and not list((tmp_path / "a" / "checkpoints").iterdir())
    assert fit(run, out_dir=tmp_path / "a", resume=True) == record
    assert fit(run, tmp_path / "b", options, weights="last", on_step=None).curves == record.curves
    assert load_model(tmp_path / "b")[2].train == run.train
    assert seen == list(range(1, 9))
    with pytest.raises(TypeError, match="sharded"):
        fit(run, tmp_path / "c", sharded=True)
    for wrong, words in ((dict(weights="all"), "one of last, none"), (dict(keep=0), "at least 1")):
        with pytest.raises(TrainError, match=words):
            fit(run, tmp_path / "c", **wrong)
    with pytest.raises(TrainError, match="two names"):
        fit(run, tmp_path / "c", out_dir=tmp_path / "d")
    assert not (tmp_path / "c").exists()


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@on_a_gpu
@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_a_step_on_a_gpu_waits_where_it_asks_and_nowhere_else(name, monkeypatch):
    """PyTorch itself refuses to wait, but for the one transfer."""
    run = tiny(KIMI, {"train.optimizer.name": name, "train.precision": "bf16", "train.batch_size": 16})
    t = Trainer(run, prepare(run.data), pick_device("cuda"))
    for step in range(2):
        t.step(step)
    read = trainer._Asked.read

    def allowed(self):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(self)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(trainer._Asked, "read", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lines = [t.step(step) for step in (2, 3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(line["train_loss"]) for line in lines)


@on_a_gpu
@pytest.mark.parametrize("changes", [{}, KIMI], ids=["plain", "kimi"])
def test_compiled_layers_train_as_written_ones_do(changes):
    """To rounding; the time for compiling stands apart, and evaluation counts every expert's load."""
    base = tiny(changes, {"train.steps": 20, "train.precision": "bf16", "model.dropout": 0.0, "train.eval_every": 10})
    written, compiled = (fit(base.override({"train.compile": c}), progress=False) for c in (False, "auto"))
    assert compiled.status == "done" and compiled.provenance["compiled"] and compiled.metrics["compile_seconds"] > 1
    assert compiled.metrics["training_seconds"] < compiled.metrics["compile_seconds"]
    assert compiled.metrics["val_loss"] == pytest.approx(written.metrics["val_loss"], rel=0.02)
    if changes:
        for load in compiled.curves["val_expert_load"]["value"]:
            assert [sum(layer) for layer in load] == [sum(load[0])] * len(load) and sum(load[0]) > 0
