"""What goes wrong beside kills: runs that hang, memory that runs out, clocks that jump, file systems without locks."""

import errno
import os
import time
import warnings

import pytest
from test_plan import PLAN, call, executed, place  # noqa: F401  (a fixture)
from tiny import hang, start, tiny_run

from kimi_nb.cli import main
from kimi_nb.runner import RunnerError, attempt, run_studies
from kimi_nb.runner import pool as runner
from kimi_nb.study import Arm, Store, Study


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "faults-cache"))


def two_arms(**changes):
    """A study of one seed whose second arm is the one in trouble."""
    return Study(
        name="faults",
        base=tiny_run(**changes),
        baseline="fine",
        seeds=(0,),
        arms=(Arm("fine"), Arm("trouble", {"model.d_ff": 64})),
    )


@pytest.mark.skipif(os.name != "posix", reason="needs named pipes")
@pytest.mark.slow
def test_a_run_that_hangs_is_ended_tried_again_and_fails_alone(tmp_path, monkeypatch):
    """With a time limit a run that hangs is ended and tried again.

    Then recorded as failed with the line where it stood; the other runs are done.
    """
    monkeypatch.setattr(runner, "_TRIES", 2)
    store, study = Store(tmp_path / "s"), two_arms()
    hang(store, study, "trouble")
    fine, trouble = run_studies([study], store, workers=2, progress=False, hours_per_run=6 / 3600)
    assert (fine.status, trouble.status) == ("done", "failed")
    assert (
        "not done after 0.00166667 hours, 2 times, last in read_state (checkpoint.py, line "
        in trouble.provenance["error"]
        and "--time-limit" in trouble.provenance["error"]
    )
    assert (store.folder(trouble.run_id) / "training_log.txt").read_text().count("Timeout (") == 2
    assert store.verify() == [] and not list((store.path / ".locks").glob("*.trace"))


def keeps_to_it(folder):
    with attempt._time_limit(Store(folder), "a" * 12, 0.5 / 3600):
        pass
    time.sleep(1.5)


def overstays(folder):
    with attempt._time_limit(Store(folder), "b" * 12, 0.5 / 3600):
        time.sleep(60)


def test_a_time_limit_ends_with_the_run(tmp_path):
    """A worker outlives the limit of a run that it finished in time; one that does not finish is ended.

    And leaves where it stood.
    """
    (tmp_path / ".locks").mkdir()
    ends = [start(target, tmp_path) for target in (keeps_to_it, overstays)]
    for process in ends:
        process.join(60)
    assert [p.exitcode for p in ends] == [0, 1]
    assert attempt._overdue(Store(tmp_path), "a" * 12) == "" and attempt._overdue(Store(tmp_path), "b" * 12).startswith(
        "last in "
    )
    assert not list(tmp_path.rglob("*.trace"))


def test_a_time_limit_needs_a_process_to_end(tmp_path, capsys):
    """A limit with the executor that has no worker processes, and one that is no time, are refused in one line."""
    for how, words in (
        (dict(executor="inprocess", hours_per_run=1.0), "executor process or ray"),
        (dict(hours_per_run=0.0), "hours_per_run 0 is out of range"),
        (dict(address="auto"), "--executor ray"),
    ):
        with pytest.raises(RunnerError, match=words):
            run_studies([two_arms()], Store(tmp_path / "s"), progress=False, **how)
    assert main(["run", "norm", "--results", str(tmp_path), "--time-limit", "-1"]) == 2
    assert "out of range" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["the allocator", "Python", "the disk's cache"])
