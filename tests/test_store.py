"""The store under what happens to it: kills, other writers, full and read-only disks, edits by hand, damaged files."""

import ast
import errno
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import kimi_nb.study.folder
import kimi_nb.study.ledger
from kimi_nb.config import FileError, KimiError, RunConfig
from kimi_nb.study import (
    RESERVED,
    Arm,
    Record,
    RecordError,
    RunBusy,
    RunFolder,
    Store,
    Study,
    canonical,
    digest_of,
    read_sealed,
    seal,
    unseal,
    write_sealed,
)

REPO = Path(__file__).resolve().parents[1]
BASE = RunConfig().override({"train.steps": 50})
ARMS = (Arm("layernorm"), Arm("rmsnorm", {"model.norm.kind": "rmsnorm"}))
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck))
OTHER_CODE = "0" * 16


def study(seeds=(0, 1, 2), **more) -> Study:
    return Study(**{**dict(name="norm", base=BASE, arms=ARMS, baseline="layernorm", seeds=seeds), **more})


def result(run: RunConfig, bpb: float | None = 2.0, status: str = "done", n: int = 5, **provenance) -> Record:
    curves = {
        "train_loss": {"step": list(range(1, n + 1)), "value": [7 - i / n for i in range(n)]},
        "val_loss": {"step": [n], "value": [6.0]},
    }
    return Record.of(
        run,
        status,
        {"test_bpb": bpb, "val_loss": 6.0},
        curves,
        {"device": "cpu", "started": "2025-01-01T00:00:00", **provenance},
    )


def fill(store: Store, **more) -> list[Record]:
    definition = study(**more)
    store.record_study(definition)
    records = [result(p.run, 2 + i / 10) for i, p in enumerate(definition.expand())]
    for record in records:
        store.put(record, "norm")
    return records


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".locks" not in p.parts
    }


