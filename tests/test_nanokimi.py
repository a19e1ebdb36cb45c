"""nanoKimi's interface: its snippets run, its files load, and what is said about nanoGPT was measured."""

import io
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_run

from kimi_nb.bench import NanoGPTComparison, nanogpt_equal
from kimi_nb.cli import main
from kimi_nb.config import ConfigError, KimiError, ModelConfig, RunConfig
from kimi_nb.data import ByteTokenizer, DataError, PairTokenizer, prepare
from kimi_nb.model import KimiModel, count_parameters
from kimi_nb.study import Record, Store
from kimi_nb.use import (
    ArrayDataset,
    Generator,
    ModelEvaluator,
    TextConfig,
    TextDataProcessor,
    dataset_settings,
    keep_dataset,
    read_config,
    toy_dataset,
    train_on,
)

REPO = Path(__file__).resolve().parents[1]

# as nanoKimi's description has it, but for the first line's package
SNIPPET = """import torch
from kimi_nb import KimiModel, KimiConfig, Generator

# Create model configuration
config = KimiConfig(
    n_layer=12,
    n_head=12, 
    n_embd=768,
    vocab_size=50257,
    block_size=1024,
    moe={
        "use_moe": True,
        "num_experts": 8,
        "top_k": 2,
    }
)

# Create and use model
model = KimiModel(config)
generator = Generator(model)

# Generate text
text = generator.generate_text("The future of artificial intelligence", max_new_tokens=50)
print(text)
"""  # noqa: W291


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Data sets are remembered by name in the cache: a test's names are its own."""
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def texts(tmp_path):
    """Two training files and a validation file of other words."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(40)]
    for name, n in (("train1.txt", 900), ("train2.txt", 900), ("val.txt", 400)):
        (tmp_path / name).write_text(" ".join(rng.choice(words, n)) + f" {name[:3]} end")
    return tmp_path


def ran(*argv):
    """`kimi-nb` with these arguments has to succeed."""
    assert main([str(a) for a in argv]) == 0


# --- the package -------------------------------------------------------------------------------------------------


def test_the_names_come_without_torch_until_one_needs_it():
    light = "KimiConfig, RunConfig, ModelEvaluator, TextDataProcessor, TokenDataset"
    without = f"import sys; from kimi_nb import {light}; KimiConfig(n_layer=1); assert 'torch' not in sys.modules"
    code = f"{without}; from kimi_nb import KimiModel, Generator; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
    import kimi_nb

    assert (
        kimi_nb.KimiModel is KimiModel
        and kimi_nb.KimiConfig is ModelConfig
        and {"Generator", "NanoGPTComparison", "__version__"} <= set(dir(kimi_nb))
    )
    with pytest.raises(AttributeError, match="has no attribute 'KimiModell'"):
        _ = kimi_nb.KimiModell


@pytest.mark.slow
def test_the_snippet_runs_as_written(data_dir, capsys, monkeypatch):
    """Twelve layers, 768 wide, eight experts, GPT-2's vocabulary: constructed, and 50 tokens written."""
    monkeypatch.setattr(
        PairTokenizer, "from_hub", classmethod(lambda cls, name: cls.from_folder(data_dir / "gpt2", name))
    )
    here: dict = {}
    exec(SNIPPET, here)
    assert len(here["generator"].tokenizer.encode(here["text"])) >= 25 and capsys.readouterr().out.strip()
    assert (
        here["model"].config.flat()
        | {
            "n_layers": 12,
            "n_heads": 12,
            "d_model": 768,
            "max_seq_len": 1024,
            "ffn.kind": "moe",
            "moe.n_experts": 8,
            "moe.top_k": 2,
        }
        == here["model"].config.flat()
    )


def test_the_snippet_runs_at_a_small_size(capsys):
    small = (
        SNIPPET.replace("n_layer=12", "n_layer=2")
        .replace("n_embd=768", "n_embd=24")
        .replace("vocab_size=50257", "vocab_size=257")
    )
    with pytest.warns(UserWarning, match="no tokenizer was given"):
        exec(small, {})
    assert capsys.readouterr().out


def test_the_snippet_is_the_descriptions_own(repo):
    text = repo.parent / "shared" / "requirements" / "nanokimi.md"
    if not text.is_file():
        pytest.skip("needs ../shared/requirements/nanokimi.md, which is not part of the checkout")
    assert SNIPPET.replace("from kimi_nb import", "from nanokimi import") in text.read_text(encoding="utf-8")


