"""One byte of a file is changed: what reads it says so in a line, or reads the same: no other number."""

import gzip
import json
import os
import random
import shutil
import warnings
from datetime import UTC, datetime

import pytest
from tiny import tiny_run

from kimi_nb.config import KimiError
from kimi_nb.data import DataWarning, TokenData, prepare
from kimi_nb.study import Arm, Finding, Outcome, Record, Store, Study, outcome_problems, read_outcome, write_outcome
from kimi_nb.train import fit

TIMES = int(os.environ.get("KIMI_NB_DAMAGE", "1000"))  # changed bytes, over all kinds of file


class Stop(Exception):
    pass


def numbers(record):
    """What a record says that a clock does not decide."""
    timed = ("seconds", "tokens_per_second", "memory_mb")
    metrics = {k: v for k, v in record.metrics.items() if not any(word in k for word in timed)}
    curves = {k: v for k, v in record.curves.items() if "seconds" not in k}
    return json.dumps([record.run_id, record.status, record.config, metrics, curves], sort_keys=True)


def changed(file, chance):
    """Change one byte of a file, and hand out what undoes it."""
    before = file.read_bytes()
    at, by = chance.randrange(len(before)), chance.randrange(1, 256)
    file.write_bytes(before[:at] + bytes([before[at] ^ by]) + before[at + 1 :])
    return before, f"byte {at} of {file.name} changed by {by}"


class Checked:
    """What happened to the changes: refused in a line, or without effect."""

    def __init__(self):
        self.refused = self.without_effect = 0

    def look(self, what, read, expected):
        try:
            found = read()
        except KimiError as e:
            assert str(e).strip() and "\n" not in str(e), what
            self.refused += 1
            return
        assert found == expected, f"{what}: read as something else, and nobody said so"
        self.without_effect += 1


def unfinished(folder):
    def stop(step, line):
        if step == 7:
            raise Stop

    run = tiny_run(train__save_every=3, train__eval_every=3)
    with pytest.raises(Stop):
        fit(run, folder, progress=False, on_step=stop)
    return run


def spoil_an_unfinished_run(tmp_path, times, chance, seen):
    """Journal, configuration, and every file of the checkpoint, then going on."""
    run = unfinished(tmp_path / "kept")
    whole = numbers(fit(run, tmp_path / "whole", progress=False))
    files = sorted(p.relative_to(tmp_path / "kept") for p in (tmp_path / "kept").rglob("*") if p.stat().st_size)
    files = [p for p in files if (tmp_path / "kept" / p).is_file() and p.suffix not in (".lock", ".txt")]
    assert len(files) >= 5, files
    for i in range(times):
        place = tmp_path / f"spoiled-{i}"
        shutil.copytree(tmp_path / "kept", place)
        _, what = changed(place / files[i % len(files)], chance)
        seen.look(what, lambda place=place: numbers(fit(run, place, progress=False)), whole)
        shutil.rmtree(place)


def spoil_a_cache(tmp_path, times, chance, seen):
    data = prepare(tiny_run(data__tokenizer="bpe:300").data, 32)
    kept = {k: getattr(data, k).tolist() for k in ("train", "val", "test")}
    facts = (data.vocab_size, data.n_bytes, data.fingerprint, data.lost)
    files = sorted(p for p in data.folder.iterdir() if p.stat().st_size)
    text = "a text that the tokenizer reads"
    ids = data.tokenizer.encode(text)

    def read():
        again = TokenData(data.folder)
        tokens = {k: getattr(again, k).tolist() for k in kept}
        return tokens, (again.vocab_size, again.n_bytes, again.fingerprint, again.lost), again.tokenizer.encode(text)

    for i in range(times):
        file = files[i % len(files)]
        before, what = changed(file, chance)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            seen.look(what, read, (kept, facts, ids))
        file.write_bytes(before)
    read()


def finished_store(tmp_path):
    store = Store(tmp_path / "results")
    arms = (Arm("base"), Arm("rmsnorm", {"model.norm.kind": "rmsnorm"}))
    study = Study(name="norm", question="which?", base=tiny_run(), baseline="base", seeds=(0,), arms=arms)
    for planned in study.expand():
        curves = dict(val_loss=dict(step=[1], value=[1.5]))
        store.put(Record.of(planned.run, "done", dict(test_bpb=2.5, val_loss=1.5), curves))
    store.record_study(study)
    finding = Finding(id="H2", claim="RMSNorm is better", word="undecided", diff=0.25, ci_low=-0.5, ci_high=1.0, n=3)
    made = datetime(2026, 1, 2, tzinfo=UTC)
    write_outcome(store, Outcome(phase="norm", profile="tiny", findings=[finding], finished=made))
    return store


def spoil_a_store(tmp_path, times, chance, seen):
    """Records, manifests and outcomes, as `kimi-nb records verify` looks at them."""
    store = finished_store(tmp_path)

    def read():
        problems = Store(store.path).verify() + outcome_problems(store)
        if problems:
            raise KimiError(problems[0])
        again = Store(store.path)
        outcome = read_outcome(again, "norm", "tiny")
        return [numbers(r) for r in again.records()], again.manifest("norm"), repr(outcome)

    expected = read()
    files = sorted(p for p in store.path.rglob("*.json*") if p.is_file() and "experiments.json" not in p.name)
    files = [p for p in files if p.name not in ("baselines.json",)]
    assert {p.name for p in files} >= {"result.json", "norm.json"}
    for i in range(times):
        file = files[i % len(files)]
        before, what = changed(file, chance)
        seen.look(f"{file.parent.name}: {what}", read, expected)
        file.write_bytes(before)


def spoil_a_bundle(tmp_path, times, chance, seen):
    store = finished_store(tmp_path)
    expected = [numbers(r) for r in store.records()]
    for name in ("all.jsonl", "all.jsonl.gz"):
        file = tmp_path / name
        store.export(file)
        for i in range(times // 2):
            before, what = changed(file, chance)
            into = Store(tmp_path / f"into-{name}-{i}")

            def read(into=into, file=file):
                into.import_records(file)
                return [numbers(r) for r in into.records()]

            seen.look(what, read, expected)
            file.write_bytes(before)
    assert gzip.decompress((tmp_path / "all.jsonl.gz").read_bytes())


KINDS = [spoil_an_unfinished_run, spoil_a_cache, spoil_a_store, spoil_a_bundle]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
@pytest.mark.parametrize("times", [8, pytest.param(TIMES // len(KINDS), marks=pytest.mark.slow)])
def test_a_changed_byte_is_named_or_changes_nothing(kind, times, tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    seen = Checked()
    kind(tmp_path, times, random.Random(kind.__name__), seen)
    assert seen.refused + seen.without_effect == times and seen.refused >= times // 2
