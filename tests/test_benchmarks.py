"""Benchmarks: likelihoods against a straightforward form, tasks with real rows, what must be refused, and errors."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kimi_nb.cli import main
from kimi_nb.config import ModelConfig, RunConfig
from kimi_nb.data import ByteTokenizer, PairTokenizer
from kimi_nb.evals import (
    TASK_NAMES,
    TASKS,
    BenchmarkError,
    answering,
    chance_level,
    continuation_scores,
    document_numbers,
    greedy,
    harness_model,
    load_any,
    overall_score,
    pick_tasks,
    read_rows,
    run_benchmarks,
    task_rows,
    token_losses,
    worst_documents,
    write_tasks,
)
from kimi_nb.model import KimiModel
from kimi_nb.study import RunFolder

ROWS = Path(__file__).resolve().parents[2] / "shared" / "data"
real_rows = pytest.mark.skipif(
    not (ROWS / "hellaswag.jsonl").is_file(), reason="no real rows beside the checkout (../shared/data)"
)
pytest.importorskip("lm_eval")


def tiny_model(context=64, seed=0, **more):
    return KimiModel(
        ModelConfig(vocab_size=257, d_model=32, n_layers=2, n_heads=4, max_seq_len=context, d_ff=64, **more), seed=seed
    ).eval()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


# likelihoods


def straightforward(model, context, continuation):
    """Float64, one forward for each token that is predicted."""
    total, seen = 0.0, list(context)
    for t in continuation:
        total += (
            model(torch.tensor([seen[-model.config.max_seq_len :]])).logits[0, -1].double().log_softmax(-1)[t].item()
        )
        seen.append(t)
    return total


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(attention=dict(kind="mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)),
        dict(ffn={"kind": "moe"}, moe={"n_experts": 4, "top_k": 2, "d_expert": 16}),
        dict(position={"kind": "learned"}),
    ],
)
def test_likelihoods_agree_with_one_token_at_a_time(more):
    model, words = tiny_model(**more), ByteTokenizer()
    texts = [
        ("The cow says", " moo"),
        ("The cow says", " woof"),
        ("The", " opposite of hot"),
        ("A", "b"),
        ("What is 3 plus 4? It", " is 7"),
    ]
    pairs = [(words.encode(c).tolist(), words.encode(d).tolist()) for c, d in texts]
    with torch.no_grad():
        wanted = [straightforward(model, *p) for p in pairs]
    for size in (None, 1, 3):
        assert np.allclose([s for s, _ in continuation_scores(model, pairs, 64, size)], wanted, atol=1e-4)


def test_the_harness_gets_the_likelihoods_of_the_strings():
    from lm_eval.api.instance import Instance

    model, words = tiny_model(), ByteTokenizer()
    lm = harness_model(model, words)
    requests = [
        Instance("loglikelihood", {}, (c, d), i)
        for i, (c, d) in enumerate([("The cow says", " moo"), ("", "moo"), ("The cow says ", "moo")])
    ]
    scores = [s for s, _ in lm.loglikelihood(requests)]
    with torch.no_grad():
        assert abs(scores[0] - straightforward(model, words.encode("The cow says"), words.encode(" moo"))) < 1e-4
        assert abs(scores[1] - straightforward(model, [256], words.encode("moo"))) < 1e-4
        rolling = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("The cow says moo",), 0)])[0]
        assert abs(rolling - straightforward(model, [256], words.encode("The cow says moo"))) < 1e-4
    assert scores[2] == scores[0]  # the space belongs to the word


def test_greedy_continues_with_the_likeliest_token():
    model, words = tiny_model(), ByteTokenizer()
    prompts = [words.encode(t).tolist() for t in ("The cow says", "The dog says")]
    for prompt, text in zip(prompts, greedy(model, prompts, 6, words), strict=True):
        seen = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                seen.append(model(torch.tensor([seen])).logits[0, -1].argmax().item())
        assert text == words.decode([t for t in seen[len(prompt) :] if t != 256])


def answers(model, asked, prompt="The cow says moo. " * 3):
    """What the harness gets for one request."""
    from lm_eval.api.instance import Instance

    return harness_model(model, ByteTokenizer()).generate_until([Instance("generate_until", {}, (prompt, asked), 0)])[0]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            dict(max_gen_toks=64),
            "max_gen_toks 64 leaves no room for the prompt in a context of 64 tokens: ask for 1 to 63",
        ),
        (dict(max_new_tokens=100), "leaves no room"),
        (dict(max_gen_toks=0), "leaves no room"),
        (dict(do_sample=True, temperature=0.7), "do_sample true is not possible"),
        (dict(temperature=0.7), "temperature 0.7 is not possible"),
        (dict(top_p=0.9), "top_p 0.9 is not possible"),
        (dict(num_beams=4), "num_beams 4 is not possible"),
        (dict(stop=["."]), "stop .* is not possible"),
    ],
)
def test_an_answer_that_cannot_be_given_as_asked_is_refused(asked, words):
    with pytest.raises(BenchmarkError, match=words):
        answers(tiny_model(64), asked)


def test_the_end_of_the_prompt_is_kept_where_a_task_does_not_say_how_long_an_answer_is(monkeypatch):
    seen = []

    def noted(model, prompts, n, *more):
        seen.append((len(prompts[0]), n, prompts[0][-1]))
        return [""] * len(prompts)

    monkeypatch.setattr("kimi_nb.evals.adapter.greedy", noted)
    prompt = "a prompt of forty bytes or so, of which the end counts" * 2
    answers(tiny_model(64), dict(until=["\n"]), prompt)
    answers(tiny_model(64), dict(until="\n", max_gen_toks=60), prompt)
    answers(tiny_model(512), dict(max_tokens=7, do_sample=False, temperature=0.9, top_k=1), prompt)
    assert seen == [(32, 32, ord("s")), (4, 60, ord("s")), (len(prompt), 7, ord("s"))]
    assert answering({}, 4096).tokens == 256


def test_a_task_that_asks_for_what_cannot_be_is_skipped_with_the_reason(tmp_path):
    row = dict(context="The cow says moo.", question="What does the cow say?", answers=dict(text=["moo"]))
    (tmp_path / "squad.jsonl").write_text(json.dumps(row))
    r = run_benchmarks(tiny_model(16), ByteTokenizer(), "squad,arithmetic", data_dir=tmp_path, limit=2)
    assert r["squad"]["status"].startswith("skipped: it asks for what the model cannot give (max_gen_toks 16 leaves no")
    assert r["arithmetic"]["status"] == "done"


# the analysis of errors


class Even(torch.nn.Module):
    """Gives every token the same chance, but those of one document a hundredth of it."""

    def __init__(self, hard):
        super().__init__()
        self.weight, self.hard = torch.nn.Parameter(torch.zeros(1)), hard

    def forward(self, x):
        logits = torch.zeros(*x.shape, 257)
        logits[..., self.hard] = -math.log(100)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("max_tokens", [400, 10**6])
def test_a_worst_document_is_one_document(max_tokens):
    """Sampled windows lie apart: what stands at a window's end has nothing to do with the beginning of the next."""
    words, letters = ByteTokenizer(), "abcdefghijklmnopqrstuvwxyz"
    texts = [letters[i % 26] * (30 + 7 * (i % 5)) for i in range(60)]  # each of one letter
    tokens = np.concatenate([[*words.encode(text), words.eot_id] for text in texts])
    losses = token_losses(Even([ord("q")]), words, tokens, 20, max_tokens=max_tokens)
    table = worst_documents(losses, n=100, least=1, show=10**6, tokenizer=words)
    assert len(table) >= 15
    for row in table.to_dict("records"):
        said = row["text"].replace(" … ", "").replace("\ufffd", "")
        assert set(said) <= set(texts[row["document"]]) and len(said) <= len(texts[row["document"]])
    if max_tokens > len(tokens):
        assert sorted(table["document"]) == list(range(60)) and (table["text"].str.len() > 25).all()
    letter = {texts[number][0] for number in table["document"][:2]}
    assert letter == {"q"} or max_tokens == 400
    assert document_numbers(tokens, words.eot_id)[-1] == 59