def one_more(n, vocabulary=256):
    """Ids that count on, of bytes."""
    return np.arange(n) % 7 + ord("a")


class Counting:
    """A data set by a program: no text stands behind it."""

    tokenizer, vocab_size, fingerprint = ByteTokenizer(), ByteTokenizer().vocab_size, "counting"
    train, val, test = one_more(900), one_more(200), one_more(0)
    n_bytes = dict(train=900, val=200, test=0)


@pytest.fixture
def counting(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    return keep_dataset("counting", Counting())


def test_a_data_set_of_ones_own_leaves_a_record(counting, tmp_path):
    from kimi_nb.train import fit

    run = tiny_run(train__steps=3).override({f"data.{k}": v for k, v in counting.data.model_dump().items()})
    record = fit(run, tmp_path / "fit", progress=False)
    assert record.ok and record.provenance["data"]["fingerprint"] == counting.tokens.fingerprint
    assert record.metrics["val_bpb"] == pytest.approx(record.metrics["val_loss"] / math.log(2))
    assert "test_loss" not in record.metrics


@pytest.mark.slow
def test_a_data_set_of_ones_own_trains_everywhere(counting, tmp_path, capsys):
    """In a study's worker processes, on the command line and in the workbench's picker it is the same run."""
    from kimi_nb.lab import Picker
    from kimi_nb.runner import run_study
    from kimi_nb.study import Arm, Study

    run = tiny_run(train__steps=3).override({f"data.{k}": v for k, v in counting.data.model_dump().items()})
    arms = [Arm("a"), Arm("b", {"model.norm.kind": "rmsnorm"})]
    study = Study(name="own", base=run, baseline="a", seeds=(0,), arms=arms)
    records = run_study(study, Store(tmp_path / "results"), progress=False, workers=1)
    assert {r.provenance["data"]["fingerprint"] for r in records} == {counting.tokens.fingerprint} and len(records) == 2
    run.save(tmp_path / "run.yaml")
    command = ["train", "--config", tmp_path / "run.yaml", "--dataset", "counting", "--out", tmp_path / "out"]
    assert main([*map(str, command), "--quiet", "--yes"]) == 0
    assert f"run {run.run_id}" in capsys.readouterr().out and run.run_id in {r.run_id for r in records}
    assert Picker(run).run.run_id == run.run_id


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(train=np.ones(90)), "train is not a 1-D array of whole numbers from 0 to 256"),
        (dict(val=np.array([300] * 90)), "val is not a 1-D array of whole numbers from 0 to 256"),
        (dict(n_bytes=None), "the data set is a "),
    ],
)
def test_a_data_set_that_is_none_is_refused(change, told, tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path))
    own = Counting()
    for name, value in change.items():
        setattr(own, name, value)
    if change.get("n_bytes", 1) is None:
        own = types.SimpleNamespace(train=own.train)
    with pytest.raises(DataError, match=told):
        keep_dataset("mine", own)
    assert not list(tmp_path.rglob("meta.json"))


def test_tokens_that_were_kept_follow_their_bytes(counting):
    """Another data set under the same name is another run; one that was altered is refused."""
    run = tiny_run().override({f"data.{k}": v for k, v in counting.data.model_dump().items()})
    before = run.run_id
    other = Counting()
    other.train = one_more(901)
    assert keep_dataset("counting", other).tokens.fingerprint != counting.tokens.fingerprint
    assert run.run_id != before
    file = counting.tokens.folder / "train.bin"
    file.write_bytes(file.read_bytes()[:-2] + b"zz")
    with pytest.raises(DataError, match=r"train\.bin was altered"):
        prepare(counting.data)


# --- configuration files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "width", "experts", "kind", "low", "high"),
    [
        ("nano", 6, 384, 4, "non_embedding", 9e6, 11e6),
        ("small", 12, 768, 8, "total", 122e6, 126e6),
        ("medium", 24, 1024, 16, "total", 330e6, 360e6),
    ],
)
def test_the_three_sizes_are_those_of_the_description(name, layers, width, experts, kind, low, high):
    run, tracking = read_config(REPO / "examples" / f"{name}.yaml")
    config = run.model if run.model.vocab_size else run.model.override(vocab_size=4096)
    assert (config.n_layers, config.d_model, config.moe.n_experts, config.ffn.kind, tracking.tool) == (
        layers,
        width,
        experts,
        "moe",
        "none",
    )
    assert read_config(f"{name}.yaml")[0] == run  # kimi-nb train --config nano.yaml
    assert (
        RunConfig.load(REPO / "examples" / f"{name}.yaml") == run
    )  # one vocabulary: the project's own reader takes them too
    with torch.device("meta"):
        assert low < count_parameters(KimiModel(config, seed=None))[kind] < high


