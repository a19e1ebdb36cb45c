"""How many processes train at a time.

What is measured on a GPU and decided from it, who sees which GPU, and what becomes of a run that finds no memory
beside others.
"""

import json
import os
import threading
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch

from kimi_nb.config import RunConfig
from kimi_nb.plan import plan_table
from kimi_nb.runner import (
    Crowded,
    distinct,
    expect_h100,
    forecast,
    measure_sharing,
    pick_workers,
    predict_seconds,
    run_one,
    run_studies,
    visible_gpus,
)
from kimi_nb.runner import pool as runner
from kimi_nb.study import Arm, Record, Store, Study
from kimi_nb.train import Trainer
from kimi_nb.train import loop as train
from tests.tiny import start, tiny_run


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A function that gives this machine GPUs of these names, with 16 cores."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(forecast, "_cores", lambda: 16)

    def have(*names):
        for module in (forecast, runner):
            monkeypatch.setattr(module, "visible_gpus", lambda: list(names))

    return have


def measured(rates, memory=0.1):
    """A measuring function that knows the rates by number of processes, and the list of its calls."""
    calls = []

    def measure(run, processes, gpu, device, threads):
        calls.append((run, processes, gpu, threads))
        rate = rates.get(processes)
        return rate and (rate, memory * processes)

    return measure, calls


RUNS = [tiny_run(seed=i) for i in range(40)]


@pytest.mark.parametrize(
    ("rates", "memory", "each", "tried"),
    [
        ({1: 50.0, 2: 70.0, 4: 83.0}, 0.1, 4, [1, 2, 4]),
        ({1: 50.0, 2: 70.0, 4: 69.0}, 0.1, 2, [1, 2, 4]),
        ({1: 50.0, 2: 54.0, 4: 54.5}, 0.1, 1, [1, 2, 4]),  # less than 10% is not worth it
        ({1: 50.0, 2: 45.0, 4: 90.0}, 0.1, 1, [1, 2]),  # two are in each other's way: four are not tried
        ({1: 50.0, 2: 70.0, 4: 90.0}, 0.3, 2, [1, 2]),  # no room for four
        ({1: 50.0, 2: 90.0}, 0.5, 1, [1]),  # nor for two
        ({1: 50.0, 2: None}, 0.1, 1, [1, 2]),  # out of memory
        ({1: None}, 0.1, 1, [1]),
    ],
)
def test_a_gpu_is_shared_by_as_many_as_get_most_done(gpus, rates, memory, each, tried):
    """Processes on a GPU: the fastest number measured, if it gains 10% and there is memory."""
    gpus("0")
    measure, calls = measured(rates, memory)
    assert pick_workers(RUNS, measure=measure) == each
    assert [c[1] for c in calls] == tried


def test_it_is_measured_once_and_said(gpus):
    """The rates are shown in one line, kept for this machine and shape.

    And asked for again only when another shape is the most frequent.
    """
    gpus("0")
    said, (measure, calls) = [], measured({1: 50.0, 2: 71.25, 4: 70.0})
    assert pick_workers(RUNS, measure=measure, say=said.append) == 2 and len(calls) == 3
    assert "50.0, 71.2, 70.0 steps a second with 1, 2, 4 processes" in said[-1] and said[-1].endswith(
        "2 runs share one"
    )
    assert pick_workers(RUNS, measure=None, say=said.append) == 2 and "measured before" in said[-1]
    assert (
        pick_workers([r.override({"train.lr": 5e-4}) for r in RUNS], measure=None) == 2
    )  # the rate does not change a step's time
    wide = [r.override({"model.d_model": 32}) for r in RUNS]
    assert pick_workers(wide + RUNS[:9], measure=measure) == 2 and calls[-1][0].model.d_model == 32


