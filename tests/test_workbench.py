"""The workbench where it lives: JupyterLab in a real browser; and runs that outlive the kernel that started them."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny import settings_text, tiny_run, wait_until

from kimi_nb.runner import ACTIVE, LiveRun, live_runs, start_run
from kimi_nb.study import Store

REPO = Path(__file__).resolve().parents[1]
TEXT = "".join(
    f"The {a} {b} looks at the {c} and says that {n} is more than {n - 1}.\n"
    for n in range(1, 30)
    for a in ("old", "small", "grey")
    for b in ("cat", "dog")
    for c in ("moon", "sea")
)


def chromium():
    """Path of a Chromium, or None."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    with contextlib.suppress(Exception):
        from playwright.sync_api import sync_playwright

        with sync_playwright() as p:
            if Path(p.chromium.executable_path).exists():
                return p.chromium.executable_path
    return None


@contextlib.contextmanager
def jupyterlab(folder, root=None, **environment):
    """A server over `root` or a copy of the notebook, with settings and workspace of its own; gives its address."""
    if root is None:
        root = folder / "nbs"
        root.mkdir()
        shutil.copy(REPO / "nbs" / "workbench.ipynb", root)
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps(dict(checkForUpdates=False, fetchNews="false", doNotDisturbMode=True)))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = dict(
        JUPYTER_CONFIG_DIR="config",
        JUPYTER_DATA_DIR="data",
        JUPYTER_RUNTIME_DIR="runtime",
        JUPYTERLAB_SETTINGS_DIR="settings",
        JUPYTERLAB_WORKSPACES_DIR="workspaces",
        IPYTHONDIR="ipython",
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "KIMI_NB_WIDGETS")}
    options = (
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={root}",
    )
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=clean | {k: str(folder / v) for k, v in places.items()} | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"

    def answers():
        assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{address}/api/status").status == 200

    try:
        wait_until(answers, 60, "the server's answer")
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


COUNT_CLICKS = "addEventListener('click', e => { window.clicks = (window.clicks ?? 0) + e.isTrusted }, true)"