@pytest.mark.parametrize("name", ["nano", "small", "medium"])
def test_the_three_sizes_have_the_three_features(name):
    """Experts, Muon and latent attention; a cache that is a quarter of attention over all tokens."""
    for run in (read_config(f"{name}.yaml")[0], RunConfig.preset(name)):
        a = run.model.attention
        assert (a.kind, run.model.ffn.kind, run.train.optimizer.name) == ("latent", "moe", "muon")
        assert run.model.max_seq_len % a.chunk_size == 0 and 4 * a.n_latents * 4 == 2 * a.chunk_size
        shared = 8 * run.model.d_model // 3
        assert 0.9 * shared <= run.model.moe.n_experts * run.model.expert_width <= shared


PLANS = {  # the numbers of two research plans: path -> value
    "guide": {
        "model.vocab_size": 50257,
        "model.dropout": 0.1,
        "model.moe.aux_loss_weight": 0.01,
        "train.steps": 1000,
        "train.lr": 1e-3,
        "train.eval_every": 500,
        "train.grad_clip": 1.0,
        "train.optimizer.weight_decay": 0.01,
        "data.num_documents": 2000,
        "data.max_tokens": 500_000,
        "seed": 42,
    },
    "tiny_llm": {
        "train.steps": 10_000,
        "train.lr": 0.01,
        "train.eval_every": 1000,
        "train.save_every": 1000,
        "train.optimizer.name": "muon",
        "data.num_documents": 3000,
        "data.max_tokens": 1_000_000,
    },
}
BOTH = {"model.d_model": 384, "model.n_layers": 6, "model.n_heads": 8, "model.d_ff": 1536, "model.max_seq_len": 512}


@pytest.mark.parametrize("name", PLANS)
def test_two_examples_have_the_numbers_of_a_research_plan(name):
    """An override that would change something says that the number is another."""
    run, _ = read_config(f"{name}.yaml")
    asked = BOTH | {"train.batch_size": 24, "model.moe.n_experts": 8, "model.moe.top_k": 2} | PLANS[name]
    assert run.override(asked) == run


def test_the_snippets_model_has_the_size_of_its_description():
    config = ModelConfig(
        n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024,
        moe={"use_moe": True, "num_experts": 8, "top_k": 2},
    )  # fmt: skip
    with torch.device("meta"):
        assert 122e6 < count_parameters(KimiModel(config, seed=None))["total"] < 126e6


NANOKIMI = """
model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 32, moe: {use_moe: true, num_experts: 4, top_k: 2}}
training:
  max_steps: 50
  batch_size: 4
  learning_rate: 2e-3
  weight_decay: 0.2
  optimizer: muon
  mixed_precision: true
  compile_model: false
  use_wandb: true
  wandb_project: "my-nanokimi-experiments"
  wandb_run_name: "experiment-1"
data: {dataset: tinyworld, tokenizer_name: byte}
"""


def test_a_file_that_is_nowhere_is_refused_by_name(capsys):
    assert main(["train", "--config", "nanno.yaml"]) == 2
    assert capsys.readouterr().err == "kimi-nb: error: nanno.yaml cannot be read: No such file or directory\n"


