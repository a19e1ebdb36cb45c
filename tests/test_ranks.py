"""One run on several processes: the same curve, one record, and what happens when a rank is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from tiny import start, tiny_run

from kimi_nb.study import Record

KIMI = dict(
    model__n_layers=2, model__first_dense_layers=1, model__ffn__kind="moe", model__ffn__activation="swiglu",
    model__moe__router="noaux_tc", model__moe__n_experts=4, model__moe__top_k=2, model__moe__d_expert=8,
    model__moe__n_shared_experts=1, train__optimizer__name="muonclip", train__optimizer__qk_clip_threshold=0.01,
    train__batch_size=4, train__micro_batch_size=2, train__save_every=0,
)  # fmt: skip
QUANTILE = KIMI | dict(model__moe__router="quantile", model__mtp_depth=1, train__optimizer__name="muon")
del QUANTILE["train__optimizer__qk_clip_threshold"]
KINDS = dict(plain=dict(train__micro_batch_size=2, train__save_every=0), kimi=KIMI, quantile=QUANTILE)


def train(run, folder, rank, size, port, on_step=None, **how):
    """One rank's life."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from kimi_nb.model import joined
    from kimi_nb.train import fit

    with joined("cpu", minutes=1):
        fit(run, folder, device="cpu", progress=False, on_step=on_step, **how)


def train_sharded(run, folder, rank, size, port):
    train(run, folder, rank, size, port, shard=True, keep=99)


def kill_rank_one(step, line):
    if step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def killed(run, folder, rank, size, port):
    try:
        train(run, folder, rank, size, port, kill_rank_one)
    except Exception as e:
        (folder / f"rank{rank}.txt").write_text(f"{type(e).__name__}: {e}")
        raise


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(run, folder, size=2, target=train, expect=0):
    port = free_port()
    processes = [start(target, run, folder, rank, size, port) for rank in range(size)]
    for p in processes:
        p.join(120)
    assert [p.exitcode for p in processes] == [expect] * size if expect is not None else True


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "ranks-cache"))


def result(folder):
    return Record.from_json((folder / "result.json").read_text())


def close(a, b, tolerance=2e-5):
    """Two records tell the same: losses, gradient norms, loads, held-out scores."""
    for name in ("train_loss", "grad_norm", "max_violation", "qk_clipped_heads", "val_loss", "expert_load"):
        if name in a.curves:
            assert a.curves[name]["step"] == b.curves[name]["step"]
            torch.testing.assert_close(
                torch.tensor(a.curves[name]["value"], dtype=torch.float64),
                torch.tensor(b.curves[name]["value"], dtype=torch.float64),
                atol=tolerance,
                rtol=tolerance,
                msg=lambda m, name=name: f"{name}: {m}",
            )
    for name in ("val_loss", "test_bpb", "test_accuracy", "tokens", "steps"):
        assert a.metrics[name] == pytest.approx(b.metrics[name], abs=tolerance, rel=tolerance), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_steps_of_one(kind, tmp_path):
    """Same global batch, same micro-batches: the curve of two ranks is that of one to 2e-5 (sums in another order).

    Experts' counts, clipped heads and the bias of a quantile over all ranks included; there is one record.
    """
    from kimi_nb.train import fit, load_model

    run = tiny_run(**KINDS[kind])
    alone = fit(run, tmp_path / "alone", device="cpu", progress=False, threads=1)
    (tmp_path / "two").mkdir()
    together(run, tmp_path / "two")
    both = result(tmp_path / "two")
    assert (alone.provenance["ranks"], both.provenance["ranks"]) == (1, 2) and both.run_id == alone.run_id
    close(alone, both)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "train_loss" in line] == list(range(1, run.train.steps + 1))
    if kind == "quantile":
        biases = [
            torch.stack([moe.gate.e_score_correction_bias for moe in load_model(folder)[0].routed()])
            for folder in (tmp_path / "alone", tmp_path / "two")
        ]
        assert len(biases[0]) == 2 and (biases[0].abs().amax(1) > 0).all()  # the layer's, and of what looks further
        torch.testing.assert_close(*biases, atol=2e-5, rtol=2e-5)
    if kind == "kimi":
        assert (
            max(both.curves["qk_clipped_heads"]["value"]) > 0
            and sum(map(sum, both.curves["expert_load"]["value"][0])) == 4 * run.seq_len * 2
        )


def back_to(folder, step):
    """What a run killed after this step's checkpoint leaves."""
    (folder / "result.json").unlink()
    for p in (folder / "checkpoints").iterdir():
        if p.name != f"step_{step:08d}":
            shutil.rmtree(p)