def test_characters_of_several_tokens_are_written_whole():
    words = ByteTokenizer()
    tokens = words.encode("„Ärger“ über Öl " * 10)
    losses = token_losses(Even([0]), words, tokens, 20)
    assert "Ärger“ über" in worst_documents(losses, least=1, tokenizer=words)["text"][0]


def test_a_model_that_was_training_goes_on_training():
    model = tiny_model().train()
    continuation_scores(model, [([1], [2])], 8)
    assert model.training


# our own tasks


def test_files_of_our_tasks_are_what_the_function_makes(tmp_path):
    for task in TASK_NAMES:
        (tmp_path / f"{task}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in task_rows(task) if r["half"] == "general")
        )
    write_tasks(tmp_path)
    for task in TASK_NAMES:
        rows = task_rows(task)
        assert task_rows(task, tmp_path) == rows
        halves = [r["half"] for r in rows]
        assert (
            len(rows) >= 100
            and halves.count("tinyworld") == halves.count("general")
            and len({r["id"] for r in rows}) == len(rows)
        )
        assert len({r["question"] for r in rows if r["half"] == "general"}) >= 50
        assert all(len(set(r["choices"])) == len(r["choices"]) == 4 and 0 <= r["answer"] < 4 for r in rows)
        share = np.bincount([r["answer"] for r in rows], minlength=4) / len(rows)
        assert share.max() < 0.4, "the place of the right answer gives it away"


