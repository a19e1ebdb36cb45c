"""The command line itself: what no command is about, and all share."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest

import kimi_nb.cli.machine
from kimi_nb.cli import lab_command, main, print_pieces
from kimi_nb.config import RunConfig
from kimi_nb.lab import settings_of, typed_value
from kimi_nb.study import Record, Store


def command_line(*argv: str, **how) -> subprocess.CompletedProcess:
    """`kimi-nb` in a process of its own."""
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, **how)


def test_a_fault_is_one_line_and_its_traceback_a_file(tmp_path, monkeypatch, capsys):
    """Whatever a library raises; a person can send the file."""

    def broken(name):
        raise RuntimeError("a library's\nwords")

    monkeypatch.setattr(kimi_nb.cli.machine, "find_spec", broken)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert main(["lab"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("kimi-nb: error: RuntimeError: a library's words (")
    (log,) = tmp_path.glob("kimi-nb-*.log")
    assert str(log) in line and "def broken" in log.read_text() or "in broken" in log.read_text()


def test_an_error_is_a_line_that_a_person_reads(tmp_path, capsys):
    """A name of thousands of letters loses its middle, a list of all settings its end."""
    file = tmp_path / "run.yaml"
    file.write_text(f"{'x' * 5000}: 1\n")
    for argv in (["train", "--config", file], ["plan", "--dry-run", "--set", f"{'y ' * 3000}=1"]):
        assert main([str(word) for word in argv]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and len(line) < 1300


def test_an_unknown_study_is_refused_before_anything_is_tuned(tmp_path, capsys):
    assert main(["--results", str(tmp_path / "results"), "run", "nrom", "--profile", "quick"]) == 2
    assert "study 'nrom' is unknown: did you mean norm" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_study_tells_its_cost_and_can_be_declined(tmp_path, monkeypatch, capsys):
    """As a plan and a single run do, before anything is tuned."""
    terminal = SimpleNamespace(isatty=lambda: True, readline=lambda: "n\n")
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    monkeypatch.setattr("kimi_nb.runner.pool._train_all", lambda *_, **__: pytest.fail("something is trained"))
    assert main(["--results", str(tmp_path / "results"), "run", "norm", "--profile", "paper"]) == 2
    told = capsys.readouterr().err
    assert "36 runs to train" in told and "not begun: --yes begins without a question" in told


def test_a_terminal_that_cannot_write_a_character_gets_an_escape(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("naïve café — “quoted” 漢字\n" * 200, encoding="utf-8")
    how = dict(env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    done = command_line("data", "--data.corpus", str(text), "--data.tokenizer", "byte", **how)
    assert done.returncode == 0 and "\\u2014" in done.stdout and "Traceback" not in done.stderr


def test_a_closed_pipe_ends_without_a_word():
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    shell = f'"{sys.executable}" -u -c "{code}" --help | head -n 1'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: kimi-nb") and done.stderr == ""


def test_an_output_that_is_closed_or_full_is_no_fault_of_the_program(tmp_path):
    """A scheduler that closes streams, and a disk with no room left, which is one line."""
    command = f'"{sys.executable}" -c "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"'
    listed = f"{command} records list --results {shlex.quote(str(tmp_path))}"
    done = subprocess.run(["bash", "-c", f"{listed} <&- >&-"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(["bash", "-c", f"{listed} >/dev/full"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "No space left on device: make room" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_a_model_writes_does_not_steer_a_terminal(monkeypatch, capsys):
    """Bytes of its vocabulary are escape sequences too; a file gets them as they are."""
    print_pieces(["a\x1b[2Jb", "\n"])
    assert capsys.readouterr().out == "a\x1b[2Jb\n\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_pieces(["a\x1b[2Jb", "\n"])
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\n"


def test_a_module_beside_the_notebooks_is_none_of_the_lab(tmp_path):
    """A file random.py in the working folder would otherwise end JupyterLab at its start."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    args = SimpleNamespace(app=False, no_browser=True, port=None, more=["--version"])
    command = lab_command(tmp_path / "workbench.ipynb", args)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_the_app_needs_no_voila(tmp_path, monkeypatch):
    """With Voilà the workbench alone, without it JupyterLab with one document and nothing around it."""
    args, notebook = SimpleNamespace(app=True, no_browser=True, port=8899, more=[]), tmp_path / "workbench.ipynb"
    for there, expected in ((True, "voila"), (False, "jupyterlab")):
        monkeypatch.setattr(kimi_nb.cli.machine, "find_spec", lambda name, there=there: there or None)
        command = lab_command(notebook, args)
        assert command[3] == expected and command[-1].endswith("port=8899")
    assert "--LabApp.default_url=/doc/tree/workbench.ipynb" in command


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("kimi_nb 0.")


