"""Paper and slides: what they say follows the records, whatever these are, and all forms can be made."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from kimi_nb.config import RunConfig, load_profile
from kimi_nb.phases import combined, norm
from kimi_nb.report import (
    Evidence,
    ReportError,
    bring,
    build_paper,
    build_short,
    build_slides,
    card_of,
    card_text,
    claims_markdown,
    claims_of,
    compile_typst,
    draw_own,
    others,
    runs_table,
    short_answers,
    short_report,
    talk_typst,
    to_markdown,
    to_typst,
    what_ran,
    write_report,
)
from kimi_nb.study import WORDS, Arm, Finding, Record, Store, Study, record_outcome

REPO = Path(__file__).resolve().parents[1]

SEEDS = load_profile("quick").n_seeds("combined")
EFFECTS = dict(attention=0.10, norm=-0.06, routing=0.0, optimizer=-0.40)


def tiny_profile():
    profile = load_profile("quick")
    return profile.model_copy(
        update=dict(
            base=profile.base.override(
                {"data.corpus": "tinyworld", "data.tokenizer": "byte", "data.num_documents": 60}
            ),
            tune={},
        )
    )


def larger_profile():
    """A profile `standard` that trains twice as long."""
    profile = tiny_profile()
    return profile.model_copy(
        update=dict(name="standard", base=profile.base.override({"train.steps": 2 * profile.base.train.steps}))
    )


def factorial_results(path, effects, synergy=0.0, status=None, pair=0.0, uneven=0.0, profile=None, noise=3e-4):
    """A results folder with an invented factorial.

    Each part changes bits per byte by its effect, all together by `synergy`, MLA with Muon by `pair`; Muon's effect
    changes by `uneven` from seed to seed.
    """
    profile, store = profile or tiny_profile(), Store(path)
    study = combined.study(profile)
    for k, p in enumerate(study.expand()):
        on = combined.cell_factors(p.arm)
        bpb = (
            3.0
            + sum(effects[f] for f in on)
            + synergy * (len(on) == 4)
            + pair * ({"attention", "optimizer"} <= set(on))
            + uneven * p.seed * ("optimizer" in on)
            + 0.001 * p.seed
            + np.random.default_rng(k).normal(0, noise)
        )
        metrics = dict(
            test_bpb=bpb,
            test_loss=1.7 * bpb,
            val_loss=1.7 * bpb,
            tokens=400.0 * p.run.train.steps,
            steps=300,
            step_seconds=0.01,
            active_parameters=1e5,
            total_parameters=3e5,
            epochs=0.5,
        )
        curves = dict(val_loss=dict(step=[100, 200, 300], value=[1.7 * bpb + 1, 1.7 * bpb + 0.3, 1.7 * bpb]))
        store.put(
            Record.of(
                p.run,
                (status or {}).get((p.arm, p.seed), "done"),
                metrics,
                curves,
                dict(device="cpu", device_name="Test CPU"),
            ),
            "combined",
        )
    store.record_study(study)
    _, found, contrasts = combined.analyse(store, study)
    record_outcome(store, "combined", profile, combined.judge(found, contrasts))
    return store


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    """The factorial with `EFFECTS`, to be read only."""
    return factorial_results(tmp_path_factory.mktemp("invented") / "results", EFFECTS)


def words_of(store, *also):
    """(abstract, conclusion, the whole as Markdown) of the paper."""
    e = Evidence(store)
    doc = build_paper(e, others(e, also))
    whole = to_markdown(doc)
    return doc.abstract, re.search(r"Conclusion\n\n(.*?)## References", whole, re.S)[1], whole


def test_the_wording_follows_the_records(tmp_path, invented):
    """Opposite effects give opposite sentences, in the abstract, the findings and the conclusion."""
    abstract, conclusion, whole = words_of(invented)
    other_abstract, other_conclusion, other = words_of(
        factorial_results(tmp_path / "b", {k: -v for k, v in EFFECTS.items()})
    )
    assert re.search(r"Muon -0\.40\d \(better, beyond the margin\)", abstract)
    assert re.search(
        r"\(MLA\) \+0\.\d+ with AdamW and \+0\.\d+ with Muon \(worse with both, beyond the margin\)", abstract
    )
    assert re.search(r"Muon \+0\.\d+ \(worse, beyond the margin\)", other_abstract)
    assert re.search(r"\(MLA\) -0\.\d+ with AdamW .*? \(better with both, beyond the margin\)", other_abstract)
    assert re.search(
        r"Muon lowers test bits per byte by 0\.40\d .*?: an improvement, by more than the declared margin", whole
    )
    assert re.search(
        r"\(MLA\) changes .* by \+0\.\d+ with AdamW .*?: with both, a loss of quality, by more than", whole
    )
    assert "RMSNorm: better with both, beyond the margin" in conclusion and "MLA: worse with both" in conclusion
    assert "MLA: better with both, beyond the margin" in other_conclusion and "Muon: worse" in other_conclusion
    assert (
        "The model with all parts is better than the baseline." in conclusion
        and "The model with all parts is worse than the baseline." in other_conclusion
    )
    assert "**Muon makes the model better (fewer bits per byte), averaged over the other parts:** *supported*" in whole
    assert (
        "**Muon makes the model better (fewer bits per byte), averaged over the other parts:** *contradicted*" in other
    )


def test_synergy_and_its_absence(tmp_path):
    """The sentence on synergy follows its sign."""
    helps, hinders = (
        words_of(factorial_results(tmp_path / n, EFFECTS, synergy=s))[0] for n, s in (("a", -0.3), ("b", 0.3))
    )
    assert "the combination gains 0.3" in helps and "give more together than the sum" in helps
    assert "the combination loses 0." in hinders and "give less together than the sum" in hinders


def test_nothing_found_is_said(tmp_path):
    """Without effects nothing is claimed, and what could have been seen is named."""
    nothing = dict.fromkeys(EFFECTS, 0.0)
    abstract, conclusion, whole = words_of(factorial_results(tmp_path / "a", nothing, noise=0.02))
    assert "better" not in abstract.partition("Effects on")[2].partition(".")[0]
    assert "not decided; effects from about 0." in whole
    sure = words_of(factorial_results(tmp_path / "b", nothing))
    assert "no difference with both" in sure[0] and "no difference with both" in sure[1]
    assert "better with" not in conclusion and "better, beyond" not in conclusion
    assert "*these phases have not run; nothing is claimed in their place.*" in whole
    assert "**Contradicted.** None." in whole


def test_an_effect_that_turns_with_another_part_is_called_so(tmp_path):
    """Where MLA helps with AdamW and hurts with Muon both numbers stand everywhere; less help is called less."""
    turns = factorial_results(tmp_path / "a", EFFECTS | dict(attention=-0.05), pair=0.1)
    abstract, conclusion, whole = words_of(turns)
    for text in (abstract, conclusion, whole.split("What the parts do.")[1]):
        assert (
            re.search(r"MLA helps with AdamW \(-0\.0[45]\d\) and hurts with Muon \(\+0\.0[45]\d\)", text)
            and "each gives less" not in text
        )
    less = words_of(factorial_results(tmp_path / "b", EFFECTS | dict(attention=-0.3), pair=0.1))[0]
    assert "each gives less in the company of the other" in less and "hurts with" not in less


def test_seeds_that_disagree_are_told_from_seeds_that_agree(tmp_path, invented):
    """The intervals from seeds alone stand beside the pooled ones; a pooled error that is too small is called so."""
    agree, differ = words_of(invented), words_of(factorial_results(tmp_path / "a", EFFECTS, uneven=0.1))
    assert "too optimistic" not in agree[0] + agree[2]
    assert "the pooled error would be too optimistic" in differ[2]
    assert all(whole.count("is its spread over the seeds") == 2 for whole in (agree[2], differ[2]))  # section, threats


def test_steps_to_target_say_what_they_leave_out(tmp_path):
    """Runs that never arrived count with their whole length, as in tests; one reached at once is a bound as well."""
    table = runs_table(
        Evidence(factorial_results(tmp_path / "a", EFFECTS | dict(optimizer=-2.0))), "combined", ("steps_to_target",)
    )
    cells = {row[0]: row[-1] for row in table.rows}
    assert (
        cells["MLA"] == f"≥ 300 (0 of {SEEDS})" and cells["Muon"] == "≤ 100" and f"of {SEEDS})" not in cells["RMSNorm"]
    )
    assert "counts with its whole length, here and in the comparisons" in table.caption and "is a bound" in table.note


def test_phases_that_are_missing_are_not_untestable(tmp_path, invented):
    """An answer whose phase has not run says so; records without any conclusion make no paper."""
    _, _, whole = words_of(invented)
    assert (
        "- **H4** *was not run*." in whole and "cannot compare the optimizers" not in whole and "**RQ5** is *" in whole
    )
    store = Store(shutil.copytree(invented.path, tmp_path / "a"))
    shutil.rmtree(store.path / "phases")
    with pytest.raises(
        ReportError, match=r"^no phase has been concluded in .*: run kimi-nb plan, or kimi-nb report --published quick$"
    ):
        write_report(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_were_lost_are_listed(tmp_path):
    """A diverged run is in the negative results and not counted as finished."""
    store = factorial_results(tmp_path / "a", EFFECTS, status={("all", 1): "diverged"})
    whole = words_of(store)[2]
    assert f"We train {16 * SEEDS - 1} models" in whole and re.search(
        rf"Of {16 * SEEDS} runs 1 diverged: `[0-9a-f]{{12}}` \(diverged\)", whole
    )
    assert any("One run did not finish" in s.text for s in build_slides(Evidence(store), {}))


def test_a_phase_of_ones_own_has_a_section(tmp_path, invented):
    """Study, verdict and table of a phase that the paper has never heard of appear; its odd characters do no harm."""
    store = Store(shutil.copytree(invented.path, tmp_path / "a"))
    own = norm.study(tiny_profile())
    base, odd = own.base.override({"train.steps": 120}), "R*S $x$ {fig:none} | #1 [@nobody]"
    study = Study(
        name="toy",
        phase="toy",
        question=f"Is {odd} better?",
        base=base,
        arms=[Arm("a", {}), Arm("b", {"model.norm.kind": "rmsnorm"}, odd), Arm("c", {"train.steps": 0})],
        baseline="a",
        seeds=(0, 1),
    )
    for p in study.expand():
        store.put(
            Record.of(p.run, "done", dict(test_bpb=2.0 + p.seed * 0.01 * (p.arm == "b")), {}, dict(device="cpu")), "toy"
        )
    store.record_study(study)
    record_outcome(
        store,
        "toy",
        tiny_profile(),
        [
            Finding(
                id="toy", claim=f"{odd} is better.", word="undecided", reason=f"It {odd}.", caveats=(f"Mind {odd}.",)
            )
        ],
    )
    files = write_report(store, tmp_path / "out", say=lambda line: None)
    text = (tmp_path / "out" / "paper.md").read_text()
    assert (
        re.search(r"## .*\d+ Toy\n", text)
        and "| toy | " in text
        and "A run takes 0 to 120 steps of " in text
        and re.search(rf"We train {16 * SEEDS + 4} models of .*? \(and leave two untrained, as a floor\)", text)
        and all(f.stat().st_size > 1000 for f in files)
    )
    assert "**undecided**" in (tmp_path / "out" / "research_report.md").read_text()


def test_a_folder_of_ones_own_phases_has_slides(tmp_path, invented):
    """Where only the base run has findings and no phase checks the methods, the slide of trust takes its figure."""
    store = Store(shutil.copytree(invented.path, tmp_path / "a"))
    finding = Finding(id="RQ0", claim="It runs.", word="supported", reason="It ran.")
    record_outcome(store, "baseline", tiny_profile(), [finding])
    e = Evidence(store)
    e.phases = tuple(phase for phase in e.phases if phase != "stats")
    assert "It runs" in "".join(slide.text for slide in build_slides(e, {}))


ODD = "<script>alert(1)</script> ![x](/etc/hostname) **b** | `c` [@nobody] {tab:none} &lt;"


def odd_results(path):
    """A results folder all of whose texts look like HTML, Markdown, a picture, a citation and a reference."""
    profile, store = tiny_profile(), Store(path)
    base = norm.study(profile).base
    study = Study(
        name="norm",
        phase="norm",
        question=f"Is it {ODD}?",
        hypothesis=ODD,
        base=base,
        arms=[Arm("a", {}, f"A {ODD}"), Arm("b", {"model.norm.kind": "rmsnorm"}, f"B {ODD}")],
        baseline="a",
        seeds=(0, 1, 2),
    )
    about = dict(device="cpu", device_name=f"CPU {ODD}", data=dict(summary=f"corpus {ODD}"), precision=ODD)
    for p in study.expand():
        metrics = dict(test_bpb=2.0 + p.seed * 0.01 * (p.arm == "b"), test_loss=4.0)
        store.put(Record.of(p.run, "done", metrics, {}, about), "norm")
    store.record_study(study)
    told = dict(claim=f"{ODD} is better.", reason=f"It {ODD}.", caveats=[f"Mind {ODD}."])
    found = [Finding(id=f"H{i}", word=word, **told) for i, word in enumerate(WORDS[:3], 1)]
    table = SimpleNamespace(columns=["x"], rows=[[ODD]])
    record_outcome(store, "norm", profile, found, tables={f"Kept {ODD}": table})
    return store


def tags_of(page):
    """(tag, attributes) of everything in an HTML page that a browser would load or run."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    return [(tag, a) for tag, a in found if tag in ("script", "img", "iframe", "object", "b") or "onerror" in a]


