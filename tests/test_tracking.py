"""What a tracker gets is what a run wrote down: with a stand-in, with the real trackio, with wandb in offline mode."""

import json
import math
import sqlite3
import sys
import types

import pytest
from test_nanokimi import NANOKIMI, ran
from tiny import tiny_run

from kimi_nb.cli import main
from kimi_nb.config import KimiError
from kimi_nb.runner import run_study
from kimi_nb.study import Arm, Finding, Outcome, RunFolder, Store, Study, write_outcome
from kimi_nb.train import Interrupted, fit
from kimi_nb.use import (
    Tracking,
    label_of,
    lines_sent,
    mirrored,
    send_apart,
    send_findings,
    send_store,
    track,
    tracked_line,
)

MOE = {"model__ffn__kind": "moe", "model__moe__n_experts": 3, "train__eval_every": 2, "train__steps": 5}


class StandIn:
    """A tracker that keeps what it gets: init's words, then (step, numbers)."""

    def __init__(self):
        self.pages, self.closed = [], 0

    def init(self, **words):
        self.pages.append((words, []))

    def log(self, numbers, step):
        self.pages[-1][1].append((step, numbers))

    def finish(self):
        self.closed += 1


@pytest.fixture
def tool(monkeypatch):
    stand_in = StandIn()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    return stand_in


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def expected(folder, run, record=None):
    """Every line of the journal, and the scores of the record."""
    lines = [(line["step"], tracked_line(line, run)) for line in lines_of(folder)]
    if record is not None:
        final = {f"final/{name}": value for name, value in record.metrics.items() if isinstance(value, (int, float))}
        lines.append((lines[-1][0], final | dict(status=record.status)))
    return lines


def study_of(tmp_path, **changes):
    arms = [Arm("layernorm"), Arm("rmsnorm", {"model.norm.kind": "rmsnorm"})]
    return Study(name="norms", base=tiny_run(train__steps=2, **changes), baseline="layernorm", seeds=(0, 1), arms=arms)