@contextlib.contextmanager
def browser_page(request):
    """A page that counts the clicks of whoever uses it, and what its console complains of."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = chromium()
    if browser_path is None:
        pytest.skip("needs Chromium: playwright install chromium")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page, problems = browser.new_page(viewport=dict(width=1280, height=1000)), []
        page.set_default_timeout(60_000)
        page.add_init_script(COUNT_CLICKS)
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: problems.append(str(e)))
        request.addfinalizer(lambda: print("browser's console:", problems))
        yield page, problems
        browser.close()


@contextlib.contextmanager
def workbench_in_a_browser(folder, request, settings, results):
    """The notebook opened in JupyterLab, its cells asked to run; gives the page, and what the browser complains of."""
    with (
        jupyterlab(folder, KIMI_NB_SETTINGS=str(settings), KIMI_NB_RESULTS=str(results)) as address,
        browser_page(request) as (page, problems),
    ):
        page.goto(f"{address}/lab/tree/workbench.ipynb")
        run_all(page)
        yield page, problems


SHOWN = ".knb-workbench:not(.jupyter-widgets-disconnected) [data-cost=total_parameters]"


def run_all(page):
    """Two clicks; asked to run before it has its kernel, JupyterLab shows a dialog."""
    page.wait_for_function("document.body.innerText.includes('| Idle')")
    page.click('.lm-MenuBar-itemLabel:text-is("Run")')
    page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')


FOLD = ".knb-fold :text('settings')"
POINTS = "+(document.querySelector('.knb-curves svg[data-points]')?.dataset.points ?? 0)"


def steps_of(live):
    """How many steps its journal holds."""
    return live.journal.read_text().count("train_loss") if live.journal.exists() else 0


@pytest.mark.timeout(170)
def test_a_person_chooses_trains_and_compares(tmp_path, request):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    settings = tmp_path / "settings.ini"
    wanted = {
        "data__corpus": str(text),
        "data__tokenizer": "char",
        "model__ffn__kind": "moe",
        "train__steps": 1000,
        "train__eval_every": 200,
        "train__save_every": 0,
    }
    settings.write_text(settings_text(**wanted).replace("[tiny]", "[quick]").replace("data.num_documents = 60\n", ""))
    results = tmp_path / "results"
    store = Store(results)
    with workbench_in_a_browser(tmp_path, request, settings, results) as (page, problems):
        # while the kernel starts: another run, to compare with later
        from kimi_nb.config import load_profile
        from kimi_nb.runner import run_one

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KIMI_NB_SETTINGS", str(settings))
            base = load_profile("quick").base
        other = run_one(base, store, "other", threads=1)
        assert other.status == "done"

        count = page.locator("[data-cost=total_parameters]")
        count.wait_for()
        before = count.inner_text()
        page.click(FOLD)
        page.click('.knb-model-attention-kind button:text-is("mla")')
        page.wait_for_function(
            "before => document.querySelector('[data-cost=total_parameters]').innerText !== before", arg=before
        )
        between = count.inner_text()
        page.click('.knb-model-moe-router button:text-is("noaux_tc")')
        page.wait_for_selector(".knb-diagram :text('noaux_tc')")
        page.locator(".knb-model-moe-n-shared-experts input").fill("1")
        page.keyboard.press("Tab")
        page.wait_for_function(
            "before => document.querySelector('[data-cost=total_parameters]').innerText !== before", arg=between
        )
        assert "needs rope" in page.locator(".knb-model-position-kind .knb-note").inner_text()
        assert page.locator('.knb-model-position-kind button:text-is("learned")').is_disabled()

        page.click(".knb-train")
        chosen = base.override(
            {"model.attention.kind": "mla", "model.moe.router": "noaux_tc", "model.moe.n_shared_experts": 1}
        )
        live, steps, shown = LiveRun(store, chosen.run_id), 0, 0
        for _ in range(2):  # the run is held twice: however slow the page, it has to follow
            on = lambda past=steps: live.apart.alive and live.status() == "training" and steps_of(live) > past
            wait_until(on, 60, "a step")
            live.pause()
            wait_until(lambda: live.status() == "paused", 60, "the pause")
            steps = steps_of(live)
            assert steps < 1000
            shown = page.wait_for_function(
                f"() => {{ const n = {POINTS}; return n > {shown} && n < 2000 && n }}"
            ).json_value()
            live.start()
        page.wait_for_selector('.knb-progress [data-state="done"]', timeout=90_000)
        page.wait_for_function(f"() => {POINTS} > {shown}")

        record = store.get(chosen.run_id)
        assert record is not None and record.status == "done" and not record.stale and record.metrics["steps"] == 1000
        assert f"{record.metrics['total_parameters']:,}" != before and store.verify() == []

        page.click(".knb-pin:not([disabled])")
        page.wait_for_selector(f".knb-compare code:text-is('{chosen.run_id}')")
        row = page.locator(".knb-run", has=page.locator(f"[data-run='{base.run_id}']"))
        row.locator("input[type=checkbox]").check()
        page.wait_for_selector(f".knb-compare code:text-is('{base.run_id}')")
        page.click(".knb-judge-these")
        page.wait_for_selector(".knb-compare .verdict")
        table = page.locator(".knb-compare").inner_text()
        assert "MLA + Kimi's router" in table and "shared experts" in table and "one shared seed" in table

        row.get_by_role("button", name="open").click()  # its configuration back in the picker
        page.wait_for_selector('.knb-model-attention-kind button.mod-active:text-is("mha")')
        assert problems == []


def open_tab(page, title):
    page.click(f'.knb-workbench .lm-TabBar-tabLabel:text-is("{title}")')


WIDER = """() => {
    const right = document.querySelector('.knb-workbench').getBoundingClientRect().right + 1
    const scrolls = e => e.closest('.wide, select, pre, .knb-compare svg')
    return [...document.querySelectorAll('.knb-workbench *')]
        .filter(e => e.offsetParent && !scrolls(e) && e.getBoundingClientRect().right > right)
        .map(e => `${e.tagName} ${e.className} ${e.innerText.slice(0, 30)}`)
}"""


CUT = """() => [...document.querySelectorAll('.knb-workbench .lm-TabBar-tabLabel, .knb-grid > *, .knb-plan td')]
    .filter(e => e.offsetParent && (e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight + 4))
    .map(e => e.innerText)"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_newcomer_reads_a_verdict_and_nothing_is_lost(tmp_path, request):
    """Over the published run: five clicks to a verdict, a narrow page, a refused value, a restart, a second tab."""
    from kimi_nb.plan import open_published

    results = open_published("quick", tmp_path / "results").path
    with workbench_in_a_browser(tmp_path, request, REPO / "settings.ini", results) as (page, problems):
        page.click(".knb-part-mla")  # the third click, after Run and Run All Cells
        page.click(".knb-part-muon")
        page.click(".knb-judge")
        verdict = page.locator(".knb-workbench .knb-verdict .verdict")
        verdict.wait_for()
        words = verdict.inner_text()
        assert re.match(r"MLA \+ Muon (beats|loses to) the baseline by \d", words) and "95% interval" in words
        assert 3 <= page.evaluate("window.clicks") <= 5, "clicks from the opened lab to the verdict"
        assert "seed by seed: " in words and verdict.get_attribute("data-seeds") == "5"

        # the chart says its values, and a stretch of it can be looked at closely
        open_tab(page, "Compare")
        chart = page.locator(".knb-compare .panels svg[data-axes]").first
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.4, middle)
        page.mouse.move(box["x"] + box["width"] * 0.5, middle)
        assert "MLA + Muon" in chart.locator(".knb-hover").text_content()
        inner = chart.locator("svg")
        whole = inner.get_attribute("viewBox")
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=3)
        page.mouse.up()
        assert float(inner.get_attribute("viewBox").split()[2]) < 0.7 * float(whole.split()[2])
        page.mouse.dblclick(box["x"] + box["width"] / 2, middle)
        assert inner.get_attribute("viewBox") == whole

        # one column, nothing cut off at the side
        page.set_viewport_size(dict(width=800, height=900))
        for title in ("Choose", "Train", "Compare", "Explore", "Plan"):
            open_tab(page, title)
            if title == "Plan":
                page.wait_for_selector("[data-plan]")
            assert page.evaluate(WIDER) == [], title
            assert page.evaluate(CUT) == [], f"{title}: words that end before their end"
        page.set_viewport_size(dict(width=1280, height=1000))

        # what is refused is not trained
        open_tab(page, "Choose")
        page.click(FOLD)
        heads, start = page.locator(".knb-model-n-heads input"), page.locator(".knb-train")
        heads.fill("7")
        page.keyboard.press("Tab")
        page.wait_for_selector(".knb-chosen :text('1 setting is not possible')")
        page.wait_for_selector(".knb-train:disabled")
        heads.fill("4")
        page.keyboard.press("Tab")
        page.wait_for_selector(".knb-train:not(:disabled)")

        # a run that the store has not, and a kernel that is restarted under it
        page.click(".knb-part-dense")
        page.wait_for_selector(".knb-chosen :text('not trained yet')")
        start.click()
        page.wait_for_selector(".knb-progress [data-state]")
        page.click('.lm-MenuBar-itemLabel:text-is("Kernel")')
        page.click('.lm-Menu-itemLabel:text-is("Restart Kernel…")')
        page.click(".jp-Dialog button:has-text('Restart')")
        page.wait_for_selector(".knb-workbench.jupyter-widgets-disconnected")
        shown = page.evaluate("getComputedStyle(document.querySelector('.knb-workbench'), '::before').content")
        assert "run the cell again" in shown
        run_all(page)
        page.wait_for_selector(SHOWN)
        name = "MLA + Muon + dense feed-forward"
        assert name in page.locator(".knb-chosen").inner_text(), "what was chosen is there again"
        open_tab(page, "Train")
        page.wait_for_selector(f".knb-progress :text('{name}')")
        page.wait_for_selector('.knb-progress [data-state="done"]', timeout=150_000)

        # a second tab has the same desk
        second = page.context.browser.new_page()
        second.set_default_timeout(60_000)
        second.goto(page.url)
        run_all(second)
        second.wait_for_selector(SHOWN)
        assert name in second.locator(".knb-chosen").first.inner_text()
        assert problems == []


