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
from tiny import Workplace, tiny_run, wait_until

from kimi_nb.cli import main
from kimi_nb.runner import run_studies
from kimi_nb.store import Store
from kimi_nb.study import Arm, Study

needs_ray = pytest.mark.skipif(find_spec("ray") is None or os.name != "posix", reason="needs ray: pip install 'kimi_nb[scale]'")
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
@pytest.mark.parametrize("argv, words", [(["--address", "127.0.0.1:1"], ["127.0.0.1:1", "ray start --head"]), (["--address", "cluster"], ["'cluster'", "HOST:PORT"])])
def test_a_cluster_that_does_not_answer_is_one_line(place, capsys, argv, words):
    """An address where no cluster is, is refused at once in one line."""
    begin = time.monotonic()
    assert main([*PLAN, *argv]) == 2 and time.monotonic() - begin < 30
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(w in err for w in words), err


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and a node on this machine, one core each; a lost node is noticed within seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for k, v in dict(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", KIMI_NB_CACHE=str(tmp_path_factory.mktemp("ray-cache"))).items():
            patch.setenv(k, v)
        from ray.cluster_utils import Cluster

        soon = dict(health_check_initial_delay_ms=2000, health_check_period_ms=1000, health_check_timeout_ms=5000, health_check_failure_threshold=3)
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
    """One of two Ray nodes is killed while both train: its run goes on from its checkpoint on the other, every record is there once."""
    store, study = Store(tmp_path / "s"), sweep("lost", 3, train__steps=300, train__save_every=10, train__eval_every=0)
    with killing(cluster, store, lambda s: len({f.parent for f in s.path.glob("experiments/*/checkpoints/step_*")}) >= 2):
        run_studies([study], store, "ray", address=cluster.address, progress=False)
    every_record_once(store, study)
    assert sum("goes on after" in text for text in logs(store)) == 1, "the lost run did not go on from its checkpoint"


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_of_64_runs_loses_a_node(cluster, tmp_path):
    """64 runs on two Ray nodes, one killed when 52 are done and not replaced: all records once, the same numbers, at most 1.3 times the time without the kill.

    With 12 runs left for one node instead of two the least possible is 70/64, 1.09 times; the rest is noticing the loss. The times are taken in pairs; since whatever else the machine does falls on one of the two, the best of at most three pairs counts.
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
    """With a time limit a run that hangs on a node is ended, tried again, and becomes a failed record that says where it stood; the others are done."""
    from tiny import hang

    from kimi_nb import runner

    monkeypatch.setattr(runner, "_TRIES", 2)
    store, study = Store(tmp_path / "s"), sweep("hangs", 1)
    hang(store, study, "rmsnorm")
    fine, hung = run_studies([study], store, "ray", address=cluster.address, progress=False, hours_per_run=8 / 3600)
    assert (fine.status, hung.status) == ("done", "failed")
    assert "not done after 0.00222222 hours, 2 times, last in read_state (checkpoint.py, line " in hung.provenance["error"]


@needs_ray
@pytest.mark.slow
def test_a_stopped_plan_on_ray_saves_and_says_how_to_go_on(place):
    """SIGTERM to `kimi-nb plan --executor ray` on a cluster of its own: every run under way is saved, one line says so, no process is left."""
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *PLAN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: list(place.results.glob("experiments/*/metrics.jsonl")), 120, "training")
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("\n") == 1 and "run the same command again to go on" in err, err
    stopped = [f.parent for f in place.results.glob("experiments/*/training_log.txt") if "starts at" in f.read_text()]
    assert stopped and all(list((f / "checkpoints").glob("step_*")) for f in stopped)
    assert not psutil.wait_procs(children, timeout=30)[1]
