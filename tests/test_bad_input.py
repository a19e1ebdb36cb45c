"""Bad input is refused in one line that names the file or field and the remedy; what was there stays as it was."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import RUN, Workplace, in_process, settings_text, write_notebook

import kimi_nb.plan.run
from kimi_nb.cli import main
from kimi_nb.study import Store

BINARY = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "bad-input-cache"))
    monkeypatch.setenv("KIMI_NB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(kimi_nb.plan.run, "_execute", in_process)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout with two phases of tiny runs."""
    made = Workplace(tmp_path, train__steps=3, train__save_every=0, train__eval_every=0)
    for k, v in made.environment().items():
        monkeypatch.setenv(k, v)
    return made


def options(**changes):
    return [f"--{k}={v}" for k, v in (RUN | {k.replace("__", "."): v for k, v in changes.items()}).items()]


def contents(folder):
    """Every file of a folder, locks left out."""
    return {
        p: p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and ".lock" not in p.name and ".locks" not in p.parts
    }


def call(capsys, *argv):
    capsys.readouterr()
    try:
        code = main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    shown = capsys.readouterr()
    return code, shown.out, [line for line in shown.err.splitlines() if line.strip()]


def refused(capsys, argv, *words, untouched=None, code=2):
    """One line with these words, a non-zero end, no file changed."""
    before = contents(untouched) if untouched else None
    got, _, err = call(capsys, *argv)
    assert len(err) == 1 and err[0].startswith("kimi-nb"), err
    assert got == code and ": error: " in err[0]
    for word in words:
        assert str(word) in err[0], err[0]
    if untouched:
        assert contents(untouched) == before
    return err[0]