def test_a_file_in_the_projects_own_names_is_not_translated(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("train: {steps: 7, optimizer: {name: muon}}\ntracking: {tool: wandb}\n")
    monkeypatch.setattr("kimi_nb.use.nanokimi.from_nanokimi", lambda data: pytest.fail("translated"))
    run, tracking = read_config(tmp_path / "own.yaml")
    assert (run.train.steps, run.train.optimizer.name, tracking.tool) == (7, "muon", "wandb")


def test_nanokimis_file_is_read_and_every_switch_does_something(tmp_path):
    def read(text):
        (tmp_path / "c.yaml").write_text(text)
        return read_config(tmp_path / "c.yaml")

    run, tracking = read(NANOKIMI)
    assert (
        run.flat()
        | {
            "model.n_layers": 1,
            "model.max_seq_len": 32,
            "model.ffn.kind": "moe",
            "model.moe.n_experts": 4,
            "train.steps": 50,
            "train.batch_size": 4,
            "train.lr": 2e-3,
            "train.optimizer.weight_decay": 0.2,
            "train.optimizer.name": "muon",
            "train.precision": "auto",
            "data.corpus": "tinyworld",
            "data.tokenizer": "byte",
        }
        == run.flat()
    )
    assert (tracking.tool, tracking.project, tracking.name) == ("wandb", "my-nanokimi-experiments", "experiment-1")
    for change, path, value in (
        ("mixed_precision: true", "train.precision", "fp32"),
        ("compile_model: false", "train.compile", True),
    ):
        flipped = read(NANOKIMI.replace(change, change.split(":")[0] + (": false" if "true" in change else ": true")))[
            0
        ]
        assert {k: v for k, v in flipped.flat().items() if v != run.flat()[k]} == {path: value}
    assert read(NANOKIMI.replace("use_wandb: true", "use_wandb: false"))[1].tool == "none"
    assert read(NANOKIMI.replace("use_wandb", "use_trackio"))[1].tool == "trackio"
    for wrong, line in (
        ("use_wandb: true", "training.use_wandb 'maybe' is not true or false"),
        ("compile_model: false", "train.compile 'maybe' is not true or false"),
    ):
        with pytest.raises(ConfigError, match=re.escape(line)):
            read(NANOKIMI.replace(wrong, wrong.split(":")[0] + ": maybe"))


def test_training_and_generation_on_the_command_line(tmp_path, monkeypatch, capsys):
    """The commands of the quick start, cut to seconds."""
    (tmp_path / "nano.yaml").write_text(
        NANOKIMI.replace("tinyworld", "tinyworld\n  num_documents: 60\n  ".replace("\n  ", ", ").rstrip(", "))
    )
    out = tmp_path / "checkpoints" / "nano"
    ran("train", "--config", tmp_path / "nano.yaml", "--max-steps", 6, "--no-wandb", "--out", out, "--quiet")
    assert re.search(r"steps +6\n", capsys.readouterr().out)
    for how in ([], ["--stream"]):
        ran(
            "generate", "--checkpoint", out, "--prompt", "The future of AI is", "--max-new-tokens", 8, "--seed", 1, *how
        )
    first, second = capsys.readouterr().out.split("The future of AI is")[1:]
    assert first.strip("\n") == second.strip("\n") and first
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n\n"))
    ran("generate", "--checkpoint", out, "--interactive", "--max-new-tokens", 5)
    g = Generator.from_checkpoint(out)
    assert g.generate_text("Once", use_cache=True, seed=3) == g.generate_text("Once", use_cache=False, seed=3)


def test_checkpoints_that_are_asked_for_stay(tmp_path, capsys):
    """Those on the way, and they can be scored; without a step to write them at, asking is refused."""
    tiny = ["--data.corpus", "tinyworld", "--data.num_documents", 60, "--data.tokenizer", "byte", "--model.d_model", 16]
    train = ["train", *tiny, "--train.steps", 6, "--quiet", "--scores", "none", "--keep", 2]
    out = tmp_path / "run"
    ran(*train, "--train.save_every", 2, "--out", out)
    kept = sorted(path.name for path in (out / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000004"]  # the end is the final one
    ran("eval", "--checkpoint", out / "checkpoints" / kept[0])
    capsys.readouterr()
    assert main([*map(str, train), "--out", str(tmp_path / "none")]) == 2
    assert "--keep 2 waits for --train.save_every N" in capsys.readouterr().err


def test_max_steps_cuts_the_warm_up_of_a_file_and_not_one_that_was_asked_for(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        NANOKIMI.replace("max_steps: 50", "max_steps: 50\n  warmup_steps: 20").replace(
            "dataset: tinyworld", "corpus: tinyworld, num_documents: 60"
        )
    )
    trial = [
        "train",
        "--config",
        str(tmp_path / "c.yaml"),
        "--no-track",
        "--quiet",
        "--out",
        str(tmp_path / "out"),
        "--max-steps",
    ]
    ran(*trial, 3)
    assert capsys.readouterr().err == "kimi-nb: train.warmup_steps 20 of the file is cut to the 3 steps asked for\n"
    assert RunConfig(**Record.from_json((tmp_path / "out" / "result.json").read_text()).config).train.warmup_steps == 3
    for arguments, line in (
        (["3", "--train.warmup_steps", "4"], "train.warmup_steps 4 is over steps 3"),
        (["0"], "train.steps 0 trains nothing: give --max-steps 1 or more"),
    ):
        assert main(trial + arguments) == 2
        assert capsys.readouterr().err == f"kimi-nb: error: {line}\n"


# --- data --------------------------------------------------------------------------------------------------------


def test_validation_is_the_files_that_were_given_for_it(texts, tmp_path, capsys):
    config = TextConfig(tokenizer_name="bpe:300", block_size=32)
    train_path, val_path = made = TextDataProcessor(config).process_dataset(
        "my_dataset", train_files=[texts / "train1.txt", texts / "train2.txt"], val_files=[texts / "val.txt"]
    )
    read = lambda path: made.tokens.tokenizer.decode(np.fromfile(path, dtype="<u2")).split("<|endoftext|>")[:-1]
    assert read(val_path) == [(texts / "val.txt").read_text()]
    assert sorted(read(train_path)) == sorted((texts / n).read_text() for n in ("train1.txt", "train2.txt"))
    # by name in a file, a run trains on the one and is scored on the other
    (tmp_path / "c.yaml").write_text(
        NANOKIMI.replace("{dataset: tinyworld, tokenizer_name: byte}", "{dataset: my_dataset}")
    )
    run = read_config(tmp_path / "c.yaml")[0]
    assert run.data == made.data and prepare(run.data).fingerprint == made.tokens.fingerprint
    ran("train", "--config", tmp_path / "c.yaml", "--max-steps", 3, "--no-wandb", "--out", tmp_path / "out", "--quiet")
    record = Record.from_json((tmp_path / "out" / "result.json").read_text())
    assert record.metrics["val_tokens"] == len(np.fromfile(val_path, dtype="<u2")) - 1
    # and on the command line, by its name or its corpus
    capsys.readouterr()
    ran("data", "--dataset", "my_dataset")
    ran("data", "--data.corpus", made.corpus, "--data.tokenizer", "bpe:300", "--data.test_fraction", 0)
    assert capsys.readouterr().out.count(f"fingerprint {made.tokens.fingerprint}") == 2


def test_the_processors_own_snippets(texts, data_dir, monkeypatch):
    monkeypatch.setattr(
        PairTokenizer, "from_hub", classmethod(lambda cls, name: cls.from_folder(data_dir / "gpt2", name))
    )
    monkeypatch.chdir(texts)
    processor = TextDataProcessor(TextConfig(tokenizer_name="gpt2", block_size=1024))
    train_path, val_path = processor.process_dataset(
        "my_dataset", train_files=["train1.txt", "train2.txt"], val_files=["val.txt"]
    )
    assert train_path.is_file() and val_path.is_file()
    made = TextDataProcessor(TextConfig()).process_dataset("openwebtext", ["train1.txt"], ["val.txt"])
    assert (
        made.tokens.vocab_size == 50257 and dataset_settings("openwebtext")["corpus"] == made.corpus
    )  # what was processed goes before the hub


def test_what_cannot_be_processed_is_refused_in_one_line(texts):
    p = TextDataProcessor(TextConfig(tokenizer_name="byte", block_size=32))
    train, val = texts / "train1.txt", texts / "val.txt"
    odd = texts / "a,b.txt"
    odd.write_text("text " * 50)
    short = texts / "short.txt"
    short.write_text("too short")
    for arguments, line in (
        (("x", [train], []), "no val files"),
        (("x", [train], [train]), "two splits"),
        (("x", [texts / "none.txt"], [val]), "does not exist"),
        (("x", [odd], [val]), "rename it"),
        (("pydocs", [train], [val]), "is not possible"),
        (("a/b", [train], [val]), "is not possible"),
        (("x", [train], [short]), "needs 33"),
    ):
        with pytest.raises(KimiError, match=line) as e:
            p.process_dataset(*arguments)
        assert "\n" not in str(e.value)
    assert dataset_settings("x") == dict(corpus="x")  # nothing that failed is remembered


def test_the_name_of_the_toy_set_is_taken_and_no_files_may_be_none(texts):
    p = TextDataProcessor(TextConfig(tokenizer_name="byte", block_size=32))
    train, val = texts / "train1.txt", texts / "val.txt"
    with pytest.raises(KimiError, match=r"'toy' is not possible: .* none of .*, toy"):
        p.process_dataset("toy", train, val)
    with pytest.raises(KimiError, match="no val files"):
        p.process_dataset("mine", train, None)
    assert p.process_dataset("mine", train, val, None).data == p.process_dataset("mine", train, val).data


def test_the_toy_data_set_cannot_be_learned():
    toy = toy_dataset(6000)
    run = RunConfig(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32), train=dict(steps=60, batch_size=8, lr=5e-3)
    )
    model, losses = train_on(run, toy.tokens)
    assert 4.1 < ModelEvaluator().evaluate(model, toy)["loss"] < 4.4 and losses[-1] > 4.0  # ln 64 = 4.16


class Alternating:
    """The interface and nothing more, as a user would write it."""

    tokenizer = ByteTokenizer()
    train, val, test = (np.tile(np.array([97, 98], dtype=np.uint16), n) for n in (500, 60, 0))
    vocab_size, fingerprint, n_bytes = 257, "alternating", dict(train=1000, val=120, test=0)


def test_a_data_set_of_ones_own_can_be_trained_on_and_scored():
    run = RunConfig(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16), train=dict(steps=120, batch_size=8, lr=1e-2)
    )
    model, _ = train_on(run, Alternating())
    assert ModelEvaluator().evaluate_perplexity(model, Alternating()) < 1.5
    assert Generator(model).generate_text("ab", 4, greedy=True) == "abab"
    same = ArrayDataset(Alternating.train, Alternating.val, ByteTokenizer())
    assert ModelEvaluator().evaluate(model, same)["bits_per_byte"] == pytest.approx(
        ModelEvaluator().evaluate(model, Alternating())["bits_per_byte"]
    )
    with pytest.raises(KimiError, match="ids below 257"):
        ArrayDataset([1, 300], [1], ByteTokenizer())


def test_training_on_a_data_set_takes_the_steps_of_the_run(tmp_path):
    from kimi_nb.train import fit

    run = tiny_run(train__eval_every=0)
    record = fit(run, tmp_path / "run", progress=False)
    _, losses = train_on(run, prepare(run.data))
    assert losses == record.curves["train_loss"]["value"]


def test_perplexity_is_that_of_the_definition():
    """exp of the mean negative log-likelihood over all tokens but the first, by hand in float64."""
    model, ids = (
        KimiModel(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257), seed=1),
        ByteTokenizer().encode("The cat sat on the mat. " * 8)[:161],
    )
    found = ModelEvaluator().evaluate_perplexity(model, ids)
    with torch.no_grad():
        total = 0.0
        for start in range(0, 160, 16):
            x = torch.as_tensor(ids[start : start + 17])[None]
            logp = model(x[:, :-1]).logits.double().log_softmax(-1)
            total -= logp[0, torch.arange(16), x[0, 1:]].sum().item()
    assert found == pytest.approx(math.exp(total / 160), rel=1e-5)
    with pytest.raises(KimiError, match="the model's vocabulary has 257"):
        ModelEvaluator().evaluate(model, np.full(40, 300))