def found_and_drawn(store):
    """What every phase found, without the times of its writing; and each figure's bytes."""
    from kimi_nb.study import outcomes_of

    own = {"finished", "mark", "key", "digest"}
    told = {name: outcome.model_dump(exclude=own) for name, outcome in outcomes_of(store).items()}
    figures = {path.name: path.read_bytes() for path in (store.path / "plots").rglob("*.png")}
    return told, figures


def ran_whole(path):
    """Whether every code cell of a saved notebook ran, and none failed."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    failed = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert failed == []
    return all(cell["execution_count"] for cell in cells)


def run_phase(page, notebook, outcome):
    """The menu's Run All Cells; ends when the phase has written what it found and the notebook is saved."""
    before = outcome.read_bytes()
    run_all(page)
    wait_until(lambda: outcome.read_bytes() != before, 300, "the phase's outcome")
    page.wait_for_function("document.body.innerText.includes('| Idle')")

    def saved():
        page.keyboard.press("Control+s")
        time.sleep(1)
        return ran_whole(notebook)

    wait_until(saved, 60, "the saved notebook")


@pytest.mark.slow
@pytest.mark.timeout(560)
@pytest.mark.parametrize("phase", ["norm", "combined"])
def test_run_all_in_the_lab_leaves_what_was_found(tmp_path, request, phase):
    """A phase over the published quick run: trained, found and drawn is what was there, and the console is silent."""
    from kimi_nb.lab import lay_out

    desk = lay_out(tmp_path / "results")
    store = Store(desk.results)
    (notebook,) = (desk.notebook.parent / "phases").glob(f"*_{phase}.ipynb")
    runs = sorted(folder.path.name for folder in store.run_folders(aside=True))
    published, drawn = found_and_drawn(store)
    with (
        jupyterlab(tmp_path, desk.root, KIMI_NB_RESULTS=str(desk.results)) as address,
        browser_page(request) as (page, problems),
    ):
        page.goto(f"{address}/lab/tree/lab/phases/{notebook.name}")
        run_phase(page, notebook, desk.results / "phases" / "quick" / f"{phase}.json")
        assert problems == []
    found, now = found_and_drawn(store)
    told = lambda outcome: {f["id"]: (f["claim"], f["word"], f["n"]) for f in outcome["findings"]}
    sizes = lambda outcome: {f["id"]: f["diff"] or 0.0 for f in outcome["findings"]}
    assert found[phase]["profile"] == "quick" and told(found[phase]) == told(published[phase])
    assert sizes(found[phase]) == pytest.approx(sizes(published[phase]), rel=0.01)  # published curves are rounded
    assert found | {phase: None} == published | {phase: None}
    assert {file for file in drawn if now[file] != drawn[file]} <= {Path(f).name for f in found[phase]["figures"]}
    assert sorted(folder.path.name for folder in store.run_folders(aside=True)) == runs