def test_train_sends_every_line_where_it_was_asked_for(tool, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text(NANOKIMI.replace("dataset: tinyworld", "corpus: tinyworld, num_documents: 60"))
    ran("train", "--config", tmp_path / "c.yaml", "--max-steps", 3, "--out", tmp_path / "a", "--quiet")
    (words, got), folder = tool.pages[0], RunFolder(tmp_path / "a")
    assert (words["project"], words["name"]) == ("my-nanokimi-experiments", "experiment-1")
    assert got == expected(folder.path, folder.read_config(), folder.read_result()) and tool.closed == 1
    assert {"train_loss", "train_ppl", "tokens_per_second", "memory_mb", "lr", "grad_norm"} <= set(got[0][1])
    ran("train", "--config", tmp_path / "c.yaml", "--max-steps", 3, "--out", tmp_path / "b", "--quiet", "--no-wandb")
    ran("train", "--config", tmp_path / "c.yaml", "--max-steps", 3, "--out", tmp_path / "a", "--quiet")
    assert len(tool.pages) == 1  # not asked for, and there already
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--max-steps", "3", "--out", str(tmp_path / "d")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == "kimi-nb: error: tracker 'wandb' is not installed: pip install 'kimi_nb[track]'"


def test_a_tracker_that_cannot_start_is_refused_in_one_line(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured\n(no-tty). call wandb.login(key=...)")

    for tool, remedy in (("wandb", "run wandb login, or use --no-track"), ("trackio", "use --no-track")):
        monkeypatch.setitem(sys.modules, tool, types.SimpleNamespace(init=init, finish=None))
        with pytest.raises(KimiError) as e:
            track(tiny_run(), Tracking(tool=tool), RunFolder(tmp_path))
        why = "api_key not configured (no-tty). call wandb.login(key=...)"
        assert str(e.value) == f"{tool} cannot start ({why}): {remedy}"


def test_a_tracker_that_breaks_costs_the_run_nothing(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(StandIn, "log", lambda *a, **k: 1 / 0)
    run = tiny_run(train__steps=3)
    with track(run, Tracking(tool="trackio"), RunFolder(tmp_path)) as page:
        record = fit(run, tmp_path, progress=False, on_step=page)
        page.finish(record)
    assert record.ok and capsys.readouterr().err == "kimi-nb: no more is sent to trackio: division by zero\n"


def test_a_run_that_goes_on_sends_no_line_twice(tool, tmp_path):
    """Stopped after step 3 of 5: the second process adds what the first had not, in the same page."""
    run, folder, seen = tiny_run(**MOE, train__save_every=1), RunFolder(tmp_path), []

    def stop(step, line):
        page.page.send()
        if step == 3:
            raise Interrupted("enough")

    with pytest.raises(Interrupted), track(run, Tracking(tool="trackio"), folder) as page:
        fit(run, folder, progress=False, on_step=stop)
    assert lines_sent(Tracking(tool="trackio"), folder, label_of(run, Tracking())) == 4  # three steps, one evaluation
    with track(run, Tracking(tool="trackio"), folder) as page:
        record = fit(run, folder, progress=False, on_step=page)
        page.finish(record)
    (one, first), (two, second) = tool.pages
    assert one["name"] == two["name"] and two["resume"] == "allow"
    steps = [(step, set(numbers)) for step, numbers in first + second]
    assert steps == [(step, set(numbers)) for step, numbers in expected(tmp_path, run, record)] and not seen


def test_a_store_is_sent_once_grouped_by_arm_and_seed(tool, tmp_path, capsys):
    store, study = Store(tmp_path), study_of(tmp_path)
    run_study(study, store, executor="inprocess", progress=False)
    asked = Tracking(tool="trackio", project="mine", tags=("first",))
    assert (send_store(store, asked), send_store(store, asked)) == (4, 0)
    pages = {words["name"]: (words, got) for words, got in tool.pages}
    assert {words["group"] for words, _ in pages.values()} == {"norms/layernorm", "norms/rmsnorm"}
    for folder in store.run_folders():
        record, run = folder.read_result(), folder.read_config()
        arm = run.model.norm.kind
        words, got = pages[f"norms/{arm} seed {run.seed} {record.run_id[:6]}"]
        assert words["config"]["tags"] == ["first", "norms", arm, f"seed {run.seed}"]
        assert (words["config"]["study"], words["config"]["train.steps"]) == ("norms", 2)
        assert got == expected(folder.path, run, record)
    assert main(["records", "track", "--results", str(tmp_path), "--track", "wandb"]) == 0
    assert "4 runs and the findings of 0 phases sent to wandb project kimi_nb" in capsys.readouterr().out
    assert main(["records", "track", "--results", str(tmp_path)]) == 2
    assert main(["run", "norm", "--track-project", "x"]) == 2
    assert "--track-project needs --track trackio or wandb" in capsys.readouterr().err


def test_what_was_found_is_a_page_too(tool, tmp_path):
    numbers = dict(diff=-0.01, ci_low=-0.03, ci_high=0.01, p_adj=0.3, alpha=0.05, n=3)
    finding = Finding(id="H2", claim="RMSNorm is faster", word="undecided", metric="test_bpb", **numbers)
    outcome = Outcome(phase="norm", profile="quick", findings=(finding,), finished="2026-01-01T00:00:00+00:00")
    write_outcome(Store(tmp_path), outcome)
    assert send_findings(Store(tmp_path), Tracking(tool="trackio")) == 1
    ((words, got),) = tool.pages
    assert words["config"]["H2.word"] == "undecided" and words["config"]["H2.claim"] == "RMSNorm is faster"
    assert got == [(1, {"H2/diff": -0.01, "H2/ci_low": -0.03, "H2/ci_high": 0.01, "H2/p_adj": 0.3, "findings": 1})]


# --- the real ones -----------------------------------------------------------------------------------------------


def same_numbers(got, wanted):
    """JSON has no other numbers than these: equal to the bit, text and counts too."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == value or math.isclose(got[name], value, rel_tol=1e-12), name


@pytest.mark.slow
def test_trackios_store_holds_the_journal_line_by_line(tmp_path):
    """A plan's study in worker processes, sent while it trains by a process of its own."""
    pytest.importorskip("trackio", reason="trackio is not installed: pip install 'kimi_nb[track]'")
    store, study = Store(tmp_path / "results"), study_of(tmp_path, **{k: v for k, v in MOE.items() if "steps" not in k})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        with mirrored(store, Tracking(tool="trackio", project="mine"), every=1.0):
            run_study(study, store, workers=1, progress=False)
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = dict(base.execute("select run_name, config from configs").fetchall())
    for folder in store.run_folders():
        run, record = folder.read_config(), folder.read_result()
        name = f"norms/{run.model.norm.kind} seed {run.seed} {record.run_id[:6]}"
        got = [(step, json.loads(numbers)) for page, step, numbers in rows if page == name]
        wanted = expected(folder.path, run, record)
        assert [step for step, _ in got] == [step for step, _ in wanted]
        for (_, numbers), (_, line) in zip(got, wanted, strict=True):
            same_numbers(numbers, line)
        config = json.loads(configs[name])
        assert {k: config[k] for k in ("study", "arm", "seed")} == dict(
            study="norms", arm=run.model.norm.kind, seed=run.seed
        )
        assert config["_Group"] == f"norms/{run.model.norm.kind}"


def wandb_records(data):
    """Messages of a .wandb file: a LevelDB log of blocks of 32 KiB, whose pieces have a header of 7 bytes."""
    at, whole = 7, b""  # the file's own header is as long
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last piece
            yield whole
            whole = b""


def wandb_history(folder):
    """(step, numbers) of an offline run's file: what one step got in several calls is one row."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.rglob("*.wandb")
    rows, started = [], None
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            started = record.run
        if record.WhichOneof("record_type") == "history":
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            step = items.pop("_step", record.history.step.num)
            rows.append((step, {k: v for k, v in items.items() if not k.startswith("_")}))
    return started, rows


@pytest.mark.slow
def test_wandbs_offline_file_holds_the_journal(tmp_path, monkeypatch):
    """From the command line; wandb makes one row of what belongs to one step."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'kimi_nb[track]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    tiny_run(**MOE).save(tmp_path / "run.yaml")
    words = [
        "--track",
        "wandb",
        "--track-project",
        "mine",
        "--track-group",
        "g",
        "--track-tags",
        "a, b",
        "--track-name",
        "n",
    ]
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--quiet", *words]
    ran(*command)
    started, rows = wandb_history(tmp_path / "wandb")
    assert (started.project, started.run_group, started.display_name) == ("mine", "g", "n")
    assert {"a", "b", "seed 0"} <= set(started.tags)
    folder, wanted = RunFolder(tmp_path / "run"), {}
    for step, line in expected(folder.path, folder.read_config(), folder.read_result()):
        wanted.setdefault(step, {}).update(line)
    assert [step for step, _ in rows] == list(wanted)
    for step, numbers in rows:
        same_numbers(numbers, wanted[step])


def test_the_workbench_sends_what_has_finished(tool, tmp_path, monkeypatch):
    """Chosen in the list, and after each run that ends; a library that is missing is told in the page."""
    from kimi_nb.lab import Workbench, workbench

    sent = []
    monkeypatch.setattr(workbench, "send_apart", lambda store, tracking: sent.append((store.path, tracking)))
    bench = Workbench(Store(tmp_path), profile="smoke", tracking=Tracking(tags=("mine",)))
    bench._finished("0" * 12, "done")
    assert sent == []
    bench._project.value, bench._tool.value = "lab", "trackio"
    bench._finished("0" * 12, "done")
    asked = Tracking(tool="trackio", project="lab", tags=("mine",))
    assert sent == [(Store(tmp_path).path, asked)] * 2
    monkeypatch.setattr(workbench, "send_apart", send_apart)
    monkeypatch.setitem(sys.modules, "wandb", None)
    bench._tool.value = "wandb"
    assert "is not installed" in bench._said.value