def test_what_a_data_set_stands_for_is_trained_on_as_itself(texts):
    made = TextDataProcessor(TextConfig(tokenizer_name="byte", block_size=16)).process_dataset(
        "mine", texts / "train1.txt", texts / "val.txt"
    )
    run = RunConfig(model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16), train=dict(steps=2, batch_size=2))
    assert train_on(run, made)[1] == train_on(run, made.tokens)[1]
    with pytest.raises(KimiError, match="data set 'mine' is only a name"):
        train_on(run, "mine")


def test_the_evaluator_takes_a_folder_and_refuses_what_it_cannot_score_in_one_line(tmp_path):
    from kimi_nb.train import fit

    run = tiny_run()
    record = fit(run, tmp_path / "run", progress=False)
    found = ModelEvaluator(max_tokens=run.train.eval_tokens).evaluate(tmp_path / "run", run.data, run.seq_len)
    assert found["loss"] == pytest.approx(record.metrics["val_loss"], rel=1e-5)
    model, ids = (
        KimiModel(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257), seed=1),
        np.arange(40),
    )
    assert ModelEvaluator().evaluate(model, torch.as_tensor(ids)) | {"seconds": 0} == ModelEvaluator(
        precision="auto"
    ).evaluate(model, list(ids)) | {"seconds": 0}
    for options, arguments, line in (
        ({}, (model, ids - 1), "the text has token -1: ids are at least 0"),
        ({}, (model, ids + 0.5), "the token ids are float64: give whole numbers"),
        ({}, (model, ids > 3), "the token ids are bool: give whole numbers"),
        ({}, (model, "pets"), "data set 'pets' is only a name: give "),
        ({}, (model, model), "the data set is a KimiModel: give "),
        ({}, (model, [[1], [2, 3]]), "the data set is a list: give "),
        ({}, (model, {}), "the data set is a dict: give "),
        ({}, (model, ids, 0), "seq_len 0 is not possible: a whole number of at least 1"),
        ({}, (model, ids, 8.0), "seq_len 8.0 is not possible"),
        (dict(max_tokens=-5), (model, ids), "max_tokens -5 is not possible"),
        (dict(precision="fp8"), (model, ids), "precision 'fp8' is unknown: one of auto, fp32, bf16, fp16"),
        (dict(precision="fp16"), (model, ids), "precision 'fp16' is not possible on a CPU: fp32 or bf16"),
        ({}, (None, ids), "the model is a NoneType: give a KimiModel, the folder of a run"),
        ({}, (torch.nn.Linear(2, 2), ids), "the Linear does not say its context: give seq_len"),
        ({}, (tmp_path / "none", ids), "holds no checkpoint"),
    ):
        with pytest.raises(KimiError, match=re.escape(line)) as e:
            ModelEvaluator(**options).evaluate(*arguments)
        assert "\n" not in str(e.value)


