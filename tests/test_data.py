"""The data path as a user meets it: several processes, kills, bad input, and properties over made-up text."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kimi_nb.config import SPLITS, DataConfig, KimiError
from kimi_nb.data import (
    END_OF_TEXT,
    IGNORE,
    Batches,
    ByteTokenizer,
    CharTokenizer,
    DataError,
    DataWarning,
    Document,
    PairTokenizer,
    TokenData,
    Tokenizer,
    build_tokenizer,
    describe,
    eval_windows,
    load_corpus,
    overlap,
    parse_corpus,
    prepare,
    split_documents,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"no real data in {SHARED}")
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny():
    return load_corpus("tinyworld", num_documents=200)


@pytest.fixture(scope="module")
def bpe(tiny):
    return PairTokenizer.train(tiny, 300)


def refused(f, *args, **kw):
    with pytest.raises(KimiError) as e:
        f(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def make(cache, **kw):
    return prepare(dict(corpus="tinyworld", num_documents=200, tokenizer="byte") | kw, cache=cache)


# --- tokenizers


@quick
@given(st.text())
def test_every_text_survives_bytes_and_byte_pairs(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot_id not in ids
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@quick
@given(st.text(min_size=1))
def test_every_text_survives_its_own_characters(text):
    tokenizer = CharTokenizer(text, eot=False, unknown=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.vocab_size == len(set(text))
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("text", ["", END_OF_TEXT, f"a{END_OF_TEXT}b", "\x00\n\r\n", "🙂" * 50])
def test_odd_texts(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.eot_id not in tokenizer.encode(text)


@quick
@given(
    st.lists(
        st.sampled_from(["a word", "\n", "\n\n", " \n", "\n ", "  ", "x\ny", "\t", "\u00a0", "\u2028"]),
        min_size=1,
        max_size=60,
    )
)
def test_cutting_long_texts_changes_nothing(bpe, parts):
    from kimi_nb.data.tokenizer import _pieces

    text = "".join(parts)
    pieces = list(_pieces(text, size=3))
    assert "".join(pieces) == text
    words = lambda t: [
        w for w, _ in bpe.inner.pre_tokenizer.pre_tokenize_str(t)
    ]  # merges never cross these, whatever was learnt
    assert [w for p in pieces for w in words(p)] == words(text)


def test_byte_pairs_are_learnt_alike_in_every_process(tiny, bpe):
    code = (
        "from kimi_nb.data import load_corpus\nfrom kimi_nb.data import PairTokenizer\n"
        "print(PairTokenizer.train(load_corpus('tinyworld', num_documents=200), 300).fingerprint)"
    )
    for threads in ("1", "3"):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        assert (
            subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd=ROOT
            ).stdout.strip()
            == bpe.fingerprint
        )


def test_byte_pairs_learn_from_training_text_only(tmp_path):
    held = "zqzqzqzq " * 400
    docs = [Document.of(f"document {i} speaks about the weather and about bread\n" * 20, "x") for i in range(30)]
    (tmp_path / "a.txt").write_text(END_OF_TEXT.join(docs[:25]))
    (tmp_path / "b.txt").write_text(held)
    data = prepare(dict(corpus=f"files:train={tmp_path}/a.txt,val={tmp_path}/b.txt", tokenizer="bpe:270"))
    assert not any("zq" in data.tokenizer.decode([i]) for i in range(269))


def test_exactly_n_or_a_reason(tiny):
    assert PairTokenizer.train(tiny, 257).vocab_size == 257
    assert "at least 257" in refused(PairTokenizer.train, tiny, 256)
    assert "yields only" in refused(PairTokenizer.train, ["ab"], 1000)


@needs_shared
def test_gpt2_from_a_folder_is_gpt2():
    tokenizer = build_tokenizer(str(SHARED / "gpt2"), [])
    assert tokenizer.vocab_size == 50257 and tokenizer.eot_id == 50256
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    text = (SHARED / "gutenberg_austen.txt").read_text()[:300_000]
    ids = tokenizer.encode(text)
    assert ids.tolist() == tokenizer.inner.encode(text).ids, "cutting long texts changes nothing"
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes()[ids].sum() == len(text.encode())
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(SHARED / "gpt2"))
    assert theirs(text)["input_ids"] == ids.tolist()


# --- splits

documents = st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=40, unique=True)
fractions = st.sampled_from([0.0, 0.05, 0.1, 0.3])


@quick
@given(documents, fractions, fractions)
def test_splits_are_disjoint_and_lose_nothing(texts, val, test):
    docs = [Document.of(t, "x") for t in texts]
    if len(texts) <= 2 or len(texts) <= (val > 0) + (test > 0):
        return
    splits = split_documents(docs, val, test)
    assert sorted(d for s in SPLITS for d in splits[s]) == sorted(texts)
    assert bool(splits["val"]) == (val > 0) and bool(splits["test"]) == (test > 0) and splits["train"]
    assert splits == split_documents(docs[::-1], val, test), "the order of the documents does not matter"


@quick
@given(st.text(min_size=1, max_size=500), fractions, fractions)
def test_a_single_text_is_split_by_position(text, val, test):
    splits = split_documents([Document.of(text, "x")], val, test)
    assert (
        "".join(d for s in SPLITS for d in splits[s]) == text
        or len({*splits["train"], *splits["val"], *splits["test"]}) < 3
    )
    if val == 0.1 and test == 0:
        assert "".join(splits["train"]) == text[: int(0.9 * len(text))]


def test_shares_are_met_and_text_that_shares_a_module_stays_together():
    splits = split_documents(load_corpus("pydocs:0.3,pysource:0.7"))
    size = {s: sum(map(len, d)) for s, d in splits.items()}
    for s in ("val", "test"):
        assert abs(size[s] / sum(size.values()) - 0.1) < 0.01
    groups = {s: {d.group for d in docs} for s, docs in splits.items()}
    assert (
        not groups["train"] & groups["test"]
        and not groups["train"] & groups["val"]
        and not groups["val"] & groups["test"]
    )
    assert {d.source for d in splits["test"]} == {"pydocs", "pysource"}
    assert overlap(splits["train"], splits["test"]) < 0.1


def test_a_text_given_to_two_splits_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(f"one{END_OF_TEXT}two")
    (tmp_path / "b.txt").write_text(f"two{END_OF_TEXT}three{END_OF_TEXT}three")
    assert "two splits" in refused(
        prepare, dict(corpus=f"files:train={tmp_path}/a.txt,val={tmp_path}/b.txt", tokenizer="byte")
    )


def test_overlap_sees_a_leak(tiny):
    splits = split_documents(tiny)
    leak = max(splits["test"], key=len)
    assert overlap(splits["train"] + [leak], [leak]) == 1.0 and overlap(["a" * 100], ["b" * 100]) == 0.0
    joined = "x" * ((1 << 22) - 20) + leak  # across the border of a block
    assert overlap([joined], [leak]) == 1.0


@needs_shared
def test_the_nanogpt_split_exactly():
    text = (SHARED / "tinyshakespeare.txt").read_text()
    data = prepare(
        DataConfig(corpus=str(SHARED / "tinyshakespeare.txt"), tokenizer="char", val_fraction=0.1, test_fraction=0.0),
        seq_len=256,
    )
    table = {c: i for i, c in enumerate(sorted(set(text)))}
    want = np.array([table[c] for c in text])
    assert data.vocab_size == 65 and data.tokenizer.eot_id is None
    assert len(data.train) == 1_003_854 and len(data.val) == 111_540 and len(data.test) == 0
    assert (data.train == want[: int(0.9 * len(text))]).all() and (data.val == want[int(0.9 * len(text)) :]).all()


# --- batches and windows


@quick
@given(
    n=st.integers(2, 400),
    batch=st.integers(1, 7),
    seq=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    step=st.integers(0, 50),
)
def test_a_batch_is_a_function_of_seed_and_step(n, batch, seq, seed, step):
    tokens = np.arange(n)
    if n < seq + 1:
        assert "too few" in refused(Batches, tokens, batch, seq, seed)
        return
    walked = Batches(tokens, batch, seq, seed)
    for _ in range(step):
        walked.next()
    resumed = Batches(tokens, batch, seq, seed)
    resumed.load_state_dict(json.loads(json.dumps(walked.state_dict())))
    (x, y), (rx, _), (dx, _) = walked.next(), resumed.next(), Batches(tokens, batch, seq, seed).batch(step)
    assert (x == rx).all() and (x == dx).all() and (y == x + 1).all()
    assert x.shape == (batch, seq) and x.dtype == np.int64 and x.min() >= 0 and y.max() < n
    # the same sequences in the same order whatever the batch size
    singles = np.concatenate(
        [Batches(tokens, 1, seq, seed).batch(i)[0] for i in range(step * batch, (step + 1) * batch)]
    )
    assert (singles == x).all()


@quick
@given(n=st.integers(2, 600), seq=st.integers(1, 40), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_an_epoch_meets_no_token_twice_and_nearly_all(n, seq, seed, epoch):
    if n < seq + 1:
        return
    b = Batches(np.arange(n), 1, seq, seed)
    seen = np.concatenate([b.batch(i)[0].ravel() for i in range(epoch * b.n_windows, (epoch + 1) * b.n_windows)])
    assert len(np.unique(seen)) == len(seen)
    assert n - len(seen) < 2 * seq + 1
    assert Batches(np.arange(n), 1, seq, seed).epochs_after(b.n_windows) == 1


def test_seeds_and_epochs_differ():
    first = Batches(np.arange(5000), 8, 16, 0)
    assert (first.batch(0)[0] != Batches(np.arange(5000), 8, 16, 1).batch(0)[0]).any()
    one = Batches(np.arange(5000), 1, 16, 0)
    epochs = [[int(one.starts(e * one.n_windows + i)[0]) for i in range(one.n_windows)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] and len({min(e) for e in epochs}) > 1, (
        "order and offset change with the epoch"
    )


def test_the_order_of_batches_never_changes():
    # a figure of a stored run can be had again only if this holds for every later release
    assert Batches(np.arange(1000), 4, 16, 7).starts(3).tolist() == [315, 43, 491, 187]


def test_a_position_belongs_to_its_batches():
    state = Batches(np.arange(100), 2, 8, 0).state_dict()
    for other in (Batches(np.arange(100), 2, 8, 1), Batches(np.arange(100), 3, 8, 0), Batches(np.arange(90), 2, 8, 0)):
        assert "data position" in refused(other.load_state_dict, state)


@quick
@given(n=st.integers(2, 300), seq=st.integers(1, 50), cap=st.one_of(st.none(), st.integers(1, 400)))
def test_every_held_out_token_is_scored_once(n, seq, cap):
    if n < seq + 1:
        refused(eval_windows, np.arange(n), seq)
        return
    w = eval_windows(np.arange(n), seq, cap)
    pairs = [w[i] for i in range(len(w))]
    scored = np.concatenate([y[y != IGNORE] for _, y in pairs])
    assert len(scored) == len(set(scored)) == w.n_targets
    assert all((y[y != IGNORE] == x[y != IGNORE] + 1).all() and len(x) == seq for x, y in pairs)
    if cap is None or cap >= n - 1:
        assert sorted(scored) == list(range(1, n))
    else:
        assert len(scored) <= max(cap, seq)
    stacked = [x for x, _ in w.batches(3)]
    assert (np.concatenate(stacked) == np.stack([x for x, _ in pairs])).all()


# --- corpora


@quick
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["pydocs", "tinyworld", "a.txt", "hf:a/b", "hf:a/b:c", "dir/x"]), st.floats(1e-2, 1e3)
        ),
        min_size=2,
        max_size=6,
        unique_by=lambda p: p[0],
    )
)
def test_mixtures_are_read_back(parts):
    read = parse_corpus(",".join(f"{n}:{w!r}" for n, w in parts))
    total = sum(w for _, w in parts)
    assert [n for n, _ in read] == [n for n, _ in parts] and np.allclose(
        [w for _, w in read], [w / total for _, w in parts]
    )


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=30), st.text(alphabet="pydocs:,.0123456789-e /", max_size=20)))
def test_any_corpus_string_is_understood_or_refused_in_a_line(spec):
    try:
        assert abs(sum(w for _, w in parse_corpus(spec)) - 1) < 1e-9
    except DataError as e:
        assert "\n" not in str(e)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from(['{"text": "a"}', '{"text": 1}', "{", "[]", "null", '{"t": "a"}', ""])).map(
            lambda x: "\n".join(x).encode()
        ),
    ),
    suffix=st.sampled_from([".txt", ".jsonl", ".md"]),
)
def test_any_file_is_read_or_refused_in_a_line(tmp_path, content, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    try:
        assert all(d.strip() for d in load_corpus(str(path)))
    except DataError as e:
        assert "\n" not in str(e) and "file" in str(e)


def test_bad_input_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "folder").mkdir()
    for spec, words in {
        "pydoc": ("unknown", "pydocs"),
        "fineweb-edu": ("cannot be reached", "local files"),
        "hf:a/b": ("cannot be reached",),
        str(tmp_path / "no.txt"): ("does not exist",),
        str(tmp_path / "empty.txt"): ("empty.txt", "empty"),
        str(tmp_path / "binary.txt"): ("binary.txt", "UTF-8"),
        str(tmp_path / "latin.txt"): ("latin.txt", "iconv"),
        str(tmp_path / "rows.jsonl"): ("line 2",),
        str(tmp_path / "field.jsonl"): ("'text'", "body"),
        str(tmp_path / "field.jsonl") + "#nope": ("'nope'",),
        str(tmp_path / "folder"): ("no text files",),
        "pydocs:0.5,tinyworld:0": ("NAME:WEIGHT",),
        "files:train=x": ("val",),
    }.items():
        line = refused(prepare, dict(corpus=spec, tokenizer="byte"))
        assert all(w in line for w in words), line
    assert load_corpus(str(tmp_path / "field.jsonl") + "#body") == ["a"]
    for name, words in {
        "bit": "byte",
        "bpe:10": "257",
        "bpe:x": "bpe:N",
        "gpt2": "cannot be reached",
        str(tmp_path / "folder"): "tokenizer.json",
    }.items():
        assert words in refused(prepare, dict(corpus="tinyworld", tokenizer=name))


def test_too_little_text_names_the_split(cache):
    line = refused(prepare, dict(corpus="tinyworld", num_documents=20, tokenizer="byte"), seq_len=2000)
    assert "split val" in line and "2001" in line and "val_fraction" in line
    assert "split train" in refused(
        prepare, dict(corpus="tinyworld", num_documents=200, tokenizer="byte", max_tokens=50), seq_len=64
    )


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "KIMI_NB_CACHE" in refused(
        prepare, dict(corpus="tinyworld", tokenizer="byte"), cache=tmp_path / "file" / "cache"
    )


def test_hub_sets_are_streamed_without_foreign_code(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def fake(name, config=None, split=None, streaming=False, **kw):
        calls.append((name, config, kw))
        assert streaming and split == "train" and "trust_remote_code" not in kw
        if name == "Skylion007/openwebtext" and not kw:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        if name == "Salesforce/wikitext":
            return iter(
                [
                    {"text": t}
                    for t in (
                        "",
                        " = One = \n",
                        " text of one \n",
                        " = = Part = = \n",
                        "",
                        " = Two = \n",
                        " text of two \n",
                    )
                ]
            )
        if name == "cut/off":
            return (row for row in [{"text": "a"}, 1 / 0])
        return ({"text": f"document {i}"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr("kimi_nb.data.corpora.hub_reachable", lambda: True)
    assert load_corpus("openwebtext", num_documents=3) == ["document 0", "document 1", "document 2"] and calls[-1][
        2
    ] == {"revision": "refs/convert/parquet"}
    assert load_corpus("wikitext-103") == [" = One = \n text of one \n = = Part = = \n", " = Two = \n text of two \n"]
    assert sum(map(len, load_corpus("hf:owner/name:config", max_chars=1000))) < 1100 and calls[-1][:2] == (
        "owner/name",
        "config",
    )
    assert "local files" in refused(load_corpus, "hf:cut/off")
    # a cap on tokens caps what is streamed
    assert len(prepare(dict(corpus="tinystories", tokenizer="byte", max_tokens=2000)).train) == 2000


def test_a_damaged_extract_is_made_again(cache):
    first = load_corpus("pydocs")
    (path,) = (cache / "corpora").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(DataWarning, match="damaged"):
        assert load_corpus("pydocs") == first
    assert 1.5e6 < sum(map(len, first)) < 4e6 and len({d.group for d in first}) == len(first)


# --- the cache


def test_the_second_time_is_quick_and_reads_no_text(cache, monkeypatch):
    first = make(cache)
    import kimi_nb.data.tokens

    monkeypatch.setattr(kimi_nb.data.tokens, "load_corpus", lambda *a: pytest.fail("read the corpus again"))
    start = time.process_time()
    assert make(cache).fingerprint == first.fingerprint
    assert time.process_time() - start < 0.1


def test_changed_files_are_noticed_and_content_decides(tmp_path, cache):
    docs = load_corpus("tinyworld", num_documents=60)
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text(END_OF_TEXT.join(docs))
    b.write_text(END_OF_TEXT.join(docs[::-1]))
    da, db = (make(cache, corpus=str(p), num_documents=None) for p in (a, b))
    assert da.fingerprint == db.fingerprint and da.folder == db.folder
    a.write_text(END_OF_TEXT.join(docs + ["One more."]))
    assert make(cache, corpus=str(a), num_documents=None).fingerprint != da.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        dict(tokenizer="char"),
        dict(tokenizer="bpe:300"),
        dict(max_tokens=3000),
        dict(num_documents=150),
        dict(val_fraction=0.2),
        dict(test_fraction=0.2),
        dict(corpus="pydocs"),
    ],
)
def test_every_setting_changes_the_fingerprint(cache, changed):
    assert make(cache).fingerprint != make(cache, **changed).fingerprint


def test_data_sizes_are_nested_and_judged_on_the_same_text(cache):
    big, small = make(cache), make(cache, max_tokens=3000)
    assert len(small.train) == 3000 and (small.train == big.train[:3000]).all()
    assert (small.val == big.val).all() and (small.test == big.test).all() and small.n_bytes["train"] <= 3000


@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "meta", "tokenizer"])
def test_a_damaged_cache_is_named_and_made_again(cache, damage):
    data = make(cache, tokenizer="bpe:300")
    before, folder = np.array(data.train), data.folder
    name = {"meta": "meta.json", "tokenizer": "tokenizer.json", "gone": "val.bin"}.get(damage, "train.bin")
    path = folder / name
    if damage == "gone":
        path.unlink()
    elif damage == "altered":
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    else:
        path.write_bytes(path.read_bytes()[:100])
    assert "damaged" in refused(TokenData, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = make(cache, tokenizer="bpe:300")
    assert [w.category for w in caught] == [DataWarning] and "damaged" in str(caught[0].message)
    assert (again.train == before).all() and not list((cache / "tokens").glob(".*"))


@pytest.mark.parametrize("change", [dict(vocab_size=700), dict(n_bytes=dict(train=1, val=1, test=1)), dict(lost={})])
def test_what_a_cache_says_is_sealed(cache, change):
    """meta.json decides the model's size and what divides bits per byte: changed, it is damage, never another model."""
    data = make(cache, tokenizer="bpe:300")
    meta = json.loads((data.folder / "meta.json").read_text())
    for damaged in (meta | change, {k: v for k, v in (meta | change).items() if k != "digest"}):
        (data.folder / "meta.json").write_text(json.dumps(damaged))
        assert "meta.json" in refused(TokenData, data.folder)
        with pytest.warns(DataWarning, match="meta.json"):
            again = make(cache, tokenizer="bpe:300")
        assert (again.vocab_size, again.n_bytes, again.lost) == (data.vocab_size, data.n_bytes, data.lost)


