"""Nothing is lost when processes are killed: runs, plans, workers, signals."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tiny import RUN, Workplace, start, tiny_run, wait_until

from kimi_nb.plan import phase_studies
from kimi_nb.runner import distinct, run_studies
from kimi_nb.study import Arm, RunFolder, Store, Study

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups of POSIX")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "kills-cache"))


def train(run, folder):
    from kimi_nb.train import fit

    fit(run, folder, progress=False)


def train_beside(run, folder):
    from kimi_nb.train import fit

    fit(run, folder, progress=False, beside=True)


def plan(study, folder, workers):
    run_studies([study], Store(folder), workers=workers, progress=False)


def weights(folder):
    return (folder / "checkpoints" / "final" / "model.safetensors").read_bytes()


def trained_lines(folder):
    """What metrics.jsonl says about every training step, times and memory left out."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory_mb")} for line in lines]


def finish(process, seconds=400):
    process.join(seconds)
    assert process.exitcode == 0, f"ended with {process.exitcode}"


def descendants(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def trainers(pid):
    """The worker processes of a plan."""
    found = []
    for child in descendants(pid):
        try:
            if any("spawn_main" in part for part in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def kill_a_run(tmp_path, kills, steps, seed, train=train):
    rng, run = random.Random(seed), tiny_run(train__steps=steps, train__save_every=4, train__eval_every=25)
    whole = tmp_path / "whole"
    finish(start(train, run, whole))  # makes the token cache, too
    begin = time.monotonic()
    finish(start(train, run, tmp_path / "timed"))
    span = time.monotonic() - begin
    assert weights(whole) == weights(tmp_path / "timed")
    killed, n, resumed, ends = 0, 0, 0, []
    while killed < kills or not resumed or not ends:
        folder = tmp_path / f"broken-{n}"
        if (folder / "result.json").exists():
            ends.append(folder)
            n += 1
            continue
        process = start(train, run, folder)
        if killed >= kills and resumed:
            finish(process)
            continue
        pause = 0.3
        if rng.random() < 0.7:  # else while it starts
            pause = 0.02  # what is left of it is short, beside the start
            wait_until(
                lambda p=process, f=folder: not p.is_alive() or list((f / "checkpoints").glob("step_*")),
                what="a checkpoint",
            )
        time.sleep(rng.uniform(0.0, pause) * span)
        alive = process.is_alive()
        process.kill()
        process.join()
        killed += alive
        resumed += bool(list((folder / "checkpoints").glob("step_*")))
    for folder in ends:
        assert weights(folder) == weights(whole)
        lines = trained_lines(folder)
        assert lines == trained_lines(whole)
        assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, steps + 1))
        ours, theirs = (json.loads((f / "result.json").read_text())["metrics"] for f in (folder, whole))
        assert {k: ours[k] for k in ("test_loss", "val_loss", "train_loss")} == {
            k: theirs[k] for k in ("test_loss", "val_loss", "train_loss")
        }
        assert not list(folder.rglob("*.tmp"))


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """Killed at random moments and started again, a run ends with the weights, metrics and lines of an unbroken one."""
    kill_a_run(tmp_path, kills=3, steps=60, seed=0)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    """The same with twenty kills."""
    kill_a_run(tmp_path, kills=20, steps=300, seed=1)


@pytest.mark.slow
def test_a_run_killed_while_a_thread_writes_its_checkpoints_ends_with_the_same_bits(tmp_path):
    """The same where checkpoints are written beside the training."""
    kill_a_run(tmp_path, kills=8, steps=150, seed=2, train=train_beside)


def small_study(seeds, steps, save_every=8):
    base = tiny_run(train__steps=steps, train__save_every=save_every, train__eval_every=50)
    arms = (
        Arm("layernorm"),
        Arm("rmsnorm", {"model.norm.kind": "rmsnorm"}),
        Arm("gelu", {"model.ffn.activation": "gelu"}),
    )
    return Study(name="kills", base=base, baseline="layernorm", seeds=range(seeds), arms=arms)