def test_no_item_stands_in_the_training_split(tmp_path, monkeypatch):
    from kimi_nb.data import prepare

    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path))
    run = RunConfig().override(
        {"data.corpus": "pydocs:0.5,tinyworld:0.5", "data.tokenizer": "byte", "data.max_tokens": 1500000}
    )
    data = prepare(run.data, 64)
    text = re.sub(
        r"\s+",
        " ",
        bytes(np.asarray(data.train)[np.asarray(data.train) < 256].astype(np.uint8)).decode("utf-8", "replace"),
    ).lower()
    assert "plus" in text and "moo" in text  # the world is there
    for task in TASK_NAMES:
        for r in task_rows(task):
            question = re.sub(r"\s+", " ", r["question"].removeprefix("Question: ").removesuffix("\nAnswer:")).lower()
            said = f"{question} {r['choices'][r['answer']]}".lower()
            assert said not in text and (r["half"] == "general" or question not in text), (task, said)


def test_an_untrained_model_is_at_chance_and_chance_is_computed():
    results = run_benchmarks(tiny_model(), ByteTokenizer(), list(TASK_NAMES))
    for r in results.values():
        assert r["status"] == "done" and r["chance"] == 0.25 and r["n"] == 120 and r["version"] == 1.0
        for half in r["halves"].values():
            assert half["n"] == 60 and abs(half["score"] - 0.25) < 4 * half["stderr"]
    assert abs(overall_score(results)) < 0.15


def test_a_model_that_knows_the_answers_has_them_all_right(monkeypatch):
    rows = task_rows("arithmetic")[:30]
    known = {r["question"]: r["choices"][r["answer"]] for r in rows}
    lm = harness_model(tiny_model(512), ByteTokenizer())
    lm.loglikelihood = lambda requests: [
        (0.0 if known[r.args[0]] == r.args[1].strip() else -1.0, False) for r in requests
    ]
    monkeypatch.setattr("kimi_nb.evals.harness.harness_model", lambda *a: lm)
    assert run_benchmarks(tiny_model(512), ByteTokenizer(), "arithmetic", limit=30)["arithmetic"]["score"] == 1.0


@pytest.mark.parametrize("context", [16, 512])
def test_what_the_context_cuts_off_is_counted(context):
    cut = run_benchmarks(tiny_model(context), ByteTokenizer(), "simple_qa", limit=20)["simple_qa"]["cut"]
    assert (cut["items"], cut["share"] > 0) == ((20, True) if context == 16 else (0, False))


# rows