# --- nanoGPT -----------------------------------------------------------------------------------------------------


def contest(**changes):
    """A small MoE run and a small budget."""
    return tiny_run(
        **dict(model__ffn__kind="moe", model__norm__kind="rmsnorm", train__optimizer__name="muon", train__steps=20)
        | changes
    )


def test_the_opponent_is_nanogpt_at_the_same_size():
    for run in (contest(), RunConfig.preset("kimi"), RunConfig.preset("small")):
        g = nanogpt_equal(run)
        m = g.model
        assert (
            m.norm.kind,
            m.norm.bias,
            m.position.kind,
            m.attention.kind,
            m.ffn.kind,
            m.ffn.activation,
            m.tie_embeddings,
            g.train.optimizer.name,
        ) == ("layernorm", False, "learned", "mha", "dense", "gelu", True, "adamw")
        assert (m.d_model, m.n_layers, m.n_heads, m.max_seq_len, m.dense_width) == (
            run.model.d_model,
            run.model.n_layers,
            run.model.n_heads,
            run.model.max_seq_len,
            4 * run.model.d_model,
        )
        assert (g.tokens_per_step, g.train.steps, g.data, g.seed) == (
            run.tokens_per_step,
            run.train.steps,
            run.data,
            run.seed,
        )


def test_the_table_holds_the_runs_numbers_whichever_way_they_fall(tmp_path, capsys):
    store = Store(tmp_path)
    compare = NanoGPTComparison(store, speed=False)
    fair = compare.compare_runs(contest(), seeds=2)
    for name in ("nanoKimi", "nanoGPT"):
        mine = [r for r in store.records() if (r.run.model.ffn.kind == "moe") == (name == "nanoKimi")]
        assert len(mine) == 2 and fair["test_bpb"][name] == pytest.approx(
            np.mean([r.metrics["test_bpb"] for r in mine])
        )
        assert fair["total_parameters"][name] == mine[0].metrics["total_parameters"]
    shown = capsys.readouterr().out
    assert f"{fair['test_bpb']['nanoKimi']:.4f}" in shown and "2 pairs of seeds" in shown and fair.verdict is not None
    for lr_kimi, lr_gpt, winner in ((1e-7, 3e-3, "nanoGPT"), (3e-3, 1e-7, "nanoKimi")):
        run = contest(train__lr=lr_kimi)
        result = NanoGPTComparison(speed=False, show=False).compare_runs(run, nanogpt_equal(run, lr=lr_gpt))
        row = result.frame.set_index("name").loc["test_bpb"]
        assert row["better"] == winner and (row["change"] > 0) == (winner == "nanoGPT")