def test_an_index_that_leads_elsewhere_is_not_followed(cache):
    """The index is sealed too, and its settings must be those that were asked for."""
    mine, other = make(cache, tokenizer="byte"), make(cache, tokenizer="bpe:300")
    files = {json.loads(p.read_text())["folder"]: p for p in (cache / "index").glob("*.json")}
    index, theirs = files[mine.folder.name], files[other.folder.name]
    whole = json.loads(index.read_text())
    for text in (json.dumps(whole | dict(folder=other.folder.name)), theirs.read_text(), "[]", "{"):
        index.write_text(text)
        assert make(cache, tokenizer="byte").fingerprint == mine.fingerprint
        assert json.loads(index.read_text()) == whole


def test_a_large_file_is_checked_once_a_process(cache, monkeypatch):
    """Whatever its size, in blocks; a second look costs no second reading while nothing changed."""
    import hashlib

    from kimi_nb.data import tokens

    data, read = make(cache), []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, kind: read.append(stream.name) or real(stream, kind))
    tokens._hash_file.cache_clear()
    for _ in range(3):
        TokenData(data.folder)
    assert len(read) == len(set(read)) >= 4
    path = data.folder / "val.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "val.bin was altered" in refused(TokenData, data.folder)
    assert TokenData(data.folder, check=False).n_tokens == data.n_tokens