SCRIPTS = (
    "<img src=x onerror=window.reached=1>",
    '"><svg onload=window.reached=1>',
    "</pre><iframe srcdoc='<script>parent.reached=1</script>'></iframe>",
    "</style><script>window.reached=1</script>",
)


def store_of_strangers(results):
    """Records as somebody else might send them: scripts in the corpus, the tokenizer, an error, a metric's name."""
    from kimi_nb.config import RunConfig
    from kimi_nb.study import Record

    store, runs = Store(results), []
    for seed, script in enumerate(SCRIPTS):
        data = RunConfig().data.model_copy(update=dict(corpus=script, tokenizer=script))
        run = RunConfig().model_copy(update=dict(data=data, seed=seed))
        curve = dict(step=[1, 2, 3], value=[3.0, 2.0, 1.0 + seed])
        record = Record.of(run, "done", {"test_bpb": 2.0 + seed, script: 1.0}, dict(train_loss=curve))
        store.put(record, script)
        runs.append(run)
    failed = RunConfig().model_copy(update=dict(seed=99))
    store.put(Record.of(failed, "failed", provenance=dict(error=SCRIPTS[0])), SCRIPTS[1])
    return runs, failed


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_scripts_in_records_names_and_corpora_are_text(tmp_path, request):
    corpus = tmp_path / "<img src=x onerror=window.reached=1>.txt"
    corpus.write_text(TEXT)
    settings, results = tmp_path / "settings.ini", tmp_path / "<svg onload=window.reached=1> results"
    wanted = {"data__corpus": str(corpus), "data__tokenizer": "char"}
    settings.write_text(settings_text(**wanted).replace("[tiny]", "[quick]").replace("data.num_documents = 60\n", ""))
    runs, failed = store_of_strangers(results)
    with workbench_in_a_browser(tmp_path, request, settings, results) as (page, _):
        page.locator("[data-cost=total_parameters]").wait_for()
        page.click(FOLD)
        page.locator(".knb-data-corpus input").fill(SCRIPTS[0])
        page.keyboard.press("Tab")
        page.wait_for_function("s => document.querySelector('.knb-picker').textContent.includes(s)", arg=SCRIPTS[0])

        page.click('.lm-TabBar-tabLabel:text-is("Compare")')
        for run in runs:
            row = page.locator(".knb-run", has=page.locator(f"[data-run='{run.run_id}']"))
            row.locator("input[type=checkbox]").check()
            page.wait_for_selector(f".knb-compare code:text-is('{run.run_id}')")
        shown = page.locator(".knb-compare").text_content()
        assert all(script in shown for script in SCRIPTS), "what was sent is shown as it was written"

        page.click('.lm-TabBar-tabLabel:text-is("Train")')
        page.locator(".widget-dropdown:has-text('watch') select").select_option(index=1)
        page.wait_for_selector(".knb-progress [data-state]")
        for other in [failed, *runs]:
            label = page.locator(f".widget-dropdown:has-text('watch') option:text('{other.run_id}')").inner_text()
            page.locator(".widget-dropdown:has-text('watch') select").select_option(label=label)
            page.wait_for_selector(f".knb-progress code:text-is('{other.run_id}')")
        page.click('.lm-TabBar-tabLabel:text-is("Explore")')
        page.wait_for_selector('.widget-label:text-is("model")')
        page.click('.lm-TabBar-tabLabel:text-is("Plan")')
        page.wait_for_selector(".knb-plan .bad")  # no phases beside these settings: said in a line
        assert page.evaluate("window.reached") is None
        assert page.locator(".knb img, .knb iframe, .knb script").count() == 0