def test_what_the_store_holds_is_not_trained_again(tmp_path, monkeypatch):
    compare = NanoGPTComparison(str(tmp_path), speed=False, show=False)
    first = compare.compare_runs(contest())
    monkeypatch.setattr("kimi_nb.train.loop.Trainer.step", lambda *a: pytest.fail("trained again"))
    assert compare.compare_runs(contest()).frame.equals(first.frame)


def test_budgets(monkeypatch):
    compare = NanoGPTComparison(speed=False, show=False)
    tokens = compare.compare_runs(contest())
    assert (
        tokens["tokens"]["nanoKimi"] == tokens["tokens"]["nanoGPT"]
        and tokens["training_flops"]["nanoKimi"] != tokens["training_flops"]["nanoGPT"]
    )
    flops = compare.compare_runs(contest(), budget="flops")["training_flops"]
    assert flops["nanoKimi"] == pytest.approx(flops["nanoGPT"], rel=0.03)
    monkeypatch.setattr(
        NanoGPTComparison,
        "_speed",
        lambda self, runs: __import__("pandas").DataFrame(dict(name=["nanoKimi", "nanoGPT"], step_seconds=[0.3, 0.1])),
    )
    steps = compare.compare_runs(contest(train__steps=10), budget="seconds")["steps"]
    assert (steps["nanoKimi"], steps["nanoGPT"]) == (10, 30)
    with pytest.raises(KimiError, match="budget 'money' is unknown: one of tokens, flops, seconds"):
        compare.compare_runs(contest(), budget="money")


