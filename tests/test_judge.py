"""Anybody's runs: files of every kind are read or refused in a line, and judged as our own records are."""

import gzip
import json
import math
import sqlite3
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from kimi_nb.cli import main
from kimi_nb.config import KimiError
from kimi_nb.report import judged_html, judged_json, judged_markdown, judged_text
from kimi_nb.stats import StatsError, compare, decide, judge, judged, noise, read_runs, unpaired
from kimi_nb.study import Finding, read_outcome

REPO = Path(__file__).resolve().parents[1]
GOLF = "val_bpb,42,0,1234\nbase,1.05989454,1.06124613,1.06208695\nnew,1.05906444,1.06059202,1.06129561\n"
GOOD = "arm,seed,val_bpb\nbase,0,1.10\nbase,1,1.12\nbase,2,1.11\nmoe,0,1.05\nmoe,1,1.08\nmoe,2,1.06\n"


def of_file(path, *arguments, **how):
    """What is found in a file, and what is said of it."""
    loaded = read_runs([path], how.pop("pattern", ""), how.get("names", ""))
    found = judged(loaded.frame, *arguments, **how)
    return found._replace(said=(*loaded.said, *found.said))


def of_text(folder, text, name="runs.csv", *arguments, **how):
    """The same for the text of a file."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return of_file(path, *arguments, **how)


# --- files that are not as they should be ------------------------------------------------------------------------


REFUSED = {
    "empty": ("", "is empty"),
    "header only": ("arm,seed,val_bpb\n", "a header and no rows"),
    "one column": ("val_bpb\n1.1\n1.2\n", "one column only"),
    "no header": ("1.1,0,2\n1.2,1,3\n", "numbers only"),
    "missing column": ("arm,seed,note\nbase,0,x\nmoe,0,y\n", "no column has numbers"),
    "text in a number": (GOOD.replace("1.08", "broken"), "'broken' in row 5"),
    "one arm": ("arm,seed,val_bpb\nbase,0,1.1\nbase,1,1.2\n", "one arm only (base)"),
    "no baseline": (GOOD.replace("base", "a") + "b,0,1.2\nb,1,1.3\n", "which arm is the baseline"),
    "no arm": ("seed,val_bpb\n0,1.1\n1,1.2\n", "no column names the arm"),
    "two arm columns": (
        "optimizer,norm,seed,x\na,p,0,1\na,q,1,2\nb,p,0,3\nb,q,1,4\n",
        "which column names the arm is not clear",
    ),
    "mixed units": (GOOD.replace("1.08", "1.08 bits").replace("1.05", "1.05 nats"), "mixes the units"),
    "shares and percent": (GOOD.replace("val_bpb", "accuracy").replace("1.", "0.").replace("0.08", "71"), "percent"),
    "ambiguous comma": (GOOD.replace(",", ";").replace("1.10", "1,100").replace("1.12", "1,120"), "two numbers"),
    "mean with spread": (GOOD.replace("1.08", "1.08 ± 0.01"), "one row a run"),
    "ragged": (GOOD + "moe,3,1.1,9\n", "row 7 of"),
    "binary": (b"\x00\x01\x02" * 50, "is a binary file"),
    "picture": (b"\x89PNG\r\n\x1a\n" + b"\x00" * 50, "is a picture"),
    "spreadsheet": (b"PK\x03\x04" + b"x" * 50, "save the table as CSV"),
    "damaged parquet": (b"PAR1" + b"x" * 50, "cannot be read as parquet"),
    "bad JSON line": ('{"arm": "a", "seed": 0, "val_bpb": 1}\n{"arm": \n', "line 2 of"),
    "JSON of numbers": ("[1, 2, 3]", "no list of objects"),
    "chart of groups": ("Step,a - loss,a - loss__MIN,a - loss__MAX\n1,2,1,3\n", "means of groups"),
    "two metrics": ("arm,seed,x,y\na,0,1,2\nb,0,3,4\n", "say --metric"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(kind, tmp_path):
    text, words = REFUSED[kind]
    with pytest.raises(StatsError) as refusal:
        of_text(tmp_path, text)
    assert words in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


MENDED = {
    "byte order mark": (b"\xef\xbb\xbf" + GOOD.encode(), "byte order mark"),
    "Latin-1": (GOOD.replace("moe", "größe").encode("latin-1"), "Latin-1"),
    "UTF-16": (GOOD.encode("utf-16"), "UTF-16"),
    "tabs": (GOOD.replace(",", "\t"), "divided by tabs"),
    "semicolons and commas": (GOOD.replace(",", ";").replace(".", ","), "the comma is read as the decimal point"),
    "quoted numbers": (GOOD.replace("1.10", '"1.10"').replace("1.05", "'1.05'"), ""),
    "header twice": (GOOD.replace("moe,0", "arm,seed,val_bpb\nmoe,0"), "is repeated one time"),
    "short rows": (GOOD + "moe,3\n", "one row of"),
    "trailing separators": (GOOD.replace("1.10\n", "1.10,,\n"), ""),
    "empty lines": (GOOD.replace("\n", "\r\n\r\n"), ""),
    "not a number": (GOOD + "moe,3,nan\nbase,3,1.1\n", "nan or infinite: diverged"),
    "infinite": (GOOD + "base,3,1.1\nmoe,3,-Infinity\n", "nan or infinite: diverged"),
    "missing value": (GOOD + "moe,3,\nbase,3,1.1\n", "one run without val_bpb left out"),
    "one unit": (GOOD.replace("\n", " bpb\n").replace("val_bpb bpb", "val_bpb"), "the unit bpb is taken off"),
    "typographic minus": (GOOD.replace("val_bpb", "x").replace("1.0", "−1.0"), ""),
    "rows that sum up": (GOOD + "moe,mean,1.06\n", "one row that sums up left out"),
    "seed without value": (GOOD + "moe,,1.07\n", "one run without a seed"),
    "unknown extension": (GOOD, ""),
}


@pytest.mark.parametrize("kind", MENDED)
def test_what_can_be_mended_is_mended_and_said(kind, tmp_path):
    text, words = MENDED[kind]
    name = "runs.results" if kind == "unknown extension" else "runs.csv"
    found = of_text(tmp_path, text, name)
    assert any(words in line for line in found.said) or not words
    (finding,) = found.findings
    assert finding.n == 3 and math.isclose(
        abs(finding.diff), 0.14 / 3 if kind != "typographic minus" else 1.11 + 3.19 / 3
    )


FORMS = (
    GOOD,
    GOOD.replace(",", ";"),
    GOLF,
    "| arm | seed | loss |\n|---|---|---|\n| a | 1 | 2.5 |\n| b | 1 | 2 |\n",
    '[{"arm": "a", "s": {"seed": 1}, "loss": 3}, {"arm": "b", "s": {"seed": 1}, "loss": 2}]',
    "Step,a-s0 - loss,a-s0 - loss__MIN,b-s0 - loss,b-s0 - loss__MIN\n1,2,2,3,3\n",
    '{"results": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}}, "model_name": "m"}',
)
PIECES = [
    *',;\n\t-"|{}[]%−±',
    "nan",
    "inf",
    "1e999",
    "1,5",
    "\x00",
    "é",
    "seed",
    "arm",
    "null",
    " - loss__MIN",
    "mean",
    "",
]


def judged_or_refused(folder, text):
    """Whatever is in a file: findings in every form, or one line."""
    path = folder / "runs.json"
    path.write_text(text, encoding="utf-8")
    try:
        found = of_file(path)
    except KimiError as e:
        assert str(e) and "\n" not in str(e)
        return
    for form in (judged_text, judged_html, judged_markdown, judged_json):
        assert form(found)


damaged = st.tuples(st.sampled_from(FORMS), st.floats(0, 1), st.sampled_from(PIECES), st.integers(0, 12))


def damage(form, place, piece, gone):
    at = int(place * len(form))
    return form[:at] + piece + form[at + gone :]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(how=damaged)
def test_a_damaged_file_is_judged_or_refused(how, tmp_path_factory):
    judged_or_refused(tmp_path_factory.mktemp("damaged"), damage(*how))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(how=damaged, again=st.sampled_from(PIECES), place=st.floats(0, 1))
def test_a_file_that_is_damaged_twice_is_judged_or_refused(how, again, place, tmp_path_factory):
    judged_or_refused(tmp_path_factory.getbasetemp(), damage(damage(*how), place, again, 0))


def test_a_diverged_run_is_not_forgotten(tmp_path):
    """The arm looks better in the runs that are left; they may not say so."""
    (finding,) = of_text(tmp_path, GOOD + "base,3,1.11\nmoe,3,nan\n").findings
    assert finding.word == "undecided" and any("diverged" in caveat for caveat in finding.caveats)
    assert finding.direction == "unclear" and finding.size in ("unclear", "")  # so no page calls it better
    assert of_text(tmp_path, GOOD).findings[0].word == "supported"
    row = dict(metric="test_bpb", arm="a", baseline="b", diff=-0.018, se=0.003, df=9.0, n=10, p_adj=0.001, margin=0.02)
    whole, left = (decide(row | dict(n_diverged=n, n_failed=n)) for n in (0, 1))  # smaller than the margin: undecided
    assert whole.word == left.word == "undecided" and (whole.direction, left.direction) == ("better", "unclear")


def test_duplicate_seeds_are_one_run_and_one_seed_is_no_spread(tmp_path):
    twice = of_text(tmp_path, GOOD + "moe,0,1.05\n")
    assert any("their mean counts as one run" in line for line in twice.said)
    assert twice.findings[0].diff == pytest.approx(of_text(tmp_path, GOOD).findings[0].diff)
    (alone,) = of_text(tmp_path, "arm,seed,val_bpb\nbase,0,1.1\nmoe,0,1.0\n").findings
    assert alone.word == "not testable here" and "no spread" in alone.reason


def test_a_file_that_is_wildly_large_is_not_opened(tmp_path):
    path = tmp_path / "huge.csv"
    with path.open("wb") as file:
        file.truncate(5_000_000_000)  # a hole, no bytes on the disk
    with pytest.raises(StatsError, match=r"5\.0 GB and at most 1 GB"):
        of_file(path)


def test_a_small_file_that_unpacks_to_gigabytes_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_nb.stats.foreign.LARGEST_UNPACKED", 1 << 20)
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(bytes(8 << 20)))
    with pytest.raises(StatsError, match="unpacks to more than 1 MB"):
        of_file(path)
    path.write_bytes(gzip.compress(GOOD.encode())[:-12])
    with pytest.raises(StatsError, match="cut short"):
        of_file(path)


@pytest.mark.timeout(20)
def test_what_never_ends_is_no_file_of_runs():
    with pytest.raises(StatsError, match="does not exist"):
        of_file(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["runs.json", "runs.jsonl"])
def test_json_that_is_nested_too_deeply_is_refused_in_one_line(name, tmp_path):
    for start in ("[", '{"a":'):
        with pytest.raises(StatsError, match=r"nested too deeply|is not JSON"):
            of_text(tmp_path, start * 200_000, name)


def test_a_name_cannot_steer_the_terminal(tmp_path, capsys):
    """Escape sequences and marks of direction in an arm's name are spelled out."""
    path = tmp_path / "runs.csv"
    path.write_text(GOOD.replace("moe", "\x1b[31mred\x1b[2J\u202e"))
    assert main(["judge", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[31mred" in shown and "\\u202e" in shown and "\x1b" not in shown and "\u202e" not in shown


@pytest.mark.parametrize("asked", [dict(seed="sede"), dict(arm="arms"), dict(metrics="val_bbp"), dict(block="bolck")])
def test_a_wrong_name_of_a_column_is_told_with_the_nearest(asked, tmp_path):
    with pytest.raises(StatsError, match=r"did you mean .*(seed|arm|val_bpb)"):
        of_text(tmp_path, GOOD, **asked)


def test_a_baseline_that_is_not_there_is_told(tmp_path):
    with pytest.raises(StatsError, match="did you mean base"):
        of_text(tmp_path, GOOD, baseline="bse")


# --- forms of files ----------------------------------------------------------------------------------------------


def written(frame, form, path):
    """The table in a form."""
    if form == "parquet":
        frame.to_parquet(path)
    elif form == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif form == "json":
        frame.to_json(path)
    elif form == "md":
        path.write_text(
            "\n".join(f"| {' | '.join(map(str, row))} |" for row in [frame.columns, ["---"] * 3, *frame.values])
        )
    else:
        frame.to_csv(path, index=False, sep={"tsv": "\t"}.get(form, ","))


@pytest.mark.parametrize("form", ["csv", "tsv", "csv.gz", "json", "jsonl", "parquet", "md"])
def test_every_form_of_a_table_gives_the_same_findings(form, tmp_path):
    frame = pd.DataFrame(dict(arm=["a"] * 4 + ["b"] * 4, seed=[0, 1, 2, 3] * 2, loss=np.arange(8.0) ** 2 + 1))
    written(frame, form, tmp_path / f"runs.{form}")
    assert of_file(tmp_path / f"runs.{form}").findings == judge(frame)


def test_a_wide_table_is_turned_on_its_side(tmp_path):
    (finding,) = of_text(tmp_path, GOLF, margin=0.005 / math.log(2)).findings
    assert (finding.word, finding.direction, finding.size, finding.n) == ("no difference", "better", "within", 3)
    across = "seed,base,new\n42,1.05989454,1.05906444\n0,1.06124613,1.06059202\n1234,1.06208695,1.06129561\n"
    (other,) = of_text(tmp_path, across, baseline="base", metrics="val_bpb").findings
    assert other.diff == pytest.approx(finding.diff) and other.metric == "val_bpb"


def event_file(path, *values):
    """An event file of TensorBoard by hand: (step, tag, number), some as tensors."""
    field = lambda number, data: bytes([number << 3 | 2, len(data)]) + data
    records = b""
    for at, (step, tag, number) in enumerate(values):
        plain = bytes([2 << 3 | 5]) + struct.pack("<f", number)
        tensor = field(8, bytes([1 << 3, 1]) + field(4, struct.pack("<f", number)))
        value = field(1, tag.encode()) + (tensor if at % 2 else plain)
        event = bytes([1 << 3 | 1]) + struct.pack("<d", 0.0) + bytes([2 << 3, step]) + field(5, field(1, value))
        records += struct.pack("<QI", len(event), 0) + event + struct.pack("<I", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(records)


def test_tensorboard(tmp_path):
    for arm, start in (("adam", 2.0), ("muon", 1.5)):
        for seed in range(3):
            end = start + 0.01 * seed**2
            event_file(
                tmp_path / f"{arm}_seed{seed}" / "events.out.tfevents.1.host",
                (1, "val/loss", 9.0),
                (7, "val/loss", end),
            )
    found = of_file(tmp_path, baseline="adam", better="lower")
    assert found.findings[0].n == 3 and found.findings[0].diff == pytest.approx(-0.5)
    (tmp_path / "adam_seed0" / "events.out.tfevents.2.host").write_bytes(b"\xff" * 40)
    assert of_file(tmp_path, baseline="adam").findings[0].n == 3, "a file that was cut short"


def test_tensorboard_as_it_writes_itself(tmp_path):
    pytest.importorskip("tensorboard")
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path / "a-s0") as writer:
        writer.add_scalar("loss", 3.0, 1)
        writer.add_scalar("loss", 2.5, 300)
    assert read_runs([tmp_path]).frame["loss"].tolist() == [2.5]


def test_trackio(tmp_path):
    with sqlite3.connect(tmp_path / "project.db") as database:
        database.execute(
            "create table metrics (id integer primary key, timestamp text, run_name text, step integer, metrics text)"
        )
        database.execute("create table configs (id integer primary key, run_name text, config text)")
        for run, arm, seed, loss in (
            ("r1", "a", 0, 2.0),
            ("r2", "a", 1, 2.2),
            ("r3", "b", 0, 1.9),
            ("r4", "b", 1, 2.0),
        ):
            for step, value in ((0, 9.0), (5, loss)):
                row = ("2026", run, step, json.dumps(dict(loss=value)))
                database.execute("insert into metrics (timestamp, run_name, step, metrics) values (?, ?, ?, ?)", row)
            config = json.dumps(dict(optimizer=arm, seed=seed, _username="x"))
            database.execute("insert into configs (run_name, config) values (?, ?)", (run, config))
    database.close()
    (finding,) = of_file(tmp_path / "project.db", arm="optimizer", seed="seed", baseline="a").findings
    assert finding.n == 2 and finding.diff == pytest.approx(-0.15)
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("create table other (id integer)")
    database.close()
    with pytest.raises(StatsError, match="without runs of trackio"):
        of_file(tmp_path / "other.db")


def harness_file(path, model, scores):
    results = {
        task: {"alias": task, "acc,none": acc, "acc_stderr,none": error} for task, (acc, error) in scores.items()
    }
    path.write_text(json.dumps({"results": results, "model_name": model, "n-samples": {}}))


def test_harness_results_are_compared_by_their_items(tmp_path):
    harness_file(tmp_path / "results_1.json", "base", dict(arc=(0.50, 0.010), boolq=(0.60, 0.010)))
    harness_file(tmp_path / "results_2.json", "new", dict(arc=(0.56, 0.010), boolq=(0.601, 0.010)))
    found = of_file(tmp_path, "acc", "base")
    arc, boolq = found.findings
    z = 0.06 / math.hypot(0.01, 0.01)
    assert (arc.block, arc.word, boolq.word) == ("arc", "supported", "undecided")
    assert (
        arc.p_adj == pytest.approx(2 * 2 * scipy_stats.norm.sf(z), rel=1e-3) and "not of training again" in arc.notes[0]
    )


def test_harness_results_of_several_seeds_are_paired(tmp_path):
    for arm, gain in (("base", 0.0), ("new", 0.05)):
        for seed in range(4):
            harness_file(
                tmp_path / f"results_{arm}{seed}.json",
                f"{arm}-seed{seed}",
                dict(arc=(0.5 + gain + seed**2 / 100 + gain * seed / 50, 0.01)),
            )
    (finding,) = of_file(tmp_path, "acc", "base").findings
    assert finding.n == 4 and finding.n_unit == "pairs" and finding.direction == "better"


def test_a_chart_of_weights_and_biases(tmp_path):
    head, last = ["Step"], ["9"]
    for run, value in (("base-s0", 2.0), ("base-s1", 2.2), ("new-s0", 1.9), ("new-s1", 2.0)):
        head += [f"{run} - eval/loss{end}" for end in ("", "__MIN", "__MAX")]
        last += [str(value)] * 3
    (finding,) = of_text(tmp_path, "\n".join(",".join(f'"{cell}"' for cell in row) for row in (head, last))).findings
    assert finding.metric == "eval/loss" and finding.n == 2 and finding.direction in ("unclear", "better")


def test_a_table_of_runs_with_dates_and_states(tmp_path):
    rows = ["Name,State,Created,seed,optimizer,val/loss"]
    for at, (arm, seed, loss) in enumerate((("adam", 0, 2.5), ("adam", 1, 2.55), ("muon", 0, 2.4), ("muon", 1, 2.47))):
        rows.append(f"run-{at},finished,2026-01-0{at + 1},{seed},{arm},{loss}")
    found = of_text(
        tmp_path, "\n".join([*rows, "run-9,crashed,2026-01-09,2,muon,2.9", "run-8,finished,2026-01-09,2,adam,2.6"])
    )
    (finding,) = found.findings
    assert "arms by optimizer" in found.said and finding.n == 2 and finding.diff == pytest.approx(-0.09)
    assert any("did not finish" in caveat for caveat in finding.caveats)


def test_several_columns_may_name_an_arm():
    rows = [
        dict(attention=a, norm=n, seed=s, loss=2.0 + s) for a in ("mha", "mla") for n in ("ln", "rms") for s in range(3)
    ]
    with pytest.raises(StatsError, match="say --arm with one, or all: attention norm"):
        judge(pd.DataFrame(rows))
    found = judge(pd.DataFrame(rows), baseline="attention=mha, norm=ln", arm=["attention", "norm"])
    assert len(found) == 3 and {finding.family_size for finding in found} == {3}


def test_nested_JSON_of_runs(tmp_path):
    rows = [
        dict(name=f"r{at}", config=dict(optimizer=arm, seed=seed), summary=dict(val_loss=loss))
        for at, (arm, seed, loss) in enumerate((("a", 0, 2.0), ("a", 1, 2.2), ("b", 0, 1.9), ("b", 1, 2.05)))
    ]
    (finding,) = of_text(
        tmp_path, json.dumps(rows), "runs.json", "val_loss", "a", arm="optimizer", seed="seed"
    ).findings
    assert finding.metric == "summary.val_loss" and finding.n == 2


def test_a_folder_of_logs(tmp_path):
    for arm, value in (("base", 1.10), ("moe", 1.05)):
        for seed in range(3):
            text = f"step 1 val_bpb: 9.0\nstep 2 val_bpb: {value + 0.01 * seed**2:.4f}\n"
            (tmp_path / f"{arm}_seed{seed}.log").write_text(text)
    (tmp_path / "notes.log").write_text("nothing")
    found = of_file(tmp_path, pattern=r"val_bpb: (?P<val_bpb>[0-9.]+)")
    assert found.findings[0].n == 3 and any("without such a line" in line for line in found.said)
    assert of_file(tmp_path, pattern=r"val_bpb: ([0-9.]+)", better="lower").findings[0].diff == pytest.approx(-0.05)
    for pattern, words in (("([", "no regular expression"), ("val_bpb", "has no group"), ("(x+)", "no line of")):
        with pytest.raises(StatsError, match=words):
            read_runs([tmp_path], pattern)


def test_files_that_are_arms(tmp_path):
    for arm, start in (("base", 1.0), ("muon", 0.9)):
        (tmp_path / f"{arm}.csv").write_text("seed,loss\n" + "".join(f"{s},{start + s * s / 100}\n" for s in range(3)))
    loaded = read_runs([tmp_path / "base.csv", tmp_path / "muon.csv"])
    (finding,) = judge(loaded.frame)
    assert (finding.arm, finding.baseline, finding.n) == ("muon", "base", 3)


# --- the numbers -------------------------------------------------------------------------------------------------


DARWIN = (  # heights of maize in eighths of an inch; Fisher, The Design of Experiments (1935), §17
    [188, 96, 168, 176, 153, 172, 177, 163, 146, 173, 186, 168, 177, 184, 96],
    [139, 163, 160, 160, 147, 149, 149, 122, 132, 144, 130, 144, 102, 124, 144],
)
SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


def two_arms(first, second, paired=True):
    seeds = [*range(len(first)), *range(0 if paired else 100, len(second) + (0 if paired else 100))]
    return pd.DataFrame(dict(arm=["base"] * len(first) + ["new"] * len(second), seed=seeds, score=[*first, *second]))


def test_published_worked_examples():
    crossed, selfed = DARWIN
    (finding,) = judge(two_arms(selfed, crossed))
    assert finding.p_adj == pytest.approx(0.0497, abs=5e-5) and finding.diff == pytest.approx(20.933, abs=1e-3)
    assert (finding.ci_low, finding.ci_high) == pytest.approx((0.03, 41.83), abs=0.01)
    (finding,) = judge(two_arms(*SLEEP))  # Student (1908), as R prints it
    assert finding.p_adj == pytest.approx(0.002833, abs=1e-6)
    (finding,) = judge(two_arms(*SLEEP, paired=False))
    assert (finding.p_adj, finding.df) == pytest.approx((0.07939, 17.776), abs=1e-3)


@pytest.mark.parametrize(
    ("others", "test"), [((0, 1, 2, 3), "pairs"), ((2, 3, 4, 5), "pairs"), ((3, 4, 5, 6), "welch"), ((1, 2), "pairs")]
)
def test_seeds_pair_where_half_of_them_are_shared(others, test):
    rng = np.random.default_rng(0)
    rows = [
        dict(arm=arm, seed=seed, loss=rng.normal())
        for arm, seeds in (("base", range(4)), ("new", others))
        for seed in seeds
    ]
    (finding,) = judge(pd.DataFrame(rows))
    assert finding.facts["test"] == test and finding.n == (len(set(others) & set(range(4))) if test == "pairs" else 8)
    assert judge(pd.DataFrame(rows), pairs=False)[0].facts["test"] == "welch"


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(n=st.integers(2, 7), m=st.integers(2, 7), seed=st.integers(0, 999), margin=st.sampled_from([None, 0.5]))
def test_findings_agree_with_scipy_and_statsmodels(n, m, seed, margin):
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.weightstats import ttost_ind, ttost_paired

    rng = np.random.default_rng(seed)
    base, own = rng.normal(0, 1, n), rng.normal(0.5, 2, m)
    apart = pd.concat(
        [
            two_arms(base, own, paired=False),
            two_arms(base, own + 1, paired=False).query("arm == 'new'").assign(arm="other"),
        ]
    )
    findings = judge(apart, margin=margin, rule=dict(correction="fdr"))
    theirs = [scipy_stats.ttest_ind(values, base, equal_var=False) for values in (own, own + 1)]
    assert [f.p_adj for f in findings] == pytest.approx(
        list(multipletests([t.pvalue for t in theirs], method="fdr_bh")[1])
    )
    for finding, test in zip(findings, theirs):
        interval = test.confidence_interval()
        assert (finding.ci_low, finding.ci_high, finding.df) == pytest.approx((interval.low, interval.high, test.df))
    if n == m:
        (finding,) = judge(two_arms(base, own), margin=margin)
        assert finding.p_adj == pytest.approx(scipy_stats.ttest_rel(own, base).pvalue)
        if margin:
            assert finding.p_margin == pytest.approx(ttost_paired(own, base, -margin, margin)[0])
    (alone,) = judge(two_arms(base, own, paired=False), margin=margin)
    if margin:
        assert alone.p_margin == pytest.approx(ttost_ind(own, base, -margin, margin, usevar="unequal")[0], abs=0.02)


@pytest.mark.slow
def test_our_own_records_are_judged_as_by_the_phases(tmp_path):
    """From a CSV of the published runs come the findings that the phase published."""
    from kimi_nb.plan import published
    from kimi_nb.stats import with_targets

    store = published("standard")
    outcome = read_outcome(store, "optimizer")
    frame, curves = store.frame("optimizer", stale=True), store.curves("optimizer", ["val_loss"], stale=True)
    for id in ("RQ4", "RQ4-adam", "RQ4-stability", "H4"):
        theirs = outcome.finding(id)
        with_targets(frame, curves, theirs.baseline).to_csv(tmp_path / "runs.csv", index=False)
        how = dict(margin=theirs.margin, claim=theirs.claimed)
        found = of_file(tmp_path / "runs.csv", theirs.metric, theirs.baseline, **how).findings
        (mine,) = (finding for finding in found if finding.arm == theirs.arm)
        for name in ("word", "direction", "size", "n", "family_size"):
            assert getattr(mine, name) == getattr(theirs, name), (id, name)
        for name in ("diff", "ci_low", "ci_high", "ci_all_low", "ci_all_high", "p_adj", "detectable", "mean"):
            near = 5e-3 if id == "H4" else 1e-9  # published curves are rounded, and with them where they cross a target
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=near), (id, name)


OWN_FAMILY = {"RQ1-kernel", "rope-long"}  # questions of a phase about a part of its table, or about another one


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["quick", "standard"])
def test_every_paired_finding_of_the_phases_comes_from_a_CSV_of_their_runs(profile, tmp_path):
    from kimi_nb.plan import published
    from kimi_nb.study import outcomes_of

    store, seen = published(profile), 0
    studies = set(store.frame(stale=True)["study"])
    for phase, outcome in outcomes_of(store, profile).items():
        if phase not in studies:
            continue
        frame = store.frame(phase, stale=True)
        frame.to_csv(tmp_path / "runs.csv", index=False)
        table = read_runs([tmp_path / "runs.csv"]).frame
        for theirs in (part for finding in outcome.findings for part in finding.parts or (finding,)):
            known = {theirs.arm, theirs.baseline} <= set(frame["arm"]) and theirs.metric in frame
            if not known or theirs.p_adj is None or theirs.n_unit != "pairs" or theirs.id in OWN_FAMILY:
                continue
            rule = dict(min_effect=theirs.min_effect, correction=theirs.correction)
            how = dict(margin=theirs.margin, claim=theirs.claimed, rule=rule)
            found = judge(table, theirs.metric, theirs.baseline, **how)
            (mine,) = (f for f in found if (f.arm, f.block) == (theirs.arm, theirs.block))
            same = ("diff", "ci_low", "ci_high", "p_adj", "detectable")
            assert [getattr(mine, n) for n in same] == pytest.approx([getattr(theirs, n) for n in same], rel=1e-9), (
                theirs.id
            )
            assert (mine.word, mine.family_size) == (theirs.word, theirs.family_size), theirs.id
            seen += 1
    assert seen >= 8


def test_two_blocks_and_two_metrics_with_unequal_numbers_of_seeds():
    rows = [
        dict(
            task=task,
            variant=arm,
            seed=seed,
            acc=0.5 + 0.1 * (arm == "b") + seed**2 / 500,
            ms=10.0 + seed * (arm == "b"),
        )
        for task in ("x", "y")
        for arm, count in (("a", 5), ("b", 3))
        for seed in range(count)
    ]
    found = judged(pd.DataFrame(rows), ["acc", "ms"], "a", arm="variant", block="task", margin=dict(acc=0.01))
    assert [(f.metric, f.block, f.n, f.family_size) for f in found.findings] == [
        (metric, block, 3, 2) for metric in ("acc", "ms") for block in ("x", "y")
    ]
    assert [f.margin for f in found.findings] == [0.01, 0.01, None, None]
    assert all("Incomplete pairs left out: 3, 4." in f.caveats for f in found.findings)


def test_the_direction_is_known_guessed_or_asked():
    frame = two_arms([1.0, 1.1, 1.2, 1.15], [2.0, 2.3, 2.1, 2.2]).rename(columns=dict(score="zeal"))
    assert judge(frame)[0].direction == "higher" and judge(frame)[0].claimed == "different"
    assert judge(frame, better="lower")[0].direction == "worse"
    assert judge(frame.rename(columns=dict(zeal="eval/error")))[0].direction == "worse"


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=st.lists(st.floats(-100, 100, allow_nan=False), min_size=4, max_size=12),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.001, 1.0, 1000.0]),
)
def test_order_and_unit_change_nothing_but_what_they_should(values, seed, scale):
    half = len(values) // 2
    frame = two_arms(np.round(values[:half], 3), np.round(values[half : 2 * half], 3))
    (first,) = judge(frame, baseline="base")
    (mixed,) = judge(frame.sample(frac=1, random_state=seed), baseline="base")
    assert mixed.word == first.word and (mixed.diff == first.diff or mixed.diff == pytest.approx(first.diff))
    (scaled,) = judge(frame.assign(score=frame["score"] * scale), baseline="base")
    if first.p_adj is not None and scaled.p_adj is not None:
        assert scaled.p_adj == pytest.approx(first.p_adj, rel=1e-6, abs=1e-9)


