"""Findings are data: decided once, sealed, keyed by phase and profile, and put in words at the last moment only."""

import ast
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import Workplace, in_process, settings_text

import kimi_nb.plan.run
from kimi_nb.cli import main
from kimi_nb.config import load_profile
from kimi_nb.stats import FORMS, claim, compare, decide, plots, say, to_target, verdict, with_late
from kimi_nb.study import (
    Finding,
    Outcome,
    RecordError,
    Store,
    load_outcome,
    outcome_file,
    outcome_problems,
    read_outcome,
    record_outcome,
    sealed_outcome,
    write_outcome,
)

REPO = Path(__file__).resolve().parents[1]
PLAN = ["plan", "--profile", "tiny", "--quiet", "--executor", "inprocess"]


def runs(effect=-0.05, metric="test_bpb", seeds=5):
    """Two arms, the second of which differs by `effect`."""
    noise = np.random.default_rng(0).normal(0, 0.001, (2, seeds))
    rows = [
        dict(arm=arm, block="", seed=seed, status="done", **{metric: 2 + noise[i, seed] + i * effect})
        for i, arm in enumerate(("base", "new"))
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def found(effect=-0.05):
    return claim("H", "new is better", compare(runs(effect), "test_bpb", "base", margin=0.02), margin=0.02)


@pytest.fixture
def place(tmp_path_factory, tmp_path, monkeypatch):
    """A checkout with two phases of tiny runs, whose notebooks are executed without a kernel."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "plan-cache"))
    monkeypatch.setattr(kimi_nb.plan.run, "_execute", in_process)
    made = Workplace(tmp_path / "work", train__steps=3, train__save_every=0, train__eval_every=0)
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    return made


def profile_of(folder, steps):
    """A profile of that many steps."""
    file = folder / "settings.ini"
    file.write_text(settings_text(train__steps=steps))
    return load_profile("tiny", file)


def test_no_field_of_a_finding_holds_its_sentence():
    """What is stored are numbers and words of the vocabulary; the sentence is made of them when it is asked for."""
    finding = found()
    fields = finding.model_dump(mode="json")
    assert {"word", "direction", "size", "diff", "ci_low", "p_adj", "detectable"} <= fields.keys()
    assert (fields["word"], fields["direction"], fields["size"]) == ("supported", "better", "beyond")
    texts = [value for value in fields.values() if isinstance(value, str)]
    assert "lower than of base" in say(finding) and not any("lower than" in text for text in texts)


def test_another_language_changes_no_finding_and_no_number_of_a_table(monkeypatch, tmp_path):
    """Only `say` knows English: with another one the stored outcome is the same to the byte, words and numbers too."""

    def tables():
        table = plots.findings_table([found(), found(0.05)])
        comparison = compare(runs(), "test_bpb", "base")
        outcome = Outcome(phase="norm", profile="tiny", findings=(found(),), finished="2026-01-01T00:00:00+00:00")
        return [row[:3] for row in table.rows], comparison, sealed_outcome(outcome), [row[3] for row in table.rows]

    english = tables()
    german = lambda finding, detectable=True: f"{finding.arm} gegen {finding.baseline}: {finding.diff:.3f}"
    for module in (verdict, plots):
        monkeypatch.setattr(f"kimi_nb.stats.{module.__name__.rpartition('.')[2]}.say", german)
    other = tables()
    assert english[0] == other[0] and english[2] == other[2]
    pd.testing.assert_frame_equal(english[1], other[1])
    assert all("gegen" in sentence for sentence in other[3]) and english[3] != other[3]


@pytest.mark.parametrize("wing", ["stats", "phases", "plan", "lab", "report"])
def test_nothing_parses_a_sentence(wing):
    """Nothing that takes text apart is given what `say` said, or a `sentence`."""
    apart = {"search", "match", "fullmatch", "sub", "split", "findall", "finditer", "partition"}
    wrong = []
    for file in sorted((REPO / "kimi_nb" / wing).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in apart):
                continue
            text = ast.unparse(node)
            if "sentence" in text or "say(" in text:
                wrong.append(f"{file.name}:{node.lineno} {text[:80]}")
    assert wrong == []


@pytest.mark.parametrize("change", ["a word", "a number", "half", "empty"])
def test_an_altered_outcome_is_refused_and_made_again(place, capsys, change):
    """A verdict that somebody turned is not read, `records verify` names it, and the plan makes it again."""
    assert main(PLAN) == 0
    file = outcome_file(place.results, "norm", "tiny")
    before, text = load_outcome(file), file.read_text()
    altered = {
        "a word": text.replace("not testable here", "supported"),
        "a number": text.replace('"tokens":', '"tokens":9'),
        "half": text[: len(text) // 2],
        "empty": "",
    }[change]
    assert altered != text
    file.write_text(altered)
    assert read_outcome(place.results, "norm") is None
    with pytest.raises(RecordError):
        load_outcome(file)
    capsys.readouterr()
    assert main(["records", "verify", "--results", str(place.results)]) == 1
    assert "norm.json" in capsys.readouterr().out
    assert main(PLAN) == 0
    out = capsys.readouterr().out
    assert "phase norm:" in out and "phase baseline:" not in out and ", 0 to train" in out
    assert load_outcome(file).findings == before.findings and outcome_problems(place.results) == []


def test_an_unsealed_outcome_is_not_believed(place, capsys):
    """A file of the form from before outcomes were sealed, altered by hand, counts for nothing outside a bundle."""
    assert main(PLAN) == 0
    verdict = dict(id="H2", claim="Steadier.", word="supported", sentence="It is.", caveats=[])
    old = dict(phase="norm", profile="tiny", verdicts=[verdict], figures=[], finished="2026-11-27T14:23:45+00:00")
    outcome_file(place.results, "norm", "tiny").unlink()
    (place.results / "phases" / "norm.json").write_text(json.dumps(old))
    assert read_outcome(place.results, "norm") is None
    assert any("no seal" in problem for problem in outcome_problems(place.results))
    assert "phase norm:" in (main(PLAN), capsys.readouterr().out)[1]


def test_a_smaller_profile_never_replaces_a_larger_one(tmp_path):
    """Outcomes are kept by phase and profile; the largest is read where none is named."""
    store = Store(tmp_path / "results")
    large = profile_of(tmp_path, 200)
    record_outcome(store, "norm", large, [found()])
    small = large.model_copy(update={"name": "smaller", "base": large.base.override({"train.steps": 5})})
    record_outcome(store, "norm", small, [found()])
    assert read_outcome(store, "norm").profile == "tiny" and read_outcome(store, "norm").findings[0].word == "supported"
    guarded = read_outcome(store, "norm", "smaller").findings[0]
    assert guarded.word == "not testable here" and guarded.diff == found().diff
    assert "decide nothing" in guarded.caveats[-1]
    assert read_outcome(store, "norm", "nobody") is None


def test_an_outcome_under_another_name_is_not_believed(tmp_path):
    """A good file that was copied to another phase's place says whose it is."""
    outcome = Outcome(phase="moe", profile="tiny", findings=(found(),), finished="2026-01-01T00:00:00+00:00")
    file = write_outcome(tmp_path, outcome)
    file.rename(file.with_name("rope.json"))
    assert read_outcome(tmp_path, "rope") is None and "holds phase moe" in outcome_problems(tmp_path)[0]


def test_a_form_that_nobody_knows_is_still_said():
    """A finding of a phase that is not installed lists its facts."""
    finding = Finding(id="a", claim="b", word="supported", form="elsewhere.form", facts=dict(runs=3, loss=2.5))
    assert "elsewhere.form" not in FORMS and say(finding) == "runs 3 and loss 2.5."


@pytest.mark.parametrize("form", ["{runs} of {drawn} runs.", lambda runs, drawn: f"{runs} of {drawn} runs."])
def test_a_form_that_has_come_to_need_more_is_still_said(monkeypatch, form):
    """A record that was published before a form was changed lists its facts; no page and no paper stops at it."""
    monkeypatch.setitem(FORMS, "changed.form", form)
    finding = Finding(id="a", claim="b", word="supported", form="changed.form", facts=dict(runs=3))
    assert say(finding) == "runs 3."
    assert say(finding.changed(facts=dict(runs=3, drawn=4))) == "3 of 4 runs."


def test_runs_that_never_got_there_count_alike_everywhere():
    """A run that did not arrive counts with its whole length, in means and tests; the finding says how many."""
    frame = pd.DataFrame(
        [
            dict(arm=arm, block="", seed=seed, status="done", steps=300, steps_to_target=steps)
            for arm, values in dict(base=(280, 290, 285), new=(100, np.nan, 110)).items()
            for seed, steps in enumerate(values)
        ]
    )
    counted = to_target(frame, "steps_to_target")
    means = counted.groupby("arm")["steps_to_target"].mean()
    rows = with_late(compare(counted, "steps_to_target", "base"), counted)
    assert rows.iloc[0]["mean"] == means["new"] == 170 and rows.iloc[0]["n"] == 3
    assert "1 of the runs of new never got there" in " ".join(decide(rows).caveats)


def test_every_phase_says_what_it_is_and_every_question_has_one_place():
    """Title, reason, figures and questions stand in the phase; a question is answered first by one phase."""
    from kimi_nb.plan import phases
    from kimi_nb.study import metric_info, questions_of

    abouts = {name: module.ABOUT for name, module in phases().items()}
    assert len(abouts) >= 10 and all(about.name == name and about.title and about.why for name, about in abouts.items())
    unknown = [m for about in abouts.values() for m in (*about.metrics, *about.judged) if not metric_info(m).known]
    assert unknown == []
    questions = questions_of(abouts)
    assert list(questions)[:5] == ["H1", "H2", "H3", "H4", "H5"] and questions["RQ1"][1][0] == "combined"
    first = [id for about in abouts.values() for id in about.questions if not about.rank.get(id, 0)]
    assert len(first) == len(set(first))