def kill_a_plan(tmp_path, kills, seeds, steps, seed):
    rng, study = random.Random(seed), small_study(seeds, steps)
    finish(start(plan, study, tmp_path / "whole", 2))
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    killed, ended, process = 0, 0, None
    while killed < kills:
        if process is None or not process.is_alive():
            if len(list(broken.records())) == 3 * seeds:
                ended += 1
                (tmp_path / "broken").rename(tmp_path / f"done-{ended}")
                compare_stores(whole, Store(tmp_path / f"done-{ended}"), study)
            process = start(plan, study, tmp_path / "broken", 2)
        # at first at any time of the start, later on while they train
        if rng.random() < 0.8:
            wait_until(
                lambda p=process: not p.is_alive() or any(broken.path.glob("experiments/*/metrics.jsonl")),
                what="training",
            )
        time.sleep(rng.uniform(0.0, 0.6))
        if rng.random() < 0.5 and (workers := trainers(process.pid)):
            victim = rng.choice(workers)
            victim.kill()
            killed += 1
        elif process.is_alive():
            workers = trainers(process.pid)
            process.kill()
            process.join()
            killed += 1
            psutil.wait_procs(workers, timeout=30)
            assert not [w for w in workers if w.is_running() and w.status() != "zombie"], "a worker outlived its parent"
        assert broken.verify() == []
    while process.is_alive():
        process.join(60)
    finish(start(plan, study, tmp_path / "broken", 2))
    compare_stores(whole, broken, study)


def compare_stores(whole, broken, study):
    assert broken.verify(complete=True) == []
    ids = sorted(r.run_id for r in broken.records())
    assert ids == sorted({p.run.run_id for p in study.expand()}) == sorted(r.run_id for r in whole.records())
    for run_id in ids:
        assert broken.get(run_id).status == "done"
        assert weights(broken.folder(run_id)) == weights(whole.folder(run_id))
        assert trained_lines(broken.folder(run_id)) == trained_lines(whole.folder(run_id))


def test_a_killed_plan_ends_with_the_same_records(tmp_path):
    """Two workers, they or their plan killed at random moments: every record once, with an unbroken one's weights."""
    kill_a_plan(tmp_path, kills=3, seeds=1, steps=80, seed=3)


@pytest.mark.slow
def test_a_plan_killed_twenty_times_ends_with_the_same_records(tmp_path):
    """The same with twenty kills."""
    kill_a_plan(tmp_path, kills=20, seeds=2, steps=160, seed=4)


def test_a_killed_worker_is_replaced(tmp_path):
    """A worker killed while the plan lives is replaced: its run goes on, the other's is not disturbed."""
    study = small_study(1, 600, save_every=40)
    process = start(plan, study, tmp_path / "s", 2)
    store = Store(tmp_path / "s")
    wait_until(
        lambda: len({f.parent for f in store.path.glob("experiments/*/checkpoints/step_*")}) >= 2,
        what="two runs' checkpoints",
    )
    trainers(process.pid)[0].kill()
    finish(process)
    assert len(list(store.records())) == 3 and store.verify(complete=True) == []
    logs = [f.read_text() for f in store.path.glob("experiments/*/training_log.txt")]
    assert sum("goes on after" in text for text in logs) == 1 and not any("stopped" in text for text in logs)


def test_an_orphaned_worker_stops_by_itself(tmp_path):
    """Workers whose plan was killed save their run and end."""
    process = start(plan, small_study(1, 5000, save_every=40), tmp_path / "s", 2)
    wait_until(lambda: list((tmp_path / "s").glob("experiments/*/checkpoints/step_*")), what="a checkpoint")
    workers = trainers(process.pid)
    assert workers
    process.kill()
    process.join()
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert any("stopped after step" in f.read_text() for f in (tmp_path / "s").glob("experiments/*/training_log.txt"))


def command(*argv, env=None):
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
        start_new_session=True,
    )


def run_options(**changes):
    return [f"--{k}={v}" for k, v in (RUN | {k.replace("__", "."): v for k, v in changes.items()}).items()]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_run_saves_and_says_how_to_go_on(tmp_path, number):
    """SIGINT and SIGTERM let `kimi-nb train` finish its step and save; it says so in one line and ends with 130."""
    out = tmp_path / "run"
    process = command("train", "--out", out, "--quiet", *run_options(train__steps=100_000, train__save_every=0))
    wait_until(
        lambda: (out / "training_log.txt").exists() and "starts at" in (out / "training_log.txt").read_text(),
        what="training",
    )
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1 and "saved in" in err and "run the same command again to go on" in err, err
    (saved,) = (out / "checkpoints").glob("step_*")
    assert [line["step"] for line in trained_lines(out) if "train_loss" in line] == list(
        range(1, int(saved.name[5:]) + 1)
    )


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_stopped_plan_saves_and_says_how_to_go_on(tmp_path, number):
    """The same for `kimi-nb plan` with two workers: every run under way is saved, no process is left."""
    place = Workplace(tmp_path, train__steps=50_000, train__save_every=0)
    process = command("plan", "--profile", "tiny", "--quiet", "--workers", 2, env=place.environment())
    wait_until(lambda: len(list(place.results.glob("experiments/*/metrics.jsonl"))) >= 2, what="training")
    time.sleep(0.5)
    workers = trainers(process.pid)
    if number == signal.SIGINT:  # Ctrl-C reaches the whole group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = [line for line in err.splitlines() if "runs to train" not in line]  # what it costs is said before
    assert len(lines) == 1 and "run the same command again to go on" in lines[0], err
    assert not psutil.wait_procs(workers, timeout=10)[1]
    unfinished = [f for f in place.results.glob("experiments/*") if not (f / "result.json").exists()]
    logs = [f / "training_log.txt" for f in unfinished]  # none where the stop came before the first step
    begun = [log.parent for log in logs if log.exists() and "starts at" in log.read_text()]
    assert begun and all(list((f / "checkpoints").glob("step_*")) for f in begun)


