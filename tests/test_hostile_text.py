"""Whatever a record, a name, a corpus or an error says, the workbench shows it as text."""

import functools
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import kimi_nb.lab as lab
from kimi_nb.config import KimiError, RunConfig
from kimi_nb.study import Arm, Finding, Record, Store, Study

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "<svg onload=alert(1)>",
    "</svg><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "</pre></details><iframe src=javascript:alert(1)>",
    "<a href=javascript:alert(1)>here</a>",
    "<!-- ",
    "]]><b>bold</b>",
    "&lt;img src=x onerror=alert(1)&gt;<i>",
    "{0}<b>{x}</b>%s",
    "\u202e<b>turned</b>",
    "<details open ontoggle=alert(1)>",
    "<math><mtext></table><img src=x onerror=alert(1)>",
    "`${alert(1)}`<template>",
)
OURS = set(
    "b button circle code details div g h3 h4 i line path polygon polyline pre progress rect span style sub summary "
    "svg table td text th title tr p br".split()
)


class Elements(HTMLParser):
    """What a browser would make of a page: its elements, their attributes, its text."""

    def __init__(self, page):
        super().__init__()
        self.attributes, self.words, self.comments = [], [], []
        self.feed(str(page))
        self.close()

    def handle_starttag(self, tag, attrs):
        assert tag in OURS, f"<{tag}> is none of our elements"
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.words.append(data)

    def handle_comment(self, data):
        self.comments.append(data)

    def text(self):
        return "".join(self.words) + "".join(value for _, _, value in self.attributes)


def assert_harmless(page, hostile, where):
    """No element, no handler and no comment that is not ours; and no `<` of the text that is not escaped."""
    found = Elements(page)
    handlers = {(tag, name) for tag, name, _ in found.attributes if name.startswith("on")}
    assert handlers <= {("button", "onclick"), ("svg", "onpointerenter")}, (where, handlers)
    clicks = {value for _, name, value in found.attributes if name == "onclick"}
    assert all(value.startswith("var button = this") for value in clicks), where
    assert {value for _, name, value in found.attributes if name == "onpointerenter"} <= {lab.script_text("hover")}, (
        where
    )
    assert not found.comments, where
    assert "<" not in hostile or hostile not in str(page), f"{where} shows it as HTML"


def made_up_run(text):
    return RunConfig().model_copy(update=dict(data=RunConfig().data.model_copy(update=dict(tokenizer=text))))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs whose numbers are there, in a folder with a name that is an element."""
    store = Store(tmp_path_factory.mktemp("<img src=x onerror=alert(1)>"))
    curve = dict(step=[1, 2, 3], value=[3.0, 2.5, 2.0])
    for seed in (0, 1):
        run = RunConfig().override({"seed": seed})
        store.put(Record.of(run, "done", dict(test_bpb=2.0 + seed, val_loss=1.0), dict(train_loss=curve)))
    return store


def dirty(frame, text):
    """The store's table, with the text wherever there are words; and in the name of a column."""
    worse = frame.copy()
    for column in worse.columns:
        if column != "run_id" and worse[column].map(lambda v: isinstance(v, str)).any():
            worse[column] = [text, text + "2"][: len(worse)]
    worse["seed"] = [text, text + "2"]
    worse["train.lr"] = [text, 2.0]
    worse[text] = [1.0, 2.0]
    return worse


def renamed(store, text):
    """A store that gives the same records for every run_id, with the text in error and curves."""
    record = store.get(store.frame(stale=True)["run_id"][0])
    odd = record.model_copy(update=dict(provenance={**record.provenance, "error": text}))
    return SimpleNamespace(path=text, get=lambda run_id: odd, frame=store.frame, run_folders=list)


def legend(store, text):
    frame = dirty(store.frame(stale=True), text)
    lines = lab.lines_of(frame, list(frame["run_id"]))
    return lab.legend_html([*lines, lab.Curve(text, text, (text,), text), lab.Curve(text, text, (text,) * 2, text)])


def verdict(store, text):
    """The verdict on two configurations that are called by the text."""
    frame = store.frame(stale=True)
    other = frame.assign(run_id=frame["run_id"] + "b", test_bpb=frame["test_bpb"] + 1, status="done")
    other["model.norm.kind"] = text
    both, ids = pd.concat([frame, other], ignore_index=True), frame["run_id"][0]
    return lab.verdict_html(both, lab.Curve(ids, text, (), ""), lab.Curve(f"{ids}b", text, (), ""))


def compared(store, text):
    """The comparison of two runs whose ids are the text."""
    frame = dirty(store.frame(stale=True), text)
    ids = [text, f"{text}2"]
    frame["run_id"] = ids
    return lab.compare_html(renamed(store, text), frame, ids)


def arms_shown(text):
    run = RunConfig()
    arms = [Arm("a", label=text), Arm("b", {"train.lr": 1e-3}, block=text)]
    study = Study(name="s", base=run, baseline="a", seeds=(0,), arms=arms[:1])
    odd = SimpleNamespace(name=text, arms=arms, seeds=(), metric=text, arm_run=lambda arm: run)
    return lab.arms_html(run, [study, odd], None)


def plan_shown(text):
    counts = dict.fromkeys(("runs", "done", "reused", "failed", "running", "left", "stale", "seconds"), 1)
    finding = Finding(id=text, claim=text, word="supported", reason=text)
    return lab.plan_html([dict(counts, phase=text, findings=[finding])], said=text)