TEXTS = {
    "unknown": (None, "pydcos", ("pydcos",)),
    "empty": (b"", "t.txt", ("t.txt",)),
    "only white space": (b" \n\n ", "t.txt", ("t.txt",)),
    "binary": (BINARY, "t.txt", ("t.txt",)),
    "short": (b"too short for a context", "t.txt", ("t.txt", "tokens", "seq_len")),
    "no JSON": (b'{"text": "a"}\n{"text"', "t.jsonl", ("t.jsonl",)),
    "JSON without text": (b'{"title": "a"}\n', "t.jsonl", ("t.jsonl", "text")),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_corpus_that_cannot_be_used(tmp_path, capsys, case):
    """A corpus that is unknown, empty, binary, malformed or shorter than a context."""
    content, name, words = TEXTS[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
        name = tmp_path / name
    line = refused(
        capsys,
        ["train", "--quiet", *options(data__corpus=name, data__num_documents="none")],
        *words,
        untouched=tmp_path,
    )
    assert not (tmp_path / "results" / "experiments").exists(), line


@pytest.mark.parametrize("case", ["unknown", "short"])
def test_a_plan_over_a_corpus_that_cannot_be_used(place, capsys, tmp_path, case):
    """The same for a plan: refused before any run has a folder."""
    content, name, words = TEXTS[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
        name = tmp_path / name
    (place.path / "settings.ini").write_text(settings_text(data__corpus=name, data__num_documents="none"))
    refused(capsys, ["plan", "--profile", "tiny", "--quiet", "--executor", "inprocess"], *words)
    assert not (place.results / "experiments").exists()


SETTINGS = {
    "no section": ("model.d_model = 3\n", ("settings.ini",)),
    "no value": ("[tiny]\nmodel.d_model\n", ("settings.ini",)),
    "a line twice": ("[tiny]\nseeds = 1\nseeds = 2\n", ("settings.ini", "seeds")),
    "a section twice": ("[tiny]\nseeds = 1\n[tiny]\n", ("settings.ini", "tiny")),
    "unknown name": (
        "[tiny]\nbudget_minutes = 1\nmodel.d_modl = 3\n",
        ("settings.ini", "[tiny]", "model.d_modl", "model.d_model"),
    ),
    "unknown value": (
        "[tiny]\nbudget_minutes = 1\nmodel.norm.kind = batchnorm\n",
        ("settings.ini", "[tiny]", "model.norm.kind", "layernorm"),
    ),
    "out of range": ("[tiny]\nbudget_minutes = 1\ntrain.lr = -1\n", ("settings.ini", "[tiny]", "train.lr", "above 0")),
    "grid out of range": (
        "[tiny]\nbudget_minutes = 1\nnorm.train.lr = 1e-3, -1\n",
        ("settings.ini", "[tiny]", "norm.train.lr", "-1"),
    ),
    "missing": ("[tiny]\nseeds = 1\n", ("settings.ini", "[tiny]", "budget_minutes")),
    "not text": (BINARY, ("settings.ini", "UTF-8")),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_used(place, capsys, case):
    """A settings.ini that is broken: the line names the file, the section and the field."""
    text, words = SETTINGS[case]
    (place.path / "settings.ini").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(capsys, ["plan", "--profile", "tiny"], *words, untouched=place.path)


@pytest.mark.parametrize("argv, words", [
    (["plan", "--profile", "quik"], ["profile", "'quik'", "tiny"]),
    (["plan", "--profile", "tiny", "--only", "bseline"], ["phase", "'bseline'", "baseline"]),
    (["plan", "--profile", "tiny", "--executor", "rya"], ["executor", "'rya'", "process"]),
    (["plan", "--profile", "tiny", "--workers", "0"], ["workers", "0", "at least 1"]),
    (["plan", "--profile", "tiny", "--seeds", "0"], ["seeds"]),
    (["plan", "--profile", "tiny", "--seeds", "many"], ["--seeds", "many"]),
    (["run", "nrom", "--profile", "tiny"], ["study", "'nrom'", "norm"]),
    (["train", "--preset", "nanogtp"], ["preset", "nanogtp", "nanogpt"]),
    (["train", "--train.lr", "fast"], ["train.lr", "fast"]),
    (["train", "--device", "tpu"], ["device", "tpu"]),
    (["train", "--threads", "0"], ["threads"]),
    (["eval", "--checkpoint", "nowhere"], ["nowhere", "no checkpoint"]),
    (["records", "show", "abc"], ["abc", "records list"]),
    (["records", "import", "nowhere.jsonl"], ["nowhere.jsonl"]),
    (["records", "export"], ["file"]),
    (["records", "list", "--study", "nrom"], ["nrom"]),
    (["plna"], ["plna", "plan"]),
])  # fmt: skip
def test_arguments_that_cannot_be(place, capsys, argv, words):
    """Arguments that name nothing, or are out of range."""
    refused(capsys, argv, *words, untouched=place.path)


def test_nothing_is_told_of_a_run_that_cannot_begin(place, capsys, monkeypatch):
    """A long run says its cost before it begins; one on a device that is not there is refused first."""
    monkeypatch.setattr("kimi_nb.lab.estimate_seconds", lambda *_, **__: (500.0, "guessed"))
    refused(capsys, ["train", "--device", "tpu"], "device", "tpu", untouched=place.path)


def test_no_settings_file(place, capsys, monkeypatch):
    """$KIMI_NB_SETTINGS that leads nowhere."""
    monkeypatch.setenv("KIMI_NB_SETTINGS", str(place.path / "other.ini"))
    refused(capsys, ["plan", "--profile", "tiny"], "other.ini", "is no file")


CONFIGS = {
    "not YAML": ("c.yaml", b"train: [1, 2\n", ("c.yaml", "YAML")),
    "not JSON": ("c.json", b'{"train": ', ("c.json", "JSON")),
    "no settings": ("c.yaml", b"- 1\n- 2\n", ("c.yaml", "settings")),
    "empty": ("c.yaml", b"", ("c.yaml", "settings")),
    "not text": ("c.yaml", BINARY, ("c.yaml",)),
    "unknown name": ("c.yaml", b"train:\n  lrr: 1\n", ("c.yaml", "train.lrr", "lr")),
    "wrong type": ("c.yaml", b"train:\n  steps: many\n", ("c.yaml", "train.steps", "'many'")),
    "wrong tree": ("c.yaml", b"train: 3\n", ("c.yaml", "train")),
    "missing": ("d.yaml", None, ("d.yaml", "cannot be read")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_cannot_be_used(tmp_path, capsys, case):
    """A --config file that is missing, malformed or wrong."""
    name, content, words = CONFIGS[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(capsys, ["train", "--config", tmp_path / name], *words, untouched=tmp_path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after 8 of 12 steps."""
    from tiny import tiny_run

    from kimi_nb.train import fit

    os.environ["KIMI_NB_CACHE"] = str(tmp_path_factory.getbasetemp() / "bad-input-cache")
    folder = tmp_path_factory.mktemp("stopped") / "run"

    def stop(step, line):
        if step == 8:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fit(tiny_run(train__save_every=4), folder, progress=False, on_step=lambda s, line: stop(s - 1, line))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000008"]
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def alter(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut, alter, remove])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "tokenizer/*.json"]
)
def test_a_damaged_checkpoint_is_not_trained_on(stopped, tmp_path, capsys, file, damage):
    """A checkpoint with a file cut short, altered or missing."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (found, *_) = (folder / "checkpoints" / "step_00000008").glob(file)
    damage(found)
    line = refused(
        capsys,
        ["train", "--quiet", "--out", folder, *options(train__save_every=4)],
        found.name if damage is not remove or file != "state.json" else "state.json",
        untouched=folder,
    )
    assert "delete" in line
    refused(
        capsys,
        ["eval", "--checkpoint", folder],
        "state.json" if file == "state.json" and damage is not remove else "",
        untouched=folder,
    )


def test_a_log_that_was_altered(stopped, tmp_path, capsys):
    """A metrics.jsonl that lacks a step the checkpoint has seen."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    refused(
        capsys,
        ["train", "--quiet", "--out", folder, *options(train__save_every=4)],
        folder / "metrics.jsonl",
        "altered or cut short: its lines are not those that the checkpoint knows",
        f"restore it, or delete {folder / 'checkpoints'}",
        untouched=folder,
    )


def test_the_undamaged_run_goes_on(stopped, tmp_path, capsys):
    """The same folder without damage is trained to its end."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    code, out, err = call(capsys, "train", "--quiet", "--out", folder, *options(train__save_every=4))
    assert (code, err) == (0, []) and "done" in out
    assert "goes on after step 8" in (folder / "training_log.txt").read_text()


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A workplace whose plan has run."""
    from kimi_nb.config import load_profile
    from kimi_nb.plan import run_plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "bad-input-cache"))
        made = Workplace(tmp_path_factory.mktemp("planned"), train__steps=3, train__save_every=0, train__eval_every=0)
        for k, v in made.environment().items():
            patch.setenv(k, v)
        patch.setattr(kimi_nb.plan.run, "_execute", in_process)
        assert run_plan(
            load_profile("tiny"), Store(made.results), executor="inprocess", progress=False, say=lambda line: None
        ).ok
    return made


@pytest.fixture
def done(planned, tmp_path, monkeypatch):
    """A copy of it to damage."""
    copy = Workplace(tmp_path / "copy", train__steps=3, train__save_every=0, train__eval_every=0)
    shutil.rmtree(copy.path)
    shutil.copytree(planned.path, copy.path)
    for k, v in copy.environment().items():
        monkeypatch.setenv(k, v)
    return copy


PLAN = ["plan", "--profile", "tiny", "--quiet", "--executor", "inprocess"]


@pytest.mark.parametrize(
    "argv", [PLAN, ["records", "list"], ["records", "export", "out.jsonl"], ["plan", "--profile", "tiny", "--dry-run"]]
)
@pytest.mark.parametrize("damage", [cut, alter])
def test_a_record_edited_by_hand(done, capsys, argv, damage, monkeypatch):
    """A result.json that was edited or cut short: no command takes its numbers."""
    monkeypatch.chdir(done.path)
    file = sorted(done.results.glob("experiments/*/result.json"))[0]
    damage(file)
    refused(capsys, argv, file.parent.name, "result.json", untouched=done.path)
    code, out, _ = call(capsys, "records", "verify")
    assert code == 1 and str(file) in out


def test_a_study_file_edited_by_hand(done, capsys):
    """A study's file that was edited."""
    alter(done.results / "studies" / "norm.json")
    refused(capsys, PLAN, "norm.json", untouched=done.path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"phase": "norm"}',
        '{"phase": "norm", "profile": 3, "verdicts": [1], "figures": {}, "finished": "x"}',
    ],
)
def test_a_damaged_outcome_is_made_again(done, capsys, text):
    """phases/PROFILE/*.json is made by the notebook: damaged, it is made again."""
    (done.results / "phases" / "tiny" / "norm.json").write_text(text)
    code, out, err = call(capsys, *PLAN)
    assert (code, err) == (0, []) and "phase norm:" in out and "phase baseline:" not in out and ", 0 to train" in out


def test_a_token_cache_cut_short_is_made_again(tmp_path, capsys, monkeypatch):
    """A token cache that was cut short is noticed, said and made again; the result is the same."""
    from kimi_nb.data import DataWarning

    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    argv = ["train", "--quiet", *options(train__steps=2)]
    assert call(capsys, *argv, "--out", tmp_path / "a")[0] == 0
    (tokens,) = (tmp_path / "cache").rglob("train.bin")
    cut(tokens)
    with pytest.warns(DataWarning, match="train.bin"):
        assert call(capsys, *argv, "--out", tmp_path / "b")[0] == 0
    one, two = ((tmp_path / n / "checkpoints" / "final" / "model.safetensors").read_bytes() for n in "ab")
    assert one == two


@pytest.mark.parametrize("where", ["file", "file/below"])
@pytest.mark.parametrize(
    "argv", [["train", "--quiet", *options()], PLAN, ["train", "--quiet", "--out", "{}", *options()]]
)
def test_a_results_folder_that_is_a_file(place, tmp_path, capsys, where, argv):
    """A results path that is a file, or below one."""
    (tmp_path / "file").write_text("mine")
    argv = [a.format(tmp_path / where) for a in argv] + ([] if "--out" in argv else ["--results", tmp_path / where])
    refused(capsys, argv, tmp_path / "file", untouched=tmp_path)


def mounted(folder, options):
    folder.mkdir(exist_ok=True)
    return (
        shutil.which("mount")
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
        == 0
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    if not mounted(tmp_path / "disk", "size=200k"):
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize("command", ["train", "plan", pytest.param("plan with workers", marks=pytest.mark.slow)])
def test_a_full_disk(place, small_disk, capsys, command):
    """A results folder on a disk that is full: one line, and what was stored before is whole."""
    (small_disk / "ballast").write_bytes(b"x" * 150_000)
    argv = dict(train=["train", "--quiet", *options()], plan=PLAN)[command.split()[0]]
    if "workers" in command:
        argv = ["plan", "--profile", "tiny", "--quiet", "--workers", "2"]
    refused(capsys, [*argv, "--results", small_disk / "results"], small_disk, "No space left", "free")
    assert Store(small_disk / "results").verify() == []
    (small_disk / "ballast").unlink()


@pytest.mark.parametrize(
    "n",
    [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 7)), 11, pytest.param(16, marks=pytest.mark.slow)],
)
def test_a_disk_that_fails_at_any_moment(tmp_path, capsys, monkeypatch, n):
    """The disk refuses the n-th write forced to it: one line; the command then ends with an unbroken run's bits."""
    argv = ["train", "--quiet", "--out", tmp_path / "run", *options(train__save_every=4)]
    calls, real = [], os.fsync

    def fsync(fd):
        calls.append(fd)
        if len(calls) > n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        refused(capsys, argv, "No space left", "again", tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    assert call(capsys, *argv)[0] == 0
    assert call(capsys, *argv[:3], tmp_path / "other", *argv[4:])[0] == 0
    one, two = ((tmp_path / n / "checkpoints" / "final" / "model.safetensors").read_bytes() for n in ("run", "other"))
    assert one == two


@pytest.fixture
def read_only(planned, tmp_path):
    """A results folder that cannot be written, also by root."""
    disk = tmp_path / "disk"
    if not mounted(disk, "size=20m"):
        pytest.skip("needs the right to mount a tmpfs")
    shutil.copytree(planned.results, disk / "results")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield disk / "results"
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_read_only_results_folder(place, read_only, capsys):
    """A read-only results folder is read as ever, and refused for writing in one line."""
    code, out, err = call(capsys, "records", "list", "--results", read_only)
    assert code == 0 and not err and out.count("\n") > 5
    for argv in (
        ["train", "--quiet", *options(seed=77)],
        [*PLAN, "--seeds", "3"],
        ["train", "--quiet", "--out", read_only / "x", *options()],
    ):
        refused(capsys, [*argv, *([] if "--out" in argv else ["--results", read_only])], read_only, "Read-only", "writ")


def test_a_notebook_that_fails_half_way(place, capsys):
    """A phase notebook fails: the others are executed and reported, the executed copy is kept, the end is non-zero."""
    place.phase("baseline", then="1 / 0")
    code, out, err = call(capsys, *PLAN)
    assert (
        code == 1
        and len(err) == 1
        and "phase baseline" in err[0]
        and "ZeroDivisionError" in err[0]
        and "01_baseline.ipynb" in err[0]
    )
    assert "phase norm: 1 verdicts" in out and "RQ0" in out and "baseline: FAILED" in out
    assert (place.results / "notebooks" / "01_baseline.ipynb").exists() and not (
        place.results / "phases" / "tiny" / "baseline.json"
    ).exists()
    place.phase("baseline")
    code, out, err = call(capsys, *PLAN)
    assert code == 0 and not err and ", 0 to train" in out and "phase norm:" not in out


NOTEBOOKS = {
    "no parameters cell": (dict(tags=()), ("0 cells tagged parameters",)),
    "a missing parameter": (dict(cells=["profile = 'tiny'", "pass"]), ("no parameter 'results'",)),
    "another profile": (dict(then="profile = 'smoke'", cells=None), ("recorded",)),
    "no outcome": (dict(cells=["profile = ''\nresults = ''\nseeds = 0", "pass"]), ("recorded no outcome",)),
}


@pytest.mark.parametrize("case", ["no parameters cell", "a missing parameter"])
def test_a_notebook_without_its_parameters(place, capsys, case):
    """A phase notebook whose parameters cell is missing or incomplete is refused before anything is trained."""
    change, words = NOTEBOOKS[case]
    path = place.phase("norm", **change)
    refused(capsys, PLAN, path, *words)
    assert not (place.results / "experiments").exists()


def test_a_notebook_that_leaves_no_outcome(place, capsys):
    """A phase notebook that records no verdicts is a failed phase, not an empty one."""
    place.phase("norm", cells=NOTEBOOKS["no outcome"][0]["cells"])
    code, _, err = call(capsys, *PLAN)
    assert code == 1 and len(err) == 1 and "phase norm" in err[0] and "recorded no outcome" in err[0]


def test_a_notebook_that_ran_with_another_profile(place, capsys):
    """A phase notebook that used another profile than it was given is a failed phase."""
    text = settings_text(train__steps=3)
    (place.path / "settings.ini").write_text(text + text.replace("[tiny]", "[other]"))
    place.phase("norm", then="profile = 'other'")
    code, _, err = call(capsys, *PLAN)
    assert code == 1 and len(err) == 1 and "asked for profile tiny" in err[0] and "other" in err[0]


def test_a_file_that_is_no_notebook(place, capsys):
    """A phase notebook that is not one."""
    path = place.path / "nbs" / "phases" / "03_norm.ipynb"
    path.write_text("{")
    refused(capsys, PLAN, path, "no notebook")


@pytest.mark.slow
def test_a_failing_kernel_is_reported_in_a_line(place, monkeypatch):
    """With papermill and a real kernel: the terminal shows the plan's own lines, and one for the cell that failed."""
    place.phase("baseline", then="import os\nraise ValueError('two\\nlines')")
    place.phase("norm", then="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    r = subprocess.run([sys.executable, "-c", code, *PLAN], capture_output=True, text=True, timeout=300, check=False)
    lines = r.stderr.splitlines()
    assert r.returncode == 1 and len(lines) == 2 and "Traceback" not in r.stderr, r.stderr
    assert any("phase baseline" in line and "ValueError: two lines" in line for line in lines) and any(
        "phase norm" in line for line in lines
    )
    assert json.loads((place.results / "notebooks" / "01_baseline.ipynb").read_text())["cells"]


def test_write_notebook_is_valid(tmp_path):
    """The notebooks of these tests are what the plan expects."""
    kimi_nb.plan.run.check_parameters(write_notebook(tmp_path / "n.ipynb", ["profile = 1"]), dict(profile=1))