def test_a_budget_of_tokens_sets_the_opponents_steps():
    run = contest(train__steps=4)
    other = nanogpt_equal(run, steps=40).override({"train.warmup_steps": 30})
    compare = NanoGPTComparison(speed=False, show=False)
    found = compare.compare_runs(run, other)
    assert found["tokens"]["nanoKimi"] == found["tokens"]["nanoGPT"] and found.runs["nanoGPT"].train.warmup_steps == 4
    assert f"equal budget of tokens: 4 steps of {run.tokens_per_step:,} tokens" in found.title
    with pytest.raises(
        KimiError, match="a step of nanoGPT has 64 tokens, one of nanoKimi 128: both need the same batches"
    ):
        compare.compare_runs(run, other.override({"train.batch_size": run.train.batch_size // 2}))


def test_the_opponents_steps_to_the_target_are_measured(monkeypatch):
    """The loss falls below its end early, or a seed ends above the mean end: that one counts with its whole length."""
    from kimi_nb.stats import claims as analysis

    ask = analysis.with_targets

    def early(frame, curves, baseline):
        out = ask(frame, curves, baseline)
        return out.assign(
            steps_to_target=out["steps_to_target"].where(
                out["arm"] != baseline, out["seed"].map({0: 10.0, 1: math.nan})
            )
        )

    monkeypatch.setattr(analysis, "with_targets", early)
    found = NanoGPTComparison(speed=False, show=False).compare_runs(contest(), seeds=2)
    assert found["steps_to_target"]["nanoGPT"] == (10 + 20) / 2


def test_models_and_folders_of_models_are_compared_as_they_are(tmp_path):
    from kimi_nb.train import fit

    run = contest()
    fit(run, tmp_path / "kimi", progress=False)
    data = prepare(run.data)
    model, _ = train_on(nanogpt_equal(run), data)
    result = NanoGPTComparison(speed=False, show=False).compare_models(tmp_path / "kimi", model, data)
    assert result["val_ppl"]["nanoGPT"] == pytest.approx(ModelEvaluator().evaluate_perplexity(model, data))
    assert result["active_parameters"]["nanoKimi"] < result["total_parameters"]["nanoKimi"]
    with pytest.raises(KimiError, match="the nanoGPT model is a Linear"):
        NanoGPTComparison(show=False).compare_models(model, torch.nn.Linear(2, 2), data)


def test_speed_and_memory_are_measured():
    result = NanoGPTComparison(show=False).compare_runs(contest())
    for metric in ("tokens_per_second", "inference_tokens_per_second", "peak_memory_mb"):
        assert min(result[metric].values()) > 0
    assert any("alone and in turns" in n for n in result.notes)
