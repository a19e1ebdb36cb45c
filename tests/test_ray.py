"""Studies on a Ray cluster: nodes and workers are lost, nothing else is."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import psutil
import pytest
from tiny import Workplace, hang, tiny_run, wait_until

from kimi_nb.cli import main
from kimi_nb.runner import RunnerError, run_studies
from kimi_nb.runner import pool as runner
from kimi_nb.study import Arm, Store, Study

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None or os.name != "posix", reason="needs ray: pip install 'kimi_nb[scale]'"
)
SMALL = dict(include_dashboard=False, object_store_memory=80 * 2**20)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout of tiny runs."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    made = Workplace(tmp_path / "work", phases=("norm",), train__steps=50_000, train__save_every=0)
    for k, v in made.environment().items():
        monkeypatch.setenv(k, v)
    return made


PLAN = ["plan", "--profile", "tiny", "--quiet", "--executor", "ray"]


def test_without_ray_a_plan_says_what_to_install(place, monkeypatch, capsys):
    """Executor ray without the package is one line that names the extra."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(PLAN) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'kimi_nb[scale]'" in err


@needs_ray
@pytest.mark.parametrize(
    "argv, words",
    [
        (["--address", "127.0.0.1:1"], ["127.0.0.1:1", "ray start --head"]),
        (["--address", "cluster"], ["'cluster'", "HOST:PORT"]),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_line(place, capsys, argv, words):
    """An address where no cluster is, is refused at once in one line."""
    begin = time.monotonic()
    assert main([*PLAN, *argv]) == 2 and time.monotonic() - begin < 30
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(w in err for w in words), err


class Here:
    """As much of Ray as the runner uses: tasks are done here when their result is asked for.

    `lose` workers die before.
    """

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    def __init__(self, lose=()):
        self.lose = list(lose)

    def remote(self, **options):
        class Task:
            def __init__(self, work, arguments=None):
                self.work, self.arguments = work, arguments

            def remote(self, *arguments):
                return Task(self.work, arguments)

        return Task

    def nodes(self):
        return [dict(Alive=True, Resources=dict(CPU=1.0))]

    cluster_resources = dict

    def wait(self, refs, num_returns=1, timeout=None):
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref):
        if ref.arguments[0] in self.lose:
            self.lose.remove(ref.arguments[0])
            raise self.exceptions.RayError("the worker died")
        return ref.work(*ref.arguments)

    def cancel(self, ref, force=False):
        pass


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A stand-in for a cluster, in this process."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    made = Here()
    monkeypatch.setattr(runner, "connected", lambda address: contextlib.nullcontext(made))
    return made


def test_lost_workers_cost_a_try(here, tmp_path):
    """A run whose worker is lost twice is done at the third try, one that loses three is a failed record.

    And all others are done; every record is there once.
    """
    store, study = Store(tmp_path / "s"), sweep("tries", 2, train__steps=2, train__save_every=0)
    twice, thrice, *_ = (p.run.run_id for p in study.expand())
    here.lose = [twice] * 2 + [thrice] * 3
    records = {r.run_id: r for r in run_studies([study], store, "ray", progress=False)}
    assert {k: r.status for k, r in records.items()} == {
        k: "failed" if k == thrice else "done" for k in records
    } and len(records) == 4
    assert "died 3 times" in records[thrice].provenance["error"] and store.verify() == []
    assert [r.status for r in run_studies([study], store, "ray", progress=False)] == ["done"] * 4


def test_a_node_that_is_different_is_refused(here, tmp_path, monkeypatch):
    """A node with other training code.

    Other data under the same name or another folder in the place of the results is refused in one line, and writes
    nothing.
    """
    study, real = sweep("different", 1, train__steps=2, train__save_every=0), runner._on_a_node
    for change, words in (
        (lambda a: (a[0], "0" * 16, *a[2:]), "has other training code"),
        (lambda a: ("0" * 12, *a[1:]), "has other data under the name tinyworld"),
        (lambda a: (*a[:3], Store(tmp_path / "elsewhere"), a[4]), "does not see"),
    ):
        monkeypatch.setattr(runner, "_on_a_node", lambda *a, change=change: real(*change(a)))
        with pytest.raises(RunnerError, match=words):
            run_studies([study], Store(tmp_path / "s"), "ray", progress=False)
    assert not list(tmp_path.glob("*/experiments/*"))
    with pytest.raises(RunnerError, match="--cpus-per-run"):
        run_studies([study], Store(tmp_path / "s"), "ray", progress=False, cpus=64)


def test_progress_on_a_cluster_is_read_from_the_journals(tmp_path):
    """The bar moves with the last whole line of each run's metrics.jsonl, whatever else the file ends with."""
    store, study = Store(tmp_path / "s"), sweep("shown", 1)
    first, second = study.expand()
    journal = store.begin(first.run, "x") / "metrics.jsonl"
    journal.write_text(
        "".join(json.dumps(dict(step=n, train_loss=5.0 - n)) + "\n" for n in (1, 2, 3))
        + json.dumps(dict(step=3, val_loss=1.0))
        + '\n{"step": 4, "tra'
    )
    bar = runner.Progress(
        {p.run.run_id: 1.0 for p in (first, second)},
        dict.fromkeys((first.run.run_id, second.run.run_id), 12),
        show=False,
    )
    runner._follow({first.run.run_id, second.run.run_id}, store, bar)
    assert bar.seen == {first.run.run_id: 250, second.run.run_id: 0} and "loss 2.000" in bar.note


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and a node on this machine, one core each; a lost node is noticed within seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for k, v in dict(
            RAY_AUTH_MODE="disabled",
            RAY_USAGE_STATS_ENABLED="0",
            OMP_NUM_THREADS="1",
            KIMI_NB_CACHE=str(tmp_path_factory.mktemp("ray-cache")),
        ).items():
            patch.setenv(k, v)
        from ray.cluster_utils import Cluster

        soon = dict(
            health_check_initial_delay_ms=2000,
            health_check_period_ms=1000,
            health_check_timeout_ms=5000,
            health_check_failure_threshold=3,
        )
        made = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, _system_config=soon, **SMALL))
        yield made
        made.shutdown()