def test_text_of_records_is_text_in_every_form(tmp_path):
    """What looks like HTML, a picture or a citation in a name, a question or a finding stands there as it is."""
    write_report(odd_results(tmp_path / "a"), tmp_path / "out", say=lambda line: None)
    page = (tmp_path / "out" / "paper.html").read_text()
    assert tags_of(page) == [] and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    secret = Path("/etc/hostname").read_bytes().strip()
    with zipfile.ZipFile(tmp_path / "out" / "slides.pptx") as z:
        text = " ".join(z.read(n).decode() for n in z.namelist() if re.match(r"ppt/slides/slide\d+\.xml", n))
        pictures = [z.read(n) for n in z.namelist() if n.startswith("ppt/media/")]
    assert "&lt;script&gt;alert(1)" in text and "![x](/etc/hostname)" in text
    assert all(secret not in picture for picture in pictures if len(secret) > 3)
    for name in ("paper.md", "research_report.md"):
        shown = (tmp_path / "out" / name).read_text()
        assert not re.search(r"(?<!\\)<script", shown) and not re.search(r"(?<!\\)!\[x\]\(/etc", shown), name


def test_the_site_shows_text_of_records_as_text(tmp_path):
    """The table of claims that the site adds to a phase's page has no HTML of a record's."""
    e = Evidence(odd_results(tmp_path / "a"))
    shown = claims_markdown(claims_of("norm", [e.outcomes["norm"], None]), ["quick", "standard"]) + what_ran(
        e, ["norm"]
    )
    assert not re.search(r"(?<!\\)<script|(?<!\\)!\[x", shown) and shown.count(r"\<script\>") > 3