@pytest.mark.slow
def test_a_plan_stopped_in_a_notebook_leaves_no_kernel(tmp_path):
    """SIGTERM while a phase notebook is executed ends its kernel too."""
    place = Workplace(tmp_path, phases=["baseline"], train__steps=3)
    place.phase("baseline", then="import pathlib, time; pathlib.Path(results, 'here').touch(); time.sleep(600)")
    process = command("plan", "--profile", "tiny", "--quiet", "--executor", "inprocess", env=place.environment())
    wait_until((place.results / "here").exists, what="the notebook")
    kernels = descendants(process.pid)
    assert kernels
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().splitlines()[-1].endswith("run the same command again to go on"), (
        err
    )
    assert not psutil.wait_procs(kernels, timeout=10)[1]


def both(settings, results, executor):
    from kimi_nb.config import load_profile

    studies = [s for group in phase_studies(load_profile("tiny", settings)).values() for s in group]
    run_studies(studies, Store(results), executor, progress=False)


def test_two_plans_on_one_store_train_each_run_once(tmp_path, monkeypatch):
    """Two plans started at once on one store share the work: no run is trained twice."""
    place = Workplace(tmp_path, train__steps=40)
    for k, v in place.environment().items():
        monkeypatch.setenv(k, v)
    two = [start(both, place.path / "settings.ini", place.results, "inprocess") for _ in range(2)]
    for process in two:
        finish(process)
    store = Store(place.results)
    assert store.verify(complete=True) == []
    logs = [f.read_text() for f in store.path.glob("experiments/*/training_log.txt")]
    assert len(logs) == len(list(store.records())) and all(text.count("starts at") == 1 for text in logs)
    from kimi_nb.config import load_profile

    planned = distinct(s for g in phase_studies(load_profile("tiny", place.path / "settings.ini")).values() for s in g)
    assert {p.run.run_id for p in planned} == {r.run_id for r in store.records()}


def hold(folder, run_id):
    with Store(folder).lock(run_id):
        (folder / "held").touch()
        time.sleep(600)


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_free(tmp_path):
    """A run whose trainer was killed while it held the run's lock can be trained at once."""
    run = tiny_run(train__steps=2)
    process = start(hold, tmp_path, run.run_id)
    wait_until((tmp_path / "held").exists, what="the lock")
    process.kill()
    process.join()
    from kimi_nb.runner import run_one

    begin = time.monotonic()
    assert run_one(run, Store(tmp_path)).status == "done" and time.monotonic() - begin < 30


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    """A second `fit` in a folder that is being trained in is refused in a line."""
    from kimi_nb.train import TrainError, fit

    run = tiny_run(train__steps=100_000)
    process = start(train, run, tmp_path / "run")
    wait_until((tmp_path / "run" / "metrics.jsonl").exists, what="training")
    with pytest.raises(TrainError, match="trained in by another process"):
        fit(run, tmp_path / "run", progress=False)
    process.kill()
    process.join()


class Killed(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_of_a_run_killed_after_its_record_are_removed(tmp_path, monkeypatch, keep):
    """Its record is there, its last checkpoint half removed: the next write to the store removes the rest.

    What a study keeps on purpose stays.
    """
    from kimi_nb.runner import run_one

    write, run = RunFolder.write_result, tiny_run()

    def write_and_die(folder, record):
        write(folder, record)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RunFolder, "write_result", write_and_die)
        run_one(run, Store(tmp_path), keep=keep)
    folder = Store(tmp_path).run_folder(run.run_id)
    old = max(folder.checkpoints.glob("step_*"))
    assert folder.finished
    if keep == 1:
        (old / "state.json").unlink()
    Store(tmp_path).rebuild()
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == (["final"] if keep == 1 else ["final", "step_00000006", "step_00000009"])
    assert not any(folder.path.glob(".*.tmp")) and run_one(run, Store(tmp_path)).status == "done"
