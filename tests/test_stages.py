"""Questions to a GPU, asked on a CPU at toy sizes: every stage answers, a budget ends, a file is gone on with."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from kimi_nb.bench import STAGES, of_each, place_at, read_stages, run_stages, stages, suite
from kimi_nb.cli import main
from kimi_nb.config import KimiError

REPO = Path(__file__).resolve().parents[1]
TRAINING_PACKAGES = {"torch", "numpy", "pydantic", "safetensors", "tokenizers", "yaml", "filelock"}


@pytest.mark.parametrize("name", [name for name in STAGES if name not in ("repeats", "sharing")])
def test_every_stage_answers_on_a_cpu(name):
    rows = list(STAGES[name].ask(place_at("cpu")))
    assert not [row for row in rows if "failed" in row], rows
    assert rows or name in ("busy", "waits")  # which ask what a CPU has no answer to
    for row in rows:
        json.dumps(stages._plain(row), allow_nan=False)


def test_a_stage_is_asked_once_and_a_file_is_gone_on_with(tmp_path, capsys):
    out = tmp_path / "stages.jsonl"
    assert run_stages(["machine", "attention"], out=out, device="cpu") == 0
    first = read_stages(out)
    assert [row["ended"] for row in first if "ended" in row] == ["done", "done"]
    assert {row["stage"] for row in first} == {"machine", "attention"}
    assert capsys.readouterr().out.count("\n") == len(first)
    out.write_text(
        out.read_text() + '{"stage": "steps", "arm": "base", "ms": 1}\n{"stage": "steps", "ended": "no more time"}\n'
    )
    assert run_stages(["machine", "attention"], out=out, device="cpu") == 0
    assert len(read_stages(out)) == len(first) + 2  # nothing was asked
    assert run_stages(["steps"], out=out, device="cpu") == 0
    again = [row for row in read_stages(out) if row["stage"] == "steps"]
    assert again[-1]["ended"] == "done" and sum(row.get("arm") == "base" for row in again) == 1
    assert again[0]["ms"] != 1


def test_what_an_unfinished_stage_answered_stays_until_it_is_asked_anew(tmp_path):
    out = tmp_path / "stages.jsonl"
    out.write_text('{"stage": "steps", "arm": "base", "ms": 1}\n{"stage": "steps", "ended": "no more time"}\n')
    before = read_stages(out)
    assert run_stages(["steps"], budget=0, out=out, device="cpu") == 0
    assert read_stages(out) == before


def test_a_curve_without_a_reference_does_not_agree_with_itself():
    assert stages.furthest([1.0, 2.0], [1.0, 2.5]) == 0.5 and stages.furthest([1.0], None) is None


def test_a_budget_ends(tmp_path):
    out = tmp_path / "stages.jsonl"
    assert run_stages(["smoke", "steps"], budget=0.5, out=out, device="cpu") == 0
    said = {row["stage"]: row["ended"] for row in read_stages(out) if "ended" in row}
    assert said == dict(smoke="no more time", steps="no time left")


def test_a_case_that_fails_costs_its_row_and_an_error_of_the_device_the_stage():
    def measure(x):
        if x == 2:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return dict(y=1 / x)

    rows = of_each([dict(x=1), dict(x=0), dict(x=2), dict(x=4)], measure)
    assert next(rows) == dict(x=1, y=1.0) and next(rows)["failed"].startswith("ZeroDivisionError")
    assert "device-side" in next(rows)["failed"]
    with pytest.raises(RuntimeError, match="device-side"):
        next(rows)


def test_what_cannot_be_asked_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(KimiError, match="stage 'step' is unknown"):
        run_stages(["step"])
    (tmp_path / "x").write_text("hello")
    with pytest.raises(KimiError, match="is not what bench --stages writes"):
        run_stages(["machine"], out=tmp_path / "x")
    assert main(["bench", "--stages", "stepz", "--device", "cpu"]) == 2
    assert "stage 'stepz' is unknown" in capsys.readouterr().err


def test_the_command_line_asks(tmp_path):
    out = tmp_path / "o.jsonl"
    assert main(["bench", "--stages", "machine", "--budget", "60", "--device", "cpu", "--out", str(out)]) == 0
    assert read_stages(out)[-1]["ended"] == "done"


def test_it_runs_where_only_training_is_installed(tmp_path):
    """`python -m kimi_nb.bench` on a machine without pandas, transformers and the rest."""
    needed = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    others = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in needed} | {"transformers", "ray", "lm_eval"}
    absent = sorted(others - TRAINING_PACKAGES - {"pyyaml"})
    assert "pandas" in absent and "scipy" in absent
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({absent}))")
    out = tmp_path / "o.jsonl"
    command = [sys.executable, "-m", "kimi_nb.bench", "--stages", "machine", "steps", "sharing", "--device", "cpu"]
    env = dict(PATH="", PYTHONPATH=f"{tmp_path}:{REPO}", OMP_NUM_THREADS="1", HOME=str(tmp_path))
    done = subprocess.run([*command, "--out", out], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = [row["ended"] for row in read_stages(out) if "ended" in row]
    assert ended[:2] == ["done", "done"] and ended[2].startswith("skipped: ")  # which needs the records' packages


def test_both_sides_of_a_bench_take_the_trainers_step():
    """What is timed against us goes through the same loop: it takes what the trainer hands it, and learns."""
    small = {"model.d_model": 32, "model.n_layers": 1, "model.n_heads": 2, "data.num_documents": 60}
    sizes = {"model.moe.n_experts": 4, "model.moe.d_expert": 16, "model.attention.kv_lora_rank": 8}
    run = suite._kimi_run(**small, **sizes, **{"train.optimizer.name": "adamw", "train.precision": "fp32"})
    ours, theirs = suite._two_trainers(run)
    losses = [trainer.step(0)["train_loss"] for trainer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    gpt = suite.GPT2(ours.model.config)
    x = torch.zeros(1, 8, dtype=torch.long)
    assert gpt(x, x, logits=False).logits is None and gpt(x).logits.shape == (1, 8, ours.model.config.vocab_size)