def test_templates_hold_the_prose_and_the_wheel_holds_the_templates():
    """Every template is package data and has lines that can be read; no module of the wing holds a paragraph."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["package-data"]["kimi_nb.report"] == ["templates/*"]
    assert "jinja2" in project["project"]["dependencies"]
    files = sorted((REPO / "kimi_nb" / "report" / "templates").iterdir())
    assert {f.suffix for f in files} == {".j2", ".bib", ".typ", ".css"} and len(files) > 15
    wide = [f"{f.name}:{i}" for f in files for i, line in enumerate(f.read_text().splitlines(), 1) if len(line) > 130]
    assert [w for w in wide if not w.startswith("references") and ".html" not in w] == []
    for path in (REPO / "kimi_nb" / "report").glob("[a-z]*.py"):
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        assert [s[:60] for s in strings if isinstance(s, str) and len(s) > 300] == [], path.name


def test_no_sentence_is_read_back():
    """Report and site take numbers from fields: no regular expression of the wing looks into a finding's words."""
    for path in (REPO / "kimi_nb" / "report").glob("*.py"):
        code = path.read_text()
        assert "interval of the difference (" not in code and "importlib" not in code, path.name
        assert not re.search(r"functools\.(cache|lru_cache)\n    def", code), (
            f"{path.name}: a cache keeps its evidence alive"
        )


