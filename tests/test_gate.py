"""Keep, drop or one more seed; plans that stop when they know: what they promise, with a known truth."""

import json
import math
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import stdtrit
from tiny import Workplace

from kimi_nb.cli import STATUS, command_words, main, read_search, read_values
from kimi_nb.config import KimiError
from kimi_nb.stats import (
    DROP,
    KEEP,
    MORE,
    Factorial,
    GateRule,
    bounds_of,
    chance_to_cross,
    drawn_improvements,
    e_process,
    in_half,
    keep_or_drop,
    nct_cdf,
    open_levels,
    planned_levels,
    play,
    search_all,
    truth_of,
)

FAIR = ("normal", "heavy", "unequal", "correlated")  # worlds in which the promise is made
SURELY_BELOW = 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / 1000)  # 1000 searches of a true 5% exceed it once in 2000


# -- the gate's error and power


@pytest.mark.parametrize("world", FAIR)
def test_a_thousand_searches_of_fifty_keep_nothing_false(world):
    """False KEEP, of any of 50 candidates, in at most 5% of searches, though every look may be the last."""
    drawn = drawn_improvements(world, 1000, 50, 10, np.random.default_rng(1))
    found = search_all(drawn, GateRule(candidates=50))
    assert found.any_kept <= 0.05
    assert found.seeds.mean() < 3.5, "failures are dropped early"


@pytest.mark.parametrize("test", ["planned", "open"])
@pytest.mark.parametrize("world", FAIR)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_who_never_drops_is_as_safe(world, test, seed):
    """Optional stopping at every look up to the last seed, without futility: what its owner may do at most."""
    drawn = drawn_improvements(world, 1000, 50, 10, np.random.default_rng(seed))
    found = search_all(drawn, GateRule(candidates=50, futility=0.0, test=test))
    assert found.any_kept <= SURELY_BELOW


def test_what_breaks_the_promise_is_known():
    """Runs that remember each other are no sample: the pages say so, and this keeps them honest."""
    drawn = drawn_improvements("drift", 1000, 50, 10, np.random.default_rng(1))
    assert search_all(drawn, GateRule(candidates=50)).any_kept > 0.05


def test_peeking_with_a_plain_t_test_breaks_it():
    """The same searches, each look at the full level of its candidate."""

    class Peeking(GateRule):
        levels = (0.0, *[0.05] * 9)

    drawn = drawn_improvements("normal", 200, 50, 10, np.random.default_rng(1))
    assert search_all(drawn, Peeking(candidates=50, futility=0.0)).any_kept > 0.75


@pytest.mark.parametrize("candidates, seeds", [(1, 10), (50, 10), (50, 6)])
def test_power_is_within_a_tenth_of_the_fixed_sample(candidates, seeds):
    """Of the t test that waits for the last seed, at the same level and the effect it finds in 80%."""
    level = 0.05 / candidates
    fixed = lambda d_z: 1 - float(nct_cdf(-stdtrit(seeds - 1, level), seeds - 1, d_z * math.sqrt(seeds)))
    d_z = brentq(lambda d: fixed(d) - 0.8, 0.01, 30)
    drawn = np.random.default_rng(2).normal(d_z, 1, (400, 25, seeds))
    found = search_all(drawn, GateRule(candidates=candidates, max_seeds=seeds))
    assert found.kept.mean() >= 0.9 * 0.8
    assert found.seeds.mean() < seeds


# -- the formulas


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.floats(1e-4, 0.2), st.floats(1.0, 8.0))
def test_boundaries_spend_what_they_may(looks, alpha, spending):
    """The recursion agrees with itself, whatever the plan; no look has less than what it may spend at once."""
    levels = planned_levels(looks, alpha, spending)
    assert math.isclose(chance_to_cross(bounds_of(levels)), alpha, rel_tol=5e-3)
    assert levels[-1] <= alpha * (1 + 1e-9)