def test_missing_rows_are_skipped_with_the_reason(tmp_path):
    results = run_benchmarks(tiny_model(), ByteTokenizer(), "hellaswag,arithmetic", data_dir=tmp_path, limit=10)
    r = results["hellaswag"]
    assert r["status"].startswith("skipped: ") and "hellaswag.jsonl" in r["status"] and "score" not in r
    assert (
        results["arithmetic"]["status"] == "done" and results.frame().set_index("task").loc["hellaswag", "score"] != 0
    )
    assert overall_score({"hellaswag": r}) is None


GOOD = dict(
    ind=1,
    activity_label="Cooking",
    ctx_a="A man stirs.",
    ctx_b="he",
    endings=["eats.", "sleeps.", "runs.", "sits."],
    label="1",
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "endings"}), "row 1 lacks endings"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD | dict(endings=["eats."])), "row 2: endings has 1 different choice"),
        (json.dumps(GOOD | dict(label="4")), "label is '4', task hellaswag allows 0 to 3"),
        (json.dumps(GOOD | dict(label="first")), "label is 'first'"),
        ("{", "row 1 is no JSON"),
        ("[1]", "row 1 is a list"),
    ],
)
def test_bad_rows_are_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "hellaswag.jsonl").write_text(text)
    with pytest.raises(BenchmarkError) as e:
        run_benchmarks(tiny_model(), ByteTokenizer(), "hellaswag", data_dir=tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_names_of_tasks():
    assert len(pick_tasks("tiny")) == 9 and {t.group for t in pick_tasks("glue,superglue")} == {"glue", "superglue"}
    with pytest.raises(BenchmarkError, match="piqa"):
        pick_tasks("pika")


# real rows


@real_rows
def test_every_public_task_with_rows_here_is_scored():
    results = run_benchmarks(tiny_model(), ByteTokenizer(), "all", data_dir=ROWS, limit=3, bootstrap=20)
    there = {t.name for t in TASKS.values() if (ROWS / f"{t.file}.jsonl").is_file()}
    assert {n for n, r in results.items() if r["status"] == "done"} == there | set(TASK_NAMES)
    assert {n for n, r in results.items() if r["status"] != "done"} == {"qqp", "mnli"}
    for r in results.values():
        if r["status"] == "done":
            assert r["n"] == 3 and math.isfinite(r["score"]) and 0 <= r["chance"] <= 1 and r["version"] is not None


@real_rows
def test_a_score_has_its_error_though_nothing_is_bootstrapped():
    """The harness gives none at all then: a plan's scores would have no interval."""
    names = "hellaswag,qnli,cola,cb,record"
    drawn, plain = (
        run_benchmarks(tiny_model(), ByteTokenizer(), names, data_dir=ROWS, limit=12, bootstrap=b) for b in (20, 0)
    )
    for name in names.split(","):
        assert plain[name]["score"] == drawn[name]["score"] and plain[name]["stderr"] is not None, name
        if name != "cola":  # Matthews' coefficient has no formula: left out one at a time, or drawn again
            assert plain[name]["stderr"] == pytest.approx(drawn[name]["stderr"]), name


@real_rows
def test_batch_size_does_not_change_a_score():
    names = "lambada,hellaswag,siqa,cola,cb"
    first, second = (
        run_benchmarks(tiny_model(256), ByteTokenizer(), names, data_dir=ROWS, limit=12, batch_size=b, bootstrap=20)
        for b in (None, 5)
    )
    for n in first:
        assert first[n]["score"] == second[n]["score"] and first[n]["scores"].get("perplexity", 1) == pytest.approx(
            second[n]["scores"].get("perplexity", 1), rel=1e-5
        )


@real_rows
def test_a_transformers_model_scores_as_in_the_harness_alone(tmp_path):
    import lm_eval.tasks
    import yaml
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = PairTokenizer.from_folder(ROWS / "gpt2", "gpt2")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words.inner, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=512)).eval()
    names = ("lambada", "hellaswag", "cola")
    ours = run_benchmarks(model, tokenizer, ",".join(names), data_dir=ROWS, limit=5, bootstrap=20)
    same = run_benchmarks(model, words, ",".join(names), data_dir=ROWS, limit=5, bootstrap=20)
    home = Path(lm_eval.tasks.__file__).parent
    for n in names:
        t = TASKS[n]
        (tmp_path / f"{n}.rows").write_text("\n".join((ROWS / f"{t.file}.jsonl").read_text().splitlines()[:5]) + "\n")
        kw = dict(data_files={t.split: str(tmp_path / f"{n}.rows")}, cache_dir=str(tmp_path / "cache"))
        (tmp_path / f"{n}.yaml").write_text(
            yaml.safe_dump(
                dict(
                    include=str(home / t.source),
                    task=f"alone_{n}",
                    dataset_path="json",
                    dataset_name=None,
                    training_split=None,
                    dataset_kwargs=kw,
                )
            )
        )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    alone = harness(
        HFLM(pretrained=model, tokenizer=tokenizer), manager.load([f"alone_{n}" for n in names]), bootstrap_iters=0
    )["results"]
    for n in names:
        for key, value in ours[n]["scores"].items():
            assert value == alone[f"alone_{n}"][f"{key},none"] == same[n]["scores"][key], (n, key)