def test_several_gpus_are_dealt_out(gpus, monkeypatch):
    """Rates are of one GPU and workers of all; cores bound them; few runs are not worth measuring.

    A machine without GPUs is not asked.
    """
    gpus("GPU-a", "GPU-b")
    measure, calls = measured({1: 50.0, 2: 70.0, 4: 90.0})
    assert pick_workers(RUNS[:10], measure=None) == 2
    assert pick_workers(RUNS, measure=measure) == 8 and calls[-1][1:] == (4, "GPU-a", 2)
    assert runner._gpu_of(3, None) == (["GPU-a", "GPU-b", "GPU-a"], True) and runner._gpu_of(2, "cuda")[1] is False
    assert runner._gpu_of(2, "cuda:1") == ([None, None], False)  # as named
    monkeypatch.setattr(forecast, "_cores", lambda: 4)
    assert (
        pick_workers([r.override({"model.d_ff": 64}) for r in RUNS], measure=measured({1: 50.0, 2: 70.0, 4: 90.0})[0])
        == 4
    )
    gpus()
    assert pick_workers(RUNS, measure=None) == 4


def test_gpus_keep_the_names_they_were_given(monkeypatch):
    """A process that sees some of the GPUs hands out those, by the names it was given."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"] and forecast.default_workers() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, MIG-1f")
    assert visible_gpus() == ["5", "MIG-1f"]


def test_damaged_rates_are_measured_again(gpus, tmp_path):
    """Whatever stands in the file of rates, the answer is that of a new measurement."""
    gpus("0")
    pick_workers(RUNS, measure=measured({1: 50.0})[0])
    (path,) = (tmp_path / "cache").rglob("sharing.json")
    (key,) = json.loads(path.read_text())
    for bad in (
        "",
        "[]",
        json.dumps({key: {"2": 70.0}}),
        json.dumps({key: {"1": -1.0}}),
        json.dumps({key: {"1": 50.0, "9": 90.0}}),
        json.dumps({key: None}),
    ):
        path.write_text(bad)
        assert pick_workers(RUNS, measure=measured({1: 50.0, 2: 70.0})[0]) == 2


def show_gpu(store, pipe):
    runner._attempt = lambda run, store, **how: ("done", (os.environ["CUDA_VISIBLE_DEVICES"], how["shared"]), {})
    runner._worker(pipe, store, 1, None, dict(hours=None, shared=True), "GPU-b", os.getppid())


def test_a_worker_sees_its_gpu_alone(tmp_path):
    """What a worker trains is told which GPU it has, and that it is shared."""
    mine, theirs = Pipe()
    process = start(show_gpu, Store(tmp_path), theirs)
    theirs.close()
    assert mine.recv()[0] == "ready"
    mine.send(([tiny_run().model_dump(mode="json")], ["x"], 1, False))
    assert mine.recv()[1] == [("done", ("GPU-b", True), {})]
    mine.close()
    process.join(30)


def test_no_memory_on_a_shared_gpu_leaves_no_record(tmp_path, monkeypatch):
    """Out of memory beside others raises and leaves no record; alone it is a failed one."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "fit", full)
    store, run = Store(tmp_path / "s"), tiny_run()
    with pytest.raises(Crowded, match="out of memory"):
        run_one(run, store, device="cpu", shared=True)
    assert store.get(run.run_id) is None and store.verify() == []
    assert run_one(run, store, device="cpu").status == "failed"