def test_what_chance_gives():
    (finding,) = judge(pd.read_csv(StringIO(GOOD)))
    assert finding.facts["chance"] == 1 / 8 and "1 of 8" in " ".join(finding.notes)
    (apart,) = judge(two_arms([1.0, 1.1], [2.0, 2.1], paired=False), better="higher")
    assert apart.facts["chance"] == pytest.approx(1 / 6)
    flips = np.random.default_rng(0).normal(size=(20_000, 4))
    assert np.mean(flips[:, :2].max(1) < flips[:, 2:].min(1)) == pytest.approx(1 / 6, abs=0.01)


def test_one_run_against_several_errs_as_often_as_it_says():
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        values = rng.normal(size=6)
        wrong += unpaired(values[:5], values[5:])["p"] < 0.05
    assert 0.02 < wrong / 400 < 0.085


# --- how it is told ----------------------------------------------------------------------------------------------


def hostile():
    arms = ["base"] * 3 + ["<script>alert(1)</script>"] * 3 + ["a|b*c_d`e"] * 3
    return judged(
        pd.DataFrame(dict(arm=arms, seed=[0, 1, 2] * 3, val_bpb=[1.1, 1.2, 1.15, 1.0, 1.12, 1.04, 1.1, 1.19, 1.16])),
        margin=0.01,
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_is_whole_and_escaped():
    page = judged_html(hostile(), "<i>title</i>")
    tags = Tags()
    tags.feed(page)
    assert (
        "script" not in tags.tags
        and "i" not in tags.tags
        and tags.outside == []
        and "http" not in page.replace("//www.w3", "")
    )
    drawing = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert len(drawing.findall("g")) == 2 and len(drawing.findall(".//circle")) == 2
    places = [float(c.get("cx")) for c in drawing.findall(".//circle")]
    assert places[0] < places[1], "the arm with the lower number stands left"


def test_the_other_forms():
    found = hostile()
    text = judged_markdown(found)
    assert "<script" not in text and text.count("\n| ") == 3 and "a\\|b\\*c" in text
    fields = json.loads(judged_json(found))
    assert [Finding(**{k: v for k, v in f.items() if k != "verdict"}) for f in fields["findings"]] == found.findings
    for width in (40, 60, 80, 120):
        assert max(map(len, judged_text(found, width).splitlines())) <= width


def test_the_command(tmp_path, capsys):
    file = tmp_path / "golf.csv"
    file.write_text(GOLF)
    assert main(["judge", str(file), "--margin", "0.0072", "--html", str(tmp_path / "page.html")]) == 0
    assert "better, by less than the margin" in capsys.readouterr().out and (tmp_path / "page.html").is_file()
    assert main(["judge", str(file), "--json", "--tried", "50"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"][0]["family_size"] == 50
    assert main(["judge", str(tmp_path / "none.csv")]) == 2
    assert main(["judge", str(file), "--metric", "vla_bpb", "--seed", "sed"]) == 2
    assert main(["noise", str(file)]) == 0
    error = capsys.readouterr()
    assert "cannot be seen with 3 seeds" in error.out and error.err.count("\n") == 2


def test_a_table_may_be_pasted(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(GOLF.encode())))
    assert main(["judge", "-"]) == 0 and "All 3 seeds are better" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"")))
    assert main(["judge", "-"]) == 2 and "the pasted table is empty" in capsys.readouterr().err


