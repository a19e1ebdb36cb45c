"""What `kimi-nb plan` does again and what it does not, and what it says."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from tiny import Workplace, in_process, phase_cells, tiny_run

import kimi_nb.plan.run
from kimi_nb.cli import main
from kimi_nb.config import KimiError
from kimi_nb.runner import Progress
from kimi_nb.study import Store

REPO = Path(__file__).resolve().parents[1]
PLAN = ["plan", "--profile", "tiny", "--quiet", "--executor", "inprocess"]


@pytest.fixture
def place(tmp_path_factory, tmp_path, monkeypatch):
    """A checkout with two phases of tiny runs, whose notebooks are executed without a kernel."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "plan-cache"))
    monkeypatch.setattr(kimi_nb.plan.run, "_execute", in_process)
    made = Workplace(tmp_path / "work", train__steps=3, train__save_every=0, train__eval_every=0)
    for k, v in made.environment().items():
        monkeypatch.setenv(k, v)
    return made


def call(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def executed(out):
    return re.findall(r"^phase (\w+): ", out, re.M)


def test_a_plan_that_only_looks_trains_nothing(place, capsys):
    """Neither the plan nor its notebooks; commands that train refuse to."""
    looks = ("--profile", "tiny", "--quiet", "--executor", "none")
    assert "phase norm: " in call(capsys, "plan", *looks, "--only", "norm")[1]
    assert not list((place.results / "experiments").glob("*"))
    for words in (("run", "norm", *looks), ("plan", *looks, "--sequential")):
        code, _, err = call(capsys, *words)
        assert code == 2 and "executor none" in err and err.count("\n") == 1


def test_some_arms_of_a_study_are_trained_alone(place, capsys):
    """With the baseline, so that they are compared; the others come later, and an unknown one is refused."""
    words = ("run", "norm", "--profile", "tiny", "--quiet", "--executor", "inprocess", "--yes", "--arms")
    store = Store(place.results)
    code, _, err = call(capsys, *words, "rmsnrm")
    assert code == 2 and "rmsnorm" in err
    assert call(capsys, *words, "rmsnorm")[0] == 0
    assert set(store.frame("norm")["arm"]) == {"layernorm", "rmsnorm"}


def test_a_smaller_profile_replaces_nothing_of_a_larger_one(place, capsys):
    """Neither the outcome nor the executed notebook; its own stand beside them, and are up to date the next time."""
    assert call(capsys, *PLAN, "--only", "norm")[0] == 0
    kept = {file: file.read_bytes() for part in ("phases", "notebooks") for file in (place.results / part).rglob("*.*")}
    text = (place.path / "settings.ini").read_text()
    less = text.replace("[tiny]", "[less]").replace("train.steps = 3", "train.steps = 2").replace("0, 2, 3", "0, 1, 2")
    (place.path / "settings.ini").write_text(text + less)
    smaller = ["plan", "--profile", "less", "--quiet", "--executor", "inprocess", "--only", "norm"]
    assert call(capsys, *smaller)[0] == 0
    assert {file: file.read_bytes() for file in kept} == kept
    assert (place.results / "notebooks" / "less" / "03_norm.ipynb").is_file()
    assert (
        call(capsys, *smaller)[1].count("(up to date)")
        == call(capsys, *PLAN, "--only", "norm")[1].count("(up to date)")
        == 1
    )


def test_a_second_plan_trains_nothing_and_executes_nothing(place, capsys):
    """A second `kimi-nb plan` trains and executes nothing, says the same verdicts, computes for under two seconds."""
    code, out, err = call(capsys, *PLAN)
    assert (code, err) == (0, "") and sorted(executed(out)) == ["baseline", "norm"]
    before = {p: p.stat().st_mtime_ns for p in place.results.glob("experiments/*/result.json")}
    begin = time.process_time()
    code, again, err = call(capsys, *PLAN)
    assert time.process_time() - begin < 2
    assert (
        (code, err) == (0, "")
        and ", 0 to train" in again
        and executed(again) == []
        and again.count("(up to date)") == 2
    )
    assert {p: p.stat().st_mtime_ns for p in place.results.glob("experiments/*/result.json")} == before
    verdicts = [line for line in out.splitlines() if line.startswith("  RQ0")]
    assert verdicts == [line for line in again.splitlines() if line.startswith("  RQ0")] and len(verdicts) == 2


def test_only_what_changed_is_executed_again(place, capsys):
    """A deleted executed copy or outcome, a changed notebook: only that phase is executed again, nothing is trained."""
    call(capsys, *PLAN)
    for change in (
        (place.results / "notebooks" / "03_norm.ipynb").unlink,
        lambda: place.phase("norm", then="another = 1"),
        (place.results / "phases" / "tiny" / "norm.json").unlink,
    ):
        change()
        code, out, _ = call(capsys, *PLAN)
        assert code == 0 and executed(out) == ["norm"] and ", 0 to train" in out
        assert (place.results / "notebooks" / "03_norm.ipynb").exists()
    assert executed(call(capsys, *PLAN)[1]) == []


def test_keys_are_made_by_one_thread(place, capsys, monkeypatch):
    """Python 3.11 fails where two threads make syntax trees at once: "AST constructor recursion depth mismatch"."""
    made, key = [], kimi_nb.plan.run.phase_key

    def watched(*about):
        made.append(threading.current_thread())
        return key(*about)

    monkeypatch.setattr(kimi_nb.plan.run, "phase_key", watched)
    assert call(capsys, *PLAN)[::2] == (0, "")
    assert made == [threading.main_thread()] * 2


def test_words_and_formatting_redo_nothing(place, capsys):
    """A comment, other spacing, prose and hidden cells are not what a phase does; what it uses of the package is."""
    import nbformat

    call(capsys, *PLAN)
    notebook = place.path / "nbs" / "phases" / "03_norm.ipynb"
    node = nbformat.read(notebook, as_version=4)
    node.cells[1].source = "# a word\n" + node.cells[1].source.replace("[Finding(", "[ Finding(")
    node.cells += [nbformat.v4.new_markdown_cell("More prose."), nbformat.v4.new_code_cell("#| hide\nassert False")]
    nbformat.write(node, notebook)
    assert executed(call(capsys, *PLAN)[1]) == []


def test_a_phase_is_redone_for_what_it_uses(tmp_path):
    """The files behind a notebook's imports, through the faces of the wings, and those that these import."""
    from kimi_nb.plan import used_files

    uses = lambda text: {f"{file.parent.name}.{file.stem}" for file in used_files(text)}
    found = uses(
        "from kimi_nb.phases.norm import study\nfrom kimi_nb import KimiModel\nfrom kimi_nb.plan import open_phase"
    )
    assert {"phases.norm", "model.network", "config.base", "study.store"} <= found
    assert not {name for name in found if name.split(".")[0] in ("report", "lab", "cli")}
    assert uses("import math, json") == set() and "stats.plots" in uses("from kimi_nb.stats import plots")
    assert "config.base" in uses("def f():\n    from kimi_nb.config import near")


def test_phases_are_discovered(place, monkeypatch):
    """In the order of their notebooks, with the modules they export; one that was never exported is named in a line."""
    from kimi_nb.plan import PlanError, phases

    assert list(phases()) == ["baseline", "norm"] and phases(["norm"])["norm"].__name__ == "kimi_nb.phases.norm"
    with pytest.raises(PlanError, match="did you mean norm"):
        phases(["nrm"])
    (place.path / "nbs" / "phases" / "12_mine.ipynb").write_text("{}")
    with pytest.raises(PlanError, match=r"has no module kimi_nb\.phases\.mine: run nbdev-export"):
        phases()


def test_the_plans_own_interpreter_and_package_execute(place, monkeypatch, tmp_path):
    """Whatever kernel is called python3, braces in the name of results; nothing is left in the temporary folder."""
    import tempfile

    monkeypatch.undo()
    for k, v in place.environment().items():
        monkeypatch.setenv(k, v)
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = dict(argv=["false", "{connection_file}"], display_name="Python 3", language="python")
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (temporary / "knb-999999999-left").mkdir()
    seen = tmp_path / "seen.txt"
    said = "'\\n'.join([sys.executable, kimi_nb.__file__, get_connection_file()])"
    then = f"import sys, kimi_nb\nfrom ipykernel import get_connection_file\nopen({str(seen)!r}, 'w').write({said})"
    notebook = place.phase("norm", then=then)
    store = Store(tmp_path / "{seed} and {profile}")
    from kimi_nb.config import load_profile
    from kimi_nb.plan import execute_phase

    outcome = execute_phase("norm", notebook, store, load_profile("tiny"))
    assert [f.word for f in outcome.findings] == ["not testable here"]
    *ours, connection = seen.read_text().splitlines()
    assert ours == [sys.executable, str(REPO / "kimi_nb" / "__init__.py")]
    assert Path(connection).is_relative_to(temporary) and Path(connection).parent.name.startswith("knb-")  # tidied
    assert (store.path / "notebooks" / "03_norm.ipynb").is_file() and not list(temporary.glob("knb-*"))


@pytest.mark.parametrize("damage", ["name", "parameters", "kernel"])
def test_what_can_be_refused_is_refused_before_anything_is_trained(place, capsys, monkeypatch, damage):
    """An unknown phase, a notebook that takes no profile, an interpreter without a kernel: not even tuning begins."""
    monkeypatch.setattr(kimi_nb.plan.run, "tuned", lambda *a, **k: pytest.fail("it was tuned"))
    more = ["--only", "nrm"] if damage == "name" else []
    if damage == "parameters":
        place.phase("norm", cells=["results = ''"])
    if damage == "kernel":
        monkeypatch.setattr(kimi_nb.plan.run.importlib.util, "find_spec", lambda name: None)
    code, _, err = call(capsys, *PLAN, *more)
    said = dict(name="did you mean norm?", parameters="no parameter 'profile'", kernel="has no ipykernel")[damage]
    assert code == 2 and said in err and err.count("\n") == 1


def test_only_some_phases(place, capsys):
    """--only runs the named phases and nothing else."""
    code, out, _ = call(capsys, *PLAN, "--only", "norm")
    assert code == 0 and executed(out) == ["norm"]
    assert Store(place.results).studies() == ["norm"] or all(
        s.startswith("norm") for s in Store(place.results).studies()
    )
    code, out, _ = call(capsys, *PLAN)
    assert code == 0 and executed(out) == ["baseline"]


def test_more_seeds(place, capsys):
    """--seeds 5 gives every arm five runs, and trains only those that are missing."""
    call(capsys, *PLAN, "--only", "norm")
    two = {r.run_id for r in Store(place.results).records()}
    code, out, _ = call(capsys, *PLAN, "--only", "norm", "--seeds", "5")
    frame = Store(place.results).frame("norm")
    assert code == 0 and (frame.groupby(["block", "arm"])["seed"].nunique() == 5).all()
    trained = int(re.search(r"(\d+) to train", out)[1])
    assert trained == len(frame["run_id"].unique()) - len(two)
    (notebook,) = (place.results / "notebooks").glob("*norm.ipynb")
    assert "seeds = 5" in "".join("".join(c["source"]) for c in json.loads(notebook.read_text())["cells"])


def test_another_block_of_seeds(place, capsys):
    """--seeds 100+ is the same plan with as many seeds, from 100 on; what is no number of seeds is one line."""
    code, out, _ = call(capsys, *PLAN, "--only", "norm", "--seeds", "100+", "--dry-run")
    assert code == 0 and " 2 " in out
    from kimi_nb.config import load_profile
    from kimi_nb.plan import phase_studies

    found = phase_studies(load_profile(PLAN[2]), ("norm",), "100+")["norm"]
    assert [study.seeds for study in found] == [(100, 101)]
    with pytest.raises(SystemExit):
        main([*PLAN, "--seeds", "1e2"])
    assert "1e2" in capsys.readouterr().err


def test_a_phase_by_request_is_in_no_plan_that_does_not_name_it():
    """The screen of later parts costs as much as all the rest: `--only k3` asks for it, a plan of all leaves it out."""
    from kimi_nb.plan import phases, pick_phases

    assert "k3" not in pick_phases() and "k3" not in phases() and list(phases(("k3",))) == ["k3"]
    with pytest.raises(KimiError, match="phase 'k4' is unknown"):
        pick_phases(("k4",))


def test_a_dry_run_changes_nothing(place, capsys):
    """--dry-run says what would be trained and for how long, and makes no file."""
    code, out, _ = call(capsys, *PLAN, "--dry-run")
    assert code == 0 and not place.results.exists()
    n = int(re.search(r"(\d+) runs to train", out)[1])
    call(capsys, *PLAN)
    assert n == len(list(Store(place.results).records()))
    assert "0 runs to train" in call(capsys, *PLAN, "--dry-run")[1]


def test_timing_accounts_for_all_of_it(place, capsys):
    """--timing names the parts, training and evaluation apart; they make up the whole; what is no work is overhead."""
    code, out, _ = call(capsys, *PLAN, "--timing")
    parts = {m[1].strip(): float(m[2]) for m in re.finditer(r"^([a-z,:-]+(?: [a-z,:-]+)*) +([\d.]+) s", out, re.M)}
    assert (
        code == 0
        and {"training", "evaluation", "data", "notebooks", "start-up of workers", "set-up of runs"} <= parts.keys()
    )
    whole, overhead = parts.pop("in all"), parts.pop("overhead")
    assert abs(sum(parts.values()) - whole) < 0.1 * len(parts) and 0 < overhead < whole


def test_workers_start_once(place, monkeypatch, capfd):
    """A plan with two workers starts two processes, however many runs there are, and leaves none."""
    from kimi_nb.config import load_profile
    from kimi_nb.plan import phase_studies
    from kimi_nb.runner import pool as runner

    started, real = [], runner.Worker.start.__func__
    monkeypatch.setattr(
        runner.Worker, "start", classmethod(lambda cls, *a, **how: started.append(real(cls, *a, **how)) or started[-1])
    )
    every = [s for g in phase_studies(load_profile("tiny")).values() for s in g]
    records = runner.run_studies(every, Store(place.results), workers=2, progress=False)
    assert len(records) > 8 and {r.status for r in records} == {"done"}
    assert len(started) == 2 and not any(w.process.is_alive() for w in started)
    assert capfd.readouterr().err == ""


def test_a_run_whose_workers_keep_dying_is_a_failed_record(place, monkeypatch, tmp_path):
    """A run that kills its worker three times is recorded as failed, with the reason; the others are trained."""
    from kimi_nb.runner import pool as runner
    from kimi_nb.study import Arm, Study

    study = Study(
        name="deaths",
        base=tiny_run(train__steps=3),
        baseline="small",
        seeds=(0,),
        arms=(Arm("small"), Arm("huge", {"model.d_ff": 64})),
    )
    real = runner.Worker.give

    def give(self, unit):
        real(self, unit)
        if unit.members[0].arm == "huge":
            self.process.kill()

    monkeypatch.setattr(runner.Worker, "give", give)
    small, huge = runner.run_studies([study], Store(tmp_path / "s"), workers=1, progress=False)
    assert (small.status, huge.status) == ("done", "failed") and "--workers" in huge.provenance["error"]


def test_the_bar_never_passes_its_end():
    """Progress in fractions of a second adds up to exactly 100%, with no warning."""
    weights = {str(i): 0.1 + i / 7 for i in range(50)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bar = Progress(weights, dict.fromkeys(weights, 3), False)
        from tqdm import tqdm

        bar.bar = tqdm(total=sum(bar.weights.values()), file=io.StringIO(), mininterval=0)
        for k in weights:
            for step in (1, 2, 3):
                bar.step(k, step, 1.0)
            bar.finish(k)
        assert bar.bar.n == bar.bar.total and bar.line().startswith("50 of 50 runs, 100%")
        bar.bar.refresh()


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys):
    """Where stderr is no terminal, progress is whole lines, few of them."""
    with Progress({"a": 1.0, "b": 3.0}, {"a": 1000, "b": 1000}) as bar:
        bar.every = 0.05
        for k in "ab":
            for step in range(1, 1001):
                bar.step(k, step, 2.0)
            bar.finish(k)
    err = capsys.readouterr().err
    assert "\r" not in err and 1 <= err.count("\n") <= 20
    assert re.fullmatch(r"2 of 2 runs, 100%, \d\d:\d\d elapsed, 00:00 left, b loss 2.000", err.splitlines()[-1])


def test_an_executed_notebook_with_papermill(place):
    """With papermill and real kernels: two lines for two phases, nothing else on the terminal.

    The executed copy has its parameters and not its hidden tests.
    """
    place.phase("norm", cells=[*phase_cells("norm"), "#| hide\nraise AssertionError('a hidden test was executed')"])
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    r = subprocess.run([sys.executable, "-c", code, *PLAN], capture_output=True, text=True, timeout=300, check=False)
    assert (r.returncode, r.stderr) == (0, "") and sorted(executed(r.stdout)) == ["baseline", "norm"]
    made = json.loads((place.results / "notebooks" / "03_norm.ipynb").read_text())
    cells = made["cells"]
    assert made["metadata"]["papermill"]["input_path"] == str(place.path / "nbs" / "phases" / "03_norm.ipynb")
    assert any(c["metadata"].get("tags") == ["injected-parameters"] and "tiny" in "".join(c["source"]) for c in cells)
    assert not list((place.path / "nbs").rglob("*-checkpoint*"))


def test_a_text_is_not_read_more_often_than_the_profile_allows(place, capsys):
    """A plan whose runs would go through their text too often is refused in one line, before anything is trained."""
    settings = place.path / "settings.ini"
    settings.write_text(settings.read_text().replace("max_epochs = 1000", "max_epochs = 0.001"))
    code, _, err = call(capsys, *PLAN)
    assert code == 2 and re.fullmatch(
        r"kimi-nb: error: study baseline, arm \w+: [\d.]+ passes over \S+ are more than max_epochs 0.001: "
        r".*raise max_epochs in settings.ini\n",
        err,
    ), err
    assert not list(Store(place.results).records())


def test_a_study_may_keep_what_its_runs_were_on_their_way(tmp_path):
    """`keep` numbered checkpoints outlive the run, each a whole model; without it only the final one does."""
    from kimi_nb.runner import run_study
    from kimi_nb.study import Arm, Study
    from kimi_nb.train import checkpoints, load_model

    run = tiny_run(train__steps=4, train__save_every=1)
    for keep in (1, 2):
        store = Store(tmp_path / str(keep))
        study = Study(
            name="s",
            base=run,
            arms=[Arm("a"), Arm("b", {"train.lr": 0.5 * run.train.lr})],
            baseline="a",
            seeds=[0],
            keep=keep,
        )
        for record in run_study(study, store, executor="inprocess", progress=False):
            kept = checkpoints(store.folder(record.run_id) / "checkpoints")
            assert [p.name for p in kept] == ([] if keep == 1 else ["step_00000002", "step_00000003"])
            assert all(load_model(p)[2].train.lr == record.config["train"]["lr"] for p in kept)


def test_timing_says_what_the_notebooks_did_and_what_is_overhead(tmp_path):
    """Seconds of an executed notebook by what its cells are tagged with.

    The rest of its time, the kernel's start included, is the remainder.
    """
    import nbformat

    cell = nbformat.v4.new_code_cell
    cells = [
        cell("a", metadata=dict(tags=["measuring"], papermill=dict(duration=3.0))),
        cell("b", metadata=dict(papermill=dict(duration=1.0))),
        cell("c", metadata=dict(tags=["scoring", "hide-input"], papermill=dict(duration=2.0))),
    ]
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata=dict(papermill=dict(duration=8.0))), file := tmp_path / "n.ipynb"
    )
    spent = kimi_nb.plan.run.time_by_part(file)
    assert {k: v for k, v in spent.items() if v} == {
        kimi_nb.plan.run.ANALYSIS["measuring"]: 3.0,
        kimi_nb.plan.run.ANALYSIS["scoring"]: 2.0,
        "worked examples, tables and figures": 1.0,
        "kernels and papermill": 2.0,
    }
    said = kimi_nb.plan.run.timing(
        kimi_nb.plan.run.PlanReport(
            "tiny", seconds={"training": 10.0, "notebooks": 4.0, "waiting for the last": 1.0}, inside=spent
        )
    )
    assert re.search(r"^training +10\.0 s  66\.7%$", said, re.M) and re.search(
        r"^notebooks: kernels and papermill +1\.0 s", said, re.M
    )
    assert re.search(r"^overhead +2\.0 s  13\.3%", said, re.M)  # the wait, and the kernels' quarter of the notebooks


