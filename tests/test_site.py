"""The site: it builds without a warning, every link leads somewhere, and a browser finds nothing wrong on any page.

What asks for the built site is slow: two minutes of building are made once, in `make test-slow`.
"""

import ast
import base64
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

REPO = Path(__file__).resolve().parents[1]
NBS = REPO / "nbs"
PAGES = sorted(
    p.relative_to(NBS).with_suffix("").as_posix()
    for p in NBS.rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts)
)
PHASES = [p for p in PAGES if p.startswith("phases/")]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; built once for all workers, or taken from $KIMI_NB_SITE."""
    if os.environ.get("KIMI_NB_SITE"):
        return Path(os.environ["KIMI_NB_SITE"])
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with FileLock(base / "site.lock"):
        if not (base / "site.log").exists():
            command = [
                sys.executable,
                "-m",
                "sphinx",
                "-W",
                "--keep-going",
                "-q",
                "-j",
                "auto",
                "-c",
                "docs",
                "-d",
                str(base / "trees"),
                "nbs",
                str(base / "site"),
            ]
            done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
            (base / "site.log").write_text(json.dumps([done.returncode, done.stderr[-4000:]]))
    code, said = json.loads((base / "site.log").read_text())
    assert code == 0, f"the site does not build without warnings:\n{said}"
    return base / "site"


class Seen(HTMLParser):
    """Links, pictures, anchors and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.sources, self.ids, self.text, self.tables, self._hidden = [], [], set(), [], 0, 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if a.get("id"):
            self.ids.add(a["id"])
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in ("img", "script") and a.get("src"):
            self.sources.append(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") in ("stylesheet", "icon"):
            self.sources.append(a["href"])
        self.tables += tag == "table"
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._hidden:
            self.text.append(data)


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Seen]:
    return {p.relative_to(site).as_posix(): Seen(p) for p in sorted(site.rglob("*.html")) if "_static" not in p.parts}


@pytest.mark.slow
def test_every_notebook_has_a_page_without_directives(pages):
    """No page is missing, none shows nbdev's directives, and each module's page ends with its reference."""
    assert [p for p in PAGES if f"{p}.html" not in pages] == []
    assert [name for name, page in pages.items() if re.search(r"^\s*#\s*\|", "".join(page.text), re.M)] == []
    exporting = [p for p in PAGES if re.search(r"#\|\s*default_exp", (NBS / f"{p}.ipynb").read_text(encoding="utf-8"))]
    assert [
        p for p in exporting if "Everything kimi_nb." not in re.sub(r"\s+", " ", "".join(pages[f"{p}.html"].text))
    ] == []


@pytest.mark.slow
def test_no_link_or_picture_is_broken(site, pages):
    """Every link of every page leads to a page and a place on it; every picture and script is there."""
    wrong = []
    for name, page in pages.items():
        for target in [*page.links, *page.sources]:
            parts = urlsplit(target)
            if parts.scheme or target.startswith("//"):
                continue
            path = (site / name).parent / unquote(parts.path) if parts.path else site / name
            path = path / "index.html" if path.is_dir() else path
            if not path.exists():
                wrong.append(f"{name}: {target}")
            elif (
                parts.fragment
                and path.suffix == ".html"
                and unquote(parts.fragment) not in pages[path.resolve().relative_to(site.resolve()).as_posix()].ids
            ):
                wrong.append(f"{name}: no place {target}")
    assert wrong == []
    outside = sorted({urlsplit(s).netloc for page in pages.values() for s in page.sources if urlsplit(s).netloc})
    assert outside == [] or not (REPO / "docs" / "_static" / "vendor").is_dir(), f"pages load from {outside}"


def test_what_is_published_is_whole_and_small():
    """Every published bundle opens, fits the limit, and holds outcome, notebook and figures of each phase it names."""
    from kimi_nb.plan import LIMIT, published_profiles, read_bundle

    for profile in published_profiles(REPO):
        about, files = read_bundle(profile, REPO)
        assert sum(map(len, files.values())) <= LIMIT
        for phase in about["phases"]:
            outcome = json.loads(files[f"data/records/{profile}/phases/{phase}.json"])
            assert outcome["profile"] == profile and any(re.search(rf"/\d\d_{phase}\.ipynb$", name) for name in files)
            assert [f for f in outcome["figures"] if f"figures/{profile}/{Path(f).name}" not in files] == []


def meaning(source: str) -> str:
    """What a cell does, whatever its layout and imports are."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [s for s in node.body if not isinstance(s, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.dump, tree.body))


def said_in(output):
    """An output's Markdown, '' where it has none."""
    return "".join(output.get("data", {}).get("text/markdown", ""))