def test_what_a_dead_process_left_is_removed_by_the_next(cache, monkeypatch):
    """Also what belongs to another text, and what a full disk cut short; not what somebody is still at work on."""
    from filelock import FileLock

    make(cache)
    left = [cache / "tokens" / f".{letter * 32}.1" for letter in "abc"]
    for folder in left:
        folder.mkdir()
    with FileLock(cache / "locks" / f"{'c' * 32}.lock"):
        make(cache, tokenizer="bpe:300")
        assert [folder.exists() for folder in left] == [False, False, True]
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in refused(make, cache, tokenizer="bpe:310")
    monkeypatch.undo()
    assert not [p for p in (cache / "tokens").glob(".*") if p != left[2]]


def foreign(folder, model, **parts):
    """A tokenizer of the library in a folder; parts: normalizer, pre_tokenizer, decoder."""
    import tokenizers

    inner = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(inner, name, part)
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_a_tokenizer_that_loses_text_has_no_bits_per_byte(tmp_path, cache):
    """Unknown letters, unseen characters, capitals: a reason instead of a number that divides by the wrong bytes."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    (tmp_path / "t.txt").write_text("It was a quiet morning by the sea and both boats came back. " * 300)
    (tmp_path / "held.txt").write_text("漢字 and text 😀 " * 20, encoding="utf-8")
    byte_level = dict(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = {letter: i for i, letter in enumerate(letters)}
    two = foreign(tmp_path / "two", models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    small = foreign(
        tmp_path / "small", models.BPE(vocab=whole, merges=[]), normalizer=normalizers.Lowercase(), **byte_level
    )
    fine = foreign(tmp_path / "fine", models.BPE(vocab=whole, merges=[]), **byte_level)
    given = f"files:train={tmp_path}/t.txt,val={tmp_path}/held.txt"
    for corpus, name, lost in [
        (str(tmp_path / "t.txt"), two, "comes back as"),
        (str(tmp_path / "t.txt"), small, "comes back as"),
        (given, "char", "comes back as"),
        (str(tmp_path / "t.txt"), fine, ""),
        (given, "byte", ""),
        (given, "bpe:260", ""),
    ]:
        data = prepare(dict(corpus=corpus, tokenizer=name), cache=cache)
        assert lost in data.lost["val"] and bool(lost) == bool(data.why_no_bytes), (name, data.lost)
        windows = eval_windows(data.val, 8)
        n_bytes = windows.n_bytes(data.scored_bytes("val"))
        if lost:
            assert n_bytes is None and "no bits per byte" in data.summary()
        else:
            first = data.token_bytes[int(data.val[0])]
            assert n_bytes == data.n_bytes["val"] - first


@quick
@given(st.lists(st.sampled_from(["the", "sea", "é", "漢", "😀", " ", "  "]), min_size=1, max_size=40))
def test_bytes_that_tokens_cover_add_up(tmp_path, words):
    """Where ids do not stand for fixed bytes, what each token covers is kept: together it is the text."""
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {piece: i for i, piece in enumerate(["▁", "t", "h", "e", "s", "a", "é", "漢", "😀", "▁the", "the", "sea"])}
    space = dict(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"),
        decoder=decoders.Metaspace(prepend_scheme="never"),
    )
    model = models.Unigram([(piece, -float(i)) for piece, i in vocab.items()], unk_id=0, byte_fallback=False)
    tokenizer = PairTokenizer.from_folder(foreign(tmp_path / "uni", model, **space))
    assert tokenizer.token_bytes() is None
    text = "".join(words)
    (sizes,) = tokenizer.bytes_at([text])
    ids = tokenizer.encode(text)
    assert len(sizes) == len(ids) and sizes.sum() == len(text.encode()) and not tokenizer.what_is_lost(text, ids)


def test_scored_bytes_are_those_of_the_windows(tmp_path, cache):
    """With a cap the windows are spread over the split: their own bytes count, not the split's mean."""
    from tokenizers import decoders, models, pre_tokenizers

    text = "the sea " * 300 + "漢" * 700
    (tmp_path / "t.txt").write_text("the " * 50, encoding="utf-8")
    (tmp_path / "v.txt").write_text(text, encoding="utf-8")
    pieces = ["▁", "t", "h", "e", "s", "a", "漢", "▁the", "the", "sea"]
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0, byte_fallback=False)
    space = dict(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"),
        decoder=decoders.Metaspace(prepend_scheme="never"),
    )
    name = foreign(tmp_path / "uni", model, **space)
    data = prepare(dict(corpus=f"files:train={tmp_path}/t.txt,val={tmp_path}/v.txt", tokenizer=name), cache=cache)
    assert data.lost["val"] == "" and data.token_bytes is None
    sizes = data.scored_bytes("val")
    for cap in (None, 64, 500):
        windows = eval_windows(data.val, 16, cap)
        scored = [int(s) + 1 + int(k) for s, k in zip(windows._starts, windows._skip)]
        want = sum(
            len(data.tokenizer.decode(data.val[a : s + 17]).encode()) for a, s in zip(scored, windows._starts.tolist())
        )
        assert windows.n_bytes(sizes) == pytest.approx(
            want, abs=len(scored)
        )  # the library drops a space at the beginning


