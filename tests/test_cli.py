"""The command line itself: what no command is about, and all share."""

import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest

import kimi_nb.cli.machine
from kimi_nb.cli import lab_command, main


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


def test_an_unknown_study_is_refused_before_anything_is_tuned(tmp_path, capsys):
    assert main(["--results", str(tmp_path / "results"), "run", "nrom", "--profile", "quick"]) == 2
    assert "study 'nrom' is unknown: did you mean norm" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


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


def test_a_module_beside_the_notebooks_is_none_of_the_lab(tmp_path):
    """A file random.py in the working folder would otherwise end JupyterLab at its start."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    args = SimpleNamespace(no_browser=True, port=None, more=["--version"])
    command = lab_command(tmp_path / "workbench.ipynb", args)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("kimi_nb 0.")