def test_nothing_heavy_is_loaded(tmp_path):
    """A verdict needs no torch, and nothing that trains."""
    (tmp_path / "golf.csv").write_text(GOLF)
    code = (
        "import sys; from kimi_nb.cli import main; main(['judge', *sys.argv[1:]]); main(['noise', *sys.argv[1:]]); "
        "heavy = {'torch', 'matplotlib', 'statsmodels', 'seaborn', 'transformers', 'kimi_nb.train', 'kimi_nb.model'}; "
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "golf.csv")]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
def test_a_hundred_thousand_rows_in_seconds(tmp_path):
    """The clock of the process counts, so that other work beside it does not."""
    rng = np.random.default_rng(0)
    arms = np.repeat([f"arm {i}" for i in range(20)], 5000)
    frame = pd.DataFrame(
        dict(arm=arms, seed=np.tile(np.arange(5000), 20), note="some words", val_bpb=rng.normal(1, 0.1, 100_000))
    )
    frame.to_csv(tmp_path / "runs.csv", index=False)
    code = (
        "import sys, time; from kimi_nb.cli import main; "
        "status = main(sys.argv[1:]); print(time.process_time(), file=sys.stderr); sys.exit(status)"
    )
    words = ["judge", str(tmp_path / "runs.csv"), "--baseline", "arm 0"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=REPO, capture_output=True, text=True, check=True)
    assert float(done.stderr.split()[-1]) < 5 and done.stdout.count("undecided") >= 15