@pytest.mark.parametrize(
    "typed, answer",
    [
        ("plna", "COMMAND 'plna' is unknown: did you mean plan"),
        ("records lst", "action 'lst' is unknown: did you mean list"),
        ("records list --jsn", "did you mean --json"),
        ("train --train.lrr 3", "did you mean --train.lr,"),
        ("--versoin", "did you mean --version?"),
        ("train --profile quick --preset nano", "--preset 'nano' and --profile 'quick' are both given"),
        ("plan --profile smoke --json", "--json belongs to --dry-run"),
    ],
)
def test_what_is_misspelt_is_answered_by_the_command_that_was_typed(typed, answer, capsys):
    try:
        status = main(typed.split())
    except SystemExit as e:
        status = e.code
    said = capsys.readouterr().err
    assert status == 2 and answer in said and said.count("\n") == 1
    assert "--workers" not in said, "an option of another command"


def test_a_file_may_stand_behind_an_option(tmp_path, capsys):
    Store(tmp_path / "results").put(Record.of(RunConfig(), "done", dict(test_bpb=2.5)))
    file = tmp_path / "all.jsonl.gz"
    assert main(["records", "export", "--results", str(tmp_path / "results"), str(file)]) == 0 and file.is_file()
    with pytest.raises(SystemExit):
        main(["records", "export", str(file), "--results", str(tmp_path / "results"), "another"])
    assert "unrecognized arguments: another" in capsys.readouterr().err


def test_lists_for_programs_are_json(tmp_path, capsys):
    store = Store(tmp_path)
    record = Record.of(RunConfig(), "done", dict(test_bpb=2.5, val_loss=float("nan")))
    store.put(record)
    assert main(["records", "list", "--json", "--results", str(tmp_path)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run_id"], row["test_bpb"], row["val_loss"]) == (record.run_id, 2.5, None)
    assert main(["records", "list", "--json", "--results", str(tmp_path / "none")]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kimi_nb"] == kimi_nb.__version__


@pytest.mark.slow
def test_the_plan_and_the_profiles_for_programs_are_json(tmp_path, capsys):
    assert (
        main(["plan", "--profile", "smoke", "--only", "norm", "--dry-run", "--json", "--results", str(tmp_path)]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["profile"] == "smoke" and told["runs"] > 0 and told["minutes"] > 0 and told["studies"]
    assert main(["profiles", "--profile", "smoke", "--json"]) == 0
    (smoke,) = json.loads(capsys.readouterr().out)
    assert smoke["runs"] > 10 and {"study", "arms"} <= set(smoke["studies"][0])


def completed(script, *words):
    """What bash offers after these words, the last of which is being typed."""
    quoted = " ".join(shlex.quote(word) for word in words)
    ask = f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _kimi_nb; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_tab_completes_commands_options_and_words(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "kimi-nb", "pl") == ["plan"]
    assert {"list", "show", "--json"} <= set(completed(script, "kimi-nb", "records", ""))
    assert completed(script, "kimi-nb", "plan", "--profile", "qu") == ["quick"]
    assert set(completed(script, "kimi-nb", "train", "--model.attention.kind", "m")) == {"mha", "mla"}
    assert completed(script, "kimi-nb", "train", "--train.warm") == ["--train.warmup_steps", "--train.warmup-steps"]
    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        said = capsys.readouterr().out
        assert "noaux_tc" in said and "completion" in said
        if program := shutil.which(shell):
            subprocess.run([program, "-n", "-c", said], check=True)


def test_every_setting_says_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for path, setting in settings_of().items():
        help = said.rpartition(f"--{path} ")[2][:400]
        assert f"(default: {typed_value(setting.default)})" in help, path


def test_long_work_is_told_before_it_begins(tmp_path, monkeypatch, capsys):
    """A run of hours: said, asked in a terminal, not begun after a no; in a pipe it is only said."""
    begun = []
    monkeypatch.setattr("kimi_nb.runner.run_one", lambda run, *more, **how: begun.append(run) or 1 / 0)
    command = ["train", "--preset", "small", "--results", str(tmp_path)]
    assert main(command) == 1 and len(begun) == 1
    said = capsys.readouterr().err
    assert "parameters" in said and "steps" in said and "about" in said.partition("tokens")[2]
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(command) == 2 and len(begun) == 1
    assert "not begun: --yes" in capsys.readouterr().err