def test_another_size_is_said_as_it_is(tmp_path, invented):
    """The same effects at a larger size hold; opposite ones turn; what one size decides is decided there only."""
    same = factorial_results(tmp_path / "same", EFFECTS, profile=larger_profile())
    other = factorial_results(
        tmp_path / "other", dict(attention=-0.10, norm=0.0, routing=0.05, optimizer=-0.20), profile=larger_profile()
    )
    abstract, conclusion, whole = words_of(invented, same)
    section = whole.split("At a larger size\n")[1].split("\n## ")[0]
    assert (
        "decided alike, none is decided in opposite ways" in abstract
        and "No claim is supported at one size and contradicted at another." in section
    )
    held = re.search(r"\*\*Held\.\*\* (.*)", section)[1]
    assert (
        re.search(r"Supported .*RQ2: .*RQ4: .*\. Contradicted .*RQ1: ", held)
        and "the effects at the two sizes differ by no more than chance explains" in section
    )
    steps = tiny_profile().base.train.steps
    assert f"| `train.steps` | {steps} | {2 * steps} |" in section and "Size is not all that differs" not in section
    abstract, conclusion, whole = words_of(invented, other)
    section = whole.split("At a larger size\n")[1].split("\n## ")[0]
    assert re.search(
        r"\*\*Turned into its opposite\.\*\* RQ1: .*\(contradicted at quick and supported at standard\)", section
    )
    apart = re.search(r"\*\*Different at one size, without a difference at another\.\*\* (.*)", section)[1]
    assert "(supported at quick and no difference at standard)" in apart
    assert "(no difference at quick and contradicted at standard)" in apart
    assert re.search(
        r"The effect of Muon is smaller at standard: -0\.4\d\d bits/byte at quick, -0\.2\d\d at standard", section
    )
    assert re.search(
        r"The effect of MLA changes its sign at standard: \+0\.1\d\d bits/byte at quick, -0\.\d+ at standard", section
    )
    assert (
        re.search(r"\| RQ1 \| .* \| quick \| 0\.\d+ \(.*\| \*\*contradicted\*\* \| opposite \|", section)
        and "{sec:sizes}" not in conclusion
    )
    runs = whole.split("Runs at other sizes\n")[1]
    assert f"| MLA + RMSNorm + noaux_tc + Muon | {SEEDS} |" in runs and not any(
        r.run_id in runs for r in other.records()
    )  # a summary, no run by run
    assert "At a larger size" not in words_of(invented)[2]


