"""Readers of files raise the project's own errors, whatever the bytes: noise, damaged files, well-sealed nonsense."""

import contextlib
import hashlib
import json
import resource
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import phase_cells, settings_text, tiny_run, write_notebook

from kimi_nb.config import KimiError, RunConfig, load_profile
from kimi_nb.study import Arm, Record, Store, Study, seal

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 0, "", "\x00", "../..", "nan", 2**63, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ODD = [
    b"\x00",
    b"\xff\xfe",
    b"{" * 2000,
    b"[" * 2000,
    b'"',
    b"\n",
    b"\\",
    b"9" * 5000,
    b"-",
    b"1e999",
    b"NaN",
    b"2020-99-99",
    b"!!python/object:os.system",
    b"&a *a",
    b"%(x)s",
    b"=",
    b"[tiny]",
    b": ",
    b"\xe2\x80\xa8",
]


@st.composite
def damaged(draw, whole):
    """Some bytes of a valid file replaced, removed, repeated or cut off."""
    data = bytes(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        drop = draw(st.sampled_from([0, 0, 1, 2, 7, 40, 10**6]))
        new = draw(st.sampled_from(ODD) | st.binary(max_size=4) | JSON.map(lambda v: json.dumps(v).encode()))
        data = data[:at] + new + data[at + drop :]
    return data


def paths(value, here=()):
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in items:
        yield from paths(v, (*here, k))


@st.composite
def nonsense(draw, value):
    """Valid JSON in which up to three places hold something else, or nothing."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(paths(value))))
        if not at:
            return draw(JSON) if draw(st.integers(0, 9)) == 0 else value
        node = value
        for k in at[:-1]:
            node = node[k]
        if draw(st.booleans()):
            node[at[-1]] = draw(JSON)
        elif isinstance(node, dict):
            node[draw(st.text(max_size=4))] = node.pop(at[-1])
        else:
            del node[at[-1]]
    return value


def file_of(whole):
    """Noise, a damaged file, or JSON nonsense where the file is JSON."""
    kinds = [st.binary(max_size=80), damaged(whole), damaged(whole)]
    with contextlib.suppress(ValueError):
        kinds.append(nonsense(json.loads(whole)).map(lambda v: json.dumps(v).encode()))
    return st.one_of(kinds)


def in_a_line(read):
    """What a reader gives, or its refusal."""
    try:
        return read()
    except KimiError as e:
        assert str(e).strip()


READERS = {}


def reader(make):
    """A pair of a strategy and a check, made from a folder to work in."""
    READERS[make.__name__] = make
    return make


@reader
def yaml_configuration(folder):
    """RunConfig.load of a YAML file"""
    path = folder / "c.yaml"
    return file_of(tiny_run().to_yaml().encode()), lambda data: (
        path.write_bytes(data),
        in_a_line(lambda: RunConfig.load(path).run_id),
    )


@reader
def json_configuration(folder):
    """RunConfig.load of a JSON file"""
    path = folder / "c.json"
    return file_of(tiny_run().to_json().encode()), lambda data: (
        path.write_bytes(data),
        in_a_line(lambda: RunConfig.load(path).run_id),
    )


@reader
def changes(folder):
    """override with any names and values"""
    names = st.sampled_from([*RunConfig().flat(), "model", "train", "model.attention"]) | st.text(max_size=12)
    values = JSON | st.text(max_size=12) | st.sampled_from([o.decode("latin-1")[:300] for o in ODD])
    return st.dictionaries(names, values, max_size=3), lambda c: in_a_line(lambda: RunConfig().override(c))


@reader
def settings_file(folder):
    """load_profile of a settings.ini"""
    path = folder / "settings.ini"
    return file_of(settings_text().encode()), lambda data: (
        path.write_bytes(data),
        in_a_line(lambda: load_profile("tiny", path)),
    )


def a_record():
    return Record.of(
        tiny_run(),
        "done",
        metrics={"test_bpb": 2.0},
        curves={"train_loss": {"step": [1, 2], "value": [3.0, 2.0]}},
        provenance={"device": "cpu"},
    )


@reader
def record(folder):
    """Record.from_json, and everything asked of a record that passes"""

    def use(data):
        got = in_a_line(lambda: Record.from_json(data.decode("utf-8", "replace"), "result.json"))
        if got is not None:
            assert got.digest and got.stale in (True, False)
            in_a_line(lambda: got.run)

    whole = a_record().to_dict()
    resealed = (
        nonsense(whole)
        .filter(lambda v: isinstance(v, dict))
        .map(lambda v: try_to(lambda: seal({k: x for k, x in v.items() if k != "digest"})).encode())
    )
    return st.one_of(file_of(a_record().to_json().encode()), resealed), use


def try_to(make):
    try:
        return make()
    except ValueError:  # NaN cannot be sealed
        return "{}"


@reader
def manifest(folder):
    """The file of a study, and the tables made from it"""
    study = Study(
        name="norm",
        base=tiny_run(),
        baseline="layernorm",
        seeds=(0, 1),
        arms=(Arm("layernorm"), Arm("rmsnorm", {"model.norm.kind": "rmsnorm"})),
    )
    Store(folder).record_study(study)
    path = folder / "studies" / "norm.json"
    whole = path.read_bytes()
    fields = {k: v for k, v in json.loads(whole).items() if k != "digest"}
    resealed = nonsense(fields).filter(lambda v: isinstance(v, dict)).map(lambda v: try_to(lambda: seal(v)).encode())

    def use(data):
        path.write_bytes(data)
        store = Store(folder)
        for call in (
            lambda: store.manifest("norm"),
            lambda: store.frame("norm", missing=True),
            lambda: store.record_study(study),
        ):
            in_a_line(call)
        assert isinstance(store.verify(), list)

    return st.one_of(file_of(whole), resealed), use


@reader
def exported_records(folder):
    """import_records of any file"""
    source = Store(folder / "source")
    source.put(a_record())
    source.export(folder / "out.jsonl")
    whole = (folder / "out.jsonl").read_bytes()
    head, body = whole.split(b"\n", 1)

    def use(data):
        shutil.rmtree(folder / "to", ignore_errors=True)
        (folder / "in.jsonl").write_bytes(data)
        in_a_line(lambda: Store(folder / "to").import_records(folder / "in.jsonl"))
        assert Store(folder / "to").verify() == []

    def with_checksum(body):
        fields = json.loads(head) | {"checksum": digest(body)}
        return json.dumps(fields).encode() + b"\n" + body

    def digest(body):
        from kimi_nb.study import digest_of

        return digest_of(body.decode("utf-8", "replace"))

    return st.one_of(file_of(whole), damaged(body).map(with_checksum)), use


def trained(folder):
    """A run stopped after 4 of 12 steps."""
    from kimi_nb.train import fit

    def stop(step, line):
        if step == 5:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(tiny_run(train__save_every=4), folder, progress=False, on_step=stop)
    return folder / "checkpoints" / "step_00000004"


def resealed_state(place, state):
    """state.json with the digests it ought to have."""
    state = {k: v for k, v in state.items() if k != "digest"}
    if isinstance(state.get("files"), dict):
        state["files"] = {
            k: hashlib.sha256((place / k).read_bytes()).hexdigest() if "\x00" not in k and (place / k).is_file() else v
            for k, v in state["files"].items()
        }
    (place / "state.json").write_text(
        json.dumps(state | {"digest": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()})
    )


@reader
def checkpoint_state(folder):
    """load_checkpoint and load_model with any state.json, with its own digest or not"""
    from kimi_nb.train import load_checkpoint, load_model

    place = trained(folder / "run")
    whole = (place / "state.json").read_bytes()

    def use(data):
        if isinstance(data, bytes):
            (place / "state.json").write_bytes(data)
        else:
            resealed_state(place, data)
        in_a_line(lambda: load_checkpoint(place))
        in_a_line(lambda: load_model(place))

    small = {k: v for k, v in json.loads(whole).items() if k != "run"}  # an absurd size of the model is another matter
    return st.one_of(file_of(whole), nonsense(small).filter(lambda v: isinstance(v, dict))), use


@reader
def checkpoint_tensors(folder):
    """load_model and resuming with any bytes as safetensors, with a fitting digest"""
    from kimi_nb.train import fit, load_model

    place = trained(folder / "run")
    state, whole = json.loads((place / "state.json").read_text()), (place / "model.safetensors").read_bytes()
    copy = folder / "copy"

    def use(data):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "run", copy)
        target = copy / "checkpoints" / place.name
        (target / "model.safetensors").write_bytes(data)
        resealed_state(target, state)
        in_a_line(lambda: load_model(target))
        in_a_line(
            lambda: fit(tiny_run(train__save_every=4, train__steps=12), copy, progress=False) if data != whole else None
        )

    size = int.from_bytes(whole[:8], "little")
    header = nonsense(json.loads(whole[8 : 8 + size])).map(
        lambda v: (h := json.dumps(v).encode()) and len(h).to_bytes(8, "little") + h + whole[8 + size :]
    )
    return st.one_of(damaged(whole), header, st.binary(max_size=40)), use


@reader
def metrics_log(folder):
    """Resuming with any metrics.jsonl"""
    from kimi_nb.train.journal import parse_journal

    trained(folder / "run")
    path = folder / "metrics.jsonl"
    whole = (folder / "run" / "metrics.jsonl").read_bytes()

    def use(data):
        path.write_bytes(data)
        lines = in_a_line(lambda: parse_journal(path.read_bytes(), path, 4))
        if lines is not None:
            assert [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4]
            json.dumps(lines)

    lines = [json.loads(line) for line in whole.splitlines()]
    return st.one_of(
        file_of(whole),
        nonsense(lines).filter(lambda v: isinstance(v, list)).map(lambda v: "\n".join(map(json.dumps, v)).encode()),
    ), use


@reader
def token_cache(folder):
    """TokenData and prepare with any meta.json or index"""
    from kimi_nb.data import TokenData, prepare

    wanted = dict(corpus="tinyworld", tokenizer="byte", num_documents=30)
    place = prepare(wanted, cache=folder).folder
    (index,) = (folder / "index").iterdir()
    meta, entry = (place / "meta.json").read_bytes(), index.read_bytes()

    def use(data):
        which, data = data
        (place / "meta.json" if which else index).write_bytes(data)
        in_a_line(lambda: TokenData(place))
        in_a_line(lambda: prepare(wanted, cache=folder))
        (place / "meta.json").write_bytes(meta)
        index.write_bytes(entry)

    return st.one_of(file_of(meta).map(lambda d: (True, d)), file_of(entry).map(lambda d: (False, d))), use


@reader
def tokenizer_files(folder):
    """Tokenizer.load with any files"""
    from kimi_nb.data import Tokenizer, prepare

    prepare(dict(corpus="tinyworld", tokenizer="bpe:300", num_documents=30), cache=folder).tokenizer.save(folder / "t")
    files = {p: p.read_bytes() for p in (folder / "t").iterdir()}

    def use(data):
        path, data = data
        path.write_bytes(data)
        in_a_line(lambda: Tokenizer.load(folder / "t").encode("a word"))
        path.write_bytes(files[path])

    return st.one_of([file_of(b).map(lambda d, p=p: (p, d)) for p, b in files.items()]), use


@reader
def outcome_and_timings(folder):
    """The outcome of a phase and the kept step times"""
    from kimi_nb.runner import read_sharing, read_timings
    from kimi_nb.study import Finding, outcome_file, read_outcome, record_outcome

    profile = folder / "settings.ini"
    profile.write_text(settings_text())
    findings = [Finding(id="a", claim="b", word="supported", reason="c")]
    record_outcome(Store(folder), "norm", load_profile("tiny", profile), findings)
    path = outcome_file(folder, "norm", "tiny")

    def use(data):
        path.write_bytes(data)
        in_a_line(lambda: read_outcome(Store(folder), "norm"))
        assert all(isinstance(v, float) and v > 0 for v in read_timings(path).values())
        assert all(rates[1] > 0 and set(rates) <= {1, 2, 4} for rates in read_sharing(path).values())

    return file_of(path.read_bytes()) | st.dictionaries(st.text(max_size=3), JSON).map(
        lambda v: json.dumps(v).encode()
    ), use


@reader
def notebook_parameters(folder):
    """check_parameters of any file"""
    from kimi_nb.plan import check_parameters

    path = write_notebook(folder / "n.ipynb", phase_cells("norm"))
    return file_of(path.read_bytes()), lambda data: (
        path.write_bytes(data),
        in_a_line(lambda: check_parameters(path, dict(profile="tiny", results="."))),
    )


ROWS = {
    "lambada": dict(text="He opened the door and left the room"),
    "hellaswag": dict(
        activity_label="Cooking",
        ctx_a="She cuts",
        ctx_b="then she",
        endings=["eats.", "sleeps.", "flies.", "sings."],
        label="0",
    ),
    "siqa": dict(context="Ann was late.", question="Why?", answerA="rain", answerB="sun", answerC="tea", label="1"),
    "squad": dict(
        context="The river is long.", question="What is long?", answers=dict(text=["The river"], answer_start=[0])
    ),
    "simple_qa": dict(id="a1", question="Where?", choices=["here", "there"], answer=1, half="general"),
    "cb": dict(premise="It rains.", hypothesis="It is wet.", label=2),
    "wsc": dict(text="Mark told Pete he won.", span1_text="Mark", span2_text="he", span2_index=3, label=0),
    "record": dict(passage="A b\n@highlight\nc", query="@placeholder won", entities=["A", "b"], answers=["A"]),
}


@reader
def task_rows(folder):
    """read_rows of local rows of any task; what passes can be shown to the harness's own functions"""
    from kimi_nb.evals import TASKS, read_rows, record_choices, record_target, record_text, squad_target

    path = folder / "rows.jsonl"

    def use(given):
        name, data = given
        path.write_bytes(data)
        for row in in_a_line(lambda: read_rows(path, TASKS[name])) or ():
            if name == "record":
                assert record_target(row) in record_choices(row) and record_text(row)
            if name == "squad":
                assert isinstance(squad_target(row), str)

    return st.sampled_from(sorted(ROWS)).flatmap(
        lambda n: st.tuples(st.just(n), file_of(json.dumps(ROWS[n]).encode()))
    ), use


HUGE = """
import json, sys
from pathlib import Path
from kimi_nb.config import KimiError
from kimi_nb.study import Store, seal

file = Path(sys.argv[1]) / "studies" / "norm.json"
whole = {k: v for k, v in json.loads(file.read_text()).items() if k != "digest"}

def places(value, here=()):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*here, name))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield here

for place in places(whole):
    for huge in (2**31, 10**12, 2**63):
        altered = json.loads(json.dumps(whole))
        node = altered
        for name in place[:-1]:
            node = node[name]
        node[place[-1]] = huge
        file.write_text(seal(altered))
        try:
            Store(sys.argv[1]).frame("norm", missing=True)
        except KimiError:
            pass
print("read")
"""


def test_no_number_in_a_file_fills_the_memory(tmp_path):
    """Each whole number of a study's file made huge, in a process of little memory and time."""
    arms = (Arm("layernorm"), Arm("rmsnorm", {"model.norm.kind": "rmsnorm"}))
    Store(tmp_path).record_study(Study(name="norm", base=tiny_run(), baseline="layernorm", seeds=(0, 1), arms=arms))

    def little():
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))

    ran = subprocess.run(
        [sys.executable, "-c", HUGE, tmp_path], preexec_fn=little, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "read\n"), ran.stderr[-500:]


def fuzz(name, folder, examples, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(folder / "cache"))
    (folder / "work").mkdir()
    strategy, use = READERS[name](folder / "work")

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def check(data):
        use(data)

    check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused(name, tmp_path, monkeypatch):
    """Every reader of a file gives a value or the project's own error, about 500 inputs."""
    fuzz(name, tmp_path, 36, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused_ten_thousand(name, tmp_path, monkeypatch):
    """The same for 10,000 inputs."""
    fuzz(name, tmp_path, 10_000 // len(READERS) + 1, monkeypatch)