def test_menus_are_the_registries_of_the_model_and_show_what_is_added(monkeypatch):
    """What can be chosen is what the model has; and a kind that is added is drawn in its own words."""
    from kimi_nb.config import RunConfig
    from kimi_nb.lab import block_svg, settings_of
    from kimi_nb.model import ATTENTIONS, FEED_FORWARDS, NORMS, ROUTERS, Attention

    tables = {"attention.kind": ATTENTIONS, "norm.kind": NORMS, "moe.router": ROUTERS, "ffn.kind": FEED_FORWARDS}
    known = settings_of()
    for path, table in tables.items():
        assert set(known[f"model.{path}"].words) == set(table), path
    monkeypatch.setitem(NORMS, "novel", type("NovelNorm", (), dict(words=lambda config: "a < norm")))
    monkeypatch.setitem(ATTENTIONS, "novel", type("NovelAttention", (Attention,), dict(kind="novel")))
    parts = {
        part: getattr(RunConfig().model, part).model_copy(update=dict(kind="novel")) for part in ("norm", "attention")
    }
    run = RunConfig().model_copy(update=dict(model=RunConfig().model.model_copy(update=parts)))
    shown = block_svg(run, RunConfig())
    assert shown.count("a &lt; norm") == 3 and "novel: 4 heads" in shown