@pytest.mark.slow
def test_phase_pages_show_the_published_results(pages):
    """Tables and figures of a published reference run stand on the phases' pages, with a line on their origin."""
    from kimi_nb.plan import published_profiles

    shown = 0
    for phase in PHASES:
        held = published_profiles(REPO, phase.partition("_")[2])
        profile = "quick" if "quick" in held or not held else held[-1]
        folder = REPO / "data" / "records" / profile / "notebooks"
        page, executed = pages[f"{phase}.html"], folder / f"{Path(phase).name}.ipynb"
        text = re.sub(r"\s+", " ", "".join(page.text))
        if not executed.exists():
            assert "No reference run of the profile" in text, phase
            continue
        ran = {
            meaning(c["source"]): c
            for c in json.loads(executed.read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == "code" and not c["source"].startswith("#| hide")
        }
        now = {
            meaning("".join(c["source"]))
            for c in json.loads((NBS / f"{phase}.ipynb").read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == "code"
        }
        same = [c for text, c in ran.items() if text in now]
        pictures = sum("image/png" in o["data"] for c in same for o in c["outputs"] if "data" in o)
        tables = sum(
            any(re.search(r"\| ?---", said_in(o)) for o in c["outputs"]) for c in same
        )  # sentences are no tables
        assert sum("_images/" in s for s in page.sources) >= pictures, (
            f"{phase}: pictures of the reference run are missing"
        )
        assert page.tables >= tables, f"{phase}: tables are missing"
        assert "Results of the published reference run" in text and "commit" in text, phase
        changed = [c for text, c in ran.items() if c["outputs"] and text not in now]
        assert not changed or "edited since" in text, f"{phase}: changed cells are shown without a word"
        shown += pictures + tables
    assert shown or not published_profiles(REPO), "no page shows a result"


@pytest.mark.slow
def test_phase_pages_show_other_published_sizes(pages):
    """A phase that other profiles hold has a section on each, with every claim and main figure; no other has one."""
    from kimi_nb.plan import published, published_profiles, read_bundle
    from kimi_nb.report import Evidence, main_figures

    evidence = {profile: Evidence(published(profile, REPO)) for profile in published_profiles(REPO)}
    for phase in PHASES:
        page, name = pages[f"{phase}.html"], phase.partition("_")[2]
        text = re.sub(r"\s+", " ", "".join(page.text))
        others = [p for p in published_profiles(REPO, name) if p != "quick"]
        if "quick" not in published_profiles(REPO, name):
            continue
        heads = re.findall(r"The same at (?:another|a larger|a smaller) size \(profile ([\w-]+)\)", text)
        assert list(dict.fromkeys(heads)) == others, phase  # they stand in the page's contents, too
        for profile in others:
            about, files = read_bundle(profile, REPO)
            section = text.partition(f"size (profile {profile})")[2]
            outcome = json.loads(files[f"data/records/{profile}/phases/{name}.json"])
            kept = outcome.get("verdicts") or outcome["findings"]
            assert [v["id"] for v in kept if v["id"] not in section] == [] and about["device_name"] in section, phase
            assert sum("_images/" in s for s in page.sources) >= len(main_figures(evidence[profile], name)), phase


@pytest.fixture
def conf(tmp_path, monkeypatch) -> dict:
    """The names of docs/conf.py, without what it fetches; what it lays out goes to a cache of its own."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "ipython").mkdir()
    monkeypatch.chdir(tmp_path)
    space = {"__file__": str(REPO / "docs" / "conf.py"), "__name__": "conf"}
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)
    exec(compile((REPO / "docs" / "conf.py").read_text(encoding="utf-8"), "conf.py", "exec"), space)
    return space


def test_a_second_size_is_set_beside_the_first(tmp_path, conf):
    """With one profile published there is no section; with a second, both verdicts stand in a row."""
    from kimi_nb.plan import open_published, publish_records, published_profiles
    from kimi_nb.study import Finding, Store, read_outcome, write_outcome

    if "quick" not in published_profiles(REPO):
        pytest.skip("no reference run is published")
    home, results = tmp_path / "checkout", tmp_path / "results"
    for part in ("data/records/quick", "figures/quick"):
        shutil.copytree(REPO / part, home / part)
    shutil.copy(REPO / "data" / "records" / "quick.jsonl.gz", home / "data" / "records")
    conf["REPO"] = home
    assert conf["other_sizes"]("norm") == []
    open_published("quick", results, home)
    old = read_outcome(results, "norm", "quick")
    words = {"supported": "contradicted", "contradicted": "supported", "undecided": "supported"}
    other = [
        Finding(id=f.id, claim=f.claim, word=words.get(f.word, f.word), reason="It was | so.") for f in old.findings
    ]
    new = old.changed(profile="standard", findings=tuple(other))
    write_outcome(results, new)
    publish_records(Store(results), "standard", home, stale=True, only=["norm"])
    first, claims, *figures = conf["other_sizes"]("norm")
    assert (
        first["source"].startswith("## The same at another size (profile standard)")
        and "phase norm only" in first["source"]
    )  # it is a copy, so as large
    table = claims["outputs"][0]["data"]["text/markdown"]
    for before, after in zip(old.findings, new.findings, strict=True):
        row = next(line for line in table.splitlines() if line.startswith(f"| {before.id} |"))
        both = {before.word, after.word}
        together = "not tested"
        if both == {"supported", "contradicted"}:
            together = "opposite"
        elif both == {"supported", "undecided"}:
            together = "one decides"
        assert f"**{before.word}**" in row and f"**{after.word}**. It was \\| so. | {together} |" in row
    shown = [o["data"]["image/png"] for c in figures for o in c["outputs"] if "image/png" in o["data"]]
    assert shown == [
        base64.b64encode((home / "figures" / "standard" / f"norm-{n}.png").read_bytes()).decode()
        for n in ("loss", "forest")
    ]
    assert conf["other_sizes"]("moe") == [] and all(conf["tidy"](c, home) for c in (first, claims, *figures))


def test_a_changed_cell_loses_its_results(conf):
    """A cell that was edited since the reference run must not stand above numbers that other code gave."""
    space = conf
    name = Path(PHASES[2]).name
    if f"data/records/quick/notebooks/{name}.ipynb" not in space["published"]()[1]:
        pytest.skip("no reference run is published")
    notebook = json.loads((NBS / "phases" / f"{name}.ipynb").read_text(encoding="utf-8"))
    space["with_results"](notebook, name)
    shown = [c for c in notebook["cells"] if c["cell_type"] == "code" and c["outputs"]]
    assert shown
    again = json.loads((NBS / "phases" / f"{name}.ipynb").read_text(encoding="utf-8"))
    next(c for c in again["cells"] if c["id"] == shown[-1]["id"])["source"].append("\n1 + 1")
    space["with_results"](again, name)
    assert [c["id"] for c in again["cells"] if c["cell_type"] == "code" and c["outputs"]] == [
        c["id"] for c in shown[:-1]
    ]
    assert "edited since" in "".join(again["cells"][1]["source"])


def code(source: str, *outputs: str) -> dict:
    return dict(cell_type="code", id=source[:8], source=source, metadata={}, outputs=list(outputs))


@pytest.mark.parametrize(
    ("source", "changed", "shown"),
    [
        ("f(1, 2)", 0, ["3"]),
        ("from a import f\nf(\n    1, 2\n)  # as before", 0, ["3"]),
        ("f(1, 3)", 1, []),
        ("def another(): ...", 0, []),
        ("#| hide\nassert g(1) == 2", 0, []),
        ("import a", 0, []),
    ],
)
def test_only_what_readers_see_counts_as_edited(conf, source, changed, shown):
    """Layout, import lines and hidden cells are no edits; another argument is."""
    notebook = dict(cells=[code(source)])
    assert conf["restore"](notebook, dict(cells=[code("f(1, 2)", "3")])) == changed
    assert notebook["cells"][0]["outputs"] == shown


# --- in a browser ------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as p:
        try:
            started = p.chromium.launch(
                executable_path=executable,
                args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
            )
        except playwright.Error as problem:
            pytest.skip(f"needs chromium: {str(problem).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def page(browser, address):
    """A page that notes what goes wrong on it, and reaches no other host."""
    context = browser.new_context(viewport=dict(width=1280, height=900))
    page, page.wrong = context.new_page(), []
    vendored = (REPO / "docs" / "_static" / "vendor").is_dir()
    page.on(
        "console",
        lambda m: (
            page.wrong.append(m.text)
            if m.type == "error" and (vendored or "ERR_NAME_NOT_RESOLVED" not in m.text)
            else None
        ),
    )
    page.on("pageerror", lambda e: page.wrong.append(str(e)))
    page.on("response", lambda r: page.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    yield page
    context.close()


@pytest.mark.slow
def test_a_browser_finds_nothing_wrong_on_any_page(page, pages, address):
    """Every page of the site, opened in Chromium: no error on the console, all pictures, no sideways scrolling."""
    found = {}
    for name in pages:
        page.wrong.clear()
        page.goto(f"{address}/{name}", wait_until="load")
        blank = page.evaluate(
            "[...document.images].filter(i => i.loading !== 'lazy' && !(i.complete && i.naturalWidth)).map(i => i.src)"
        )
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if page.wrong or blank or wide > 1:
            found[name] = [
                *page.wrong,
                *(f"blank {b}" for b in blank),
                *([f"{wide} pixels too wide"] if wide > 1 else []),
            ]
    assert found == {}


SHOWCASE = {
    "index.html": ".knb-landing .knb-door",
    "phases/07_combined.html": ".knb-answer",
    "howto/decision_guide.html": ".knb-card",
    "search.html?q=noaux_tc": "#search-results",
}


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_what_a_stranger_opens_first_is_right(page, address, mode, width):
    """The landing page, a result, the guide and the search, light and dark, wide and on a phone: nothing is wrong."""
    page.set_viewport_size(dict(width=width, height=800))
    page.add_init_script(f"localStorage.setItem('mode', '{mode}'); localStorage.setItem('theme', '{mode}')")
    for name, wanted in SHOWCASE.items():
        page.goto(f"{address}/{name}", wait_until="load")
        page.locator(wanted).first.wait_for(timeout=15000)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 1, f"{name} is {wide} pixels too wide"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
        assert (max(ground) < 80) == (mode == "dark"), name
    page.goto(f"{address}/phases/07_combined.html", wait_until="load")
    door = page.locator('.knb-nav a:text-is("Get started"):visible')
    if width < 600:
        assert door.count() == 0, "the menu is open before it is asked for"
        page.click(".primary-toggle")
    door.first.click()
    page.wait_for_url("**/howto/get_started.html")
    assert page.wrong == []


@pytest.mark.slow
def test_the_landing_page_is_one_screen(page, address):
    """Question, figure, an answer for each part and three doors are seen at once; a touch tells a line's numbers."""
    page.set_viewport_size(dict(width=1280, height=900))
    page.goto(f"{address}/index.html", wait_until="load")
    assert page.locator(".knb-answers li").count() == 4 and page.locator(".knb-door").count() == 3
    bottom = max(box["y"] + box["height"] for box in (d.bounding_box() for d in page.locator(".knb-door").all()))
    assert bottom <= 900, f"the doors end at {bottom:.0f} pixels"
    page.locator(".knb-figure .knb-mark").first.click()
    assert "95% interval" in page.locator(".knb-figure .knb-said").inner_text()
    page.locator('.knb-switches button:text-is("with Muon")').click()
    assert page.locator(".knb-figure .knb-mark").count() >= 4 and page.wrong == []


@pytest.mark.slow
def test_a_result_page_opens_with_its_answer(page, address):
    """The box stands first, code is folded, curves can be touched, wide tables keep their first column."""
    page.goto(f"{address}/phases/03_norm.html", wait_until="load")
    assert page.locator("article h1").inner_text().startswith("Result: ")
    box = page.locator(".knb-answer").first.bounding_box()
    assert box["y"] < 420, "the answer is not on the first screen"
    assert page.locator("article .cell_input pre:visible").count() == 0, "code is not folded"
    page.locator(".knb-figure svg").hover()
    assert "training step" in page.locator(".knb-figure .knb-said").inner_text()
    wide = page.locator(".knb-wide").last
    wide.evaluate("box => { box.scrollLeft = 300 }")
    first = wide.locator("tbody td").first.bounding_box()
    assert abs(first["x"] - wide.bounding_box()["x"]) < 3, "the first column is scrolled away"
    assert page.locator("nav.bd-links details[open]").count() == 1
    assert "have been edited since" not in page.locator("article").inner_text() and page.wrong == []


@pytest.mark.slow
def test_a_slow_page_costs_its_results_and_not_the_site(conf, monkeypatch, tmp_path):
    """A cell over the limit leaves a note and what came before it; an error in a cell is still an error."""
    conf["executed"].__globals__["LIMIT"] = 2
    cells = [dict(cell_type="markdown", id="t", metadata={}, source="# Slow")]
    for i, source in enumerate(["1 + 1", "import time; time.sleep(60)", "2 + 2"]):
        cells.append(dict(cell_type="code", id=f"c{i}", metadata={}, source=source, outputs=[], execution_count=None))
    notebook = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    made = conf["executed"](notebook, tmp_path / "page.ipynb")
    assert "took longer than 2 seconds" in "".join(made["cells"][1]["source"])
    assert made["cells"][2]["outputs"] and not made["cells"][4]["outputs"]
    cells[2]["source"] = "1 / 0"
    with pytest.raises(Exception, match="ZeroDivisionError"):
        conf["executed"](notebook, tmp_path / "page.ipynb")


def test_the_command_line_page_is_the_parser(conf):
    """Every command and every option stands on the page, and nothing that the parser does not know."""
    text, parser = conf["pages"].command_line(), __import__("kimi_nb.cli", fromlist=["x"]).build_parser()
    commands = conf["pages"]._commands(parser)
    assert commands and [name for name in commands if f"[`kimi-nb {name}`]" not in text] == []
    for sub, _ in commands.values():
        options = [
            s for a in sub._actions for s in a.option_strings if a.help != "==SUPPRESS==" and s not in ("-h", "--help")
        ]
        assert [s for s in options if f"`{s}`" not in text] == []
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.M)
    cells = lambda row: len(re.findall(r"(?<!\\)\|", row))
    uneven = [row for table in tables for row in table.splitlines() if cells(row) != cells(table.splitlines()[0])]
    assert tables and uneven == []


def test_the_answer_of_the_largest_size_stands_first(conf):
    """It alone confirms; what smaller sizes say is folded, and a phase of one size has one box."""
    from kimi_nb.plan import published_profiles

    held = published_profiles(REPO, "combined")
    if len(held) < 2:
        pytest.skip("needs two published sizes")
    box = conf["answer_cell"]("combined")["source"]
    first, *others = re.findall(r"\(profile ([\w-]+), (\w+)\)", box)
    assert first == (held[-1], "confirmatory") and others == [(name, "exploratory") for name in held[-2::-1]]
    assert [f"What profile {name} says" in box for name in held] == [True] * (len(held) - 1) + [False]
    alone = next(p.partition("_")[2] for p in PHASES if len(published_profiles(REPO, p.partition("_")[2])) == 1)
    assert conf["answer_cell"](alone)["source"].count("<details><summary>What profile") == 0


@pytest.mark.parametrize(
    ("repository", "clone", "link"),
    [
        ("", "git clone https://github.com/OWNER/NAME", "`https://codespaces.new/OWNER/NAME`"),
        ("https://github.com/a/b", "git clone https://github.com/a/b", "<https://codespaces.new/a/b>"),
        ("https://git.example.org/a/b", "git clone https://git.example.org/a/b", "`https://codespaces.new/OWNER/NAME`"),
    ],
)
def test_addresses_lead_nowhere_or_to_the_repository(conf, repository, clone, link):
    """Where the repository's address is unknown, nothing is a link and it is said what to put in."""
    cells = json.loads((NBS / "howto" / "get_started.ipynb").read_text(encoding="utf-8"))["cells"]
    text = conf["pages"].addressed("\n".join("".join(cell["source"]) for cell in cells), repository)
    assert clone in text and link in text
    assert ("OWNER/NAME is this repository" in text) == ("OWNER/NAME" in text)


@pytest.mark.slow
def test_search_finds_noaux_tc(page, address):
    """The search works without a server's help and leads to the notebook that explains the router."""
    page.goto(f"{address}/search.html?q=noaux_tc")
    page.wait_for_function(
        "document.querySelector('#search-results').innerText.includes('Search finished')", timeout=15000
    )
    targets = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.getAttribute('href'))")
    assert any("router_noaux_tc" in t for t in targets[:3]), targets
    assert page.wrong == []