def test_a_tokenizer_that_cannot_take_the_text_says_so(tmp_path, cache):
    """What the library raises is one line."""
    from tokenizers import models, pre_tokenizers

    name = foreign(tmp_path / "tok", models.WordLevel({"the": 0, "sea": 1}), pre_tokenizer=pre_tokenizers.Whitespace())
    line = refused(prepare, dict(corpus="tinyworld", num_documents=50, tokenizer=name), cache=cache)
    assert name in line and "cannot encode" in line


@pytest.mark.timeout(60)
def test_learning_pairs_ends_on_one_very_long_word():
    """A million times one letter, or one space; and what words below the bound yield is as ever."""
    from kimi_nb.data.tokenizer import _LONGEST_WORD, _short_words

    for letter in "a ":
        assert PairTokenizer.train([letter * 1_000_000], 260).vocab_size == 260
    words = ["x" * (_LONGEST_WORD - 1) + " y", "short words", ""]
    assert list(_short_words(words)) == words
    assert "".join(_short_words(["ab" * 9000 + " c"])) == "ab" * 9000 + " c"


def test_describe_is_plain_data(cache):
    about = describe(DataConfig(corpus="tinyworld", num_documents=100, tokenizer="byte"), cache=cache)
    json.dumps(about)
    assert (
        about["vocab_size"] == 257 and 0.9 < about["bytes_per_token"] <= 1 and set(about["overlap"]) == {"val", "test"}
    )