@contextlib.contextmanager
def killing(cluster, store, when):
    """Adds a node of one core, and kills it when `when(store)` holds."""
    node, problems = cluster.add_node(num_cpus=1, **SMALL), []

    def kill():
        try:
            wait_until(lambda: when(store), 300, "the moment to kill a node")
            cluster.remove_node(node, allow_graceful=False)
        except AssertionError as e:
            problems.append(e)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        if node in cluster.list_all_nodes():
            cluster.remove_node(node)
    assert not problems


def done(store):
    return len(list(store.path.glob("experiments/*/result.json")))


def logs(store):
    return [f.read_text() for f in store.path.glob("experiments/*/training_log.txt")]


def sweep(name, seeds, **changes):
    arms = [Arm("layernorm"), Arm("rmsnorm", {"model.norm.kind": "rmsnorm"})]
    return Study(name=name, base=tiny_run(**changes), baseline="layernorm", seeds=range(seeds), arms=arms)


def every_record_once(store, study):
    """Each planned run has one whole record, every step once, and was finished once."""
    planned = {p.run.run_id for p in study.expand()}
    records = list(store.records())
    assert sorted(r.run_id for r in records) == sorted(planned) and {r.status for r in records} == {"done"}
    assert store.verify(complete=True) == []
    for r in records:
        folder = store.folder(r.run_id)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, study.base.train.steps + 1))
        assert (folder / "training_log.txt").read_text().count(" done after step ") == 1