@contextmanager
def refused(*words: str):
    """The block raises one of the project's errors, in one line that holds the words."""
    with pytest.raises(KimiError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@contextmanager
def forked(work):
    """A child process that runs `work(pipe)`; yields its id and the other end."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(read)
            work(write)
            code = 0
        except BaseException as e:  # the child must not return into pytest
            print(repr(e), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(write)
    try:
        yield pid, os.fdopen(read, "rb")
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


# --- what is kept -------------------------------------------------------------------------------------------------


def test_layout(tmp_path):
    store = Store(tmp_path / "deep" / "results")
    assert (
        not store.path.exists()
        and store.frame().empty
        and store.verify() == []
        and store.studies() == []
        and store.get("0" * 12) is None
    )
    records = fill(store)
    store.rebuild()
    assert {p.name for p in store.path.iterdir() if p.name[0] != "."} == {
        "experiments",
        "studies",
        "plots",
        "experiments.json",
        "baselines.json",
        "research_report.md",
    }
    folder = store.folder(records[0].run_id)
    assert (
        folder.name == f"norm_{records[0].run_id}"
        and json.loads((folder / "config.json").read_text()) == records[0].config
    )
    log = json.loads((store.path / "experiments.json").read_text())
    assert [e["experiment_id"] for e in log] == sorted(f"norm_{r.run_id}" for r in records)
    first = next(e for e in log if e["run_id"] == records[0].run_id)
    assert (
        first["serves"] == ["norm / layernorm"]
        and first["results"]["test_bpb"] == 2.0
        and first["config"] == records[0].config
    )
    baseline = store.baselines()["norm"][""]
    assert baseline["arm"] == "layernorm" and baseline["metrics"]["test_bpb"] == pytest.approx(
        dict(mean=2.2, sd=0.2, n=3)
    )
    assert (
        "| layernorm (baseline) | – | 3 done | 2.2 ± 0.2 | 6 ± 0 |" in (store.path / "research_report.md").read_text()
    )


def test_rebuilt_files_depend_on_the_records_alone(tmp_path):
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    records = fill(one)
    one.rebuild()
    for record in reversed(records):
        two.put(record, "norm")
    two.record_study(study((0,)))
    two.record_study(study((0, 1, 2)))
    two.rebuild()
    assert contents(one.path) == contents(two.path)


def test_a_result_is_written_once(tmp_path):
    store = Store(tmp_path)
    record, *_ = fill(store)
    before = contents(tmp_path)
    assert store.put(record) == store.folder(record.run_id)
    with refused(record.run_id, "another result", "repeat"):
        store.put(result(record.run, 1.0))
    with refused(record.run_id, "another result"):  # a failure does not replace a result
        store.put(result(record.run, None, "failed"))
    assert contents(tmp_path) == before


def test_a_stale_record_is_shown_but_not_reused_and_makes_room(tmp_path):
    store, run = Store(tmp_path), BASE
    old = result(run, 3.0, code_hash=OTHER_CODE)
    store.put(old, "norm")
    store.record_study(study((0,)))
    assert store.get(run.run_id) == old and store.get(run.run_id, fresh=True) is None
    assert store.frame().empty and store.curves().empty and len(store.frame(stale=True)) == 1
    assert store.frame("norm").empty and store.frame("norm", stale=True)["stale"].tolist() == [True]
    assert store.frame("norm", missing=True)["status"].tolist() == ["missing", "missing"]
    with refused("another result"):  # older code does not replace older code
        store.put(result(run, 3.1, code_hash=OTHER_CODE))
    folder = store.begin(run)
    assert not (folder / "result.json").exists()
    store.put(new := result(run, 2.0))
    aside = folder.with_name(f"{folder.name}.stale-{old.digest[:8]}")
    assert store.get(run.run_id, fresh=True) == new and Record.from_json((aside / "result.json").read_text()) == old
    assert (
        store.verify() == [] and len(store.frame()) == 1 and sorted(store.frame(stale=True)["test_bpb"]) == [2.0, 3.0]
    )
    with refused("another result"):  # and never comes back over newer code
        store.put(old)


def test_what_failed_or_was_skipped_may_be_tried_again(tmp_path):
    store, run = Store(tmp_path), BASE
    for record in (
        result(run, None, "failed"),
        result(run, None, "skipped: no GPU"),
        result(run, None, "failed", note="again"),
        result(run, 2.0),
    ):
        store.put(record)
        assert store.get(run.run_id) == record
    assert len(list((tmp_path / "experiments").iterdir())) == 4 and store.verify() == []


def test_checkpoints_of_other_code_are_not_resumed(tmp_path, monkeypatch):
    store = Store(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(kimi_nb.study.ledger, "code_hash", lambda run: OTHER_CODE)
        (store.begin(BASE, "norm") / "checkpoint").write_text("weights")
        assert (store.begin(BASE) / "checkpoint").exists()  # the same code goes on with it
    folder = store.begin(BASE)
    assert (
        not (folder / "checkpoint").exists()
        and (folder.with_name(folder.name + ".stale-00000000") / "checkpoint").read_text() == "weights"
    )


# --- studies and tables -------------------------------------------------------------------------------------------


def test_seeds_of_plans_add_up_and_another_size_is_kept_apart(tmp_path):
    store = Store(tmp_path)
    store.record_study(study((0,)))
    store.record_study(study((5, 0)), planned=study((5, 0)).expand()[:1])
    assert list(store.manifest("norm")[1]) == [("layernorm", "", 0), ("rmsnorm", "", 0), ("layernorm", "", 5)]
    small = store.path / "studies" / "norm.json"
    text = small.read_text()
    store.record_study(study((0,), base=BASE.override({"train.steps": 60})))
    assert store.studies() == ["norm"] and store.manifest("norm")[0].base.train.steps == 60
    (mark,) = [p.stem for p in small.parent.iterdir() if "@" in p.name]
    assert (
        (small.parent / f"{mark}.json").read_text() == text
        and store.manifest(mark)[0].base.train.steps == 50
        and store.verify() == []
    )


def test_a_study_that_alternates_between_two_definitions_loses_no_seed(tmp_path):
    """Another profile's plan takes the name for a while; what is known of the first is there when it comes back."""
    store, other = Store(tmp_path / "a"), study((0,), base=BASE.override({"train.steps": 60}))
    for one in (study((0, 5, 6)), other, study((0,)), other):
        store.record_study(one)
    fill(Store(tmp_path / "b"), seeds=(9,))
    Store(tmp_path / "b").export(tmp_path / "b.gz")
    store.import_records(tmp_path / "b.gz")  # its study comes beside the one that has the name
    store.record_study(study((0,)))
    assert set(store.manifest("norm")[0].seeds) == {0, 5, 6, 9} and len(store.manifest("norm")[1]) == 8


def test_frame(tmp_path):
    store = Store(tmp_path)
    records = fill(store, seeds=(0, 1), arms=(*ARMS, Arm("eps", {"model.norm.eps": 1e-5}, label="ε")))
    frame = store.frame("norm")
    assert (
        frame["arm"].tolist() == ["layernorm", "rmsnorm", "eps"] * 2
        and frame["seed"].tolist() == [0, 0, 0, 1, 1, 1]
        and frame["run_id"].tolist() == [r.run_id for r in records]
    )
    assert (
        frame["test_bpb"].tolist() == [r.metrics["test_bpb"] for r in records]
        and frame["label"].tolist()[2] == "ε"
        and frame["device"].tolist() == ["cpu"] * 6
    )
    assert (
        frame["model.norm.kind"].tolist()[:2] == ["layernorm", "rmsnorm"]
        and frame["train.optimizer.betas"][0] == BASE.train.optimizer.betas
    )
    assert set(BASE.flat()) <= set(frame.columns) and list(frame.columns[:8]) == [
        "run_id",
        "study",
        "arm",
        "block",
        "seed",
        "repeat",
        "status",
        "stale",
    ]
    assert (
        len(store.frame()) == 6
        and set(store.frame()["study"]) == {"norm"}
        and "val_loss" not in store.frame(metrics="test_bpb")
    )
    with refused("'nrom'", "did you mean norm?"):
        store.frame("nrom")
    with refused("'test_bpp'", "test_bpb"):
        store.frame("norm", metrics=["test_bpp"])
    with refused("'train_los'", "train_loss"):
        store.curves("norm", "train_los")
    with refused("'../norm'"):
        store.frame("../norm")


def test_one_run_serves_two_studies(tmp_path):
    store = Store(tmp_path)
    records = fill(store)
    store.record_study(study(name="again"))
    assert store.frame(["norm", "again"])["run_id"].tolist() == [r.run_id for r in records] * 2
    assert set(store.frame()["study"]) == {"again, norm"} and len(store.frame()) == 6


def test_missing_is_never_zero(tmp_path):
    store = Store(tmp_path)
    runs = [p.run for p in study((0, 1)).expand()]
    store.record_study(study((0, 1)))
    store.put(Record.of(runs[0], "diverged", {"test_bpb": float("nan"), "steps_done": 3}))
    store.put(Record.of(runs[1], "skipped: no GPU"))
    frame = store.frame("norm", missing=True)
    assert frame["status"].tolist() == ["diverged", "skipped: no GPU", "missing", "missing"]
    assert frame["test_bpb"].isna().all() and frame["steps_done"].tolist()[0] == 3 and frame["test_bpb"].dtype == float
    assert frame["model.norm.kind"].tolist() == ["layernorm", "rmsnorm"] * 2


def test_curves_have_steps_of_their_own(tmp_path):
    store = Store(tmp_path)
    inf, record = float("inf"), result(BASE)
    curves = {
        "a": {"step": [1, 2, 4], "value": [1.5, None, inf]},
        "b": {"step": [4], "value": [2]},
        "load": {"step": [2], "value": [[0.5, 0.5]]},
    }
    store.put(Record.of(BASE, "done", curves=curves))
    store.put(result(BASE.override(seed=1), n=2))
    frame = store.curves()
    first = frame[frame["run_id"] == record.run_id]
    assert first["step"].tolist() == [1, 2, 4] and first["tokens"].tolist() == [
        BASE.tokens_per_step * s for s in (1, 2, 4)
    ]
    assert (
        first["a"].isna().tolist() == [False, True, False]
        and first["a"].iloc[2] == inf
        and first["b"].isna().tolist() == [True, True, False]
        and first["load"].iloc[1] == [0.5, 0.5]
    )
    assert (
        store.curves(names="b")["step"].tolist() == [4] and len(frame) == 5 and Store(tmp_path / "none").curves().empty
    )


def test_a_table_of_a_thousand_runs_takes_little_more_than_reading_their_files(tmp_path):
    """About a second; in turns with reading them, since other programs share the machine.

    Records are put down without the store, whose writes wait for the disk.
    """
    config = BASE.model_dump(mode="json")
    for i in range(1000):
        folder = tmp_path / "experiments" / f"norm_{i:012x}"
        folder.mkdir(parents=True)
        fields = dict(
            run_id=f"{i:012x}",
            status="done",
            config=config,
            metrics={f"m{k}": i / (k + 1) for k in range(20)},
            provenance={"device": "cpu"},
        )
        curves = {c: dict(step=list(range(200)), value=[v / 7 for v in range(200)]) for c in "abc"}
        (folder / "result.json").write_text(seal({**fields, "curves": curves}))

    def read():
        assert len([json.loads(p.read_text()) for p in tmp_path.glob("experiments/*/result.json")]) == 1000

    def table():
        assert len(Store(tmp_path).frame(stale=True)) == 1000

    def seconds(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    ratios = [seconds(table) / seconds(read) for _ in range(3)]
    assert min(ratios) < 3, ratios


# --- damage -------------------------------------------------------------------------------------------------------


def test_a_record_edited_by_hand_is_noticed(tmp_path):
    store = Store(tmp_path)
    record, *_ = fill(store)
    file = store.folder(record.run_id) / "result.json"
    for old, new in (
        ('"test_bpb":2.0', '"test_bpb":1.0'),
        ('"status":"done"', '"status":"failed"'),
        ("6.8", "6.7"),
        ('"seed":0', '"seed":1'),
    ):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        for read in (
            lambda: store.get(record.run_id),
            lambda: store.put(record),
            lambda: store.begin(record.run),
            lambda: Store(tmp_path).frame(),
            lambda: list(store.records()),
            store.rebuild,
            lambda: store.export(tmp_path / "x"),
        ):
            with refused(str(file), "changed after it was written"):
                read()
        assert len(store.verify()) == 1 and str(file) in store.verify()[0]
        file.write_text(text)
    file.write_text(json.dumps(json.loads(file.read_text()), indent=3))  # another layout, the same content
    assert store.get(record.run_id) == record and store.verify() == [] and len(store.frame()) == 6


@pytest.mark.parametrize("which", ["experiments/*/result.json", "studies/norm.json"])
def test_a_file_cut_short_is_noticed(tmp_path, which):
    store = Store(tmp_path)
    fill(store, seeds=(0,))
    file = sorted(tmp_path.glob(which))[0]
    data = file.read_bytes()
    for end in [0, 1, *range(7, len(data) - 1, len(data) // 20)]:
        file.write_bytes(data[:end])
        assert len(Store(tmp_path).verify()) == 1
        with refused(str(file)):
            Store(tmp_path).frame("norm")
        assert file.read_bytes() == data[:end]
    file.write_bytes(data[:-1])  # only the last line end
    assert Store(tmp_path).verify() == []


def test_verify_names_what_is_wrong_and_changes_nothing(tmp_path):
    store = Store(tmp_path)
    records = fill(store)
    experiments = tmp_path / "experiments"
    names = [store.folder(r.run_id) for r in records]
    shutil.copytree(names[0], experiments / f"copy_{records[0].run_id}")
    names[1].rename(experiments / "norm_0123456789ab")
    (names[2] / "config.json").write_text("{}")
    (names[3] / "result.json").write_bytes(b"\xff\xfe")
    (experiments / "notes").mkdir()
    (experiments / "empty_00000000000f").mkdir()
    (tmp_path / "experiments.json").write_text("[")
    (tmp_path / "studies" / "other.json").write_text((tmp_path / "studies" / "norm.json").read_text())
    before = contents(tmp_path)
    found = Store(tmp_path).verify()
    for words in (
        ("hold the same run",),
        ("named for 0123456789ab",),
        ("config.json", "differs"),
        ("is not text",),
        ("notes is no run's folder",),
        ("experiments.json",),
        ("other.json holds study 'norm'",),
    ):
        assert len([p for p in found if all(w in p for w in words)]) == 1, (words, found)
    assert len(found) == 7 and not any("\n" in p for p in found)
    assert (
        sum(
            "empty_00000000000f has no result" in p or "no record of layernorm" in p or "no record of rmsnorm" in p
            for p in store.verify(complete=True)
        )
        == 3
    )
    assert contents(tmp_path) == before


def test_a_record_of_another_config_is_noticed(tmp_path):
    run = RunConfig().override({"data.corpus": "tinyworld", "data.tokenizer": "byte"})
    store = Store(tmp_path)
    store.put(
        Record(
            run_id="0" * 12,
            status="done",
            config=run.model_dump(mode="json"),
            provenance={"code_hash": kimi_nb.study.ledger.code_hash(run)},
        )
    )
    assert [run.run_id in p for p in store.verify()] == [True]


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "results").write_text("x")
    with refused("results is a file"):
        Store(tmp_path / "results")
    store = Store(tmp_path / "results" / "inner")
    with refused("results/inner", "cannot be written"):
        store.put(result(BASE))
    (tmp_path / "experiments").write_text("x")
    for act in (lambda: Store(tmp_path).put(result(BASE)), Store(tmp_path).frame, Store(tmp_path).verify):
        with refused("experiments"):
            act()


# --- disks --------------------------------------------------------------------------------------------------------


@contextmanager
def unprivileged():
    """Root may write anywhere: be somebody else for a moment."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_read_and_not_written():
    box = Path(tempfile.mkdtemp())
    try:
        box.chmod(0o755)
        store = Store(box / "results")
        records = fill(store)
        store.export(box / "records.gz")
        folders = [p for p in [store.path, *store.path.rglob("*")] if p.is_dir()]
        for p in folders:
            p.chmod(0o555)
        before = contents(box)
        with unprivileged():
            reader = Store(store.path)
            assert (
                reader.get(records[0].run_id) == records[0]
                and len(reader.frame("norm")) == 6
                and reader.verify() == []
                and not reader.curves().empty
            )
            acts = (
                lambda: reader.put(result(BASE.override(seed=9))),
                lambda: reader.begin(BASE.override(seed=9)),
                lambda: reader.record_study(study((7,))),
                reader.rebuild,
                lambda: reader.export(store.path / "x"),
            )
            for act in (
                *acts,
                lambda: reader.import_records(box / "records.gz"),
                lambda: reader.lock("0" * 12).__enter__(),
            ):
                with refused(str(store.path), "cannot be written", "writable"):
                    act()
        for p in folders:
            p.chmod(0o755)
        assert contents(box) == before
    finally:
        shutil.rmtree(box)


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files stands for the end of the disk: the record does not fit, small files do."""
    store = Store(tmp_path)
    records = fill(store)
    before = contents(tmp_path)
    large = result(BASE.override(seed=99), n=5000)

    def work(pipe):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        for act in (
            lambda: Store(tmp_path).put(large),
            lambda: Store(tmp_path).export(tmp_path / "records", run_ids=[r.run_id for r in records] * 99),
        ):
            try:
                act()
            except KimiError as e:
                os.write(pipe, f"{e}\n".encode())

    with forked(work) as (_, out):
        (line,) = out.read().decode().splitlines()
        assert "result.json cannot be written" in line and "free some space" in line
    after = contents(tmp_path)
    assert {k: after[k] for k in before} == before and not any(k.endswith((".tmp", "9/result.json")) for k in after)
    assert store.verify() == [] and store.get(large.run_id) is None
    store.put(large)
    assert store.get(large.run_id) == large


@pytest.mark.parametrize("call", ["replace", "fsync", "mkdir"])
def test_an_error_of_the_disk_is_one_line(tmp_path, monkeypatch, call):
    store = Store(tmp_path)
    records = fill(store)
    before = contents(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with refused("cannot be written (No space left on device)", "free some space", "untouched"):
        store.put(result(BASE.override(seed=99)))
    if call != "mkdir":
        with refused("norm.json"):
            store.record_study(study((7, 8)))
    monkeypatch.undo()
    after = contents(tmp_path)
    assert {k: after[k] for k in before} == before and not any(k.endswith(".tmp") for k in after)
    assert store.verify() == [] and len(store.frame("norm")) == len(records)


# --- other processes ----------------------------------------------------------------------------------------------


def test_sigkill_while_writing(tmp_path):
    """Twenty kills at random moments: what was reported as kept is kept, and the store verifies."""
    rng, kept = random.Random(0), {}
    for turn in range(20):

        def work(pipe, turn=turn):
            store = Store(tmp_path)
            for i in range(1000):
                record = result(BASE.override(seed=1000 * turn + i), n=1000)
                store.put(record, "kill")
                store.record_study(study((1000 * turn + i,)))
                os.write(pipe, f"{record.run_id} {record.digest}\n".encode())

        with forked(work) as (pid, out):
            first = out.readline().decode()
            time.sleep(rng.uniform(0, 0.1))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            lines = [first, *out.read().decode().splitlines(keepends=True)]
        kept |= dict(line.split() for line in lines if line.endswith("\n"))
        store = Store(tmp_path)
        assert store.verify() == []
        store.put(result(BASE.override(seed=1000 * turn + 999)))  # nobody holds the lock any more
    assert len(kept) >= 20
    assert {i: store.get(i).digest for i in kept} == kept


def test_writers_take_turns(tmp_path):
    """Four processes write the same records and different seeds of one study."""
    barrier = tmp_path / "go"

    def work(number):
        def act(_):
            while not barrier.exists():
                time.sleep(0.001)
            store = Store(tmp_path / "results")
            store.record_study(study((number,)))
            for p in study(range(4)).expand():
                store.put(result(p.run), f"writer {number}")
            store.rebuild()

        return act

    pids = []
    for number in range(4):
        pid = os.fork()
        if not pid:
            try:
                work(number)(None)
                os._exit(0)
            except BaseException as e:
                print(repr(e), file=sys.stderr, flush=True)
                os._exit(1)
        pids.append(pid)
    barrier.touch()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
    store = Store(tmp_path / "results")
    assert store.verify(complete=True) == [] and len(store.frame("norm")) == 8 and len(list(store.records())) == 8
    assert sorted(store.manifest("norm")[0].seeds) == [0, 1, 2, 3]


def test_of_two_results_for_one_run_one_stands(tmp_path):
    outcomes = []

    def work(value):
        try:
            Store(tmp_path).put(result(BASE, value), f"writer-{value}")
            outcomes.append(value)
        except KimiError as e:
            outcomes.append(str(e))

    threads = [threading.Thread(target=work, args=(float(v),)) for v in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    (winner,) = [o for o in outcomes if isinstance(o, float)]
    assert sum("another result" in o for o in outcomes if isinstance(o, str)) == 3
    assert Store(tmp_path).get(BASE.run_id).metrics["test_bpb"] == winner and Store(tmp_path).verify() == []


def test_a_lock_is_free_when_its_holder_is_killed(tmp_path):
    def work(pipe):
        with Store(tmp_path).lock("0" * 12) as mine:
            os.write(pipe, b"1" if mine else b"0")
            time.sleep(60)

    with forked(work) as (pid, out):
        assert out.read(1) == b"1"
        with Store(tmp_path).lock("0" * 12, wait=False) as mine:
            assert not mine
        with Store(tmp_path).lock("1" * 12, wait=False) as mine:
            assert mine
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        start = time.monotonic()
        with Store(tmp_path).lock("0" * 12, wait=False) as mine:
            assert mine and time.monotonic() - start < 1
    with Store(tmp_path).lock("0" * 12, wait=False) as mine:  # and can be taken again
        assert mine


def test_a_store_travels_to_another_process(tmp_path):
    import pickle

    fill(Store(tmp_path))
    assert len(pickle.loads(pickle.dumps(Store(tmp_path))).frame("norm")) == 6


# --- out and in ---------------------------------------------------------------------------------------------------


def test_export_and_import(tmp_path):
    store = Store(tmp_path / "a")
    records = fill(store)
    store.put(result(BASE.override(seed=50), 1.0), "alone")
    assert store.export(tmp_path / "norm.jsonl.gz", study="norm") == dict(records=6, studies=1)
    assert store.export(tmp_path / "all.jsonl") == dict(records=7, studies=1)
    assert store.export(tmp_path / "one.jsonl", run_ids=[records[0].run_id]) == dict(records=1, studies=0)
    again = (tmp_path / "norm.jsonl.gz").read_bytes()
    store.export(tmp_path / "norm.jsonl.gz", study="norm")
    assert (tmp_path / "norm.jsonl.gz").read_bytes() == again
    for name, n in (("norm.jsonl.gz", 6), ("all.jsonl", 7)):
        other = Store(tmp_path / name.partition(".")[0])
        assert other.import_records(tmp_path / name) == dict(records=n, added=n, equal=0, kept=0, studies=1)
        before = contents(other.path)
        assert other.import_records(tmp_path / name) == dict(records=n, added=0, equal=n, kept=0, studies=1)
        assert contents(other.path) == before and other.verify(complete=True) == []
        assert other.frame("norm").equals(store.frame("norm")) and other.curves("norm").equals(store.curves("norm"))
        assert other.folder(records[0].run_id).name == store.folder(records[0].run_id).name
    with refused("'0123'"):
        store.export(tmp_path / "x", run_ids=["0123"])
    with refused("'nrom'"):
        store.export(tmp_path / "x", study="nrom")


def test_thinned_curves_keep_every_metric(tmp_path):
    store = Store(tmp_path / "a")
    store.put(record := result(BASE, n=500))
    store.export(tmp_path / "thin.gz", points=20, digits=3)
    (other := Store(tmp_path / "b")).import_records(tmp_path / "thin.gz")
    thin = other.get(record.run_id)
    assert (
        thin.metrics == record.metrics
        and len(thin.curves["train_loss"]["step"]) == 20
        and thin.provenance["curves_thinned"] == dict(points=20, digits=3)
    )
    assert (
        store.import_records(tmp_path / "thin.gz")["equal"] == 1 and store.get(record.run_id) == record
    )  # the fuller one stays


def test_a_record_does_not_come_in_where_its_run_is_being_trained(tmp_path):
    """The trainer would replace it when it ends: the run here stands, and its record follows."""
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    a.put(theirs := result(BASE, 9.0))
    a.export(tmp_path / "x.gz")
    b.begin(BASE, "begun")
    with b.lock(BASE.run_id, wait=False):
        assert b.import_records(tmp_path / "x.gz") == dict(records=1, added=0, equal=0, kept=1, studies=0)
        assert b.get(theirs.run_id) is None
    assert b.import_records(tmp_path / "x.gz")["added"] == 1 and b.get(theirs.run_id) == theirs


def test_import_keeps_what_is_here(tmp_path):
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    fill(a, seeds=(0,))
    mine = result(BASE, 9.0)
    b.put(mine)
    b.record_study(study((3,)))
    a.export(tmp_path / "x.gz")
    assert b.import_records(tmp_path / "x.gz") == dict(records=2, added=1, equal=0, kept=1, studies=1)
    assert (
        b.get(mine.run_id) == mine
        and b.manifest("norm")[0].seeds == (3, 0)
        and len(b.manifest("norm")[1]) == 4
        and b.verify() == []
    )


def test_an_altered_export_is_refused_whole(tmp_path):
    store = Store(tmp_path / "a")
    fill(store)
    store.export(tmp_path / "plain")
    store.export(tmp_path / "packed.gz")
    plain, packed = (tmp_path / "plain").read_bytes(), (tmp_path / "packed.gz").read_bytes()
    head = plain.split(b"\n", 1)[0]
    cases = [
        b"",
        b"{}",
        b"[]\n",
        b"\x1f\x8b",
        packed[: len(packed) // 2],
        packed[:-3],
        plain[:-100],
        plain.replace(b'"test_bpb":2.0', b'"test_bpb":1.0'),
        head + b"\n",
        b"\x80" + plain,
        packed[:50] + b"xx" + packed[52:],
        gzip.compress(b"hello"),
    ]
    for data in cases:
        (tmp_path / "bad").write_bytes(data)
        with refused(str(tmp_path / "bad")):
            Store(tmp_path / "b").import_records(tmp_path / "bad")
        assert not (tmp_path / "b").exists()
    for path in (tmp_path / "none", tmp_path):
        with refused(str(path), "cannot be read"):
            Store(tmp_path / "b").import_records(path)


# --- readers never raise anything else ----------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: (
        st.lists(x, max_size=4)
        | st.dictionaries(st.sampled_from(["step", "value", "train", "name", "arms", "seed", "x"]), x, max_size=4)
    ),
    max_leaves=12,
)
RECORD = result(BASE)
GOOD = RECORD.to_dict()
MANIFEST = dict(format=1, study=study().to_dict(), rows=[["layernorm", "", 0, "0" * 12]])


def clean(value):
    """What JSON can hold."""
    return json.loads(json.dumps(value).replace("NaN", "null").replace("-Infinity", "null").replace("Infinity", "null"))


def read_all(text: str | bytes, folder: Path):
    """Every reader over one file as record, manifest and export; whatever is wrong must be the project's own error."""
    store = Store(folder)
    record, manifest, export = (
        folder / "experiments" / f"x_{RECORD.run_id}" / "result.json",
        folder / "studies" / "norm.json",
        folder / "export",
    )
    for file in (record, manifest, export):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    for read in (
        lambda: store.get(RECORD.run_id),
        lambda: store.frame(stale=True),
        lambda: store.curves(stale=True),
        lambda: store.manifest("norm"),
        lambda: store.import_records(export),
        store.verify,
    ):
        try:
            read()
        except KimiError as e:
            assert "\n" not in str(e)
    record.unlink()
    for read in (lambda: store.frame("norm", missing=True), store.rebuild, store.verify):
        try:
            read()
        except KimiError as e:
            assert "\n" not in str(e)


@pytest.fixture(scope="module")
def quick_disk():
    """In memory where the system has such a folder."""
    box = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield box
    shutil.rmtree(box)


@settings(max_examples=150, **QUIET)
@given(data=st.binary(max_size=60) | st.text(max_size=60) | JSON.map(json.dumps))
def test_readers_survive_anything(quick_disk, data):
    read_all(data, quick_disk / "fuzz")


@settings(max_examples=150, **QUIET)
@given(kind=st.sampled_from([GOOD, MANIFEST]), data=st.data())
def test_readers_survive_sealed_nonsense(quick_disk, kind, data):
    """A seal over anything: the shape is checked too."""
    fields = json.loads(json.dumps(kind))
    for _ in range(data.draw(st.integers(1, 2))):
        node = fields
        while True:
            key = (
                data.draw(st.sampled_from(sorted(node)))
                if isinstance(node, dict)
                else data.draw(st.integers(0, len(node) - 1))
            )
            if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
                break
            node = node[key]
        if data.draw(st.booleans()) and isinstance(node, dict):
            del node[key]
        else:
            node[key] = clean(data.draw(JSON))
        if not fields:
            break
    read_all(seal(fields), quick_disk / "sealed")


@settings(max_examples=150, **QUIET)
@given(
    at=st.floats(0, 1),
    byte=st.binary(min_size=1, max_size=3),
    drop=st.integers(0, 5),
    which=st.sampled_from([RECORD.to_json(), seal(MANIFEST)]),
)
def test_any_change_of_a_sealed_file_is_noticed(at, byte, drop, which):
    data = which.encode()
    i = int(at * (len(data) - 1))
    changed = data[:i] + byte + data[i + drop :]
    try:
        text = changed.decode()
        fields = unseal(text, "f")
    except (UnicodeDecodeError, RecordError):
        return
    assert fields == json.loads(which)  # only white space was touched
    assert unseal(text, "f", skip="curves") == {k: v for k, v in json.loads(which).items() if k != "curves"}


NAMES = st.text(min_size=1, max_size=6).filter(lambda name: name not in RESERVED)
NUMBER = st.none() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)


@settings(max_examples=200, **QUIET)
@given(
    metrics=st.dictionaries(NAMES, NUMBER, max_size=4),
    values=st.lists(NUMBER | st.lists(NUMBER, max_size=2), max_size=5),
    note=st.text(max_size=9),
)
def test_a_record_comes_back_as_it_was(metrics, values, note):
    record = Record.of(BASE, "done", metrics, {"x": dict(step=list(range(len(values))), value=values)}, {"note": note})
    again = Record.from_json(record.to_json())
    assert again == record and again.digest == record.digest and again.run == BASE
    assert unseal(record.to_json(), "f", skip="curves") == {
        k: v for k, v in json.loads(record.to_json()).items() if k != "curves"
    }


# --- everything in any order --------------------------------------------------------------------------------------

RUNS = [p.run for p in study((0, 1)).expand()]


class Operations(RuleBasedStateMachine):
    """Two stores against a dictionary each: what stands for a run, and everything that was ever accepted."""

    stores = st.integers(0, 1)
    runs = st.sampled_from(RUNS)
    records = st.builds(
        lambda run, value, status, old: result(
            run, value if status == "done" else None, status, value=value, **({"code_hash": OTHER_CODE} if old else {})
        ),
        runs,
        st.sampled_from([1.0, 2.0]),
        st.sampled_from(["done", "done", "diverged", "failed", "skipped: no GPU"]),
        st.booleans(),
    )

    @initialize()
    def begin_empty(self):
        self.box = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.store = [Store(self.box / "0"), Store(self.box / "1")]
        self.standing, self.accepted, self.seeds = [{}, {}], [set(), set()], [[], []]

    def teardown(self):
        if hasattr(self, "box"):
            shutil.rmtree(self.box)

    def accept(self, k, record):
        self.standing[k][record.run_id] = record
        self.accepted[k].add(record.digest)

    @staticmethod
    def makes_room(old, new):
        return (
            old is None
            or (old.stale and not new.stale)
            or (old.stale == new.stale and old.status not in ("done", "diverged"))
        )

    @rule(k=stores, record=records)
    def put(self, k, record):
        old = self.standing[k].get(record.run_id)
        if old == record:
            self.store[k].put(record)
        elif self.makes_room(old, record):
            self.store[k].put(record, "some name")
            self.accept(k, record)
        else:
            with refused("another result"):
                self.store[k].put(record)

    @rule(k=stores, run=runs)
    def begin(self, k, run):
        old = self.standing[k].get(run.run_id)
        folder = self.store[k].begin(run, "begun")
        assert json.loads((folder / "config.json").read_text()) == run.model_dump(mode="json")
        if old and (old.stale or old.status not in ("done", "diverged")):
            del self.standing[k][run.run_id]

    @rule(k=stores, run=runs, fresh=st.booleans())
    def get(self, k, run, fresh):
        want = self.standing[k].get(run.run_id)
        assert self.store[k].get(run.run_id, fresh=fresh) == (None if fresh and want and want.stale else want)

    @rule(k=stores, seeds=st.sets(st.integers(0, 2), min_size=1))
    def record_study(self, k, seeds):
        self.store[k].record_study(study(tuple(seeds)))
        self.seeds[k] += [s for s in seeds if s not in self.seeds[k]]

    @rule(k=stores, points=st.sampled_from([None, 2]))
    def send(self, k, points):
        there = 1 - k
        counts = self.store[k].export(self.box / "sent.gz", points=points)
        assert counts == dict(records=len(self.standing[k]), studies=bool(self.seeds[k]))
        done = self.store[there].import_records(self.box / "sent.gz")
        added = 0
        for run_id, whole in self.standing[k].items():
            record, old = whole.thin(points), self.standing[there].get(run_id)
            same = old and (old.status, old.metrics, old.provenance["code_hash"], old.provenance["value"]) == (
                record.status,
                record.metrics,
                record.provenance["code_hash"],
                record.provenance["value"],
            )
            if not same and self.makes_room(old, record):
                self.accept(there, record)
                added += 1
        assert done["added"] == added and done["added"] + done["equal"] + done["kept"] == len(self.standing[k])
        self.seeds[there] += [s for s in self.seeds[k] if s not in self.seeds[there]]

    @rule(k=stores)
    def rebuild(self, k):
        self.store[k].rebuild()
        log = json.loads((self.store[k].path / "experiments.json").read_text())
        assert {e["run_id"]: e["status"] for e in log} == {i: r.status for i, r in self.standing[k].items()}

    @rule(k=stores)
    def open_again(self, k):
        self.store[k] = Store(self.store[k].path)

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "store"):
            return
        for k, store in enumerate(self.store):
            assert store.verify() == []
            assert {r.run_id: r for r in store.records()} == self.standing[k]
            kept = {json.loads(f.read_text())["digest"] for f in store.path.glob("experiments/*/result.json")}
            assert kept == self.accepted[k]
            frame = store.frame(stale=True)
            assert sorted(frame["run_id"]) == sorted(
                r for f in store.path.glob("experiments/*/result.json") for r in [json.loads(f.read_text())["run_id"]]
            )
            if self.seeds[k]:
                table = store.frame("norm", stale=True, missing=True)
                assert list(dict.fromkeys(table["seed"])) == self.seeds[k] and len(table) == 2 * len(self.seeds[k])
                assert [s for i, s in zip(table["run_id"], table["status"], strict=True)] == [
                    self.standing[k][i].status if i in self.standing[k] else "missing" for i in table["run_id"]
                ]


Operations.TestCase.settings = settings(max_examples=20, stateful_step_count=12, **QUIET)
TestOperations = Operations.TestCase


# --- start-up -----------------------------------------------------------------------------------------------------


def test_the_code_hash_is_the_same_in_another_process():
    """A worker process must agree with its parent, or everything would be stale."""
    shown = subprocess.run(
        [sys.executable, "-c", "from kimi_nb.study import code_hash; print(code_hash())"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    from kimi_nb.study import hash_definitions, training_files

    assert shown == hash_definitions(training_files())


# --- what strangers send ------------------------------------------------------------------------------------------


def sent(path: Path, *lines: dict) -> Path:
    """A file of records as `export` would have written it, whatever the lines hold."""
    body = "".join(canonical(line) + "\n" for line in lines)
    head = dict(format="kimi_nb records 1", records=len(lines), studies=0, checksum=digest_of(body))
    path.write_text(json.dumps(head) + "\n" + body)
    return path


def record_line(**changes) -> dict:
    fields = {**RECORD.to_dict(), **changes}
    return dict(name="x", record={**fields, "digest": digest_of(fields)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(config={**RECORD.config, "seed": "<img src=x onerror=alert(1)>"}), ("config.seed", "not a number")),
        (dict(config={**RECORD.config, "train": {"lr": "<b>"}}), ("config.train.lr", "not a number")),
        (dict(provenance=dict(code_hash=[1])), ("provenance.code_hash", "type str")),
        (dict(provenance=dict(device={"a": 1}, git="x")), ("provenance.device", "type str")),
        (dict(provenance=dict(error=5)), ("provenance.error", "type str")),
    ],
)
def test_a_record_whose_values_are_of_other_kinds_is_refused(tmp_path, changes, words):
    """Text where a run has a number, or a list where a table expects text, never enters a store."""
    store = Store(tmp_path / "s")
    with refused("line 2", *words):
        store.import_records(sent(tmp_path / "records.jsonl", record_line(**changes)))
    assert not (tmp_path / "s").exists()


def test_a_study_that_no_file_can_be_named_for_is_refused_before_anything_is_written(tmp_path):
    definition = {**study().to_dict(), "name": "x" * 300}
    file = sent(tmp_path / "records.jsonl", record_line(), dict(study=definition, rows=[]))
    with refused("line 3", "300 characters", "at most"):
        Store(tmp_path / "s").import_records(file)
    assert not (tmp_path / "s").exists()


def test_what_unpacks_to_more_than_any_export_is_refused(tmp_path, monkeypatch):
    """A small file that unpacks to gigabytes is read up to a limit; one that is no export, to its first line."""
    import kimi_nb.study.store

    monkeypatch.setattr(kimi_nb.study.store, "LARGEST", 1 << 20)
    plain = sent(tmp_path / "records.jsonl", record_line()).read_bytes()
    for name, data, words in (
        ("bomb.gz", gzip.compress(plain + b" " * (2 << 20)), "more than 1 MB"),
        ("zeros.gz", gzip.compress(bytes(8 << 20)), "not a file of exported records"),
        ("long.jsonl", plain + b" " * (2 << 20), "more than 1 MB"),
    ):
        (tmp_path / name).write_bytes(data)
        with refused(name, words):
            Store(tmp_path / "s").import_records(tmp_path / name)
    assert not (tmp_path / "s").exists()


@pytest.mark.timeout(20)
def test_what_never_ends_is_no_file(tmp_path):
    """A pipe that nobody writes to, and a device: refused at once, whatever a shell puts in the place of a file."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/full")):
        with refused(str(place), "no ordinary file"):
            Store(tmp_path / "s").import_records(place)


def test_an_import_that_fails_has_changed_nothing(tmp_path, monkeypatch):
    """The disk is full when the last of three records is written: none is there, and nothing is left behind."""
    there, incoming = Store(tmp_path / "a"), Store(tmp_path / "b")
    fill(there)
    there.export(tmp_path / "records.jsonl")
    incoming.put(result(BASE.override(seed=9)))
    before, written = contents(tmp_path / "b"), []
    real = kimi_nb.study.folder.write_file

    def full(path, *more, **how):
        written.append(path)
        if len(written) > 8:
            raise FileError(f"{path} cannot be written (No space left on device)", OSError(errno.ENOSPC, "full"))
        return real(path, *more, **how)

    monkeypatch.setattr(kimi_nb.study.folder, "write_file", full)
    with refused("No space left"):
        incoming.import_records(tmp_path / "records.jsonl")
    monkeypatch.undo()
    assert contents(tmp_path / "b") == before and incoming.verify() == []
    assert incoming.import_records(tmp_path / "records.jsonl")["added"] == 6


def test_what_killed_writers_left_is_removed_by_the_next_start(tmp_path):
    """Half an import, a half-written record and study; a file that a living process is at stays."""
    store = Store(tmp_path)
    folder = store.put(result(BASE))
    store.record_study(study())
    half = tmp_path / ".import-999999999" / "x_0123456789ab"
    half.mkdir(parents=True)
    left = [half / "half", folder / ".result.json.999999999.tmp", tmp_path / "studies" / ".norm.json.999999999.tmp"]
    mine = tmp_path / f".paper.md.{os.getpid()}.tmp"
    for path in (*left, mine):
        path.write_text("half")
    assert Store(tmp_path).verify() == [] and all(path.exists() for path in left)  # looking changes nothing
    Store(tmp_path).rebuild()
    assert [path for path in (*left, half.parent, mine) if path.exists()] == [mine]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    """Beside the file that is written; what a living process writes there stays."""
    store = Store(tmp_path / "results")
    store.put(result(BASE))
    left, mine = (tmp_path / f".{name}.tmp" for name in ("all.jsonl.999999999", f"other.jsonl.{os.getpid()}"))
    for path in (left, mine):
        path.write_text("half")
    store.export(tmp_path / "all.jsonl")
    assert not left.exists() and mine.exists()


@pytest.mark.parametrize("folder", ["speed", "benchmarks"])
def test_measurements_beside_the_runs_are_verified(tmp_path, folder):
    """What was timed or scored is sealed as a record is; an edit, or a file without a seal, is named."""
    store = Store(tmp_path)
    store.put(result(BASE))
    write_sealed(tmp_path / folder / "a.json", dict(seconds=0.25, score=float("nan")))
    assert store.verify() == [] and read_sealed(tmp_path / folder / "a.json") == dict(seconds=0.25, score=None)
    file = tmp_path / folder / "a.json"
    file.write_text(file.read_text().replace("0.25", "0.20"))
    (tmp_path / folder / "b.json").write_text('{"seconds": 0.25}')
    changed, unsealed = store.verify()
    assert "a.json was changed" in changed and "b.json has no digest" in unsealed


# --- one owner of a run's folder -----------------------------------------------------------------------------------


def test_one_module_spells_the_names_of_a_runs_files():
    """`RunFolder` knows how the files of a run are called; models of transformers have a config.json of their own."""
    names = ("result.json", "metrics.jsonl", "training_log.txt", ".code_hash", "config.json")
    others = {"config.json": {"use/deepseek.py", "evals/harness.py"}}
    for name in names:
        spelled = set()
        for path in (REPO / "kimi_nb").rglob("*.py"):
            strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
            if any(isinstance(s, str) and re.search(rf"(^|/){re.escape(name)}$", s) for s in strings):
                spelled.add(path.relative_to(REPO / "kimi_nb").as_posix())
        assert spelled - others.get(name, set()) == {"study/folder.py"}, name


def test_a_run_has_one_lock(tmp_path):
    """Whoever trains in a folder of a store holds the lock that plans ask for, and a plan's lock keeps `fit` out."""
    store = Store(tmp_path)
    folder = RunFolder(store.begin(BASE, "x"))
    with folder.lock():
        with store.lock(BASE.run_id, wait=False) as held:
            assert not held
        assert store.run_folder(BASE.run_id).status() == "running" and not folder.busy()
        with RunFolder(folder, shares=folder).lock():
            pass
        with store.lock(BASE.run_id, wait=False) as held:
            assert not held  # leaving the inner one has not freed it
    with store.lock(BASE.run_id) as held, pytest.raises(RunBusy):
        assert held
        with folder.lock():
            pass