@real_rows
def test_chance_of_lambada_and_squad():
    rows = read_rows(ROWS / "squad.jsonl", TASKS["squad"], 5)
    level = chance_level(TASKS["squad"], [dict(arguments=[("", {})], doc=r, target="") for r in rows], 257)
    assert 0 < level["exact"] < level["partial"] < 0.2
    word = chance_level(TASKS["lambada"], [dict(arguments=[("a b", " cd")], doc={}, target="")], 10, list)
    assert word["acc"] == pytest.approx(1e-3) and word["perplexity"] == pytest.approx(1000)


# command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from kimi_nb.train import save_model

    run = RunConfig().override(
        {
            "model.d_model": 16,
            "model.n_layers": 1,
            "model.n_heads": 2,
            "model.d_ff": 32,
            "model.max_seq_len": 32,
            "model.vocab_size": 257,
            "data.tokenizer": "byte",
        }
    )
    return save_model(tmp_path_factory.mktemp("eval") / "final", KimiModel(run.model), run, ByteTokenizer())


def test_eval_prints_json(checkpoint, capsys):
    assert main(["eval", "--checkpoint", str(checkpoint), "--tasks", "arithmetic", "--limit", "5", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["tasks"]["arithmetic"]["n"] == 5 and math.isfinite(out["overall"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tasks", "helaswag"], "task 'helaswag' is unknown"),
        (["--tasks", "tiny", "--data-dir", "/nowhere"], "is no folder"),
        (["--tasks", "tiny", "--limit", "0"], "limit 0 is below 1"),
        (["--limit", "5"], "give --tasks too"),
    ],
)
def test_eval_refuses_in_one_line(checkpoint, capsys, argv, words):
    assert main(["eval", "--checkpoint", str(checkpoint), *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_transformers_folder_is_loaded(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = PairTokenizer.train(["the cow says moo " * 50, "a b c d e f"], 260)
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_layer=1, n_embd=16, n_head=2, n_positions=128)).save_pretrained(
        tmp_path / "m"
    )
    PreTrainedTokenizerFast(tokenizer_object=words.inner, eos_token="<|endoftext|>").save_pretrained(tmp_path / "m")
    model, tokenizer = load_any(tmp_path / "m")
    assert main(["eval", "--checkpoint", str(tmp_path / "m"), "--tasks", "arithmetic", "--limit", "3"]) == 0
    assert not (tmp_path / "m" / "scores").exists()  # it is nobody's run
    assert run_benchmarks(model, tokenizer, "arithmetic", limit=3)["arithmetic"]["n"] == 3
    with pytest.raises(ValueError, match=r"no folder|no checkpoint"):
        load_any(tmp_path / "nothing")
    begun = RunFolder(tmp_path / "begun")
    begun.write_config(RunConfig())
    with pytest.raises(ValueError, match="a run without a checkpoint so far"):
        load_any(begun.path)
