"""`kimi-nb trace`: where a step spends its time."""

import json
import re

from tiny import RUN

from kimi_nb.cli import main


def test_profile_shows_operations_and_writes_a_trace(tmp_path, monkeypatch, capfd):
    """`kimi-nb trace` prints the operations of a step, largest first, and writes a trace; nothing else is recorded."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KIMI_NB_RESULTS", str(tmp_path / "results"))
    settings = [f"--{k}={v}" for k, v in (RUN | {"train.optimizer.name": "muon"}).items()]
    assert (
        main(
            [
                "trace",
                *settings,
                "--steps",
                "2",
                "--warmup",
                "1",
                "--rows",
                "6",
                "--out",
                str(tmp_path / "out"),
                "--device",
                "cpu",
                "--threads",
                "1",
            ]
        )
        == 0
    )
    out, err = capfd.readouterr()
    assert err == "" and not (tmp_path / "results").exists()
    times = [float(m) for m in re.findall(r"^\S.*?\s+[\d,.]+\s+([\d.]+)\s+[\d.]+%$", out, re.M)]
    assert len(times) == 6 and times == sorted(times, reverse=True) and "2 steps on cpu" in out
    (trace,) = (tmp_path / "out").iterdir()
    names = {e.get("name") for e in json.loads(trace.read_text())["traceEvents"]}
    assert "Optimizer.step#Muon.step" in names and str(trace) in out


def test_profile_refuses_what_cannot_be_in_one_line(tmp_path, capsys):
    """A folder that cannot be made is one line."""
    (tmp_path / "file").write_text("")
    assert main(["trace", "--out", str(tmp_path / "file"), *[f"--{k}={v}" for k, v in RUN.items()]]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot be written" in err and "--out" in err