# --- the noise floor ---------------------------------------------------------------------------------------------


def test_the_noise_floor_of_known_noise():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.05, 200)
    rows = [
        dict(arm=arm, seed=seed, loss=2.0 + shared[seed] + 0.1 * (arm == "b") + rng.normal(0, 0.01))
        for arm in "ab"
        for seed in range(200)
    ]
    found = noise(pd.DataFrame(rows))
    assert (
        found.spread.sd == pytest.approx(math.hypot(0.05, 0.01), rel=0.1)
        and found.spread.low < 0.051 < found.spread.high
    )
    assert found.sd_pairs == pytest.approx(0.01 * math.sqrt(2), rel=0.1)
    assert (found.floor["paired"] < found.floor["unpaired"]).all()


def test_causes_are_told_apart_where_columns_tell():
    rng = np.random.default_rng(3)
    order, start = rng.normal(0, 0.03, 12), rng.normal(0, 0.01, 12)
    rows = [
        dict(data_seed=i, init_seed=j, loss=1 + order[i] + start[j] + rng.normal(0, 0.001))
        for i in range(12)
        for j in range(12)
    ]
    spreads = {spread.what: spread for spread in noise(pd.DataFrame(rows)).causes}
    assert spreads["data order alone"].sd == pytest.approx(order.std(ddof=1), rel=0.05)
    assert spreads["initial values alone"].sd == pytest.approx(start.std(ddof=1), rel=0.15)