def test_sharded_ranks_take_the_steps_of_one(tmp_path):
    """Parameters, gradients and optimizer state cut in two (three experts, so unevenly).

    The curve of one process to 2e-5, its weights to 1e-5, checkpoints of the same form; each goes on from the other's.
    """
    from kimi_nb.train import fit, load_checkpoint, load_model

    mla = dict(
        model__attention__kind="mla",
        model__attention__kv_lora_rank=8,
        model__attention__qk_nope_head_dim=4,
        model__attention__qk_rope_head_dim=4,
        model__attention__v_head_dim=8,
    )
    run = tiny_run(**KIMI | mla | dict(model__tie_embeddings=True, model__moe__n_experts=3, train__save_every=6))
    alone = fit(run, one := tmp_path / "one", device="cpu", progress=False, threads=1, keep=99)
    (two := tmp_path / "two").mkdir()
    together(run, two, target=train_sharded)
    both = result(two)
    assert (both.provenance["ranks"], both.provenance["sharded"], alone.provenance["sharded"]) == (
        2,
        True,
        False,
    ) and both.run_id == alone.run_id
    assert max(both.curves["qk_clipped_heads"]["value"]) > 0
    close(alone, both)
    for name in ("step_00000006", "final"):
        ours, theirs = (load_checkpoint(folder / "checkpoints" / name)[0] for folder in (one, two))
        for group in {"model", "optimizer"} & ours.keys():
            assert ours[group].keys() == theirs[group].keys()
            for k, t in ours[group].items():
                torch.testing.assert_close(theirs[group][k], t, atol=1e-5, rtol=1e-4, msg=lambda m, k=k: f"{k}: {m}")
    assert load_model(two)[0].lm_head.weight.shape == (257, 16)
    back_to(two, 6), back_to(one, 6)
    went_on = fit(run, two, device="cpu", progress=False, threads=1)
    assert went_on.provenance["sharded"] is False
    close(alone, went_on)
    together(run, one, target=train_sharded)
    assert result(one).provenance["sharded"] is True
    close(alone, result(one))


def test_one_process_has_nothing_to_shard(tmp_path):
    """One line, before there is a folder."""
    from kimi_nb.model import RanksError
    from kimi_nb.train import fit

    with pytest.raises(RanksError, match=r"^one process has nobody to share a model with: start several with torchrun"):
        fit(tiny_run(), tmp_path / "x", shard=True)
    assert not (tmp_path / "x").exists()


def test_a_rank_that_dies_ends_the_others_and_any_number_goes_on(tmp_path):
    """SIGKILL of one of two ranks in the middle: the other ends with one line.

    Three ranks are refused; one goes on from the checkpoint to the same end.
    """
    from kimi_nb.train import fit

    run = tiny_run(**KIMI | dict(train__save_every=2))
    alone = fit(run, tmp_path / "alone", device="cpu", progress=False, threads=1)
    (folder := tmp_path / "two").mkdir()
    together(run, folder, target=killed, expect=None)
    said = (folder / "rank0.txt").read_text()
    assert (
        said.startswith("TrainError: rank 0 lost the others after step 4 (")
        and "start them again with the same command" in said
        and not (folder / "result.json").exists()
    )
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000004"]
    went_on = fit(run, folder, device="cpu", progress=False, threads=1)
    assert went_on.status == "done" and went_on.provenance["ranks"] == 1
    close(alone, went_on)


@pytest.mark.slow
def test_torchrun_and_the_command_line(tmp_path):
    """torchrun … kimi-nb train: one record in the store, one report on the terminal.

    A batch that two ranks cannot share is one line.
    """
    text = tmp_path / "t.txt"
    text.write_text("All the world is a stage, and all the men and women merely players. " * 200)
    sizes = [
        "--model.d_model=16",
        "--model.n_layers=1",
        "--model.n_heads=2",
        "--model.max_seq_len=16",
        "--train.steps=4",
        "--train.warmup_steps=0",
        "--train.eval_every=2",
        "--train.eval_tokens=64",
        f"--data.corpus={text}",
        "--data.tokenizer=byte",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        "--no-python",
        sys.executable,
        "-c",
        "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))",
        "train",
        "--quiet",
        "--device=cpu",
        "--results",
        str(tmp_path / "r"),
        *sizes,
    ]
    done = subprocess.run(
        [*command, "--train.batch_size=4"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("done: run ") == 1
    from kimi_nb.study import Store

    (record,) = Store(tmp_path / "r").records()
    assert record.provenance["ranks"] == 2 and record.status == "done" and not Store(tmp_path / "r").verify()
    apart = [*command[: command.index("--results")], "--shard", "--out", str(tmp_path / "s"), *sizes]
    done = subprocess.run(
        [*apart, "--train.batch_size=4"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sharded = result(tmp_path / "s")
    assert (
        sharded.run_id == record.run_id
        and sharded.provenance["sharded"]
        and sharded.metrics["test_bpb"] == pytest.approx(record.metrics["test_bpb"], abs=2e-5)
    )
    odd = subprocess.run(
        [*command, "--train.batch_size=3"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        check=False,
    )
    assert (
        odd.returncode != 0
        and "3 sequences a step cannot be shared by 2 ranks: make train.batch_size a multiple of 2" in odd.stderr
    )


def test_dropout_differs_between_ranks_and_repeats(tmp_path):
    """With dropout two ranks draw their own masks, and the same run again gives the same curve."""
    run = tiny_run(model__dropout=0.2, train__micro_batch_size=2, train__save_every=0, train__steps=4)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        together(run, tmp_path / name)
    a, b = (result(tmp_path / n).curves["train_loss"]["value"] for n in ("a", "b"))
    assert a == b


def apart(run, folder, rank, size, port):
    """Ranks that were given different folders, as on machines without a common disk."""
    try:
        train(run, folder / f"disk{rank}", rank, size, port)
    except Exception as e:
        (folder / f"rank{rank}.txt").write_text(f"{type(e).__name__}: {e}")


def test_ranks_without_a_common_folder_are_refused(tmp_path):
    """Every rank says so in one line, before anything is trained."""
    together(tiny_run(train__save_every=0), tmp_path, target=apart)
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}.txt").read_text().startswith("RanksError: rank 1 does not see ")
    assert not list(tmp_path.rglob("metrics.jsonl"))