@needs_ray
@pytest.mark.slow
def test_a_node_lost_in_the_middle(cluster, tmp_path):
    """One of two Ray nodes is killed while both train: its run goes on from its checkpoint on the other.

    Every record is there once.
    """
    store, study = Store(tmp_path / "s"), sweep("lost", 3, train__steps=300, train__save_every=10, train__eval_every=0)
    with killing(
        cluster, store, lambda s: len({f.parent for f in s.path.glob("experiments/*/checkpoints/step_*")}) >= 2
    ):
        run_studies([study], store, "ray", address=cluster.address, progress=False)
    every_record_once(store, study)
    assert sum("goes on after" in text for text in logs(store)) == 1, "the lost run did not go on from its checkpoint"


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_of_64_runs_loses_a_node(cluster, tmp_path):
    """64 runs on two Ray nodes, one killed when 52 are done and not replaced.

    All records once, the same numbers, at most 1.3 times the time without the kill.

    With 12 runs left for one node instead of two the least possible is 70/64, 1.09 times; the rest is noticing the
    loss. The times are taken in pairs; since whatever else the machine does falls on one of the two, the best of at
    most three pairs counts.
    """
    study, pairs = sweep("sixtyfour", 32, train__steps=100, train__save_every=25, train__eval_every=0), []
    while not pairs or (min(pairs) > 1.3 and len(pairs) < 3):
        seconds, stores = {}, {}
        for name, moment in (("whole", lambda s: done(s) >= 64), ("broken", lambda s: done(s) >= 52)):
            stores[name] = Store(tmp_path / f"{name}-{len(pairs)}")
            with killing(cluster, stores[name], moment):
                begin = time.monotonic()
                run_studies([study], stores[name], "ray", address=cluster.address, progress=False)
                seconds[name] = time.monotonic() - begin
            every_record_once(stores[name], study)
        losses = {name: {r.run_id: r.metrics["test_loss"] for r in store.records()} for name, store in stores.items()}
        assert losses["whole"] == losses["broken"] and len(losses["whole"]) == 64
        pairs.append(seconds["broken"] / seconds["whole"])
        print(f"64 runs: {seconds['whole']:.1f} s, with a node killed {seconds['broken']:.1f} s, {pairs[-1]:.2f} times")
    assert min(pairs) <= 1.3, pairs


@needs_ray
@pytest.mark.slow
def test_a_run_that_hangs_on_a_node_fails_alone(cluster, tmp_path, monkeypatch):
    """With a time limit a run that hangs on a node is ended, tried again.

    And becomes a failed record that says where it stood; the others are done.
    """
    monkeypatch.setattr(runner, "_TRIES", 2)
    store, study = Store(tmp_path / "s"), sweep("hangs", 1)
    hang(store, study, "rmsnorm")
    fine, hung = run_studies([study], store, "ray", address=cluster.address, progress=False, hours_per_run=8 / 3600)
    assert (fine.status, hung.status) == ("done", "failed")
    assert (
        "not done after 0.00222222 hours, 2 times, last in read_state (checkpoint.py, line " in hung.provenance["error"]
    )


@needs_ray
@pytest.mark.slow
def test_a_stopped_plan_on_ray_saves_and_says_how_to_go_on(place):
    """SIGTERM to `kimi-nb plan --executor ray` on a cluster of its own: every run under way is saved.

    One line says so, no process is left.
    """
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *PLAN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: list(place.results.glob("experiments/*/metrics.jsonl")), 120, "training")
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("\n") == 1 and "run the same command again to go on" in err, err
    stopped = [f.parent for f in place.results.glob("experiments/*/training_log.txt") if "starts at" in f.read_text()]
    unsaved = {
        f.name: (f / "training_log.txt").read_text() for f in stopped if not list((f / "checkpoints").glob("step_*"))
    }
    assert stopped and unsaved == {}
    assert not psutil.wait_procs(children, timeout=30)[1]


OWN_CLUSTER = """
import os, psutil, ray
from kimi_nb.runner import connected
with connected() as ray:
    task = ray.remote(lambda: os.environ.get("RAY_AUTH_MODE"))
    mode, token = ray.get(task.remote()), len(os.environ["RAY_AUTH_TOKEN"])
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listens = {c.laddr.ip.removeprefix("::ffff:") for p in mine for c in p.net_connections() if c.status == "LISTEN"}
print(mode, token, *sorted(listens))
print("RAY_AUTH_TOKEN" in os.environ, ray.is_initialized())
"""


@pytest.mark.slow
def test_a_cluster_of_this_machine_is_nobody_elses():
    """It listens on the loopback interface alone and asks for a token; nothing of it stays in the environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    shown = subprocess.run(
        [sys.executable, "-c", OWN_CLUSTER], env=clean, capture_output=True, text=True, check=True, timeout=240
    ).stdout.splitlines()
    assert shown == ["token 64 127.0.0.1", "False False"]