@pytest.mark.slow
def test_what_can_be_operated_works_without_python(page, address):
    """A table is sorted by its heading, the slider of the verdict page moves, and dark mode is remembered."""
    page.goto(f"{address}/howto/decision_guide.html", wait_until="load")
    table = page.locator("article table").first
    before = table.locator("tbody tr td:first-child").all_inner_texts()
    table.locator("th button.sort").first.click()
    after = table.locator("tbody tr td:first-child").all_inner_texts()
    assert sorted(before) == sorted(after) and after == sorted(after, key=str.lower) and len(after) == 4
    page.goto(f"{address}/howto/reading_a_verdict.html", wait_until="networkidle")
    handle = page.locator(".widget-slider .noUi-handle, .jupyter-widgets .noUi-handle").first
    handle.wait_for(timeout=20000)
    assert (
        "smallest difference found with 3 seeds"
        in page.locator(".cell_output .widget-box, .cell_output .jupyter-widgets").first.inner_text()
    )
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.body.innerText.includes('smallest difference found with 4 seeds')", timeout=10000)
    page.evaluate("localStorage.setItem('mode', 'dark'); localStorage.setItem('theme', 'dark')")
    page.goto(f"{address}/index.html", wait_until="load")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert max(light) < 80, "the page stays bright in dark mode"
    assert page.wrong == []