def routed(text):
    row = dict(layer=0, position=0, token=text, slot=0, expert=0, weight=1.0)
    return lab.routed_text(pd.DataFrame([row]), 2)


def samples(text, monkeypatch):
    import kimi_nb.use

    made = lambda model, tokenizer: SimpleNamespace(generate_text=lambda *a, **k: text)
    monkeypatch.setattr(kimi_nb.use, "Generator", made, raising=False)
    return lab.samples_html(None, None, text, [{}], 3)


VIEWS = {
    "tag": lambda t, store, patch: lab.tag("p", t, title=t, data_run=t),
    "together": lambda t, store, patch: lab.together([t, lab.tag("i", t)]),
    "page": lambda t, store, patch: lab.page(t, style=False),
    "table_row": lambda t, store, patch: lab.table_row([t, t], (t,), data_phase=t),
    "table_of": lambda t, store, patch: lab.table_of({t: "num"}, [[t]]),
    "error_html": lambda t, store, patch: lab.error_html(KimiError(t)) + lab.error_html(ValueError(t)),
    "svg_text": lambda t, store, patch: lab.svg_text(0, 0, t),
    "svg_drawing": lambda t, store, patch: lab.svg_drawing(1, 1, t, t),
    "chart_svg": lambda t, store, patch: lab.chart_svg(
        [dict(name=t, x=[1, 2], y=[1, 2], marks=True, dash=t), dict(name=t + "2", x=[1, 2], y=[2, 1])], t, t
    ),
    "load_svg": lambda t, store, patch: lab.load_svg([[1, 2]], t),
    "block_svg": lambda t, store, patch: lab.block_svg(made_up_run(t)),
    "cost_html": lambda t, store, patch: lab.cost_html(dict(lab.cost_rows(RunConfig()), basis=t)),
    "elsewhere_html": lambda t, store, patch: lab.elsewhere_html(made_up_run(t)),
    "picker_page": lambda t, store, patch: lab.picker_page(made_up_run(t), RunConfig()),
    "factors_page": lambda t, store, patch: lab.factors_page(
        [SimpleNamespace(base=RunConfig(), arms=[Arm("a")], arm_run=lambda arm: made_up_run(t))]
    ),
    "arms_html": lambda t, store, patch: arms_shown(t),
    "progress_html": lambda t, store, patch: lab.progress_html(made_up_run(t), lab.Follower(), t, t),
    "curves_html": lambda t, store, patch: lab.curves_html(made_up_run(t), lab.Follower()),
    "live_page": lambda t, store, patch: lab.live_page(renamed(store, t)),
    "overlay_svg": lambda t, store, patch: lab.overlay_svg(renamed(store, t), [lab.Curve(t, t, (t,), t)] * 2, t),
    "legend_html": lambda t, store, patch: legend(store, t),
    "verdict_html": lambda t, store, patch: verdict(store, t),
    "compare_html": lambda t, store, patch: compared(store, t),
    "pinboard_page": lambda t, store, patch: lab.pinboard_page(
        SimpleNamespace(path=t, get=store.get, frame=lambda stale: dirty(store.frame(stale=True), t))
    ),
    "plan_html": lambda t, store, patch: plan_shown(t),
    "plan_page": lambda t, store, patch: lab.plan_page("smoke", store),
    "workbench_page": lambda t, store, patch: lab.workbench_page(store, made_up_run(t), "smoke"),
    "routed_text": lambda t, store, patch: routed(t),
    "rank_html": lambda t, store, patch: lab.rank_html(lab.rank_table({t: np.ones((1, 3))})),
    "samples_html": lambda t, store, patch: samples(t, patch),
    "note": lambda t, store, patch: lab.note(t, True),
}
OF_A_STORE = ("plan_page", "workbench_page")  # a second each: the store's folder has the name, one text is enough


@functools.cache
def pages_of_the_lab():
    """Public functions that give a page, an element or a drawing."""
    return {n for n in lab.__all__ if n.endswith(("_html", "_page", "_svg")) or n in ("page", "tag", "note")}


def test_every_view_is_tried():
    assert pages_of_the_lab() <= set(VIEWS), "a new view: drive hostile text through it here"


@pytest.mark.parametrize("view", VIEWS)
def test_text_is_never_an_element(view, store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for text in HOSTILE[:1] if view in OF_A_STORE else HOSTILE:
        with monkeypatch.context() as patch:
            shown = VIEWS[view](text, store, patch)
        assert_harmless(shown, text, view)


def test_the_check_itself_finds_what_is_not_escaped():
    for text in (text for text in HOSTILE if set(text) & set('<"')):
        with pytest.raises(AssertionError):
            assert_harmless(f'<p title="{text}">{text}</p>', text, "raw")


def test_controls_show_names_of_a_store_as_text(store):
    """The widgets that are made of HTML: rows of the pinboard, notes of the picker, the head of a live run."""
    for text in HOSTILE:
        board = lab.Pinboard(store)
        board.frame = dirty(store.frame(stale=True), text).assign(_unlike=text, _name=text)
        board._found = board.frame.to_dict("records")
        board._turn(0)
        assert_harmless(board._rows[0].text.value, text, "row of the pinboard")
    picker = lab.Picker(RunConfig(), wait=True)
    for text in HOSTILE:
        for path in ("data.corpus", "data.tokenizer", "train.lr", "model.n_heads"):
            picker._rows[path].control.value = text
            assert_harmless(picker._rows[path].note.value, text, path)
        assert_harmless(picker._diagram.value + picker._code.value, text, "picker")