def test_a_second_folder_must_bear_on_the_first(tmp_path, invented):
    """Named, it is refused in a line where there is nothing to compare; with one that fits, every form has its part."""
    for name, said in (("none", "holds no record"), ("itself", "is the folder itself")):
        also = invented.path if name == "itself" else tmp_path / name
        with pytest.raises(ReportError, match=said):
            write_report(invented, tmp_path / "out", say=lambda line: None, also=[also])
    lone = Store(shutil.copytree(invented.path, tmp_path / "lone"))
    shutil.rmtree(lone.path / "phases")
    record_outcome(
        lone, "norm", larger_profile(), [Finding(id="H2", claim="Steadier.", word="undecided", reason="It.")]
    )
    with pytest.raises(ReportError, match=r"^.*lone has no phase in common with .* \(it has norm\)$"):
        write_report(invented, tmp_path / "out", say=lambda line: None, also=[lone])
    assert not (tmp_path / "out").exists()
    other = factorial_results(tmp_path / "other", EFFECTS, profile=larger_profile())
    write_report(
        invented, tmp_path / "out", say=lambda line: None, also=[other], perhaps=[lone]
    )  # what is only found, not named, may be left out
    assert (tmp_path / "out" / "figures" / "sizes-effects.svg").is_file() and "sizes-effects.svg" in (
        tmp_path / "out" / "paper.md"
    ).read_text()
    assert "## At a larger size" in (tmp_path / "out" / "research_report.md").read_text()
    with zipfile.ZipFile(tmp_path / "out" / "slides.pptx") as z:
        assert any("At a larger size" in z.read(n).decode() for n in z.namelist() if n.startswith("ppt/slides/slide"))