def test_runs_that_differ_in_nothing_show_the_machine():
    rows = [dict(seed=seed, repeat=r, loss=seed + 0.001 * r) for seed in range(3) for r in range(2)]
    again = noise(pd.DataFrame(rows)).causes[-1]
    assert again.what == "nothing: runs repeated" and again.sd == pytest.approx(0.001 / math.sqrt(2))


def test_arms_that_scatter_unequally_are_told():
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(30):
        rows = pd.DataFrame(dict(arm=np.repeat(list("abc"), 4), seed=list(range(4)) * 3, loss=rng.normal(size=12)))
        told += any("scatter unequally" in line for line in noise(rows).said)
    assert told <= 5, "by chance in a twentieth of the tables, at most"
    wild = rows.assign(loss=rows["loss"].where(rows["arm"] != "c", 100 * rows["loss"]))
    assert any("scatter unequally" in line for line in noise(wild).said)


def test_the_noise_of_one_run_is_refused():
    with pytest.raises(StatsError, match="a spread needs two"):
        noise(pd.DataFrame(dict(seed=[0], loss=[1.0])))
    with pytest.raises(KimiError):
        noise(pd.DataFrame(dict(seed=[0, 1], note=["x", "y"])))


@pytest.mark.slow
def test_noise_of_runs_that_are_trained(tmp_path, capsys):
    from tiny import RUN

    settings = [f"{name}={value}" for name, value in RUN.items()]
    words = [
        "--results",
        str(tmp_path),
        "noise",
        "--seeds",
        "3",
        "--repeats",
        "2",
        "--executor",
        "inprocess",
        "--set",
        *settings,
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "six runs of one arm" in text and "nothing: runs repeated: 0 " in text


def test_comparisons_of_ours_are_the_same_rows():
    """`judge` on a table in our form is `decide` on `compare`."""
    rng = np.random.default_rng(5)
    rows = [
        dict(run_id=f"{arm}{seed}", arm=arm, seed=seed, block="b", status="done", test_bpb=2 + rng.normal())
        for arm in ("base", "x", "y")
        for seed in range(5)
    ]
    frame = pd.DataFrame(rows)
    ours = [decide(row, margin=0.1) for row in compare(frame, "test_bpb", "base", margin=0.1).to_dict("records")]
    for mine, own in zip(judge(frame, "test_bpb", "base", margin=0.1), ours, strict=True):
        same = dict(id=own.id, claim=own.claim, facts=own.facts, notes=own.notes)
        assert mine.changed(**same).model_dump() == own.model_dump()