def test_a_run_that_does_not_fit_beside_others_is_trained_alone(gpus, tmp_path, monkeypatch, capsys):
    """On a shared GPU the run that finds no memory waits until the others are gone.

    It fails only when it does not fit alone either.
    """
    gpus("0")
    alive, seen = set(), []

    def fit(run, folder, *_):
        arm = next(a.name for a in study.arms if study.arm_run(a, 0).run_id == run.run_id)
        seen.append((arm, len(alive)))
        if arm == "never" or (arm == "large" and len(alive) > 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        record = Record.of(run, "done", dict(training_seconds=0.0, seconds=0.0))
        store.put(record)
        return record

    def worker(pipe, shared, me):
        pipe.send(("ready", None, None))
        try:
            while True:
                (config,), (name,), keep, _ = pipe.recv()
                run = type(study.base)(**config)
                found = runner._attempt(run, store, name=name, device="cpu", keep=keep, shared=shared)
                pipe.send(("ended", [found], None))
        except (EOFError, OSError):
            alive.discard(me)

    def begin(cls, store, threads, device, gpu, *, shared, **how):
        mine, theirs = Pipe()
        thread = threading.Thread(target=worker, args=(theirs, shared, mine), daemon=True)
        alive.add(mine)
        thread.start()
        end = SimpleNamespace(
            is_alive=thread.is_alive,
            terminate=lambda: alive.discard(mine),
            kill=lambda: alive.discard(mine),
            join=thread.join,
        )
        return cls(end, mine, gpu=gpu)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(runner.Worker, "start", classmethod(begin))
    study = Study(
        name="memory",
        base=tiny_run(),
        baseline="small",
        seeds=(0,),
        arms=(Arm("small"), Arm("large", {"model.d_ff": 64}), Arm("never", {"model.d_ff": 96})),
    )
    store = Store(tmp_path / "s")
    records = run_studies([study], store, workers=2)
    assert [r.status for r in records] == ["done", "done", "failed"] and "out of memory" in records[2].provenance[
        "error"
    ]
    assert sorted(seen) == [("large", 1), ("large", 2), ("never", 1), ("never", 2), ("small", 2)]
    assert capsys.readouterr().err.count("found no memory beside others on its GPU and will be tried alone") == 2


@pytest.mark.slow
def test_processes_are_measured_together(tmp_path, monkeypatch):
    """Two processes take steps of a real run at the same time; one that cannot start makes the measurement none."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    steps, memory = measure_sharing(tiny_run(), 2, device="cpu", seconds=1.0)
    assert steps > 1 and memory == 0.0
    assert measure_sharing(tiny_run(), 1, device="cuda:77", seconds=1.0) is None


def test_a_step_is_timed_by_the_trainer_that_takes_it(monkeypatch):
    """The forecast's clock runs over a real trainer's step: its clipping, its optimizer and its precision are in it."""
    steps = []
    real = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, step: steps.append(self.precision) or real(self, step))
    run = tiny_run(train__precision="bf16", train__steps=2)
    assert forecast.time_step(run, repeats=2) > 0 and steps == ["bf16"] * 3


def test_times_are_kept_by_what_is_in_force():
    """Precision and compilation are told apart as they are chosen, and what changes no step's time is not."""
    run = tiny_run()
    key = forecast.shape_key(run, 2)
    assert forecast.shape_key(run.override({"train.lr": 0.5, "seed": 7}), 2) == key != forecast.shape_key(run, 1)
    assert forecast.shape_key(run.override({"train.precision": "fp32"}), 2) == key  # what auto is here
    for change in ({"train.precision": "bf16"}, {"train.compile": True}, {"train.grad_clip": 0.5}):
        assert forecast.shape_key(run.override(change), 2) != key


def test_a_forecast_asks_no_run_who_it_is_and_needs_no_cache(tmp_path, monkeypatch):
    """Identities read the data, and a plan of hundreds of runs has them already; times are only kept to save time."""
    arms = [Arm("as it is"), Arm("other", {"model.norm.kind": "rmsnorm"})]
    study = Study(name="tiny", phase="norm", base=tiny_run(), arms=arms, baseline="as it is", seeds=(0, 1))
    planned = distinct([study])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "file" / "cache"))
    with monkeypatch.context() as asked:
        asked.setattr(RunConfig, "run_id", property(lambda self: pytest.fail("a run was asked for its identity")))
        seconds, h100 = predict_seconds(planned, 1), expect_h100(planned)
    assert set(seconds) == set(h100) == {one.run_id for one in planned} and min(seconds.values()) > 0
    table = plan_table({"norm": [study]}, None, seconds, h100)
    assert table["runs"].tolist() == [4] and table["minutes"][0] == pytest.approx(sum(seconds.values()) / 60)