def test_all_forms_hold_together(tmp_path, invented):
    """All say the same; links lead somewhere; PowerPoint has the slides of the PDF, inside their frame, with notes."""
    store, out = invented, tmp_path / "out"
    write_report(store, out, say=lambda line: None)
    md, page = (out / "paper.md").read_text(), (out / "paper.html").read_text()
    for target in set(re.findall(r"\]\(#([\w-]+)\)", md)):
        assert f'id="{target}"' in md and f'id="{target}"' in page, target
    assert "<math" in page and "Muon lowers test bits per byte" in page and 'src="figures' not in page
    assert (out / "paper.pdf").read_bytes()[:5] == b"%PDF-" and (out / "slides.pdf").read_bytes()[:5] == b"%PDF-"
    with zipfile.ZipFile(out / "slides.pptx") as z:
        made = [n for n in z.namelist() if re.fullmatch(r"ppt/slides/slide\d+\.xml", n)]
        frame = re.search(r'<p:sldSz cx="(\d+)" cy="(\d+)"', z.read("ppt/presentation.xml").decode())
        for n in made:
            root = ElementTree.fromstring(z.read(n))
            for picture in root.iter("{http://schemas.openxmlformats.org/presentationml/2006/main}pic"):
                off, ext = (
                    next(picture.iter(f"{{http://schemas.openxmlformats.org/drawingml/2006/main}}{k}"))
                    for k in ("off", "ext")
                )
                assert int(off.get("x")) + int(ext.get("cx")) <= int(frame[1]) and int(off.get("y")) + int(
                    ext.get("cy")
                ) <= int(frame[2]), n
        text = " ".join(z.read(n).decode() for n in made)
        assert 'descr="Figure: ' in text and "data:image" not in text
        assert all(f"<a:t>{s.title}</a:t>" in text for s in build_slides(Evidence(store), {})) and any(
            "notesSlide" in n for n in z.namelist()
        )


def test_the_short_report_has_every_answer(invented):
    """Each question of the plan stands in it with its word."""
    e = Evidence(invented)
    text = short_report(e)
    assert len(e.answers) >= 18
    for finding in e.answers:
        assert f"| {finding.id} | " in text and f"**{finding.word}**" in text
    assert "## combined" in text and "mean ± sd" in text