def test_a_process_ends_cleanly_while_a_picker_still_counts():
    """Counting runs PyTorch in a thread; a process that ended in the middle of it aborted (status 134)."""
    code = """
import time
from kimi_nb.lab import Picker, picker

count = picker.cost_rows
def slow_count(run, frame):
    time.sleep(0.3)
    print("counted", flush=True)
    return count(run, frame)

picker.cost_rows = slow_count
Picker(only=["model.norm.kind"]).widget
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["counted"] * 2), done.stderr


def test_a_run_outlives_the_kernel_that_started_it(tmp_path):
    run, store = tiny_run(train__steps=1500, train__save_every=0), Store(tmp_path / "results")
    code = f"""
import time
from kimi_nb.config import RunConfig
from kimi_nb.runner import start_run
from kimi_nb.study import Store

run = RunConfig.load({str(tmp_path / "run.json")!r})
start_run(Store({str(store.path)!r}), run, threads=1)
print("started", flush=True)
time.sleep(60)"""
    run.save(tmp_path / "run.json")
    kernel = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert kernel.stdout.readline() == b"started\n"
    os.killpg(kernel.pid, signal.SIGKILL)  # what Jupyter does to a kernel that it restarts
    kernel.wait()

    assert [live.run_id for live in live_runs(store)] == [run.run_id]  # as the next kernel finds it
    live = LiveRun(store, run.run_id)
    wait_until(lambda: live.journal.exists() and live.journal.stat().st_size, 60, "the first step")
    assert live.status() in ACTIVE
    live.pause()
    time.sleep(0.2)
    live.start(threads=1)  # "go on" while it is pausing: it goes on, whether it had stopped by then or not
    steps = live.journal.read_text().count("train_loss")
    wait_until(lambda: live.journal.read_text().count("train_loss") > steps + 100, 60, "more steps")
    live.pause()
    live.stop()  # at once: the end of the step must not be taken for a pause that goes on
    assert live.wait(30) == "stopped"
    stopped_at = live.journal.read_text().count("train_loss")
    assert 0 < stopped_at < 1500 and [live.run_id for live in live_runs(store)] == [run.run_id]
    start_run(store, run, threads=1)
    assert live.wait(60) == "done"
    record = store.get(run.run_id)
    assert record.metrics["steps"] == 1500 and "goes on after" in (live.folder / "training_log.txt").read_text()
    assert live_runs(store) == [] and start_run(store, run).status() == "done"


@pytest.mark.slow
def test_a_plan_is_started_from_the_notebook_and_followed(tmp_path, monkeypatch):
    from tiny import Workplace

    from kimi_nb.lab import PlanState, plan_html

    place = Workplace(tmp_path)
    for name, value in place.environment().items():
        monkeypatch.setenv(name, value)
    state = PlanState("tiny", Store(place.results))
    before = state.rows()
    assert sum(r["done"] for r in before) == 0 and all(
        r["left"] == r["runs"] and r["seconds"] > 0 for r in before if r["runs"]
    )
    state.start()
    wait_until(lambda: sum(r["done"] for r in state.rows()) > 0, 90, "the first run")
    again = PlanState("tiny", Store(place.results))  # another kernel
    assert again.apart.alive
    wait_until(lambda: not again.apart.alive, 120, "the plan's end")
    rows = again.rows()
    assert [(r["left"], r["failed"], r["reused"]) for r in rows] == [(0, 0, 0)] * len(rows), again.apart.said()
    assert plan_html(rows).count("RQ0 ") == 2 and "not running" in plan_html(rows), state.apart.log.read_text()[-1500:]
    again.start()
    wait_until(lambda: not again.apart.alive, 120, "the second plan's end")
    assert all(r["reused"] == r["runs"] for r in again.rows())


def test_toggling_answers_at_once():
    """Every choice of every kind, with many layers and experts: the counts are there within a fifth of a second."""
    from kimi_nb.config import RunConfig
    from kimi_nb.lab import Picker

    picker, taken = Picker(RunConfig.preset("small"), wait=True), {}

    def toggled(button):
        start = time.thread_time()  # others share the machine, and threads of other tests the process
        button.value = True
        seconds = time.thread_time() - start
        picker.run = picker.base
        return seconds

    for path, row in picker._rows.items():
        for word, button in row.buttons.items():
            if not button.disabled and not button.value:  # the better of two: a collection of garbage may fall into one
                taken[f"{path} {word}"] = min(toggled(button) for _ in range(2))
    assert len(taken) > 15 and max(taken.values()) < 0.2, max(taken, key=taken.get)


def test_without_a_front_end_there_is_a_page_and_no_control(tmp_path, monkeypatch):
    from kimi_nb.lab import open_workbench

    monkeypatch.setenv("KIMI_NB_SETTINGS", str(REPO / "settings.ini"))
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG", "KIMI_NB_WIDGETS"):
        monkeypatch.delenv(name, raising=False)
    shown = open_workbench(str(tmp_path), profile="smoke")._repr_mimebundle_()
    assert (
        set(shown) == {"text/html", "text/plain"}
        and "<svg" in shown["text/html"]
        and "no record" not in shown["text/plain"]
    )
    monkeypatch.setenv("JPY_SESSION_NAME", "workbench.ipynb")
    shown = open_workbench(str(tmp_path), profile="smoke")._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown


def test_the_command_shown_trains_exactly_the_chosen_run(tmp_path, monkeypatch):
    import shlex

    from kimi_nb.cli import build_parser, chosen_run
    from kimi_nb.config import RunConfig, load_profile
    from kimi_nb.lab import command_line

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KIMI_NB_SETTINGS", str(REPO / "settings.ini"))
    quick = load_profile("quick").base
    runs = [
        RunConfig(),
        RunConfig.preset("kimi").override(
            {
                "train.lr": 3e-7,
                "train.optimizer.betas": (0.9, 0.99),
                "data.corpus": "it's a file.txt",
                "model.tie_embeddings": False,
            }
        ),
        quick,
        quick.override({"model.attention.kind": "mla", "seed": 3}),
    ]
    for run in runs:
        text = command_line(run)
        if "<<" in text:  # what the shell would write
            (tmp_path / "run.yaml").write_text(text.partition("<<'END'\n")[2].partition("END\n")[0])
        argv = shlex.split(text.splitlines()[-1] if "<<" in text else text.replace("\\\n", " "))[1:]
        assert chosen_run(build_parser(argv).parse_args(argv)) == run, text


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_app_is_the_workbench_alone(tmp_path):
    """`kimi-nb lab --app`: no cells, nothing to run; what was chosen is there again when the page is opened anew."""
    pytest.importorskip("voila", reason="needs voila")
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if chromium() is None:
        pytest.skip("needs Chromium: playwright install chromium")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = "import sys; from kimi_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ("lab", "--app", "--no-browser", f"--port={port}", "--results", str(tmp_path / "results"))
    clean = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "KIMI_NB_WIDGETS")}
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", code, *options],
            cwd=tmp_path,
            env=clean | dict(KIMI_NB_SETTINGS=str(REPO / "settings.ini")),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def answers():
        assert server.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), 1).close() or True

    try:
        wait_until(answers, 90, "the server's answer")
        with sync.sync_playwright() as p:
            page = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"]).new_page()
            page.set_default_timeout(90_000)
            page.goto(f"http://127.0.0.1:{port}/")
            page.click(".knb-part-muon")
            page.wait_for_selector(".knb-chosen :text('Muon')")
            page.reload()
            page.wait_for_selector(".knb-chosen :text('Muon')")
            assert "open_workbench" not in page.content(), "the cell's code"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