def test_memory_that_runs_out_in_one_arm_fails_that_arm(tmp_path, monkeypatch, where):
    """Out of memory in one arm is a failed record that says so, and the other arms are done.

    A second plan tries that arm again.
    """
    from kimi_nb.train import Trainer

    real = Trainer._accumulate
    error = dict(
        zip(
            ("the allocator", "Python", "the disk's cache"),
            (
                RuntimeError(
                    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
                ),
                MemoryError("no room"),
                OSError(errno.ENOMEM, "Cannot allocate memory"),
            ),
            strict=True,
        )
    )[where]

    def hungry(self, x, y):
        if self.run.model.d_ff == 64:
            raise error
        return real(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_accumulate", hungry)
        fine, trouble = run_studies([two_arms()], Store(tmp_path / "s"), "inprocess", progress=False)
    assert (fine.status, trouble.status) == ("done", "failed")
    words = {
        "the allocator": "out of memory at step 1 with a micro-batch of 1 sequence",
        "Python": "MemoryError: no room",
        "the disk's cache": "Cannot allocate memory",
    }[where]
    assert words in trouble.provenance["error"]
    again = run_studies([two_arms()], Store(tmp_path / "s"), "inprocess", progress=False)
    assert [r.status for r in again] == ["done", "done"] and Store(tmp_path / "s").verify() == []


@pytest.fixture
def backwards(monkeypatch):
    """A clock that loses an hour whenever somebody looks at it."""
    from datetime import datetime, timedelta

    now = [time.time()]

    def tick():
        now[0] -= 3600
        return now[0]

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            tick()
            return datetime.fromtimestamp(now[0], tz) + timedelta(0)

    monkeypatch.setattr(time, "time", tick)
    monkeypatch.setattr("kimi_nb.study.outcome.datetime", Clock)
    monkeypatch.setattr("kimi_nb.train.loop.datetime", Clock)


def test_a_clock_that_jumps_back_harms_nothing(place, capsys, backwards):  # noqa: F811
    """A plan whose clock goes back an hour at every look: all trained and executed, nothing done twice.

    And what changes afterwards is done again.
    """
    code, out, err = call(capsys, *PLAN)
    assert (code, err) == (0, "") and sorted(executed(out)) == ["baseline", "norm"]
    code, out, _ = call(capsys, *PLAN, "--timing")
    assert code == 0 and executed(out) == [] and ", 0 to train" in out
    place.phase("norm", then="another = 1")
    code, out, _ = call(capsys, *PLAN)
    assert code == 0 and executed(out) == ["norm"]
    store = Store(place.results)
    assert store.verify(complete=True) == [] and all(
        r.metrics["seconds"] >= 0 for r in store.records() if "seconds" in r.metrics
    )


def test_a_phase_that_records_nothing_new_is_found_out_whatever_the_clock_says(place, capsys, backwards):  # noqa: F811
    """A notebook that leaves the old outcome standing is a failed phase, though that outcome bears a later time."""
    assert call(capsys, *PLAN)[0] == 0
    place.phase("norm", cells=["profile = 'tiny'\nresults = ''\nseeds = 0", "1 + 1"])
    code, out, _ = call(capsys, *PLAN)
    assert code == 1 and "recorded no outcome" in out


def no_flock(number):
    def flock(fd, operation):
        raise OSError(number, os.strerror(number))

    return flock


def test_a_file_system_without_locks_gets_lock_files(tmp_path, monkeypatch):
    """Where flock does not exist (some network file systems) lock files take its place: one holder at a time.

    A plan ends with every record, nothing is left behind.
    """
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", no_flock(errno.ENOSYS))
    store = Store(tmp_path / "s")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock says that it does so
        with store.lock("a" * 12) as first, Store(tmp_path / "s").lock("a" * 12, wait=False) as second:
            assert (first, second) == (True, False)
        with store.lock("a" * 12, wait=False) as again:
            assert again
        records = run_studies([two_arms()], store, "inprocess", progress=False)
    assert [r.status for r in records] == ["done", "done"] and store.verify(complete=True) == []


def test_a_lock_server_that_is_down_is_one_line(tmp_path, monkeypatch):
    """Where a network file system has no locks to give (its lock service is down) nothing is trained.

    And one line says so.
    """
    from kimi_nb.config import KimiError

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", no_flock(errno.ENOLCK))
    with pytest.raises(KimiError, match="No locks available"):
        run_studies([two_arms()], Store(tmp_path / "s"), "inprocess", progress=False)
    assert not list((tmp_path / "s").glob("experiments/*/result.json"))