def test_boundaries_against_a_simulation():
    """Half a million paths, drawn without the recursion."""
    drawn = np.random.default_rng(3).normal(size=(500_000, 4))
    n = np.arange(2, 5)
    means = drawn.cumsum(axis=1)[:, 1:] / n
    sds = np.sqrt(np.maximum((drawn**2).cumsum(axis=1)[:, 1:] - n * means**2, 0) / (n - 1))
    t = means * np.sqrt(n) / sds
    bounds = -stdtrit(n - 1, planned_levels(4, 0.05)[1:])
    first = (t >= bounds).any(axis=1).mean()
    assert abs(first - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 500_000)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0.01, 100))
def test_evidence_knows_no_unit(d, unit):
    """Nats, bits or millibits: the same evidence."""
    if any(abs(x) > 1e-3 for x in d):
        assert np.allclose(e_process(d), e_process(np.array(d) * unit), rtol=1e-6)


def test_open_levels_are_where_the_evidence_is_enough():
    """A t just above its level has evidence above 1 / alpha, just below it has not."""
    level = open_levels(6, 0.05)[-1]
    for side, enough in ((1.001, True), (0.999, False)):
        t = -stdtrit(5, level) * side
        d = np.array([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
        d = d + t * d.std(ddof=1) / math.sqrt(6)
        assert (e_process(d)[-1] >= 20) == enough


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(0.1, 10), st.booleans())
def test_the_answer_depends_on_neither_unit_nor_sign(gains, unit, lower):
    """Nor on whether smaller is better."""
    sign = 1 if lower else -1
    base = {seed: 3.0 + 0.25 * seed for seed in range(len(gains))}
    change = {seed: base[seed] - gain for seed, gain in enumerate(gains)}
    plain = keep_or_drop(base, change, GateRule(margin=0.05, max_seeds=8))
    scaled = [{seed: sign * value * unit for seed, value in values.items()} for values in (base, change)]
    other = keep_or_drop(*scaled, GateRule(margin=0.05 * unit, max_seeds=8, lower_better=lower))
    if plain.p is None or abs(plain.p / plain.level - 1) > 1e-6:
        assert plain.word == other.word and plain.n == other.n


# -- the command


BASE = "0:1.832,1:1.829,2:1.835,3:1.830"
GOOD = "0:1.801,1:1.800,2:1.803,3:1.799"
BAD = "0:1.861,1:1.862,2:1.863,3:1.860"


def gate(capsys, *argv):
    """Exit status, what was printed, and the errors of `kimi-nb gate`."""
    capsys.readouterr()
    status = main(["gate", *map(str, argv)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_exit_status_is_the_answer(capsys):
    assert gate(capsys, "--baseline", BASE, "--candidate", GOOD)[0] == 0
    assert gate(capsys, "--baseline", BASE, "--candidate", BAD)[0] == 3
    status, out, _ = gate(capsys, "--baseline", BASE, "--candidate", "0:1.83,1:1.82,2:1.83", "--json")
    assert status == 4 and json.loads(out)["answer"] == MORE == "ONE MORE SEED"
    assert gate(capsys, "--baseline", BASE, "--candidate", "0:nan")[0] == STATUS[DROP]
    assert gate(capsys, "--baseline", BASE, "--candidate", GOOD, "--margin", "1")[0] == STATUS[DROP]
    assert gate(capsys, "--baseline", GOOD, "--candidate", BASE, "--higher-better")[0] == STATUS[KEEP]


def test_values_from_files(tmp_path):
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_text("seed,value\n0,1.5\n1, 1.25\n")
    lines.write_text('{"seed": 0, "value": 1.5}\n\n{"seed": 1, "value": 1.25, "note": "x"}\n')
    assert read_values(str(table)) == read_values(str(lines)) == read_values("0:1.5, 1:1.25") == {0: 1.5, 1: 1.25}


@pytest.mark.parametrize(
    "argv, words",
    [
        ((), "there is no candidate"),
        (("--candidate", "0:x"), "no seed and value"),
        (("--candidate", "0:1,0:2"), "twice"),
        (("--candidate", "none.csv"), "cannot be read"),
        (("--candidate", ""), "there is no candidate"),
        (("--baseline", "0:nan", "--candidate", "0:1"), "a baseline needs numbers"),
        (("--baseline", BASE, "--candidate", GOOD, "--margin", "-1"), "margin -1.0 is not possible"),
        (("--baseline", BASE, "--candidate", GOOD, "--margin", "nan"), "margin nan is not possible"),
        (("--baseline", BASE, "--candidate", GOOD, "--alpha", "2"), "alpha 2.0 is not possible"),
        (("--baseline", BASE, "--candidate", GOOD, "--max-seeds", "3"), "more than the 3"),
        (("--baseline", BASE, "--candidate", GOOD, "--max-seeds", "1"), "max_seeds 1 is not possible"),
        (("--baseline", BASE, "--candidate", GOOD, "--futility", "0.7"), "futility 0.7 is not possible"),
        (("--candidate", GOOD, "--promote"), "--promote needs --state"),
        (("--run", "train --seed {seed}"), "--run needs --pattern"),
        (("--run", "train", "--pattern", "x"), "has no {seed}"),
        (("--run", "train '{seed}", "--pattern", "x"), "cannot be split"),
        (("--run", "no-such-program {seed}", "--pattern", "x"), "give --run-baseline"),
        (("--baseline", "0:1", "--run", "no-such-program {seed}", "--pattern", "x"), "cannot be started"),
        (("--baseline", "0:1", "--run", "echo {seed}", "--pattern", "("), "no regular expression"),
        (("--baseline", "0:1", "--run", "echo {seed}", "--pattern", "loss"), "printed nothing that matches"),
        (("--baseline", "0:1", "--run", "echo loss a {seed}", "--pattern", "loss (.)"), "no number"),
        (("--baseline", "0:1", "--run", "ls /no-such-folder-{seed}", "--pattern", "x"), "ended with status"),
    ],
)
def test_what_is_impossible_is_one_line(capsys, argv, words):
    status, out, err = gate(capsys, *argv)
    assert status == 2 and out == "" and words in err
    assert err.strip().splitlines()[-1].startswith("kimi-nb: error: ")


def test_a_search_remembers(capsys, tmp_path):
    """What was declared, measured and answered: a final answer stands whatever comes after it."""
    state = ("--state", tmp_path / "gate.json", "--candidates", 2)
    assert gate(capsys, *state, "--baseline", BASE, "--candidate", BAD, "--name", "a")[0] == STATUS[DROP]
    assert gate(capsys, *state, "--candidate", "7:0.1", "--name", "a")[0] == STATUS[DROP]
    status, _, err = gate(capsys, *state, "--baseline", "0:1.9", "--candidate", GOOD)
    assert status == 2 and "seed 0 of the baseline is 1.832 and now 1.9" in err
    status, _, err = gate(capsys, *state, "--candidate", GOOD, "--margin", "0.1")
    assert status == 2 and "was begun with margin 0.0 (now 0.1)" in err
    assert gate(capsys, *state, "--candidate", GOOD, "--promote")[0] == STATUS[KEEP]
    search = read_search(tmp_path / "gate.json")
    assert [tried.name for tried in search.tried] == ["a", "candidate-2"]
    assert [look["word"] for look in search.looks] == [DROP, KEEP] and search.baselines[-1] == read_values(GOOD)
    status, _, err = gate(capsys, *state, "--candidate", GOOD)
    assert status == 2 and "one more than the 2" in err
    status, out, _ = gate(capsys, "--state", tmp_path / "gate.json", "--show")
    assert status == 0 and "2 of 2 candidates tried" in out and "DROP" in out and "KEEP" in out
    assert gate(capsys, "--state", tmp_path / "none.json", "--show")[0] == 2


def test_a_final_answer_stands_though_more_is_known_of_the_noise(capsys, tmp_path):
    """A DROP for want of a chance would be ONE MORE SEED once other candidates show a larger spread."""
    state = ("--state", tmp_path / "gate.json", "--candidates", 3, "--baseline", BASE)
    quiet = "0:1.836,1:1.833,2:1.839"
    assert gate(capsys, *state, "--candidate", quiet, "--name", "a")[0] == STATUS[MORE]
    assert gate(capsys, *state, "--candidate", "3:1.8341", "--name", "a")[0] == STATUS[DROP]
    assert gate(capsys, *state, "--candidate", "0:1.2,1:2.9,2:1.1,3:2.4", "--name", "wild")[0] == STATUS[MORE]
    assert gate(capsys, *state, "--candidate", "3:1.8341", "--name", "a")[0] == STATUS[DROP]


def test_no_rearrangement_is_a_further_look(tmp_path):
    """Values are taken by seed, whatever order they are written in, and pairs in the order they became complete."""
    file = tmp_path / "a.csv"
    file.write_text("2,1.0\n0,1.5\n1,1.25\n")
    assert list(read_values(str(file))) == [0, 1, 2]


def test_a_changed_file_of_a_search_is_refused(capsys, tmp_path):
    file = tmp_path / "gate.json"
    state = ("--state", file, "--baseline", BASE, "--candidate", "0:1.83")
    assert gate(capsys, *state)[0] == STATUS[MORE]
    whole = file.read_text()
    for text in (whole.replace("1.829", "1.929"), whole[:-40], "", "{}", "[1]", '{"digest":"0"}'):
        file.write_text(text)
        status, out, err = gate(capsys, *state)
        assert status == 2 and out == "" and str(file) in err and file.read_text() == text
    file.write_text(whole)
    assert gate(capsys, *state)[0] == STATUS[MORE]


COMMAND = f"{shlex.quote(sys.executable)} -c 'print(\"val_bpb: \" + str(%s + 0.001 * ({{seed}} %% 3)))'"


def test_around_a_command(capsys, tmp_path):
    """Runs what is missing until the answer is final; the baseline's runs serve every candidate."""
    ways = ("--run-baseline", COMMAND % 1.83, "--pattern", r"val_bpb: ([0-9.]+)", "--state", tmp_path / "gate.json")
    noisy = COMMAND.replace("%% 3", "%% 2") % 1.7
    status, out, err = gate(capsys, *ways, "--run", noisy)
    search = read_search(tmp_path / "gate.json")
    assert status == 0 and out.startswith("KEEP: candidate-1") and "val_bpb: 1.7" in err
    assert list(search.baselines[0]) == search.tried[0].order
    status, out, err = gate(capsys, *ways, "--run", noisy, "--one", "--quiet", "--name", "again", "--json")
    assert status == STATUS[MORE] and err == "" and json.loads(out)["n"] == 1
    status, out, _ = gate(capsys, *ways, "--run", COMMAND % 1.9, "--quiet", "--name", "worse")
    assert status == STATUS[DROP] and " 1 pair" in out, "the spread of earlier candidates tells a plain failure"


def test_nothing_in_a_command_is_expanded(tmp_path):
    """No shell: what would be a second command is a word."""
    trap = tmp_path / "trap"
    words = command_words(f"echo {{seed}}; touch {trap} && $(touch {trap})", 3)
    assert words == ["echo", "3;", "touch", str(trap), "&&", "$(touch", f"{trap})"]
    subprocess.run(words, check=True, capture_output=True)
    assert not trap.exists()
    with pytest.raises((KimiError, ValueError, TypeError)):
        command_words("echo {seed}", "0; rm")


def test_two_processes_share_a_search(tmp_path):
    """Each adds its candidate; nothing is lost."""
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    base = ["gate", "--state", str(tmp_path / "gate.json"), "--baseline", BASE, "--candidate", "0:1.83", "--name"]
    some = [subprocess.Popen([sys.executable, "-c", code, *base, f"c{i}"], stdout=subprocess.DEVNULL) for i in range(2)]
    assert [process.wait() for process in some] == [STATUS[MORE]] * 2
    assert {tried.name for tried in read_search(tmp_path / "gate.json").tried} == {"c0", "c1"}


def test_the_gate_starts_light():
    """A script may ask after every run: no torch, no pandas."""
    code = (
        "import sys, time; from kimi_nb.cli import main; "
        f"main(['gate', '--baseline', '{BASE}', '--candidate', '{GOOD}']); "
        "print(sorted({'torch', 'pandas', 'statsmodels', 'matplotlib'} & set(sys.modules)), time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, _, seconds = done.stdout.strip().splitlines()[-1].rpartition(" ")
    assert loaded == "[]" and float(seconds) < 1.0


# -- plans in rounds


def test_a_sequential_factorial_needs_fewer_runs_at_equal_error():
    """A truth like the published one: large effects beside none, effects that differ from seed to seed."""
    means = 2 + np.tensordot([0.02, 0.0, 0.008, -0.05], 2 * np.indices((2,) * 4) - 1, 1)
    truth = Factorial(means, np.full((2,) * 4, 0.0053), np.array([0.0037, 0.0, 0.0021, 0.0037]), 0.02)
    rounds, fixed = dict(looks=10, halves=True), dict(looks=5, sequential=False)
    for times in (1, 3):
        one, other = (
            play(truth.noisier(times), studies=1000, rng=np.random.default_rng(1), **h) for h in (rounds, fixed)
        )
        assert (one.right.mean(axis=0) >= 0.9 * other.right.mean(axis=0))[[0, 2, 3]].all()
        assert one.runs.mean() <= (0.6 if times == 1 else 1.0) * other.runs.mean()
    null = truth.without(0, 1, 2, 3)._replace(margin=0.0)
    for how in (rounds, dict(looks=5), dict(looks=3)):
        found = play(null, studies=2000, rng=np.random.default_rng(2), futility=0.0, **how)
        assert found.better.any(axis=1).mean() <= 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.slow
def test_the_published_factorial_in_rounds():
    """Effects, noise and spread over seeds of profile standard; and its records, looked at as the plan would have."""
    from kimi_nb.plan import in_rounds, look_at_study, published, questions_of_study
    from kimi_nb.stats import in_half
    from kimi_nb.study import FACTORS, cell_factors, with_factors

    store = published("standard")
    frame = store.frame("combined", stale=True)
    truth = truth_of(with_factors(frame), "test_bpb", FACTORS, 0.02)
    rounds, fixed = dict(looks=10, halves=True), dict(looks=5, sequential=False)
    real = np.abs(truth.effects) > 0.01
    for times, share in ((1, 0.6), (3, 1.0), (8, 1.0)):
        one, other = (
            play(truth.noisier(times), studies=5000, rng=np.random.default_rng(1), **h) for h in (rounds, fixed)
        )
        assert one.runs.mean() <= share * other.runs.mean()
        assert (one.right.mean(axis=0) >= 0.9 * other.right.mean(axis=0))[real].all()
    null = truth.without(0, 1, 2, 3)._replace(margin=0.0)
    wrong = [
        play(null, studies=20_000, rng=np.random.default_rng(2), futility=0.0, **how).better.any(axis=1).mean()
        for how in (rounds, fixed)
    ]
    assert wrong[0] <= 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / 20_000) and wrong[0] <= wrong[1] + 0.005
    study = in_rounds(store.manifest("combined")[0])
    mine = frame[[in_half(len(cell_factors(arm)), seed) for arm, seed in zip(frame["arm"], frame["seed"])]]
    questions = questions_of_study(study)
    for look in range(2, 6):
        look_at_study(study, questions, mine, look)
    found = {question.name: (question.state, question.finding.direction) for question in questions}
    assert found["optimizer"] == ("answered", "better") and found["attention"] == ("answered", "worse")


def test_halves_take_turns():
    """Both halves hold every level of every factor equally often; together they are the whole."""
    signs = np.array(list(np.ndindex(2, 2, 2, 2)))
    even, odd = ([in_half(int(cell.sum()), turn) for cell in signs] for turn in (0, 1))
    assert np.array_equal(np.logical_not(even), odd)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    for half in (even, odd):
        cells = 2 * signs[half] - 1
        assert not cells.sum(axis=0).any() and not any((cells[:, i] * cells[:, j]).sum() for i, j in pairs)


@pytest.fixture
def place(tmp_path_factory, tmp_path, monkeypatch):
    """A checkout with two phases of tiny runs."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "gate-cache"))
    made = Workplace(tmp_path / "work", train__steps=3, train__save_every=0, train__eval_every=0)
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    return made


SEQUENTIAL = ["plan", "--profile", "tiny", "--quiet", "--executor", "inprocess", "--sequential"]


def test_a_plan_in_rounds(place, capsys):
    """Keeps every look, looks the same way again, and the fixed plan goes on with its runs."""
    from kimi_nb.study import Store, unseal

    def kept():
        files = sorted((place.results / "sequential" / "tiny").glob("*.json"))
        return [unseal(file.read_text(), str(file)) for file in files]

    assert main([*SEQUENTIAL, "--seeds", "4"]) == 0
    out, looks, store = capsys.readouterr().out, kept(), Store(place.results)
    questions = [question for study in looks for question in study["questions"]]
    assert {"norm", "baseline"}.isdisjoint(store.studies()), "no table of a fixed sample finds these runs"
    assert len({question["looks"][-1]["seeds"] for question in questions}) > 1, "one question closed before another"
    for question in questions:
        frame = store.frame(question["study"])
        mine = frame[frame["arm"].isin(question["arms"]) & (frame["block"] == question["block"])]
        looked = question["looks"][-1]["seeds"]
        others = [other["looks"][-1]["seeds"] for other in questions if set(other["arms"]) & set(question["arms"])]
        assert looked <= mine.groupby("arm")["seed"].nunique().max() <= max(others) and question["state"] != "open"
        assert [look["seeds"] for look in question["looks"]] == list(range(2, looked + 1))
        assert "Sequential: look" in question["finding"]["caveats"][-1]
    runs = len(list(store.records()))
    assert f"Sequential plan tiny: {runs} runs" in out and not (place.results / "notebooks").exists()
    assert main([*SEQUENTIAL, "--seeds", "4"]) == 0 and "0 trained by this call" in capsys.readouterr().out
    assert kept() == looks
    assert main([word for word in SEQUENTIAL if word != "--sequential"] + ["--dry-run", "--seeds", "4"]) == 0
    assert f"{18 - runs} runs to train" in capsys.readouterr().out


def test_a_look_is_not_taken_back(place, capsys):
    """Another number of seeds, or an edited file, is refused before anything is trained; a limit of runs is kept."""
    assert main([*SEQUENTIAL, "--only", "norm", "--seeds", "4", "--runs", "5"]) == 0
    assert "no run left" in capsys.readouterr().out
    assert main([*SEQUENTIAL, "--only", "norm", "--seeds", "6"]) == 2
    assert "a look cannot be taken back" in capsys.readouterr().err
    assert main([*SEQUENTIAL, "--only", "norm", "--seeds", "4", "--runs", "1"]) == 2
    assert "the first look needs" in capsys.readouterr().err
    file = place.results / "sequential" / "tiny" / "norm.json"
    file.write_text(file.read_text().replace('"seeds":2', '"seeds":3'))
    assert main([*SEQUENTIAL, "--only", "norm", "--seeds", "4"]) == 2 and str(file) in capsys.readouterr().err
    assert main(["plan", "--profile", "tiny", "--runs", "5"]) == 2 and "--runs limits" in capsys.readouterr().err


def test_no_environment_is_needed_for_a_gate(tmp_path):
    """Outside of a checkout, in an empty folder."""
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    env = {k: v for k, v in os.environ.items() if not k.startswith("KIMI_NB")}
    argv = [sys.executable, "-c", code, "gate", "--baseline", BASE, "--candidate", GOOD]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