WORK = """
import sys, time
import kimi_nb.data.tokens as d
write = d._Writer.write
def slow(*args):
    write(*args)
    print("WRITTEN", flush=True)
    time.sleep(float(sys.argv[2]))
d._Writer.write = slow
data = d.prepare(dict(corpus="tinyworld", num_documents=200, tokenizer="bpe:300"), cache=sys.argv[1])
print("READY", data.fingerprint, int(data.train.sum()), flush=True)
"""


def start(cache, pause):
    return subprocess.Popen(
        [sys.executable, "-c", WORK, str(cache), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_processes_that_prepare_the_same_data_at_once_share_one_cache(cache):
    workers = [start(cache, 0.5) for _ in range(3)]
    ends = [w.communicate(timeout=120) for w in workers]
    assert [w.returncode for w in workers] == [0, 0, 0], ends
    assert sum("WRITTEN" in out for out, _ in ends) == 1, "one does the work, the others wait"
    assert len({out.split("READY")[1] for out, _ in ends}) == 1
    assert len(list((cache / "tokens").iterdir())) == 1


def test_a_killed_process_leaves_no_half_cache_and_no_lock(cache):
    victim = start(cache, 60)
    assert victim.stdout.readline().strip() == "WRITTEN"
    waiting = start(cache, 0)  # stands at the lock of the victim
    time.sleep(1.5)
    assert waiting.poll() is None
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and "READY" in out, err
    folders = list((cache / "tokens").iterdir())
    assert len(folders) == 1 and not folders[0].name.startswith("."), "what the victim left is gone"
    assert TokenData(folders[0]).train.sum() == int(out.split()[-1])


def test_kills_at_any_moment(cache):
    done = None
    for i in range(6):
        victim = start(cache / str(i), 0)
        time.sleep(0.1 + 0.25 * i)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        for folder in (cache / str(i) / "tokens").glob("[!.]*"):
            TokenData(folder)  # whole, or not there
        data = prepare(dict(corpus="tinyworld", num_documents=200, tokenizer="bpe:300"), cache=cache / str(i))
        done = done or data.fingerprint
        assert data.fingerprint == done


@pytest.mark.parametrize("name", ["byte", "char", "bpe:300"])
def test_tokenizing_runs_at_a_megabyte_a_second(name, tiny):
    text = "".join(tiny) * 20
    code = (
        "import sys, time\nfrom kimi_nb.data import load_corpus\nfrom kimi_nb.data import build_tokenizer\n"
        "tiny = load_corpus('tinyworld', num_documents=200)\nt = build_tokenizer(sys.argv[1], tiny)\n"
        "texts = [''.join(tiny)] * 20\n"
        "def once():\n    start = time.process_time(); t.encode_batch(texts); return time.process_time() - start\n"
        "print(min(once() for _ in range(3)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, name],
        env=os.environ | {"RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    assert len(text.encode()) / float(out) > 1e6  # bytes per second of one core's time


def test_importing_the_data_path_is_light():
    code = (
        "import sys, kimi_nb.data.tokens; print([m for m in "
        "('torch', 'transformers', 'datasets', 'tokenizers', 'pandas', 'huggingface_hub') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.strip()
        == "[]"
    )


def test_a_tokenizer_folder_is_checked(tmp_path, tiny):
    t = PairTokenizer.train(tiny, 280)
    t.save(tmp_path / "t")
    assert Tokenizer.load(tmp_path / "t").fingerprint == t.fingerprint
    (tmp_path / "t" / "tokenizer.json").write_text("{")
    assert "cannot be read" in refused(Tokenizer.load, tmp_path / "t")
    assert "neither" in refused(Tokenizer.load, tmp_path / "nothing")


# --- one name, one meaning

file_names = st.text(
    alphabet=st.characters(blacklist_categories=("Cs",), blacklist_characters="/\x00\n\r"), min_size=1, max_size=40
).filter(lambda name: name.strip(". ") and len(name.encode()) < 200 and not name.endswith((".parquet", ".json")))
odd_names = st.sampled_from(
    ["lang=en", "a,b.txt", "a;b.txt", "notes #1.txt", "c#.txt", "v1:2", "x,val=y.txt", "{seed}",
     "*", "[1]", "%s", "~", "a::b", "files:train=a", "hf:a/b".replace("/", "_"), "zip:x",
     "pydocs", "pydocs:0.5,tinyworld:0.5", "$HOME", " spaced ", "é"]
)  # fmt: skip


@quick
@given(name=odd_names | file_names, other=odd_names | file_names)
@example(name="lang=en", other="#")
@example(name="#", other="lang=en")
@example(name="c", other="c#.txt")
@example(name="c#.txt", other="c")
def test_a_path_that_exists_is_a_path(tmp_path, name, other):
    """Whatever its name: it is read, the run's identity and the cache's key follow its content; as a member too."""
    from kimi_nb.config import RunConfig, data_identity
    from kimi_nb.data import signature

    folder = tmp_path / "odd"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    mine, theirs = folder / name, folder / other
    theirs.write_text("the other file\n", encoding="utf-8")
    for spec in (
        str(mine),
        f"files:train={mine},val={theirs}",
        f"files:train={mine};{theirs},val={theirs},test={mine}",
    ):
        seen = set()
        for text in ("one " * 9, "two " * 10):
            mine.write_text(text, encoding="utf-8")
            run = RunConfig(data=DataConfig(corpus=spec))
            assert data_identity(run.data)["corpus"]
            seen.add((run.run_id, json.dumps(signature(spec))))
            if name != other and spec == str(mine):
                assert load_corpus(spec) == [text]
        assert len({run_id for run_id, _ in seen}) == 2 and len({key for _, key in seen}) == 2
    if name != other:
        mixed = load_corpus(f"{mine}:1,{theirs}:1")
        assert {d.source for d in mixed} == {str(mine), str(theirs)}


def test_a_parquet_file_is_that_file_alone(tmp_path, monkeypatch):
    """No pattern, no address, no copy in a cache that somebody may not write."""
    pd = pytest.importorskip("pandas")
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HOME", "/proc/nowhere")
    table = lambda name, words: pd.DataFrame(dict(text=words, n=range(len(words)))).to_parquet(tmp_path / name)
    table("corpus1.parquet", ["old"])
    table("corpus[1].parquet", ["new"])
    table("run_2.parquet", ["neighbour"])
    table("run*.parquet", ["mine"])
    table("final [v2].parquet", ["x", "y"])
    table("none.parquet", [])
    for name, words in {
        "corpus[1].parquet": ["new"],
        "run*.parquet": ["mine"],
        "final [v2].parquet": ["x", "y"],
    }.items():
        assert load_corpus(str(tmp_path / name)) == words
    assert "'n' holds int" in refused(load_corpus, str(tmp_path / "corpus1.parquet#n"))
    assert "no field 'body' among text, n" in refused(load_corpus, str(tmp_path / "corpus1.parquet#body"))
    assert "no text in it" in refused(load_corpus, str(tmp_path / "none.parquet"))


def test_json_by_any_name(tmp_path):
    """Rows are rows in .jsonl, .ndjson and .json, whether a list or an object a line."""
    rows = [{"text": f"story {i}", "body": f"body {i}"} for i in range(5)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    for name, text in {
        "a.jsonl": lines,
        "a.ndjson": lines,
        "a.json": json.dumps(rows, indent=1),
        "b.json": lines,
    }.items():
        (tmp_path / name).write_text(text)
        assert load_corpus(str(tmp_path / name)) == [r["text"] for r in rows], name
        assert load_corpus(f"{tmp_path / name}#body") == [r["body"] for r in rows], name
    for text, words in {"[1]": "row 1: expected an object", "3": "holds int", '[{"text": ': "is not JSON"}.items():
        (tmp_path / "bad.json").write_text(text)
        assert words in refused(load_corpus, str(tmp_path / "bad.json"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".ndjson", ".parquet"])
def test_an_empty_member_is_skipped(tmp_path, suffix):
    """One empty file refuses no folder; a folder of nothing but empty files has no text."""
    pd = pytest.importorskip("pandas")
    empty, full = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    if suffix == ".parquet":
        pd.DataFrame(dict(text=[])).astype(str).to_parquet(empty)
        pd.DataFrame(dict(text=["words"])).to_parquet(full)
    else:
        empty.write_text("\n")
        full.write_text("words" if suffix == ".txt" else '{"text": "words"}')
    assert load_corpus(str(tmp_path)) == ["words"]
    full.unlink()
    assert "no text in it" in refused(load_corpus, str(tmp_path))


def test_names_that_cannot_be_are_refused_in_a_line(tmp_path, monkeypatch):
    """Too long, with a zero byte, or in a home that nobody knows."""
    assert "cannot be read" in refused(load_corpus, str(tmp_path / ("x" * 300 + ".txt")))
    assert "cannot be read" in refused(load_corpus, str(tmp_path / "a\0b.txt"))
    assert "unknown" in refused(prepare, dict(corpus="tinyworld", tokenizer="t" * 300))
    monkeypatch.delenv("KIMI_NB_CACHE")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir("/")
    assert "KIMI_NB_CACHE" in refused(prepare, dict(corpus="tinyworld", tokenizer="byte"))


def test_the_packages_text_stands_for_their_versions(monkeypatch):
    """Another version of a package is another text: another run, another entry of the cache, and a line about it."""
    from kimi_nb.config import RunConfig, data_identity, site_manifest, sources
    from kimi_nb.data import corpora, signature

    run = RunConfig().override({"data.corpus": "sitedocs"})
    before, mark, run_id = data_identity(run.data), signature("sitedocs"), run.run_id
    assert "numpy " + site_manifest()["numpy"] in before["corpus"]
    monkeypatch.setattr(sources, "version", lambda name: "0.1+cpu" if name == "numpy" else "9")
    assert data_identity(run.data) != before and signature("sitedocs") != mark and run.run_id != run_id
    assert "numpy 0.1 for 2.0" in corpora.site_differences(dict.fromkeys(site_manifest(), "9") | {"numpy": "2.0"})


def test_the_packages_text_is_read_once_and_warned_about(cache, monkeypatch):
    """Reading it writes it into the cache; the second time nothing is parsed, and a wrong version is said each time."""
    from kimi_nb.data import corpora

    monkeypatch.setattr(corpora, "site_manifest", lambda: {"seaborn": "0.0"})
    with pytest.warns(DataWarning, match="seaborn 0.0 for"):
        first = load_corpus("sitedocs")
    monkeypatch.setattr(corpora, "extract_sitedocs", None)
    with pytest.warns(DataWarning, match="not as locked"):
        assert load_corpus("sitedocs") == first
    assert len(first) > 20 and {doc.source for doc in first} == {"sitedocs"}