def test_an_empty_folder_is_refused_in_a_line(tmp_path):
    with pytest.raises(ReportError, match="holds no record"):
        Evidence(Store(tmp_path / "none"))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from kimi_nb.cli import main; sys.exit(main())",
            "report",
            "--results",
            str(tmp_path / "none"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "holds no record" in done.stderr


@pytest.mark.slow
def test_the_published_records_give_a_whole_paper(tmp_path):
    """Body of twenty pages or more, twelve to twenty slides, in less than two minutes of work, without training."""
    import time

    from kimi_nb.plan import published, published_profiles

    if "quick" not in published_profiles():
        pytest.skip("no published reference run of profile quick")
    *smaller, strongest = published_profiles()
    start, store = time.process_time(), published(strongest)
    more = [published(p) for p in smaller]
    write_report(store, tmp_path, say=lambda line: None, perhaps=more)
    assert time.process_time() - start < 100  # of the processor: other work on the machine does not count
    e = Evidence(store)
    also = others(e, more, strict=False)
    doc = build_paper(e, also)
    talk = build_slides(e, {f.stem.removeprefix("slide-"): f for f in (tmp_path / "figures").glob("slide-*.svg")}, also)
    assert 12 <= len(talk) + 1 <= 20 and len({phase for one in (e, *also) for phase in one.outcomes}) >= 10
    assert pages(talk_typst(talk, doc), tmp_path) == len(talk) + 1  # none runs over
    first = next(i for i, b in enumerate(doc.blocks) if getattr(b, "appendix", False))
    assert pages(to_typst(replace(doc, blocks=doc.blocks[:first]), tmp_path), tmp_path) >= 20


def pages(source, folder):
    """Pages that Typst makes of a source."""
    for old in folder.glob("pages-*.png"):
        old.unlink()
    compile_typst(source, folder / "pages-{0p}.png", folder, 20)
    return len(list(folder.glob("pages-*.png")))


def test_the_report_has_verdicts_whoever_wrote_it_last(invented):
    """After a phase alone, a rebuild and `kimi-nb report`, the text has each claim with its word and interval."""
    e, file = Evidence(invented), invented.path / "research_report.md"
    found = e.outcomes["combined"].findings

    def holds(text):
        missing = [f.id for f in found if f"**{f.word}**" not in text]
        return not missing and all(
            f"{f.ci_low:+.4g} to {f.ci_high:+.4g}" in text for f in found if f.ci_low is not None
        )

    assert holds(file.read_text()) and "## Answers" not in file.read_text()  # as `record_outcome` left it
    invented.rebuild()
    assert holds(file.read_text()) and "## combined" in file.read_text()
    assert holds(short_report(e)) and "## Answers" in short_report(e)


def test_the_short_form_has_four_pages_and_the_answers(tmp_path, invented):
    """Each question that was asked stands in it with its word and, where one was drawn, a figure."""
    e = Evidence(invented)
    doc = build_short(e, drawings=draw_own(e, tmp_path))
    told = [finding for answer in short_answers([e]) for finding in answer.findings]
    whole = " ".join(block.markdown for block in doc.blocks if hasattr(block, "markdown"))
    assert {"RQ1", "RQ4", "RQ5", "H5"} <= {finding.id for finding in told}
    assert all(f"**{finding.id}** (*{finding.word}*)" in whole for finding in told)
    assert any(getattr(block, "id", "") == "parts-inside" for block in doc.blocks)
    bring(doc, tmp_path)
    assert 2 <= pages(to_typst(doc, tmp_path), tmp_path) <= 4


@pytest.mark.slow
def test_the_published_short_form_fits_four_pages(tmp_path):
    """With every figure of the largest published profile."""
    from kimi_nb.plan import published, published_profiles

    *smaller, strongest = published_profiles()
    e = Evidence(published(strongest))
    doc = build_short(e, others(e, [published(p) for p in smaller], strict=False), draw_own(e, tmp_path))
    bring(doc, tmp_path)
    assert pages(to_typst(doc, tmp_path), tmp_path) <= 4


def test_the_card_is_one_page_and_says_what_is_open(tmp_path, invented):
    """Parts with their intervals, what was not decided, and no row that repeats another."""
    e = Evidence(invented)
    card = card_of(e, dict(training=90.0))
    text = card_text(card)
    assert text.count("\n") <= 60 and len({row[0] for row in card.rows}) == len(card.rows)
    parts = [row[0] for row in card.rows[:4]]
    assert parts[-1] == "Muon on the hidden matrices instead of AdamW" and "beyond the margin" in card.rows[3][2]
    left = [
        f.id.removeprefix("criterion ") for f in e.answers if f.word in ("undecided", "not testable here", "not run")
    ]
    assert left and all(id in card.open for id in left)
    assert "1 min 30 s (training 1 min 30 s)" in card.time


def test_the_main_study_is_one_that_ran(tmp_path):
    """A folder where another phase was declared and never trained is quoted from what is there."""
    store = Store(tmp_path / "results")
    base = RunConfig().override({"data.corpus": "tinyworld", "data.tokenizer": "byte"})
    arms = [Arm("a"), Arm("b", {"model.norm.kind": "rmsnorm"})]
    made = {
        phase: Study(name=phase, phase=phase, base=base.override({"train.steps": steps}), arms=arms, baseline="a")
        for steps, phase in enumerate(("norm", "rope"), 50)
    }
    for study in made.values():
        store.record_study(study)
    for point in made["rope"].expand():
        store.put(Record.of(point.run, "done", dict(test_bpb=3.0, training_seconds=1.0), {}), "rope")
    assert Evidence(store).main == "rope" and "no runs of" not in card_of(Evidence(store)).ran