def test_kernels_share_the_cores(monkeypatch):
    """Two kernels at a time get half the cores each; a number that the user has set stands."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(kimi_nb.plan.run, "share_of_cores", lambda n: 8 // n)
    with kimi_nb.plan.run._threads(2):
        assert os.environ["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with kimi_nb.plan.run._threads(2):
        assert os.environ["OMP_NUM_THREADS"] == "3"


def test_profiles_fit_their_budgets(monkeypatch):
    """What the published runs of `quick` took on two cores leaves room for the notebooks within its declared budget.

    `smoke` is a small part of it.
    """
    from kimi_nb.config import load_profile
    from kimi_nb.plan import phase_studies, pick_phases, published
    from kimi_nb.plan.publish import records_of
    from kimi_nb.runner import TUNING_SEEDS, distinct, tuned

    monkeypatch.setenv("KIMI_NB_SETTINGS", str(REPO / "settings.ini"))
    profiles = {name: tuned(load_profile(name), published("quick"), run=False) for name in ("smoke", "quick")}
    planned = {
        name: [p.run for p in distinct(s for group in phase_studies(profile).values() for s in group)]
        for name, profile in profiles.items()
    }
    records = records_of(published("quick"), pick_phases())  # without what runs by request alone
    took = {r.run_id: r.metrics["seconds"] for r in records}
    compared = [r.run_id for r in records if r.run.seed not in TUNING_SEEDS]
    # by number: the text of another Python gives other ids; a search goes on for as long as it must
    assert 80 <= sum(run.seed not in TUNING_SEEDS for run in planned["quick"]) == len(compared)
    assert sum(took.values()) / 2 / 60 < 0.8 * load_profile("quick").budget_minutes
    steps = {name: sum(r.train.steps * r.tokens_per_step for r in runs) for name, runs in planned.items()}
    assert len(planned["smoke"]) >= 14 and steps["smoke"] < 0.02 * steps["quick"]


def test_a_grid_of_a_phase_that_does_not_exist_is_refused(tmp_path):
    """A profile takes any phase's name; the plan knows which there are, and says which was meant."""
    from kimi_nb.config import load_profile
    from kimi_nb.plan import PlanError, phase_studies

    text = (REPO / "settings.ini").read_text()
    (tmp_path / "settings.ini").write_text(text + "\n[mine]\nnrom.train.lr = 1e-3, 2e-3\n")
    profile = load_profile("mine", tmp_path / "settings.ini")
    assert profile.grids["nrom"] == {"train.lr": (1e-3, 2e-3)}
    with pytest.raises(PlanError, match=r"\[mine\]: nrom.train.lr is not a setting of a phase: did you mean norm"):
        phase_studies(profile)


def test_phases_are_found_in_the_plans_order():
    """Nothing lists them: their notebooks do."""
    from kimi_nb.plan import phases

    names = list(phases())
    assert names[0] == "baseline" and "combined" in names and len(set(names)) == len(names)
